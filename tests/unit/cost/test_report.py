"""A report by hand: every second and every cent of a small run."""

import json
from dataclasses import replace
from typing import Any

import pytest

from spotune.core.keys import Keys
from spotune.core.records import PriceRow
from spotune.cost.account import bills_due, build_accounts
from spotune.cost.export import run_row
from spotune.cost.machines import RunData
from spotune.cost.page import page_of
from spotune.cost.report import build_report
from spotune.cost.tables import run_text
from spotune.launch.engine import State
from tests.unit.cost.cases import RUN_ID, T, claim, commit, event, phase, price, row, run, step, three_attempts

CONTRACT = """run_id state user team config started_at ended_at attempts phases paid_s cost_usd on_demand_usd saved_usd
goodput useful_steps replayed_steps tokens gpu_utilization unreconciled_s schema_version""".split()
ATTEMPT = """attempt infra region zone instance_type accelerators nodes use_spot price_usd_per_hour price_source
started_at ended_at paid_s cost_usd end_reason first_step last_step""".split()
PHASES = """queue_s provision_s setup_s load_s restore_s useful_s data_wait_s eval_s save_stall_s replayed_s stalled_s
idle_s teardown_s unknown_s""".split()


def test_every_second_by_hand() -> None:
    report = build_report(three_attempts(), "SUCCEEDED", T + 1000)
    assert set(CONTRACT) <= set(report)
    assert list(report["phases"]) == PHASES
    assert all(set(ATTEMPT) <= set(attempt) for attempt in report["attempts"])
    assert report["phases"] == pytest.approx(
        {
            "queue_s": 10 + 10 + 5,
            "provision_s": 2 + 5 + 1,
            "setup_s": 3,
            "load_s": 5 + 2 + 4,
            "restore_s": 1 + 1,
            "useful_s": 6 + 6 + 6,  # attempt 1: 8 seconds of training, 2 of them waiting for data
            "data_wait_s": 2,
            "eval_s": 2 + 2,
            "save_stall_s": 1 + 2,
            "replayed_s": 3 + 3,
            "stalled_s": 0,
            "idle_s": 0,
            "teardown_s": 1 + 8,
            "unknown_s": 4,
        }
    )
    assert report["paid_s"] == 20 + 20 + 30
    assert report["goodput"] == pytest.approx(18 / 70)
    assert (report["useful_steps"], report["replayed_steps"], report["tokens"]) == (6, 2, 600)
    assert (report["started_at"], report["ended_at"]) == (T + 10, T + 95)
    assert report["unreconciled_s"] == 0
    assert report["gpu_utilization"] is None


def test_every_cent_by_hand() -> None:
    report = build_report(three_attempts(), "SUCCEEDED", T + 1000)
    assert [attempt["cost_usd"] for attempt in report["attempts"]] == pytest.approx([0.002, 0.002, 0.003])
    assert report["cost_usd"] == pytest.approx(0.007)
    # Steps 18 + 2, eval 2 and saves 3 done for the first time, one start 2 + 3 + 5, one leaving 8.
    assert report["on_demand"]["seconds"] == pytest.approx(20 + 2 + 3 + 10 + 8)
    assert report["on_demand_usd"] == pytest.approx(43 * 0.72 / 3600)
    assert report["saved_usd"] == pytest.approx(43 * 0.72 / 3600 - 0.007)


def test_attempts() -> None:
    attempts = build_report(three_attempts(), "SUCCEEDED", T + 1000)["attempts"]
    assert [attempt["end_reason"] for attempt in attempts] == ["preempted", "preempted", "completed"]
    assert [(attempt["first_step"], attempt["last_step"]) for attempt in attempts] == [(1, 2), (3, 4), (3, 6)]
    assert attempts[0]["losses"] == [[1, 3.0], [2, 2.5]]
    assert attempts[0]["commits"] == [2]
    assert sum(attempts[2]["phases"].values()) == pytest.approx(30)
    assert [piece[2] for piece in attempts[1]["timeline"]] == [
        "provision", "load", "restore", "useful", "eval", "useful", "unknown",
    ]  # fmt: skip


def test_what_a_stall_cost_has_a_line() -> None:
    run_data = three_attempts()
    hung = [
        *run_data.events[2],
        event(58, "stall", phase="train", since=T + 56),
        event(59, "end", reason="stalled", exit_code=75),
    ]
    report = build_report(replace(run_data, events={**run_data.events, 2: hung}), "SUCCEEDED", T + 1000)
    assert [attempt["end_reason"] for attempt in report["attempts"]] == ["preempted", "stalled", "completed"]
    assert (report["phases"]["stalled_s"], report["phases"]["unknown_s"]) == (3, 0)
    line = "1 stalled attempt cost $0.00030: 3.0 s without a sign of life"
    assert line in run_text(report)
    assert line in page_of(report)


