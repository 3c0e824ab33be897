"""Whatever a machine wrote, its paid seconds are divided and none is lost or invented."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotune.core.protocol import parse_lines
from spotune.cost.account import bills_due, build_accounts
from spotune.cost.machines import RunData, Span, clean, clock_offset_s, divide, total
from spotune.cost.page import page_of
from spotune.cost.report import build_report
from spotune.cost.tables import run_text
from spotune.launch.engine import PaidInterval
from tests.unit.cost.cases import T, claim, event, phase, row, run, step, three_attempts

SPAN = Span(T, T + 20)


def seconds(events: list[dict[str, Any]], span: Span = SPAN, done_before: int = 0) -> dict[str, float]:
    segments, _ = divide(span, None, events, done_before)
    return {phase: amount for phase, amount in total(segments).items() if amount}


def test_a_step_that_the_end_cut_off_is_not_useful() -> None:
    cut = [phase(0, "load"), phase(2, "train"), step(5, 1)]
    assert seconds(cut) == pytest.approx({"load": 2, "useful": 3, "unknown": 15})
    left = [*cut, event(9, "end", reason="preempted", exit_code=75)]
    assert seconds(left) == pytest.approx({"load": 2, "useful": 3, "teardown": 15})
    crashed = [*cut, event(9, "end", reason="failed", exit_code=1)]
    assert seconds(crashed) == pytest.approx({"load": 2, "useful": 3, "unknown": 4, "teardown": 11})


def test_waiting_for_data_is_no_longer_than_the_step() -> None:
    assert seconds([phase(0, "train"), step(4, 1, 99.0), step(20, 2, -5.0)]) == pytest.approx(
        {"data_wait": 4, "useful": 16}
    )


def test_a_step_may_be_interrupted_by_other_phases() -> None:
    events = [phase(0, "train"), step(4, 1), phase(5, "eval"), phase(8, "train"), step(20, 2, 2.0)]
    assert seconds(events) == pytest.approx({"useful": 4 + 11, "data_wait": 2, "eval": 3})


def test_steps_that_were_done_before_are_replayed() -> None:
    events = [phase(0, "train"), step(5, 7, 1.0), step(11, 8), step(20, 9)]
    assert seconds(events, done_before=8) == pytest.approx({"data_wait": 1, "replayed": 10, "useful": 9})


STALL = [phase(0, "load"), phase(2, "train"), step(5, 1), event(15, "stall", phase="train", since=T + 5)]


@pytest.mark.parametrize("reason", ["stalled", "failed"])
def test_a_stall_is_paid_from_the_last_sign_of_life_to_the_end(reason: str) -> None:
    events = [*STALL, event(16, "end", reason=reason, exit_code=75)]
    assert seconds(events) == pytest.approx({"load": 2, "useful": 3, "stalled": 11, "teardown": 4})


def test_a_stall_in_a_save_ends_that_phase_and_nothing_follows_it() -> None:
    saving = [phase(0, "train"), step(4, 1), phase(5, "save"), event(14, "stall", phase="save", since=T + 6)]
    late = [phase(14.5, "train"), step(15, 2), event(16, "end", reason="stalled", exit_code=75)]
    assert seconds([*saving, *late]) == pytest.approx({"useful": 4, "save_stall": 1, "stalled": 10 + 1, "teardown": 4})


@pytest.mark.parametrize("since", [None, "x", 0.0, T + 1e6])
def test_a_stall_without_a_beginning_is_still_divided(since: Any) -> None:
    events = [*STALL[:-1], event(15, "stall", phase="train", since=since), event(16, "end", reason="stalled")]
    assert sum(seconds(events).values()) == pytest.approx(20)


def test_doubled_and_shuffled_lines_change_nothing() -> None:
    events = three_attempts().events[1]
    span = Span(T + 10, T + 30, setup_s=3.0)
    assert seconds([*reversed(events), *events], span) == seconds(list(events), span)


def test_a_step_implies_training_if_the_phase_line_is_lost() -> None:
    events = [event(0, "start"), step(8, 1), step(14, 2, 1.0), phase(15, "save"), step(20, 3)]
    assert seconds(events) == pytest.approx({"unknown": 8 + 5, "data_wait": 1, "useful": 5 + 1})


@pytest.mark.parametrize("at", [0, 946_684_799, 1.7e12])
def test_a_line_with_an_impossible_time_is_ignored(at: float) -> None:
    good = [step(4, 1), step(8, 2)]
    lines = [json.dumps(one).encode() for one in [*good, {"t": at, "event": "alive"}]]
    assert parse_lines(b"\n".join(lines)) == good


def test_a_cut_line_is_skipped() -> None:
    lines = json.dumps(step(4, 1)).encode() + b'\n{"t": 17000\n[]\n"x"\n\xff\xfe\n{"event": "step"}\n' + b'{"t": 1'
    assert parse_lines(lines) == [step(4, 1)]
    assert clean([*parse_lines(lines), {"t": float("nan"), "event": "step"}, {"t": True, "event": "x"}]) == [step(4, 1)]


@pytest.mark.parametrize("skew_s", [-240.0, -30.0, 30.0, 240.0])
def test_a_skewed_clock_keeps_the_machines_own_durations(skew_s: float) -> None:
    events = [phase(0, "load"), phase(6, "train"), step(14, 1)]
    segments, steps = divide(SPAN, None, [{**one, "t": one["t"] + skew_s} for one in events], 0)
    sums = total(segments)
    assert (sums["load"], sums["useful"]) == pytest.approx((6, 8))
    assert T <= steps[0].ended_at <= T + 20


def test_events_hours_off_are_clipped_unless_all_are() -> None:
    assert clock_offset_s(SPAN, T + 5, T + 5 + 7200) == 0.0
    assert clock_offset_s(SPAN, T + 7200, T + 7210) == pytest.approx(-7190)
    assert seconds([phase(5, "load"), phase(7200, "train")]) == pytest.approx({"provision": 5, "load": 15})


def test_silence() -> None:
    assert seconds([], Span(T, T + 20, setup_s=4)) == pytest.approx({"setup": 4, "unknown": 16})
    assert seconds([], Span(T, T + 20, setup_s=4, is_open=True)) == pytest.approx({"setup": 4, "provision": 16})
    assert seconds([], Span(T, T)) == {}


TIMES = st.floats(-1000, 1000) | st.floats(-1e7, 1e7) | st.floats(allow_nan=True, allow_infinity=True)
NAMES = st.sampled_from(["start", "phase", "restored", "step", "log", "save", "commit", "notice", "end", "claim", "?"])
PHASE = st.sampled_from(["setup", "load", "restore", "train", "eval", "save", "idle", "teardown", "new", "", None, 3])
NUMBERS = st.integers(-2, 12) | st.floats(allow_nan=True) | st.none() | st.text(max_size=2)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "phase": PHASE,
    "step": NUMBERS,
    "data_wait_s": NUMBERS,
    "loss": NUMBERS,
    "reason": st.sampled_from(["completed", "preempted", "failed", "lost", "odd", None]),
    "commit": st.sampled_from([None, "runs/r/commits/0001-00000004.json", "x"]),
    "tokens": NUMBERS,
}
EVENTS = st.lists(
    st.builds(
        lambda at, name, fields: {"t": T + at, "event": name, **fields},
        TIMES, NAMES, st.fixed_dictionaries({}, optional=FIELDS),
    ),
    max_size=25,
)  # fmt: skip


@st.composite
def evidences(draw: st.DrawFn) -> tuple[RunData, list[PaidInterval]]:
    """Any sequence of machines, claims and events, with records missing, doubled or dated anew, and clocks that differ.

    With it the machines that there really were, each once.
    """
    intervals, at = [], 0.0
    for _ in range(draw(st.integers(0, 4))):
        at += draw(st.floats(0.1, 300))
        length = draw(st.floats(0, 600))
        setup_s = draw(st.floats(-5, 700))
        reason = draw(st.sampled_from(["preempted", "exited", "cancelled", "lost", ""]))
        intervals.append(row(at, at + length, setup_s=setup_s, end_reason=reason, nodes=draw(st.integers(0, 3))))
        at += length
    if draw(st.booleans()):
        intervals.append(row(at + 0.1, None))
    attempts = [claim(n, draw(st.floats(-300, at + 600))) for n in range(1, draw(st.integers(0, 5)) + 1)]
    events = draw(st.dictionaries(st.integers(1, 5), EVENTS, max_size=5))
    whole = RunData(run(), intervals, attempts, events)
    bills = [bill for bill in bills_due(whole, build_accounts(whole, T + 5000)) if draw(st.booleans())]
    billed = {bill.started_at for bill in bills}
    seen = []
    for one in intervals:
        if one.started_at not in billed:
            seen += [one] * draw(st.integers(1, 2))
        elif one.ended_at is not None and draw(st.booleans()):  # else the engine has forgotten it
            later = draw(st.floats(0, 0.4)) * (one.ended_at - one.started_at)
            seen.append(replace(one, started_at=one.started_at + later))
    fast_s = draw(st.sampled_from([0, 0, -7200, 3600]))  # a clock that the bill's writer did not have to go by
    claims = [replace(one, claimed_at=one.claimed_at + fast_s) for one in attempts]
    bills *= draw(st.integers(1, 2))
    return replace(whole, intervals=draw(st.permutations(seen)), attempts=claims, bills=bills), intervals


@settings(max_examples=150, deadline=None, database=None)
@given(evidences(), st.floats(0, 5000), st.sampled_from(["RUNNING", "RECOVERING", "FAILED", "CANCELLED"]))
def test_phases_are_never_negative_and_sum_to_what_was_paid(
    given: tuple[RunData, list[PaidInterval]], now: float, state: Any
) -> None:
    run_data, machines = given
    report = build_report(run_data, state, T + now)
    phases = dict(report["phases"])
    assert phases.pop("queue_s") >= 0
    assert min(phases.values()) >= 0
    assert sum(phases.values()) == pytest.approx(report["paid_s"], abs=1e-3)
    assert len(report["attempts"]) >= max(len(machines), len(run_data.attempts))
    numbers = [attempt["attempt"] for attempt in report["attempts"] if attempt["attempt"] is not None]
    assert len(set(numbers)) == len(numbers)
    by_row = {attempt["attempt"] for attempt in report["attempts"] if attempt["reconciled"]}
    assert by_row >= {bill.attempt for bill in run_data.bills} - {0}
    for attempt in report["attempts"]:
        assert sum(attempt["phases"].values()) == pytest.approx(attempt["paid_s"], abs=1e-3)
        assert min(attempt["phases"].values()) >= 0
    rows = [one for one in machines if one.ended_at is not None]
    paid = sum((one.ended_at or 0.0) - one.started_at for one in rows)
    reconciled = report["paid_s"] - report["unreconciled_s"]
    running = [attempt for attempt in report["attempts"] if attempt["ended_at"] is None and attempt["reconciled"]]
    still = sum(attempt["paid_s"] for attempt in running)
    assert reconciled - still == pytest.approx(paid, abs=1e-3)
    for one in report["preemptions"]:
        assert min(one[name] for name in one if name.endswith("_s")) >= 0
        assert (one["cost_usd"] or 0) <= (report["cost_usd"] or 0)
    json.dumps(report, allow_nan=False)
    assert run_text(report)
    assert page_of(report)


@settings(max_examples=150, deadline=None, database=None)
@given(EVENTS, st.floats(0, 500), st.floats(0, 500), st.integers(0, 12))
def test_segments_tile_the_interval(events: list[dict[str, Any]], length: float, setup_s: float, done: int) -> None:
    span = Span(T, T + length, setup_s)
    segments, _ = divide(span, None, events, done)
    at = span.started_at
    for segment in segments:
        assert segment.started_at == at
        assert segment.ended_at > at
        at = segment.ended_at
    assert at == span.ended_at
