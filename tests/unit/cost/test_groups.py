"""Chargeback and FOCUS: sums that lose nothing, and a file that other tools take."""

import csv
import io
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotune.core.io import columns, plain
from spotune.cost.export import (
    BY,
    FOCUS_COLUMNS,
    By,
    Period,
    as_csv,
    end_of,
    focus_rows,
    gpus_of,
    group,
    indexed_attempts,
    name_of,
    pieces_of,
    run_row,
    start_of,
)
from spotune.cost.report import build_report
from spotune.cost.tables import groups_text, runs_text
from tests.unit.cost.cases import T, three_attempts

# https://focus.finops.org/focus-specification/v1-2/: mandatory columns, and those that must have a value.
MANDATORY = set(
    "BilledCost BillingAccountId BillingAccountName BillingCurrency BillingPeriodEnd BillingPeriodStart ChargeCategory"
    " ChargeClass ChargeDescription ChargePeriodEnd ChargePeriodStart ContractedCost EffectiveCost InvoiceIssuerName"
    " ListCost PricingQuantity PricingUnit ProviderName PublisherName ServiceCategory ServiceName".split()
)
NEVER_NULL = MANDATORY - {"ChargeClass"} | {"ConsumedQuantity", "ListUnitPrice", "PricingCategory", "SkuPriceId"}


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def attempt(started: float, paid_s: float, **facts: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "attempt": 1, "infra": "aws", "region": "us-east-1", "zone": "us-east-1a", "instance_type": "g6.xlarge",
        "accelerators": "L4:1", "nodes": 1, "use_spot": True, "price_usd_per_hour": 0.36, "price_source": "catalog",
        "started_at": started, "ended_at": started + paid_s, "paid_s": paid_s, "cost_usd": paid_s / 10000,
        "end_reason": "completed", "useful_s": paid_s / 2, "reconciled": True,
    }  # fmt: skip
    return given | facts


def totals(**facts: Any) -> dict[str, Any]:
    given = {"run_id": "run-a", "user": "ana", "team": "research", "kind": "prod", "config": "a.yaml",
             "on_demand_usd": 2.0, "saved_usd": 1.0}  # fmt: skip
    return given | facts


def test_days_split_at_midnight_and_weeks_on_monday() -> None:
    late = attempt(at("2026-11-22 23:00"), 4 * 3600.0)  # a Sunday
    rows = group("day", [("a", totals())], [("a", late)])
    assert [(row["day"], row["paid_s"]) for row in rows] == [("2026-11-22", 3600.0), ("2026-11-23", 10800.0)]
    assert sum(row["cost_usd"] for row in rows) == pytest.approx(late["cost_usd"])
    weeks = group("week", [("a", totals())], [("a", late)])
    assert [(row["week"], row["paid_s"]) for row in weeks] == [("2026-W47", 3600.0), ("2026-W48", 10800.0)]


def test_a_group_has_the_figures_that_are_known() -> None:
    runs = [("a", totals()), ("b", totals(user="ben", on_demand_usd=None, saved_usd=None))]
    pairs = [
        ("a", attempt(0.0, 3600.0)),
        ("a", attempt(5000.0, 1800.0, attempt=2, infra="gcp", nodes=2)),
        ("b", attempt(0.0, 600.0, accelerators="", cost_usd=None, reconciled=False)),
    ]
    ana, ben = group("user", runs, pairs)
    assert (ana["user"], ana["runs"], ana["attempts"], ana["gpu_hours"]) == ("ana", 1, 2, 2.0)
    assert (ana["on_demand_usd"], ana["saved_usd"], ana["goodput"]) == (2.0, 1.0, 0.5)
    assert (ben["cost_usd"], ben["unpriced_s"], ben["unreconciled_s"]) == (None, 600.0, 600.0)
    assert ben["on_demand_usd"] is None
    aws, gcp = group("infra", runs, pairs)
    assert (aws["infra"], aws["runs"], gcp["runs"], aws["on_demand_usd"]) == ("aws", 2, 1, None)
    assert {row["gpu"] for row in group("gpu", runs, pairs)} == {"L4", "cpu"}
    text = groups_text("user", [ana, ben])
    assert "no price was frozen" in text
    assert "own clock" in text
    assert max(map(len, text.splitlines()[:4])) <= 100


