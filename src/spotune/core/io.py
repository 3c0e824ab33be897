"""Files of this machine, locks, lines of a log, text tables, retries, and the failpoints of tests."""

import errno
import fcntl
import json
import os
import stat
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from spotune.core.environment import FAILPOINT_DIR, FAILPOINTS
from spotune.core.errors import InfraError
from spotune.core.keys import Kind, build

# Local files that outlive a process, locks, lines of a log, and tables as plain text.

# Files of this machine that outlive a process: written whole and durably, checked when read, set aside when damaged.
#
# A power cut leaves an empty file, zeros or half a file; a full disk or a person leaves anything else. A damaged file
# is renamed to ``NAME.damaged-<n>``, with a line that names it, and counts as missing from then on.

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


# A lock between processes of this machine that no verb waits for without end.

MOST_S = 30.0
LOOK_S = 0.05


def take_lock(file: IO[str], path: Path) -> None:
    """Takes the lock of an open file, which goes with it. Raises InfraError where another process keeps it."""
    until = time.monotonic() + MOST_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() >= until:
                remedy = f"fuser {path} names it"
                raise InfraError(f"{path}: locked by another process for {MOST_S:g} s ({remedy})") from error
        time.sleep(LOOK_S)


# A log that comes in pieces, as whole lines of bounded length.

MOST_CHARS = 1 << 20  # of a line; the rest of a longer one is counted, not kept


class LogLines:
    """What is left of a piece waits for the next one.

    Of a line that was rewritten many times, as progress bars do, the last version is kept.
    """

    def __init__(self, most_chars: int = MOST_CHARS) -> None:
        self._most_chars = most_chars
        self._rest, self._left_out = "", 0

    def add(self, text: str) -> Iterator[str]:
        """Yields the lines that end in this piece."""
        *ends, rest = text.split("\n")
        for end in ends:
            self._append(end)
            yield self._take()
        self._append(rest)

    def last(self) -> Iterator[str]:
        """Yields a last line that was never ended."""
        if self._rest:
            yield self._take()

    def _append(self, text: str) -> None:
        line = text if self._left_out else self._rest + text
        if self._left_out and "\r" not in line.rstrip("\r"):
            self._left_out += len(line)
        elif len(line) <= self._most_chars and not self._left_out:
            self._rest = line
        else:
            line = line[line.rstrip("\r").rfind("\r") + 1 :]  # its last version
            self._rest, self._left_out = line[: self._most_chars], max(0, len(line) - self._most_chars)

    def _take(self) -> str:
        line, left_out = self._rest, self._left_out
        self._rest, self._left_out = "", 0
        return f"{line} … ({left_out} more characters)" if left_out else line


# Tables as plain text: what people typed, in whatever name, breaks no line and moves no cursor.


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Cells padded to their column's widest, two spaces apart; those of ``right`` end where it does."""
    lines = [header, *([plain(cell) for cell in row] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    form = "  ".join(f"{{:{'>' if index in right else '<'}{width}}}" for index, width in enumerate(widths))
    return "\n".join(form.format(*line).rstrip() for line in lines)


def plain(text: str) -> str:
    """One line, of characters that can be seen; others as Python writes them: ``a\\nb``."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def cut(text: str, most: int) -> str:
    """What of a text fits."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


POLL_S = 0.02
_passed: Counter[str] = Counter()


def failpoint(name: str) -> None:
    """Stops the calling thread while a test holds it at ``name``; otherwise returns at once.

    A failpoint is a named instant at which a test stops a process, to take its machine away or to change the world.
    A test sets ``SPOTUNE_FAILPOINTS`` to names with commas between them, ``NAME`` or ``NAME:N`` (the N-th time that
    this process passes it), and ``SPOTUNE_FAILPOINT_DIR`` to a folder. The thread that gets there writes its process
    id to the file ``NAME`` in that folder, and goes on once that file is gone. The names, in the order in which a run
    passes them:

        claimed         the attempt has its number; nothing else has happened
        restoring       the first file of a checkpoint is here, the others are not
        restored        the checkpoint is here and verified; the worker does not know yet
        snapshot        (worker) copied in memory, nothing of it on disk
        written         (worker) all files on disk, not handed to the guard
        staged          the guard has taken the checkpoint over, nothing is uploaded
        uploading       the first file is in the bucket, others are not
        uploaded        all files are in the bucket, the commit is not
        committed       the commit is there, nothing is tidied up
        pruning         an old commit is removed, its files are not
        noticed         a notice has come, nothing is done about it
        result-written  (worker) the result is on disk, the guard does not know
        result-uploaded the result is in the bucket, not read back
        result-read     the result was read back, there is no certificate
        certified       the certificate is there, the process has not said so

    and, where the config asks for extras:

        merged          the adapter is merged on disk, nothing of it is in the bucket
        merged-uploaded a file of the merged model is in the bucket, not read back
        pushed          the hub has the result, the bucket does not say so
    """
    wanted = os.environ.get(FAILPOINTS)
    if not wanted:
        return
    _passed[name] += 1
    if any(name == at and _passed[name] == int(count or 1) for at, _, count in _parse(wanted)):
        file = Path(os.environ[FAILPOINT_DIR], name)
        part = file.with_name(f".{name}.{os.getpid()}")
        part.write_text(str(os.getpid()))
        part.rename(file)
        while file.exists():
            time.sleep(POLL_S)


def _parse(wanted: str) -> list[tuple[str, str, str]]:
    return [one.strip().partition(":") for one in wanted.split(",")]
