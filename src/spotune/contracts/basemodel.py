"""Which model a run starts from, as a fingerprint that any machine can take again.

A local folder counts by the contents of what loading it reads (configs, tokenizer, chat template, weights); a hub
id by name and revision. An adapter's folder brings the base model that it names, a config its chat template.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spotune.contracts.datafiles import is_lfs_pointer
from spotune.contracts.errors import InputError, StoreError
from spotune.contracts.filehashes import hash_files
from spotune.contracts.machinefaults import is_machine_fault
from spotune.contracts.records import fingerprint
from spotune.contracts.userfiles import read_user_json

MODEL_KEYS = ("model_name_or_path", "model_revision", "chat_template_path")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_OTHERS = (".json", ".jinja", ".j2", ".model", ".txt", ".tiktoken", ".py")
# A checkpoint's folder is a model's too; what only goes on training is not read.
_TRAINER = ("optimizer", "scheduler", "scaler", "rng_state", "trainer_state", "training_args", "spotune")
_MOST_NAME = 4096  # characters of a path or of a name on the hub


def model_files(config: Mapping[str, Any], where: object, cache: Path | None = None) -> list[dict[str, Any]]:
    """One ``{name, size, sha256}`` a local file, ``{name, revision}`` for what comes from a hub. Raises InputError.

    Args:
        config: the resolved config.
        where: for messages.
        cache: a folder of this machine in which hashes of large files are remembered.
    """
    key = MODEL_KEYS[0]
    try:
        found = _parts(str(config[key]), str(config.get("model_revision") or "main"), where)
        template = config.get("chat_template_path")
        if isinstance(template, str) and template:
            found += _template_parts(template, where)
        local = [(name, path) for name, path, _ in found if path]
        for _, path in local:
            if is_lfs_pointer(path):
                raise InputError(path, "is a Git LFS pointer, not the model's file", remedy="git lfs pull")
        facts = hash_files([path for _, path in local], cache)
    except OSError as error:
        if is_machine_fault(error):
            raise StoreError(f"{where}: {key}: cannot be read: {error}") from error
        raise InputError(where, f"cannot be read: {error}", key=key) from error
    hashed = [{"name": name, **fact} for (name, _), fact in zip(local, facts, strict=True)]
    return hashed + [{"name": name, "revision": revision} for name, path, revision in found if not path]


def model_sha256(files: list[dict[str, Any]]) -> str:
    """The fingerprint of the model: names, sizes and contents, whatever folder they are in."""
    return fingerprint(sorted(files, key=lambda file: str(file["name"])))


def _parts(name: str, revision: str, where: object) -> list[tuple[str, Path | None, str]]:
    """(name, path, revision) of the model's parts: a path where they are local, a revision where they are not."""
    folder = _folder(name, where)
    if folder is None:
        return [(f"hf://{name}", None, revision)]
    parts = [(path.relative_to(folder).as_posix(), path, "") for path in _files(folder, _WEIGHTS + _OTHERS)]
    return [*parts, *_base_of(folder, where)]


def adapter_base(folder: Path) -> tuple[str, str] | None:
    """(the base model, its revision) that an adapter's folder names; None for a folder without an adapter.

    Raises InputError where the adapter cannot be read or names none, StoreError where the disk failed.
    """
    path = folder / "adapter_config.json"
    if not os.path.exists(path):
        return None
    remedy = "base_model_name_or_path in it"
    try:
        adapter = read_user_json(path)
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error}") from error
    base = adapter.get("base_model_name_or_path") if isinstance(adapter, dict) else None
    if not isinstance(base, str) or not base:
        raise InputError(path, "names no base model", remedy=remedy)
    if len(base) > _MOST_NAME:
        raise InputError(path, f"names no base model: a name of {len(base)} characters", remedy=remedy)
    return base, str(adapter.get("revision") or "main")


def _base_of(folder: Path, where: object) -> list[tuple[str, Path | None, str]]:
    """The parts of the model that an adapter's folder names, none for a whole model."""
    named = adapter_base(folder)
    if named is None:
        return []
    base, revision = named
    below = _folder(base, where)
    if below is None:
        return [(f"hf://{base}", None, revision)]
    return [(f"base/{file.relative_to(below).as_posix()}", file, "") for file in _files(below, _WEIGHTS + _OTHERS)]


def _template_parts(template: str, where: object) -> list[tuple[str, Path | None, str]]:
    path = Path(template).expanduser()
    if os.path.isfile(path):
        return [(f"chat_template/{path.name}", path, "")]
    folder = _folder(template, where)
    if folder is None:
        return [(f"chat_template/hf://{template}", None, "main")]
    return [(f"chat_template/{file.relative_to(folder).as_posix()}", file, "") for file in _files(folder, _OTHERS)]


def _folder(name: str, where: object) -> Path | None:
    """The local folder of that name, as transformers looks for it; None for a hub id."""
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # ~name of nobody
        raise InputError(where, f"{name}: {error}", key=MODEL_KEYS[0]) from error
    return path if os.path.isdir(path) else None  # False, not an error, for a name that is too long


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files of a model's folder that loading it may read, sorted."""
    inside = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
    return sorted(
        path
        for path in inside
        if path.suffix in suffixes and not path.name.startswith((".", *_TRAINER)) and path.is_file()
    )
