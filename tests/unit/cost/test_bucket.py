"""Through the bucket: whatever of a run's records is missing, cut or there twice, what was paid is paid, and once."""

import json
import tempfile
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotune.core.errors import InputError, StoreError
from spotune.core.keys import Keys
from spotune.core.store import Store
from spotune.cost.collect import report_of
from spotune.launch.engine import JobStatus, PaidInterval
from tests.unit.cost.cases import RUN_ID, T, claim, commit, event, phase, row, run, step

KEYS = Keys(RUN_ID)
SKEW_S = st.floats(-300, 300)


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[PaidInterval], dict[str, bytes]]:
    """The machines of a run, preempted again and again, and what they left in the bucket of all that they wrote."""
    rows: list[PaidInterval] = []
    left: dict[str, bytes] = {}
    at, done = 10.0, 0
    for attempt in range(1, draw(st.integers(1, 5)) + 1):
        skew_s, starts_s = draw(SKEW_S), draw(st.floats(1, 40))
        clock = at + skew_s + starts_s
        events = [event(clock, "start"), phase(clock, "load"), phase(clock + 5, "train")]
        for number in range(done + 1, done + draw(st.integers(0, 6)) + 1):
            clock += draw(st.floats(0.1, 20))
            events.append(step(clock + 5, number))
        ended = clock + 5 - skew_s + draw(st.floats(0, 90))
        kept = sorted({one["step"] for one in events if one["event"] == "step"})
        done = draw(st.sampled_from([done, *kept]))
        if done in kept:
            left[KEYS.commit(attempt, done)] = commit(attempt, done).to_bytes()
        rows.append(row(at, ended, end_reason=draw(st.sampled_from(["preempted", "lost", "exited"]))))
        left[KEYS.attempt(attempt)] = claim(attempt, events[0]["t"] - T).to_bytes()
        lines = [json.dumps(one).encode() + b"\n" for one in events]
        cut = draw(st.integers(0, len(lines)))
        parts = [b"".join(lines[:cut]), b"".join(lines[cut:])]
        if draw(st.booleans()):
            parts.append(parts[-1])  # sent again, since the answer was lost
        for index, part in enumerate(parts):
            left[KEYS.events(attempt, 0, index)] = part
        at = ended + draw(st.floats(0, 400))
    for key in sorted(left):
        match draw(st.sampled_from(["there"] * 6 + ["missing", "cut", "garbage"])):
            case "missing":
                del left[key]
            case "cut":
                left[key] = left[key][: draw(st.integers(0, len(left[key])))]
            case "garbage":
                left[key] = draw(st.binary(max_size=40))
    return rows, left


def report(store: Store, rows: list[PaidInterval]) -> dict[str, Any]:
    status = JobStatus(RUN_ID, "FAILED", 0, "ana", "local", T)
    found = report_of(store, status, rows, T + 1e5)
    return {name: value for name, value in found.items() if name != "reported_at"}


def test_a_failed_placement_in_the_same_second_does_not_prevent_a_bill(local_store: Store) -> None:
    """SkyPilot counts whole seconds."""
    local_store.create(KEYS.run, run().to_bytes())
    local_store.create(KEYS.attempt(1), claim(1, 160).to_bytes())
    failed = row(100, 100, end_reason="lost")
    under_way = JobStatus(RUN_ID, "RUNNING", 0, "ana", "local", T)
    report_of(local_store, under_way, [failed, row(100, None)], T + 300)
    assert len(local_store.keys(KEYS.lost)) == 1
    ended = row(100, 5000, end_reason="exited", exit_code=1)
    first = report(local_store, [failed, ended])
    assert [(one["attempt"], one["paid_s"]) for one in first["attempts"]] == [(None, 0), (1, 4900)]
    assert report(local_store, [failed, ended]) == first
    assert report(local_store, []) == first


@pytest.mark.parametrize("error", [InputError("SPOTUNE_BUCKET", "access denied"), StoreError("the bucket is away")])
def test_a_user_who_may_only_read_the_bucket_gets_the_report(
    local_store: Store, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(store: Store, key: str, data: bytes) -> bool:
        raise error

    local_store.create(KEYS.run, run().to_bytes())
    local_store.create(KEYS.attempt(1), claim(1, 160).to_bytes())
    monkeypatch.setattr(Store, "create", refuse)
    assert report(local_store, [row(150, 400)])["paid_s"] == 250


def test_unclaimed_machines_with_the_same_start_have_a_bill_each(local_store: Store) -> None:
    local_store.create(KEYS.run, run().to_bytes())
    local_store.create(KEYS.attempt(1), claim(1, 160).to_bytes())
    rows = [row(100, 130, end_reason="lost"), row(100, 140, end_reason="lost"), row(150, 400)]
    assert report(local_store, rows)["paid_s"] == 320
    assert report(local_store, [])["paid_s"] == 320


@settings(max_examples=60, deadline=None, database=None)
@given(histories(), st.data())
def test_every_paid_second_counts_once_whatever_records_are_left(
    given: tuple[list[PaidInterval], dict[str, bytes]], data: st.DataObject
) -> None:
    rows, left = given
    with tempfile.TemporaryDirectory() as folder:
        store = Store(f"file://{folder}/bucket")
        store.create(KEYS.run, run().to_bytes())
        for key, content in left.items():
            store.create(key, content)
        first = report(store, rows)
        paid = sum((one.ended_at or 0.0) - one.started_at for one in rows)
        assert first["paid_s"] - first["unreconciled_s"] == pytest.approx(paid, abs=1e-3)
        phases = dict(first["phases"])
        assert phases.pop("queue_s") >= 0
        assert min(phases.values()) >= 0
        assert sum(phases.values()) == pytest.approx(first["paid_s"], abs=1e-3)
        assert first["cost_usd"] == pytest.approx(first["paid_s"] / 3600 * 0.36, rel=1e-6)
        # Once it is billed, the report is the same from the bucket, from the engine, and from what it still remembers.
        assert report(store, rows) == first
        kept = [one for one in rows if data.draw(st.booleans())]
        again = report(store, kept)
        billed = [key for key in store.keys(KEYS.attempts) if key.endswith("/bill.json")]
        if len(billed) == len(rows):
            assert again["paid_s"] == first["paid_s"]
            assert again["cost_usd"] == first["cost_usd"]
        assert again["paid_s"] - again["unreconciled_s"] <= paid + 1e-3
