"""Finds the Python that trains. The launcher's own environment has neither torch nor TRL: see docs/technology.md."""

import os
import shutil
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import spotune
from spotune.contracts import environment
from spotune.contracts.errors import InputError, shown

DEFAULT = Path(".venv-train/bin/python")
REMEDY = f"make setup-train, or {environment.PYTHON}=PYTHON"


def find_trainer(environ: Mapping[str, str], folder: Path) -> str:
    """Returns the path of the trainer's Python.

    In this order: ``SPOTUNE_PYTHON``; ``.venv-train`` of the project; ``.venv-train`` of spotune's own checkout; this
    Python, if TRL is installed beside the launcher.

    Args:
        environ: the environment of the shell that submits.
        folder: the project's folder, from which a relative ``SPOTUNE_PYTHON`` counts.

    Raises:
        InputError: there is none, or ``SPOTUNE_PYTHON`` is not a program.
    """
    if given := environment.setting(environ, environment.PYTHON):
        return _program(given, environ, folder)
    checkout = Path(spotune.__file__).parents[2]
    for place in (folder / DEFAULT, checkout / DEFAULT):
        if _is_program(place):
            return str(place.absolute())  # not resolved: the link is what makes it this environment's Python
    if find_spec("trl"):
        return sys.executable
    raise InputError(environment.PYTHON, f"no Python that trains: {folder / DEFAULT} is missing", remedy=REMEDY)


def trainer_of(task: Mapping[str, Any], environ: Mapping[str, str], folder: Path) -> str:
    """Returns the trainer's Python for a task on this machine; empty where the task neither needs one nor finds one.

    A task needs it if its ``setup`` or ``run`` names ``SPOTUNE_PYTHON``. Any other task starts its own interpreter. The
    task's ``envs`` come before the shell's environment.

    Raises:
        InputError: the task needs one, and there is none.
    """
    given = (task.get("envs") or {}).get(environment.PYTHON)
    try:
        return find_trainer({**environ, environment.PYTHON: str(given)} if given else environ, folder)
    except InputError:
        if environment.PYTHON in f"{task.get('setup')} {task.get('run')}":
            raise
        return ""


def _program(given: str, environ: Mapping[str, str], folder: Path) -> str:
    """Raises InputError for a ``SPOTUNE_PYTHON`` that cannot be started."""
    if "/" in given:
        found = str(folder / given) if _is_program(folder / given) else None
    else:
        found = shutil.which(given, path=environ.get("PATH"))
    if not found:
        what = f"{shown(given)} is not an executable file"
        raise InputError(environment.PYTHON, what, remedy="the path of a Python that has spotune[trainer], or unset it")
    return found


def _is_program(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)