def test_saved_compares_like_with_like_and_an_unknown_price_is_not_zero() -> None:
    runs = [("a", totals(on_demand_usd=2.0, saved_usd=1.5)), ("b", totals(on_demand_usd=None, saved_usd=None)),
            ("c", totals(team="ops", on_demand_usd=9.0, saved_usd=None))]  # fmt: skip
    pairs = [("a", attempt(0.0, 3600.0, cost_usd=0.5)), ("b", attempt(0.0, 3600.0, cost_usd=7.0)),
             ("c", attempt(0.0, 60.0, cost_usd=None))]  # fmt: skip
    idle = {"team": "ops", "paid_s": 60.0, "cost_usd": None}
    research, ops = group("team", runs, pairs, [idle])
    assert (research["cost_usd"], research["on_demand_usd"], research["saved_usd"]) == (7.5, 2.0, 1.5)
    assert (research["runs"], research["compared_runs"], research["idle_usd"]) == (2, 1, 0.0)
    assert (ops["cost_usd"], ops["idle_usd"], ops["saved_usd"], ops["compared_runs"]) == (None, None, None, 0)
    text = groups_text("team", [research, ops])
    assert "Saved is of 1 of 3 runs" in text
    assert "$0.00" not in text.splitlines()[2]
    assert "Saved is of" not in groups_text("infra", group("infra", runs, pairs))


def test_the_on_demand_sum_covers_all_runs_or_is_unknown() -> None:
    def line(**facts: Any) -> dict[str, Any]:
        nothing = dict.fromkeys(("useful_s", "goodput", "unreconciled_s", "unpriced_s"), 0.0)
        given = {"run_id": "r", "state": "FAILED", "attempts": 1, "paid_s": 9.0, "cost_usd": 1.0, "on_demand_usd": 2.0}
        return nothing | given | {"user": "u"} | facts

    waits = line(paid_s=0.0, cost_usd=0.0, on_demand_usd=None)
    last = runs_text([line(), line(), waits]).splitlines()[4].split()
    assert last[-4:-2] == ["$2.00", "$4.00"]
    assert runs_text([line(), line(on_demand_usd=None)]).splitlines()[3].split()[-4:-2] == ["$2.00", "\N{EN DASH}"]
    assert runs_text([line(cost_usd=None, on_demand_usd=None)]).splitlines()[2].count("\N{EN DASH}") == 2


def test_a_tiny_price_is_a_charge() -> None:
    (charge,) = focus_rows(
        totals(), [attempt(0.0, 3600.0, price_usd_per_hour=0.0, cost_usd=3e-10, nodes=2)], "file:///b"
    )
    assert (charge["PricingQuantity"], charge["BilledCost"]) == ("2", "0")


TIMES = st.floats(1.6e9, 2e9)


@given(st.lists(st.tuples(TIMES, st.floats(0, 4e6), st.sampled_from(["a", "b"])), max_size=8))
def test_every_paid_second_is_in_a_group(spans: list[tuple[float, float, str]]) -> None:
    runs = [("a", totals()), ("b", totals(team="", user="ben", kind="dev"))]
    pairs = [(key, attempt(start, paid_s)) for start, paid_s, key in spans]
    for by in BY:
        rows = group(by, runs, pairs)
        assert sum(row["paid_s"] for row in rows) == pytest.approx(sum(paid for _, paid, _ in spans), abs=0.1)
        assert all(row["paid_s"] >= 0 for row in rows)


