"""Axes: round ticks for seconds, dollars and losses."""

import math
from collections.abc import Callable

_TIMES_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)


def time_ticks(length_s: float, most: int = 6) -> list[float]:
    """Round times from 0 up to ``length_s``."""
    width = length_s / most
    step = next((size for size in _TIMES_S if size >= width), None)
    if step is None or width < 0.5:
        return number_ticks(0.0, length_s, most) if step is not None else _every(_nice(width / 86400) * 86400, length_s)
    return _every(step, length_s)


def number_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers within ``low`` and ``high``."""
    if not high > low:
        return [low]
    step = _nice((high - low) / most)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def placer(low: float, high: float, size: float) -> Callable[[float], float]:
    """Maps ``low``..``high`` (either may be the greater) to 0..``size``; all to the middle where they are the same."""
    return lambda value: (value - low) / (high - low) * size if high != low else size / 2


def tick_text(seconds: float) -> str:
    """``0``, ``30 s``, ``2m``, ``1h 30m``."""
    if seconds == 0:
        return "0"
    if seconds < 60:
        return f"{seconds:g} s"
    left, parts = round(seconds), []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        amount, left = divmod(left, size)
        if amount:
            parts.append(f"{amount}{unit}")
    return " ".join(parts)


def _nice(width: float) -> float:
    """The next of 1, 2, 5 x 10^n."""
    power = 10.0 ** math.floor(math.log10(width))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= width * (1 - 1e-9))


def _every(step: float, end: float) -> list[float]:
    return [index * step for index in range(int(end / step + 1e-9) + 1)]
