"""Turns keys into open folders below a root, and follows no link on the way.

Each part of a key is opened in the folder before it (``openat`` with ``O_NOFOLLOW``), so that a folder that is swapped
for a link meanwhile leads nowhere else. The root, and what is above it, may be links: these are the user's own.
"""

import contextlib
import errno
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any, BinaryIO, TypeVar
from uuid import uuid4

from spotune.core.errors import Misplaced
from spotune.core.keys import MOST_PARTS, RECORD_MOST_BYTES, is_key
from spotune.core.store.faults import RetryPolicy, local_side, opened

TRIES = 100  # to make a folder that others prune at the same time
_ENTER = os.O_DIRECTORY | os.O_CLOEXEC | getattr(os, "O_PATH", os.O_RDONLY)  # O_PATH: a file server is not asked
_LIST = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a device",
    stat.S_IFCHR: "a device",
}


@contextlib.contextmanager
def open_folders(root: str, parts: Sequence[str], make: bool = False) -> Iterator[list[int]]:
    """Opens the root and each folder below it, as descriptors for ``dir_fd``; the last one is the innermost.

    ``make``: folders that are missing are made. Raises Misplaced for a link or a file on the way,
    NotADirectoryError where the root is a file.
    """
    folders: list[int] = []
    for attempt in range(TRIES):
        try:
            _open_all(folders, root, parts, make)
            break
        except BaseException as error:
            _close(folders)
            pruned = make and isinstance(error, FileNotFoundError)  # by somebody else, at this moment
            if not pruned or attempt == TRIES - 1:
                raise
    try:
        yield folders
    finally:
        _close(folders)


def open_file(folder: int, name: str, key: str) -> int:
    """Opens a regular file to be read; raises Misplaced for anything else. Waits for nothing, opens no device."""
    check_file(os.stat(name, dir_fd=folder, follow_symlinks=False), key)
    try:
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO):  # swapped just now
            raise Misplaced(f"{key}: not a file (remove it)") from error
        raise
    try:
        check_file(os.fstat(file), key)
    except BaseException:
        os.close(file)
        raise
    return file


def check_file(found: os.stat_result, key: str) -> None:
    """Raises Misplaced for what is not a regular file."""
    if not stat.S_ISREG(found.st_mode):
        raise Misplaced(f"{key}: {_KINDS.get(stat.S_IFMT(found.st_mode), 'something else')}, not a file (remove it)")


def list_folder(folder: int) -> tuple[list[str], list[str]]:
    """Returns the names of the regular files and of the folders in a folder, sorted; links and the like are neither."""
    files, folders = [], []
    inner = os.open(".", _LIST, dir_fd=folder)
    try:
        with os.scandir(inner) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
                elif entry.is_file(follow_symlinks=False):
                    files.append(entry.name)
    finally:
        os.close(inner)
    return sorted(files), sorted(folders)


def files_below(folder: int, prefix: str = "", depth: int = 0) -> Iterator[str]:
    """Yields the paths of the regular files below an open folder. Unlike ``os.walk`` it passes over no folder that
    cannot be read."""
    files, folders = list_folder(folder)
    yield from (f"{prefix}{name}" for name in files)
    for name in folders if depth < MOST_PARTS else ():
        try:
            inner = os.open(name, _ENTER | os.O_NOFOLLOW, dir_fd=folder)
        except (FileNotFoundError, NotADirectoryError):  # pruned or swapped just now
            continue
        try:
            yield from files_below(inner, f"{prefix}{name}/", depth + 1)
        finally:
            os.close(inner)


def _open_all(folders: list[int], root: str, parts: Sequence[str], make: bool) -> None:
    try:
        folders.append(os.open(root, _ENTER))
    except FileNotFoundError:
        if not make:
            raise
        folders.append(_make_root(root))
    for index, name in enumerate(parts):
        try:
            folders.append(_enter(folders[-1], name, make, os.O_NOFOLLOW))
        except OSError as error:
            here = "/".join(parts[: index + 1])
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                raise Misplaced(f"{here}: {_kind_of(folders[-1], name)}, not a folder (remove it)") from error
            error.filename = f"{root}/{here}"
            raise


def _make_root(root: str) -> int:
    """Makes the root and what is missing above it."""
    folder = os.open("/", _ENTER)
    for name in os.path.abspath(root).split("/")[1:]:
        try:
            inner = _enter(folder, name, True, 0)
        finally:
            os.close(folder)
        folder = inner
    return folder


