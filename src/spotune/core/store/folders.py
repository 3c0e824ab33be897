"""Turns keys into open folders below a root, and follows no link on the way.

Each part of a key is opened in the folder before it (``openat`` with ``O_NOFOLLOW``), so that a folder that is swapped
for a link meanwhile leads nowhere else. The root, and what is above it, may be links: these are the user's own.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence

from spotune.core.errors import Misplaced
from spotune.core.fields import MOST_PARTS

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
