"""Data files of a store, copied once to this machine's cache: a new copy when the store's checksum changes.

Copies rather than streams, since ``datasets`` refuses every store when the hub is offline, and since a file
whose time does not change keeps the cache of tokenized rows valid.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

from spotune.contracts.errors import InputError

_FACTS = ("ETag", "etag", "md5Hash", "generation", "size", "mtime", "LastModified", "updated")


def fetch(url: str, cache: Path, where: str, key: str) -> str:
    """The local path of a data file; a local one's is its own. Raises InputError when it is not there."""
    if "://" not in url or url.startswith("file://"):
        return str(Path(url.removeprefix("file://")).expanduser())
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(url, **_options(url))
        facts = filesystem.info(path)
        target = cache / "sources" / _digest(url, facts) / Path(path.split("?")[0]).name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f".{os.getpid()}-{target.name}")  # ranks may fetch at the same time
            filesystem.get_file(path, str(part))
            part.replace(target)
    except FileNotFoundError as error:
        raise InputError(where, f"no such file: {url}", key=key) from error
    except (PermissionError, ImportError, ValueError) as error:
        raise InputError(where, f"cannot read {url}: {error}", key=key) from error
    return str(target)


def _options(url: str) -> dict[str, Any]:
    if url.startswith(("gs://", "gcs://")):
        return {"use_listings_cache": False} | ({"token": "anon"} if os.environ.get("STORAGE_EMULATOR_HOST") else {})
    return {"use_listings_cache": False} if url.startswith("s3://") else {}


def _digest(url: str, facts: dict[str, Any]) -> str:
    known = [str(facts[name]) for name in _FACTS if facts.get(name)]
    return hashlib.sha256("\n".join([url, *known]).encode()).hexdigest()[:24]
