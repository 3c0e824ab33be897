"""When machines are taken away: all of it drawn from a seed before anything runs, so that a game day can be had again.

A schedule is a list of runs, a run a tuple of kills, one for each machine that it loses on its way.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

# vanish  SIGKILL to the guard and everything below it at once
# notice  SIGTERM to the guard, and SIGKILL to everything when the notice is over
# guard   SIGKILL to the guard alone: its workers have to notice
# worker  SIGKILL to one rank alone, as the kernel's out-of-memory killer does it
# zombie  SIGSTOP to everything; the next machine is started, then SIGCONT
Kind = Literal["vanish", "notice", "guard", "worker", "zombie"]
# start  from the launch to the first batch: imports, restore, model, data
# train  steps, evaluations, logs
# save   from the beginning of a save to its commit
# end    from the last step to the process's end: the result, its upload, the certificate
Stage = Literal["start", "train", "save", "end"]
# Those of contracts/holds.py, in the order in which a run passes them.
BOUNDARIES = (
    *("claimed", "restoring", "restored", "snapshot", "written", "staged", "uploading", "uploaded", "committed"),
    *("pruning", "noticed", "result-written", "result-uploaded", "result-read", "certified"),
)
# Two runs, each in an order that can be had: what needs a commit comes after one, the end comes last.
BOUNDARY_RUNS = (
    ("claimed", "snapshot", "written", "staged", "uploading", "uploaded", "noticed"),
    ("committed", "restoring", "restored", "pruning", "result-written", "result-uploaded", "result-read", "certified"),
)
SAVING = ("snapshot", "written", "staged", "uploading", "uploaded")
LATE = ("end",)
STAGES: tuple[Stage, ...] = ("start", "train", "save", "end")
KINDS: tuple[tuple[Kind, int], ...] = (("vanish", 14), ("notice", 2), ("guard", 2), ("worker", 1), ("zombie", 1))
# A kill comes within this share of its stage: several have room in one training, and no two runs take equally long.
SHARES: dict[Stage, float] = {"start": 1.0, "train": 0.4, "save": 1.0, "end": 0.9}


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
    """The ``nth`` time that the attempt reaches a boundary of the protocol (contracts/holds.py)."""

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


def draw_random(count: int, per_run: int, rng: Random, notice_s: float) -> list[Run]:
    """``count`` random instants over the whole life of attempts, ``per_run`` of them in each run.

    The stages take turns, so that each is hit equally often however short it is.
    """
    stages = [STAGES[index % len(STAGES)] for index in range(count)]
    rng.shuffle(stages)
    return [_in_order(_draw_run(stages[at : at + per_run], rng, notice_s)) for at in range(0, count, per_run)]


def _draw_run(stages: Sequence[Stage], rng: Random, notice_s: float) -> list[Kill]:
    kills: list[Kill] = []
    for stage in stages:
        kind = rng.choices([kind for kind, _ in KINDS], [weight for _, weight in KINDS])[0]
        if kind == "worker" and any(kill.kind == "worker" for kill in kills):
            kind = "vanish"  # two faults in a row without a commit between them end a run, as they should
        kills.append(
            Kill(
                kind=kind,
                when=Instant(
                    stage, round(rng.random() * SHARES[stage], 4), rng.choice((1, 1, 2)) if stage == "save" else 1
                ),
                wipe=rng.random() < 0.5,
                # Every other notice is too short for anything but luck.
                notice_s=round(rng.choice((notice_s, min(1.0, notice_s) * rng.random())), 3) if kind == "notice" else 0,
                wake=round(rng.random(), 4) if kind == "zombie" else 0.0,
            )
        )
    return kills


def _in_order(kills: Sequence[Kill]) -> Run:
    """Kills at a run's end come last, since there is nothing left of it afterwards; the others as drawn."""
    return tuple(sorted(kills, key=lambda kill: isinstance(kill.when, Instant) and kill.when.stage in LATE))


def sooner(kill: Kill) -> Kill:
    """The same kill, earlier in its stage: it came too late."""
    assert isinstance(kill.when, Instant)
    return replace(kill, when=replace(kill.when, at=round(kill.when.at / 2, 4), nth=1))


def draw_boundaries(rng: Random, saves: int, keep: int, notice_s: float) -> list[Run]:
    """Each boundary once, in two runs. ``saves``: of the undisturbed run; ``keep``: commits that the bucket keeps."""

    def draw(name: str) -> Kill:
        nth = rng.choice((1, 2)) if name in SAVING and saves >= 2 * len(SAVING) else 1
        return Kill("vanish", Boundary(name, nth), wipe=rng.random() < 0.5, notice_s=notice_s)

    # A checkpoint is pruned when one more than the bucket keeps is committed, and only those of later attempts count.
    left_out = {"pruning"} if saves < keep + 2 else set()
    return [tuple(draw(name) for name in names if name not in left_out) for names in BOUNDARY_RUNS]


def for_plain(run: Run, rng: Random) -> Run:
    """The same moments for a program that has no boundaries, no guard, and its one disk for ever."""
    return _in_order([replace(kill, kind=_plain_kind(kill), when=_plain_moment(kill, rng), wipe=False) for kill in run])


def _plain_kind(kill: Kill) -> Kind:
    is_notice = kill.kind == "notice" or (isinstance(kill.when, Boundary) and kill.when.name == "noticed")
    return "notice" if is_notice else "vanish"


def _plain_moment(kill: Kill, rng: Random) -> Instant | After:
    if not isinstance(kill.when, Boundary):
        return kill.when
    name, at = kill.when.name, round(rng.random(), 4)
    if name in ("claimed", "restoring", "restored"):
        return Instant("start", at)
    if name == "noticed":
        return Instant("train", round(at * SHARES["train"], 4))
    if name.startswith("result-") or name == "certified":
        return Instant("end", round(at * SHARES["end"], 4))
    return Instant("save", at, kill.when.nth)
