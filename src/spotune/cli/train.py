"""``spotune check``, ``train`` and ``resume``: from a config to a run under way."""

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

import spotune.cli as cli
from spotune.cli import config_options, format_option, log, open_workspace, print_json, secret_option, stall_option
from spotune.core.errors import InfraError, InputError

if TYPE_CHECKING:
    from spotune.cost.collect import Month
    from spotune.launch.plan import Plan, TrainOptions
    from spotune.launch.settings import Workspace
    from spotune.launch.status import Run
    from spotune.launch.submit import Resumption, Submitted

_RESOURCES = ("gpus", "num_nodes", "use_spot", "priority", "cpus", "memory")


def plan_of(given: Mapping[str, Any], source: str, workspace: "Workspace") -> "Plan":
    """Returns the plan of ``train``'s options; with ``source`` the plan that promotes that run."""
    from spotune.launch.plan import TrainOptions, promote
    from spotune.launch.task import Resources

    resources = Resources(**{name: given[name] for name in _RESOURCES})
    config = given["config"] or ""
    if bool(config) == bool(source):
        raise InputError("train", "needs a config or --from RUN, and not both", remedy="spotune train CONFIG")
    rest = {name: value for name, value in given.items() if name not in (*_RESOURCES, "config")}
    options = TrainOptions(config_path=config, resources=resources, **rest)
    return _within_month(promote(source, options, workspace), workspace) if source else plan_new(options, workspace)


def plan_new(options: "TrainOptions", workspace: "Workspace") -> "Plan":
    from spotune.launch.plan import make_plan

    return _within_month(make_plan(options, workspace), workspace)


def month_of(workspace: "Workspace", run_id: str, user: str, team: str) -> "Month":
    """Returns what the month's budgets have left for a run; with an empty ``run_id``, for anything the user pays."""
    from spotune.cli.runs import progress_bar
    from spotune.cost.collect import read_month

    with progress_bar("reading what the month has cost") as progress:
        return read_month(workspace, run_id, user, team, time.time(), log, progress)


def check_month(workspace: "Workspace") -> None:
    """Raises InputError if this user or team has nothing left to spend this month."""
    month_of(workspace, "", workspace.env.user, workspace.settings.team).wall_usd(None)


def _within_month(plan: "Plan", workspace: "Workspace") -> "Plan":
    record = plan.record
    if not workspace.settings.budgets.of(record.user, record.team):
        return plan
    from spotune.cost.collect import within_month

    return within_month(plan, month_of(workspace, plan.run_id, record.user, record.team))


def agree_to(plan: "Plan", workspace: "Workspace", yes: bool) -> None:
    """Shows the plan on stderr and asks for agreement, unless ``yes``. Refuses bad input before it shows anything.

    Without a terminal nobody is asked: a run on this machine starts, since it buys nothing. A run elsewhere, or one
    that another user has revised, is refused without -y.
    """
    from spotune.launch.engine import infra_of
    from spotune.launch.submit import existing, with_existing

    workspace.infra(plan.infra)  # opens the engine: the disk may be full
    found = existing(plan, workspace)
    plan = with_existing(plan, found)
    asks = not yes and cli.can_ask()
    if not yes and not asks:
        if plan.unseen:
            what = f"goes on from what {' and '.join(plan.unseen)} revised"
            raise InputError(plan.run_id, what, remedy="look with --dryrun, then add -y")
        if infra_of(plan.infra) != "local":
            raise InputError("stdin", "no terminal to confirm on", remedy="add -y")
    click.echo(cli.plan_text(plan, time.time()), err=True)
    question = f"Launch {plan.run_id}. Proceed?"
    if found and found.change:
        question = f"Go on with {plan.run_id}, changed: {found.change.as_followed()}. Proceed?"
    cli.agree(question, not asks)


def submit_plan(plan: "Plan", workspace: "Workspace") -> "Submitted":
    """Submits a plan. Logs what happened if the run existed already."""
    from spotune.launch.submit import submit

    done = submit(plan, workspace)
    message = {
        "succeeded": "SUCCEEDED already, nothing to do",
        "active": "submitted already",
        "resumed": f"PENDING, and goes on with a change: {done.change.as_followed()}",
        "cleared": f"may go on with a change: {done.change.as_followed()}. Start it again as before, with"
        f" SPOTUNE_RUN_ID={plan.run_id}",
    }.get(done.outcome)
    if message:
        log(f"{plan.run_id}: {message}")
    return done


