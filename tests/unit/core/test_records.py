"""What a record may hold: a bucket is shared, and what others wrote there in another shape is named, not met later."""

import json
from dataclasses import replace
from typing import Any

import pytest

from spotune.core.errors import BadRecord, StoreError, launcher_code
from spotune.core.records import Bill, ClusterRecord, PriceRow, Progress, Record, RunRecord, check_paid, read_clusters
from spotune.core.store import Store

T = 1_700_000_000.0
RUN = RunRecord(
    run_id="run-a", created_at=T, user="ada", config_path="run.yaml", config={}, config_sha256="", data_sha256=""
)
BILL = Bill(run_id="run-a", attempt=1, started_at=T, ended_at=T + 60, price={}, exit_code=None)
CLUSTER = ClusterRecord(name="dev", cluster_hash="h", launched_at=T, owner="ada", spans=[[T, None]], updated_at=T + 60)
PRICE = {"infra": "aws", "use_spot": True, "price_usd_per_hour": 1, "source": "catalog"}


def read(record: Record, **facts: Any) -> Record:
    return type(record).from_bytes(json.dumps({**json.loads(record.to_bytes()), **facts}).encode(), "a/key.json")


@pytest.mark.parametrize(
    ("record", "field", "value", "what"),
    [
        (RUN, "user", ["a"], "not a text: […]"),
        (RUN, "user", None, "not a text: null"),
        (RUN, "team", 7, "not a text: 7"),
        (RUN, "team", "\ud800", r"not a text: '\ud800'"),
        (RUN, "budget_usd", "20", "not a number or null: '20'"),
        (RUN, "budget_usd", float("nan"), "not a number or null: nan"),
        (RUN, "priority", True, "not a whole number: True"),
        (RUN, "priority", 10**30, "not a whole number: 1000000000000000000000000000000"),
        (RUN, "created_at", T * 1000, "not a time in epoch seconds: 1700000000000.0"),
        (RUN, "created_at", "2026-11-28T00:00:00Z", "not a time in epoch seconds: '2026-11-28T00:00:00Z'"),
        (RUN, "overrides", ["a", 1], "not a list (each a text): […]"),
        (RUN, "prices", ["x"], "not a list (each an object): […]"),
        (RUN, "config", [], "not an object: […]"),
        (BILL, "nodes", 1.5, "not a whole number: 1.5"),
        (BILL, "exit_code", [1], "not a whole number or null: […]"),
        (BILL, "use_spot", "yes", "not true or false: 'yes'"),
        (BILL, "setup_s", float("inf"), "not a number: inf"),
        (CLUSTER, "spans", [[T]], "not pairs of times, of which the last may be null"),
        (CLUSTER, "spans", [["x", None]], "not a list (each a list (each a time in epoch seconds or null)): […]"),
        (CLUSTER, "updated_at", "x", "not a time in epoch seconds: 'x'"),
        (CLUSTER, "price", {"infra": "aws"}, "price_usd_per_hour: missing"),
    ],
)
def test_a_value_of_another_kind_is_a_bad_record(record: Record, field: str, value: Any, what: str) -> None:
    with pytest.raises(BadRecord) as raised:
        read(record, **{field: value})
    assert str(raised.value) == f"a/key.json: not a {type(record).__name__}: {field}: {what}"


@pytest.mark.parametrize("data", [b"", b"null", b"[1]", b"{", b"[" * 200_000, b"\xff\xfe", b"{}", b'{"run_id": 1'])
def test_what_is_no_record_at_all(data: bytes) -> None:
    with pytest.raises(BadRecord, match=r"^a/key.json: not a Progress: [^\n]+$"):
        Progress.from_bytes(data, "a/key.json")


def test_what_is_as_good() -> None:
    later = read(RUN, created_at=int(T), budget_usd=20, shiny={"x": 1}, schema_version=7, prices=[PRICE])
    assert isinstance(later, RunRecord)
    assert (later.budget_usd, later.price_rows()) == (20, [PriceRow.from_dict(PRICE)])
    assert read(BILL, exit_code=75) != BILL
    assert Progress.from_dict({"run_id": "run-a", "attempt": 1}).loss is None


def test_price_rows_are_named_by_the_record_they_are_in() -> None:
    bad = [{**PRICE, "price_usd_per_hour": "x"}]
    with pytest.raises(BadRecord, match=r"^runs/run-a/run.json: prices.0.: .*price_usd_per_hour: not a number: 'x'$"):
        RunRecord.from_dict({**vars(RUN), "prices": bad}).price_rows()
    with pytest.raises(BadRecord, match=r"^runs/run-a/revisions/0002.json: prices"):
        RunRecord.from_dict({**vars(RUN), "prices": bad, "revision": 2}).price_rows()


def test_a_cluster_that_cannot_be_read_is_said(local_store: Store) -> None:
    local_store.write(CLUSTER.key, CLUSTER.to_bytes())
    local_store.write("clusters/dev-5.json", b'{"name')
    local_store.write("clusters/dev-6.json", CLUSTER.to_bytes())
    said: list[str] = []
    assert read_clusters(local_store, ["dev"], said.append) == [CLUSTER]
    assert len(said) == 2
    assert said[1].endswith(f"name, launched_at: those of {CLUSTER.key} (a copy, or renamed)")
    assert said[0].startswith("clusters/dev-5.json: not a ClusterRecord: ")


@pytest.mark.parametrize(
    ("facts", "what"),
    [
        (
            {"price": {**PRICE, "price_usd_per_hour": 1e99}},
            "price: price_usd_per_hour: more than any machine's, 10,",
        ),
        ({"price": {**PRICE, "price_usd_per_hour": 10**400}}, "price: price_usd_per_hour: more than any machine's"),
        ({"paid_s": 1e99}, "paid_s: 1e+99, more than from started_at to ended_at (7200)"),
        ({"cost_usd": 1e99}, "cost_usd: 1e+99, more than its interval at its price (2)"),
        ({"cost_usd": 2.1}, "cost_usd: 2.1, more than its interval at its price (2)"),
        ({"price": {}, "cost_usd": 1e99}, "cost_usd: 1e+99, more than its interval at its price (2e+07)"),
        ({"price": {**PRICE, "price_usd_per_hour": 1e6}, "nodes": 1000}, "2e+09 US dollars, more than a run costs"),
    ],
)
def test_a_bill_over_more_than_its_interval_can_cost_is_none(facts: dict[str, Any], what: str) -> None:
    good = replace(BILL, ended_at=T + 7200, price=PRICE, paid_s=7200.0, cost_usd=2.0)
    check_paid(good, "a/key.json")
    check_paid(replace(good, nodes=3, paid_s=3 * 7200.0, cost_usd=6.000001), "a/key.json")
    with pytest.raises(BadRecord) as raised:
        check_paid(read(good, **facts), "a/key.json")
    assert str(raised.value).startswith(f"a/key.json: {what}")


def test_no_machine_costs_so_much_an_hour() -> None:
    dear = [{**PRICE, "price_usd_per_hour": 1e99}]
    with pytest.raises(BadRecord, match=r"price_usd_per_hour: not from 0 to 10000000: 1e\+99$"):
        replace(RUN, prices=dear).price_rows()


def test_a_launcher_has_no_engine_to_say_75_to() -> None:
    assert [launcher_code(error("x")) for error in (StoreError, BadRecord)] == [3, 2]
