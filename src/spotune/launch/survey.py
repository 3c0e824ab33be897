"""What ``spotune check`` says: of a config, or of this machine and project."""

from collections.abc import Collection, Iterable
from typing import Any

from spotune.contracts.basemodel import model_files, model_sha256
from spotune.contracts.config import load_config, profiles_of, read_config
from spotune.contracts.datafiles import notices
from spotune.contracts.errors import InfraError, InputError, raise_all
from spotune.contracts.fingerprint import data_files, data_sha256
from spotune.contracts.keys import RUNS
from spotune.contracts.localfiles import check_local_files
from spotune.contracts.records import fingerprint
from spotune.launch.checks import check_model
from spotune.launch.infra import LOCAL, infra_of, spell
from spotune.launch.local.gpus import find_gpus
from spotune.launch.rowcheck import check_rows
from spotune.launch.task import load_task
from spotune.launch.trainer import find_trainer
from spotune.launch.workspace import Workspace


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
    from spotune.launch.skypilot.survey import survey_infra

    try:
        return survey_infra(spell(place), workspace.settings.slurm, workspace.environ)
    except InfraError as error:
        if infra:
            raise
        return {"infra": place, "problems": [str(error)]}
