"""What a report says beside time and money: lost machines, GPUs, the bucket. By hand."""

from dataclasses import replace
from typing import Any

import pytest

from spotune.core.records import Bill, Certificate, Commit
from spotune.cost.account import bills_due, build_accounts
from spotune.cost.machines import RunData, with_bills
from spotune.cost.report import build_report, estimates
from tests.unit.cost.cases import FIRST, RUN_ID, T, claim, event, phase, price, row, run, step, three_attempts

USD_PER_S = 0.36 / 3600


def test_what_each_lost_machine_cost_by_hand() -> None:
    report = build_report(three_attempts(), "SUCCEEDED", T + 1000)
    first, second = report["preemptions"]
    assert (first["attempt"], first["end_reason"], first["waited_s"]) == (1, "preempted", 10)
    assert [first[f"{name}_s"] for name in ("provision", "setup", "load", "restore", "replayed")] == [5, 0, 2, 1, 0]
    assert [second[f"{name}_s"] for name in ("provision", "setup", "load", "restore", "replayed")] == pytest.approx(
        [1, 0, 4, 1, 3 + 2 + 3]  # step 3, the evaluation after it and step 4, all again
    )
    assert [first["cost_usd"], second["cost_usd"]] == pytest.approx([8 * USD_PER_S, 14 * USD_PER_S])
    assert report["usd_per_million_tokens"] == pytest.approx(70 * USD_PER_S / 600 * 1e6)


def test_a_requested_end_is_no_loss() -> None:
    end = event(28, "end", reason="cancelled", exit_code=1)
    events = {1: [phase(15, "load"), end], 2: [phase(45, "load")]}
    intervals = [row(10, 30, end_reason="cancelled"), row(40, 60, end_reason="exited", exit_code=0)]
    run_data = RunData(run(), intervals, [claim(1, 15), claim(2, 45)], events)
    assert build_report(run_data, "FAILED", T + 100)["preemptions"] == []


def gpu(at: float, busy: float, used: float = 10.0) -> dict[str, Any]:
    return event(at, "gpu", busy=busy, memory_gib=used, memory_total_gib=22.5)


def test_busy_gpu_hours_cover_the_measured_attempts() -> None:
    events = {1: [phase(0, "train"), gpu(10, 0.5), gpu(20, 1.0, 20.0)], 2: [phase(3700, "train"), gpu(3800, 0.25)]}
    intervals = [row(0, 3600, accelerators="L4:2"), row(3600, 5400, accelerators="L4:2"), row(5400, 6000)]
    run_data = RunData(run(), intervals, [claim(1, 0), claim(2, 3600)], events)
    report = build_report(run_data, "FAILED", T + 9000)
    assert report["gpu_hours"] == 3.0
    assert report["gpu_busy_hours"] == pytest.approx(2 * 0.75 + 1 * 0.25)
    assert report["gpu_utilization"] == pytest.approx(1.75 / 3)
    assert (report["gpu_memory_gib"], report["gpu_memory_total_gib"]) == (20.0, 22.5)


def test_damaged_samples_are_ignored() -> None:
    events = {1: [phase(0, "train"), {**gpu(10, 7.0), "memory_gib": None}, event(11, "gpu", busy="x")]}
    report = build_report(RunData(run(), [row(0, 60)], [claim(1, 0)], events), "FAILED", T + 90)
    assert report["gpu_utilization"] is report["gpu_memory_gib"] is None


def test_the_bucket_by_hand() -> None:
    def commit(attempt: int, number: int, size: int) -> Commit:
        return Commit(run_id=RUN_ID, attempt=attempt, step=number, files={"a": {"size": size}})

    events = {
        1: [event(1, "commit", step=2, bytes=3e9), event(2, "commit", step=4, bytes=3e9)],
        2: [event(9, "restored", step=2, commit=FIRST), step(10, 3)],
    }
    certificate = Certificate(
        run_id=RUN_ID, attempt=2, step=6, weights_sha256="w", files={"w": {"size": 1_000_000_000}}
    )
    run_data = RunData(run(), events=events, commits=[commit(1, 4, 3 * 10**9)], certificate=certificate)
    found = estimates(run_data, "s3://bucket/runs")
    assert found["is_estimate"]
    assert (found["stored_bytes"], found["sent_bytes"], found["fetched_bytes"]) == (4 * 10**9, 7 * 10**9, 3 * 10**9)
    assert found["storage_usd_per_month"] == pytest.approx(4 * 0.023)
    assert (found["other_region_usd"], found["other_cloud_usd"]) == pytest.approx((10 * 0.02, 10 * 0.09))
    here = estimates(run_data, "file:///bucket")
    assert here["stored_bytes"] == 4 * 10**9
    assert here["storage_usd_per_month"] is None


def test_a_bill_with_only_price_and_interval_suffices() -> None:
    paid = price(True, 0.36, infra="aws", region="us-east-1", instance_type="g6.xlarge", accelerators="L4:1")
    bill = Bill(
        run_id=RUN_ID, attempt=1, started_at=T, ended_at=T + 3600, price=vars(paid), nodes=2, end_reason="cancelled"
    )
    for prices in ([vars(paid)], []):
        report = build_report(RunData(run(prices=prices), bills=[bill]), "CANCELLED", T + 9999)
        (attempt,) = report["attempts"]
        assert (attempt["infra"], attempt["region"], attempt["instance_type"]) == ("aws", "us-east-1", "g6.xlarge")
        assert (attempt["use_spot"], attempt["end_reason"], attempt["cost_usd"]) == (True, "cancelled", 0.72)


def test_a_row_with_a_changed_time_or_a_double_counts_once() -> None:
    run_data = three_attempts()
    bills = bills_due(run_data, build_accounts(run_data, T + 1000))
    moved = [replace(one, started_at=one.started_at + 4.0) for one in run_data.intervals]
    billed, left = with_bills([*moved, *run_data.intervals], bills)
    assert ([(number, one.started_at) for number, one in billed], left) == ([(1, T + 10), (2, T + 40), (3, T + 65)], [])
    doubled = [*run_data.intervals, *run_data.intervals, row(66, 68)]
    assert with_bills(doubled, []) == ([], [*run_data.intervals, row(66, 68)])
    overlapping = row(5, 30, infra="aws", end_reason="lost")  # until the same second, somewhere else
    assert with_bills([*run_data.intervals, overlapping], bills)[1] == [overlapping]
    twice = [replace(bills[0], attempt=0), *bills]  # in lost/ too, by a machine that did not see the claim
    assert with_bills([], twice) == (billed, [])
    assert build_report(replace(run_data, intervals=moved, bills=bills), "SUCCEEDED", T + 1000)["paid_s"] == 70
