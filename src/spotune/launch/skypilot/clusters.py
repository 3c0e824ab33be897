"""Dev clusters: their ssh configuration, what SkyPilot does with them, what they cost, and the list of them."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from spotune.core.errors import InfraError, InputError, SpotuneError
from spotune.core.keys import Amount, Kind, Time, build
from spotune.core.money import HOUR_S
from spotune.core.records import ClusterRecord, read_clusters
from spotune.launch.settings import Workspace
from spotune.launch.skypilot import client
from spotune.launch.skypilot import jobs as skypilot_jobs
from spotune.launch.skypilot.jobs import infra_text, price_row, usages

# Where a cluster can only be taken down: CloudImplementationFeatures.STOP in sky/clouds/*.py (0.14.1).
_NO_STOP = (
    *("slurm", "kubernetes", "k8s", "ssh", "runpod", "lambda", "verda", "cudo", "fluidstack", "hyperbolic"),
    *("primeintellect", "shadeform", "yotta"),
)

Row = Mapping[str, Any]  # of SkyPilot's cost_report
Warn = Callable[[str], None]


def ssh_command(name: str, *options: str) -> list[str]:
    """Returns the ssh command for a cluster whose configuration is written.

    It names the configuration and the key, so that any $HOME works: OpenSSH takes ``~`` from the password database.
    """
    config = Path.home() / ".sky/generated/ssh" / name
    if not config.is_file():
        raise _not_up(name)
    keys = [line.split(None, 1)[1] for line in config.read_text().splitlines() if "IdentityFile" in line]
    identity = ["-i", str(Path(keys[0].strip('"')).expanduser())] if keys else []
    return ["ssh", "-F", str(config), *identity, "-o", "LogLevel=ERROR", *options, name]


def _not_up(name: str) -> InputError:
    return InputError(name, "no such cluster, or not up", remedy=f"spotune dev up --name {name}")


def write_config(*names: str, everyones: bool = False) -> None:
    """Lets SkyPilot write its ssh configuration of clusters, as ``sky status NAME`` does; ``everyones``: also of other
    users'. Raises InputError for a name without a cluster that is up.

    An existing one is overwritten: an API server that shares this HOME writes its own at each launch, which on Slurm
    leads to the login node (sky/backends/cloud_vm_ray_backend.py, after provisioning).
    """
    sky = client.sdk()
    command = client.module("client.cli.command")
    with client.translated():
        records = client.ask(sky.status(cluster_names=list(names), all_users=everyones, _include_credentials=True))
        proxy = command._get_ws_proxy_command()
        for record in records:
            if record.credentials and getattr(record.handle, "cached_external_ips", None):
                command._write_ssh_config_for_cluster(record.handle, record.credentials, proxy)
    up = {record.name for record in records if record.status.value == "UP"}
    for name in names:
        if name not in up:
            raise _not_up(name)


def read(name: str, command: str, timeout_s: float = 60.0) -> str:
    """Returns what a command prints on a cluster. Raises InfraError if it fails or does not answer."""
    argv = [*ssh_command(name, "-o", "BatchMode=yes"), command]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise InfraError(f"{name}: no answer within {timeout_s:.0f} s (sky status -r {name})") from error
    if done.returncode:
        raise InfraError(f"{name}: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    return done.stdout


def read_as(name: str, command: str, kind: type[Kind], timeout_s: float = 60.0) -> Kind:
    """Returns a dataclass from the JSON that a command prints on a cluster. Raises ValueError for any other output."""
    text = read(name, command, timeout_s)
    try:
        return build(kind, json.loads(text))
    except RecursionError as error:
        raise ValueError("nested without end") from error


def attach(argv: Sequence[str]) -> int:
    """Runs a command in this terminal; returns its exit code."""
    try:
        return subprocess.run(argv, check=False).returncode
    except FileNotFoundError as error:
        raise InfraError(f"{argv[0]}: not installed here") from error


@dataclass(frozen=True)
class Cluster:
    """A cluster as SkyPilot lists it; a figure that SkyPilot does not know is None or empty."""

    name: str
    status: str  # INIT, UP or STOPPED
    infra: str
    accelerators: dict[str, float]
    nodes: int
    launched_at: float
    autostop_minutes: int | None  # SkyPilot's own idle limit; None: no limit
    to_down: bool
    price_usd_per_hour: float | None = None
    spent_usd: float | None = None
    cpus: str = ""  # of each machine, as SkyPilot writes it
    memory: str = ""  # likewise, in GB

    @property
    def gpus(self) -> str:
        return ", ".join(f"{name}:{count:g}" for name, count in self.accelerators.items())

    @property
    def cloud(self) -> str:
        return self.infra.split("/", 1)[0]


def default_name(user: str) -> str:
    """Returns the name of a user's own dev cluster."""
    slug = re.sub(r"[^a-z0-9]+", "-", user.lower()).strip("-")
    return f"dev-{slug}"[:30].rstrip("-")


