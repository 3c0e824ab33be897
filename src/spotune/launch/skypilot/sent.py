"""What a machine of SkyPilot's gets of this one's files: the folder of the run, but for what git ignores."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spotune.contracts.errors import InputError
from spotune.launch.infra import cloud_of
from spotune.launch.project import check_project, inside
from spotune.launch.skypilot import engine

_IGNORED = "is ignored by git, so that SkyPilot does not send it"


def check_sent(
    config: Mapping[str, Any],
    files: Sequence[Mapping[str, Any]],
    where: str,
    folder: Path,
    task: Mapping[str, Any],
    infra: str,
) -> None:
    """Raises InputError for a folder that no machine could be set up from, and for data or a model that lies here and
    would not be there. The config goes by the bucket.

    Args:
        files: the data, as ``fingerprint.data_files`` has it.
        where: the config file, as it was named.
        folder: what is sent, where the task's ``workdir`` is a folder; into a git reference nobody looks.
        task: what its ``file_mounts`` bring is there.
    """
    if not isinstance(task.get("workdir"), str):
        return
    check_project(folder, task)
    mounts = [Path(target) for target in task.get("file_mounts") or {} if target.startswith("/")]
    excluded = engine.excluded_files(str(folder))
    for key, path in _local(config, files):
        if path.is_absolute():
            # A cluster's nodes share file systems with where their users log in, as a rule.
            if cloud_of(infra) == "slurm" or any(path.is_relative_to(mount) for mount in mounts):
                continue
            what = f"{path} is a path of this machine"
            raise InputError(where, what, key=key, remedy=f"a path below {folder}, relative to it, or a bucket's URL")
        sent = inside(folder / path, folder)
        if sent is None:
            what = f"{path} is not below {folder}, which is what a machine gets"
            raise InputError(where, what, key=key, remedy="copy it there, or a bucket's URL")
        if any(sent.is_relative_to(one) for one in excluded):
            raise InputError(where, f"{path} {_IGNORED}", key=key, remedy="a .skyignore of your own, or a bucket's URL")


def _local(config: Mapping[str, Any], files: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Path]]:
    """(key, path) of what the run reads from a disk, as the config names it."""
    for key in ("model_name_or_path", "chat_template_path"):
        if config.get(key) and (path := Path(str(config[key])).expanduser()).exists():
            yield key, path
    for file in files:
        if "://" not in (name := str(file["url"]).removeprefix("file://")):
            yield "data", Path(name)
