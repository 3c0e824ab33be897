"""What real spot traces say: how often a machine is taken away, and how long until there is another one."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path

from drill.trace import read_trace
from spotune.core.errors import InputError


@dataclass(frozen=True)
class Market:
    zones: int
    ends: int  # times in which there were machines that came to an end
    availability: float  # share of the time, mean of the zones
    per_hour: float  # ends per hour in which there were machines
    wait_h: float  # mean, from an end until any zone of the same folder has machines


def read_market(traces: Path, pattern: str) -> Market:
    """All zones that the pattern names; those of one folder are aligned in time. Raises InputError."""
    files = sorted(traces.glob(pattern))
    if not files:
        raise InputError(traces, f"no {pattern} there", remedy="--traces DIR: a copy of skypilot-org/spot-traces")
    folders = [[read_trace(path) for path in paths] for _, paths in groupby(files, lambda path: path.parent)]
    return measure(folders)


def measure(folders: Sequence[Sequence[tuple[float, list[int]]]]) -> Market:
    """Folders of zones, a zone (seconds between ticks, machines at each tick); one gap per folder."""
    up_s = all_s = 0.0
    waits_h: list[float] = []
    ends = 0
    for zones in folders:
        gap_s = zones[0][0]
        anywhere = [any(counts) for counts in zip(*(counts for _, counts in zones), strict=True)]
        for _, counts in zones:
            up_s += gap_s * sum(count > 0 for count in counts)
            all_s += gap_s * len(counts)
            for tick, (before, now) in enumerate(pairwise(counts), start=1):
                if before and not now:
                    ends += 1
                    if True in anywhere[tick:]:
                        waits_h.append(anywhere.index(True, tick) * gap_s / 3600 - tick * gap_s / 3600)
    return Market(
        zones=sum(len(zones) for zones in folders),
        ends=ends,
        availability=up_s / all_s,
        per_hour=ends / (up_s / 3600),
        wait_h=sum(waits_h) / len(waits_h) if waits_h else 0.0,
    )
