"""stdout and stderr for processes whose result must not depend on who reads them.

What cannot be written is left out, and nobody hears of it: a reader that has gone, a disk that is full, a pipe that
nobody empties. What an encoding lacks is written as ``\u2705``. All of this lies below ``print``, so that it holds for
libraries, their loggers and progress bars as well.
"""

import io
import os
import select
import stat
import sys
from contextlib import suppress
from typing import Any, TextIO

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
