"""Data files of a store, copied once to this machine's cache: a new copy when the store's checksum changes.

Copies rather than streams, since a file is read more than once: for its hash, and for its rows. Where a store gives
no checksum (a plain web server), a copy is not used again.
"""

import hashlib
import os
from pathlib import Path

from spotune.contracts.datafiles import (
    changed_while_read,
    checksum_of,
    is_remote,
    local_path,
    not_as_submitted,
    open_store,
    unreachable,
)
from spotune.contracts.errors import InputError
from spotune.contracts.machinefaults import is_machine_fault


def fetch(url: str, cache: Path, where: str, key: str, checksum: str = "") -> str:
    """Returns the local path of a data file; a local file's is its own.

    Args:
        checksum: the store's, as the run's record has it; empty where it has none.

    Raises:
        InputError: the file is not there, may not be read, or is not the one with that checksum.
        StoreError: the store is away.
    """
    if not is_remote(url):
        return str(local_path(url.removeprefix("file://"), where, key))
    try:
        filesystem, path = open_store(url)
        facts = filesystem.info(path)
        found = checksum_of(facts)
        if checksum and found != checksum:
            raise not_as_submitted(url, "checksum in the store")
        folder = hashlib.sha256(f"{url}\n{found}\n{facts.get('size')}".encode()).hexdigest()[:24]
        target = cache / "sources" / folder / Path(path.split("?")[0]).name
        if found and target.exists() and target.stat().st_size == facts.get("size", target.stat().st_size):
            return str(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{os.getpid()}-{target.name}")  # ranks may fetch at the same time
        filesystem.get_file(path, str(part))
        if found and checksum_of(filesystem.info(path)) != found:
            raise changed_while_read(url)
        part.replace(target)
    except InputError:
        raise
    except FileNotFoundError as error:
        if is_machine_fault(error):  # fsspec says so of a web server that is away
            raise unreachable(url, where, key, error) from error
        raise InputError(where, f"no such file: {url}", key=key) from error
    except (PermissionError, ImportError) as error:
        raise InputError(where, f"cannot read {url}: {error}", key=key) from error
    except OSError as error:
        if error.errno is not None:
            raise  # this machine's disk
        raise unreachable(url, where, key, error) from error
    except Exception as error:  # of any class of a store's client
        raise unreachable(url, where, key, error) from error
    return str(target)
