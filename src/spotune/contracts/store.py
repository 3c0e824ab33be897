"""The bucket: a few verbs over fsspec that mean the same on file://, s3:// and gs://.

What fsspec does not promise by itself is done here: no listing cache (other machines write too), whole
objects only (an exception inside ``fs.open`` commits a partial one), create-only writes, fsync on disk.
"""

import errno
import os
import shutil
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

from spotune.contracts.environment import BUCKET, check_bucket
from spotune.contracts.errors import InputError, StoreError

WRITING = ("create", "write", "upload")


class Store:
    """One bucket. Keys are relative to ``url``; a key is written whole or not at all.

    Raises StoreError (one line, naming the key) when the bucket cannot be reached or answers wrongly, and
    InputError when there is no such bucket or no access to it.
    Safe to use from several threads of one process; not across a fork.
    """

    def __init__(self, url: str) -> None:
        self.url = check_bucket(url)
        self.is_local = self.url.startswith("file://")
        self._lock = threading.Lock()
        self._filesystem: Any = None
        self._root = self.url.removeprefix("file://")

    @property
    def _fs(self) -> Any:
        with self._lock:
            if self._filesystem is None:
                self._filesystem, self._root = _connect(self.url)
            return self._filesystem

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    @contextmanager
    def _faults(self, verb: str, key: str) -> Iterator[None]:
        """Maps what the store's client raises: InputError for what no other machine can mend, else StoreError."""
        try:
            yield
        except FileNotFoundError as error:
            if verb not in WRITING:
                raise
            remedy = "a folder that can be made" if self.is_local else "create it first"
            raise InputError(BUCKET, f"no such bucket: {self.url}", remedy=remedy) from error
        except (NotADirectoryError, FileExistsError) as error:
            what = f"{self.url}: a file is in the way of its folders: {error.filename}"
            raise InputError(BUCKET, what, remedy="a folder, or a place where one can be made") from error
        except Exception as error:
            if isinstance(error, (PermissionError, *_denials())):
                what = f"{self.url}: access denied: {' '.join(str(error).split())[:200]}"
                raise InputError(BUCKET, what, remedy="credentials that may read, list and write it") from error
            if not isinstance(error, (OSError, *_client_faults())):
                raise
            raise StoreError(f"{self.url}/{key}: cannot {verb}: {' '.join(str(error).split())[:300]}") from error

    def read(self, key: str) -> bytes | None:
        """The object's bytes, None when there is none."""
        try:
            with self._faults("read", key):
                if self.is_local:
                    return Path(self._path(key)).read_bytes()
                fs = self._fs
                data: bytes = fs.cat_file(self._path(key))
                return data
        except FileNotFoundError:
            return None

    def exists(self, key: str) -> bool:
        try:
            with self._faults("look up", key):
                if self.is_local:
                    return Path(self._path(key)).exists()
                fs = self._fs
                fs.invalidate_cache()
                fs.info(self._path(key))
                return True
        except FileNotFoundError:
            return False

    def create(self, key: str, data: bytes) -> bool:
        """Writes the object if there is none; returns whether it did. Only one of many writers gets True."""
        with self._faults("create", key):
            if self.is_local:
                return _link_new(self._path(key), data)
            if self.exists(key):  # some stores ignore the condition below; this leaves them a narrow window only
                return False
            fs = self._fs
            try:
                fs.pipe_file(self._path(key), data, mode="create")
            except FileExistsError:
                return False
            except Exception as error:
                if _is_precondition_failure(error):
                    return False
                raise
            return True

    def write(self, key: str, data: bytes) -> None:
        """Writes or overwrites the object."""
        with self._faults("write", key):
            if self.is_local:
                path = Path(self._path(key))
                part = _write_part(path, data)
                part.replace(path)
            else:
                fs = self._fs
                fs.pipe_file(self._path(key), data)

    def upload(self, local: Path, key: str) -> None:
        """Copies a local file to the object ``key``, whole."""
        with self._faults("upload", key):
            if self.is_local:
                path = Path(self._path(key))
                part = _copy_part(local, path)
                part.replace(path)
            else:
                fs = self._fs
                fs.put_file(str(local), self._path(key))

    def abort_uploads(self, prefix: str, older_than_s: float) -> list[str]:
        return []

    def download(self, key: str, local: Path) -> "dict[str, Any]":
        """Copies the object ``key`` to a local file; raises FileNotFoundError when there is none."""
        local.parent.mkdir(parents=True, exist_ok=True)
        with self._faults("download", key):
            if self.is_local:
                _copy_part(Path(self._path(key)), local, durable=False).replace(local)
            else:
                fs = self._fs
                fs.get_file(self._path(key), str(local))
        import hashlib

        with open(local, "rb") as file:
            return {"size": local.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}

    def keys(self, prefix: str) -> list[str]:
        """All keys below the folder ``prefix``, sorted; empty when there is no such folder."""
        with self._faults("list", prefix):
            if self.is_local:
                top = Path(self._path(prefix))
                root = len(self._root) + 1
                files = (os.path.join(folder, name) for folder, _, names in os.walk(top) for name in names)
                return sorted(file[root:] for file in files if not os.path.basename(file).startswith(".part-"))
            fs = self._fs
            fs.invalidate_cache()
            found = fs.find(self._path(prefix))
            return sorted(path.removeprefix(f"{self._root}/") for path in found)

    def folders(self, prefix: str) -> list[str]:
        """The names of the folders directly below ``prefix``, sorted."""
        with self._faults("list", prefix):
            if self.is_local:
                try:
                    return sorted(entry.name for entry in os.scandir(self._path(prefix)) if entry.is_dir())
                except FileNotFoundError:
                    return []
            fs = self._fs
            fs.invalidate_cache()
            try:
                entries = fs.ls(self._path(prefix), detail=True)
            except FileNotFoundError:
                return []
            return sorted(
                entry["name"].rstrip("/").rsplit("/", 1)[1] for entry in entries if entry["type"] == "directory"
            )

    def delete(self, keys: Iterable[str]) -> None:
        """Removes the objects; those that are gone already are no error."""
        for key in keys:
            with self._faults("delete", key):
                if self.is_local:
                    path = Path(self._path(key))
                    path.unlink(missing_ok=True)
                    _prune_empty(path.parent, Path(self._root))
                else:
                    fs = self._fs
                    try:
                        fs.rm_file(self._path(key))
                    except FileNotFoundError:
                        continue


