"""The way onto a cluster: SkyPilot's ssh configuration, used so that it works with any HOME.

OpenSSH takes ``~`` from the password database and not from $HOME, and so do the files that SkyPilot writes: the file
and the key are named on the command line.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from spotune.core.errors import InfraError, InputError, SpotuneError
from spotune.core.keys import Amount, Kind, Time, build
from spotune.core.money import HOUR_S
from spotune.core.records import ClusterRecord, PriceRow, read_clusters
from spotune.launch.settings import Workspace
from spotune.launch.skypilot import client, clusters
from spotune.launch.skypilot import jobs as skypilot_jobs
from spotune.launch.skypilot.jobs import Usage, usages

GENERATED = ".sky/generated/ssh"
STATE = ".spotune/watcher.json"
_MOST_BYTES = 1 << 20  # of what a cluster says


@dataclass(frozen=True)
class WatcherState:
    """What a cluster's idle watcher wrote last; times in epoch seconds, ``stops_at`` None while somebody works."""

    idle_minutes: Amount
    last_active_at: Time
    why: str
    stops_at: Time | None = None


def ssh_command(name: str, *options: str) -> list[str]:
    """The ssh command for a cluster whose configuration is written."""
    config = Path.home() / GENERATED / name
    if not config.is_file():
        raise InputError(name, "no such cluster, or not up", remedy=f"spotune dev up --name {name}")
    keys = [line.split(None, 1)[1] for line in config.read_text().splitlines() if "IdentityFile" in line]
    identity = ["-i", str(Path(keys[0].strip('"')).expanduser())] if keys else []
    return ["ssh", "-F", str(config), *identity, "-o", "LogLevel=ERROR", *options, name]


def write_config(*names: str, everyones: bool = False) -> None:
    """Lets SkyPilot write its ssh configuration of clusters, as ``sky status NAME`` does; raises InputError where
    there is none of a name, or not up. ``everyones``: other users' too, which nobody comes to without naming them.

    Every time, also where there is one: an API server that shares this HOME writes its own at each launch, which on
    Slurm leads to the login node (sky/backends/cloud_vm_ray_backend.py, after provisioning).
    """
    sky = client.sdk()
    command = import_module(f"{sky.__name__}.client.cli.command")
    with client.translated():
        records = client.ask(sky.status(cluster_names=list(names), all_users=everyones, _include_credentials=True))
        proxy = command._get_ws_proxy_command()
        for record in records:
            if record.credentials and getattr(record.handle, "cached_external_ips", None):
                command._write_ssh_config_for_cluster(record.handle, record.credentials, proxy)
    up = {record.name for record in records if record.status.value == "UP"}
    for name in names:
        if name not in up:
            raise InputError(name, "no such cluster, or not up", remedy=f"spotune dev up --name {name}")


def read(name: str, command: str, timeout_s: float = 60.0) -> str:
    """What a command prints on a cluster; raises InfraError when it cannot be asked or fails."""
    argv = [*ssh_command(name, "-o", "BatchMode=yes"), command]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise InfraError(f"{name}: no answer within {timeout_s:.0f} s (sky status -r {name})") from error
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise InfraError(f"{name}: {said}")
    return done.stdout


def watcher_state(name: str) -> WatcherState | None:
    """The state of the cluster's idle watcher. None where there is none, where it is damaged or cannot be asked for."""
    try:
        return read_as(name, f"head -c {_MOST_BYTES} ~/{STATE}", WatcherState, 30.0)
    except (InfraError, InputError, ValueError):
        return None


def read_as(name: str, command: str, kind: type[Kind], timeout_s: float = 60.0) -> Kind:
    """A dataclass from the JSON that a command prints on a cluster; raises ValueError where it is no such JSON."""
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


# Dev clusters: brought up, listed, booked, and taken away again.

# Dev clusters: what SkyPilot has, brings up, runs something on, and takes away again.

# Where a cluster can only be taken down: CloudImplementationFeatures.STOP in sky/clouds/*.py (0.14.1).
_NO_STOP = (
    *("slurm", "kubernetes", "k8s", "ssh", "runpod", "lambda", "verda", "cudo", "fluidstack", "hyperbolic"),
    *("primeintellect", "shadeform", "yotta"),
)


