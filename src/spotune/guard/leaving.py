"""How to leave a machine that will be taken, once what could be saved is saved.

SkyPilot looks at a job every 15 s. A job that has failed with 75 on a machine that is still there is recovered;
so is one whose machine is gone, whatever its exit code. In between, when the job has failed and the machine is
going, SkyPilot cannot read the exit code any more and the job ends FAILED for good. Who stays until the machine
is gone can never be seen in between; who leaves at once stops paying, and the next machine is sought earlier.

    infra          how the notice comes                               seconds     how we leave
    slurm          SIGURG if sbatch_options.signal asks for it,       GraceTime   stay until killed
                   else SIGTERM, or none at all
    kubernetes     deletionTimestamp of the pod; SIGTERM only if a    30, or as   stay until killed
                   hook of the pod passes it on                       it says
    gcp            instance/preempted, SIGTERM of the shutdown        30          stay until killed
    azure          Scheduled Events: Preempt                          30 or more  stay until killed
    aws            spot/instance-action                               120         at once while SkyPilot has the
                                                                                  time to see the 75, else stay
    other clouds   SIGTERM                                            not known   at once
    local, by hand, dev cluster: SIGTERM, Ctrl-C                      as told     at once: no poll to race with

Measured, on Slurm with SkyPilot 0.14.1: who gets which signal, and that a job preempted again and again with 25 s of
grace recovered 6 times of 6 when it stayed, and ended FAILED at the third when it left at once. From SkyPilot's
source: the poll, and that a pod's first process keeps the SIGTERM. The rest is from the vendors' documentation.
"""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from spotune.guard.grace import is_person
from spotune.guard.notices import SIGNALS

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
