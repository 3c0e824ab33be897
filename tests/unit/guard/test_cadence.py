"""How often to save, what saving costs, and who is asked when."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotune.core.keys import Keys
from spotune.core.protocol import CONTROL, read_json
from spotune.core.store import Store
from spotune.guard.journal import Journal
from spotune.guard.save_schedule import (
    CEILING_S,
    FLOOR_S,
    SPOT,
    STEADY,
    X0_S,
    ControlFile,
    Inputs,
    SaveCost,
    SaveScheduler,
    alpha,
    expected_waste,
    explain,
    interval_s,
)

HOUR = 3600.0


@pytest.mark.parametrize(
    ("cost_s", "age_h", "minutes"),
    [(2, 0, 1.5), (2, 2.5, 3.3), (2, 7.5, 5), (30, 0, 6), (30, 2.5, 13), (30, 7.5, 20), (120, 0, 12), (120, 2.5, 25)],
)
def test_the_intervals_that_were_replayed_on_traces(cost_s: float, age_h: float, minutes: float) -> None:
    found = interval_s(Inputs(restore_s=9, age_s=age_h * HOUR, stall_s=cost_s))
    assert found / 60 == pytest.approx(minutes, rel=0.06)


def test_the_bounds() -> None:
    def interval(**changes: Any) -> float:
        return interval_s(Inputs(**{"restore_s": 0.0, "age_s": 0.0, "stall_s": 0.001, **changes}))

    assert interval() == FLOOR_S
    assert interval(upload_s=200.0) == 200.0  # one upload at a time
    assert interval(stall_s=600.0, age_s=9 * HOUR) == CEILING_S
    assert interval(stall_s=30.0, prior=STEADY) == CEILING_S
    assert interval(stall_s=30.0, restore_s=500.0) == interval(stall_s=30.0)


def test_short_lives_make_it_more_frequent() -> None:
    assert alpha(SPOT, ()) == pytest.approx(1.2)
    short, long = alpha(SPOT, (600.0,) * 6), alpha(SPOT, (20 * HOUR,) * 6)
    assert long < 1.2 < short
    assert alpha(SPOT, (X0_S * (math.e - 1),)) == pytest.approx(7 / 6)


positive = st.floats(0.001, 1e5)


@given(positive, positive, positive, positive, st.lists(positive, max_size=5))
def test_whatever_goes_in(stall_s: float, upload_s: float, age_s: float, restore_s: float, spells: list[float]) -> None:
    inputs = Inputs(restore_s, age_s, tuple(spells), stall_s=stall_s, slowdown_s=0.0, upload_s=upload_s)
    assert FLOOR_S <= interval_s(inputs) <= CEILING_S
    assert 0 < expected_waste(inputs) <= 1
    assert "\n" not in explain(inputs)


def feed(save_cost: SaveCost, *events: tuple[float, str, dict[str, Any]]) -> None:
    for at, event, fields in events:
        save_cost.on_event({"t": at, "event": event, **fields})


def test_what_a_save_costs_is_counted_whole() -> None:
    save_cost = SaveCost({"stall_s": 9.0, "bytes": 5.0})
    assert save_cost.record == {"stall_s": 9.0, "bytes": 5.0}  # of the machine before, until this one has its own
    feed(save_cost, (0.0, "phase", {"phase": "train"}), *((float(n), "step", {"step": n}) for n in range(1, 6)))
    assert save_cost.step_s == 1.0
    feed(
        save_cost,
        (5.1, "phase", {"phase": "save"}),
        (5.3, "save", {"step": 5, "stall_s": 0.2}),
        (5.3, "phase", {"phase": "train"}),
        (6.3, "written", {"step": 5}),
        (6.8, "step", {"step": 6}),  # 1.5 s instead of 1
        (8.1, "step", {"step": 7}),  # 1.3
        (8.3, "commit", {"step": 5, "bytes": 100}),
        (9.1, "step", {"step": 8}),
    )
    expected = {"stall_s": 0.2, "slowdown_s": 0.8, "write_s": 1.0, "send_s": 2.0, "step_s": 1.0, "bytes": 100}
    assert save_cost.record == pytest.approx(expected)


def test_an_evaluation_is_no_slow_step() -> None:
    save_cost = SaveCost()
    feed(save_cost, (0.0, "phase", {"phase": "train"}), *((float(n), "step", {"step": n}) for n in range(1, 6)))
    feed(save_cost, (5.0, "phase", {"phase": "eval"}), (60.0, "phase", {"phase": "train"}), (61.0, "step", {"step": 6}))
    assert save_cost.step_s == 1.0


def test_a_save_is_asked_for_once_and_in_time(
    local_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [1000.0]
    journal, save_cost = Journal(local_store, Keys("a-run"), 1, tmp_path / "events"), SaveCost()
    save_scheduler = SaveScheduler(
        Inputs(restore_s=1.0, age_s=100.0), save_cost, ControlFile(tmp_path), journal, clock=lambda: now[0]
    )
    asked = []
    for _ in range(400):
        save_scheduler.save_if_due()
        asked.append(read_json(tmp_path / CONTROL)["save"])
        now[0] += 1.0
    first = asked.index(1)
    assert first == pytest.approx(interval_s(Inputs(restore_s=1.0, age_s=150.0)), abs=3)
    assert asked[-1] == 1  # it was not answered
    save_scheduler.on_event({"t": now[0], "event": "save"})
    now[0] += 300.0
    save_scheduler.save_if_due()
    assert read_json(tmp_path / CONTROL) == {"stop": False, "save": 2}
    journal.close()
    assert capsys.readouterr().err.count("saving every") == 1