def list_clusters(names: list[str] | None = None) -> list[Cluster]:
    """Returns this user's clusters, without those of managed jobs; with ``names``, the existing ones of these names.

    SkyPilot asks the cloud about clusters with autostop, since they may have stopped by themselves.
    """
    sky = client.sdk()
    records = client.call(sky.status, cluster_names=names, refresh=sky.StatusRefreshMode.AUTO)
    return [_cluster(record) for record in records if not record.is_managed]


def _cluster(record: Any) -> Cluster:
    resources = getattr(record.handle, "launched_resources", None)
    return Cluster(
        name=record.name,
        status=record.status.value,
        infra=infra_text(record.cloud, record.region, getattr(resources, "zone", None)),
        accelerators=dict(getattr(resources, "accelerators", None) or {}),
        nodes=record.nodes,
        launched_at=float(record.launched_at),
        autostop_minutes=record.autostop if record.autostop >= 0 else None,
        to_down=record.to_down,
        cpus=str(record.cpus or ""),
        memory=str(record.memory or ""),
    )


def own_cluster(name: str) -> Cluster | None:
    """Returns this user's cluster of that name, or None. Raises InputError for another user's.

    SkyPilot would launch onto another user's cluster, and overwrite what is synced there.
    """
    if mine := list_clusters([name]):
        return mine[0]
    for record in client.call(client.sdk().status, cluster_names=[name], all_users=True):
        what = f"is the cluster of another SkyPilot user, {record.user_name} ({record.user_hash})"
        raise InputError(name, what, remedy="another name: spotune dev up --name NAME")
    return None


def find_cluster(name: str) -> Cluster:
    """Returns this user's cluster. Raises InputError if it is missing, not up, or another user's."""
    return check_up(own_cluster(name), name)


def check_up(cluster: Cluster | None, name: str) -> Cluster:
    """Returns the cluster. Raises InputError if it is missing or not up."""
    if cluster and cluster.status == "UP":
        return cluster
    what = f"is {cluster.status}, not UP" if cluster else "no such cluster"
    raise InputError(name, what, remedy=f"spotune dev up --name {name}")


def launch(task: Mapping[str, Any], name: str, idle_minutes: int, down: bool) -> None:
    """Brings a cluster up, or starts a stopped one. SkyPilot's output goes to stderr."""
    sky = client.sdk()
    with client.translated(), redirect_stdout(sys.stderr):
        request = sky.launch(client.task(task), cluster_name=name, idle_minutes_to_autostop=idle_minutes, down=down)
        job_id, _ = sky.stream_and_get(request, output_stream=sys.stderr)
    if job_id:
        see_setup(name, job_id)


def see_setup(name: str, job_id: int) -> None:
    """Shows a setup's log until it is done. Raises InfraError if the setup fails."""
    if skypilot_jobs.follow(name, job_id, out=sys.stderr):
        remedy = f"mend it, then spotune dev up again, or spotune dev down {name}"
        raise InfraError(f"{name}: its setup failed ({remedy})")


