"""file://: a folder, also one that many machines mount. Whole files only, each made beside its place and renamed."""

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, BinaryIO, TypeVar
from uuid import uuid4

from spotune.contracts.store.download import Download
from spotune.contracts.store.faults import local_side, opened
from spotune.contracts.store.patience import Patience

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
        patience: Patience,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._root = root
        self._patience = patience
        self._clock, self._sleep = clock, sleep
        self._rng = Random()

    def _path(self, key: str) -> Path:
        return Path(f"{self._root}/{key}")

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
        return self._steadily(self._path(key).read_bytes)

    def exists(self, key: str) -> bool:
        return self._steadily(lambda: _is_file(f"{self._root}/{key}"))

    def create(self, key: str, data: bytes) -> bool:
        def create() -> bool:
            part = _write_part(self._path(key), data)
            return _publish_new(part, self._path(key))

        return self._steadily(create)

    def write(self, key: str, data: bytes) -> None:
        self._steadily(lambda: _publish(_write_part(self._path(key), data), self._path(key)))

    def upload(self, local: Path, key: str) -> None:
        self._steadily(lambda: _publish(_bring_in(local, self._path(key)), self._path(key)))

    def upload_new(self, local: Path, key: str) -> bool:
        return self._steadily(lambda: _publish_new(_bring_in(local, self._path(key)), self._path(key)))

    def download(self, key: str, local: Path) -> dict[str, Any]:
        return self._steadily(lambda: _take_out(self._path(key), local))

    def keys(self, prefix: str) -> list[str]:
        return [key for key in self._steadily(lambda: self._files(prefix)) if f"/{PART}" not in key]

    def names(self, prefix: str) -> list[str]:
        def scan() -> list[str]:
            try:
                with os.scandir(f"{self._root}/{prefix}") as entries:
                    found = [f"{entry.name}/" if _may_be_folder(entry) else entry.name for entry in entries]
            except FileNotFoundError:
                return []
            return sorted(name for name in found if not name.startswith(PART))

        return self._steadily(scan)

    def delete(self, key: str) -> None:
        path = self._path(key)
        self._steadily(lambda: path.unlink(missing_ok=True))
        _prune_empty(path.parent, Path(self._root))

    def abort_uploads(self, prefix: str, older_than_s: float) -> list[str]:
        gone = []
        for key in self._steadily(lambda: self._files(prefix)):
            path = self._path(key)
            try:
                # Not the time of modification: a hard link has the file's own.
                if path.name.startswith(PART) and time.time() - path.stat().st_ctime >= older_than_s:
                    path.unlink()
                    gone.append(key)
            except FileNotFoundError:  # finished just now
                continue
        return gone

    def _files(self, prefix: str) -> list[str]:
        root = len(self._root) + 1
        return sorted([path[root:] for path in _below(f"{self._root}/{prefix}")])


def _may_be_folder(entry: os.DirEntry[str]) -> bool:
    """A link to itself counts as one: whoever reads in it is told, and its neighbours are listed."""
    try:
        return entry.is_dir()
    except OSError:
        return True


def _is_file(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _below(folder: str) -> list[str]:
    """The files below a folder. Unlike ``os.walk`` it passes over no folder that cannot be read."""
    files: list[str] = []
    folders = [folder]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    (folders if entry.is_dir(follow_symlinks=False) else files).append(entry.path)
        except (FileNotFoundError, NotADirectoryError):
            continue
    return files


def _open_part(path: Path) -> tuple[Path, BinaryIO]:
    """A new file beside ``path``, to be renamed to it; the folder is made, also when somebody just pruned it."""
    while True:
        _make_folder(path.parent)
        part = path.with_name(f"{PART}{uuid4().hex}")
        try:
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileNotFoundError:
            continue
        _share_file(part)
        return part, open(descriptor, "wb")


def _make_folder(folder: Path) -> None:
    """Whoever may write above may write in it: a bucket's own mode (2775, say) decides who shares it, not the umask.

    A sticky folder (/tmp) is everybody's to put things in, and gives nothing on.
    """
    if not folder.parent.is_dir():
        _make_folder(folder.parent)
    try:
        folder.mkdir()
    except FileExistsError:
        if folder.is_dir():
            return
        raise
    with contextlib.suppress(FileNotFoundError):  # pruned at this moment
        above = folder.parent.stat().st_mode
        shared = 0 if above & stat.S_ISVTX else above & (stat.S_IRWXG | stat.S_IRWXO)
        mode = stat.S_IMODE(folder.stat().st_mode)
        if shared & ~mode:
            folder.chmod(mode | shared)


def _share_file(part: Path) -> None:
    """Whoever may read or write in its folder may do so with the file: safetensors makes the weights 0600, say."""
    with contextlib.suppress(OSError):  # not ours, or gone
        above = part.parent.stat().st_mode
        shared = 0 if above & stat.S_ISVTX else above & 0o066
        mode = stat.S_IMODE(part.stat().st_mode)
        if shared & ~mode:
            part.chmod(mode | shared)


def _write_part(path: Path, data: bytes) -> Path:
    part, file = _open_part(path)
    try:
        with file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return part


def _publish(part: Path, path: Path) -> None:
    try:
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)  # a rename between two links to one file does nothing, and leaves both


def _publish_new(part: Path, path: Path) -> bool:
    """Create-only on a file system: a hard link fails when the name is taken, and shows whole files only."""
    try:
        os.link(part, path)
    except FileExistsError:
        return False
    finally:
        part.unlink(missing_ok=True)
    return True


def _bring_in(local: Path, path: Path) -> Path:
    """A durable part beside ``path`` with the local file's bytes: a hard link where that is possible, else a copy."""
    with local_side(), open(local, "rb") as reader:
        os.fsync(reader.fileno())
    return _link_part(local.resolve(), path) or _copy_part(local, path)


def _link_part(source: Path, path: Path) -> Path | None:
    """None when it cannot be a link: another file system, one without links, or a folder pruned at this moment."""
    _make_folder(path.parent)
    part = path.with_name(f"{PART}{uuid4().hex}")
    try:
        os.link(source, part)
    except OSError:
        return None
    _share_file(part)
    return part


def _copy_part(local: Path, path: Path) -> Path:
    with opened(local) as reader:
        part, writer = _open_part(path)
        try:
            with writer:
                buffer = memoryview(bytearray(BUFFER_BYTES))
                while True:
                    with local_side():
                        count = reader.readinto(buffer)
                    if not count:
                        break
                    writer.write(buffer[:count])
                writer.flush()
                os.fsync(writer.fileno())
            if part.stat().st_size != reader.tell():
                raise OSError(errno.EIO, f"{part.stat().st_size} bytes are stored, {reader.tell()} were copied")
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    return part


def _take_out(path: Path, local: Path) -> dict[str, Any]:
    with open(path, "rb", buffering=0) as reader, Download(local) as download:
        linked = download.link(path)
        buffer, other = memoryview(bytearray(BUFFER_BYTES)), memoryview(bytearray(BUFFER_BYTES))
        while count := reader.readinto(buffer):
            if linked:
                download.hash(buffer[:count])
            else:
                download.write(buffer[:count])
            buffer, other = other, buffer  # one is hashed while the other is read
        return download.finish()


def _prune_empty(folder: Path, root: Path) -> None:
    while folder != root:
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent
