"""Long series made short enough to draw, without changing what they say."""

from collections.abc import Sequence
from typing import Any, TypeVar

from spotune.cost.phases import Phase, Segment

Point = TypeVar("Point")


def spread(points: Sequence[Point], most: int) -> list[Point]:
    """At most ``most`` of the points, evenly picked, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(index * (len(points) - 1) / (most - 1))] for index in range(most)]


def strip(segments: Sequence[Segment], start: float, most: int) -> list[list[float | str]]:
    """``[offset_s, seconds, phase]`` from ``start`` on: neighbours of one phase joined, in at most ``most`` pieces.

    Where there would be more, the time is cut into slices, each with the phase that has most of it: for a
    picture only. The sums by phase are made from the segments themselves.
    """
    joined = _join(segments)
    if len(joined) > most:
        joined = _join(_slices(joined, most))
    return [[one.started_at - start, one.seconds, one.phase] for one in joined]


def _join(segments: Sequence[Segment]) -> list[Segment]:
    joined: list[Segment] = []
    for one in segments:
        if joined and joined[-1].phase == one.phase:
            joined[-1] = Segment(joined[-1].started_at, one.ended_at, one.phase)
        else:
            joined.append(Segment(one.started_at, one.ended_at, one.phase))
    return joined


def _slices(segments: Sequence[Segment], count: int) -> list[Segment]:
    began, width = segments[0].started_at, (segments[-1].ended_at - segments[0].started_at) / count
    shares: list[dict[Phase, float]] = [{} for _ in range(count)]
    for one in segments:
        first = min(count - 1, int((one.started_at - began) / width))
        last = min(count - 1, int((one.ended_at - began) / width))
        for index in range(first, last + 1):
            low, high = began + index * width, began + (index + 1) * width
            inside = min(one.ended_at, high) - max(one.started_at, low)
            shares[index][one.phase] = shares[index].get(one.phase, 0.0) + inside
    return [
        Segment(began + index * width, began + (index + 1) * width, max(share, key=lambda phase: share[phase]))
        for index, share in enumerate(shares)
        if share
    ]


def rounded(value: Any) -> Any:
    """Floats to nine decimals, a clock's and a float's own noise; containers are gone through."""
    if isinstance(value, float):
        return round(value, 9)
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list) else value
