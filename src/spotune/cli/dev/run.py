"""``spotune dev run``."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import click

from spotune.cli.dev.choose import chosen, cluster_option, say
from spotune.cli.options import config_options, open_workspace

if TYPE_CHECKING:
    from spotune.launch.skypilot.dev import RunWish
    from spotune.launch.workspace import Workspace


@click.command()
@click.argument("config")
@config_options
@click.option("--name", default="", metavar="ID", help="Run id; default from the config's name.")
@click.option("--infra", default="", metavar="NAME", help="Where; default as in config/spotune.yaml (local).")
@cluster_option("Run it on this dev cluster.")
@click.option("--gpus", metavar="L4:1", help="GPUs to use; on a cluster all of its machine's.")
@click.option("--share", type=float, metavar="0.5", help="A share of each GPU of a cluster, so that two runs fit.")
@click.option("--env", "envs", multiple=True, metavar="K=V", help="Environment of the run.")
@click.option("--save-every", default="", metavar="50|5m", help="Save every so many steps, or so often.")
def run(
    config: str,
    overrides: tuple[str, ...],
    profile: str,
    name: str,
    infra: str,
    cluster: str,
    gpus: str | None,
    share: float | None,
    envs: tuple[str, ...],
    save_every: str,
) -> None:
    """Run CONFIG now with its profile `dev`. Ctrl-C stops it; it is never recovered.

    Here, beside the queue; with --cluster, --infra or another default than local on a dev cluster, which is brought
    up when it is not there. The code here is synced to it first.
    """
    from spotune.contracts.errors import InputError

    workspace = open_workspace()
    infra = infra or workspace.settings.infra
    with _ended_by_hangup():
        if cluster or infra.split("/", 1)[0] != "local":
            from spotune.launch.skypilot.dev import RunWish
            from spotune.launch.task import env_pairs

            wish = RunWish(profile, overrides, gpus, share, save_every, env_pairs(envs))
            sys.exit(_on_cluster(config, name, "" if cluster else infra, chosen(cluster, workspace), wish, workspace))
        if share is not None:
            raise InputError("--share", "runs here share a GPU without it", remedy="leave it out")
        sys.exit(_here(config, workspace, gpus, profile, overrides, name=name, envs=envs, save_every=save_every))


def _on_cluster(config: str, name: str, infra: str, cluster: str, wish: "RunWish", workspace: "Workspace") -> int:
    from spotune.cli.launching import check_month
    from spotune.launch.skypilot import booking, clusters, dev

    run_id = dev.check_run(config, name, wish, workspace)
    check_month(workspace)
    if infra and not clusters.list_clusters([cluster]):
        say(f"{cluster}: not there yet, it is brought up on {infra}")
        up = dev.up(dev.DevWish(name=cluster, infra=infra, gpus=wish.gpus, envs=wish.envs), workspace)
        booking.book_names(workspace, [cluster], say)
        for note in up.notes:
            say(note)
    found = clusters.find_cluster(cluster)
    task, kept = dev.run_task(config, run_id, found, wish, workspace), dev.keep_code(run_id, workspace)
    try:
        job_id = clusters.execute(task, cluster)
    except BaseException:
        workspace.store().delete(kept)
        raise
    say(f"{run_id}: job {job_id} on {cluster}")
    try:
        return clusters.follow(cluster, job_id)
    except BaseException:
        clusters.cancel(cluster, job_id)
        say(f"{run_id}: stopped")
        raise


def _here(
    config: str, workspace: "Workspace", gpus: str | None, profile: str, overrides: tuple[str, ...], **given: object
) -> int:
    from spotune.cli.follow import follow
    from spotune.cli.launching import plan_wish, submit_plan
    from spotune.launch import actions
    from spotune.launch.plan import Wish
    from spotune.launch.task import Resources

    wish = Wish(
        config_path=config,
        profile=profile,
        default_profile="dev",
        overrides=overrides,
        infra="local",
        resources=Resources(gpus=gpus, use_spot=False),
        kind="dev",
        **given,  # type: ignore[arg-type]
    )
    plan = plan_wish(wish, workspace)
    submit_plan(plan, workspace)
    click.echo(f"{plan.run_id}: {plan.bucket}/runs/{plan.run_id}", err=True)
    try:
        return follow(workspace, plan.run_id)
    except BaseException:
        actions.cancel(workspace, plan.run_id)
        click.echo(f"{plan.run_id}: stopped", err=True)
        raise


@contextmanager
def _ended_by_hangup() -> Iterator[None]:
    """A closed terminal or a polite kill ends the run like Ctrl-C does."""

    def interrupt(number: int, _: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
