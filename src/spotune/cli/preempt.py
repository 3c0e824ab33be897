"""``spotune preempt``."""

import click

from spotune.cli.options import open_workspace


@click.command()
@click.argument("run")
@click.option("--notice", default="", metavar="30s", help="Warn this long before: SIGTERM, then SIGKILL.")
@click.option("--no-notice", is_flag=True, help="SIGKILL at once; on a cloud: terminate its instances.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask before instances of a cloud are terminated.")
def preempt(run: str, notice: str, no_notice: bool, yes: bool) -> None:
    """Take a run's machine away, as a cloud does. The run recovers by itself.

    Slurm and Kubernetes take it with or without a notice. A cloud's instances are terminated behind SkyPilot's back,
    which only the machine of the API server can do, and which comes without a notice.
    """
    from spotune.cli.options import agree, can_ask
    from spotune.contracts.durations import parse_duration
    from spotune.contracts.errors import InputError
    from spotune.launch import actions

    if bool(notice) == no_notice:
        raise click.UsageError("Give either --notice 30s or --no-notice.")
    notice_s = 0.0 if no_notice else parse_duration(notice, "--notice")

    def ask(question: str) -> None:
        if not yes and not can_ask():
            raise InputError("stdin", f"nobody to ask: {question}", remedy="add -y")
        agree(question, yes)

    actions.preempt(open_workspace(), run, notice_s, ask)
    click.echo(f"{run}: its machine goes {f'in {notice_s:g} s' if notice_s else 'now'}")
