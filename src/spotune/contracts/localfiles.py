"""Files that a config names beside its data and its model: those that are to be here must be here."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spotune.contracts.configvalues import Fault
from spotune.contracts.errors import refuse

_BUILDERS = ("json", "csv", "parquet", "text")  # of TRL's ``datasets``: a path of another name is on the hub
SETTINGS = ("deepspeed", "fsdp_config", "accelerator_config")  # a mapping, or a file that has it


def check_local_files(config: Mapping[str, Any], where: object) -> None:
    """Raises InputError for all files that the config names and that are not here."""
    refuse(where, file_faults(config))


def file_faults(config: Mapping[str, Any]) -> Iterator[Fault]:
    """What is named and is not here; a pattern, a URL or a name on the hub may be anywhere."""
    for index, entry in enumerate(config.get("datasets") or []):
        for file in _files_of(entry):
            folder = Path(entry["path"]) if Path(entry["path"]).is_dir() else Path()
            if "://" in file or any(mark in file for mark in "*?[") or (folder / file).exists():
                continue
            if entry["path"] in _BUILDERS or folder.name:
                yield Fault(f"datasets[{index}].data_files", f"no such file: {file}")
    template = config.get("chat_template_path")
    if isinstance(template, str) and template.endswith((".jinja", ".j2")) and not Path(template).is_file():
        yield Fault("chat_template_path", f"no such file: {template}")
    for key in SETTINGS:
        value = config.get(key)
        if isinstance(value, str) and not value.lstrip().startswith("{") and not Path(value).is_file():
            yield Fault(key, f"no such file: {value}")


def _files_of(entry: Any) -> list[str]:
    files = entry.get("data_files") if isinstance(entry, dict) else None
    named = files.values() if isinstance(files, dict) else [files] if isinstance(files, str) else files or []
    return [str(file) for file in named]
