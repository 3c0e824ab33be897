"""``spotune cancel``."""

import click

from spotune.cli.options import open_workspace


@click.command()
@click.argument("run")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def cancel(run: str, yes: bool) -> None:
    """Stop a run and keep its checkpoints. Returns when nothing of it runs any more."""
    from spotune.cli.options import agree
    from spotune.launch import actions
    from spotune.launch.infra import ACTIVE

    workspace = open_workspace()
    status = actions.engine_run(workspace, run)
    if status.state not in ACTIVE:
        click.echo(f"{run}: {status.state} already")
        return
    agree(f"Cancel {run} ({status.state})?", yes)
    ended = actions.cancel(workspace, run)
    click.echo(f"{run}: {ended.state}. Its checkpoints are kept: spotune resume {run}")
