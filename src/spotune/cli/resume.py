"""``spotune resume``."""

import click

from spotune.cli.options import open_workspace


@click.command()
@click.argument("run")
def resume(run: str) -> None:
    """Go on with a run that failed, was cancelled or is paused, from its newest checkpoint."""
    from spotune.launch import actions

    actions.resume(open_workspace(), run)
    click.echo(f"{run}: PENDING. Follow it: spotune logs -f {run}")
