"""What is refused of a dev cluster or of a run on one before SkyPilot is asked."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spotune.contracts.errors import InputError
from spotune.launch.checks import check_model
from spotune.launch.project import inside
from spotune.launch.task import check_amounts, parse_gpus

_NAME = re.compile(r"[a-zA-Z]([-_.a-zA-Z0-9]*[a-zA-Z0-9])?")  # SkyPilot's own (CLUSTER_NAME_VALID_REGEX)


def check_name(name: str) -> None:
    """Raises InputError for what SkyPilot would not call a cluster."""
    if not _NAME.fullmatch(name):
        remedy = "letters, digits, '-', '_' and '.', a letter first, a letter or digit last"
        raise InputError("--name", f"{name!r} is no name of a cluster", remedy=remedy)


def check_machine(gpus: str | None, cpus: str | None = None, memory: str | None = None) -> None:
    """Raises InputError for GPUs, CPUs or a memory that are none; None is not asked for."""
    if gpus:
        parse_gpus(gpus, "--gpus")
    check_amounts(cpus, memory)


def check_model_goes_along(config: Mapping[str, Any], where: str, folder: Path) -> None:
    """Raises InputError for a model that the cluster will not find; an absolute path may be there alone."""
    name = str(config["model_name_or_path"])
    if name.startswith(("/", "~")) or check_model(config, where) == "hub":
        return
    if inside(folder / name, folder) is None:
        what = f"{name} is not below {folder}, which is what a cluster gets"
        raise InputError(where, what, key="model_name_or_path", remedy="copy it here")
