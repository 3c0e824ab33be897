"""Preemption notices: how long is left, whether one more save fits, and how to leave the machine."""

import queue
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FrameType
from typing import Literal

# What says that the machine will be taken: signals here, clouds' own notices from ``metadata``, other nodes.
#
# Preemption often signals the whole tree, several times, and a cloud's notice is followed by the SIGTERM of the
# system's shutdown. The first one is what happened; a later one changes nothing, but for an earlier deadline.

# SIGURG is how Slurm is asked to say it (SkyPilot's own processes die of SIGTERM and ignore this one).
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGURG, signal.SIGHUP)
# A signal that arrives just before the wait blocks does not end it: its handler runs when the slice is over.
SLICE_S = 0.5


@dataclass(frozen=True)
class Notice:
    """The machine goes: who said so (``SIGTERM``, ``aws spot/instance-action``), when, and how long is left then."""

    source: str
    at: float  # epoch seconds
    grace_s: float

    @property
    def deadline(self) -> float:
        return self.at + self.grace_s


class Notices:
    """Collects notices from the signal handler and other threads. Installed before anything slow happens.

    ``infra`` and ``told_grace_s`` (see grace.py) are set once the machine is known, which may be after a signal.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        # Both may be touched by a signal handler in the middle of anything, so there is no lock: an Event would be
        # taken twice by one thread when a signal meets it in its own ``wait``, and never come back.
        self._given: list[tuple[str, float, float | None]] = []
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.infra = ""
        self.told_grace_s: float | None = None

    def install(self) -> "Notices":
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self.give(signal.Signals(number).name)

    def give(self, source: str, grace_s: float | None = None) -> None:
        """A notice from ``source``, which may know how many seconds are left; to repeat it is harmless."""
        if grace_s is None and any(source == earlier for earlier, _, _ in self._given[:]):
            return  # its deadline would only be later
        self._given.append((source, self._clock(), grace_s))
        self._wake.put(None)

    @property
    def notice(self) -> Notice | None:
        """The first notice, with the earliest deadline of all; None when there is none."""
        if not self._given:
            return None
        source, at, _ = self._given[0]
        deadline = min(at_ + self._grace_s(source_, grace_s) for source_, at_, grace_s in self._given[:])
        return Notice(source, at, max(deadline - at, 0.0))

    def _grace_s(self, source: str, grace_s: float | None) -> float:
        return prior_s(self.infra, source, self.told_grace_s) if grace_s is None else grace_s

    @property
    def given(self) -> bool:
        return bool(self._given)

    @property
    def source(self) -> str:
        return self._given[0][0] if self._given else ""

    @property
    def at(self) -> float:
        return self._given[0][1] if self._given else 0.0

    @property
    def left_s(self) -> float:
        """Seconds until the machine goes, never below 0; infinite without a notice."""
        notice = self.notice
        return max(notice.deadline - self._clock(), 0.0) if notice else float("inf")

    def wait(self, seconds: float) -> bool:
        """Sleeps, but wakes at once when the first notice comes; returns whether one has come."""
        if self._given:
            time.sleep(seconds)
            return True
        left_s = seconds
        while True:
            slice_s = min(left_s, SLICE_S)
            try:
                self._wake.get(timeout=slice_s)
            except queue.Empty:
                left_s -= slice_s
                if self._given or left_s <= 0:
                    return self.given
            else:
                self._wake.put(None)  # for whoever else waits
                return True


# How long a machine has left after a notice that does not say so itself.
#
# | infra | notice | seconds | from |
# |---|---|---|---|
# | slurm | SIGURG or SIGTERM | 25 | the partition's GraceTime, not in the environment; our test cluster's |
# | kubernetes | SIGTERM | 30 | Kubernetes' terminationGracePeriodSeconds, its default |
# | gcp | preempted, SIGTERM | 30 | Google's documentation: from ACPI G2 to G3 on spot machines |
# | azure | event that has started, SIGTERM | 30 | Azure's documentation: the least notice of a Preempt event |
# | any | SIGTERM | 30 | SkyPilot's source: from SIGTERM to SIGKILL of a job that is cancelled |
# | any | Ctrl-C | 300 | nobody kills after it, but a person waits |
#
# ``SPOTUNE_GRACE_S`` overrides all but Ctrl-C. What a notice says itself (AWS and Azure name the time) stands.

PERSON_S = 300.0
PRIOR_S = 30.0
PRIORS_S = {"slurm": 25.0}


def prior_s(infra: str, source: str, told_s: float | None = None) -> float:
    """Seconds from the notice of ``source`` to the kill; ``told_s``: what the user said."""
    if is_person(source):
        return PERSON_S
    return PRIORS_S.get(infra, PRIOR_S) if told_s is None else told_s


def is_person(source: str) -> bool:
    """Whether the notice is a Ctrl-C, here or on another node."""
    return source.split(" ", 1)[0] == "SIGINT"


# How to leave a machine that will be taken, once what could be saved is saved.
#
# SkyPilot looks at a job every 15 s. A job that has failed with 75 on a machine that is still there is recovered;
# so is one whose machine is gone, whatever its exit code. In between, when the job has failed and the machine is
# going, SkyPilot cannot read the exit code any more and the job ends FAILED for good. Who stays until the machine
# is gone can never be seen in between; who leaves at once stops paying, and the next machine is sought earlier.
#
#     infra          how the notice comes                               seconds     how we leave
#     slurm          SIGURG if sbatch_options.signal asks for it,       GraceTime   stay until killed
#                    else SIGTERM, or none at all
#     kubernetes     deletionTimestamp of the pod; SIGTERM only if a    30, or as   stay until killed
#                    hook of the pod passes it on                       it says
#     gcp            instance/preempted, SIGTERM of the shutdown        30          stay until killed
#     azure          Scheduled Events: Preempt                          30 or more  stay until killed
#     aws            spot/instance-action                               120         at once while SkyPilot has the
#                                                                                   time to see the 75, else stay
#     other clouds   SIGTERM                                            not known   at once
#     local, by hand, dev cluster: SIGTERM, Ctrl-C                      as told     at once: no poll to race with
#
# Measured, on Slurm with SkyPilot 0.14.1: who gets which signal, and that a job preempted again and again with 25 s of
# grace recovered 6 times of 6 when it stayed, and ended FAILED at the third when it left at once. From SkyPilot's
# source: the poll, and that a pod's first process keeps the SIGTERM. The rest is from the vendors' documentation.

STAYS = ("slurm", "kubernetes", "gcp", "azure")
# SkyPilot polls every 15 s and looks again 5 s after a failure; two polls, so that one may fail.
SEEN_S = 35.0
STAY_S = 60.0  # beyond the deadline: whoever is still there then was not taken after all


@dataclass(frozen=True)
class Departure:
    """Exit 75 at once, or ``stay`` until killed; ``why`` is for the log."""

    stay: bool
    why: str


def departure(infra: str, source: str, managed: bool, left_s: float) -> Departure:
    """How to leave ``infra`` after a notice of ``source``.

    Args:
        managed: whether the engine recovers this job; it does not on a dev cluster or by hand.
        left_s: seconds until the machine goes, now that everything else is done.
    """
    if is_person(source):
        return Departure(False, "asked to at the keyboard")
    if not managed:
        return Departure(False, "nobody waits for this machine to go")
    if infra in STAYS:
        return Departure(True, f"{infra}: an exit before the machine is gone may end the job for good")
    if infra == "aws" and left_s < SEEN_S:
        return Departure(True, f"aws: {left_s:.0f} s are too short for the exit to be seen before the machine goes")
    return Departure(False, "the next machine is sought at once")


def stay_until_killed(
    deadline: float,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Sleeps until ``STAY_S`` after the deadline, deaf to signals but for SIGKILL. From the main thread only."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sleep(max(deadline - clock(), 0.0) + STAY_S)


# Whether one more checkpoint fits into what is left before the machine goes. Plain numbers in, one line out.

Action = Literal["save", "finish", "leave"]

# Saves of one run differ in how long they take, and the disk and the network are shared: a fifth more, and a second
# for what is not measured (the fence, the commit object). Not more: a save that does not fit harms nothing.
MARGIN = 1.2
FIXED_S = 1.0
UNMEASURED_S = 10.0  # with so much left an unmeasured save is worth the try


@dataclass(frozen=True)
class Outlook:
    """What is known when the notice has come.

    Attributes:
        left_s: seconds until the machine goes.
        new_steps: steps done since the newest checkpoint that is committed or on its way.
        step_s: how long a step takes, the wait for the next boundary at worst; None: not measured yet.
        write_s: training's stop until a checkpoint is complete on the local disk; None: none was written yet.
        upload_s: from there to its commit; None: none was committed yet.
        uploading: whether an upload is under way; it ends before another begins.
        upload_left_s: what is left of it; None: not known.
    """

    left_s: float
    new_steps: int
    step_s: float | None = None
    write_s: float | None = None
    upload_s: float | None = None
    uploading: bool = False
    upload_left_s: float | None = None


@dataclass(frozen=True)
class LastSave:
    """``save`` a new checkpoint, let the running upload ``finish``, or ``leave`` with the last commit; and why."""

    action: Action
    reason: str


def fits(outlook: Outlook) -> LastSave:
    """What to do with the time that is left."""
    new = _new_checkpoint(outlook)
    if new.action == "save" or not outlook.uploading:
        return new
    running = _running_upload(outlook)
    return replace(running, reason=f"{running.reason}; {new.reason}")


def _new_checkpoint(outlook: Outlook) -> LastSave:
    if outlook.new_steps <= 0:
        return LastSave("leave", "there is nothing new to save")
    step_s, write_s, upload_s = outlook.step_s, outlook.write_s, outlook.upload_s
    if step_s is None or write_s is None or upload_s is None:
        # Tried also behind a running upload: that one goes first, so that nothing is lost by it.
        return _unmeasured(outlook.left_s, "save", "a new checkpoint")
    upload_left_s = _upload_left_s(outlook) or 0.0
    wait_s = max(upload_left_s - step_s - write_s, 0.0)
    parts = f"{step_s:.1f} s to the step's end, {write_s:.1f} s to write, {upload_s:.1f} s to upload"
    if wait_s:
        parts += f" after {wait_s:.1f} s for the running upload"
    if (step_s + write_s + wait_s + upload_s) * MARGIN + FIXED_S > outlook.left_s:
        return LastSave("leave", f"a new checkpoint does not fit in {outlook.left_s:.0f} s: {parts}")
    return LastSave("save", f"a new checkpoint fits in {outlook.left_s:.0f} s: {parts}")


def _running_upload(outlook: Outlook) -> LastSave:
    left_s = _upload_left_s(outlook)
    if left_s is None:
        return _unmeasured(outlook.left_s, "finish", "the running upload")
    # No margin: it is under way, and to wait for it costs seconds.
    if left_s <= outlook.left_s:
        return LastSave("finish", f"the running upload ends in {left_s:.1f} of {outlook.left_s:.0f} s")
    return LastSave("leave", f"the running upload needs {left_s:.1f} s, there are {outlook.left_s:.0f} s")


def _upload_left_s(outlook: Outlook) -> float | None:
    """What is left of the running upload: at worst, all that the last one took."""
    if not outlook.uploading:
        return 0.0
    return outlook.upload_s if outlook.upload_left_s is None else outlook.upload_left_s


def _unmeasured(left_s: float, action: Action, what: str) -> LastSave:
    if left_s >= UNMEASURED_S:
        return LastSave(action, f"{what} is tried: nothing is measured yet, {left_s:.0f} s are left")
    return LastSave("leave", f"{what} is not tried: nothing is measured yet, only {left_s:.0f} s are left")