@click.command()
@click.argument("config", required=False)
@config_options
@click.option("--infra", default="", metavar="NAME", help="Also ask SkyPilot about NAME; takes seconds.")
@format_option()
def check(
    config: str | None, profile: str, overrides: tuple[str, ...], allow_env: tuple[str, ...], infra: str, output: str
) -> None:
    """Check CONFIG, its data and its model without running anything.

    Prints one line on stderr for each fault of CONFIG and its profiles, and exits with 2.

    Without CONFIG: check this machine and project: settings, bucket, infrastructures and GPUs. Also SkyPilot, if the
    settings name one of its infrastructures.
    """
    from spotune.launch.plan import survey_config, survey_machine, survey_place

    if not config and (profile or overrides):
        raise click.UsageError("--profile and --set need a CONFIG.")
    workspace, silent = open_workspace(), None
    found = survey_config(config, profile, overrides, workspace, allow_env) if config else survey_machine(workspace)
    if infra or not config:
        try:
            found |= survey_place(workspace, infra)
        except InfraError as error:  # raised below: the other facts are shown all the same
            silent = error
    if output == "json":
        print_json(found)
    else:
        for name, value in found.items():
            text = ", ".join(map(str, value)) if isinstance(value, list) else value
            click.echo(f"{name:<16}{'-' if text in ('', None) else text}")
    if silent:
        raise silent


