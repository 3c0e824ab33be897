"""``spotune resume``."""

import click

from spotune.cli.options import open_workspace


@click.command()
@click.argument("run")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Go on with this key of its config changed."
)
@click.option("--allow-config-change", is_flag=True, help="Also with another config, data or model than it began with.")
def resume(run: str, overrides: tuple[str, ...], allow_config_change: bool) -> None:
    """Go on with a run that failed, was cancelled or is paused, from its newest checkpoint.

    Its training length, logging, saving and evaluation may be --set freely; the rest, and data or a model that were
    edited, need --allow-config-change. A run that no queue of this machine has, since it was started by hand or by a
    bare `sky`, may go on from then on: start it again where it was.
    """
    from spotune.launch import actions
    from spotune.launch.revise import Edit

    edit = Edit(overrides, allow_config_change) if overrides or allow_config_change else None
    resumed = actions.resume(open_workspace(), run, edit)
    changed = f", changed: {resumed.change.as_followed()}" if resumed.change else ""
    if resumed.is_queued:
        click.echo(f"{run}: PENDING{changed}. Follow it: spotune logs -f {run}")
    else:
        click.echo(f"{run}: may go on{changed}. Start it again as before, with SPOTUNE_RUN_ID={run}")
