"""Preemption notices: how long is left, whether one more save fits, and how to leave the machine."""

import queue
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Literal

# Slurm is asked to send SIGURG: SkyPilot's own processes die of SIGTERM and ignore SIGURG.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGURG, signal.SIGHUP)


@dataclass(frozen=True)
class Notice:
    """The machine goes: its source (``SIGTERM``, ``aws spot/instance-action``), time, and seconds left then."""

    source: str
    at: float  # epoch seconds
    grace_s: float

    @property
    def deadline(self) -> float:
        return self.at + self.grace_s


class Notices:
    """Collects notices from signals, clouds and other nodes. Install it before anything slow happens.

    The first notice counts; a later one only brings an earlier deadline: a whole process tree may get several signals,
    and the SIGTERM of the shutdown follows a cloud's notice. ``infra`` and ``user_grace_s`` (see ``prior_s``) are set
    once the machine is known, maybe after a signal.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        # No lock and no Event: a signal handler may run in the middle of anything, also of this thread's own ``wait``.
        self._given: list[tuple[str, float, float | None]] = []
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.infra = ""
        self.user_grace_s: float | None = None

    def install(self) -> "Notices":
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self.give(signal.Signals(number).name)

    def give(self, source: str, grace_s: float | None = None) -> None:
        """Adds a notice from ``source``, which may know how many seconds are left. Repeats are harmless."""
        if grace_s is None and any(source == earlier for earlier, _, _ in self._given[:]):
            return  # its deadline would only be later
        self._given.append((source, self._clock(), grace_s))
        self._wake.put(None)

    @property
    def notice(self) -> Notice | None:
        """The first notice, with the earliest deadline of all; None if there is none."""
        if not self._given:
            return None
        source, at, _ = self._given[0]
        deadlines = []
        for other, given_at, grace_s in self._given[:]:
            prior = prior_s(self.infra, other, self.user_grace_s)
            deadlines.append(given_at + (prior if grace_s is None else grace_s))
        return Notice(source, at, max(min(deadlines) - at, 0.0))

    @property
    def given(self) -> bool:
        return bool(self._given)

    @property
    def source(self) -> str:
        return self._given[0][0] if self._given else ""

    @property
    def left_s(self) -> float:
        """Seconds until the machine goes, never below 0; infinite without a notice."""
        notice = self.notice
        return max(notice.deadline - self._clock(), 0.0) if notice else float("inf")

    def wait(self, seconds: float) -> bool:
        """Sleeps until the first notice comes at most; returns whether one has come."""
        if self._given:
            time.sleep(seconds)
            return True
        left_s = seconds
        while True:
            # A signal that arrives just before the wait blocks does not end it: its handler runs after the slice.
            slice_s = min(left_s, 0.5)
            try:
                self._wake.get(timeout=slice_s)
            except queue.Empty:
                left_s -= slice_s
                if self._given or left_s <= 0:
                    return self.given
            else:
                self._wake.put(None)  # for other threads that wait
                return True


def prior_s(infra: str, source: str, user_s: float | None = None) -> float:
    """Returns the seconds from a notice to the kill. ``user_s`` (``SPOTUNE_GRACE_S``) overrides all but Ctrl-C."""
    if is_person(source):
        return 300.0
    return user_s if user_s is not None else 25.0 if infra == "slurm" else 30.0


def is_person(source: str) -> bool:
    """Returns whether the notice is a Ctrl-C, here or on another node."""
    return source.split(" ", 1)[0] == "SIGINT"


STAY_S = 60.0  # beyond the deadline: a machine that still runs then was not taken after all


def departure(infra: str, source: str, managed: bool, left_s: float) -> tuple[bool, str]:
    """Decides how to leave ``infra`` after a notice of ``source``: whether to stay until killed, and why.

    SkyPilot recovers a job that failed with 75 on a machine that is still there, and a job whose machine is gone. In
    between it cannot read the exit code, and the job ends FAILED for good: a job that stays until its machine is gone
    is never seen there. A job that leaves at once stops paying, and its next machine is sought earlier. Measurements
    and sources: docs/explanation/checkpoints.md. ``managed``: the engine recovers this job, not so on a dev cluster
    and by hand.
    """
    if is_person(source):
        return False, "asked to at the keyboard"
    if not managed:
        return False, "nobody waits for this machine to go"
    if infra in ("slurm", "kubernetes", "gcp", "azure"):
        return True, f"{infra}: an exit before the machine is gone may end the job for good"
    # SkyPilot polls every 15 s and again 5 s after a failure; time for two polls, so that one may fail.
    if infra == "aws" and left_s < 35.0:
        return True, f"aws: {left_s:.0f} s are too short for the exit to be seen before the machine goes"
    return False, "the next machine is sought at once"


def stay_until_killed(
    deadline: float, clock: Callable[[], float] = time.time, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Ignores signals and sleeps until ``STAY_S`` after the deadline. From the main thread only."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sleep(max(deadline - clock(), 0.0) + STAY_S)


Action = Literal["save", "finish", "leave"]  # a new checkpoint, the running upload, with the last commit


@dataclass(frozen=True)
class Outlook:
    """What is known when the notice has come; None: not measured yet."""

    left_s: float  # until the machine goes
    new_steps: int  # done since the newest checkpoint that is committed or on its way
    step_s: float | None = None  # a step's duration: at worst the wait for its end
    write_s: float | None = None  # from training's stop to a complete checkpoint on the local disk
    upload_s: float | None = None  # from there to its commit
    uploading: bool = False  # an upload is under way; it ends before another begins
    upload_left_s: float | None = None  # seconds left of that upload


def fits(outlook: Outlook) -> tuple[Action, str]:
    """Decides what to do in the time left, and why: whether one more checkpoint or the running upload fits."""
    running_s: float | None = 0.0  # at worst all that the last upload took
    if outlook.uploading:
        running_s = outlook.upload_s if outlook.upload_left_s is None else outlook.upload_left_s
    action, why_new = _new_checkpoint(outlook, running_s or 0.0)
    if action == "save" or not outlook.uploading:
        return action, why_new
    left_s = outlook.left_s
    if running_s is None:
        action, why = _unmeasured(left_s, "finish", "the running upload")
    elif running_s <= left_s:  # no margin: it is under way, and to wait for it costs seconds
        action, why = "finish", f"the running upload ends in {running_s:.1f} of {left_s:.0f} s"
    else:
        action, why = "leave", f"the running upload needs {running_s:.1f} s, there are {left_s:.0f} s"
    return action, f"{why}; {why_new}"


def _new_checkpoint(outlook: Outlook, running_s: float) -> tuple[Action, str]:
    if outlook.new_steps <= 0:
        return "leave", "there is nothing new to save"
    step_s, write_s, upload_s = outlook.step_s, outlook.write_s, outlook.upload_s
    if step_s is None or write_s is None or upload_s is None:
        # Tried even behind a running upload: that one goes first, so nothing is lost.
        return _unmeasured(outlook.left_s, "save", "a new checkpoint")
    wait_s = max(running_s - step_s - write_s, 0.0)
    parts = f"{step_s:.1f} s to the step's end, {write_s:.1f} s to write, {upload_s:.1f} s to upload"
    if wait_s:
        parts += f" after {wait_s:.1f} s for the running upload"
    # Saves differ, and disk and network are shared: a fifth more, and a second for what is not measured (the fence,
    # the commit object). Not more: a save that does not fit harms nothing.
    if (step_s + write_s + wait_s + upload_s) * 1.2 + 1.0 > outlook.left_s:
        return "leave", f"a new checkpoint does not fit in {outlook.left_s:.0f} s: {parts}"
    return "save", f"a new checkpoint fits in {outlook.left_s:.0f} s: {parts}"


def _unmeasured(left_s: float, action: Action, what: str) -> tuple[Action, str]:
    if left_s >= 10.0:  # worth the try
        return action, f"{what} is tried: nothing is measured yet, {left_s:.0f} s are left"
    return "leave", f"{what} is not tried: nothing is measured yet, only {left_s:.0f} s are left"
