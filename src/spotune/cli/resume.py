"""``spotune resume``."""

import click

from spotune.cli.options import open_workspace


@click.command()
@click.argument("run")
def resume(run: str) -> None:
    """Go on with a run that failed, was cancelled or is paused, from its newest checkpoint.

    A run that no queue of this machine has, since it was started by hand or by a bare `sky`, may go on from then on:
    start it again where it was.
    """
    from spotune.launch import actions

    if actions.resume(open_workspace(), run):
        click.echo(f"{run}: PENDING. Follow it: spotune logs -f {run}")
    else:
        click.echo(f"{run}: may go on. Start it again as before, with SPOTUNE_RUN_ID={run}")
