"""When a budget's wall is reached, on a clock that stands still until the test moves it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from spotune.core.keys import Keys
from spotune.core.store import Store
from spotune.guard.budget import Budget, BudgetLimit
from spotune.guard.journal import Journal
from spotune.guard.save_schedule import SaveCost

T = 1000.0
BUDGET = Budget(limit_usd=10.0, earlier_usd=4.0, usd_per_s=0.01, paid_since=T)  # 600 s more


class Training:
    """An attempt's journal and toll, and the wall that looks at them."""

    def __init__(self, folder: Path) -> None:
        self.now, self.store, self.keys = T, Store(f"file://{folder}/bucket"), Keys("run-a")
        self.journal = Journal(self.store, self.keys, 1, folder / "events-0.jsonl")
        self.save_cost = SaveCost()

    def wall(self, budget: Budget | None = BUDGET) -> BudgetLimit:
        return BudgetLimit(budget, self.journal, self.save_cost, clock=lambda: self.now)

    def save(self, stall_s: float, write_s: float, send_s: float) -> None:
        """A save, as the toll sees it."""
        self.save_cost.on_event({"event": "save", "step": 1, "t": T, "stall_s": stall_s})
        self.save_cost.on_event({"event": "written", "step": 1, "t": T + write_s})
        self.save_cost.on_event({"event": "commit", "step": 1, "t": T + write_s + send_s, "bytes": 1})


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Training]:
    training = Training(tmp_path)
    yield training
    training.journal.close()


def looks(training: Training, wall: BudgetLimit, *seconds: float) -> list[bool]:
    found = []
    for after_s in seconds:
        training.now = T + after_s
        found.append(wall.check())
    return found


def test_the_wall_is_reached_when_all_is_spent_and_not_before(training: Training) -> None:
    wall = training.wall()
    assert looks(training, wall, 0, 300, 599.9) == [False, False, False]
    assert not wall.reached
    assert looks(training, wall, 600.1) == [True]
    assert wall.reached
    assert wall.reason(7) == "budget of $10.00 used up at step 7: $10.00 spent"


def test_what_stopping_takes_is_paid_for_too(training: Training) -> None:
    training.save(stall_s=10.0, write_s=20.0, send_s=30.0)
    for step in range(1, 5):  # and a step of 5 s is under way
        training.save_cost.on_event({"event": "step", "step": step, "t": T + 100 + 5 * step})
    assert looks(training, training.wall(), 534.9, 535.1) == [False, True]


def test_the_warning_comes_once_at_80_percent(training: Training, capsys: pytest.CaptureFixture[str]) -> None:
    wall = training.wall()
    looks(training, wall, 399.9)
    assert capsys.readouterr().err == ""
    looks(training, wall, 400.1, 500, 550)
    assert capsys.readouterr().err == "[spotune] 80% of the budget of $10.00 used up\n"
    training.journal.close()
    parts = [training.store.read(key) or b"" for key in training.store.keys(training.keys.attempts)]
    events = [json.loads(line) for part in parts for line in part.splitlines() if b'"budget"' in line]
    assert [(event["spent_usd"], event["budget_usd"]) for event in events] == [(8.001, 10.0)]


def test_a_run_that_has_made_all_its_steps_is_not_stopped(training: Training) -> None:
    training.journal.write("phase", phase="teardown")
    assert looks(training, training.wall(), 10_000) == [False]


def test_a_run_without_a_budget_is_not_stopped(training: Training) -> None:
    assert looks(training, training.wall(None), 1e9) == [False]


def test_what_a_month_has_left_is_named(training: Training) -> None:
    wall = training.wall(Budget(2.0, 0.0, 1.0, T, month_of="user ana"))
    assert looks(training, wall, 3) == [True]
    assert wall.reason(0) == "$2.00 that user ana had left this month used up at step 0: $3.00 spent"


def test_what_earlier_attempts_have_spent_may_be_all(training: Training) -> None:
    assert looks(training, training.wall(Budget(2.0, 2.0, 0.0, T)), 0) == [True]


def test_a_clock_that_goes_back_gives_nothing_back() -> None:
    assert BUDGET.spent_usd(T - 100) == 4.0
