"""What becomes of a job when its machine has ended: every rule, and the order of the rules."""

import pytest

from spotune.launch.local.programs import BucketProbe
from spotune.launch.local.watch import Ending, RestartLimits, backoff_s, decide

CERTIFIED = BucketProbe(completed=True)
FAILED = BucketProbe(failed="bad data", failed_code=2)
PAUSED = BucketProbe(paused="budget used up")
NOTHING = BucketProbe()
MARKED = BucketProbe(cancelled="cancelled by ada")  # and the queue was not told

RULES = {
    "certified": (Ending(0), CERTIFIED, RestartLimits(), "SUCCEEDED", ""),
    "certified, then preempted": (Ending(None, preempted=True), CERTIFIED, RestartLimits(), "SUCCEEDED", ""),
    "certified, then cancelled": (Ending(None, cancelled=True), CERTIFIED, RestartLimits(), "SUCCEEDED", ""),
    "certified, then an error": (Ending(1), CERTIFIED, RestartLimits(), "SUCCEEDED", ""),
    "0 without a certificate": (
        Ending(0),
        NOTHING,
        RestartLimits(max_restarts=3),
        "FAILED",
        "ended without a certificate",
    ),
    "0 after a notice": (Ending(0, preempted=True), NOTHING, RestartLimits(), "FAILED", "ended without a certificate"),
    "cancelled": (Ending(75, cancelled=True), NOTHING, RestartLimits(), "CANCELLED", "cancelled"),
    "cancelled and failed": (Ending(1, cancelled=True), FAILED, RestartLimits(), "CANCELLED", "cancelled"),
    "marked as cancelled": (Ending(1), MARKED, RestartLimits(max_restarts=3), "CANCELLED", "cancelled by ada"),
    "marked as cancelled, machine gone": (Ending(None), MARKED, RestartLimits(), "CANCELLED", "cancelled by ada"),
    "marked as cancelled, preempted": (
        Ending(75, preempted=True),
        MARKED,
        RestartLimits(),
        "CANCELLED",
        "cancelled by ada",
    ),
    "paused": (Ending(76), PAUSED, RestartLimits(), "PAUSED", "budget used up"),
    "paused, machine gone": (Ending(None), PAUSED, RestartLimits(), "PAUSED", "budget used up"),
    "76 without paused.json": (Ending(76), NOTHING, RestartLimits(), "FAILED", "exited with code 76"),
    "failed for good": (Ending(2), FAILED, RestartLimits(max_restarts=3), "FAILED", "bad data"),
    "failed for good, machine gone": (Ending(None, preempted=True), FAILED, RestartLimits(), "FAILED", "bad data"),
    "stalled": (Ending(75), BucketProbe(stalled=True), RestartLimits(), "RECOVERING", "stalled (exit code 75)"),
    "killed after a stall": (
        Ending(None),
        BucketProbe(stalled=True),
        RestartLimits(),
        "RECOVERING",
        "the machine was lost",
    ),
    "interactive, stalled": (
        Ending(75),
        BucketProbe(stalled=True),
        RestartLimits(interactive=True),
        "FAILED",
        "stalled (exit code 75)",
    ),
    "75": (Ending(75), NOTHING, RestartLimits(), "RECOVERING", "exited with code 75"),
    "named code": (Ending(41), NOTHING, RestartLimits(recover_codes=(41,)), "RECOVERING", "exited with code 41"),
    "preempted, exits 75": (Ending(75, preempted=True), NOTHING, RestartLimits(), "RECOVERING", "preempted"),
    "preempted, shell dies": (Ending(143, preempted=True), NOTHING, RestartLimits(), "RECOVERING", "preempted"),
    "preempted without notice": (Ending(None, preempted=True), NOTHING, RestartLimits(), "RECOVERING", "preempted"),
    "machine gone": (Ending(None), NOTHING, RestartLimits(), "RECOVERING", "the machine was lost"),
    "killed": (Ending(137), NOTHING, RestartLimits(), "RECOVERING", "killed (exit code 137)"),
    "error": (Ending(1), NOTHING, RestartLimits(), "FAILED", "exited with code 1"),
    "error with restarts left": (
        Ending(1),
        NOTHING,
        RestartLimits(max_restarts=2, restarts=1),
        "RECOVERING",
        "restart 2 of 2",
    ),
    "error with none left": (
        Ending(1),
        NOTHING,
        RestartLimits(max_restarts=2, restarts=2),
        "FAILED",
        "exited with code 1",
    ),
    "setup": (Ending(5, phase="setup"), NOTHING, RestartLimits(), "FAILED", "setup exited with code 5"),
    "interactive, 75": (Ending(75), NOTHING, RestartLimits(interactive=True), "FAILED", "exited with code 75"),
    "interactive, preempted": (
        Ending(None, preempted=True),
        NOTHING,
        RestartLimits(interactive=True),
        "FAILED",
        "not recovered",
    ),
    "interactive, done": (Ending(0), CERTIFIED, RestartLimits(interactive=True), "SUCCEEDED", ""),
}


@pytest.mark.parametrize(("ending", "seen", "limits", "state", "reason"), RULES.values(), ids=RULES)
def test_rules(ending: Ending, seen: BucketProbe, limits: RestartLimits, state: str, reason: str) -> None:
    verdict = decide(ending, seen, limits)
    assert verdict.state == state
    assert reason in verdict.reason
    assert bool(reason) == bool(verdict.reason)


def test_back_off() -> None:
    assert [backoff_s(fault) for fault in range(1, 9)] == [0, 1, 2, 4, 8, 16, 30, 30]


def test_faults_without_progress_are_slowed_down_and_progress_forgives() -> None:
    limits, delays = RestartLimits(), []
    for _ in range(4):
        verdict = decide(Ending(137), NOTHING, limits)
        delays.append(verdict.delay_s)
        limits = RestartLimits(faults=verdict.faults)
    assert delays == [0, 1, 2, 4]
    assert decide(Ending(137), BucketProbe(commit="runs/a/commits/1"), limits).delay_s == 0


def test_75_is_at_once_but_not_for_ever() -> None:
    assert [decide(Ending(75), NOTHING, RestartLimits(faults=faults)).delay_s for faults in (0, 1, 2, 3, 4, 5)] == [
        0,
        0,
        0,
        0,
        1,
        2,
    ]


def test_a_preemption_is_nobodys_fault() -> None:
    verdict = decide(Ending(None, preempted=True), NOTHING, RestartLimits(faults=5, restarts=1))
    assert (verdict.delay_s, verdict.faults, verdict.restarts) == (0, 0, 1)
