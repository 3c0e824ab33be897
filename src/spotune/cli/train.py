"""``spotune train``."""

import sys
from typing import Any

import click

from spotune.cli.options import config_options, format_option, open_workspace, secret_option, stall_option


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
@click.option("--save-every", default="", metavar="50|5m", help="Save every so many steps, or so often.")
@stall_option
@click.option("--budget", metavar="USD", help="Pause, with a checkpoint, once the run has cost so much.")
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

    With --name of a run that stands still and a CONFIG that has changed, that run goes on with it: freely where only
    the training length, logging, saving or evaluation changed, else with --allow-config-change.

    Uses the config's profile `prod` if it has one. Shows the plan and asks, as `sky` does; where nobody can be asked
    it needs -y, unless it runs on this machine. Ctrl-C and a reader that leaves (`| head`) stop following, the run goes
    on. Exit codes: 0 finished and certified, 1 failed, 2 bad input, 3 infrastructure failed, 75 ended by a fault that
    another machine may not have, 76 paused. A secret's value is kept on this machine alone, readable by you alone,
    until the run has ended; elsewhere it is handed to SkyPilot's server and not kept.
    """
    from spotune.cli.follow import follow
    from spotune.cli.launching import agree_to, plan_of, submit_plan
    from spotune.cli.options import print_json
    from spotune.cli.render import plan_text
    from spotune.launch.plan import as_json
    from spotune.launch.submit import existing

    workspace = open_workspace()
    plan = plan_of(given, source, workspace)
    if dryrun:
        existing(plan, workspace)
        print_json(as_json(plan)) if output == "json" else click.echo(plan_text(plan))
        return
    agree_to(plan, workspace, yes or output == "json")
    outcome = submit_plan(plan, workspace).outcome
    if output == "json":
        print_json({"run_id": plan.run_id})
    elif detach:
        click.echo(plan.run_id)
    elif outcome not in ("succeeded", "cleared"):
        try:
            sys.exit(follow(workspace, plan.run_id))
        except KeyboardInterrupt:
            ways = f"follow it: spotune logs -f {plan.run_id}; stop it: spotune cancel {plan.run_id}"
            click.echo(f"\n{plan.run_id} goes on ({ways})", err=True)
            sys.exit(130)
        except OSError:  # whoever read our output has left, or it has no room
            click.echo(f"{plan.run_id} goes on (follow it: spotune logs -f {plan.run_id})", err=True)
            raise
