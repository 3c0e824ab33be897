"""From events to seconds: how long the stages of an attempt take, and what each recovery was made of."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from drill.played import Life
from drill.watch import begins
from spotune.core.protocol import Event

# From the launch of the machine after a kill to the first step that had not been made before.
RECOVERY = ("launch", "load", "restore wait", "first step", "replay")


@dataclass(frozen=True)
class Pace:
    """How long the stages of an undisturbed attempt take (see schedule.Stage), and what it does in all."""

    start_s: float
    train_s: float
    save_s: float
    end_s: float
    life_s: float
    steps: int
    saves: int

    def stage_s(self, stage: str) -> float:
        return {"start": self.start_s, "train": self.train_s, "save": self.save_s, "end": self.end_s}[stage]


@dataclass(frozen=True)
class Measure:
    """What the undisturbed run was like; every other one must end with its weights."""

    pace: Pace
    weights: str


def pace_of(life: Life, told: Sequence[Event]) -> Pace:
    """The pace of an undisturbed attempt; ``told``: its events in the bucket, for when saves were committed."""
    begun = _first(life.events, "train", life.ended_at)
    end = _first(life.events, "end", life.ended_at)
    starts = [event["t"] for event in life.events if begins(event, "save")]
    done = [event["t"] for event in (told or life.events) if event["event"] == ("commit" if told else "save")]
    took = [min((at - start for at in done if at >= start), default=0.0) for start in starts]
    return Pace(
        start_s=begun - life.launched_at,
        train_s=end - begun,
        save_s=max(took, default=0.0),
        end_s=life.ended_at - end,
        life_s=life.seconds,
        steps=life.last_step,
        saves=len(starts),
    )


def replayed(lives: Sequence[Life]) -> int:
    """Steps that were made again since what came of them before was lost."""
    done, again = 0, 0
    for life in lives:
        again += sum(step <= done for step in life.steps)
        done = max(done, life.last_step)
    return again


def useful_s(lives: Sequence[Life]) -> float:
    """Seconds in which steps were made for the first time, what is saved and evaluated between them included."""
    done, seconds = 0, 0.0
    for life in lives:
        before = _first(life.events, "train", life.ended_at)
        for event in life.events:
            if event["event"] == "step":
                if int(event["step"]) > done:
                    seconds += event["t"] - before
                    done = int(event["step"])
                before = event["t"]
    return seconds


def recoveries(lives: Sequence[Life], claims: Sequence[float]) -> list[dict[str, float]]:
    """Seconds by phase of RECOVERY for each launch after a loss that got to a new step, and their ``total``.

    ``claims``: when attempts were claimed; without them (plain TRL) launching is a part of loading.
    """
    found: list[dict[str, float]] = []
    done = 0
    for index, life in enumerate(lives):
        if index and (one := _recovery(life, done, claims)):
            found.append(one)
        done = max(done, life.last_step)
    return found


def _recovery(life: Life, done: int, claims: Sequence[float]) -> dict[str, float] | None:
    steps = [event for event in life.events if event["event"] == "step"]
    new_at = next((event["t"] for event in steps if int(event["step"]) > done), None)
    if new_at is None:
        return None
    claimed_at = next((at for at in claims if life.launched_at <= at <= life.ended_at), life.launched_at)
    begun = _first(life.events, "train", steps[0]["t"])
    # The worker is ready and the checkpoint is not here yet; what Trainer then does with it belongs here too.
    waits = [event["t"] for event in life.events if event["event"] == "phase" and event.get("phase") == "restore"]
    ready = waits[0] if waits else begun
    marks = [life.launched_at, claimed_at, ready, begun, steps[0]["t"], new_at]
    seconds = [after - before for before, after in pairwise(marks)]
    return {**dict(zip(RECOVERY, seconds, strict=True)), "total": new_at - life.launched_at}


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and worst."""
    if not values:
        return {}
    return {"median": round(statistics.median(values), 3), "max": round(max(values), 3)}


def _first(events: Sequence[Event], stage: str, otherwise: float) -> float:
    return next((float(event["t"]) for event in events if begins(event, stage)), otherwise)
