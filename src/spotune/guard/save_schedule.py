"""Decides when to save: measures what saves cost, computes the interval, and asks the ranks to save."""

import math
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from spotune.core.protocol import CONTROL, write_json
from spotune.guard.journal import Clock, Journal, log

RECENT = 50  # steps and saves that count
FEWEST = 3  # undisturbed steps before there is a median
X0_S = 0.7 * 3600
FLOOR_S = 30.0
CEILING_S = 1800.0
FIRST_COST_S = 1.0  # until a save has been measured: assume little, so that the first one comes soon
NOTEWORTHY = 1.5  # an interval that has changed by this factor is logged again


class SaveCost:
    """Measures what a save costs training: it stands still for the snapshot, and its steps are slower until the commit.

    Slower than the median of steps during which nothing was saved. ``known``: the record of earlier attempts.
    """

    def __init__(self, known: dict[str, float] | None = None) -> None:
        self._known = dict(known or {})
        self._calm: deque[float] = deque(maxlen=RECENT)
        names = ("stall_s", "slowdown_s", "write_s", "send_s")
        self._measured: dict[str, deque[float]] = {name: deque(maxlen=RECENT) for name in names}
        self._last_step_at: float | None = None
        self._saved_at: dict[int, float] = {}
        self._written_at: dict[int, float] = {}
        self._disturbed: list[float] = []
        self._bytes = 0.0

    def on_event(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "step":
                if self._last_step_at is not None:
                    (self._disturbed if self._saved_at else self._calm).append(event["t"] - self._last_step_at)
                self._last_step_at = event["t"]
            case "phase" if event["phase"] != "train":
                self._last_step_at = None  # what follows is not a step's time
            case "phase":
                self._last_step_at = event["t"]
            case "save":
                self._saved_at[event["step"]] = event["t"]
                self._measured["stall_s"].append(event["stall_s"])
            case "written" if event["step"] in self._saved_at:
                self._written_at[event["step"]] = event["t"]
                self._measured["write_s"].append(event["t"] - self._saved_at[event["step"]])
            case "commit" if event["step"] in self._written_at:
                self._commit(event)

    def _commit(self, event: dict[str, Any]) -> None:
        self._measured["send_s"].append(event["t"] - self._written_at.pop(event["step"]))
        self._bytes = event["bytes"]
        self._saved_at = {step: at for step, at in self._saved_at.items() if step > event["step"]}
        if len(self._calm) >= FEWEST:
            calm = statistics.median(self._calm)
            self._measured["slowdown_s"].append(max(0.0, sum(seconds - calm for seconds in self._disturbed)))
        self._disturbed = []

    @property
    def step_s(self) -> float | None:
        """The median of the steps during which nothing was saved, None before there were enough."""
        return statistics.median(self._calm) if len(self._calm) >= FEWEST else None

    @property
    def record(self) -> dict[str, float]:
        """Medians, and the ``bytes`` of the last save.

        ``stall_s``, ``slowdown_s``: what a save costs training; ``write_s``: from the snapshot to the local disk;
        ``send_s``: from there to the commit; ``step_s``: a step during which nothing is saved.
        """
        found = dict(self._known)
        found |= {name: round(statistics.median(values), 4) for name, values in self._measured.items() if values}
        if self.step_s is not None:
            found["step_s"] = round(self.step_s, 4)
        if self._bytes:
            found["bytes"] = self._bytes
        return found


@dataclass(frozen=True)
class Prior:
    """The hazard before this run's own preemptions: ``spells`` imagined ones with this sum of log(1 + t/X0)."""

    spells: float
    log_sum: float


# Public traces: alpha = 6 / 5 pooled over GPU zones of AWS and GCP. Not measured for Slurm, Kubernetes and others.
SPOT = Prior(6.0, 5.0)
STEADY = Prior(0.06, 5.0)  # on demand: a hundredth of that hazard


@dataclass(frozen=True)
class Inputs:
    """Everything that the interval depends on; seconds."""

    restore_s: float  # the last restore
    age_s: float  # since this machine began to work for the run
    spells_s: tuple[float, ...] = ()  # how long the run's preempted machines lasted
    prior: Prior = SPOT
    stall_s: float | None = None  # training stands still for a save; None: not measured yet
    slowdown_s: float | None = None  # slower steps until the commit
    upload_s: float = 0.0  # from the snapshot to the commit

    @property
    def cost_s(self) -> float:
        return FIRST_COST_S if self.stall_s is None else max(0.001, self.stall_s + (self.slowdown_s or 0.0))


def alpha(prior: Prior, spells_s: Sequence[float]) -> float:
    """Returns the tail's exponent after these uptimes: Gamma prior, Lomax likelihood with scale X0."""
    return (prior.spells + len(spells_s)) / (prior.log_sum + sum(math.log1p(spell / X0_S) for spell in spells_s))


def interval_s(inputs: Inputs) -> float:
    """Returns the seconds between two saves: Young's interval with a heavy tail (docs/explanation/checkpoints.md).

        interval = sqrt(2 * cost * (X0 + age) / alpha), within [max(upload, 30 s), 30 min]

    alpha / (X0 + age) stands for 1 / MTBF: a machine that has been up longer will stay longer. X0 and the prior are
    fitted to public spot traces. A restore's duration does not move the optimum. J. W. Young, CACM 1974.
    """
    hazard = alpha(inputs.prior, inputs.spells_s) / (X0_S + inputs.age_s)
    best = math.sqrt(2 * inputs.cost_s / hazard)
    return min(max(best, inputs.upload_s, FLOOR_S), CEILING_S)


def expected_waste(inputs: Inputs) -> float:
    """Returns the share of paid time that saves and preemptions are expected to take, at this interval and age."""
    interval = interval_s(inputs)
    hazard = alpha(inputs.prior, inputs.spells_s) / (X0_S + inputs.age_s)
    lost_s = interval / 2 + inputs.upload_s + inputs.restore_s
    return min(1.0, inputs.cost_s / interval + hazard * lost_s)


def explain(inputs: Inputs) -> str:
    if inputs.stall_s is None:
        cost = f"what a save costs is not measured yet, {FIRST_COST_S:g} s assumed"
    else:
        parts = f"stall {inputs.stall_s:.2g}, slower steps {inputs.slowdown_s or 0:.2g}"
        cost = f"a save costs {inputs.cost_s:.2g} s ({parts}) and is safe after {inputs.upload_s:.2g} s"
    lasted = ", ".join(_short(spell) for spell in inputs.spells_s[-3:])
    earlier = f"{len(inputs.spells_s)} taken away before it (lasted {lasted})" if lasted else "none taken away yet"
    return (
        f"saving every {_short(interval_s(inputs))}: {cost}; this machine is {_short(inputs.age_s)} old, {earlier},"
        f" alpha {alpha(inputs.prior, inputs.spells_s):.2f}; a restore takes {inputs.restore_s:.2g} s;"
        f" {100 * expected_waste(inputs):.1f} % of the time expected to be lost"
    )


def _short(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class ControlFile:
    """Writes ``control.json``, by which the guard asks its ranks to save or to stop."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / CONTROL
        self._stop, self._saves = False, 0
        self._write()

    def ask_to_save(self) -> None:
        self._saves += 1
        self._write()

    def ask_to_stop(self) -> None:
        """Asks for a stop at the next step boundary, with a checkpoint of that step."""
        self._stop = True
        self._write()

    def _write(self) -> None:
        write_json(self._path, {"stop": self._stop, "save": self._saves})


class SaveScheduler:
    """Asks for a save whenever the interval has passed since the last one; ``inputs``: at the start of training."""

    def __init__(
        self, inputs: Inputs, save_cost: SaveCost, control: ControlFile, journal: Journal, clock: Clock = time.time
    ) -> None:
        self._inputs, self._save_cost, self._control, self._journal = inputs, save_cost, control, journal
        self._clock = clock
        self._born_at, self._saved_at = clock() - inputs.age_s, clock()
        self._asked, self._logged_s = False, 0.0

    def on_event(self, event: dict[str, Any]) -> None:
        if event["event"] in ("save", "unsaved"):
            self._saved_at, self._asked = event["t"], False

    def save_if_due(self) -> None:
        """Asks for a save if one is due. Call it often while training runs."""
        measured = self._save_cost.record
        inputs = replace(
            self._inputs,
            stall_s=measured.get("stall_s"),
            slowdown_s=measured.get("slowdown_s"),
            upload_s=measured.get("write_s", 0.0) + measured.get("send_s", 0.0),
            age_s=self._clock() - self._born_at,
        )
        interval = interval_s(inputs)
        if not self._logged_s or not 1 / NOTEWORTHY < interval / self._logged_s < NOTEWORTHY:
            self._logged_s = interval
            log(explain(inputs))
            facts = {"interval_s": round(interval, 1), "floor_s": FLOOR_S, "ceiling_s": CEILING_S}
            self._journal.write("interval", **facts, **asdict(inputs))
        if not self._asked and self._clock() - self._saved_at >= interval:
            self._asked = True
            self._control.ask_to_save()