@click.command()
@click.argument("config", required=False)
@config_options
@click.option(
    "--infra", default="", metavar="NAME",
    help="Where to run it: local, a cloud (aws, gcp/REGION, …), kubernetes/CONTEXT, slurm/CLUSTER/PARTITION, or any of"
    " SkyPilot's clouds (any). Default as in config/spotune.yaml (local).",
)  # fmt: skip
@click.option("--gpus", metavar="L4:1", help="GPUs of each machine; default as in the task.")
@click.option("--cpus", metavar="4+", help="CPUs of each machine; default as in the task.")
@click.option("--memory", metavar="16+", help="Memory of each machine, GB; default as in the task.")
@click.option("--num-nodes", type=int, metavar="N", help="Machines; default as in the task.")
@click.option("--use-spot/--no-use-spot", default=None, help="Preemptible machines or not; default as in the task.")
@click.option("--priority", type=int, metavar="N", help="-1000 to 1000, higher first.")
@click.option("--name", default="", metavar="ID", help="Run id; default from the config's name.")
@click.option("--from", "source", default="", metavar="RUN", help="Promote RUN: its config, data and code, unchanged.")
@click.option("--save-every", default="", metavar="50|5m", help="Save interval: steps, or a time.")
@stall_option
@click.option("--budget", metavar="USD", help="Pause, with a checkpoint, once the run has cost this much.")
@click.option("--preemptions", default="", metavar="FILE", help="Planned preemptions, JSONL (local only).")
@click.option("--env", "envs", multiple=True, metavar="K=V", help="Environment of the run.")
@secret_option
@click.option("--allow-config-change", is_flag=True, help="Let --name's run go on with another config, data or model.")
@click.option("--dryrun", is_flag=True, help="Show the plan and stop.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("-d", "--detach", is_flag=True, help="Print the run id and return instead of following the run.")
@format_option("json: print the run id as JSON; implies -d and -y. With --dryrun: the plan.")
def train(source: str, dryrun: bool, yes: bool, detach: bool, output: str, **given: Any) -> None:
    """Submit CONFIG as a job that survives the loss of its machine, and follow it.

    If --name is a run that has ended or is paused, that run goes on with CONFIG as it is now. The training length,
    logging, saving and evaluation may change; other changes need --allow-config-change.

    Uses the config's profile `prod` if it has one. Shows the plan, with all that it takes from elsewhere, and asks, as
    `sky` does. Without a terminal it needs -y, unless the run is on this machine and no other user has revised what it
    goes on from. Ctrl-C, or a reader that leaves (`| head`), stops following; the run goes on.

    Exit codes: 0 finished and certified, 1 failed, 2 bad input, 3 infrastructure failed, 75 ended by a fault that
    another machine may not have, 76 paused.

    A local run's secrets are kept on this machine, readable by you alone, until the run has ended. Otherwise they go
    to SkyPilot's server and are not kept here.
    """
    from spotune.cli.runs import follow
    from spotune.launch.plan import as_json
    from spotune.launch.status import Run
    from spotune.launch.submit import existing, with_existing

    workspace = open_workspace()
    plan = plan_of(given, source, workspace)
    if dryrun:
        plan = with_existing(plan, existing(plan, workspace))
        print_json(as_json(plan)) if output == "json" else click.echo(cli.plan_text(plan, time.time()))
        return
    agree_to(plan, workspace, yes or output == "json")
    outcome = submit_plan(plan, workspace).outcome
    if output == "json":
        print_json({"run_id": plan.run_id})
    elif detach:
        click.echo(plan.run_id)
    elif outcome not in ("succeeded", "cleared"):
        try:
            sys.exit(follow(Run.find(workspace, plan.run_id)))
        except KeyboardInterrupt:
            ways = f"follow it: spotune logs -f {plan.run_id}; stop it: spotune cancel {plan.run_id}"
            log(f"\n{plan.run_id} goes on ({ways})")
            sys.exit(130)
        except OSError:  # the reader of our output has left, or the disk is full
            log(f"{plan.run_id} goes on (follow it: spotune logs -f {plan.run_id})")
            raise


@click.command()
@click.argument("run")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change this key of its config.")
@click.option("--budget", metavar="USD", help="Pause once it has cost this much in all, from its start.")
@stall_option
@click.option("--allow-config-change", is_flag=True, help="Also with another config, data, model or libraries.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def resume(
    run: str, overrides: tuple[str, ...], budget: str | None, stall_after: str, allow_config_change: bool, yes: bool
) -> None:
    """Go on with a run that failed, was cancelled or is paused, from its newest checkpoint.

    --set changes its training length, logging, saving and evaluation freely. Other keys need --allow-config-change; so
    do data or a model that were edited, and a run that failed because libraries changed. A run that was started by
    hand, or by a bare `sky`, is in no queue of this machine: it is cleared to go on, and you start it again yourself.

    Shows what the run takes from elsewhere: overrides, env:, remote code, models and data of others, the revision in
    force. Asks if another user has revised the run; without a terminal that needs -y.
    """
    from spotune.core.environment import parse_stall_after
    from spotune.core.money import parse_usd
    from spotune.launch import submit
    from spotune.launch.status import Run
    from spotune.launch.submit import Edit

    workspace = open_workspace()
    parse_stall_after(stall_after)
    budget_usd = None if budget is None else parse_usd(budget, "--budget")
    found = Run.find(workspace, run)
    month_usd, owner = check_budget(found, budget_usd)
    edit = Edit(overrides, allow_config_change, budget_usd, month_usd, owner, stall_after)
    later: list[str] = []
    resumed = submit.resume(found, edit, lambda resumption: later.extend(agree_to_resumption(resumption, yes)))
    for line in later:
        log(line)
    changed = f", changed: {resumed.change.as_followed()}" if resumed.change else ""
    if resumed.code:
        log(f"{run}: its code is not what it was submitted with: {resumed.code}")
    if resumed.outcome == "resumed":
        click.echo(f"{run}: PENDING{changed}. Follow it: spotune logs -f {run}")
    else:
        click.echo(f"{run}: may go on{changed}. Start it again as before, with SPOTUNE_RUN_ID={run}")


def agree_to_resumption(resumption: "Resumption", yes: bool) -> list[str]:
    """Shows what a run takes from elsewhere and asks, if another user has revised the run.

    Otherwise returns the lines, to be shown once the run goes on: a refusal stays one line.
    """
    run, others = resumption.run_id, " and ".join(resumption.unseen)
    facts = [(origin.kind, cli.origin_text(origin, time.time())) for origin in resumption.takes]
    if others and not yes and not cli.can_ask():
        changes = "; ".join(text for kind, text in facts if kind == "revision")
        raise InputError(run, f"was revised by {others}: revision {changes}", remedy="add -y to go on with it")
    shown = cli.fact_lines([("run", run), *facts]).splitlines() if facts else []
    if yes or not others:
        return shown
    for line in shown:
        log(line)
    cli.agree(f"Go on with {run} as {others} revised it. Proceed?", False)
    return []


def check_budget(run: "Run", budget_usd: float | None) -> tuple[float | None, str]:
    """Refuses a run that would pause again at once, or that the month's budgets cannot pay for.

    Returns (limit that the month's budgets set for a run without its own budget, US dollars in all; budget's owner).
    """
    from spotune.cost.collect import check_wall, report_run
    from spotune.launch.settings import BudgetSettings

    workspace, record = run.workspace, run.record
    is_priced = record is not None and any(row.price_usd_per_hour > 0 for row in record.price_rows())
    if budget_usd is not None and not is_priced:
        raise InputError("--budget", f"cannot be kept: no price was frozen for {run.run_id}", remedy="leave it out")
    if record is None or not is_priced:
        return None, ""
    if budget_usd is None and record.budget_usd is None and workspace.settings.budgets == BudgetSettings():
        return None, ""
    report = report_run(workspace, run.run_id)  # reads the run anew, with all that it cost
    check_wall(report, budget_usd)
    month = month_of(workspace, run.run_id, report["user"], report["team"])
    wall_usd = month.wall_usd(report["budget_usd"] if budget_usd is None else budget_usd)
    return wall_usd, month.tightest.budget.owner if month.tightest else ""
