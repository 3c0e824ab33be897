"""The log of a managed job as its program wrote it: all attempts, and on to its end."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from spotune.contracts.errors import InfraError
from spotune.launch.outage import Outage
from spotune.launch.skypilot import engine
from spotune.launch.skypilot.jobs import ManagedJob
from spotune.launch.skypilot.logs import attempts_in, begins, lines_of, said

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
    return attempts_in(lines_of(engine.log_pieces(job.id, False, controller=True)))


def _last(job: ManagedJob) -> list[str]:
    texts = lines_of(engine.log_pieces(job.id, False))
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
            for text in lines_of(engine.log_pieces(job.id, True)):
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
