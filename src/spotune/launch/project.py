"""Whether a folder is one that machines can work in: what is synced to them is what they set up from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spotune.contracts.errors import InputError

PYTHON = "SPOTUNE_PYTHON"  # an environment that is there already, so that nothing is set up
KEEPER = "src/spotune/keeper"  # runs with the machine's own Python, before any setup
SCRIPT = "tasks/setup.sh"  # of the shipped tasks' setup: make setup-train, and what machines lack for it
_SETUP = (SCRIPT, "Makefile", "pyproject.toml", "requirements-trainer.lock", "src/spotune")


def check_project(folder: Path, task: Mapping[str, Any], *more: str) -> None:
    """Raises InputError where ``folder`` lacks what a machine that gets it needs: ``more``, and for a task that sets
    its environment up with ``SCRIPT`` what that takes.

    Tasks are found beside the package too, so that nothing else would fail before the machine is paid for.
    """
    is_set_up = bool((task.get("envs") or {}).get(PYTHON)) or SCRIPT not in (task.get("setup") or "")
    missing = [name for name in (*(() if is_set_up else _SETUP), *more) if not (folder / name).exists()]
    if missing:
        what = f"is what the machine would get, and has no {', '.join(missing)}"
        raise InputError(folder, what, remedy="cd to a checkout of spotune")


def inside(path: Path, folder: Path) -> Path | None:
    """``path`` relative to ``folder``, links followed; None where it is elsewhere."""
    path, folder = path.resolve(), folder.resolve()
    return path.relative_to(folder) if path.is_relative_to(folder) else None
