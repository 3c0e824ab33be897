"""What a game day is played with: a program that trains, on a machine that may vanish."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from spotune.core.environment import FAILPOINT_DIR, FAILPOINTS
from spotune.core.protocol import Event


@dataclass(frozen=True)
class Hold:
    """Stand still at a boundary (core/io.py); a file in ``folder`` says that it does.

    Attributes:
        at: the boundary's name, ``NAME`` or ``NAME:N``.
    """

    at: str
    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / self.at.partition(":")[0]

    @property
    def environ(self) -> dict[str, str]:
        return {FAILPOINTS: self.at, FAILPOINT_DIR: str(self.folder)}


@dataclass(frozen=True)
class Launch:
    """How to start one attempt."""

    command: Sequence[str]
    environ: dict[str, str]


@dataclass(frozen=True)
class Account:
    """What a contender left behind about one run.

    Attributes:
        weights: sha256 of the certified result's weights, None where there is none.
        attempts: for each attempt that was claimed: when (epoch seconds), and what it told the bucket.
        leftovers: kind -> how many, of what should not be there any more.
    """

    weights: str | None
    attempts: dict[float, list[Event]] = field(default_factory=dict)
    leftovers: dict[str, int] = field(default_factory=dict)


class Contender(Protocol):
    """One run of one program.

    Attributes:
        noticed: exit codes with which an attempt may end that has had a notice; 0 and -9 always.
    """

    noticed: tuple[int, ...]

    def launch(self, disk: Path, hold: Hold | None) -> Launch:
        """The command that starts an attempt, or goes on with the run: always the same one."""

    def event_log(self, disk: Path, since: float) -> Path | None:
        """The log of the attempt that was launched at ``since``, once there is one."""

    def repair(self) -> bool:
        """What a person would do after an attempt failed by itself; False when there is nothing to be done."""

    def account(self) -> Account:
        """What the run has come to."""