@dataclass(frozen=True)
class Cluster:
    """A cluster as SkyPilot lists it.

    Attributes:
        status: INIT, UP or STOPPED; ``autostop_minutes`` of SkyPilot's own idle count, None where there is none.
        price_usd_per_hour, spent_usd: as SkyPilot counts them, None where it does not know a price.
        cpus, memory: of each machine as SkyPilot says it, memory in GB; empty where it does not.
    """

    name: str
    status: str
    infra: str
    accelerators: dict[str, float]
    nodes: int
    launched_at: float
    autostop_minutes: int | None
    to_down: bool
    price_usd_per_hour: float | None = None
    spent_usd: float | None = None
    cpus: str = ""
    memory: str = ""

    @property
    def gpus(self) -> str:
        return ", ".join(f"{name}:{count:g}" for name, count in self.accelerators.items())

    @property
    def cloud(self) -> str:
        return self.infra.split("/", 1)[0]


def default_name(user: str) -> str:
    """The dev cluster of a user who names none."""
    slug = re.sub(r"[^a-z0-9]+", "-", user.lower()).strip("-")
    return f"dev-{slug}"[:30].rstrip("-")


def list_clusters(names: list[str] | None = None) -> list[Cluster]:
    """This user's clusters, not those of managed jobs; with ``names`` those of them that are there.

    Those with autostop are looked after where they run, since they may be gone by themselves.
    """
    sky = client.sdk()
    records = client.call(sky.status, cluster_names=names, refresh=sky.StatusRefreshMode.AUTO)
    return [_cluster(record) for record in records if not record.is_managed]


def with_prices(clusters: list[Cluster], rows: Sequence[Mapping[str, Any]]) -> list[Cluster]:
    """The same clusters with what they cost: rows of SkyPilot's own report, at today's price."""
    by_name = {row["name"]: row for row in rows if row.get("status") is not None}
    return [_priced(cluster, by_name.get(cluster.name, {})) for cluster in clusters]


def own_cluster(name: str) -> Cluster | None:
    """This user's cluster of that name, None where there is none; raises InputError for another's.

    SkyPilot itself would launch onto another's, and overwrite what is synced there. Who is whom its server knows.
    """
    if mine := list_clusters([name]):
        return mine[0]
    for record in client.call(client.sdk().status, cluster_names=[name], all_users=True):
        what = f"is the cluster of another SkyPilot user, {record.user_name} ({record.user_hash})"
        raise InputError(name, what, remedy="another name: spotune dev up --name NAME")
    return None


def find_cluster(name: str) -> Cluster:
    """Raises InputError for one that is not there, not up, or another's."""
    return check_up(own_cluster(name), name)


def check_up(cluster: Cluster | None, name: str) -> Cluster:
    """Raises InputError for one that is not there or not up."""
    if cluster and cluster.status == "UP":
        return cluster
    what = f"is {cluster.status}, not UP" if cluster else "no such cluster"
    raise InputError(name, what, remedy=f"spotune dev up --name {name}")


def launch(task: Mapping[str, Any], name: str, idle_minutes: int, down: bool) -> None:
    """Brings a cluster up, or starts a stopped one; what SkyPilot says of it goes to stderr."""
    sky = client.sdk()
    with client.translated(), redirect_stdout(sys.stderr):
        request = sky.launch(client.task(task), cluster_name=name, idle_minutes_to_autostop=idle_minutes, down=down)
        job_id, _ = client.watch(request, sys.stderr)
    if job_id:
        see_setup(name, job_id)


def see_setup(name: str, job_id: int) -> None:
    """Shows a setup until it is done; raises InfraError when it fails."""
    if skypilot_jobs.follow(name, job_id, out=sys.stderr):
        raise InfraError(
            f"{name}: its setup failed (spotune dev up again once it is mended, or spotune dev down {name})"
        )


def execute(task: Mapping[str, Any], name: str) -> int:
    """Puts a job into the cluster's queue, its working directory synced; returns its number.

    Ctrl-C meanwhile calls the request off, which may have come as far as the queue already.
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
    """Cancels the newest job of that name, where handing it in was stopped but came as far as the cluster's queue."""
    with suppress(InfraError, InputError):  # what stopped it is what is reported
        if active := [one for one in list_jobs(name) if one.name == job and one.is_active]:
            cancel(name, active[-1].id)


