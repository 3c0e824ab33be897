"""``spotune dev``: work interactively, here or on a cluster."""

import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import click

from spotune.cli import (
    Decorator,
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
from spotune.core.io import columns

if TYPE_CHECKING:
    from spotune.launch.settings import Workspace
    from spotune.launch.skypilot.clusters import Listed
    from spotune.launch.skypilot.dev import DevRunOptions, RunPlace

# What the verbs of ``dev`` have in common: which cluster, and a word to people.

cluster_argument = click.argument("cluster", required=False, default="")


def cluster_option(help_text: str = "Which dev cluster; default your own.") -> Decorator:
    return click.option("-c", "--cluster", default="", metavar="NAME", help=help_text)


def chosen(cluster: str, workspace: "Workspace") -> str:
    """The name given, else that of the user's own cluster."""
    from spotune.launch.skypilot.clusters import default_name

    return cluster or default_name(workspace.env.user)


# The table of ``dev ls``.


def clusters_text(listed: "Sequence[Listed]", now: float) -> str:
    rows = [
        [
            each.cluster.name,
            each.cluster.status,
            each.cluster.infra,
            each.cluster.gpus or "-",
            duration(now - each.cluster.launched_at),
            _money(each.cluster.price_usd_per_hour, 3),
            _money(each.cluster.spent_usd, 2),
            "-" if each.last_active_at is None else duration(now - each.last_active_at),
            _stops(each, now),
            each.why,
        ]
        for each in listed
    ]
    return columns(["CLUSTER", "STATUS", "INFRA", "GPUS", "AGE", "$/HOUR", "SPENT $", "IDLE", "STOPS", "WHY"], rows)


def _money(amount: float | None, digits: int) -> str:
    return "?" if amount is None else f"{amount:.{digits}f}"


def _stops(each: "Listed", now: float) -> str:
    if each.cluster.status != "UP":
        return "-"
    verb = "down" if each.cluster.to_down else "stop"
    if each.stops_at is not None:
        return f"{verb} in {duration(each.stops_at - now)}"
    if each.idle_minutes is None:
        return "never"
    return f"{verb} {each.idle_minutes:g}m after work"


# ``spotune dev up``.


@click.command()
@click.option("--name", default="", metavar="NAME", help="The cluster's name; default one of your own.")
@click.option(
    "--infra", default="", metavar="NAME", help="Where; default as in config/spotune.yaml, else the cheapest."
)
@click.option("--gpus", metavar="L4:1", help="GPUs; default one of the cheap ones in tasks/dev.yaml.")
@click.option("--cpus", metavar="N[+]", help="CPUs of the machine.")
@click.option("--memory", metavar="GB[+]", help="Memory of the machine.")
@click.option(
    *("-i", "--idle-minutes-to-autostop", "idle_minutes"),
    type=int,
    metavar="MINUTES",
    help="Stop it after so long without work; default 30.",
)
@click.option("--down", is_flag=True, help="Take it down then, disk and all, instead of stopping it.")
@click.option("--env", "envs", multiple=True, metavar="K=V", help="Environment of its setup.")
@secret_option
def up(name: str, infra: str, envs: tuple[str, ...], secrets: tuple[str, ...], **given: object) -> None:
    """Bring up a dev cluster, or reuse the one that is up.

    The code here is synced to it and its environment set up from the lock. An idle watcher on it counts ssh sessions,
    VS Code, notebooks, jobs, busy CPUs and GPUs as work; without any it stops.
    """
    from spotune.cli.train import check_month
    from spotune.launch.plan import secrets_of
    from spotune.launch.skypilot.clusters import book_names
    from spotune.launch.skypilot.dev import DevOptions, place
    from spotune.launch.skypilot.dev import up as bring_up
    from spotune.launch.task import env_pairs

    workspace = open_workspace()
    default = "any" if workspace.settings.infra == "local" else workspace.settings.infra
    values = {"envs": env_pairs(envs), "secrets": secrets_of(secrets, workspace.environ)}
    options = DevOptions(name=chosen(name, workspace), infra=place(infra or default), **values, **given)  # type: ignore[arg-type]
    check_month(workspace)
    done = bring_up(options, workspace)
    cluster = done.cluster
    book_names(workspace, [cluster.name], log)
    for note in done.notes:
        log(note)
    what = f"{cluster.gpus or 'no GPU'} on {cluster.infra}"
    then = "goes" if done.down else "stops"
    held = f"{then} after {done.idle_minutes} min without work" if done.idle_minutes else "holds as before"
    log(f"{cluster.name} is up{'' if done.is_new else ' already'}: {what}; {held}")
    log(f"next: spotune dev run CONFIG -c {cluster.name} · dev code · dev notebook · dev ssh · dev down")
    click.echo(cluster.name)


# ``spotune dev run``.


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
    from spotune.core.errors import InputError
    from spotune.launch.skypilot.dev import RunPlace

    workspace = open_workspace()
    with _ended_by_hangup():
        if where := RunPlace.read(cluster, infra, workspace):
            from spotune.launch.plan import secrets_of
            from spotune.launch.skypilot.dev import DevRunOptions
            from spotune.launch.task import env_pairs

            values = secrets_of(secrets, workspace.environ)
            options = DevRunOptions(profile, overrides, gpus, share, save_every, env_pairs(envs), values, allow_env)
            sys.exit(_on_cluster(config, name, where, options, workspace))
        if share is not None:
            raise InputError("--share", "runs here share a GPU without it", remedy="leave it out")
        given = {"allow_env": allow_env, "name": name, "envs": envs, "secrets": secrets, "save_every": save_every}
        sys.exit(_here(config, workspace, gpus, profile, overrides, **given))


def _on_cluster(config: str, name: str, where: "RunPlace", options: "DevRunOptions", workspace: "Workspace") -> int:
    from spotune.cli.train import check_month
    from spotune.launch.skypilot import clusters, dev, jobs
    from spotune.launch.skypilot.dev import run_cluster

    run_id = dev.check_run(config, name, options, workspace)
    check_month(workspace)
    cluster, is_new = run_cluster(where, options, workspace, log)
    if is_new:
        clusters.book_names(workspace, [cluster.name], log)
    task, kept = dev.run_task(config, run_id, cluster, options, workspace), dev.keep_code(run_id, workspace)
    try:
        job_id = clusters.execute(task, cluster.name)
    except BaseException:
        clusters.withdraw(cluster.name, run_id)
        workspace.store().delete(kept)
        raise
    log(f"{run_id}: job {job_id} on {cluster.name}")
    try:
        return jobs.follow(cluster.name, job_id)
    except (KeyboardInterrupt, BrokenPipeError):  # not for trouble on the way to it: the run goes on
        clusters.cancel(cluster.name, job_id)
        log(f"{run_id}: stopped")
        raise


def _here(
    config: str, workspace: "Workspace", gpus: str | None, profile: str, overrides: tuple[str, ...], **given: object
) -> int:
    from spotune.cli.runs import follow
    from spotune.cli.train import plan_new, submit_plan
    from spotune.core.errors import SubmissionUnknown
    from spotune.launch.plan import TrainOptions
    from spotune.launch.status import Run
    from spotune.launch.task import Resources

    options = TrainOptions(
        config_path=config,
        profile=profile,
        overrides=overrides,
        infra="local",
        resources=Resources(gpus=gpus, use_spot=False),
        kind="dev",
        **given,  # type: ignore[arg-type]
    )
    plan = plan_new(options, workspace)
    try:
        submit_plan(plan, workspace)
    except SubmissionUnknown as error:  # it was interrupted, and has begun
        _stop(plan.run_id, workspace)
        raise (error.__cause__ or error) from None
    try:
        click.echo(f"{plan.run_id}: {plan.bucket}/runs/{plan.run_id}", err=True)
        return follow(Run.find(workspace, plan.run_id))
    except BaseException:
        _stop(plan.run_id, workspace)
        raise


def _stop(run_id: str, workspace: "Workspace") -> None:
    from spotune.launch import submit
    from spotune.launch.status import Run

    submit.cancel(Run.find_queued(workspace, run_id))
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


# ``spotune dev code``.


@click.command()
@cluster_argument
@click.option("--print", "only_print", is_flag=True, help="Print the command and the address, open nothing.")
def code(cluster: str, only_print: bool) -> None:
    """Open VS Code on CLUSTER, default your own, in the folder that is synced to it.

    Prints the command and the address where there is no `code` here. An open window counts as work.
    """
    from spotune.launch.skypilot import clusters

    name = chosen(cluster, open_workspace())
    clusters.write_config(name, everyones=bool(cluster))
    folder = clusters.read(name, "cd ~/sky_workdir 2> /dev/null || cd; pwd").strip()
    command = ["code", "--remote", f"ssh-remote+{name}", folder]
    click.echo(f"vscode://vscode-remote/ssh-remote+{name}{folder}")
    click.echo(" ".join(command))
    if only_print or shutil.which("code") is None:
        return
    log("opening VS Code")
    sys.exit(clusters.attach(command))


# ``spotune dev ssh``.


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@cluster_option()
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def ssh(cluster: str, command: tuple[str, ...]) -> None:
    """Open a shell on a dev cluster, or run COMMAND there; its exit code is this one's."""
    from spotune.launch.skypilot import clusters

    name = chosen(cluster, open_workspace())
    clusters.write_config(name, everyones=bool(cluster))
    sys.exit(clusters.attach([*clusters.ssh_command(name), *command]))


# ``spotune dev notebook``.


@click.command()
@cluster_argument
@click.option("--port", type=click.IntRange(1, 65535), default=8888, show_default=True, metavar="N", help="Port here.")
@click.option("--env", "envs", multiple=True, metavar="K=V", help="Environment of Jupyter.")
@secret_option
def notebook(cluster: str, port: int, envs: tuple[str, ...], secrets: tuple[str, ...]) -> None:
    """Open Jupyter on CLUSTER, default your own, through an ssh tunnel. Ctrl-C closes the tunnel; Jupyter goes on.

    Called again it finds the Jupyter that is there. Only a kernel that is busy, or was lately, counts as work.
    """
    from spotune.launch.plan import secrets_of
    from spotune.launch.skypilot import clusters
    from spotune.launch.skypilot import dev as skypilot_dev
    from spotune.launch.task import env_pairs

    workspace = open_workspace()
    given, pairs = secrets_of(secrets, workspace.environ), env_pairs(envs)
    name = chosen(cluster, workspace)
    clusters.write_config(name, everyones=bool(cluster))
    server = skypilot_dev.find(name)
    if server is None:
        log(f"{name}: starting Jupyter, which is installed there the first time")
        server = skypilot_dev.start(name, pairs, given, workspace)
    elif envs or secrets:
        log(f"{name}: Jupyter runs there already, without this --env or --secret (File > Shut Down ends it)")
    click.echo(f"http://localhost:{port}/lab?token={server.token}")
    log("opening the tunnel, Ctrl-C closes it")
    try:
        code = clusters.attach(skypilot_dev.tunnel(name, port, server))
    except KeyboardInterrupt:
        log("\ntunnel closed, Jupyter goes on while its kernels work")
        return
    raise SystemExit(code)


# ``spotune dev ls``.


@click.command()
@format_option()
def ls(output: str) -> None:
    """Show your dev clusters: what each costs an hour now, what holds it, when it stops."""
    import time

    from spotune.launch.skypilot.clusters import list_dev

    listed = list_dev(open_workspace(), log)
    if output == "json":
        print_json([each.as_row() for each in listed])
        return
    click.echo(clusters_text(listed, time.time()))


# ``spotune dev stop``.


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


# ``spotune dev down``.


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


# ``spotune dev``: work interactively, here or on a cluster. One verb, one file, as everywhere.

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
    """Work interactively: here, or on a cluster that goes when nobody works on it."""
