"""The whole tree of errors, the exit codes, and output streams that never fail.

SpotuneError            exit 1   something failed; one line says what
├── InputError          exit 2   what the user gave is wrong: FILE: KEY or ROW: what (remedy)
│   ├── Faults          exit 2   several things are: one such line for each
│   ├── Taken           exit 2   the engine has a run of that name already
│   └── OtherVersions   exit 2   libraries differ from those that a checkpoint was made with
├── InfraError          exit 3   the infrastructure failed: launcher side only
│   └── Unsettled       exit 3   and may have taken the run all the same
├── StoreError          exit 75  the bucket cannot be reached or answers wrongly: another machine may
│   └── BadRecord       exit 75  it holds a record that cannot be read: KEY: what
│       └── Misplaced   exit 2   the key leads out of the bucket, or to what is not a file
└── Fenced              exit 75  a later attempt has taken the run over: this one must stop

75 is an attempt's word to its engine. A verb of the launcher has none to give it to: there a bucket that fails is
infrastructure, 3, and a bad record bad input, 2 (``launcher_code``).
"""

import io
import os
import reprlib
import select
import stat
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, TextIO

# Exit codes of the script and of ``spotune train``: part of the contract with users' scripts.

SUCCEEDED = 0  # finished and certified
FAILED = 1  # failed for good
BAD_INPUT = 2  # what the user gave is wrong
INFRA_FAILED = 3  # launcher only: the infrastructure failed
PREEMPTED = 75  # preempted, or a fault worth another machine (EX_TEMPFAIL)
PAUSED = 76  # the budget's wall


_MOST = 1000  # characters of each part of a message: what a user wrote may have any length
_VALUES = reprlib.Repr()
_VALUES.maxlevel = 3
_VALUES.maxstring = _VALUES.maxother = _VALUES.maxlong = 80


class SpotuneError(Exception):
    """Base of all. ``str(error)`` is one line, fit for stderr; ``exit_code`` is the process's."""

    exit_code = FAILED

    @property
    def lines(self) -> list[str]:
        """The message in lines of their own: one, but for several faults."""
        return [" ".join(str(self).split())]


class InputError(SpotuneError):
    """Bad input, as ``WHERE: KEY: WHAT (REMEDY)``.

    Args:
        where: the file, flag or record that holds the fault, e.g. ``config/x.yaml``.
        what: what is wrong, in a few words.
        key: the key or row inside ``where``, if there is one.
        remedy: what to do about it.
    """

    exit_code = BAD_INPUT

    def __init__(self, where: object, what: str, *, key: str = "", remedy: str = "") -> None:
        parts = [shortened(str(where)), shortened(key, 200), shortened(" ".join(what.split()))]
        super().__init__(": ".join(part for part in parts if part) + (f" ({shortened(remedy)})" if remedy else ""))


class Faults(InputError):
    """Several faults of one input, each an InputError of its own. ``str(error)`` has a line for each."""

    def __init__(self, faults: Iterable[InputError]) -> None:
        self.faults = list(faults)
        SpotuneError.__init__(self, "\n".join(self.lines))

    @property
    def lines(self) -> list[str]:
        """Each fault once, in the order in which they were found."""
        return list(dict.fromkeys(line for fault in self.faults for line in fault.lines))


class Taken(InputError):
    """An engine refuses a submission since it has a run of that name: whatever there is of it is not this one's."""


class OtherVersions(InputError):
    """Libraries that decide the order of rows differ from those that a checkpoint was made with.

    Attributes:
        changed: ``datasets 5.0.1 -> 5.2.0`` for each of them.
    """

    def __init__(self, where: object, changed: list[str], remedy: str) -> None:
        self.changed = changed
        what = f"libraries changed since the checkpoint was made: {', '.join(changed)}"
        super().__init__(where, what, key="versions", remedy=remedy)


class InfraError(SpotuneError):
    """The infrastructure (SkyPilot, the local queue) refused or failed."""

    exit_code = INFRA_FAILED


class Unsettled(InfraError):
    """What was asked for may still happen: a submission that could not be taken back, a cancel that is under way."""


class StoreError(SpotuneError):
    """The bucket could not be reached, or what it holds is not what was written."""

    exit_code = PREEMPTED


class BadRecord(StoreError):
    """A record in the bucket is not what its class says, as ``KEY: WHAT``."""


class Misplaced(BadRecord):
    """A key that leads out of the bucket, or to what is not a file, as ``KEY: WHAT``. No other machine can mend it."""

    exit_code = BAD_INPUT


