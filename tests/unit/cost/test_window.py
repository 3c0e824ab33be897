"""What was paid since a time: runs, days and idle clusters are cut there."""

import json
from pathlib import Path
from typing import Any

import pytest

from spotune.core.keys import Keys
from spotune.core.records import AttemptRecord, ClusterRecord
from spotune.core.store import Store
from spotune.cost.collect import all_runs
from spotune.cost.dev_clusters import charges_since, clip, paid_since
from spotune.cost.export import By, focus_rows, group
from spotune.cost.index import Index
from spotune.launch.settings import Workspace
from tests.unit.cost.cases import T, event, phase, price, run, three_attempts
from tests.unit.cost.test_index import write

HOUR = 3600.0


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open({"SPOTUNE_HOME": str(tmp_path / "home")}, tmp_path)


def paid(workspace: Workspace, since: float, by: By) -> dict[str, dict[str, Any]]:
    found = all_runs(
        workspace, lambda index: paid_since(workspace.store(), index, since, pytest.fail), now=T + 30 * HOUR
    )
    return {row[by]: row for row in group(by, found.runs, found.attempts, found.idle)}


def test_an_earlier_run_counts_with_what_was_paid_since(workspace: Workspace) -> None:
    write(workspace.store(), "run-a", three_attempts())  # paid 10-30, 40-60 and 65-95
    whole = paid(workspace, T - 1, "user")["ana"]
    assert (whole["paid_s"], whole["cost_usd"]) == (70, pytest.approx(0.007))
    assert whole["on_demand_usd"] is not None
    part = paid(workspace, T + 50, "user")["ana"]
    assert (part["paid_s"], part["cost_usd"], part["runs"]) == (40, pytest.approx(0.004), 1)
    assert part["on_demand_usd"] is None  # known of the whole run only
    assert paid(workspace, T + 50, "day")["2023-11-14"]["paid_s"] == 40
    assert paid(workspace, T + 96, "user") == {}


def test_focus_has_whole_charges_of_what_was_paid_since(workspace: Workspace) -> None:
    write(workspace.store(), "run-a", three_attempts())
    cluster(workspace.store(), hours=0.02, seen=1)  # idle for 72 s
    found = all_runs(
        workspace, lambda index: charges_since(workspace.store(), index, T + 50, pytest.fail), now=T + 1000
    )
    assert [totals["run_id"] for _, totals in found.runs] == ["run-a"]
    assert [attempt["paid_s"] for _, attempt in found.attempts] == [20, 30]
    assert [piece["paid_s"] for piece in found.idle] == [pytest.approx(72)]


def test_attempts_are_cut_at_the_start_in_proportion() -> None:
    attempt = {"started_at": T, "paid_s": 40.0, "useful_s": 20.0, "cost_usd": None}
    ((_, cut),) = clip([("a", attempt)], T + 30)
    assert cut == {"started_at": T + 30, "paid_s": 10.0, "useful_s": 5.0, "cost_usd": None}
    assert list(clip([("a", attempt)], T + 40)) == []
    assert list(clip([("a", attempt)], T)) == [("a", attempt)]


def cluster(store: Store, hours: float, seen: float) -> None:
    """It is up from T on, for $1 an hour; SkyPilot was last asked after ``seen`` hours."""
    record = ClusterRecord(
        name="dev-ana", cluster_hash="h", launched_at=T, owner="ana", updated_at=T + seen * HOUR,
        price=vars(price(False, 1.0)), spans=[[T, None if hours > seen else T + hours * HOUR]],
    )  # fmt: skip
    store.write(record.key, record.to_bytes())


def dev_run(store: Store, start: float, end: float) -> None:
    keys = Keys("dev-run")
    store.create(keys.run, run(run_id="dev-run", user="ben", kind="dev", prices=[], created_at=T).to_bytes())
    at = T + start * HOUR
    claimed = AttemptRecord(run_id="dev-run", attempt=1, claimed_at=at, claim_id="c", cluster_name="dev-ana")
    store.create(keys.attempt(1), claimed.to_bytes())
    ended = event(end * HOUR, "end", reason="failed", exit_code=1)
    lines = [phase(start * HOUR, "train"), ended]
    store.create(keys.events(1, 0, 0), "\n".join(map(json.dumps, lines)).encode())


def test_idle_time_is_cut_where_it_was(workspace: Workspace) -> None:
    cluster(workspace.store(), hours=10, seen=20)
    dev_run(workspace.store(), 5, 10)  # idle for the first five hours
    assert paid(workspace, T - 1, "user")["ana"]["idle_usd"] == pytest.approx(5.0)
    late = paid(workspace, T + 4 * HOUR, "user")
    assert late["ana"]["idle_usd"] == pytest.approx(1.0)
    assert late["ben"]["cost_usd"] == pytest.approx(5.0)
    assert paid(workspace, T + 7 * HOUR, "user")["ben"]["cost_usd"] == pytest.approx(3.0)


def test_time_after_a_cluster_is_gone_is_never_charged(workspace: Workspace) -> None:
    cluster(workspace.store(), hours=10, seen=20)
    dev_run(workspace.store(), 5, 10.05)  # the clocks differ
    costs = [paid(workspace, T + at * HOUR, "user")["ben"]["cost_usd"] for at in (0, 9, 9.99, 10.001)]
    assert costs == pytest.approx([5.0, 1.0, 0.01, 0.0])


def test_a_dev_run_read_before_its_cluster_was_booked_gets_a_price(workspace: Workspace) -> None:
    def cost(index: Index) -> Any:
        return [totals["cost_usd"] for _, totals in index.runs(0.0)]

    def charges(index: Index) -> list[dict[str, Any]]:
        cluster(workspace.store(), hours=10, seen=20)  # by another launcher, just now
        ((_, totals),) = index.runs(0.0)
        found = charges_since(workspace.store(), index, T, pytest.fail)
        return list(focus_rows(totals, [attempt for _, attempt in found.attempts], "file:///b"))

    dev_run(workspace.store(), 1, 2)
    assert all_runs(workspace, cost, now=T + 30 * HOUR) == [None]
    (charge,) = all_runs(workspace, charges, now=T + 30 * HOUR)
    assert (charge["BilledCost"], charge["ListUnitPrice"], charge["PricingQuantity"]) == ("1", "1", "1")
    assert charge["x_PriceSource"] == "local price table"
    assert all_runs(workspace, cost, now=T + 30 * HOUR) == [1.0]


def test_a_run_longer_than_its_clusters_record_keeps_its_own_cost(workspace: Workspace) -> None:
    cluster(workspace.store(), hours=10, seen=1)  # SkyPilot cannot be asked here
    dev_run(workspace.store(), 0.5, 8.5)
    assert paid(workspace, T - 1, "user")["ben"]["cost_usd"] == pytest.approx(8.0)
