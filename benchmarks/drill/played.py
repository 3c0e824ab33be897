"""What happened in a run: one line for every launch, as the harness saw it and as the attempt told it."""

from dataclasses import dataclass, field

from drill.contender import Account
from drill.schedule import Kill
from spotune.core.protocol import Event


@dataclass(frozen=True)
class Life:
    """One launch, from its first second to its last.

    Attributes:
        kill: what it was to be lost by, None where it was left alone.
        landed: it was lost so; False when it came to its end before.
        code: its exit code; negative: the signal that ended it.
        allowed: exit codes with which it may end.
        events: the worker's event log, whole up to the last line before the end.
        survivors: command lines of what outlived a guard that was killed.
        hung: it had to be ended since it did not end by itself.
    """

    launched_at: float
    ended_at: float
    code: int
    allowed: tuple[int, ...]
    kill: Kill | None = None
    landed: bool = False
    events: list[Event] = field(default_factory=list)
    survivors: list[str] = field(default_factory=list)
    hung: bool = False

    @property
    def seconds(self) -> float:
        return self.ended_at - self.launched_at

    @property
    def steps(self) -> list[int]:
        """The steps that it made, in order."""
        return [int(event["step"]) for event in self.events if event["event"] == "step"]

    @property
    def last_step(self) -> int:
        return max(self.steps, default=0)

    @property
    def ended_well(self) -> bool:
        """Whether the end is one that the protocol allows: finished, lost as planned, or left when told to."""
        return not self.hung and not self.survivors and self.code in self.allowed


@dataclass(frozen=True)
class Played:
    """One run to its end.

    Attributes:
        lives: its launches, in order.
        finished: the last launch said that the run is done (exit 0).
        repairs: how often a person had to do something that is not the same command again.
        missed: kills that came too late: the run was over.
        zombies: exit codes of machines that were cut off and came back.
        log: the output of all launches.
    """

    name: str
    lives: list[Life]
    finished: bool
    account: Account
    repairs: int = 0
    missed: list[Kill] = field(default_factory=list)
    zombies: list[int] = field(default_factory=list)
    log: str = ""

    @property
    def first_try(self) -> bool:
        """Finished, with no attempt that ended otherwise than the protocol allows, and nobody's help."""
        zombies_ended_well = all(code in (0, 75) for code in self.zombies)
        return self.finished and not self.repairs and zombies_ended_well and all(one.ended_well for one in self.lives)
