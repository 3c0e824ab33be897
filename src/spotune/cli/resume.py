"""``spotune resume``."""

from typing import TYPE_CHECKING

import click

from spotune.cli.options import open_workspace, stall_option

if TYPE_CHECKING:
    from spotune.launch.workspace import Workspace


@click.command()
@click.argument("run")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Go on with this key of its config changed."
)
@click.option("--budget", metavar="USD", help="Pause once it has cost so much in all, from its start on.")
@stall_option
@click.option("--allow-config-change", is_flag=True, help="Also with another config, data, model or libraries.")
def resume(
    run: str, overrides: tuple[str, ...], budget: str | None, stall_after: str, allow_config_change: bool
) -> None:
    """Go on with a run that failed, was cancelled or is paused, from its newest checkpoint.

    Its training length, logging, saving and evaluation may be --set freely. The rest needs --allow-config-change; so do
    data or a model that were edited, and a run that failed because libraries changed. A run that no queue of this
    machine has, since it was started by hand or by a bare `sky`, may go on from then on: start it again where it was.
    """
    from spotune.contracts.durations import parse_stall_after
    from spotune.contracts.money import parse_usd
    from spotune.launch import actions
    from spotune.launch.revise import Edit

    workspace = open_workspace()
    parse_stall_after(stall_after)
    budget_usd = None if budget is None else parse_usd(budget, "--budget")
    month_usd, owner = check_budget(workspace, run, budget_usd)
    edit = Edit(overrides, allow_config_change, budget_usd, month_usd, owner, stall_after)
    resumed = actions.resume(workspace, run, edit)
    changed = f", changed: {resumed.change.as_followed()}" if resumed.change else ""
    if resumed.code:
        click.echo(f"{run}: its code is not what it was submitted with: {resumed.code}", err=True)
    if resumed.is_queued:
        click.echo(f"{run}: PENDING{changed}. Follow it: spotune logs -f {run}")
    else:
        click.echo(f"{run}: may go on{changed}. Start it again as before, with SPOTUNE_RUN_ID={run}")


def check_budget(workspace: "Workspace", run: str, budget_usd: float | None) -> tuple[float | None, str]:
    """Refuses what would pause again at once, or what the month's budgets cannot pay for.

    Returns the wall that these leave to a run without a budget of its own, US dollars in all, and whose they are.
    """
    from spotune.cli.launching import month_of
    from spotune.contracts.errors import InputError
    from spotune.contracts.keys import Keys
    from spotune.contracts.revisions import record_in_force
    from spotune.cost.budgets import check_wall
    from spotune.cost.collect import report_run
    from spotune.launch.settings import Budgets
    from spotune.launch.status import find_run

    record = record_in_force(workspace.store(find_run(workspace, run).bucket), Keys(run))
    is_priced = record is not None and any(row.price_usd_per_hour > 0 for row in record.price_rows())
    if budget_usd is not None and not is_priced:
        raise InputError("--budget", f"cannot be kept: no price was frozen for {run}", remedy="leave it out")
    if record is None or not is_priced:
        return None, ""
    if budget_usd is None and record.budget_usd is None and workspace.settings.budgets == Budgets():
        return None, ""
    report = report_run(workspace, run)
    check_wall(report, budget_usd)
    month = month_of(workspace, run, report["user"], report["team"])
    wall_usd = month.wall_usd(report["budget_usd"] if budget_usd is None else budget_usd)
    return wall_usd, month.tightest.budget.owner if month.tightest else ""
