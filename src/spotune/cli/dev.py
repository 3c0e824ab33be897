"""``spotune dev``: work interactively, here or on a cluster."""

import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from spotune.cli import (
    Lazy,
    agree,
    config_options,
    duration,
    format_option,
    log,
    open_workspace,
    print_json,
    secret_option,
)
from spotune.core.errors import InputError, SubmissionUnknown
from spotune.core.io import columns

if TYPE_CHECKING:
    from spotune.launch.plan import TrainOptions
    from spotune.launch.settings import Workspace
    from spotune.launch.skypilot.clusters import Listed
    from spotune.launch.skypilot.dev import DevRunOptions, RunPlace

cluster_argument = click.argument("cluster", required=False, default="")


def chosen(cluster: str, workspace: "Workspace") -> str:
    """Returns the name that was given, else the name of the user's own cluster."""
    from spotune.launch.skypilot import clusters

    return cluster or clusters.default_name(workspace.env.user)


def reachable(cluster: str, workspace: "Workspace") -> str:
    """Returns the chosen cluster's name, once its ssh configuration is written."""
    from spotune.launch.skypilot import clusters

    name = chosen(cluster, workspace)
    clusters.write_config(name, everyones=bool(cluster))
    return name


def clusters_text(listed: "Sequence[Listed]", now: float) -> str:
    """Returns the table of ``dev ls``."""
    rows = [
        [
            one.cluster.name,
            one.cluster.status,
            one.cluster.infra,
            one.cluster.gpus or "-",
            duration(now - one.cluster.launched_at),
            _money(one.cluster.price_usd_per_hour, 3),
            _money(one.cluster.spent_usd, 2),
            "-" if one.last_active_at is None else duration(now - one.last_active_at),
            _stops(one, now),
            one.why,
        ]
        for one in listed
    ]
    return columns(["CLUSTER", "STATUS", "INFRA", "GPUS", "AGE", "$/HOUR", "SPENT $", "IDLE", "STOPS", "WHY"], rows)


def _money(amount: float | None, digits: int) -> str:
    return "?" if amount is None else f"{amount:.{digits}f}"


def _stops(one: "Listed", now: float) -> str:
    if one.cluster.status != "UP":
        return "-"
    verb = "down" if one.cluster.to_down else "stop"
    if one.stops_at is not None:
        return f"{verb} in {duration(one.stops_at - now)}"
    return "never" if one.idle_minutes is None else f"{verb} {one.idle_minutes:g}m after work"


@click.command()
@click.option("--name", default="", metavar="NAME", help="The cluster's name; default one of your own.")
@click.option("--infra", default="", metavar="NAME", help="Where; default: config/spotune.yaml, else the cheapest.")
@click.option("--gpus", metavar="L4:1", help="GPUs; default one of the cheap ones in tasks/dev.yaml.")
@click.option("--cpus", metavar="N[+]", help="CPUs of the machine.")
@click.option("--memory", metavar="GB[+]", help="Memory of the machine.")
@click.option(
    "-i", "--idle-minutes-to-autostop", "idle_minutes", type=int, metavar="MINUTES",
    help="Stop it after this long without work; default 30.",
)  # fmt: skip
@click.option("--down", is_flag=True, help="Take it down, disk and all, instead of stopping it.")
@click.option("--env", "envs", multiple=True, metavar="K=V", help="Environment of its setup.")
@secret_option
def up(name: str, infra: str, envs: tuple[str, ...], secrets: tuple[str, ...], **given: Any) -> None:
    """Bring up a dev cluster, or reuse the one that is up.

    Syncs the code here to it and sets up its environment from the lock. An idle watcher on it counts ssh sessions,
    VS Code, notebooks, jobs, busy CPUs and GPUs as work. Without any, the cluster stops.
    """
    from spotune.cli.train import check_month
    from spotune.launch.plan import secrets_of
    from spotune.launch.skypilot import clusters, dev
    from spotune.launch.task import env_pairs

    workspace = open_workspace()
    default = "any" if workspace.settings.infra == "local" else workspace.settings.infra
    given |= {"envs": env_pairs(envs), "secrets": secrets_of(secrets, workspace.environ)}
    options = dev.DevOptions(chosen(name, workspace), dev.place(infra or default), **given)
    check_month(workspace)
    done = dev.up(options, workspace)
    cluster = done.cluster
    clusters.book_names(workspace, [cluster.name], log)
    for note in done.notes:
        log(note)
    then = "goes down" if done.down else "stops"
    idle = f"{then} after {done.idle_minutes} min without work" if done.idle_minutes else "idle watcher unchanged"
    is_up = f"{cluster.name} is up{'' if done.is_new else ' already'}"
    log(f"{is_up}: {cluster.gpus or 'no GPU'} on {cluster.infra}; {idle}")
    log(f"next: spotune dev run CONFIG -c {cluster.name} · dev code · dev notebook · dev ssh · dev down")
    click.echo(cluster.name)


