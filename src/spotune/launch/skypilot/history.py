"""SkyPilot's history of clusters as paid intervals: pure. One row a machine that a managed job was given.

What was paid is in ``cost_report``, by the cluster's name ``<job>-<id>``; why each machine went is in the job's events,
by time. Prices are never taken from here: SkyPilot looks them up anew each time it is asked.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from spotune.launch.infra import PaidInterval
from spotune.launch.skypilot.jobs import ManagedJob, exit_code_in

_SLACK_S = 5.0  # a machine's end is noted before or after the event that tells of it


@dataclass(frozen=True)
class Event:
    """A change of a managed job's status, as SkyPilot keeps it."""

    at: float
    status: str
    reason: str = ""


@dataclass(frozen=True)
class Usage:
    """From when to when a cluster was paid for, epoch seconds; ``ended_at`` None: still."""

    cluster: str
    started_at: float
    ended_at: float | None
    nodes: int = 1
    cloud: str = ""
    region: str = ""
    zone: str = ""
    instance_type: str = ""
    accelerators: str = ""
    use_spot: bool = False


def usages(row: Mapping[str, Any]) -> list[Usage]:
    """From a row of ``cost_report``."""
    resources = row.get("resources")
    found = Usage(
        cluster=str(row.get("name") or ""),
        started_at=0.0,
        ended_at=None,
        nodes=int(row.get("num_nodes") or 1),
        cloud=str(getattr(resources, "cloud", None) or row.get("cloud") or "").lower(),
        region=str(getattr(resources, "region", None) or row.get("region") or ""),
        zone=str(getattr(resources, "zone", None) or ""),
        instance_type=str(getattr(resources, "instance_type", None) or ""),
        accelerators=accelerators_of(getattr(resources, "accelerators", None)),
        use_spot=bool(getattr(resources, "use_spot", False)),
    )
    spans = row.get("usage_intervals") or []
    return [replace(found, started_at=float(began), ended_at=_time(ended)) for began, ended in spans]


def accelerators_of(found: Any) -> str:
    """``{"L4": 1}`` -> ``L4:1``; empty for none."""
    if not isinstance(found, Mapping) or not found:
        return ""
    name, count = next(iter(found.items()))
    return f"{name}:{int(count) if float(count).is_integer() else count}"


def intervals(
    run_id: str,
    jobs: Sequence[ManagedJob],
    used: Iterable[Usage],
    events: Mapping[int, Sequence[Event]],
    preemptible: Sequence[str] = (),
) -> list[PaidInterval]:
    """The machines of a run, oldest first.

    Args:
        events: by managed job.
        preemptible: Slurm partitions, ``CLUSTER/PARTITION``, that count as spot: Slurm itself knows no such thing.
    """
    rows: list[PaidInterval] = []
    by_cluster: dict[str, list[Usage]] = {}
    for usage in used:
        by_cluster.setdefault(usage.cluster, []).append(usage)
    for job in jobs:
        spans = sorted(by_cluster.get(job.cluster, ()), key=lambda usage: usage.started_at)
        for index, usage in enumerate(spans):
            following = spans[index + 1].started_at if index + 1 < len(spans) else None
            reason, code = _end(usage, following, job, events.get(job.id, ()))
            partition = f"{usage.region}/{usage.zone}"
            rows.append(
                PaidInterval(
                    run_id=run_id,
                    started_at=usage.started_at,
                    ended_at=usage.ended_at,
                    infra=usage.cloud,
                    region=usage.region,
                    zone=usage.zone,
                    instance_type=usage.instance_type,
                    accelerators=usage.accelerators,
                    use_spot=usage.use_spot or (usage.cloud == "slurm" and partition in preemptible),
                    nodes=usage.nodes,
                    end_reason=reason,
                    exit_code=code,
                )
            )
    return sorted(rows, key=lambda row: row.started_at)


def _end(usage: Usage, following: float | None, job: ManagedJob, events: Sequence[Event]) -> tuple[str, int | None]:
    """(why the machine went, exit code of the program): what the first end within its time says."""
    until = following if following is not None else float("inf")
    for event in sorted(events, key=lambda event: event.at):
        if not usage.started_at <= event.at < until + _SLACK_S:
            continue
        if event.status == "RECOVERING":
            return _of_recovery(event.reason)
        if event.status == "SUCCEEDED":
            return "exited", 0
        if event.status in ("CANCELLED", "CANCELLING"):
            return "cancelled", None
        if event.status.startswith("FAILED"):
            return "exited", exit_code_in(event.reason)
    if usage.ended_at is None:
        return "", None
    if following is None and job.is_ended:
        return ("cancelled", None) if job.status == "CANCELLED" else ("exited", job.exit_code)
    return "lost", None


def _of_recovery(reason: str) -> tuple[str, int | None]:
    code = exit_code_in(reason)
    if code is not None:
        return "exited", code
    return ("preempted" if re.search(r"preempt", reason, re.IGNORECASE) else "lost"), None


def _time(value: Any) -> float | None:
    return None if value is None else float(value)
