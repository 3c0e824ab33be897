"""Dev clusters: what SkyPilot has, brings up, runs something on, and takes away again."""

import io
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from typing import Any, TextIO

from spotune.contracts.errors import InfraError, InputError
from spotune.launch.skypilot import engine
from spotune.launch.skypilot.logs import exit_code

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
    sky = engine.sdk()
    records = engine.call(sky.status, cluster_names=names, refresh=sky.StatusRefreshMode.AUTO)
    return [_cluster(record) for record in records if not record.is_managed]


def with_prices(clusters: list[Cluster], rows: Sequence[Mapping[str, Any]]) -> list[Cluster]:
    """The same clusters with what they cost: rows of SkyPilot's own report, at today's price."""
    by_name = {row["name"]: row for row in rows if row.get("status") is not None}
    return [_priced(cluster, by_name.get(cluster.name, {})) for cluster in clusters]


def find_cluster(name: str) -> Cluster:
    """Raises InputError for one that is not there or not up."""
    for cluster in list_clusters([name]):
        if cluster.status == "UP":
            return cluster
        raise InputError(name, f"is {cluster.status}, not UP", remedy=f"spotune dev up --name {name}")
    raise InputError(name, "no such cluster", remedy=f"spotune dev up --name {name}")


def launch(task: Mapping[str, Any], name: str, idle_minutes: int, down: bool) -> None:
    """Brings a cluster up, or starts a stopped one; what SkyPilot says of it goes to stderr."""
    sky = engine.sdk()
    with engine.translated(), redirect_stdout(sys.stderr):
        request = sky.launch(engine.task(task), cluster_name=name, idle_minutes_to_autostop=idle_minutes, down=down)
        job_id, _ = engine.watch(request, sys.stderr)
        code = sky.tail_logs(name, job_id, follow=True, output_stream=sys.stderr) if job_id else 0
    if code:
        raise InfraError(
            f"{name}: its setup failed (spotune dev up again once it is mended, or spotune dev down {name})"
        )


def execute(task: Mapping[str, Any], name: str) -> int:
    """Puts a job into the cluster's queue, its working directory synced; returns its number."""
    sky = engine.sdk()
    with engine.translated(), redirect_stdout(sys.stderr):
        job_id, _ = engine.ask(sky.exec(engine.task(task), cluster_name=name))
    return int(job_id)


def follow(name: str, job_id: int) -> int:
    """Prints a job's log until it ends; returns its script's exit code, 1 where SkyPilot does not tell it."""
    log = _Log(sys.stdout)
    with engine.translated():
        failed = engine.sdk().tail_logs(name, job_id, follow=True, output_stream=log)
    return (log.exit_code or 1) if failed else 0


class _Log(io.TextIOBase):
    """Passes a log on, and keeps what it says of the job's end: SkyPilot's client hands out no exit code of a job."""

    def __init__(self, out: TextIO) -> None:
        self._out, self._end = out, ""

    def write(self, text: str) -> int:
        self._end = (self._end + text)[-4096:]
        return self._out.write(text)

    def flush(self) -> None:
        self._out.flush()

    @property
    def exit_code(self) -> int | None:
        return exit_code(self._end)


def cancel(name: str, job_id: int) -> None:
    engine.call(engine.sdk().cancel, name, job_ids=[job_id])


def running_jobs(name: str) -> list[str]:
    """Names of the jobs in a cluster's queue that are not over."""
    return [str(job.job_name) for job in engine.call(engine.sdk().queue, name, skip_finished=True)]


def set_autostop(name: str, minutes: int, down: bool) -> None:
    engine.call(engine.sdk().autostop, name, minutes, down=down)


def stop(name: str) -> None:
    """Raises InputError where clusters can only be taken down."""
    check_can_stop(find_cluster(name).infra, f"spotune dev down {name}", name)
    with engine.translated(name):
        engine.ask(engine.sdk().stop(name))


def take_down(name: str) -> None:
    """Raises InputError for a cluster that is not there."""
    if not list_clusters([name]):
        raise InputError(name, "no such cluster", remedy="spotune dev ls")
    with engine.translated(name):
        engine.ask(engine.sdk().down(name))


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
    )


def _priced(cluster: Cluster, row: Mapping[str, Any]) -> Cluster:
    cost, duration = row.get("total_cost"), row.get("duration")
    if cost is None or not duration:
        return cluster
    price = cost * 3600 / duration if cluster.status == "UP" else 0.0
    return replace(cluster, price_usd_per_hour=price, spent_usd=cost)
