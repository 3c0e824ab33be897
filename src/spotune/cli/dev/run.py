"""``spotune dev run``."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import click

from spotune.cli.dev.choose import cluster_option, say
from spotune.cli.options import config_options, open_workspace, secret_option

if TYPE_CHECKING:
    from spotune.launch.skypilot.dev import RunWish
    from spotune.launch.skypilot.runplace import RunPlace
    from spotune.launch.workspace import Workspace


@click.command()
@click.argument("config")
@config_options
@click.option("--name", default="", metavar="ID", help="Run id; default from the config's name.")
@click.option("--infra", default="", metavar="NAME", help="Where; default as in config/spotune.yaml (local).")
@cluster_option("Run it on this dev cluster.")
@click.option("--gpus", metavar="L4:1", help="GPUs to use; on a cluster all of its machine's.")
@click.option("--share", type=float, metavar="0.5", help="A share of a GPU of a cluster, so that two runs fit.")
@click.option("--env", "envs", multiple=True, metavar="K=V", help="Environment of the run.")
@secret_option
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
    secrets: tuple[str, ...],
    save_every: str,
    allow_env: tuple[str, ...],
) -> None:
    """Run CONFIG now with its profile `dev`. Ctrl-C stops it; it is never recovered.

    Here, beside the queue; with --cluster, --infra or another default than local on a dev cluster, which is brought
    up when it is not there. The code here is synced to it first.
    """
    from spotune.contracts.errors import InputError
    from spotune.launch.skypilot.runplace import RunPlace

    workspace = open_workspace()
    with _ended_by_hangup():
        if where := RunPlace.read(cluster, infra, workspace):
            from spotune.launch.plan import secrets_of
            from spotune.launch.skypilot.dev import RunWish
            from spotune.launch.task import env_pairs

            values = secrets_of(secrets, workspace.environ)
            wish = RunWish(profile, overrides, gpus, share, save_every, env_pairs(envs), values, allow_env)
            sys.exit(_on_cluster(config, name, where, wish, workspace))
        if share is not None:
            raise InputError("--share", "runs here share a GPU without it", remedy="leave it out")
        given = {"allow_env": allow_env, "name": name, "envs": envs, "secrets": secrets, "save_every": save_every}
        sys.exit(_here(config, workspace, gpus, profile, overrides, **given))


def _on_cluster(config: str, name: str, where: "RunPlace", wish: "RunWish", workspace: "Workspace") -> int:
    from spotune.cli.launching import check_month
    from spotune.launch.skypilot import booking, clusters, dev, joblog
    from spotune.launch.skypilot.runplace import run_cluster

    run_id = dev.check_run(config, name, wish, workspace)
    check_month(workspace)
    cluster, is_new = run_cluster(where, wish, workspace, say)
    if is_new:
        booking.book_names(workspace, [cluster.name], say)
    task, kept = dev.run_task(config, run_id, cluster, wish, workspace), dev.keep_code(run_id, workspace)
    try:
        job_id = clusters.execute(task, cluster.name)
    except BaseException:
        clusters.withdraw(cluster.name, run_id)
        workspace.store().delete(kept)
        raise
    say(f"{run_id}: job {job_id} on {cluster.name}")
    try:
        return joblog.follow(cluster.name, job_id)
    except (KeyboardInterrupt, BrokenPipeError):  # not for trouble on the way to it: the run goes on
        clusters.cancel(cluster.name, job_id)
        say(f"{run_id}: stopped")
        raise


def _here(
    config: str, workspace: "Workspace", gpus: str | None, profile: str, overrides: tuple[str, ...], **given: object
) -> int:
    from spotune.cli.follow import follow
    from spotune.cli.launching import plan_wish, submit_plan
    from spotune.contracts.errors import Unsettled
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
    try:
        submit_plan(plan, workspace)
    except Unsettled as error:  # it was interrupted, and has begun
        _stop(plan.run_id, workspace)
        raise (error.__cause__ or error) from None
    try:
        click.echo(f"{plan.run_id}: {plan.bucket}/runs/{plan.run_id}", err=True)
        return follow(workspace, plan.run_id)
    except BaseException:
        _stop(plan.run_id, workspace)
        raise


def _stop(run_id: str, workspace: "Workspace") -> None:
    from spotune.launch import actions

    actions.cancel(workspace, run_id)
    click.echo(f"{run_id}: stopped", err=True)


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
