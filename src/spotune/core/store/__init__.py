"""The bucket: a few verbs that mean the same on file://, s3:// and gs://, and that hold out against its faults.

This module has Store: the verbs, and what their faults are called.

local.py    file://: hard links, atomic renames, fsync; and the local file of a download, hashed while it is written
objects.py  s3:// and gs://: whole objects from ranges and parts, create-only, verified; requests are tried again there
clouds.py   the single requests of S3 and GCS
faults.py   how long a verb holds out, the calls under way, and which of the clients' exceptions pass
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from spotune.core.environment import BUCKET, check_bucket
from spotune.core.errors import BadRecord, InputError, Misplaced, StoreError, shown
from spotune.core.keys import RECORD_MOST_BYTES, is_key
from spotune.core.store.faults import FOR_VERBS, Call, Calls, Denied, GaveUp, LocalFault, RetryPolicy, words_of
from spotune.core.store.local import Disk

NEED_A_BUCKET = ("create", "write", "upload", "list")  # where nothing is found, it is the bucket that is missing
DEFAULT = RetryPolicy()


class Bucket(Protocol):
    """One kind of bucket. Raises OSErrors (FileNotFoundError for no such object), Denied, GaveUp or LocalFault.

    ``move`` is called with the bytes of a file that an upload or a download has just moved.
    """

    move: Callable[[int], object]

    def read(self, key: str) -> bytes: ...
    def exists(self, key: str) -> bool: ...
    def create(self, key: str, data: bytes) -> bool: ...
    def write(self, key: str, data: bytes) -> None: ...
    def upload(self, local: Path, key: str) -> None: ...
    def upload_new(self, local: Path, key: str) -> bool: ...
    def download(self, key: str, local: Path) -> dict[str, Any]: ...
    def keys(self, prefix: str) -> list[str]: ...
    def names(self, prefix: str) -> list[str]: ...
    def delete(self, key: str) -> None: ...
    def abort_uploads(self, prefix: str, older_than_s: float) -> list[str]: ...


class Store:
    """One bucket. Keys are relative to ``url``; a key is written whole or not at all.

    A key names an object or a folder below ``url`` and nothing else: what leads out of it, or to a link, a pipe or a
    device, is Misplaced, and is no part of a listing.

    What may pass (time-outs, 5xx, resets, expired credentials) is tried again for as long as ``patience`` says. After
    that: StoreError (one line, naming the key). InputError at once when there is no such bucket, or no access to it
    and never was. What happens to the local file of a transfer (a full disk) is an OSError, as it is.
    Safe to use from several threads of one process; not across a fork.

    ``waiting`` is told once, in one line, of a store that does not answer for some seconds. ``calls`` are those under
    way: a call that waits in the kernel for a disk that is gone never returns.
    """

    def __init__(self, url: str, patience: RetryPolicy = DEFAULT, waiting: Callable[[str], None] | None = None) -> None:
        self.url = check_bucket(url)
        self.is_local = self.url.startswith("file://")
        self._bucket = _open(self.url, patience, waiting and (lambda what: waiting(f"{self.url}: {what}")))
        self.calls = Calls()
        self._bucket.move = self.calls.move

    def read(self, key: str) -> bytes | None:
        """The object's bytes, None when there is none. Raises BadRecord for one that is too large to be a record."""
        try:
            with self._faults("read", key):
                data = self._bucket.read(key)
        except FileNotFoundError:
            return None
        if len(data) > RECORD_MOST_BYTES:
            raise BadRecord(f"{key}: larger than {RECORD_MOST_BYTES >> 20} MiB, too large to be a record")
        return data

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""
        with self._faults("look up", key):
            return self._bucket.exists(key)

    def create(self, key: str, data: bytes) -> bool:
        """Writes the object if there is none; returns whether it did. Only one of many writers gets True."""
        with self._faults("create", key):
            return self._bucket.create(key, data)

    def write(self, key: str, data: bytes) -> None:
        """Writes or overwrites the object."""
        with self._faults("write", key):
            self._bucket.write(key, data)

    def upload(self, local: Path, key: str) -> None:
        """Makes a local file the object ``key``, whole; the stored size is verified.

        On a disk this is a hard link where it can be: the local file must not be changed in place afterwards, only
        removed or replaced.
        """
        with self._faults("upload", key):
            self._bucket.upload(local, key)

    def upload_new(self, local: Path, key: str) -> bool:
        """The same if there is no such object; returns whether it did. Only one of many writers gets True."""
        with self._faults("upload", key):
            return self._bucket.upload_new(local, key)

    def download(self, key: str, local: Path) -> dict[str, Any]:
        """Makes the object ``key`` a local file; returns its ``{size: bytes, sha256: hex}``, taken under way.

        Raises FileNotFoundError when there is none. On a disk this is a hard link where it can be: committed files are
        never rewritten, so neither must the local one be changed in place, only removed or replaced.
        """
        with self._faults("download", key):
            return self._bucket.download(key, local)

    def keys(self, prefix: str) -> list[str]:
        """All keys below the folder ``prefix``, sorted; empty when there is no such folder."""
        with self._faults("list", prefix):
            return self._bucket.keys(prefix)

    def names(self, prefix: str) -> list[str]:
        """What lies directly below the folder ``prefix``, sorted; a folder's name ends with a slash."""
        with self._faults("list", prefix):
            return self._bucket.names(prefix)

    def folders(self, prefix: str) -> list[str]:
        """The names of the folders directly below ``prefix``, sorted."""
        return [name[:-1] for name in self.names(prefix) if name.endswith("/")]

    def delete(self, keys: Iterable[str]) -> None:
        """Removes the objects; those that are gone already are no error."""
        for key in keys:
            with self._faults("delete", key):
                self._bucket.delete(key)

    def abort_uploads(self, prefix: str, older_than_s: float) -> list[str]:
        """Removes what uploads below the folder ``prefix`` left behind unfinished; returns their keys.

        Only those begun at least so long ago; nothing outside this store's folder is looked at. On GCS there is nothing
        to remove: an unfinished upload cannot be listed, costs nothing, and ends after a week.
        """
        with self._faults("list", prefix):
            return self._bucket.abort_uploads(prefix, older_than_s)

    @contextmanager
    def _faults(self, verb: str, key: str) -> Iterator[None]:
        """Maps what the bucket raises: InputError for what no other machine can mend, else StoreError.

        Raises Misplaced, and asks nothing, for what is not a key.
        """
        if not is_key(key) and (key or verb != "list"):
            raise Misplaced(f"{shown(key)}: not a key of this bucket ('..', an empty part, NUL, or too long)")
        try:
            with self.calls.call(verb, key):
                yield
        except LocalFault as fault:
            raise fault.error from None
        except FileNotFoundError as error:
            if verb not in NEED_A_BUCKET:
                raise
            remedy = "a folder that can be made" if self.is_local else "create it first"
            raise InputError(BUCKET, f"no such bucket: {self.url}", remedy=remedy) from error
        except (NotADirectoryError, FileExistsError) as error:
            what = f"{self.url}: a file is in the way of its folders: {error.filename}"
            raise InputError(BUCKET, what, remedy="a folder, or a place where one can be made") from error
        except (PermissionError, Denied) as error:
            what = f"{self.url}: access denied: {words_of(error)}"
            raise InputError(BUCKET, what, remedy="credentials that may read, list and write it") from error
        except (OSError, GaveUp) as error:
            raise StoreError(f"{self.url}/{key}: cannot {verb}: {words_of(error)}") from error


def _open(url: str, patience: RetryPolicy, waiting: Callable[[str], None] | None) -> Bucket:
    scheme, _, root = url.partition("://")
    if scheme == "file":
        return Disk(root, patience)
    from spotune.core.store.clouds import (
        S3,
        Gcs,  # here: a folder needs no asyncio
    )
    from spotune.core.store.objects import Objects

    return Objects(S3(patience) if scheme == "s3" else Gcs(patience), root, patience, waiting)


__all__ = ["FOR_VERBS", "Call", "RetryPolicy", "Store"]