def _enter(folder: int, name: str, make: bool, flags: int) -> int:
    try:
        return os.open(name, _ENTER | flags, dir_fd=folder)
    except FileNotFoundError:
        if not make:
            raise
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, dir_fd=folder)
        _share(folder, name)
    return os.open(name, _ENTER | flags, dir_fd=folder)


def _share(folder: int, name: str) -> None:
    """Whoever may write above may write in it: a bucket's own mode (2775, say) decides who shares it, not the umask.

    A sticky folder (/tmp) is everybody's to put things in, and gives nothing on.
    """
    above = os.fstat(folder).st_mode
    shared = 0 if above & stat.S_ISVTX else above & (stat.S_IRWXG | stat.S_IRWXO)
    if not shared:
        return
    inner = os.open(name, _LIST | os.O_NOFOLLOW, dir_fd=folder)
    try:
        mode = stat.S_IMODE(os.fstat(inner).st_mode)
        if shared & ~mode:
            os.fchmod(inner, mode | shared)
    finally:
        os.close(inner)


def _kind_of(folder: int, name: str) -> str:
    try:
        return _KINDS.get(stat.S_IFMT(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode), "a file")
    except OSError:
        return "nothing"


def _close(folders: list[int]) -> None:
    while folders:
        os.close(folders.pop())


# The local file of a download: hashed while it is written, and under another name until it is whole.


class Download:
    """Replaces ``local`` by what is written, when it is finished; else nothing is left. Raises LocalFault."""

    def __init__(self, local: Path) -> None:
        self._local = local
        self._part = local.with_name(f".part-{uuid4().hex}")
        self._digest = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1, "hash")
        self._hashing: Future[None] | None = None
        self._size = 0

    def __enter__(self) -> "Download":
        with local_side():
            self._local.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._part, "xb", buffering=0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._hasher.shutdown()
        with suppress(OSError):
            self._file.close()
        self._part.unlink(missing_ok=True)

    def link(self, folder: int, name: str, opened: int) -> bool:
        """Makes the file a hard link to ``name`` in an open folder if it can be one, and only if it still is the file
        that is open as ``opened``; its bytes are then to be hashed only."""
        link = self._part.with_name(f"{self._part.name}-link")
        try:
            os.link(name, link, src_dir_fd=folder, follow_symlinks=False)
            if not os.path.samestat(os.lstat(link), os.fstat(opened)):
                link.unlink()
                return False
            link.replace(self._part)
        except OSError:
            return False
        return True

    def hash(self, data: bytes | bytearray | memoryview) -> None:
        """Hashes on a thread: ``data`` must stay as it is until the next call is over."""
        if self._hashing is not None:
            self._hashing.result()
        self._hashing = self._hasher.submit(self._digest.update, data)
        self._size += len(data)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.hash(data)
        left = memoryview(data)
        with local_side():
            while left:
                left = left[self._file.write(left) :]

    def finish(self) -> dict[str, Any]:
        """Puts the file in its place; returns its ``{size: bytes, sha256: hex}``."""
        with local_side():
            self._file.close()
            self._part.replace(self._local)
        if self._hashing is not None:
            self._hashing.result()
        return {"size": self._size, "sha256": self._digest.hexdigest()}


# file://: a folder, also one that many machines mount. Whole files only, each made beside its place and renamed.
#
# Below the root nothing but folders and regular files counts (``open_folders``).

T = TypeVar("T")
PART = ".part-"
BUFFER_BYTES = 1 << 20
# What a network file system answers while its server restarts or the client reconnects.
PASSING = {errno.ESTALE, errno.ETIMEDOUT, errno.EIO, errno.EAGAIN, errno.EREMOTEIO, errno.ECONNRESET, errno.EHOSTDOWN}