def test_a_loss_that_is_not_finite_is_shown() -> None:
    run_data = three_attempts()
    losses = {3: "nan", 4: 2.0, 5: "-inf", 6: None, 7: "1.0"}
    logs = [event(38 + step / 10, "log", step=step, loss=loss) for step, loss in losses.items()]
    events = {**run_data.events, 2: [*run_data.events[2], *logs]}
    report = build_report(replace(run_data, events=events), "FAILED", T + 1000)
    json.dumps(report, allow_nan=False)
    assert [attempt["losses_not_finite"] for attempt in report["attempts"]] == [[], [[3, "nan"], [5, "-inf"]], []]
    said = "Attempt 2: the loss is not finite (nan) at step 3 to 5."
    assert said in run_text(report)
    assert said in page_of(report)
    assert page_of(report).count('class="fault"') == 3  # two in the chart, one in its legend


def test_nodes_multiply_dollars_not_seconds() -> None:
    report = build_report(RunData(run(), [row(0, 3600, nodes=3)]), "FAILED", T + 9999)
    assert (report["paid_s"], report["cost_usd"]) == (3600, pytest.approx(3 * 0.36))


def test_a_machine_that_never_claimed_is_listed_and_paid() -> None:
    run_data = replace(
        three_attempts(), intervals=[*three_attempts().intervals, row(31, 36, setup_s=1.0, end_reason="lost")]
    )
    report = build_report(run_data, "SUCCEEDED", T + 1000)
    assert [attempt["attempt"] for attempt in report["attempts"]] == [1, None, 2, 3]
    attempt = report["attempts"][1]
    assert attempt["end_reason"] == "lost"
    assert attempt["phases"]["setup_s"] == pytest.approx(1)
    assert attempt["phases"]["unknown_s"] == pytest.approx(4)
    assert report["paid_s"] == pytest.approx(75)


def test_an_attempt_without_a_row_goes_by_its_own_clock() -> None:
    run_data = replace(three_attempts(), intervals=three_attempts().intervals[1:])
    report = build_report(run_data, "SUCCEEDED", T + 1000)
    assert report["unreconciled_s"] == pytest.approx(14.5)
    assert report["paid_s"] == pytest.approx(50 + 14.5)
    first = report["attempts"][0]
    assert (first["reconciled"], first["use_spot"], first["end_reason"]) == (False, None, "preempted")


def test_attempts_without_rows_are_listed_in_order_though_clocks_differ() -> None:
    events = {
        1: [phase(300, "train"), *(step(300 + 5 * number, number) for number in range(1, 5))],
        2: [phase(160, "train"), *(step(160 + 5 * number, number) for number in range(1, 7))],
    }
    report = build_report(RunData(run(), [], [claim(1, 299), claim(2, 159)], events), "FAILED", T + 999)
    assert [one["attempt"] for one in report["attempts"]] == [1, 2]
    assert (report["phases"]["useful_s"], report["phases"]["replayed_s"]) == (30, 20)
    assert [one["attempt"] for one in report["preemptions"]] == [1]
    assert report["started_at"] == T + 159


def test_a_running_machine_is_paid_up_to_now() -> None:
    run_data = RunData(
        run(), [row(10, None)], [claim(1, 12)], {1: [phase(13, "load"), phase(14, "train"), step(20, 1)]}
    )
    report = build_report(run_data, "RUNNING", T + 25)
    assert report["paid_s"] == pytest.approx(15)
    assert report["ended_at"] is None
    assert report["attempts"][0]["end_reason"] is None
    assert report["attempts"][0]["ended_at"] is None
    assert report["phases"]["unknown_s"] == pytest.approx(5)  # not reported yet
    assert report["tokens"] == 100


