"""``spotune queue``, ``logs``, ``cancel`` and ``preempt``."""

import sys

import click

from spotune.cli.options import format_option, open_workspace

# ``spotune queue``.


@click.command()
@click.option(
    "-a",
    "--all",
    "everything",
    is_flag=True,
    help="Also those of others, those that ended more than a day ago or elsewhere.",
)
@format_option()
def queue(everything: bool, output: str) -> None:
    """Show what runs, what waits and what has ended.

    In the order that they would run: highest priority first, then order of submission; this machine's runs, then
    SkyPilot's. Without -a: your runs that have not ended, and those that ended within a day. While SkyPilot does not
    answer, that is said and its runs are missing. While the bucket does not answer, the runs are shown as the queues
    know them.
    """
    import time

    from spotune.cli.options import print_json, say
    from spotune.cli.render import queue_text
    from spotune.launch.engine import JobStatus
    from spotune.launch.status import as_row, list_runs

    known: list[JobStatus] = []

    def show_known(line: str) -> None:
        say(line)
        if known:
            say(f"So far, as the queues say:\n{queue_text(known, time.time())}")

    runs = list_runs(open_workspace(show_known), everything, warn=say, known=known.extend)
    if output == "json":
        print_json([as_row(run) for run in runs])
    else:
        width = 40 if sys.stdout.isatty() else None
        click.echo(queue_text(runs, time.time(), width) if runs else "No runs. Start one: spotune train CONFIG")


# ``spotune logs``.


@click.command()
@click.argument("run")
@click.option(
    "-f", "--follow", "following", is_flag=True, help="Go on until the run has ended. Ctrl-C leaves it running."
)
def logs(run: str, following: bool) -> None:
    """Print a run's log, that of all its attempts."""
    from spotune.cli.follow import follow, settled
    from spotune.launch.submit import engine_run

    workspace = open_workspace()
    status = engine_run(workspace, run)
    if following:
        follow(workspace, run)
        return
    for line in workspace.infra(status.infra).logs(run, follow=False):
        click.echo(settled(line))


# ``spotune cancel``.


@click.command()
@click.argument("run")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def cancel(run: str, yes: bool) -> None:
    """Stop a run and keep its checkpoints. Returns when nothing of it runs any more."""
    from spotune.cli.options import agree
    from spotune.launch import submit
    from spotune.launch.engine import ACTIVE

    workspace = open_workspace()
    status = submit.engine_run(workspace, run)
    if status.state not in ACTIVE:
        click.echo(f"{run}: {status.state} already")
        return
    agree(f"Cancel {run} ({status.state})?", yes)
    ended = submit.cancel(workspace, run)
    click.echo(f"{run}: {ended.state}. Its checkpoints are kept: spotune resume {run}")


# ``spotune preempt``.


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
    from spotune.core.environment import parse_duration
    from spotune.core.errors import InputError
    from spotune.launch import submit

    if bool(notice) == no_notice:
        raise click.UsageError("Give either --notice 30s or --no-notice.")
    notice_s = 0.0 if no_notice else parse_duration(notice, "--notice")

    def ask(question: str) -> None:
        if not yes and not can_ask():
            raise InputError("stdin", f"nobody to ask: {question}", remedy="add -y")
        agree(question, yes)

    submit.preempt(open_workspace(), run, notice_s, ask)
    click.echo(f"{run}: its machine goes {f'in {notice_s:g} s' if notice_s else 'now'}")
