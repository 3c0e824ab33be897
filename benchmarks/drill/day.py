"""What a game day is asked to be, and the whole of it: contenders, schedule, scorecards."""

from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from drill.draw import draw_boundaries, draw_random, for_plain
from drill.game import Game
from drill.plainrun import PlainRun, plain_config
from drill.schedule import Run
from drill.scorecard import score
from drill.servers import reach_bucket
from drill.show import Board
from drill.spotrun import SpotRun, run_id_of
from drill.timeline import Measure
from drill.trace import SECONDS_PER_HOUR, read_trace, trace_run
from spotune.core.config import load_config
from spotune.core.errors import InputError
from spotune.guard.checkpoints import KEEP, LEAST

NOTICE_S = 30.0
WANTED = "random:N, boundaries, or trace:FILE[@SECONDS]"


@dataclass(frozen=True)
class Day:
    """The command line of gameday.py."""

    config: str
    schedule: str
    profile: str = ""
    sets: tuple[str, ...] = ()
    per_run: int = 4
    bucket: str = "file"
    lanes: int = 2
    notice_s: float = 0.0
    with_plain: bool = False

    def __post_init__(self) -> None:
        for name, value in (("--kills-per-run", self.per_run), ("--lanes", self.lanes)):
            if value < 1:
                raise InputError(name, f"{value} is too small", remedy="at least 1")
        kind, _, rest = self.schedule.partition(":")
        if kind == "random" and not (rest.isdigit() and int(rest)):
            raise InputError("--schedule", f"{rest!r} is not a number of kills", remedy=WANTED)
        if kind not in ("random", "boundaries", "trace") or (kind == "boundaries") == bool(rest):
            raise InputError("--schedule", f"{self.schedule!r} is not known", remedy=WANTED)

    def arguments(self) -> list[str]:
        """The words after ``python -m spotune.sft``."""
        profile = ["--profile", self.profile] if self.profile else []
        return [self.config, *profile, *(word for one in self.sets for word in ("--set", one))]

    def draw(self, rng: Random, measure: Measure) -> list[Run]:
        """The schedule, for a run that is like this one when nothing disturbs it."""
        kind, _, rest = self.schedule.partition(":")
        if kind == "random":
            return draw_random(int(rest), self.per_run, rng, self.notice_s or NOTICE_S)
        if kind == "boundaries":
            keep = max(LEAST, int(load_config(self.config, self.profile, self.sets).get("save_total_limit") or KEEP))
            return draw_boundaries(rng, measure.pace.saves, keep, self.notice_s or NOTICE_S)
        file, seconds_per_hour = self.trace
        return [trace_run(*read_trace(file), seconds_per_hour, self.notice_s, rng)]

    def check(self) -> None:
        """Reads what the day needs; raises InputError, before anything has run."""
        load_config(self.config, self.profile, self.sets)
        if self.schedule.startswith("trace:"):
            read_trace(self.trace[0])

    @property
    def trace(self) -> tuple[Path, float]:
        """A trace's file, and how many seconds an hour of it takes. Raises InputError."""
        rest = self.schedule.partition(":")[2]
        file, _, scale = rest.rpartition("@") if "@" in rest else (rest, "", "")
        try:
            seconds = float(scale) if scale else SECONDS_PER_HOUR
        except ValueError as error:
            raise InputError("--schedule", f"{scale!r} is not a number of seconds", remedy=WANTED) from error
        if seconds <= 0:
            raise InputError("--schedule", f"an hour cannot take {seconds:g} s", remedy=WANTED)
        return Path(file), seconds


def play_day(day: Day, rng: Random, folder: Path, environ: MutableMapping[str, str]) -> list[dict[str, Any]]:
    """Plays it all; returns the scorecards, spotune's first. Raises InputError, DrillError."""
    day.check()
    folder.mkdir(parents=True, exist_ok=True)
    environ.setdefault("OMP_NUM_THREADS", "1")  # the same for all runs, or none is like another; lanes share the cores
    with reach_bucket(day.bucket, folder) as bucket:
        environ.update(bucket.environ)  # the clients of the stores look there
        seed = f"{rng.getrandbits(32):08x}"

        def make(name: str) -> SpotRun:
            return SpotRun(run_id_of("gd", seed, name), day.arguments(), bucket, environ)

        game = Game(make, folder / "spotune", Board("spotune"), day.lanes)
        measure = game.undisturbed()
        runs = day.draw(rng, measure)
        cards = [score("spotune", game.play(runs, measure), measure)]
    if day.with_plain:
        place = folder / "plain"
        config = plain_config(day.config, day.profile, day.sets, place / "data")
        game = Game(lambda name: PlainRun(place / "runs" / name, config, environ), place, Board("plain TRL"), day.lanes)
        measure = game.undisturbed()
        cards.append(score("plain TRL", game.play([for_plain(run, rng) for run in runs], measure), measure))
    return cards
