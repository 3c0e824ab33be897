"""Logs of SkyPilot's jobs: followed to their end, and found again after a lost connection."""

import io
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TextIO

from spotune.core.errors import InfraError
from spotune.core.io import MOST_CHARS
from spotune.launch.skypilot import client
from spotune.launch.skypilot.jobs import ManagedJob
from spotune.launch.skypilot.log_lines import attempts_in, begins, exit_code, lines_of, said
from spotune.launch.status import Outage

# The log of a cluster's job as it is written, through losses of the connection.

# Between two tries to see a log again, after SkyPilot's client has tried by itself; anew when there was something new.
WAITS_S = (2, 5, 15, 60)
# What `tail_logs` returns of a job that has ended: sky/exceptions.py, JobExitCode.
_SUCCEEDED, _FAILED, _CANCELLED = 0, 100, 103
_GONE = ("ClusterDoesNotExist", "ClusterNotUpError")


def follow(name: str, job_id: int, sleep: Callable[[float], None] = time.sleep, out: TextIO | None = None) -> int:
    """Prints a job's log until it ends; returns its script's exit code, 1 where SkyPilot does not tell it.

    Raises InfraError when the log is not to be had any more, and BrokenPipeError when nobody reads it here; the job
    goes on.
    """
    log = JobLog(out or sys.stdout)
    waits = list(WAITS_S)
    while True:
        try:
            with client.translated():
                code = client.sdk().tail_logs(name, job_id, follow=True, output_stream=log)
            if code in (_SUCCEEDED, _FAILED, _CANCELLED):
                return (log.exit_code or 1) if code else 0
            trouble = "the log ended before the job did"
        except InfraError as error:
            if isinstance(error.__cause__, BrokenPipeError):
                raise error.__cause__ from None  # whoever read this log has left, and not the cluster
            if type(error.__cause__).__name__ in _GONE:
                raise
            trouble = str(error)
        waits = list(WAITS_S) if log.has_news else waits
        if not waits:
            ways = f"sky logs {name} {job_id}; sky cancel {name} {job_id}"
            raise InfraError(f"{name}: job {job_id} may go on, but cannot be seen from here: {trouble} ({ways})")
        wait_s = waits.pop(0)
        print(f"{name}: {trouble}; looking again in {wait_s} s", file=sys.stderr)
        sleep(wait_s)
        log.rewind()


class JobLog(io.TextIOBase):
    """Passes a log on, once, however often it is told from its start; and keeps what it says of the job's end, since
    SkyPilot's client hands out no exit code of a job.
    """

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._line = ""  # what has come of a line that has not ended
        self._told = self._passed = 0  # whole lines of the program: since the last rewind, and in all
        self._end = ""
        self.has_news = False  # since the last rewind

    def rewind(self) -> None:
        """What was passed on comes again."""
        if self._line and self._told >= self._passed:
            self._out.write("\n")
        self._line, self._told, self.has_news = "", 0, False

    def write(self, text: str) -> int:
        self._end = (self._end + text)[-4096:]
        for piece in text.splitlines(keepends=True):
            is_again = self._told < self._passed
            if not is_again:
                self._out.write(piece)
            self._line = (self._line + piece)[:MOST_CHARS]  # enough to tell whose it is
            if piece.endswith("\n"):
                self._told += said(self._line.rstrip("\n")) is not None
                self._line = ""
            if not is_again:
                self.has_news = self.has_news or self._told > self._passed
                self._passed = max(self._passed, self._told)
        return len(text)

    def flush(self) -> None:
        self._out.flush()

    @property
    def exit_code(self) -> int | None:
        return exit_code(self._end)


# The log of a managed job as its program wrote it: all attempts, and on to its end.

POLL_S = 2.0

Look = Callable[[ManagedJob], ManagedJob | None]  # how the job stands now, None where it is gone


def lines(job: ManagedJob, look: Look | None, sleep: Callable[[float], None] = time.sleep) -> Iterator[str]:
    """Of one managed job, its earlier attempts first; with ``look`` it ends when the job does."""
    earlier = _earlier(job) if job.recoveries else []
    if job.is_ended or look is None:
        last = _last(job)
        for attempt in earlier[:-1] if earlier and earlier[-1] == last else earlier:
            yield from attempt
        yield from last
        return
    for attempt in earlier[: job.recoveries]:
        yield from attempt
    yield from _followed(job, look, sleep)


def _earlier(job: ManagedJob) -> list[list[str]]:
    return attempts_in(lines_of(client.log_pieces(job.id, False, controller=True)))


def _last(job: ManagedJob) -> list[str]:
    texts = lines_of(client.log_pieces(job.id, False))
    return [line for text in texts if (line := said(text)) is not None]


def _followed(job: ManagedJob, look: Look, sleep: Callable[[float], None]) -> Iterator[str]:
    """SkyPilot ends its stream early now and then, at a recovery say; this one ends with the job.

    Nor is it the end when the server does not answer for a while.
    """
    shown: list[str] = []  # of the machine that it is on
    outage = Outage()
    while True:
        fresh = 0
        try:
            for text in lines_of(client.log_pieces(job.id, True)):
                if begins(text) and fresh:
                    shown, fresh = [], 0
                if (line := said(text)) is None:
                    continue
                fresh += 1
                if fresh > len(shown):
                    shown.append(line)
                    yield line
            now = look(job) or replace(job, status="CANCELLED")
            last = _last(now) if now.is_ended else []  # it may have ended before the stream came to it
        except InfraError as error:
            outage.bear(error)
            sleep(POLL_S)
            continue
        outage.end()
        if now.is_ended:
            yield from last[len(shown) :] if last[: len(shown)] == shown else last
            return
        shown = shown if now.attempts == job.attempts else []
        job = now
        sleep(POLL_S)
