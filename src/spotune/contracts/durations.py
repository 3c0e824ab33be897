"""Durations as people write them: ``30s``, ``5m``, ``1.5h``, ``2d``; ``--save-every`` and ``--stall-after``."""

import re
from dataclasses import dataclass

from spotune.contracts.errors import InputError, shown

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
STALL_AFTER_S = 600.0


def parse_duration(text: str, where: str) -> float:
    """Seconds, from ``30s``, ``5m``, ``1.5h``, ``2d`` or a bare number of seconds. Raises InputError."""
    found = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]+)?)\s*([smhd]?)", text.strip())
    if not found:
        raise InputError(where, f"{shown(text)} is not a duration", remedy="30s, 5m, 1.5h or 2d")
    return float(found[1]) * _UNITS_S[found[2] or "s"]


def parse_stall_after(text: str, where: str = "--stall-after") -> float:
    """Seconds, 0 for never; empty is the default. Raises InputError."""
    return parse_duration(text, where) if text else STALL_AFTER_S


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
