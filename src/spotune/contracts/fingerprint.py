"""What data a run trains on, as a fingerprint that any machine can take again.

Local files count by their content, objects by size and the store's own checksum (etag, md5 or
generation), hub data sets by name and revision.
"""

import glob
import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spotune.contracts.errors import InputError, SpotuneError, StoreError
from spotune.contracts.records import fingerprint
from spotune.contracts.store.faults import Fault, judge, words_of

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
# What of a config says which rows are trained on, besides the files themselves.
DATA_KEYS = ("data", "data_limit", "datasets", "dataset_name", "dataset_config", "dataset_train_split")
_CHECKSUMS = ("ETag", "etag", "md5Hash", "generation", "checksum")


def resolve_source(source: str, where: object, key: str) -> list[str]:
    """The files that a source names, sorted: globs and folders resolved, on disk and in stores.

    Raises InputError when it names none, StoreError where a store is away. ``hf://`` sources are returned as they are.
    """
    if source.startswith(("hf://", "http://", "https://")):
        return [source]
    local = source.removeprefix("file://")
    if "://" not in local:
        path = _local_path(local, where, key)
        pattern = str(path / "**" / "*") if os.path.isdir(path) else str(path)  # unlike Path: False for a name too long
        found = sorted(name for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
    else:
        found = _resolve_remote(source, where, key)
    if not os.path.isfile(local):  # a folder or a pattern: only what is data
        found = [name for name in found if is_data_file(name)]
    if not found:
        raise InputError(
            where, f"no file matches {source}", key=key, remedy="JSONL, JSON, CSV or Parquet, also gzipped"
        )
    return found


def _local_path(text: str, where: object, key: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~name of nobody
        raise InputError(where, f"{text}: {error}", key=key) from error


def is_data_file(name: str) -> bool:
    return name.removesuffix(".gz").endswith(SUFFIXES)


def _resolve_remote(source: str, where: object, key: str) -> list[str]:
    protocol = source.split("://", 1)[0]
    try:
        fs, path = _open_store(source)
        if not any(mark in path for mark in "*?["):
            # Not isdir and exists: each would wait for a store that cannot be reached.
            path = f"{path.rstrip('/')}/**" if fs.info(path)["type"] == "directory" else path
        found = fs.glob(path) if any(mark in path for mark in "*?[") else [path]
    except FileNotFoundError:
        return []
    except Exception as error:
        raise _unreachable(source, where, key, error) from error
    return sorted(f"{protocol}://{name}" for name in found)


def _open_store(url: str) -> tuple[Any, str]:
    """(file system, path in it) of a URL."""
    import fsspec

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints the traceback of what it also raises
    own = url.startswith(("s3://", "gs://", "gcs://"))
    found: tuple[Any, str] = fsspec.core.url_to_fs(url, **({"use_listings_cache": False} if own else {}))
    return found


def _unreachable(url: str, where: object, key: str, error: Exception) -> SpotuneError:
    """Of any class of a store's client: a StoreError for what may pass, since another machine may reach it."""
    remedy = "is the name right, are there credentials for it, and a way to it from here?"
    fault = InputError(where, f"cannot reach {url}: {words_of(error)}", key=key, remedy=remedy)
    return StoreError(str(fault)) if judge(error) in (Fault.PASSING, Fault.UNREADY) else fault


def data_files(config: Mapping[str, Any], where: object) -> list[dict[str, Any]]:
    """What the config trains on: one ``{source, url, size, sha256 | checksum}`` a file.

    Raises InputError, StoreError as ``resolve_source``.
    """
    found: list[dict[str, Any]] = []
    for index, source in enumerate(config.get("data") or []):
        for url in resolve_source(source["source"], where, key := f"data[{index}].source"):
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


def _trl_facts(named: Any, where: object, key: str) -> list[dict[str, Any]]:
    facts: list[dict[str, Any]] = []
    for entry in named if isinstance(named, list) else [{"path": named}]:
        name = str(entry.get("path", "")) if isinstance(entry, dict) else str(entry)
        path = _local_path(name, where, key)
        if os.path.isdir(path):
            inside = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
            facts += [{"source": name, **_file_facts(str(file), where, key)} for file in inside]
        else:
            facts.append({"source": name, "url": f"hf://{name}"})
    return facts


def _file_facts(url: str, where: object, key: str) -> dict[str, Any]:
    if url.startswith(("hf://", "http://", "https://")):
        return {"url": url}
    local = url.removeprefix("file://")
    if "://" not in local:
        return {"url": url, **file_facts(Path(local))}
    try:
        fs, path = _open_store(url)
        info = fs.info(path)
    except Exception as error:
        raise _unreachable(url, where, key, error) from error
    checksum = next((str(info[name]) for name in _CHECKSUMS if info.get(name)), "")
    return {"url": url, "size": info.get("size"), "checksum": checksum.strip('"')}


def file_facts(path: Path) -> dict[str, Any]:
    """``{size: bytes, sha256: hex}`` of a file, as records name it."""
    with open(path, "rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
