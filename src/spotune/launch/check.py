"""What ``spotune check`` says: of a config and its rows, or of this machine and project."""

import json
import os
import subprocess
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from spotune.core.config import check_local_files, load_config, profiles_of, read_config
from spotune.core.data_files import notices
from spotune.core.errors import InfraError, InputError, SpotuneError, raise_all
from spotune.core.fingerprint import data_files, data_sha256, model_files, model_sha256
from spotune.core.keys import RUNS
from spotune.core.records import fingerprint
from spotune.launch.engine import LOCAL, infra_of, spell
from spotune.launch.local.layout import find_gpus
from spotune.launch.plan import check_model
from spotune.launch.settings import Workspace
from spotune.launch.task import find_trainer, load_task

# Looks at the rows of a config's local data files, by the trainer's Python: the launcher's reads no Parquet.

MOST_BYTES = 16 << 20  # keeps ``check`` within a second
_ASKED = "spotune.sft.rowcheck"


class RowsRefused(InputError):
    """A row does not fit; the message is the trainer's own."""

    def __init__(self, message: str) -> None:
        SpotuneError.__init__(self, message)


def check_rows(
    config: Mapping[str, Any], path: str, environ: Mapping[str, str], folder: Path, most_bytes: int = MOST_BYTES
) -> dict[str, Any]:
    """Returns ``{rows_read: number, rows_not_read: [file or reason, …]}``.

    Args:
        config: a resolved one.
        path: its file, for messages.
        environ: of the shell.
        folder: the project's.
        most_bytes: about how much is read.

    Raises:
        InputError: a row, or all of a source's rows together, do not fit.
    """
    if not config.get("data"):
        return {"rows_read": 0, "rows_not_read": ["only rows of data: are read here"]}
    try:
        python = find_trainer(environ, folder)
    except InputError as error:
        return {"rows_read": 0, "rows_not_read": [str(error)]}
    asked = json.dumps({"config": config, "config_path": path, "most_bytes": most_bytes}, default=str)
    source = str(Path(__file__).resolve().parents[2])
    child = {**environ, "PYTHONPATH": os.pathsep.join([source, *filter(None, [environ.get("PYTHONPATH", "")])])}
    ended = subprocess.run(
        [python, "-m", _ASKED], input=asked, env=child, cwd=folder, capture_output=True, text=True, check=False
    )
    try:
        found = json.loads(ended.stdout)
    except ValueError:
        last = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
        return {"rows_read": 0, "rows_not_read": [f"{python} cannot read them: {last}"]}
    if found["error"]:
        raise RowsRefused(found["error"])
    return {"rows_read": found["rows"], "rows_not_read": found["partly"]}


# What ``spotune check`` says: of a config, or of this machine and project.


def survey_config(
    path: str, profile: str, overrides: Iterable[str], workspace: Workspace, allow_env: Collection[str] = ()
) -> dict[str, Any]:
    """Facts about a config that is in order, all of its profiles included; raises InputError for all of its faults."""
    profiles = list(profiles_of(read_config(path), path))
    config = _load_all(path, profile, profiles, overrides, allow_env)
    check_local_files(config, path)
    origin = check_model(config, path)
    files = data_files(config, path)
    rows = check_rows(config, path, workspace.environ, workspace.cwd)
    return {
        "config": path,
        "profiles": profiles,
        "profile": profile or ("prod" if "prod" in profiles else ""),
        "model": f"{config['model_name_or_path']} ({origin})",
        "data_files": [file["url"] for file in files],
        **rows,
        "notices": notices(config.get("data"), path),
        "data_sha256": data_sha256(config, files),
        "model_sha256": model_sha256(model_files(config, path, workspace.env.cache)),
        "config_sha256": fingerprint(config),
    }


def _load_all(
    path: str, profile: str, profiles: Iterable[str], overrides: Iterable[str], allow_env: Collection[str]
) -> dict[str, Any]:
    """The config under the chosen profile, once it is in order under each of them."""
    errors: list[InputError] = []
    config: dict[str, Any] = {}
    try:
        config = load_config(path, profile, overrides, "prod", allow_env)
    except InputError as error:
        errors.append(error)
    for name in profiles:
        try:
            load_config(path, name, allowed_env=allow_env)
        except InputError as error:
            errors.append(error)
    raise_all(errors)
    return config


def survey_machine(workspace: Workspace) -> dict[str, Any]:
    """Facts about this machine and project; raises SpotuneError when the bucket cannot be reached."""
    gpus = find_gpus(workspace.environ)
    task_path, _ = load_task(workspace.cwd)
    runs = workspace.store().folders(RUNS)
    return {
        "settings": list(workspace.settings.files),
        "home": str(workspace.env.home),
        "bucket": workspace.env.bucket,
        "runs_in_bucket": len(runs),
        "task": str(task_path),
        "infra": workspace.settings.infra,
        "gpus": [gpu.name for gpu in gpus],
        "slots": workspace.settings.local.slots or len(gpus) or 1,
        "trainer": _trainer(workspace),
    }


def _trainer(workspace: Workspace) -> str:
    """The trainer's Python, or why there is none."""
    try:
        return find_trainer(workspace.environ, workspace.cwd)
    except InputError as error:
        return f"missing: {error}"


def survey_place(workspace: Workspace, infra: str = "") -> dict[str, Any]:
    """Facts about ``--infra NAME``, or else of what the settings name; nothing more of this machine.

    Raises InfraError where the API server of one that was asked for does not answer; else that is one of the problems.
    """
    place = infra or workspace.settings.infra
    if infra_of(place) == LOCAL:
        return {"infra": LOCAL}
    from spotune.launch.skypilot.slurm import survey_infra

    try:
        return survey_infra(spell(place), workspace.settings.slurm, workspace.environ)
    except InfraError as error:
        if infra:
            raise
        return {"infra": place, "problems": [str(error)]}