def _connect(url: str) -> tuple[Any, str]:
    # gcsfs asks for the bucket's type over gRPC, which stalls a minute a call where it cannot be reached.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False}
    if url.startswith(("gs://", "gcs://")):
        options["requests_timeout"] = 60
        if os.environ.get("STORAGE_EMULATOR_HOST"):
            options["token"] = "anon"
    try:
        filesystem, root = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise StoreError(f"{url}: {error}") from error
    return filesystem, root.rstrip("/")


def _denials() -> tuple[type[Exception], ...]:
    """What says that there are no credentials, of those clients that are loaded."""
    botocore = sys.modules.get("botocore.exceptions")
    google = sys.modules.get("google.auth.exceptions")
    found = [botocore.NoCredentialsError, botocore.PartialCredentialsError] if botocore else []
    return (*found, google.DefaultCredentialsError) if google else tuple(found)


def _client_faults() -> tuple[type[Exception], ...]:
    """The stores' own exceptions that are not OSErrors, of those clients that are loaded."""
    faults: list[type[Exception]] = []
    if botocore := sys.modules.get("botocore.exceptions"):
        faults += [botocore.BotoCoreError, botocore.ClientError]
    if gcsfs := sys.modules.get("gcsfs.retry"):
        faults.append(gcsfs.HttpError)
    if aiohttp := sys.modules.get("aiohttp"):
        faults.append(aiohttp.ClientError)
    if google := sys.modules.get("google.auth.exceptions"):
        faults.append(google.GoogleAuthError)
    return tuple(faults)


def _is_precondition_failure(error: BaseException | None) -> bool:
    """Whether a store said "it is there already" to a conditional put (HTTP 409 or 412)."""
    while error is not None:
        code = getattr(error, "code", None) or getattr(error, "errno", None)
        text = str(error)
        if code in (409, 412, errno.EEXIST) or "PreconditionFailed" in text or "ConditionalRequestConflict" in text:
            return True
        error = error.__cause__
    return False


def _open_part(path: Path) -> tuple[Path, BinaryIO]:
    """A new file beside ``path``, to be renamed to it; the folder is made, also when somebody just pruned it."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".part-{uuid4().hex}")
        try:
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileNotFoundError:
            continue
        return part, open(descriptor, "wb")


def _write_part(path: Path, data: bytes) -> Path:
    part, file = _open_part(path)
    with file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return part


def _copy_part(source: Path, path: Path, durable: bool = True) -> Path:
    with open(source, "rb") as reader:
        part, writer = _open_part(path)
        with writer:
            shutil.copyfileobj(reader, writer, 1 << 20)
            writer.flush()
            if durable:
                os.fsync(writer.fileno())
    return part


def _link_new(path_text: str, data: bytes) -> bool:
    """Create-only on a file system: a hard link fails when the name is taken, and shows whole files only."""
    path = Path(path_text)
    part = _write_part(path, data)
    try:
        os.link(part, path)
    except FileExistsError:
        return False
    finally:
        part.unlink(missing_ok=True)
    return True


def _prune_empty(folder: Path, root: Path) -> None:
    while folder != root:
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent
