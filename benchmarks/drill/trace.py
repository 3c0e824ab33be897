"""A spot market's trace as a schedule: each end of a time in which there were machines takes one away."""

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from random import Random

from drill.schedule import After, Kill, Run
from spotune.core.errors import InputError

SECONDS_PER_HOUR = 60.0  # an hour of the market in a minute, when nothing else is asked for


def read_trace(path: Path) -> tuple[float, list[int]]:
    """(seconds between ticks, machines that could be had at each tick). Raises InputError."""
    try:
        data = json.loads(path.read_text())
        gap_s, counts = float(data["metadata"]["gap_seconds"]), [int(count) for count in data["data"]]
    except FileNotFoundError as error:
        raise InputError(path, "no such file") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = '{"metadata": {"gap_seconds": 600}, "data": [1, 0, …]}'
        raise InputError(path, f"not a trace: {type(error).__name__}: {error}", remedy=remedy) from error
    if gap_s <= 0 or not any(counts):
        raise InputError(path, "no machine is ever there")
    return gap_s, counts


def intervals(gap_s: float, counts: Sequence[int]) -> list[tuple[float, float]]:
    """(seconds up, seconds down after that) from the first time up; the last time up has no end, and is left out."""
    lengths = [(up, gap_s * len(list(group))) for up, group in groupby(counts, lambda count: count > 0)]
    if not lengths[0][0]:
        lengths = lengths[1:]
    seconds = [length for _, length in lengths]
    return list(zip(seconds[0::2], seconds[1::2], strict=False))


def trace_run(gap_s: float, counts: Sequence[int], seconds_per_hour: float, notice_s: float, rng: Random) -> Run:
    """One run that loses its machine whenever the market does; times are scaled."""
    scale = seconds_per_hour / 3600
    return tuple(
        Kill(
            kind="notice" if notice_s else "vanish",
            when=After(round(up_s * scale, 3)),
            wipe=rng.random() < 0.5,
            notice_s=notice_s,
            down_s=round(down_s * scale, 3),
        )
        for up_s, down_s in intervals(gap_s, counts)
    )