@pytest.mark.parametrize(
    ("state", "ended", "is_last", "expected"),
    [
        ("RUNNING", None, True, (None, None, 25, 0)),
        ("STARTING", None, True, (None, None, 25, 0)),
        ("RECOVERING", None, True, (110, "lost", 10, 15)),  # its machine is gone
        ("FAILED", None, True, (110, "lost", 10, 0)),
        ("RUNNING", "preempted", True, (112, "preempted", 12, 13)),  # and the next has not claimed yet
        ("RUNNING", None, False, (110, "lost", 10, 0)),  # a later one runs
    ],
)
def test_the_newest_attempt_of_a_running_run_is_on_without_a_row(
    state: State, ended: str | None, is_last: bool, expected: tuple[float | None, str | None, float, float]
) -> None:
    """``expected``: of attempt 2, when and why it ended and what was paid for; and the wait for a machine after it."""
    end = [event(112, "end", reason=ended)] if ended else []
    said = [phase(100, "load"), phase(104, "train"), step(110, 3), *end]
    claims = [claim(1, 10), claim(2, 100), *([] if is_last else [claim(3, 110)])]
    run_data = RunData(run(), attempts=claims, events={1: [event(100, "end", reason="preempted")], 2: said})
    report = build_report(run_data, state, T + 125)
    attempt = report["attempts"][1]
    ended_at, reason, paid_s, waited = expected
    assert (attempt["ended_at"], attempt["end_reason"], attempt["paid_s"]) == (
        ended_at and T + ended_at,
        reason,
        paid_s,
    )
    assert report["phases"]["queue_s"] == pytest.approx(10 + waited)


def test_a_machine_without_a_row_is_known_from_the_prices_of_its_place() -> None:
    kind = {"infra": "aws", "region": "us-east-1", "accelerators": "L4:1", "instance_type": "g6.xlarge"}
    spot, on_demand = price(True, 0.36, **kind), price(False, 0.72, **kind)
    dearer = price(True, 0.5, infra="aws", region="us-west-2", accelerators="A10G:1", instance_type="g5.xlarge")
    busy = [phase(1, "train"), *(event(at, "gpu", busy=0.5) for at in (5, 20)), step(3601, 1)]

    def attempt(place: str, *prices: PriceRow, **asked: bool) -> tuple[Any, ...]:
        where = {"infra": "aws", "region": place}
        run_data = RunData(
            run(prices=[vars(one) for one in prices], **asked), attempts=[claim(1, 1, **where)], events={1: busy}
        )
        report = build_report(run_data, "FAILED", T + 9999)
        (row,) = report["attempts"]
        names = ("accelerators", "instance_type", "use_spot", "price_usd_per_hour")
        return *(row[name] for name in names), report["gpu_hours"], report["gpu_utilization"]

    unsure = attempt("us-east-1", spot, on_demand, dearer, may_be_on_demand=True)
    assert unsure == ("L4:1", "g6.xlarge", None, 0.72, 1.0, 0.5)
    assert attempt("us-east-1", spot, on_demand, dearer) == ("L4:1", "g6.xlarge", True, 0.36, 1.0, 0.5)
    assert attempt("us-east-1", spot, on_demand, use_spot=False) == ("L4:1", "g6.xlarge", False, 0.72, 1.0, 0.5)
    assert attempt("us-east-1", spot, dearer) == ("L4:1", "g6.xlarge", True, 0.36, 1.0, 0.5)
    unsure = attempt("us-east-1", on_demand, replace(dearer, region="*"), may_be_on_demand=True)
    assert unsure == ("", "", None, 0.72, 0.0, None)


def test_nothing_paid_yet() -> None:
    report = build_report(RunData(run()), "PENDING", T + 7)
    assert report["attempts"] == []
    assert report["phases"]["queue_s"] == pytest.approx(7)
    assert (report["paid_s"], report["cost_usd"], report["goodput"], report["started_at"]) == (0, 0, None, None)


def test_without_a_price_cost_is_not_known() -> None:
    report = build_report(replace(three_attempts(), run=run(prices=[])), "SUCCEEDED", T + 1000)
    assert report["cost_usd"] is None
    assert report["on_demand_usd"] is None
    assert report["saved_usd"] is None
    assert report["unpriced_s"] == 70


def test_a_later_price_changes_nothing_and_the_landing_place_decides() -> None:
    prices = [
        price(True, 1.0, infra="aws", region="us-east-1", instance_type="g6.xlarge", accelerators="L4:1"),
        price(True, 2.0, infra="aws", region="us-west-2", instance_type="g6.xlarge", accelerators="L4:1"),
        price(False, 3.0, infra="aws", region="us-west-2", instance_type="g6.xlarge", accelerators="L4:1"),
        price(False, 2.5, infra="gcp", region="*", instance_type="g2-standard-4", accelerators="L4:1"),
        price(False, 0.1, infra="gcp", region="*", instance_type="e2", accelerators=""),
    ]
    place = {"infra": "aws", "region": "us-west-2", "zone": "us-west-2b", "instance_type": "g6.xlarge"}
    events = {1: [phase(5, "train"), step(3000, 1)]}
    rows = [row(0, 3600, **place, accelerators="L4:1")]
    run_data = RunData(run(prices=[vars(one) for one in prices]), rows, [claim(1, 5)], events)
    report = build_report(run_data, "FAILED", T + 9999)
    assert report["cost_usd"] == pytest.approx(2.0)
    assert report["on_demand"]["price_usd_per_hour"] == 2.5  # the cheapest with an L4


