"""Notices: which one counts, how long is left, and that a signal may come at any moment."""

import math
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest

from spotune.core.environment import RunEnvironment
from spotune.core.errors import InputError
from spotune.guard.leaving import SIGNALS, Notice, Notices, prior_s
from tests.clocks import Clock
from tests.waiting import LIMIT_S


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGALRM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_without_a_notice_there_is_no_end() -> None:
    notices = Notices()
    assert (notices.notice, notices.given, notices.source, notices.left_s) == (None, False, "", math.inf)


# infra, what comes when (seconds, source, seconds left as said), the notice that counts
ORDERS: dict[str, tuple[str, list[tuple[float, str, float | None]], Notice]] = {
    "a signal has its infra's time": ("slurm", [(0, "SIGURG", None)], Notice("SIGURG", 1000, 25)),
    "signal after signal": ("gcp", [(0, "SIGTERM", None), (3, "SIGTERM", None)], Notice("SIGTERM", 1000, 30)),
    "a SIGTERM late in a cloud's notice": (
        "aws",
        [(0, "aws spot/instance-action", 120), (110, "SIGTERM", None)],
        Notice("aws spot/instance-action", 1000, 120),
    ),
    "a SIGTERM early in it is nearer": (
        "kubernetes",
        [(0, "aws spot/instance-action", 120), (5, "SIGTERM", None)],
        Notice("aws spot/instance-action", 1000, 35),
    ),
    "a later notice with more time": (
        "kubernetes",
        [(0, "SIGTERM", None), (1, "kubernetes pod deletion", 600)],
        Notice("SIGTERM", 1000, 30),
    ),
    "Ctrl-C, and then the machine goes": ("", [(0, "SIGINT", None), (9, "SIGTERM", None)], Notice("SIGINT", 1000, 39)),
    "nothing is left": ("aws", [(0, "aws spot/instance-action", 0)], Notice("aws spot/instance-action", 1000, 0)),
}


@pytest.mark.parametrize("case", ORDERS)
def test_the_first_notice_counts_with_the_earliest_deadline(case: str) -> None:
    infra, given, expected = ORDERS[case]
    clock = Clock(1000.0)
    notices = Notices(clock)
    notices.infra = infra
    for after_s, source, grace_s in given:
        clock.now = 1000.0 + after_s
        notices.give(source, grace_s)
    assert notices.notice == expected
    clock.now = expected.deadline - 0.5
    assert notices.left_s == pytest.approx(min(0.5, expected.grace_s + 0.5))
    clock.now = expected.deadline + 99
    assert notices.left_s == 0


def test_a_signal_before_the_machine_is_known_gets_its_time_later() -> None:
    notices = Notices(Clock(1000.0))
    notices.give("SIGTERM")
    notices.infra, notices.user_grace_s = "slurm", 55.0
    assert notices.notice == Notice("SIGTERM", 1000, 55)


def test_a_notice_repeated_for_ever_costs_no_memory() -> None:
    notices = Notices(Clock(1000.0))
    notices.give("SIGTERM")
    for _ in range(1000):
        notices.give("SIGTERM")
    assert len(notices._given) == 1
    notices.give("SIGTERM", 3)
    assert notices.notice == Notice("SIGTERM", 1000, 3)


@pytest.mark.parametrize(
    ("infra", "source", "told_s", "seconds"),
    [
        ("slurm", "SIGURG", None, 25),
        ("kubernetes", "SIGTERM", None, 30),
        ("", "SIGTERM", None, 30),
        ("slurm", "SIGTERM", 120, 120),
        ("gcp", "gcp instance/preempted", 0, 0),
        ("slurm", "SIGINT", 5, 300),
        ("", "SIGINT on node 1", None, 300),
    ],
)
def test_the_time_that_a_notice_does_not_say(infra: str, source: str, told_s: float | None, seconds: float) -> None:
    assert prior_s(infra, source, told_s) == seconds


def test_the_time_is_said_in_the_environment() -> None:
    assert RunEnvironment.read({}).grace_s is None
    assert RunEnvironment.read({"SPOTUNE_GRACE_S": " 12.5 "}).grace_s == 12.5
    for bad in ("30s", "-1", "inf", "nan", "soon"):
        with pytest.raises(InputError, match=f"SPOTUNE_GRACE_S: '{bad}' is not a number of seconds"):
            RunEnvironment.read({"SPOTUNE_GRACE_S": bad})


def hung(*_: Any) -> None:
    raise TimeoutError("the wait does not come back")


class Bell(queue.SimpleQueue[None]):
    """What a wait waits for; ``waits`` is set when it begins."""

    def __init__(self) -> None:
        self.waits = threading.Event()

    def get(self, *arguments: Any, **named: Any) -> None:
        self.waits.set()
        super().get(*arguments, **named)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_wait_wakes_for_each_signal(number: signal.Signals) -> None:
    signal.signal(signal.SIGALRM, hung)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    notices = Notices().install()
    notices._wake = bell = Bell()

    def send() -> None:
        bell.waits.wait()
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        assert notices.wait(100 * LIMIT_S)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    thread.join()
    assert notices.source == number.name
    signal.raise_signal(number)
    signal.raise_signal(number)
    assert notices.wait(0)


def test_a_wait_wakes_for_another_thread() -> None:
    notices = Notices()
    notices._wake = bell = Bell()
    waiting = threading.Thread(target=notices.wait, args=[100 * LIMIT_S], daemon=True)
    waiting.start()
    bell.waits.wait()
    notices.give("gcp instance/preempted", 30.0)
    waiting.join(LIMIT_S)
    assert not waiting.is_alive()


@pytest.mark.usefixtures("handlers")
def test_a_signal_may_come_between_any_two_lines_of_a_wait() -> None:
    """A lock that the handler wants and the interrupted wait holds would never be free again."""
    signal.signal(signal.SIGALRM, hung)
    line, reached = 0, True
    while reached:
        notices, line, seen, reached = Notices().install(), line + 1, 0, False

        def trace(frame: FrameType, event: str, _: Any, line: int = line) -> Any:
            nonlocal seen, reached
            if frame.f_code.co_filename.endswith(("leaving.py", "threading.py", "queue.py")) and event == "line":
                seen += 1
                if seen == line:
                    reached = True
                    sys.settrace(None)
                    signal.raise_signal(signal.SIGTERM)
            return trace

        signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            notices.wait(0.001)
        finally:
            sys.settrace(before)
            signal.setitimer(signal.ITIMER_REAL, 0)
        assert notices.given is reached
    assert line > 3