@dataclass(frozen=True)
class ClusterJob:
    """A job in a cluster's queue; ``status`` in SkyPilot's words."""

    id: int
    name: str
    status: str

    @property
    def is_active(self) -> bool:
        return self.status in ("INIT", "PENDING", "SETTING_UP", "RUNNING")


def list_jobs(name: str) -> list[ClusterJob]:
    """This user's jobs of a cluster since it was launched, oldest first."""
    records = client.call(client.sdk().queue, name)
    jobs = [ClusterJob(int(record.job_id), str(record.job_name), record.status.value) for record in records]
    return sorted(jobs, key=lambda job: job.id)


def running_jobs(name: str) -> list[str]:
    """Names of the jobs in a cluster's queue that are not over."""
    return [job.name for job in list_jobs(name) if job.is_active]


def set_autostop(name: str, minutes: int, down: bool) -> bool:
    """Returns whether the cluster will be taken down: as asked, or since this machine, a spot one say, cannot stop."""
    sky = client.sdk()
    try:
        client.call(sky.autostop, name, minutes, down=down)
    except InfraError as error:
        if down or type(error.__cause__).__name__ != "NotSupportedError":
            raise
        client.call(sky.autostop, name, minutes, down=True)
        return True
    return down


def stop(name: str) -> None:
    """Raises InputError where clusters can only be taken down."""
    check_can_stop(find_cluster(name).infra, f"spotune dev down {name}", name)
    with client.translated(name):
        client.ask(client.sdk().stop(name))


def take_down(name: str) -> None:
    """Raises InputError for a cluster that is not there."""
    if not list_clusters([name]):
        raise InputError(name, "no such cluster", remedy="spotune dev ls")
    with client.translated(name):
        client.ask(client.sdk().down(name))


def can_stop(infra: str) -> bool:
    return infra.split("/", 1)[0].lower() not in _NO_STOP


def check_can_stop(infra: str, remedy: str, where: str) -> None:
    if not can_stop(infra):
        raise InputError(where, f"{infra} cannot stop a cluster, only take it down", remedy=remedy)


def _cluster(record: Any) -> Cluster:
    resources = getattr(record.handle, "launched_resources", None)
    places = [str(place) for place in (record.cloud, record.region, getattr(resources, "zone", None)) if place]
    return Cluster(
        name=record.name,
        status=record.status.value,
        infra="/".join([places[0].lower(), *places[1:]]) if places else "",
        accelerators=dict(getattr(resources, "accelerators", None) or {}),
        nodes=record.nodes,
        launched_at=float(record.launched_at),
        autostop_minutes=record.autostop if record.autostop >= 0 else None,
        to_down=record.to_down,
        cpus=str(record.cpus or ""),
        memory=str(record.memory or ""),
    )


def _priced(cluster: Cluster, row: Mapping[str, Any]) -> Cluster:
    cost, duration = row.get("total_cost"), row.get("duration")
    if cost is None or not duration:
        return cluster
    price = cost * 3600 / duration if cluster.status == "UP" else 0.0
    return replace(cluster, price_usd_per_hour=price, spent_usd=cost)


# What dev clusters were paid for, from SkyPilot's report into the bucket: ``core/records.py``.
#
# No verb fails because of it: what could not be booked is one line, and the next verb books it.

SOURCE = "SkyPilot's cost report"

Row = Mapping[str, Any]  # of cost_report
Warn = Callable[[str], None]


def book(workspace: Workspace, rows: Sequence[Row], warn: Warn, clock: Callable[[], float] = time.time) -> None:
    """Writes the records of the clusters in ``rows``; one whose first record this is gets its price now, for good."""
    if not rows:
        return
    try:
        store = workspace.store()
        known = read_clusters(store, [str(row["name"]) for row in rows])
        for record in booked(rows, known, workspace.env.user, workspace.settings.team, clock()):
            store.write(record.key, record.to_bytes())
    except SpotuneError as error:
        warn(f"what the cluster costs is not booked: {error}")