class Disk:
    """A bucket on a file system; the verbs of ``Store``, faults not yet translated.

    Faults that pass are tried again until the deadline. A call that hangs inside the kernel (a dead NFS server, mounted
    hard) hangs here too: no program can cut it off.
    """

    def __init__(
        self,
        root: str,
        patience: RetryPolicy,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._root = root
        self._patience = patience
        self._clock, self._sleep = clock, sleep
        self._rng = Random()
        self.move: Callable[[int], object] = lambda count: None

    def _steadily(self, call: Callable[[], T]) -> T:
        deadline, tries = self._clock() + self._patience.deadline_s, 0
        while True:
            tries += 1
            try:
                return call()
            except OSError as error:
                wait = self._patience.wait_s(tries, self._rng)
                if error.errno not in PASSING or self._clock() + wait >= deadline:
                    raise
            self._sleep(wait)

    def read(self, key: str) -> bytes:
        def read() -> bytes:
            with self._place(key) as (folder, name), open(open_file(folder, name, key), "rb") as file:
                return file.read(RECORD_MOST_BYTES + 1)

        return self._steadily(read)

    def exists(self, key: str) -> bool:
        def exists() -> bool:
            try:
                with self._place(key) as (folder, name):
                    return stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
            except FileNotFoundError:
                return False

        return self._steadily(exists)

    def create(self, key: str, data: bytes) -> bool:
        def create() -> bool:
            with self._place(key, make=True) as (folder, name):
                return _publish_new(folder, _write_part(folder, data), name)

        return self._in_a_folder(create)

    def write(self, key: str, data: bytes) -> None:
        def write() -> None:
            with self._place(key, make=True) as (folder, name):
                _publish(folder, _write_part(folder, data), name)

        self._in_a_folder(write)

    def upload(self, local: Path, key: str) -> None:
        def upload() -> None:
            with self._place(key, make=True) as (folder, name):
                _publish(folder, _bring_in(local, folder, self.move), name)

        self._in_a_folder(upload)

    def upload_new(self, local: Path, key: str) -> bool:
        def upload() -> bool:
            with self._place(key, make=True) as (folder, name):
                return _publish_new(folder, _bring_in(local, folder, self.move), name)

        return self._in_a_folder(upload)

    def download(self, key: str, local: Path) -> dict[str, Any]:
        def download() -> dict[str, Any]:
            with self._place(key) as (folder, name):
                return _take_out(folder, name, key, local, self.move)

        return self._steadily(download)

    def keys(self, prefix: str) -> list[str]:
        return [key for key in self._files(prefix) if f"/{PART}" not in f"/{key}"]

    def names(self, prefix: str) -> list[str]:
        def scan() -> list[str]:
            try:
                with open_folders(self._root, _parts(prefix)) as folders:
                    files, inner = list_folder(folders[-1])
            except FileNotFoundError:
                return []
            return sorted(name for name in (*files, *(f"{name}/" for name in inner)) if not name.startswith(PART))

        return self._steadily(scan)

    def delete(self, key: str) -> None:
        *above, name = _parts(key)

        def delete() -> None:
            with contextlib.suppress(FileNotFoundError), open_folders(self._root, above) as folders:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=folders[-1])
                _prune_empty(folders, above)

        self._steadily(delete)

    def abort_uploads(self, prefix: str, older_than_s: float) -> list[str]:
        gone = []
        for key in self._files(prefix):
            if f"/{PART}" not in f"/{key}":
                continue
            with contextlib.suppress(FileNotFoundError), self._place(key) as (folder, name):  # finished just now
                # Not the time of modification: a hard link has the file's own.
                begun_at = os.stat(name, dir_fd=folder, follow_symlinks=False).st_ctime
                if time.time() - begun_at >= older_than_s:
                    os.unlink(name, dir_fd=folder)
                    gone.append(key)
        return gone

    def _files(self, prefix: str) -> list[str]:
        """The keys of all files below a folder, half ones included; none where there is no such folder."""

        def find() -> list[str]:
            try:
                with open_folders(self._root, _parts(prefix)) as folders:
                    return list(files_below(folders[-1], f"{prefix}/" if prefix else ""))
            except FileNotFoundError:
                return []

        return sorted(filter(is_key, self._steadily(find)))

    @contextlib.contextmanager
    def _place(self, key: str, make: bool = False) -> Iterator[tuple[int, str]]:
        """The open folder that a key lies in, and its name there. One that was made for nothing goes again."""
        *above, name = _parts(key)
        with open_folders(self._root, above, make) as folders:
            try:
                yield folders[-1], name
            except BaseException:
                if make:
                    _prune_empty(folders, above)
                raise

    def _in_a_folder(self, call: Callable[[], T]) -> T:
        """As ``_steadily``; once more where somebody has just pruned the folder that was open."""

        def repeat() -> T:
            for _ in range(TRIES):
                with contextlib.suppress(FolderGone):
                    return call()
            raise FileNotFoundError(errno.ENOENT, "its folder is removed again and again")

        return self._steadily(repeat)


class FolderGone(Exception):
    """The open folder of a new file was removed by somebody who found it empty."""


def _parts(key: str) -> list[str]:
    return key.split("/") if key else []


