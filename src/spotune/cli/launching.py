"""From options to a run under way: what ``train``, ``resume`` and ``dev`` share."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from spotune.contracts.errors import InputError

if TYPE_CHECKING:
    from spotune.cost.budgets import Month
    from spotune.launch.plan import Plan, Wish
    from spotune.launch.submit import Submitted
    from spotune.launch.workspace import Workspace

AGREE = "look with --dryrun, then add -y"
_RESOURCES = ("gpus", "num_nodes", "use_spot", "priority", "cpus", "memory")


def plan_of(options: Mapping[str, Any], source: str, workspace: "Workspace") -> "Plan":
    """The plan of ``train``'s options; with ``source`` that of a run to promote."""
    from spotune.launch.plan import Wish
    from spotune.launch.promote import promote
    from spotune.launch.task import Resources

    resources = Resources(**{name: options[name] for name in _RESOURCES})
    config = options["config"] or ""
    if bool(config) == bool(source):
        raise InputError("train", "needs a config or --from RUN, and not both", remedy="spotune train CONFIG")
    rest = {name: value for name, value in options.items() if name not in (*_RESOURCES, "config")}
    wish = Wish(config_path=config, resources=resources, **rest)
    return _within_month(promote(source, wish, workspace), workspace) if source else plan_wish(wish, workspace)


def plan_wish(wish: "Wish", workspace: "Workspace") -> "Plan":
    import time
    from random import SystemRandom

    from spotune.launch.plan import make_plan

    return _within_month(make_plan(wish, workspace, time.time, SystemRandom()), workspace)


def month_of(workspace: "Workspace", run_id: str, user: str, team: str) -> "Month":
    """What the month's budgets have left for a run, or with an empty ``run_id`` for whatever that user pays."""
    import time

    from spotune.cli.progress import ProgressBar
    from spotune.cost.budgets import read_month

    with ProgressBar("reading what the month has cost") as progress:
        warn = lambda message: click.echo(message, err=True)  # noqa: E731
        return read_month(workspace, run_id, user, team, time.time(), warn, progress)


def check_month(workspace: "Workspace") -> None:
    """Raises InputError where whoever is here has nothing left to spend in this month."""
    month_of(workspace, "", workspace.env.user, workspace.settings.team).wall_usd(None)


def _within_month(plan: "Plan", workspace: "Workspace") -> "Plan":
    record = plan.record
    if not workspace.settings.budgets.of(record.user, record.team):
        return plan
    from spotune.cost.budgets import within_month

    return within_month(plan, month_of(workspace, plan.run_id, record.user, record.team))


def agree_to(plan: "Plan", workspace: "Workspace", yes: bool) -> None:
    """Shows the plan on stderr, where it is in nobody's way, and asks unless told not to.

    What would be refused is refused before anything is shown. On this machine nothing is bought, so that without a
    terminal nobody is asked; elsewhere that needs -y. So does what another user has revised.
    """
    import time

    from spotune.cli.options import agree, can_ask
    from spotune.cli.render import plan_text
    from spotune.launch.infra import infra_of
    from spotune.launch.submit import existing, with_existing

    workspace.infra(plan.infra)  # opens it: there may be no room for its files
    found = existing(plan, workspace)
    plan = with_existing(plan, found)
    asks = not yes and can_ask()
    if plan.unseen and not yes and not asks:
        raise InputError(plan.run_id, f"goes on from what {' and '.join(plan.unseen)} revised", remedy=AGREE)
    if not yes and not asks and infra_of(plan.infra) != "local":
        raise InputError("stdin", "nobody to ask", remedy="add -y")
    click.echo(plan_text(plan, time.time()), err=True)
    question = f"Launch {plan.run_id}. Proceed?"
    if found and found.change:
        question = f"Go on with {plan.run_id}, changed: {found.change.as_followed()}. Proceed?"
    agree(question, not asks)


def submit_plan(plan: "Plan", workspace: "Workspace") -> "Submitted":
    """Submits, and says so when the run is there already."""
    from spotune.launch.submit import submit

    done = submit(plan, workspace)
    if said := {
        "succeeded": "SUCCEEDED already, nothing to do",
        "active": "submitted already",
        "resumed": f"PENDING, and goes on with a change: {done.change.as_followed()}",
        "cleared": f"may go on with a change: {done.change.as_followed()}. Start it again as before, with"
        f" SPOTUNE_RUN_ID={plan.run_id}",
    }.get(done.outcome):
        click.echo(f"{plan.run_id}: {said}", err=True)
    return done
