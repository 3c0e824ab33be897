"""What becomes of a job when a machine of its has ended: a pure decision, in SkyPilot's terms."""

from dataclasses import dataclass
from functools import partial

from spotune.core import exits
from spotune.launch.engine import State
from spotune.launch.local.probe import Look

KILLED = 137  # 128 + SIGKILL: nothing that a program does to itself; out of memory, or a machine's fault
FREE_RETRIES = 3  # attempts that say 75 by themselves, without progress, before they are slowed down
MAX_BACKOFF_S = 30.0


@dataclass(frozen=True)
class Ending:
    """How a machine ended. ``exit_code`` None: it vanished before its program ended."""

    exit_code: int | None
    phase: str = "run"
    preempted: bool = False
    cancelled: bool = False


@dataclass(frozen=True)
class Patience:
    """What the job may still ask for.

    Attributes:
        restarts: how often it was restarted after an error of its own.
        max_restarts: ``max_restarts_on_errors`` of the task.
        recover_codes: ``recover_on_exit_codes`` of the task; 75 always is one.
        faults: machine-like faults in a row without a new commit.
        commit: the newest commit when the last machine had ended.
    """

    max_restarts: int = 0
    recover_codes: tuple[int, ...] = (exits.PREEMPTED,)
    restarts: int = 0
    faults: int = 0
    commit: str = ""
    interactive: bool = False


@dataclass(frozen=True)
class Verdict:
    """The job's next state; for RECOVERING after how many seconds, and what was used up."""

    state: State
    reason: str = ""
    exit_code: int | None = None
    delay_s: float = 0.0
    restarts: int = 0
    faults: int = 0


def decide(ending: Ending, seen: Look, patience: Patience) -> Verdict:
    """The certificate first, then what the user wants, then the marks, then the exit code."""
    code = ending.exit_code
    kept = partial(Verdict, restarts=patience.restarts, faults=patience.faults)
    if seen.completed:
        return kept("SUCCEEDED", exit_code=exits.SUCCEEDED)
    if ending.cancelled:
        return kept("CANCELLED", "cancelled", code)
    if seen.paused is not None and code in (exits.PAUSED, KILLED, None):
        return kept("PAUSED", seen.paused, exits.PAUSED)
    if seen.failed is not None and code != exits.SUCCEEDED:
        return kept("FAILED", seen.failed, seen.failed_code)
    if seen.cancelled is not None and code != exits.SUCCEEDED:  # whoever cancelled it was stopped before we were told
        return kept("CANCELLED", seen.cancelled, code)
    if patience.interactive:
        return Verdict(
            "FAILED", _end_of_interactive(ending, seen), exits.PREEMPTED if _is_machines(ending, patience) else code
        )
    if _is_machines(ending, patience):
        return _recover(ending, seen, patience)
    if code == exits.SUCCEEDED:
        return kept("FAILED", "ended without a certificate", code)
    if patience.restarts < patience.max_restarts:
        reason = f"{_spell(ending, seen)}; restart {patience.restarts + 1} of {patience.max_restarts}"
        return Verdict("RECOVERING", reason, code, restarts=patience.restarts + 1, faults=patience.faults)
    return kept("FAILED", _spell(ending, seen), code)


def backoff_s(faults: int) -> float:
    """0, 1, 2, 4, … 30 seconds before the attempt that follows the n-th fault in a row."""
    return 0.0 if faults <= 1 else min(MAX_BACKOFF_S, 2.0 ** (faults - 2))


def _is_machines(ending: Ending, patience: Patience) -> bool:
    """Whether the machine, or a fault that the program thinks is the machine's, ended it."""
    if ending.exit_code is None or ending.exit_code in (KILLED, exits.PREEMPTED, *patience.recover_codes):
        return True
    return ending.preempted and ending.exit_code != exits.SUCCEEDED


def _recover(ending: Ending, seen: Look, patience: Patience) -> Verdict:
    progress = seen.commit != patience.commit
    if ending.preempted:
        return Verdict("RECOVERING", "preempted", ending.exit_code, restarts=patience.restarts)
    faults = 1 if progress else patience.faults + 1
    vanished = ending.exit_code in (None, KILLED)
    delay_s = backoff_s(faults if vanished else faults - FREE_RETRIES)
    return Verdict("RECOVERING", _spell(ending, seen), ending.exit_code, delay_s, patience.restarts, faults)


def _end_of_interactive(ending: Ending, seen: Look) -> str:
    if ending.preempted:
        return "preempted; an interactive run is not recovered"
    return "ended without a certificate" if ending.exit_code == 0 else _spell(ending, seen)


def _spell(ending: Ending, seen: Look) -> str:
    if seen.stalled and ending.exit_code == exits.PREEMPTED:
        return "stalled (exit code 75)"
    if ending.exit_code is None:
        return "the machine was lost"
    what = "setup " if ending.phase == "setup" else ""
    return (
        f"{what}killed (exit code 137)" if ending.exit_code == KILLED else f"{what}exited with code {ending.exit_code}"
    )
