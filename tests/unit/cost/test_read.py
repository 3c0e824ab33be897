"""From records in a bucket to a report, and the bills that are left there."""

import json
from dataclasses import asdict, replace

import pytest

from spotune.core.errors import InputError
from spotune.core.keys import Keys
from spotune.core.records import Bill
from spotune.core.store import Store
from spotune.cost.account import bills_due, build_accounts, write_bills, write_due_bills
from spotune.cost.index import read_run_data
from spotune.cost.machines import RunData
from spotune.cost.report import build_report
from tests.unit.cost.cases import RUN_ID, T, three_attempts

KEYS = Keys(RUN_ID)


def write(store: Store, run_data: RunData, lines_a_part: int = 4, run_id: str = RUN_ID) -> None:
    """What a run leaves in its bucket, in many parts."""
    keys = Keys(run_id)
    store.create(keys.run, replace(run_data.run, run_id=run_id).to_bytes())
    for record in run_data.attempts:
        store.create(keys.attempt(record.attempt), record.to_bytes())
    for attempt, events in run_data.events.items():
        for part, start in enumerate(range(0, len(events), lines_a_part)):
            lines = [json.dumps(event) for event in events[start : start + lines_a_part]]
            store.create(keys.events(attempt, 0, part), "\n".join(lines).encode())
    for commit in run_data.commits:
        store.create(keys.commit(commit.attempt, commit.step), commit.to_bytes())
    if run_data.certificate:
        store.create(keys.completed, run_data.certificate.to_bytes())


def due(run_data: RunData) -> list[Bill]:
    return bills_due(run_data, build_accounts(run_data, T + 1000))


def test_a_report_from_the_bucket_equals_that_of_the_records(local_store: Store) -> None:
    run_data = three_attempts()
    write(local_store, run_data, lines_a_part=1)
    found = read_run_data(local_store, RUN_ID, run_data.intervals)
    assert build_report(found, "SUCCEEDED", T + 1000) == build_report(run_data, "SUCCEEDED", T + 1000)


def test_bills_make_the_same_report_where_the_engine_is_out_of_reach(local_store: Store) -> None:
    run_data = three_attempts()
    write(local_store, run_data)
    write_bills(local_store, due(run_data))
    elsewhere = read_run_data(local_store, RUN_ID)
    assert build_report(elsewhere, "SUCCEEDED", T + 1000) == build_report(run_data, "SUCCEEDED", T + 1000)
    both = read_run_data(local_store, RUN_ID, run_data.intervals)
    assert build_report(both, "SUCCEEDED", T + 1000) == build_report(run_data, "SUCCEEDED", T + 1000)
    assert due(both) == []


def test_a_bill_is_written_once_and_read_by_its_contract(local_store: Store) -> None:
    run_data = three_attempts()
    write(local_store, run_data)
    write_bills(local_store, due(run_data))
    data = local_store.read(KEYS.bill(2))
    assert data is not None
    bill = Bill.from_bytes(data)
    assert (bill.started_at, bill.ended_at, bill.paid_s) == (T + 40, T + 60, 20)
    assert bill.cost_usd == pytest.approx(0.002)
    assert bill.price["price_usd_per_hour"] == 0.36
    assert bill.end_reason == "preempted"
    dearer = [{**price, "price_usd_per_hour": 99.0} for price in run_data.run.prices]
    write_bills(local_store, due(replace(run_data, run=replace(run_data.run, prices=dearer))))
    assert local_store.read(KEYS.bill(2)) == data


@pytest.mark.parametrize(
    ("started_at", "ended_at"), [(2.0**62, T + 30), (T, -1.0), (T, float("nan")), (float("inf"), T), (5.0, T)]
)
@pytest.mark.parametrize("attempts", [True, False])
def test_a_bill_that_its_reader_would_refuse_is_not_written(
    local_store: Store, started_at: float, ended_at: float, attempts: bool
) -> None:
    """A torn row of an engine says such times: what is written once, for all who share the bucket, stays for good."""
    run_data = three_attempts()
    write(local_store, run_data)
    torn = replace(run_data.intervals[1], started_at=started_at, ended_at=ended_at)
    bill = replace(due(run_data)[1], attempt=2 * attempts, started_at=started_at, ended_at=ended_at)
    write_bills(local_store, [bill])
    assert (local_store.keys(KEYS.lost), local_store.exists(KEYS.bill(2))) == ([], False)
    found = replace(run_data, intervals=[run_data.intervals[0], torn, run_data.intervals[2]])
    write_due_bills(local_store, found, build_accounts(found, T + 1000), is_over=True)
    assert (local_store.keys(KEYS.lost), read_run_data(local_store, RUN_ID).unread) == ([], [])


def test_no_bill_while_a_machine_is_paid_for() -> None:
    run_data = three_attempts()
    open_row = replace(run_data.intervals[-1], ended_at=None)
    bills = due(replace(run_data, intervals=[*run_data.intervals[:-1], open_row]))
    assert [bill.attempt for bill in bills] == [1, 2]


def test_records_that_cannot_be_read_are_left_out(local_store: Store) -> None:
    run_data = three_attempts()
    write(local_store, run_data)
    local_store.write(KEYS.attempt(2), b'{"attempt": ')
    local_store.write(KEYS.events(3, 0, 1), b"\xff\x00 not a line")
    local_store.write(KEYS.bill(1), b"[]")
    local_store.write(KEYS.completed, b"")
    local_store.write(KEYS.commit(9, 9), b"null")
    local_store.write(f"{KEYS.attempts}/0001/events-1-0.jsonl", json.dumps(asdict(run_data.attempts[0])).encode())
    report = build_report(read_run_data(local_store, RUN_ID, run_data.intervals), "FAILED", T + 1000)
    assert [attempt["attempt"] for attempt in report["attempts"]] == [1, 2, 3]
    assert sum(report["phases"].values()) - report["phases"]["queue_s"] == pytest.approx(report["paid_s"]) == 70


def test_a_run_that_is_not_there(local_store: Store) -> None:
    with pytest.raises(InputError, match="no such run"):
        read_run_data(local_store, "none-such")