def execute(task: Mapping[str, Any], name: str) -> int:
    """Syncs the working directory and puts a job into the cluster's queue; returns the job's number.

    Ctrl-C cancels the request; the job may be in the queue all the same.
    """
    sky = client.sdk()
    with client.translated(), redirect_stdout(sys.stderr):
        request = sky.exec(client.task(task), cluster_name=name)
        try:
            job_id, _ = client.ask(request)
        except KeyboardInterrupt:
            with suppress(InfraError, InputError):
                client.call(sky.api_cancel, [request], silent=True)
            raise
    return int(job_id)


def cancel(name: str, job_id: int) -> None:
    client.call(client.sdk().cancel, name, job_ids=[job_id])


def withdraw(name: str, job: str) -> None:
    """Cancels the newest active job of that name, whose submission was interrupted."""
    with suppress(InfraError, InputError):  # the caller reports the interruption
        if active := [one for one in list_jobs(name) if one.name == job and one.is_active]:
            cancel(name, active[-1].id)


@dataclass(frozen=True)
class ClusterJob:
    """A job in a cluster's queue; ``status`` is SkyPilot's."""

    id: int
    name: str
    status: str

    @property
    def is_active(self) -> bool:
        return self.status in ("INIT", "PENDING", "SETTING_UP", "RUNNING")


def list_jobs(name: str) -> list[ClusterJob]:
    """Returns this user's jobs of a cluster since its launch, oldest first."""
    records = client.call(client.sdk().queue, name)
    jobs = [ClusterJob(int(record.job_id), str(record.job_name), record.status.value) for record in records]
    return sorted(jobs, key=lambda job: job.id)


def set_autostop(name: str, minutes: int, down: bool) -> bool:
    """Sets SkyPilot's autostop. Returns whether the cluster will be taken down: as asked, or because this machine (a
    spot one, say) cannot stop."""
    sky = client.sdk()
    try:
        client.call(sky.autostop, name, minutes, down=down)
    except InfraError as error:
        if down or type(error.__cause__).__name__ != "NotSupportedError":
            raise
        client.call(sky.autostop, name, minutes, down=True)
        return True
    return down


def can_stop(infra: str) -> bool:
    return infra.split("/", 1)[0].lower() not in _NO_STOP


def check_can_stop(infra: str, remedy: str, where: str) -> None:
    if not can_stop(infra):
        raise InputError(where, f"{infra} cannot stop a cluster, only take it down", remedy=remedy)


def stop(name: str) -> None:
    """Stops a cluster. Raises InputError if its infrastructure can only take clusters down."""
    check_can_stop(find_cluster(name).infra, f"spotune dev down {name}", name)
    with client.translated(name):
        client.ask(client.sdk().stop(name))


def take_down(name: str) -> None:
    """Takes a cluster down. Raises InputError if there is none of that name."""
    if not list_clusters([name]):
        raise InputError(name, "no such cluster", remedy="spotune dev ls")
    with client.translated(name):
        client.ask(client.sdk().down(name))


def book(workspace: Workspace, rows: Sequence[Row], warn: Warn, clock: Callable[[], float] = time.time) -> None:
    """Writes the records of the clusters in ``rows`` to the bucket. A cluster's first record fixes its price.

    No verb fails because of it: an error is one line, and the next verb tries again.
    """
    if not rows:
        return
    try:
        store = workspace.store()
        known = read_clusters(store, [str(row["name"]) for row in rows])
        for record in booked(rows, known, workspace.env.user, workspace.settings.team, clock()):
            store.write(record.key, record.to_bytes())
    except SpotuneError as error:
        warn(f"the cluster's cost is not booked: {error}")


def book_names(workspace: Workspace, names: Sequence[str], warn: Warn) -> None:
    """Asks SkyPilot for the cost of clusters of these names, and books it."""
    try:
        rows = client.cost_rows(names)
    except SpotuneError as error:
        warn(f"the cost of {', '.join(names)} is not booked: {error}")
    else:
        book(workspace, rows, warn)


def book_open(workspace: Workspace, warn: Warn) -> None:
    """Books the clusters that were still paid for at their last booking. Without any, it does not ask SkyPilot."""
    if names := sorted({record.name for record in read_clusters(workspace.store()) if record.is_up}):
        book_names(workspace, names, warn)