def test_lost_events_do_not_shrink_the_work_that_is_known_to_be_done() -> None:
    """Attempt 2 left no event, but attempt 3 went on from its checkpoint."""
    run_data = three_attempts()
    third = [
        phase(66, "load"), event(67, "restored", step=4, commit="runs/r/commits/0002-00000004.json"),
        phase(70, "train"), step(73, 5), step(76, 6), phase(76, "teardown"), event(94, "end", reason="completed"),
    ]  # fmt: skip
    report = build_report(replace(run_data, events={1: run_data.events[1], 3: third}), "SUCCEEDED", T + 1000)
    assert report["useful_steps"] == 6
    assert report["replayed_steps"] == 0
    second = report["attempts"][1]
    assert (second["first_step"], second["last_step"], second["commits"]) == (None, 4, [4])
    assert second["phases"]["unknown_s"] == pytest.approx(15)
    # 4 steps took 8 + 6 seconds, so 6 take 21; save 1, start 10, leaving 19.
    assert report["on_demand"]["seconds"] == pytest.approx(21 + 1 + 10 + 19)


def test_time_before_a_resume_is_not_waiting() -> None:
    ended = [phase(1, "load"), event(9, "end", reason="failed", exit_code=1)]
    run_data = RunData(run(), [row(0, 10), row(1000, 1010)], [claim(1, 1), claim(2, 1001)], {1: ended})
    assert build_report(run_data, "SUCCEEDED", T + 2000)["phases"]["queue_s"] == 0
    ended[-1] = event(9, "end", reason="failed", exit_code=75)
    assert build_report(run_data, "SUCCEEDED", T + 2000)["phases"]["queue_s"] == pytest.approx(990)


@pytest.mark.parametrize(
    ("row_reason", "exit_code", "said", "expected"),
    [
        ("preempted", None, None, "preempted"),
        ("lost", None, None, "lost"),
        ("exited", 75, None, "preempted"),
        ("exited", 76, None, "paused"),
        ("exited", 1, None, "failed"),
        ("exited", 75, "failed", "failed"),
        ("cancelled", 75, "preempted", "cancelled"),
        ("preempted", 75, "preempted", "preempted"),
    ],
)
def test_why_an_attempt_ended(row_reason: str, exit_code: int | None, said: str | None, expected: str) -> None:
    events = [event(5, "end", reason=said, exit_code=exit_code)] if said else []
    run_data = RunData(run(), [row(0, 10, end_reason=row_reason, exit_code=exit_code)], [claim(1, 1)], {1: events})
    assert build_report(run_data, "FAILED", T + 99)["attempts"][0]["end_reason"] == expected


def test_tokens_are_those_of_the_certified_step() -> None:
    run_data = replace(three_attempts(), commits=[commit(3, 6), commit(3, 5)])
    assert build_report(run_data, "SUCCEEDED", T + 1000)["tokens"] == 600
    assert build_report(replace(run_data, commits=[], certificate=None), "FAILED", T + 1000)["tokens"] == 600
    assert build_report(run_data, "SUCCEEDED", T + 1000)["run_id"] == RUN_ID


def test_a_machine_that_never_claimed_is_billed_by_its_times() -> None:
    """On SkyPilot claims have no gaps: no number is left for a machine between two of them, nor for the last one."""
    run_data = three_attempts()
    rows = [*run_data.intervals, row(31, 39, end_reason="lost"), row(100, 103, end_reason="cancelled")]
    run_data = replace(run_data, intervals=rows)
    accounts = build_accounts(run_data, T + 1000)
    assert {bill.attempt for bill in bills_due(run_data, accounts)} == {0, 1, 2, 3}
    bills = bills_due(run_data, accounts, is_over=True)
    lost = {Keys(RUN_ID).lost_bill(bill.started_at, bill.ended_at): bill.paid_s for bill in bills if not bill.attempt}
    assert sorted(lost.values()) == [3.0, 8.0]
    elsewhere = replace(run_data, intervals=[], bills=bills)
    assert build_report(elsewhere, "SUCCEEDED", T + 1000)["paid_s"] == 70 + 11
    assert bills_due(elsewhere, build_accounts(elsewhere, T + 1000), is_over=True) == []


