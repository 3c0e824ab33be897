"""A preempted job's report on real SkyPilot: its seconds and dollars are SkyPilot's rows at the frozen price."""

import json
from pathlib import Path

import pytest

from spotune.core.keys import Keys
from spotune.core.store import Store
from tests.lab import sky
from tests.lab.conftest import MACHINE, Spotune
from tests.lab.daemons import wait_until
from tests.lab.layout import Layout
from tests.lab.managed import START_S

pytestmark = pytest.mark.lab
CONFIG = "config/runs/demo.yaml"
USD_PER_HOUR = 0.25  # tests/lab/sky_home.py: an L4 in the partition `spot`


def test_a_preempted_jobs_dollars_are_skypilots_rows_at_the_frozen_price(
    lab: Layout, spotune: Spotune, tmp_path: Path
) -> None:
    store, keys = Store(f"file://{lab.shared}/verbs-{tmp_path.name}"), Keys("dollars")
    words = ["--name", "dollars", "--set", "max_steps=80", "-y", "-d", "--env", f"SPOTUNE_PYTHON={lab.job_python}"]
    spotune("train", CONFIG, *MACHINE, *words)
    wait_until(lambda: bool(store.keys(keys.commits)), START_S, "it has not committed a checkpoint")
    spotune("preempt", "dollars", "--notice", "25s")
    spotune("logs", "dollars", "--follow")
    # The job ends before its machine does: until then the report has the job's end, to a fraction of a second.
    wait_until(lambda: None not in [end for _, end in sky.paid(lab, "dollars")], START_S, "its machine is not gone")

    report = json.loads(spotune("cost", "dollars", "--format", "json"))
    assert report["state"] == "SUCCEEDED"
    spans = sky.paid(lab, "dollars")
    assert len(report["attempts"]) == len(spans) == 2
    assert all(end is not None for _, end in spans)
    seconds = sum((end or 0.0) - start for start, end in spans)
    assert report["paid_s"] == pytest.approx(seconds, abs=0.01)
    assert report["unreconciled_s"] == 0
    assert report["cost_usd"] == pytest.approx(seconds / 3600 * USD_PER_HOUR, rel=1e-6)
    phases = report["phases"]
    assert sum(phases.values()) - phases["queue_s"] == pytest.approx(seconds, abs=max(1.0, seconds / 100))
    assert min(phases.values()) >= 0
    (lost,) = report["preemptions"]
    assert lost["end_reason"] == "preempted"
    assert 0 < lost["cost_usd"] < report["cost_usd"]
    assert report["on_demand_usd"] > 0

    bills = [store.read(keys.bill(number)) for number in (1, 2)]
    config = lab.home / ".sky" / "config.yaml"
    kept = config.read_text()
    config.write_text(kept.replace("L4: 0.25", "L4: 25.0").replace("L4: 0.80", "L4: 80.0"))
    try:
        dearer = json.loads(spotune("cost", "dollars", "--format", "json"))
    finally:
        config.write_text(kept)
    assert dearer | {"reported_at": 0} == report | {"reported_at": 0}
    assert [store.read(keys.bill(number)) for number in (1, 2)] == bills
    assert None not in bills
    (row,) = json.loads(spotune("cost", "--format", "json"))
    assert row["cost_usd"] == report["cost_usd"]
