"""What data a run trains on, as a fingerprint that any machine can take again.

Local files count by their content, objects by size and the store's own checksum (etag, md5 or
generation), hub data sets by name and revision.
"""

import glob
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from spotune.contracts.datafiles import checksum_of, find_files, is_remote, local_path, open_store, unreachable
from spotune.contracts.errors import InputError, StoreError
from spotune.contracts.machinefaults import is_machine_fault
from spotune.contracts.records import fingerprint

# What of a config says which rows are trained on, besides the files themselves.
DATA_KEYS = ("data", "data_limit", "datasets", "dataset_name", "dataset_config", "dataset_train_split")
_PACKAGED = ("json", "csv", "parquet", "arrow", "text", "xml")  # loaders of ``datasets`` that read files as they are


def data_files(config: Mapping[str, Any], where: object) -> list[dict[str, Any]]:
    """What the config trains on: one ``{source, url, size, sha256 | checksum}`` a file.

    Raises InputError, StoreError as ``find_files``.
    """
    found: list[dict[str, Any]] = []
    for index, source in enumerate(config.get("data") or []):
        for url in find_files(source["source"], where, key := f"data[{index}].source").files:
            found.append({"source": source["source"], **_file_facts(url, where, key)})
    for key in ("dataset_name", "datasets"):
        if config.get(key):
            found += _trl_facts(config[key], where, key)
    return found


def data_sha256(config: Mapping[str, Any], files: list[dict[str, Any]]) -> str:
    """The fingerprint of the data: the files and how the config mixes them."""
    facts = [
        {key: value for key, value in file.items() if key != "url"} | {"name": Path(file["url"]).name} for file in files
    ]
    return fingerprint({"files": facts, "mix": {key: config.get(key) for key in DATA_KEYS}})


def has_local_files(files: Iterable[Mapping[str, Any]]) -> bool:
    """Returns whether any file of ``data_files`` counts by its content."""
    return any("sha256" in file for file in files)


def _trl_facts(named: Any, where: object, key: str) -> list[dict[str, Any]]:
    """Facts of what ``datasets`` (a list of entries) or ``dataset_name`` names."""
    facts: list[dict[str, Any]] = []
    for entry in named if isinstance(named, list) else [{"path": named}]:
        entry = entry if isinstance(entry, Mapping) else {"path": entry}
        name = str(entry.get("path", ""))
        files = _trl_files(name, entry, where, key)
        facts += [{"source": name, **_file_facts(file, where, key)} for file in files]
        if not files:
            facts.append({"source": name, "url": f"hf://{name}"})
    return facts


def _trl_files(name: str, entry: Mapping[str, Any], where: object, key: str) -> list[str]:
    """The files that ``load_dataset`` reads for an entry: below a local folder, or those that it names. Sorted."""
    folder = local_path(name, where, key)
    is_local = os.path.isdir(folder)
    if not is_local and name not in _PACKAGED:
        return []  # a data set of the hub, and its own files
    found = _walk(folder) if is_local else []
    if isinstance(inside := entry.get("data_dir"), str) and not is_local:
        found += _walk(local_path(inside, where, key))
    for text in _texts(entry.get("data_files")):
        if is_remote(text) or text.startswith("hf://"):
            found.append(text)
            continue
        path = local_path(text.removeprefix("file://"), where, key)
        path = folder / path if is_local else path
        found += [str(path)] if path.is_file() else glob.glob(str(path), recursive=True)
    return sorted({file for file in found if is_remote(file) or file.startswith("hf://") or os.path.isfile(file)})


def _walk(folder: Path) -> list[str]:
    return [str(file) for file in folder.rglob("*") if file.is_file() and not file.name.startswith(".")]


def _texts(value: Any) -> list[str]:
    """The file names inside ``data_files``: one text, a list of them, or either for each split."""
    if isinstance(value, Mapping):
        return [text for inner in value.values() for text in _texts(inner)]
    return [str(inner) for inner in value] if isinstance(value, list) else [str(value)] if value else []


def _file_facts(url: str, where: object, key: str) -> dict[str, Any]:
    if url.startswith(("hf://", "http://", "https://")):
        return {"url": url}
    if not is_remote(url):
        try:
            return {"url": url, **file_facts(local_path(url.removeprefix("file://"), where, key))}
        except OSError as error:
            if is_machine_fault(error):
                raise StoreError(f"{where}: {key}: cannot read {url}: {error.strerror or error}") from error
            raise InputError(where, f"cannot read {url}: {error.strerror or error}", key=key) from error
    try:
        fs, path = open_store(url)
        info = fs.info(path)
    except Exception as error:
        raise unreachable(url, where, key, error) from error
    return {"url": url, "size": info.get("size"), "checksum": checksum_of(info)}


def file_facts(path: Path) -> dict[str, Any]:
    """``{size: bytes, sha256: hex}`` of a file, as records name it."""
    with open(path, "rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
