"""``spotune resume``."""

from typing import TYPE_CHECKING

import click

from spotune.cli.options import open_workspace, stall_option

if TYPE_CHECKING:
    from spotune.launch.actions import Resumption
    from spotune.launch.workspace import Workspace


@click.command()
@click.argument("run")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Go on with this key of its config changed."
)
@click.option("--budget", metavar="USD", help="Pause once it has cost so much in all, from its start on.")
@stall_option
@click.option("--allow-config-change", is_flag=True, help="Also with another config, data, model or libraries.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def resume(
    run: str, overrides: tuple[str, ...], budget: str | None, stall_after: str, allow_config_change: bool, yes: bool
) -> None:
    """Go on with a run that failed, was cancelled or is paused, from its newest checkpoint.

    Its training length, logging, saving and evaluation may be --set freely. The rest needs --allow-config-change; so do
    data or a model that were edited, and a run that failed because libraries changed. A run that no queue of this
    machine has, since it was started by hand or by a bare `sky`, may go on from then on: start it again where it was.

    Shows what the run takes from elsewhere: overrides, env:, remote code, models and data of others, the revision in
    force. Asks where another user has revised the run; where nobody can be asked that needs -y.
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
    later: list[str] = []
    resumed = actions.resume(workspace, run, edit, lambda resumption: later.extend(agree_to(resumption, yes)))
    for line in later:
        click.echo(line, err=True)
    changed = f", changed: {resumed.change.as_followed()}" if resumed.change else ""
    if resumed.code:
        click.echo(f"{run}: its code is not what it was submitted with: {resumed.code}", err=True)
    if resumed.is_queued:
        click.echo(f"{run}: PENDING{changed}. Follow it: spotune logs -f {run}")
    else:
        click.echo(f"{run}: may go on{changed}. Start it again as before, with SPOTUNE_RUN_ID={run}")


def agree_to(resumption: "Resumption", yes: bool) -> list[str]:
    """Asks where another user has revised the run, and shows before that what it takes from elsewhere.

    Returns these lines where nobody is asked: they are shown once the run goes on, so that a refusal stays one line.
    """
    import time

    from spotune.cli.options import agree, can_ask
    from spotune.cli.render import fact_lines, origin_text
    from spotune.contracts.errors import InputError

    run, others = resumption.run_id, " and ".join(resumption.unseen)
    facts = [(origin.kind, origin_text(origin, time.time())) for origin in resumption.takes]
    if others and not yes and not can_ask():
        changes = "; ".join(text for kind, text in facts if kind == "revision")
        raise InputError(run, f"was revised by {others}: revision {changes}", remedy="add -y to go on with it")
    shown = fact_lines([("run", run), *facts]).splitlines() if facts else []
    if yes or not others:
        return shown
    for line in shown:
        click.echo(line, err=True)
    agree(f"Go on with {run} as {others} revised it. Proceed?", False)
    return []


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