class Fenced(SpotuneError):
    """A newer attempt owns the run; whatever this one still does must not be committed."""

    exit_code = PREEMPTED


def refuse(where: object, faults: Iterable[tuple[str, str, str]]) -> None:
    """Raises InputError for ``(key, what, remedy)`` triples: one line for each. Returns when there is none."""
    raise_all(InputError(where, what, key=key, remedy=remedy) for key, what, remedy in faults)


def raise_all(errors: Iterable[InputError]) -> None:
    """Raises the only error as it is, several as Faults; returns when there is none."""
    if not (found := list(errors)):
        return
    whole = Faults(found)
    raise whole if len(whole.lines) > 1 else found[0]


def shown(value: Any) -> str:
    """A value as Python writes it, in 80 characters, for a message."""
    try:
        return shortened(_VALUES.repr(value), 80)
    except ValueError:  # more digits than Python turns to text
        return "a number of thousands of digits"


def shortened(text: str, most: int = _MOST) -> str:
    """A text without its middle, where it is longer than ``most`` characters."""
    half = most // 2
    return text if len(text) <= most else f"{text[: half - 1]}…{text[-half:]}"


def launcher_code(error: SpotuneError) -> int:
    """The exit code of a verb of the launcher."""
    if isinstance(error, StoreError):
        return BAD_INPUT if isinstance(error, BadRecord) else INFRA_FAILED
    return error.exit_code


# stdout and stderr for processes whose result must not depend on who reads them.
#
# What cannot be written is left out, and nobody hears of it: a reader that has gone, a disk that is full, a pipe that
# nobody empties. What an encoding lacks is written as ``✅``. All of this lies below ``print``, so that it holds for
# libraries, their loggers and progress bars as well.

PATIENCE_S = 5.0  # for a reader that is slow
STANDARD = ("stdin", "stdout", "stderr")  # by number


def protect_output(names: tuple[str, ...] = STANDARD[1:]) -> None:
    """Makes stdout and stderr of this process accept everything; each line is on its way when ``print`` returns.

    Call it first: what is imported later may keep the streams that it finds.
    """
    fill_descriptors()
    for name in names:
        setattr(sys, name, protected(getattr(sys, name)))


def fill_descriptors() -> None:
    """Opens /dev/null for each of stdin, stdout and stderr that is closed.

    Else the next file that anything opens would get its number, and children would write into that file.
    """
    for number, name in enumerate(STANDARD):
        place: int | str = os.devnull  # where the number is another file's by now
        try:
            os.fstat(number)
        except OSError:
            place = number
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(place, "w" if number else "r", closefd=place != number))  # noqa: SIM115


def protected(stream: TextIO) -> TextIO:
    """Returns a stream for the same file that never fails. One that is no file (a test's) only never lacks a letter."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    raw: Any = getattr(stream.buffer, "raw", stream.buffer)
    if type(stream) is not io.TextIOWrapper or type(raw) is not io.FileIO:
        stream.reconfigure(errors="backslashreplace")
        return stream
    with suppress(OSError):  # what was printed before this is lost
        stream.flush()
    unfailing: Any = Unfailing(raw.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(unfailing), encoding=stream.encoding, errors="backslashreplace", line_buffering=True
    )


class Unfailing(io.FileIO):
    """A file that takes everything. What it cannot write, or not in time, it drops."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._patience_ms = PATIENCE_S * 1e3
        self._poll: Any = None
        try:
            is_file = stat.S_ISREG(os.fstat(self.fileno()).st_mode)
        except OSError:
            is_file = True
        if not is_file:
            self._poll = select.poll()
            self._poll.register(self.fileno(), select.POLLOUT)

    def write(self, data: Any, /) -> int:
        """Returns the whole length, whatever came of it."""
        with memoryview(data) as given, given.cast("B") as view:
            left = view
            with suppress(OSError, ValueError):  # ValueError: somebody has closed it
                while len(left) and self._is_ready():
                    # A pipe that is ready has room for this much: the write does not block.
                    written = super().write(left[: select.PIPE_BUF] if self._poll else left)
                    left = left[written or 0 :]
            return len(view)

    def _is_ready(self) -> bool:
        """Whether a write would not block; once it would for too long, nobody is waited for again."""
        if self._poll is None:
            return True
        is_ready = bool(self._poll.poll(self._patience_ms))
        self._patience_ms = PATIENCE_S * 1e3 if is_ready else 0.0
        return is_ready
