"""Durations as people write them: ``30s``, ``5m``, ``1.5h``, ``2d``; and ``--save-every``."""

import re
from dataclasses import dataclass

from spotune.contracts.errors import InputError, shown

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(text: str, where: str) -> float:
    """Seconds, from ``30s``, ``5m``, ``1.5h``, ``2d`` or a bare number of seconds. Raises InputError."""
    found = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]+)?)\s*([smhd]?)", text.strip())
    if not found:
        raise InputError(where, f"{shown(text)} is not a duration", remedy="30s, 5m, 1.5h or 2d")
    return float(found[1]) * _UNITS_S[found[2] or "s"]


@dataclass(frozen=True)
class SaveEvery:
    """When to save: after so many steps, or so many seconds; neither: as the config says."""

    steps: int | None = None
    seconds: float | None = None


def parse_save_every(text: str, where: str = "--save-every") -> SaveEvery:
    """``50`` is steps, ``5m`` is time, empty is neither. Raises InputError."""
    if not text:
        return SaveEvery()
    if re.fullmatch("[0-9]{1,12}", text) and int(text) > 0:
        return SaveEvery(steps=int(text))
    if text[-1:] in _UNITS_S and (seconds := parse_duration(text, where)) > 0:
        return SaveEvery(seconds=seconds)
    raise InputError(where, f"{shown(text)} is neither steps nor a duration", remedy="50 (steps) or 5m")
