"""``spotune logs``."""

import click

from spotune.cli.options import open_workspace


@click.command()
@click.argument("run")
@click.option(
    "-f", "--follow", "following", is_flag=True, help="Go on until the run has ended. Ctrl-C leaves it running."
)
def logs(run: str, following: bool) -> None:
    """Print a run's log, that of all its attempts."""
    from spotune.cli.follow import follow, settled
    from spotune.launch.actions import engine_run

    workspace = open_workspace()
    status = engine_run(workspace, run)
    if following:
        follow(workspace, run)
        return
    for line in workspace.infra(status.infra).logs(run, follow=False):
        click.echo(settled(line))
