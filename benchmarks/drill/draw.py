"""Schedules, all drawn from a seed before anything runs, so that a game day can be had again."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from drill.schedule import FAULTS, STAGES, After, Boundary, Instant, Kill, Kind, Run, Stage

KINDS: dict[Kind, int] = {"vanish": 14, "notice": 2, "guard": 2, "worker": 1, "loader": 1, "zombie": 1}  # weights
# A kill comes within this share of its stage: several have room in one training, and no two runs take equally long.
SHARES: dict[Stage, float] = {"start": 1.0, "train": 0.4, "save": 1.0, "end": 0.9}
# Two runs, each in an order that can be had: what needs a commit comes after one, the end comes last.
BOUNDARY_RUNS = (
    ("claimed", "snapshot", "written", "staged", "uploading", "uploaded", "noticed"),
    ("committed", "restoring", "restored", "pruning", "result-written", "result-uploaded", "result-read", "certified"),
)
SAVING = ("snapshot", "written", "staged", "uploading", "uploaded")
LATE = ("end",)


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
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        nth = rng.choice((1, 1, 2)) if stage == "save" else 1
        kills.append(
            Kill(
                kind=kind,
                when=Instant(stage, round(rng.random() * SHARES[stage], 4), nth),
                wipe=rng.random() < 0.5,
                # Every other notice is too short for anything but luck.
                notice_s=round(rng.choice((notice_s, min(1.0, notice_s) * rng.random())), 3) if kind == "notice" else 0,
                wake=round(rng.random(), 4) if kind == "zombie" else 0.0,
            )
        )
    return kills


def _in_order(kills: Sequence[Kill]) -> Run:
    """A run of these kills. Those at its end come last, since there is nothing left of it afterwards.

    Of faults there is one at most: two in a row without a commit between them end a run, as they should.
    """
    faults = [kill for kill in kills if kill.kind in FAULTS]
    ordered = sorted(kills, key=lambda kill: isinstance(kill.when, Instant) and kill.when.stage in LATE)
    return tuple(replace(kill, kind="vanish") if kill in faults[1:] else kill for kill in ordered)


def once_more(kills: Sequence[Kill], per_run: int) -> list[Run]:
    """Further runs for random instants that came too late, each earlier in its stage."""
    sooner = [
        replace(kill, when=replace(kill.when, at=round(kill.when.at / 2, 4), nth=1))
        for kill in kills
        if isinstance(kill.when, Instant)
    ]
    return [_in_order(sooner[at : at + per_run]) for at in range(0, len(sooner), per_run)]


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
