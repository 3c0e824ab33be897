"""Planned preemptions: ``--preemptions FILE``, one JSON object a line; and which of them is due."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spotune.contracts.errors import InputError, shown
from spotune.contracts.userfiles import read_user_file

_KEYS = ("after_s", "at_step", "notice_s")
_MOST = 1e9
_EXAMPLE = '{"after_s": 20, "notice_s": 0} or {"at_step": 40, "notice_s": 30}'


def read_preemptions(path: Path) -> tuple[dict[str, float], ...]:
    """The file's lines in order; raises InputError naming the line that is wrong."""
    lines = read_user_file(path).splitlines()
    return tuple(_parse(line, path, f"line {number}") for number, line in enumerate(lines, 1) if line.strip())


def _parse(line: str, path: Path, row: str) -> dict[str, float]:
    try:
        planned = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(path, f"not JSON: {error}", key=row, remedy=_EXAMPLE) from error
    if not isinstance(planned, dict) or ("after_s" in planned) == ("at_step" in planned):
        raise InputError(path, "needs either after_s or at_step", key=row, remedy=_EXAMPLE)
    for key, value in planned.items():
        if key not in _KEYS:
            raise InputError(path, f"unknown key {shown(key)}", key=row, remedy=_EXAMPLE)
        if not _is_amount(value):
            raise InputError(path, f"{key} {shown(value)} is not a number from 0", key=row, remedy=_EXAMPLE)
    return {key: float(value) for key, value in planned.items()}


def _is_amount(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= _MOST


def due(planned: Sequence[Mapping[str, float]], fired: Sequence[int], elapsed_s: float, step: int | None) -> int | None:
    """The index of the first one whose time has come and that has not fired, else None."""
    for index, preemption in enumerate(planned):
        if index in fired:
            continue
        if elapsed_s >= preemption.get("after_s", float("inf")):
            return index
        if step is not None and step >= preemption.get("at_step", float("inf")):
            return index
    return None
