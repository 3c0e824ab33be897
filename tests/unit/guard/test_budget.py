"""What a run has cost before this machine, as the machine finds it in the bucket."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from spotune.core.keys import Keys
from spotune.core.records import Bill
from spotune.core.store import Store
from spotune.guard import budget
from spotune.guard.budget import read_budget
from spotune.guard.journal import Context, Machine
from tests.unit.cost.cases import RUN_ID, T, claim, event, price, run

KEYS = Keys(RUN_ID)
ROW = price(True, 0.36)  # $0.36 an hour


def bill(attempt: int, start: float, end: float, priced: bool = True) -> Bill:
    paid_s = end - start
    return Bill(
        run_id=RUN_ID, attempt=attempt, started_at=T + start, ended_at=T + end, paid_s=paid_s,
        price=vars(ROW) if priced else {}, cost_usd=paid_s * 0.36 / 3600 if priced else 0.0,
    )  # fmt: skip


def test_what_cannot_be_read_is_left_out_and_a_bare_bill_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(f"file://{tmp_path}/bucket")
    store.create(KEYS.bill(1), json.dumps({
        "run_id": RUN_ID, "attempt": 1, "started_at": T, "ended_at": T + 1000, "nodes": 2, "price": vars(ROW)
    }).encode())  # fmt: skip
    timeless = bill(0, 0, 1000)
    store.create(KEYS.lost_bill(0, 5), replace(timeless, started_at=0.0).to_bytes())
    store.create(KEYS.attempt(2), b'{"cut')
    store.create(KEYS.bill(2), b'{"cut')
    assert budget._earlier_usd(store, KEYS, run(), 3, 0.0) == pytest.approx(1000 * 2 * 0.36 / 3600)
    assert capsys.readouterr().err.count("left out of the budget: runs/") == 3


def test_every_machine_before_this_one_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(f"file://{tmp_path}/bucket")
    record = claim(3, 7300)
    store.create(KEYS.attempt(1), claim(1, 100).to_bytes())
    store.create(KEYS.bill(1), bill(1, 0, 1000).to_bytes())
    store.create(KEYS.attempt(2), claim(2, 2100).to_bytes())  # no bill: to its last event, and the lead
    store.create(KEYS.events(2, 0, 0), json.dumps(event(3000, "end")).encode())
    for lost in (bill(0, 4000, 5000), bill(0, 6000, 6500, priced=False)):  # machines that never claimed an attempt
        store.create(KEYS.lost_bill(lost.started_at, lost.ended_at), lost.to_bytes())
    monkeypatch.setattr(budget, "paid_since", lambda *_: T + 7250)
    context = Context(
        store=store, keys=KEYS, run=run(budget_usd=1.0, prices=[vars(ROW)]), record=record, machine=Machine.read({}),
        environ={}, scratch=tmp_path, cache=tmp_path, status_file="", patience_s=1.0,
    )  # fmt: skip
    found = read_budget(context)
    assert found
    assert found.earlier_usd == pytest.approx((1000 + (900 + 50) + 1000 + 500) * 0.36 / 3600)
    assert found.spent_usd(T + 7450) == pytest.approx(found.earlier_usd + 200 * 0.36 / 3600)