@click.command()
@click.argument("config")
@config_options
@click.option("--name", default="", metavar="ID", help="Run id; default from the config's name.")
@click.option("--infra", default="", metavar="NAME", help="Where; default as in config/spotune.yaml (local).")
@click.option("-c", "--cluster", default="", metavar="NAME", help="Run it on this dev cluster.")
@click.option("--gpus", metavar="L4:1", help="GPUs to use; on a cluster, default all of its machine's.")
@click.option("--share", type=float, metavar="0.5", help="Share of a cluster's GPU, so that two runs fit on it.")
@click.option("--env", "envs", multiple=True, metavar="K=V", help="Environment of the run.")
@secret_option
@click.option("--save-every", default="", metavar="50|5m", help="Save interval: steps, or a time.")
def run(
    config: str,
    name: str,
    infra: str,
    cluster: str,
    gpus: str | None,
    share: float | None,
    envs: tuple[str, ...],
    secrets: tuple[str, ...],
    **given: Any,
) -> None:
    """Run CONFIG now with its profile `dev`. Ctrl-C stops it; it is never recovered.

    Runs here, beside the queue. With --cluster, --infra or a default other than local, it runs on a dev cluster, which
    is brought up if it is missing. The code here is synced to it first.
    """
    from spotune.launch.plan import TrainOptions, secrets_of
    from spotune.launch.skypilot import dev
    from spotune.launch.task import Resources, env_pairs

    workspace = open_workspace()
    with _ended_by_hangup():
        if where := dev.run_place(cluster, infra, workspace):
            values = secrets_of(secrets, workspace.environ)
            options = dev.DevRunOptions(gpus=gpus, share=share, envs=env_pairs(envs), secrets=values, **given)
            sys.exit(_on_cluster(config, name, where, options, workspace))
        if share is not None:
            raise InputError("--share", "runs here share a GPU without it", remedy="leave it out")
        resources = Resources(gpus=gpus, use_spot=False)
        given |= {"name": name, "envs": envs, "secrets": secrets, "kind": "dev"}
        sys.exit(_here(TrainOptions(config_path=config, infra="local", resources=resources, **given), workspace))


def _on_cluster(config: str, name: str, where: "RunPlace", options: "DevRunOptions", workspace: "Workspace") -> int:
    from spotune.cli.train import check_month
    from spotune.launch.skypilot import clusters, dev, jobs

    run_id = dev.check_run(config, name, options, workspace)
    check_month(workspace)
    cluster, is_new = dev.run_cluster(where, options, workspace, log)
    if is_new:
        clusters.book_names(workspace, [cluster.name], log)
    task = dev.run_task(config, run_id, cluster, options, workspace)
    kept = dev.keep_code(run_id, workspace)
    try:
        job_id = clusters.execute(task, cluster.name)
    except BaseException:
        clusters.withdraw(cluster.name, run_id)
        workspace.store().delete(kept)
        raise
    log(f"{run_id}: job {job_id} on {cluster.name}")
    try:
        return jobs.follow(cluster.name, job_id)
    except (KeyboardInterrupt, BrokenPipeError):  # after a lost connection the run goes on
        clusters.cancel(cluster.name, job_id)
        log(f"{run_id}: stopped")
        raise


def _here(options: "TrainOptions", workspace: "Workspace") -> int:
    from spotune.cli.runs import follow
    from spotune.cli.train import plan_new, submit_plan
    from spotune.launch.status import Run

    plan = plan_new(options, workspace)
    try:
        submit_plan(plan, workspace)
    except SubmissionUnknown as error:  # it was interrupted, and has begun
        _stop(plan.run_id, workspace)
        raise (error.__cause__ or error) from None
    try:
        log(f"{plan.run_id}: {plan.bucket}/runs/{plan.run_id}")
        return follow(Run.find(workspace, plan.run_id))
    except BaseException:
        _stop(plan.run_id, workspace)
        raise


def _stop(run_id: str, workspace: "Workspace") -> None:
    from spotune.launch import submit
    from spotune.launch.status import Run

    submit.cancel(Run.find_queued(workspace, run_id))
    log(f"{run_id}: stopped")