@given(st.sampled_from(["day", "week", "month"]), TIMES, st.floats(0, 1e7))
def test_pieces_tile_an_interval(period: Period, start: float, seconds: float) -> None:
    pieces = list(pieces_of(period, start, start + seconds))
    assert (pieces[0][1], pieces[-1][2]) == (start, start + seconds)
    for (begins, began, until), (_, next_began, _) in zip(pieces, pieces[1:] + pieces[-1:], strict=True):
        assert begins == start_of(period, began)
        assert begins <= began <= until <= end_of(period, begins)
        assert until in (next_began, start + seconds)
    assert len({name_of(period, begins) for begins, _, _ in pieces}) == len(pieces)


def focus_of(report: dict[str, Any]) -> list[dict[str, str]]:
    rows = list(focus_rows(run_row(report), indexed_attempts(report), "file:///b"))
    return list(csv.DictReader(io.StringIO(as_csv(rows, FOCUS_COLUMNS))))


def test_focus_has_every_mandatory_column_and_its_sums() -> None:
    report = build_report(three_attempts(), "SUCCEEDED", T + 1000)
    rows = focus_of(report)
    assert len(rows) == 3
    assert set(FOCUS_COLUMNS) >= MANDATORY
    assert [name for name in FOCUS_COLUMNS if not name.startswith("x_")] == sorted(FOCUS_COLUMNS[:-2])
    for row in rows:
        assert not [name for name in NEVER_NULL if not row[name]]
        assert (row["ChargeCategory"], row["BillingCurrency"], row["PricingUnit"]) == ("Usage", "USD", "Hours")
        assert row["PricingCategory"] == "Dynamic"
        assert float(row["ListUnitPrice"]) * float(row["PricingQuantity"]) == pytest.approx(float(row["ListCost"]))
        assert row["BillingPeriodStart"] <= row["ChargePeriodStart"] < row["ChargePeriodEnd"] <= row["BillingPeriodEnd"]
        assert json.loads(row["Tags"])["user"] == "ana"
        json.loads(row["SkuPriceDetails"])
    assert sum(float(row["BilledCost"]) for row in rows) == pytest.approx(report["cost_usd"], abs=1e-8)


def test_a_charge_lies_in_one_billing_period() -> None:
    long = attempt(at("2026-10-31 23:00"), 2 * 3600.0, nodes=2, use_spot=False, cost_usd=1.44)
    first, second = focus_rows(totals(), [long], "s3://b")
    assert (first["ChargePeriodEnd"], second["BillingPeriodStart"]) == ("2026-11-01T00:00:00Z",) * 2
    assert (first["PricingQuantity"], first["BilledCost"], first["PricingCategory"]) == ("2", "0.72", "Standard")
    nothing = [attempt(0.0, 60.0, cost_usd=None), attempt(60.0, 0.0)]
    assert list(focus_rows(totals(), nothing, "s3://b")) == []


@pytest.mark.parametrize(("text", "found"), [("L4:1", ("L4", 1.0)), ("H100:8", ("H100", 8.0)), ("", ("cpu", 0.0)),
                                             ("A100", ("A100", 1.0)), ("L4:0.5", ("L4", 0.5))])  # fmt: skip
def test_gpus(text: str, found: tuple[str, float]) -> None:
    assert gpus_of(text) == found


def test_every_way_to_sum_is_offered() -> None:
    from spotune.cli.cost import BY as OFFERED

    offered: tuple[By, ...] = OFFERED  # type: ignore[assignment]
    assert offered == BY


def test_columns() -> None:
    assert columns(["A", "B"], [["long", "x"], ["a\nb", ""]]) == "A     B\nlong  x\na\\nb"
    assert columns(["A", "B"], [["x", "9"]], right=[1]) == "A  B\nx  9"
    assert plain("grün 2 %") == "grün 2 %"
    assert plain("a\x1b[31m\u202e") == "a\\x1b[31m\\u202e"