def test_a_failed_placement_in_the_same_second_is_a_machine_of_its_own() -> None:
    rows = [row(10, 10), *three_attempts().intervals]
    report = build_report(replace(three_attempts(), intervals=rows), "SUCCEEDED", T + 1000)
    assert report["paid_s"] == 70
    assert len(report["attempts"]) == 4


def test_savings_are_unknown_if_a_part_has_no_price() -> None:
    rows = [row(10, 30), row(40, 60, infra="aws"), row(65, 95, infra="aws")]
    report = build_report(replace(three_attempts(), intervals=rows), "SUCCEEDED", T + 1000)
    assert report["cost_usd"] == pytest.approx(0.002)
    assert report["unpriced_s"] == 50
    assert report["saved_usd"] is report["usd_per_million_tokens"] is None
    assert run_row(report)["preemptions_usd"] is None
    assert "2 lost machines cost \N{EN DASH}: restart" in run_text(report)


def test_the_on_demand_cost_is_unknown_without_steps() -> None:
    starting = RunData(run(), [row(0, None)], [claim(1, 20)], {1: [phase(20, "load")]})
    assert build_report(starting, "RUNNING", T + 60)["on_demand_usd"] is None


def test_a_machine_after_the_certificate_completed_and_leaves_the_on_demand_cost() -> None:
    run_data = three_attempts()
    late = row(100, 110, end_reason="exited", exit_code=0)
    before = build_report(run_data, "SUCCEEDED", T + 1000)
    after = build_report(replace(run_data, intervals=[*run_data.intervals, late]), "SUCCEEDED", T + 1000)
    assert [attempt["end_reason"] for attempt in after["attempts"]][2:] == ["completed", "completed"]
    assert after["paid_s"] == before["paid_s"] + 10
    assert after["on_demand"] == before["on_demand"]


def test_the_price_of_a_partition_is_its_own() -> None:
    rows = [price(False, usd, infra=f"slurm/{name}/gpu", region="*") for name, usd in (("a", 1.0), ("b", 5.0))]
    where = {"infra": "slurm/a/gpu", "region": "", "zone": "", "instance_type": "local", "use_spot": False}
    run_data = RunData(run(prices=[vars(one) for one in rows]), [row(0, 3600, **where)])
    assert build_report(run_data, "FAILED", T + 9999)["cost_usd"] == 1.0


def test_a_missing_price_is_not_zero() -> None:
    prices = [vars(price(use_spot, 0.0, source="no price is known")) for use_spot in (True, False)]
    report = build_report(replace(three_attempts(), run=run(prices=prices)), "SUCCEEDED", T + 1000)
    assert report["cost_usd"] is report["on_demand_usd"] is None
    assert report["unpriced_s"] == 70


def test_several_kinds_of_gpu_are_priced_by_kind() -> None:
    prices = [price(spot, usd, accelerators=gpu) for gpu, full in (("A100:1", 7.2), ("L4:1", 0.72))
              for spot, usd in ((True, full / 2), (False, full))]  # fmt: skip
    kinds = ("A100:1", "L4:1", "A100:1")
    rows = [replace(one, accelerators=kind) for one, kind in zip(three_attempts().intervals, kinds, strict=True)]
    run_data = replace(three_attempts(), run=run(prices=[vars(one) for one in prices]), intervals=rows)
    report = build_report(run_data, "SUCCEEDED", T + 1000)
    on_l4 = 6 + 2  # two steps and an evaluation
    assert report["on_demand"]["seconds"] == pytest.approx(43)
    assert report["on_demand_usd"] == pytest.approx(((43 - on_l4) * 7.2 + on_l4 * 0.72) / 3600)


def test_a_run_that_was_cancelled_while_it_waited() -> None:
    waited = RunData(run=run(), cancelled_at=T + 120)
    report = build_report(waited, "CANCELLED", T + 9000)
    assert report["phases"]["queue_s"] == pytest.approx(120)
    assert (report["cost_usd"], report["on_demand_usd"], report["saved_usd"]) == (0, 0, 0)
    assert report["on_demand"]["price_usd_per_hour"] == 0.72
    preempted = RunData(run=run(), intervals=[row(10, 30, end_reason="preempted")], cancelled_at=T + 100)
    assert build_report(preempted, "CANCELLED", T + 9000)["phases"]["queue_s"] == pytest.approx(10 + 70)
    running = RunData(run=run(), intervals=[row(10, 30, end_reason="cancelled")], cancelled_at=T + 30)
    assert build_report(running, "CANCELLED", T + 9000)["phases"]["queue_s"] == pytest.approx(10)
