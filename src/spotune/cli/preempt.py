"""``spotune preempt``."""

import click

from spotune.cli.options import open_workspace


@click.command()
@click.argument("run")
@click.option("--notice", default="", metavar="30s", help="Warn this long before: SIGTERM, then SIGKILL.")
@click.option("--no-notice", is_flag=True, help="SIGKILL at once.")
def preempt(run: str, notice: str, no_notice: bool) -> None:
    """Take a run's machine away, as a cloud does. The run recovers by itself."""
    from spotune.contracts.durations import parse_duration
    from spotune.launch import actions

    if bool(notice) == no_notice:
        raise click.UsageError("Give either --notice 30s or --no-notice.")
    notice_s = 0.0 if no_notice else parse_duration(notice, "--notice")
    actions.preempt(open_workspace(), run, notice_s)
    click.echo(f"{run}: its machine goes {f'in {notice_s:g} s' if notice_s else 'now'}")
