"""Files of this machine that outlive a process: written whole and durably, checked when read, set aside when damaged.

A power cut leaves an empty file, zeros or half a file; a full disk or a person leaves anything else. A damaged file is
renamed to ``NAME.damaged-<n>``, with a line that names it, and counts as missing from then on.
"""

import errno
import json
import os
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

from spotune.contracts.errors import InfraError
from spotune.contracts.shapes import Kind, build

MOST_BYTES = 64 << 20  # of a state file: more is not ours, and would fill the memory
# The place itself is wrong, and stays so: other errors (a full disk, too many open files) pass.
_WRONG_PLACE = (errno.ELOOP, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENXIO)

Log = Callable[[str], None]


class Damaged(Exception):
    """A state file does not hold what its writer wrote. ``str(error)`` says why."""


def log_line(message: str) -> None:
    """Prints a line to stderr, if there is one."""
    if sys.stderr:
        with suppress(OSError, ValueError):
            print(message, file=sys.stderr, flush=True)


def write_state(path: Path, value: Any, mode: int = 0o666, log: Log = log_line) -> None:
    """Writes JSON so that it appears whole and survives a power cut. Accepts a dataclass or plain data.

    A folder or a link in the file's place, and a file in the place of a folder above it, are set aside. Raises OSError.
    """
    data = asdict(value) if hasattr(value, "__dataclass_fields__") else value
    text = json.dumps(data, default=str).encode()
    make_room(path, log)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}-{uuid4().hex[:8]}")  # two threads may write the same
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load_state(path: Path) -> Any | None:
    """Returns what a JSON file holds, None where there is none. Waits for no pipe.

    Raises Damaged for a file that is not whole JSON, InfraError for a disk that fails.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _fault(path, error) from error
    try:
        with open(descriptor, "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise Damaged("not a file")
            if found.st_size > MOST_BYTES:
                raise Damaged(f"larger than {MOST_BYTES >> 20} MiB")
            data = file.read(MOST_BYTES)
    except OSError as error:  # a folder
        raise _fault(path, error) from error
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Damaged("empty" if not data else "zeros" if not data.strip(b"\0") else "not whole JSON") from error


def load_object(path: Path) -> dict[str, Any] | None:
    """As ``load_state``, for a file that holds an object. Raises Damaged for any other value."""
    found = load_state(path)
    if found is not None and not isinstance(found, dict):
        raise Damaged("not an object")
    return found


def load_as(path: Path, kind: type[Kind]) -> Kind | None:
    """Returns what a JSON file holds as a dataclass. Raises Damaged, naming the field, for another shape."""
    found = load_object(path)
    try:
        return None if found is None else build(kind, found)
    except ValueError as error:
        raise Damaged(str(error)) from error


def read_as(path: Path, kind: type[Kind], log: Log = log_line) -> Kind | None:
    """As ``load_as``; a damaged file is set aside, and None."""
    try:
        return load_as(path, kind)
    except Damaged as error:
        set_aside(path, str(error), log)
        return None


def read_object(path: Path, log: Log = log_line) -> dict[str, Any] | None:
    """As ``load_object``; a damaged file is set aside, and None."""
    try:
        return load_object(path)
    except Damaged as error:
        set_aside(path, str(error), log)
        return None


def set_aside(path: Path, why: str, log: Log = log_line) -> Path | None:
    """Renames a file or a folder to ``NAME.damaged-<n>`` and logs it. Returns None if somebody else just did.

    Raises InfraError where it cannot be renamed.
    """
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.damaged-{number}")):
        number += 1
    try:
        path.rename(aside)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InfraError(f"{path}: {why}, and it cannot be moved away: {error.strerror}") from error
    log(f"{path}: {why}: set aside as {aside.name}")
    return aside


def make_room(path: Path, log: Log = log_line) -> None:
    """Sets aside what stands where a file is to be written: a folder, a pipe, a link that leads nowhere else.

    Likewise a file in the place of the nearest folder above it.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            set_aside(path, "not a file", log)
        return
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        if path.is_symlink():
            set_aside(path, "a link that leads nowhere", log)
            return
    make_folder_room(path.parent, log)


def make_folder_room(folder: Path, log: Log = log_line) -> None:
    """Sets aside what is not a folder in the place of this one, or of the nearest one above that exists."""
    for place in (folder, *folder.parents):
        try:
            if stat.S_ISDIR(place.stat().st_mode):
                return
        except FileNotFoundError:
            if not place.is_symlink():
                continue
        except NotADirectoryError:
            continue
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            if not place.is_symlink():
                continue
        set_aside(place, "not a folder", log)
        return


def _fault(path: Path, error: OSError) -> Exception:
    if error.errno in _WRONG_PLACE:
        return Damaged(error.strerror or str(error))
    return InfraError(f"{path}: {error.strerror or error}")