@contextmanager
def _ended_by_hangup() -> Iterator[None]:
    """Turns SIGTERM and SIGHUP (a closed terminal) into KeyboardInterrupt, so that they end the run as Ctrl-C does."""

    def interrupt(number: int, _: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@click.command()
@cluster_argument
@click.option("--print", "only_print", is_flag=True, help="Print the command and the address, open nothing.")
def code(cluster: str, only_print: bool) -> None:
    """Open VS Code on CLUSTER, default your own, in the folder that is synced to it.

    Prints the command and the address if there is no `code` here. An open window counts as work.
    """
    from spotune.launch.skypilot import clusters

    name = reachable(cluster, open_workspace())
    folder = clusters.read(name, "cd ~/sky_workdir 2> /dev/null || cd; pwd").strip()
    command = ["code", "--remote", f"ssh-remote+{name}", folder]
    click.echo(f"vscode://vscode-remote/ssh-remote+{name}{folder}")
    click.echo(" ".join(command))
    if only_print or shutil.which("code") is None:
        return
    log("opening VS Code")
    sys.exit(clusters.attach(command))


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("-c", "--cluster", default="", metavar="NAME", help="Which dev cluster; default your own.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def ssh(cluster: str, command: tuple[str, ...]) -> None:
    """Open a shell on a dev cluster, or run COMMAND there and exit with its exit code."""
    from spotune.launch.skypilot import clusters

    name = reachable(cluster, open_workspace())
    sys.exit(clusters.attach([*clusters.ssh_command(name), *command]))


@click.command()
@cluster_argument
@click.option("--port", type=click.IntRange(1, 65535), default=8888, show_default=True, metavar="N", help="Port here.")
@click.option("--env", "envs", multiple=True, metavar="K=V", help="Environment of Jupyter.")
@secret_option
def notebook(cluster: str, port: int, envs: tuple[str, ...], secrets: tuple[str, ...]) -> None:
    """Open Jupyter on CLUSTER, default your own, through an ssh tunnel. Ctrl-C closes the tunnel; Jupyter goes on.

    A second call finds the Jupyter that runs there. Only a kernel that is busy, or was lately, counts as work.
    """
    from spotune.launch.plan import secrets_of
    from spotune.launch.skypilot import clusters, dev
    from spotune.launch.task import env_pairs

    workspace = open_workspace()
    given, pairs = secrets_of(secrets, workspace.environ), env_pairs(envs)
    name = reachable(cluster, workspace)
    server = dev.find(name)
    if server is None:
        log(f"{name}: starting Jupyter; the first start installs it there")
        server = dev.start(name, pairs, given, workspace)
    elif envs or secrets:
        log(f"{name}: Jupyter runs there already, without this --env or --secret (File > Shut Down ends it)")
    click.echo(f"http://localhost:{port}/lab?token={server.token}")
    log("opening the tunnel, Ctrl-C closes it")
    try:
        exit_code = clusters.attach(dev.tunnel(name, port, server))
    except KeyboardInterrupt:
        log("\ntunnel closed, Jupyter goes on while its kernels work")
        return
    sys.exit(exit_code)


@click.command()
@format_option()
def ls(output: str) -> None:
    """Show your dev clusters: what each costs an hour now, what holds it, when it stops."""
    from spotune.launch.skypilot import clusters

    listed = clusters.list_dev(open_workspace(), log)
    if output == "json":
        print_json([one.as_row() for one in listed])
    else:
        click.echo(clusters_text(listed, time.time()))


@click.command()
@cluster_argument
def stop(cluster: str) -> None:
    """Stop CLUSTER, default your own, and keep its disk; `dev up` starts it again."""
    from spotune.launch.skypilot import clusters

    workspace = open_workspace()
    name = chosen(cluster, workspace)
    clusters.stop(name)
    clusters.book_names(workspace, [name], log)
    log(f"{name}: stopped; its disk is kept, and paid for")


@click.command()
@cluster_argument
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def down(cluster: str, yes: bool) -> None:
    """Take CLUSTER, default your own, down with everything on it."""
    from spotune.launch.skypilot import clusters

    workspace = open_workspace()
    name = chosen(cluster, workspace)
    agree(f"Take {name} down, with everything that is on it. Proceed?", yes)
    clusters.take_down(name)
    clusters.book_names(workspace, [name], log)
    log(f"{name}: down")


VERBS = {
    "up": "Bring up a dev cluster, or reuse the one that is up.",
    "run": "Run CONFIG now with its profile `dev`, here or on a dev cluster.",
    "code": "Open VS Code on a dev cluster.",
    "ssh": "Open a shell on a dev cluster, or run a command there.",
    "notebook": "Open Jupyter on a dev cluster.",
    "ls": "Show dev clusters: what they cost, what holds them, when they stop.",
    "stop": "Stop a dev cluster and keep its disk.",
    "down": "Take a dev cluster down, with everything on it.",
}


@click.command(cls=Lazy, verbs=VERBS, modules=dict.fromkeys(VERBS, "dev"))
def dev() -> None:
    """Work interactively: here, or on a cluster that stops when nobody works on it."""
