"""``spotune queue``."""

import sys

import click

from spotune.cli.options import format_option, open_workspace


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
    from spotune.launch.infra import JobStatus
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
