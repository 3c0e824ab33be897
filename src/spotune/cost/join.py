"""Which machine of the engine's history made which attempt in the bucket: by time, in order."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from spotune.contracts.records import AttemptRecord
from spotune.launch.infra import PaidInterval

MAX_SKEW_S = 900.0


@dataclass(frozen=True)
class Machine:
    """A machine that was paid for, an attempt that ran, or, as it should be, both in one.

    ``interval`` None: the engine's row is not to be had. ``record`` None: it died before its guard claimed, and
    ``attempt`` is the number that the claims after it have left free, None where they have left none.
    """

    interval: PaidInterval | None
    record: AttemptRecord | None
    attempt: int | None = None


def join(intervals: Sequence[PaidInterval], attempts: Sequence[AttemptRecord], now: float) -> list[Machine]:
    """Pairs rows with attempts so that order is kept, most are paired, and claims lie in or near their interval.

    A claim may lie up to MAX_SKEW_S outside, since it was made by another clock. Among assignments that pair
    equally many, the one with the least distance wins.
    """
    rows = sorted(intervals, key=lambda row: row.started_at)
    claims = sorted(attempts, key=lambda record: record.attempt)
    pairs = _assign([[_distance_s(row, claim, now) for claim in claims] for row in rows])
    paired = {column for _, column in pairs}
    found = dict(pairs)
    machines = [Machine(row, claims[found[i]] if i in found else None) for i, row in enumerate(rows)]
    machines += [Machine(None, claim) for column, claim in enumerate(claims) if column not in paired]
    return _numbered(sorted(machines, key=_order))


def _numbered(machines: list[Machine]) -> list[Machine]:
    numbered: list[Machine] = []
    last = 0
    for index, machine in enumerate(machines):
        later = next((one.record.attempt for one in machines[index:] if one.record), None)
        number = machine.record.attempt if machine.record else last + 1
        is_free = machine.record is not None or later is None or number < later
        numbered.append(replace(machine, attempt=number if is_free else None))
        last = number if is_free else last
    return numbered


def _distance_s(row: PaidInterval, claim: AttemptRecord, now: float) -> float | None:
    """How far the claim lies outside the interval; None when too far to belong to it."""
    outside = max(row.started_at - claim.claimed_at, claim.claimed_at - (row.ended_at or now), 0.0)
    return outside if outside <= MAX_SKEW_S else None


def _assign(distances: list[list[float | None]]) -> list[tuple[int, int]]:
    """Order-keeping pairs (row, column), the most of them, then of the least sum: dynamic programming."""
    rows, columns = len(distances), len(distances[0]) if distances else 0
    # best[i][j]: (pairs missed, distance) of what is left from row i and column j on.
    best = [[(0, 0.0)] * (columns + 1) for _ in range(rows + 1)]
    for i in range(rows - 1, -1, -1):
        for j in range(columns - 1, -1, -1):
            distance, (pairs, sum_s) = distances[i][j], best[i + 1][j + 1]
            options = [best[i + 1][j], best[i][j + 1]]
            if distance is not None:
                options.append((pairs - 1, sum_s + distance))
            best[i][j] = min(options)
    found: list[tuple[int, int]] = []
    i = j = 0
    while i < rows and j < columns:
        distance, (pairs, sum_s) = distances[i][j], best[i + 1][j + 1]
        if distance is not None and best[i][j] == (pairs - 1, sum_s + distance):
            found.append((i, j))
            i, j = i + 1, j + 1
        elif best[i][j] == best[i + 1][j]:
            i += 1
        else:
            j += 1
    return found


def _order(machine: Machine) -> float:
    if machine.interval:
        return machine.interval.started_at
    assert machine.record
    return machine.record.claimed_at
