"""What a schedule is made of: who is taken away, when, and what else goes with it.

A schedule is a list of runs, a run a tuple of kills, one for each machine that it loses on its way.
"""

from dataclasses import dataclass
from typing import Literal

# vanish  SIGKILL to the guard and everything below it at once
# notice  SIGTERM to the guard, and SIGKILL to everything when the notice is over
# guard   SIGKILL to the guard alone: its workers have to notice
# worker  SIGKILL to one rank alone, as the kernel's out-of-memory killer does it
# loader  SIGKILL to one of a rank's DataLoader workers, or to the rank where it has none
# zombie  SIGSTOP to everything; the next machine is started, then SIGCONT
Kind = Literal["vanish", "notice", "guard", "worker", "loader", "zombie"]
# start  from the launch to the first batch: imports, restore, model, data
# train  steps, evaluations, logs
# save   from the beginning of a save to its commit
# end    from the last step to the process's end: the result, its upload, the certificate
Stage = Literal["start", "train", "save", "end"]
# Those of core/io.py, in the order in which a run passes them.
BOUNDARIES = (
    *("claimed", "restoring", "restored", "snapshot", "written", "staged", "uploading", "uploaded", "committed"),
    *("pruning", "noticed", "result-written", "result-uploaded", "result-read", "certified"),
)
EXTRAS = ("merged", "merged-uploaded", "pushed")  # only where the config asks for them: tests/e2e/test_extras.py
STAGES: tuple[Stage, ...] = ("start", "train", "save", "end")
FAULTS = ("worker", "loader")  # the machine stays, and the attempt ends as a fault of it


@dataclass(frozen=True)
class Instant:
    """A moment of an attempt's life: ``at`` (0 to 1) of the way through a stage; ``nth``: of its saves."""

    stage: Stage
    at: float
    nth: int = 1

    def __str__(self) -> str:
        return self.stage


@dataclass(frozen=True)
class Boundary:
    """The ``nth`` time that the attempt reaches a boundary of the protocol (core/io.py)."""

    name: str
    nth: int = 1

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class After:
    """Seconds after the launch, whatever the attempt is doing."""

    seconds: float

    def __str__(self) -> str:
        return "trace"


@dataclass(frozen=True)
class Kill:
    """The loss of one machine.

    Attributes:
        wipe: its disk is lost too; else the next attempt finds what this one left.
        notice_s: of a notice; the machine may leave before it is over.
        wake: of a zombie: it comes back this far (0 to 1) through the life of the next attempt.
        down_s: until there is another machine.
    """

    kind: Kind
    when: Instant | Boundary | After
    wipe: bool = True
    notice_s: float = 0.0
    wake: float = 0.0
    down_s: float = 0.0


Run = tuple[Kill, ...]