def booked(
    rows: Sequence[Row], known: Sequence[ClusterRecord], owner: str, team: str, now: float
) -> Iterator[ClusterRecord]:
    """Yields the records that are new or have changed. Of several unknown clusters of a name, it takes the newest."""
    by_hash = {record.cluster_hash: record for record in known}
    newest: set[str] = set()
    for row in sorted(rows, key=lambda row: max((one.started_at for one in usages(row)), default=0.0), reverse=True):
        used = usages(row)
        name, cluster_hash = str(row["name"]), str(row["cluster_hash"])
        is_newest = name not in newest
        newest.add(name)
        spans: list[list[float | None]] = [[usage.started_at, usage.ended_at] for usage in used]
        if record := by_hash.get(cluster_hash):
            if spans and (record.is_up or spans != record.spans):
                yield replace(record, spans=spans, updated_at=now)
        elif is_newest and used and row.get("duration"):
            place, nodes = used[0].place, used[0].nodes
            usd_per_hour = (row.get("total_cost") or 0.0) / float(row["duration"]) * HOUR_S / nodes
            price = price_row(place, round(usd_per_hour, 6), "SkyPilot's cost report", now)
            yield ClusterRecord(
                name=name,
                cluster_hash=cluster_hash,
                launched_at=used[0].started_at,
                owner=owner,
                team=team,
                infra=infra_text(place.infra, place.region, place.zone),
                accelerators=place.accelerators,
                nodes=nodes,
                price=vars(price) if usd_per_hour > 0 else {},
                spans=spans,
                updated_at=now,
            )


@dataclass(frozen=True)
class WatcherState:
    """What a cluster's idle watcher wrote last; times in epoch seconds, ``stops_at`` None while somebody works."""

    idle_minutes: Amount
    last_active_at: Time
    why: str
    stops_at: Time | None = None


@dataclass(frozen=True)
class Listed:
    """A cluster and its idle watcher: a row of ``dev ls``."""

    cluster: Cluster
    idle_minutes: float | None  # how long it may be idle; None: without limit
    last_active_at: float | None  # when somebody worked last; None if that is unknown
    stops_at: float | None  # when it stops if nobody works again; None while somebody works
    why: str  # what keeps it up, or since when it is idle

    def as_row(self) -> dict[str, Any]:
        """Returns a row of ``dev ls --format json``."""
        rest = asdict(self)
        return {**rest.pop("cluster"), **rest}


def list_dev(workspace: Workspace, warn: Warn) -> list[Listed]:
    """Returns this user's clusters with their idle watchers' states, and books what they cost."""
    found = list_clusters()
    rows = client.cost_rows([cluster.name for cluster in found]) if found else []
    book(workspace, rows, warn)
    if up := [cluster.name for cluster in found if cluster.status == "UP"]:
        write_config(*up)
    by_name = {row["name"]: row for row in rows if row.get("status") is not None}
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda cluster: _listed(_priced(cluster, by_name.get(cluster.name, {}))), found))


def _priced(cluster: Cluster, row: Row) -> Cluster:
    """Returns the cluster with its cost from SkyPilot's report, at today's price."""
    cost, duration = row.get("total_cost"), row.get("duration")
    if cost is None or not duration:
        return cluster
    price = cost * HOUR_S / duration if cluster.status == "UP" else 0.0
    return replace(cluster, price_usd_per_hour=price, spent_usd=cost)


def _listed(cluster: Cluster) -> Listed:
    state = None
    if cluster.status == "UP":
        with suppress(InfraError, InputError, ValueError):  # no watcher, a damaged file, no answer
            state = read_as(cluster.name, f"head -c {1 << 20} ~/.spotune/watcher.json", WatcherState, 30.0)
    if state:
        return Listed(cluster, state.idle_minutes, state.last_active_at, state.stops_at, state.why)
    is_counted = cluster.status == "UP" and cluster.autostop_minutes is not None
    why = "no idle watcher: SkyPilot counts jobs and ssh terminals" if is_counted else ""
    return Listed(cluster, cluster.autostop_minutes, None, None, why)