def _open_part(folder: int) -> tuple[str, BinaryIO]:
    """A new file in the folder, to be renamed."""
    part = f"{PART}{uuid4().hex}"
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=folder)
    except FileNotFoundError as error:
        raise FolderGone from error
    _share_file(folder, descriptor)
    return part, open(descriptor, "wb")


def _share_file(folder: int, file: int | str) -> None:
    """Whoever may read or write in its folder may do so with the file: safetensors makes the weights 0600, say."""
    with contextlib.suppress(OSError):  # not ours, or gone
        above = os.stat(".", dir_fd=folder).st_mode
        found = os.stat(file) if isinstance(file, int) else os.stat(file, dir_fd=folder, follow_symlinks=False)
        shared, mode = 0 if above & stat.S_ISVTX else above & 0o066, stat.S_IMODE(found.st_mode)
        if shared & ~mode and isinstance(file, int):
            os.fchmod(file, mode | shared)
        elif shared & ~mode:
            os.chmod(file, mode | shared, dir_fd=folder)


def _remove(folder: int, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)


def _write_part(folder: int, data: bytes) -> str:
    part, file = _open_part(folder)
    try:
        with file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        _remove(folder, part)
        raise
    return part


def _publish(folder: int, part: str, name: str) -> None:
    try:
        os.replace(part, name, src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        _remove(folder, part)  # a rename between two links to one file does nothing, and leaves both


def _publish_new(folder: int, part: str, name: str) -> bool:
    """Create-only on a file system: a hard link fails when the name is taken, and shows whole files only."""
    try:
        os.link(part, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    except FileExistsError:
        return False
    finally:
        _remove(folder, part)
    return True


def _bring_in(local: Path, folder: int, move: Callable[[int], object]) -> str:
    """A durable part in the folder with the local file's bytes: a hard link where that is possible, else a copy."""
    with local_side(), open(local, "rb") as reader:
        os.fsync(reader.fileno())
        seen = os.fstat(reader.fileno())
    part = _link_part(local.resolve(), folder, seen)
    if part:
        move(seen.st_size)
    return part or _copy_part(local, folder, move)


def _link_part(source: Path, folder: int, seen: os.stat_result) -> str | None:
    """None when it cannot be a link: another file system, one without links, or somebody else's file."""
    if seen.st_uid != os.geteuid() or not stat.S_ISREG(seen.st_mode):
        return None
    part = f"{PART}{uuid4().hex}"
    try:
        os.link(source, part, dst_dir_fd=folder, follow_symlinks=False)
    except OSError:
        return None
    if os.path.samestat(os.stat(part, dir_fd=folder, follow_symlinks=False), seen):
        _share_file(folder, part)
        return part
    _remove(folder, part)
    return None


def _copy_part(local: Path, folder: int, move: Callable[[int], object]) -> str:
    with opened(local) as reader:
        part, writer = _open_part(folder)
        try:
            with writer:
                buffer = memoryview(bytearray(BUFFER_BYTES))
                while True:
                    with local_side():
                        count = reader.readinto(buffer)
                    if not count:
                        break
                    writer.write(buffer[:count])
                    move(count)
                writer.flush()
                os.fsync(writer.fileno())
                stored = os.fstat(writer.fileno()).st_size
            if stored != reader.tell():
                raise OSError(errno.EIO, f"{stored} bytes are stored, {reader.tell()} were copied")
        except BaseException:
            _remove(folder, part)
            raise
    return part


def _take_out(folder: int, name: str, key: str, local: Path, move: Callable[[int], object]) -> dict[str, Any]:
    with open(open_file(folder, name, key), "rb", buffering=0) as reader, Download(local) as download:
        linked = _is_ours_alone(os.fstat(reader.fileno())) and download.link(folder, name, reader.fileno())
        buffer, other = memoryview(bytearray(BUFFER_BYTES)), memoryview(bytearray(BUFFER_BYTES))
        while count := reader.readinto(buffer):
            if linked:
                download.hash(buffer[:count])
            else:
                download.write(buffer[:count])
            move(count)
            buffer, other = other, buffer  # one is hashed while the other is read
        return download.finish()


def _is_ours_alone(found: os.stat_result) -> bool:
    """Whether nobody else may rewrite the file: a link to it would change after its bytes were hashed."""
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _prune_empty(folders: list[int], names: list[str]) -> None:
    """Removes the innermost folder if it is empty, then the one above it, and so on; the root stays."""
    for folder, name in zip(reversed(folders[:-1]), reversed(names), strict=True):
        try:
            os.rmdir(name, dir_fd=folder)
        except OSError:
            return