def book_names(workspace: Workspace, names: Sequence[str], warn: Warn) -> None:
    """Asks SkyPilot what was paid for clusters of these names, and books it."""
    try:
        rows = client.cost_rows(names)
    except SpotuneError as error:
        warn(f"what {', '.join(names)} cost is not booked: {error}")
        return
    book(workspace, rows, warn)


def book_open(workspace: Workspace, warn: Warn) -> None:
    """Books those that were still paid for when they were last booked; without any SkyPilot is not asked."""
    if names := sorted({record.name for record in read_clusters(workspace.store()) if record.is_up}):
        book_names(workspace, names, warn)


def booked(
    rows: Sequence[Row], known: Sequence[ClusterRecord], owner: str, team: str, now: float
) -> Iterator[ClusterRecord]:
    """The records as they are now. Of a name only the newest cluster is taken in anew: it is the one at hand."""
    by_hash = {record.cluster_hash: record for record in known}
    newest: set[str] = set()
    for row in sorted(rows, key=_launched_at, reverse=True):
        name, used = str(row["name"]), usages(row)
        is_newest = name not in newest
        newest.add(name)
        spans: list[list[float | None]] = [[usage.started_at, usage.ended_at] for usage in used]
        if record := by_hash.get(str(row["cluster_hash"])):
            if spans and (record.is_up or spans != record.spans):
                yield replace(record, spans=spans, updated_at=now)
        elif is_newest and used and row.get("duration"):
            yield ClusterRecord(
                name=name,
                cluster_hash=str(row["cluster_hash"]),
                launched_at=used[0].started_at,
                owner=owner,
                team=team,
                infra="/".join(part for part in (used[0].cloud, used[0].region, used[0].zone) if part),
                accelerators=used[0].accelerators,
                nodes=used[0].nodes,
                price=_price(row, used[0], now),
                spans=spans,
                updated_at=now,
            )


def _price(row: Row, used: Usage, now: float) -> dict[str, Any]:
    """The row of one node at SkyPilot's price of now; empty where it knows none."""
    usd_per_hour = (row.get("total_cost") or 0.0) / float(row["duration"]) * HOUR_S / used.nodes
    if not usd_per_hour > 0:
        return {}
    return vars(
        PriceRow(
            infra=used.cloud,
            region=used.region or "*",
            zone=used.zone or "*",
            instance_type=used.instance_type,
            accelerators=used.accelerators,
            use_spot=used.use_spot,
            price_usd_per_hour=round(usd_per_hour, 6),
            source=SOURCE,
            at=now,
        )
    )


def _launched_at(row: Row) -> float:
    return max((usage.started_at for usage in usages(row)), default=0.0)


# Dev clusters with what their idle watchers say.


@dataclass(frozen=True)
class Listed:
    """A cluster and its idle watcher.

    Attributes:
        idle_minutes: how long it may be without work, None for ever.
        last_active_at: when somebody worked last, None when nobody knows.
        stops_at: when it stops if nobody works any more, None while somebody does.
        why: what holds it, or since when nothing does.
    """

    cluster: Cluster
    idle_minutes: float | None
    last_active_at: float | None
    stops_at: float | None
    why: str

    def as_row(self) -> dict[str, Any]:
        """A row of ``dev ls --format json``."""
        rest = {name: value for name, value in vars(self).items() if name != "cluster"}
        return {**asdict(self.cluster), **rest}


def list_dev(workspace: Workspace, warn: Warn) -> list[Listed]:
    """This user's clusters, each asked for its idle watcher's word; what they were paid for is booked on the way."""
    found = clusters.list_clusters()
    rows = client.cost_rows([cluster.name for cluster in found]) if found else []
    book(workspace, rows, warn)
    found = clusters.with_prices(found, rows)
    if up := [cluster.name for cluster in found if cluster.status == "UP"]:
        write_config(*up)
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(_listed, found))


def _listed(cluster: Cluster) -> Listed:
    state = watcher_state(cluster.name) if cluster.status == "UP" else None
    if state is None:
        known = cluster.autostop_minutes is not None
        why = "no idle watcher: SkyPilot counts jobs and ssh terminals" if cluster.status == "UP" and known else ""
        return Listed(cluster, cluster.autostop_minutes, None, None, why)
    return Listed(cluster, state.idle_minutes, state.last_active_at, state.stops_at, state.why)
