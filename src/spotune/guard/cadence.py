"""When to save: a formula, its inputs, and the line that says both.

    interval = sqrt(2 * cost * (X0 + age) / alpha), within [max(upload, 30 s), 30 min]

This is Young's interval (J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 1974)
with the hazard of a heavy tail, alpha / (X0 + age), in the place of 1 / MTBF: spot machines live long or die young,
so the longer one has been up the longer it will stay. ``alpha`` is learned from the machines of this run that were
taken away, from a prior on. X0 and the prior are fitted to public spot traces (docs/checkpoints.md).

What a save costs is what training loses by it: it stands still for the snapshot, and its steps are slower while the
checkpoint is written and uploaded. How long a restore takes does not move the optimum; it is in the waste that is
expected, which is what the line in the log is for.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

X0_S = 0.7 * 3600
FLOOR_S = 30.0
CEILING_S = 1800.0
FIRST_COST_S = 1.0  # until a save has been measured: assume little, so that the first one comes soon


@dataclass(frozen=True)
class Prior:
    """What is known before this run's own machines tell: ``spells`` imagined ones with this sum of log(1 + t/X0)."""

    spells: float
    log_sum: float


# Public traces: alpha = 6 / 5 pooled over GPU zones of AWS and GCP. Not measured for Slurm, Kubernetes and others.
SPOT = Prior(6.0, 5.0)
STEADY = Prior(0.06, 5.0)  # on demand: a hundredth of that hazard


@dataclass(frozen=True)
class Inputs:
    """Everything that the interval depends on; seconds.

    Attributes:
        stall_s, slowdown_s: what a save costs training, standing still and in slower steps; None: not measured yet.
        upload_s: from the snapshot to the commit.
        restore_s: how long the last restore took.
        age_s: since this machine began to work for the run.
        spells_s: how long the run's earlier machines lasted that were taken away.
    """

    restore_s: float
    age_s: float
    spells_s: tuple[float, ...] = ()
    prior: Prior = SPOT
    stall_s: float | None = None
    slowdown_s: float | None = None
    upload_s: float = 0.0

    @property
    def cost_s(self) -> float:
        return FIRST_COST_S if self.stall_s is None else max(0.001, self.stall_s + (self.slowdown_s or 0.0))


def alpha(prior: Prior, spells_s: Sequence[float]) -> float:
    """The tail's exponent, after these spells: Gamma prior, Lomax likelihood with scale X0."""
    return (prior.spells + len(spells_s)) / (prior.log_sum + sum(math.log1p(spell / X0_S) for spell in spells_s))


def interval_s(inputs: Inputs) -> float:
    """Seconds between two saves."""
    hazard = alpha(inputs.prior, inputs.spells_s) / (X0_S + inputs.age_s)
    best = math.sqrt(2 * inputs.cost_s / hazard)
    return min(max(best, inputs.upload_s, FLOOR_S), CEILING_S)


def expected_waste(inputs: Inputs) -> float:
    """The share of paid time that saving and preemptions are expected to take, at this interval and age."""
    interval = interval_s(inputs)
    hazard = alpha(inputs.prior, inputs.spells_s) / (X0_S + inputs.age_s)
    lost_s = interval / 2 + inputs.upload_s + inputs.restore_s
    return min(1.0, inputs.cost_s / interval + hazard * lost_s)


def explain(inputs: Inputs) -> str:
    """One line for the log: the choice and its inputs."""
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
