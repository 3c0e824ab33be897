"""A month's budget: what has been spent and promised of it, and what it lets a run do."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from spotune.core.errors import InputError
from spotune.core.keys import Keys
from spotune.core.money import parse_usd
from spotune.core.records import ClusterRecord, Progress
from spotune.core.store import Store
from spotune.cost.account import bills_due, build_accounts, write_bills
from spotune.cost.collect import Month, Remaining, check_wall, read_month, within_month
from spotune.launch.engine import Submission
from spotune.launch.plan import Plan
from spotune.launch.settings import MonthlyBudget, Workspace
from tests.unit.cost.cases import RUN_ID, T, claim, price, run, three_attempts

# three_attempts: 70 s at $0.36 an hour, the run submitted in 2023-11
COST_USD = 70 * 0.36 / 3600
NEXT_MONTH = datetime(2023, 12, 1, tzinfo=UTC).timestamp()


def workspace(folder: Path, budgets: str) -> Workspace:
    (folder / "config").mkdir(exist_ok=True)
    (folder / "config/spotune.yaml").write_text(f"budgets: {budgets}\n")
    return Workspace.open({"SPOTUNE_HOME": str(folder / "home")}, folder)


def write(store: Store, run_id: str, shift_s: float = 0.0, **facts: Any) -> None:
    """A finished run of that name, all of it so much later."""
    run_data = three_attempts()
    store.create(Keys(run_id).run, run(run_id=run_id, **facts).to_bytes())
    for record in run_data.attempts:
        store.create(Keys(run_id).attempt(record.attempt), replace(record, run_id=run_id).to_bytes())
    bills = bills_due(run_data, build_accounts(run_data, T + 1000))
    write_bills(
        store,
        [
            replace(bill, run_id=run_id, started_at=bill.started_at + shift_s, ended_at=bill.ended_at + shift_s)
            for bill in bills
        ],
    )


def month(workspace: Workspace, run_id: str = "new", user: str = "ana", team: str = "", now: float = T + 900) -> Month:
    return read_month(workspace, run_id, user, team, now, warn=lambda message: None)


def test_the_months_cost_is_counted_by_user_and_team(tmp_path: Path) -> None:
    here = workspace(tmp_path, '{users: {ana: 1, "*": 0.5}, teams: {research: 0.01}}')
    write(here.store(), "run-a")
    write(here.store(), "run-b", user="bob")
    (ana, research) = month(here, team="research").left
    assert ana.budget.owner == "user ana"
    assert ana.usd == pytest.approx(1 - COST_USD)
    assert research.budget.owner == "team research"
    assert research.spent_usd == pytest.approx(2 * COST_USD)
    assert research.usd == 0.0
    (bob,) = month(here, user="bob").left  # by the star
    assert (bob.budget.owner, bob.budget.limit_usd, bob.spent_usd) == ("user bob", 0.5, pytest.approx(COST_USD))
    assert month(here, user="bob").tightest == bob


def test_a_user_without_a_budget_has_no_limit(tmp_path: Path) -> None:
    here = workspace(tmp_path, "{users: {ana: 1}}")
    assert month(here, user="bob", team="research") == Month(())
    assert month(here, user="bob").wall_usd(None) is None
    assert not (here.env.cache).exists()  # nothing was read for it


def test_an_attempt_over_the_turn_of_a_month_counts_in_both(tmp_path: Path) -> None:
    here = workspace(tmp_path, "{users: {ana: 1}}")
    # Its second attempt, 40 to 60 seconds after T, is moved over midnight: 10 seconds are of November.
    write(here.store(), "run-a", shift_s=NEXT_MONTH - (T + 50))
    november, december = (month(here, now=at).left[0] for at in (NEXT_MONTH - 1, NEXT_MONTH + 900))
    assert (november.month, december.month) == ("2023-11", "2023-12")
    assert december.spent_usd == pytest.approx(COST_USD * 40 / 70)
    assert month(here, now=NEXT_MONTH + 40 * 86400.0).left[0].spent_usd == 0.0


def test_a_budget_promised_to_a_run_under_way_is_not_available(tmp_path: Path) -> None:
    here = workspace(tmp_path, "{users: {ana: 1}}")
    now = T + 40.0
    beat = Progress(run_id="busy", attempt=1, phase="train", at=now - 1.0)
    here.store().write(Keys("busy").progress, beat.to_bytes())
    here.store().create(Keys("busy").run, run(run_id="busy", budget_usd=0.4).to_bytes())
    here.store().create(Keys("busy").attempt(1), replace(claim(1, 10.0), run_id="busy").to_bytes())
    (left,) = month(here, now=now).left
    assert (left.runs, left.usd) == (1, pytest.approx(0.6))
    assert left.spent_usd + left.promised_usd == pytest.approx(0.4)
    assert "promised to 1 run" in str(left)
    (own,) = month(here, "busy", now=now).left
    assert own.promised_usd == 0.0


def test_an_idle_cluster_counts_in_its_owners_month(tmp_path: Path) -> None:
    here = workspace(tmp_path, "{users: {ana: 1}}")
    day = 86400.0
    cluster = ClusterRecord(
        name="dev-ana", cluster_hash="h", launched_at=NEXT_MONTH - day, owner="ana", updated_at=NEXT_MONTH + day,
        price=vars(price(False, 0.01)), spans=[[NEXT_MONTH - day, NEXT_MONTH + day / 2]],
    )  # fmt: skip
    here.store().write(cluster.key, cluster.to_bytes())
    (left,) = month(here, now=NEXT_MONTH + day).left
    assert left.spent_usd == pytest.approx(0.01 * 12)  # the half day that is December's
    (bob,) = month(workspace(tmp_path, "{users: {bob: 1}}"), user="bob", now=NEXT_MONTH + day).left
    assert bob.spent_usd == 0.0


def left(limit: float, spent: float, owner: str = "user ana") -> Remaining:
    budget = MonthlyBudget(owner, limit, f"budgets.{owner}", "config/spotune.yaml")
    return Remaining(budget, "2026-11", spent, 0.0, 0)


def plan(budget_usd: float | None = None, usd_per_hour: float = 0.36) -> Plan:
    offer = price(True, usd_per_hour)
    submission = Submission(RUN_ID, {}, ".", "ana", "local", 0)
    return Plan(run(budget_usd=budget_usd), submission, "file:///b", "local", Path("t"), [offer], offer)


def test_a_run_without_a_budget_gets_the_rest_as_its_limit() -> None:
    planned = within_month(plan(), Month((left(10, 4), left(5, 2, "team nlp"))))
    assert planned.record.wall_usd == 3.0
    assert planned.record.month_of == "team nlp"
    assert planned.notes == ("team nlp has $3.00 left of $5.00 in 2026-11: $2.00 spent",)


def test_the_cost_of_the_run_so_far_does_not_count_twice() -> None:
    stands = {"state": "PAUSED", "cost_usd": 2.5}
    assert within_month(plan(), Month((left(10, 4),), stands)).record.wall_usd == 8.5
    assert within_month(plan(8.5), Month((left(10, 4),), stands)).record.wall_usd == 8.5
    with pytest.raises(
        InputError, match=r"^--budget: \$8.60 is more than is left: user ana has \$6.00 left of \$10.00"
    ):
        within_month(plan(8.6), Month((left(10, 4),), stands))


def test_a_run_that_cannot_be_paid_is_refused_with_the_figures() -> None:
    with pytest.raises(InputError, match=r"config/spotune.yaml: budgets.user ana: user ana has \$0.00 left of \$10.00"):
        within_month(plan(), Month((left(10, 11),)))
    with pytest.raises(InputError, match=r"\(--budget 6.00 at most, or raise budgets.user ana\)"):
        within_month(plan(7), Month((left(10, 4),)))


@pytest.mark.parametrize(
    ("limit", "spent", "own", "most"),
    [
        (10, 3.994, 0, "6.00"),
        (2000, 1, 0, "1999.00"),
        (10, 9.7, 0.6, "0.90"),
        (1, 0.9958, 0, "0.004200"),
        (1, 0.998, 5.004, "5.006000"),
    ],
)
def test_the_suggested_budget_is_accepted(limit: float, spent: float, own: float, most: str) -> None:
    month = Month((left(limit, spent),), {"state": "PAUSED", "cost_usd": own})
    with pytest.raises(InputError, match=rf"\(--budget {most} at most"):
        month.wall_usd(9999)
    assert month.wall_usd(parse_usd(most, "--budget")) is None


def test_a_budget_of_exactly_the_rest_is_accepted() -> None:
    assert Month((left(0.31, 0),), {"state": "PAUSED", "cost_usd": 0.58}).wall_usd(0.58 + 0.31) is None
    assert Month((left(0.3, 0.1),), {"state": "PAUSED", "cost_usd": 0.1}).wall_usd(0.3) is None


def test_the_warning_comes_at_80_percent() -> None:
    assert not left(10, 7.9).is_low
    assert left(10, 8).is_low
    low = left(10, 9, "team nlp")
    planned = within_month(plan(0.5), Month((left(1, 0.2), low)))
    assert planned.notes == ("user ana has $0.80 left of $1.00 in 2026-11: $0.20 spent", str(low))


def test_free_runs_and_runs_under_way_are_not_checked() -> None:
    empty = left(10, 11)
    assert within_month(plan(usd_per_hour=0.0), Month((empty,))) == plan(usd_per_hour=0.0)
    assert within_month(plan(), Month((empty,), {"state": "RUNNING", "cost_usd": 1.0})) == plan()


def test_a_run_that_paused_just_before_its_limit_needs_a_higher_one() -> None:
    report = {"run_id": "run-a", "state": "PAUSED", "budget_usd": 5.0, "cost_usd": 4.9}
    for wanted in (None, 5.0):
        with pytest.raises(InputError, match=r"has cost \$4.90 of \$5.00 \(.* --budget, above \$5.00\)$"):
            check_wall(report, wanted)
    check_wall(report, 5.1)
    check_wall({**report, "state": "FAILED"}, None)
