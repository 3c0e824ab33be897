"""When nothing happens for too long, in each phase; and what must not be taken for that."""

from dataclasses import replace
from typing import Any

import pytest

from spotune.core.store import Call
from spotune.guard.ranks import Work
from spotune.guard.stalls import BYTES_PER_S, LONGEST_TICK_S, Sample, SeenTime, Stall, Stalls, sample_every_s
from tests.clocks import Clock

FLOOR_S, PATIENCE_S = 600.0, 1800.0
BUSY = 0.5  # of a core
EVERY_S = 10.0


class Watched:
    """Ranks that a test has do something or nothing, and what the watchdog makes of it."""

    def __init__(self, floor_s: float = FLOOR_S, **known: float) -> None:
        self.wall = Clock(1e9)
        self.stalls = Stalls(floor_s, PATIENCE_S, lambda: known, self.wall)
        self.seen_s = 0.0
        self.sample = Sample(Work(), Work())

    def say(self, event: str, **fields: Any) -> None:
        self.stalls.on_event({"event": event, **fields})

    def phase(self, phase: str) -> None:
        self.say("phase", phase=phase)

    def step(self, took_s: float, times: int = 1) -> None:
        for _ in range(times):
            assert self.pass_s(took_s) is None
            self.say("step", step=1)

    def train(self) -> None:
        """Gets the ranks past their first steps, of a second each."""
        self.say("restored", step=0)
        self.phase("train")
        self.step(1.0, times=10)

    def pass_s(
        self, seconds: float, cpu: float = 0.0, rate: float = 0.0, guard: float = 0.0, **sample: Any
    ) -> Stall | None:
        """Lets time pass in which ranks use so much of a core and move so many bytes a second; the first stall."""
        left_s = seconds
        while left_s > 0:
            span_s = min(EVERY_S, left_s)
            left_s -= span_s
            self.seen_s += span_s
            self.wall.advance(span_s)
            ranks, own = self.sample.ranks, self.sample.guard
            if ranks is not None:
                cpu_s, moved = ranks.cpu_s + cpu * span_s, ranks.moved_bytes + rate * span_s
                ranks = Work(cpu_s, moved, sample.get("stopped", ranks.stopped))
            own = replace(own, moved_bytes=own.moved_bytes + guard * span_s)
            self.sample = replace(
                self.sample,
                ranks=ranks,
                guard=own,
                uploading=sample.get("uploading", self.sample.uploading),
                calls=sample.get("calls", self.sample.calls),
                sent_bytes=self.sample.sent_bytes + sample.get("sent", 0),
            )
            if stall := self.stalls.check(self.seen_s, self.sample):
                return stall
        return None


def test_no_step_for_the_floor_is_a_stall_whatever_the_cpus_do() -> None:
    ranks = Watched()
    ranks.train()
    at = ranks.wall.now
    assert ranks.pass_s(FLOOR_S, cpu=8.0, rate=1e9) is None
    stall = ranks.pass_s(EVERY_S, cpu=8.0, rate=1e9)
    assert stall == Stall("train", FLOOR_S + EVERY_S, FLOOR_S, since=at)
    assert stall.what == "no step"


def test_slow_steps_that_get_slower_by_five_are_none_and_by_seven_are() -> None:
    ranks = Watched()
    ranks.train()
    ranks.step(300.0, times=40)
    ranks.step(1500.0)
    assert ranks.pass_s(6 * 300.0) is None
    stall = ranks.pass_s(300.0)
    assert stall
    assert (stall.phase, stall.limit_s) == ("train", 1800.0)


def test_the_first_steps_have_longer_and_work_is_believed_before_the_first_one() -> None:
    ranks = Watched()
    ranks.say("restored", step=0)
    ranks.phase("train")
    assert ranks.pass_s(11 * FLOOR_S, cpu=BUSY) is None  # compiles
    ranks.say("step", step=1)
    assert ranks.pass_s(5.9 * 11 * FLOOR_S) is None  # the second may be as slow
    assert ranks.pass_s(2 * FLOOR_S)


def test_a_collective_that_hangs_before_the_first_step_is_a_stall() -> None:
    ranks = Watched()
    ranks.phase("train")
    assert ranks.pass_s(12 * FLOOR_S, cpu=8.0) is None
    assert ranks.pass_s(EVERY_S, cpu=8.0)


def test_what_an_earlier_machine_measured_counts_before_the_first_step() -> None:
    ranks = Watched(step_s=1000.0)
    ranks.phase("train")
    assert ranks.pass_s(6000.0) is None
    assert ranks.pass_s(EVERY_S)


@pytest.mark.parametrize("work", [{"cpu": BUSY}, {"rate": BYTES_PER_S * 2}])
def test_a_load_that_works_may_take_hours(work: dict[str, float]) -> None:
    ranks = Watched()
    ranks.phase("load")
    assert ranks.pass_s(3.9 * 3600, **work) is None
    assert ranks.pass_s(FLOOR_S + EVERY_S)


@pytest.mark.parametrize("work", [{}, {"cpu": 0.01, "rate": 1000.0}])
def test_a_load_that_does_next_to_nothing_is_a_stall(work: dict[str, float]) -> None:
    ranks = Watched()
    ranks.phase("load")
    assert ranks.pass_s(FLOOR_S, **work) is None
    stall = ranks.pass_s(2 * EVERY_S, **work)
    assert stall
    assert stall.what == "no sign of life in the phase load"


def test_a_stopped_rank_is_not_excused_by_what_others_do() -> None:
    ranks = Watched()
    ranks.phase("load")
    assert ranks.pass_s(FLOOR_S, cpu=8.0, rate=1e9, stopped=True) is None
    assert ranks.pass_s(EVERY_S, cpu=8.0, rate=1e9)


def test_others_that_spin_do_not_excuse_a_load_for_ever() -> None:
    ranks = Watched()
    ranks.phase("load")
    assert ranks.pass_s(24 * FLOOR_S, cpu=8.0) is None
    assert ranks.pass_s(EVERY_S, cpu=8.0)


def test_where_nobody_says_what_processes_do_a_load_has_hours() -> None:
    ranks = Watched()
    ranks.sample = Sample(None, Work())
    ranks.phase("load")
    assert ranks.pass_s(24 * FLOOR_S) is None
    assert ranks.pass_s(EVERY_S)


def test_a_restore_has_the_buckets_patience_without_a_byte() -> None:
    ranks = Watched()
    ranks.phase("restore")
    assert ranks.pass_s(10 * PATIENCE_S, guard=BYTES_PER_S * 2) is None
    assert ranks.pass_s(PATIENCE_S) is None
    assert ranks.pass_s(EVERY_S)


def test_ranks_that_have_their_checkpoint_must_load_it() -> None:
    ranks = Watched()
    ranks.phase("restore")
    ranks.say("restored", step=3)
    assert ranks.pass_s(FLOOR_S, guard=1e9) is None
    assert ranks.pass_s(EVERY_S, guard=1e9)


def test_an_evaluation_says_that_it_has_come_on() -> None:
    ranks = Watched()
    ranks.train()
    ranks.phase("eval")
    for _ in range(10):
        assert ranks.pass_s(FLOOR_S * 1.9, cpu=8.0) is None
        ranks.say("predicted", step=10)
    assert ranks.pass_s(2 * FLOOR_S, cpu=8.0) is None
    stall = ranks.pass_s(EVERY_S, cpu=8.0)
    assert stall
    assert stall.phase == "eval"


def test_an_evaluation_is_measured_by_the_longest_before() -> None:
    ranks = Watched()
    ranks.train()
    ranks.phase("eval")
    assert ranks.pass_s(1000.0) is None
    ranks.phase("train")
    ranks.step(1.0)
    ranks.phase("eval")
    assert ranks.pass_s(2000.0) is None
    assert ranks.pass_s(EVERY_S)


@pytest.mark.parametrize("phase", ["save", "teardown"])
def test_a_save_may_write_for_long_and_then_has_what_was_measured(phase: str) -> None:
    ranks = Watched(stall_s=50.0, write_s=250.0)
    ranks.train()
    ranks.phase(phase)
    assert ranks.pass_s(7200.0, rate=BYTES_PER_S * 2) is None
    assert ranks.pass_s(6 * 300.0) is None
    assert ranks.pass_s(EVERY_S)


def test_an_upload_without_a_byte_is_a_stall_while_training_goes_on() -> None:
    ranks = Watched()
    ranks.train()
    ranks.pass_s(EVERY_S, uploading=12)
    for _ in range(100):  # bytes are moved
        ranks.step(60.0)
        assert ranks.pass_s(EVERY_S, guard=BYTES_PER_S * 2) is None
    while (stall := ranks.pass_s(60.0)) is None:
        ranks.say("step", step=1)
    assert (stall.phase, stall.limit_s) == ("upload", PATIENCE_S)
    assert stall.silent_s <= PATIENCE_S + 60.0
    assert stall.what == "no byte of a checkpoint was uploaded"


def test_an_upload_that_sends_a_byte_now_and_then_is_none() -> None:
    ranks = Watched()
    ranks.train()
    ranks.phase("eval")
    for _ in range(20):
        ranks.say("predicted", step=10)
        assert ranks.pass_s(EVERY_S, uploading=12, sent=1) is None
        assert ranks.pass_s(0.3 * PATIENCE_S) is None


def call(moved_bytes: int = 0, verb: str = "upload") -> dict[int, Call]:
    return {7: Call(verb, "runs/a/output/model.safetensors", moved_bytes)}


def test_a_call_to_the_bucket_that_moves_nothing_is_a_stall_once_the_ranks_have_ended() -> None:
    ranks = Watched(send_s=400.0)
    ranks.train()
    ranks.stalls.end_ranks()
    assert ranks.pass_s(10 * PATIENCE_S) is None  # nothing is asked for
    at = ranks.wall.now + EVERY_S
    assert ranks.pass_s(6 * 400.0 + EVERY_S, calls=call()) is None
    stall = ranks.pass_s(EVERY_S)
    assert stall
    assert (stall.phase, stall.limit_s, stall.since) == ("upload", 2400.0, at)
    assert stall.what == "no answer from the bucket to: upload runs/a/output/model.safetensors"


@pytest.mark.parametrize("rate", [1, 1 << 30])
def test_a_call_that_moves_bytes_however_slowly_is_none(rate: int) -> None:
    ranks = Watched()
    ranks.stalls.end_ranks()
    for moved in range(0, 20 * rate, rate):
        assert ranks.pass_s(0.9 * PATIENCE_S, calls=call(moved)) is None


def test_calls_that_return_in_time_are_none() -> None:
    ranks = Watched()
    ranks.stalls.end_ranks()
    for number in range(20):
        assert ranks.pass_s(0.9 * PATIENCE_S, calls={number: Call("create", "runs/a/events")}) is None


def test_events_that_hang_are_a_stall_beside_training() -> None:
    ranks = Watched()
    ranks.train()
    while (stall := ranks.pass_s(60.0, calls=call(verb="create"))) is None:
        ranks.say("step", step=1)
    assert (stall.phase, stall.limit_s) == ("upload", PATIENCE_S)


def test_time_that_was_missed_begins_a_calls_limit_anew() -> None:
    ranks = Watched()
    ranks.stalls.end_ranks()
    assert ranks.pass_s(0.9 * PATIENCE_S, calls=call()) is None
    ranks.stalls.forgive(1.0)
    assert ranks.pass_s(0.9 * PATIENCE_S) is None


def test_the_next_upload_has_its_own_time() -> None:
    ranks = Watched()
    ranks.train()
    for step in range(1, 10):
        assert ranks.pass_s(EVERY_S, uploading=step) is None
        ranks.step(PATIENCE_S / 3.5, times=3)
    ranks.pass_s(EVERY_S, uploading=None)
    ranks.step(500.0, times=20)


def test_time_after_a_save_is_no_steps_time() -> None:
    ranks = Watched()
    ranks.train()
    for _ in range(60):
        ranks.phase("save")
        assert ranks.pass_s(900.0, rate=1e9) is None
        ranks.phase("train")
        ranks.step(1.0)
    assert ranks.pass_s(FLOOR_S) is None
    stall = ranks.pass_s(EVERY_S)
    assert stall
    assert stall.limit_s == FLOOR_S


def test_the_guards_own_events_are_no_sign_of_life() -> None:
    ranks = Watched()
    ranks.train()
    for _ in range(60):
        ranks.say("alive")
        ranks.say("gpu", busy=1.0)
        ranks.say("commit", step=3)
        assert ranks.pass_s(EVERY_S) is None
    assert ranks.pass_s(EVERY_S)


def test_what_is_off_never_stalls() -> None:
    ranks = Watched(floor_s=0.0)
    ranks.train()
    assert ranks.pass_s(1e5, stopped=True, uploading=3) is None


def test_time_that_was_missed_begins_every_limit_anew() -> None:
    ranks = Watched()
    ranks.train()
    assert ranks.pass_s(FLOOR_S) is None
    ranks.stalls.forgive(0.0)
    ranks.stalls.forgive(3600.0)
    assert ranks.pass_s(FLOOR_S) is None
    assert ranks.pass_s(EVERY_S)


def test_only_time_in_which_the_guard_ran_is_seen() -> None:
    clock, boot = Clock(50.0), Clock(80.0)
    seen = SeenTime(clock, boot)

    def both(seconds: float) -> float:
        clock.advance(seconds)
        boot.advance(seconds)
        return seen.tick()

    assert [both(0.5), both(LONGEST_TICK_S), seen.seen_s] == [0.0, 0.0, 0.5 + LONGEST_TICK_S]
    assert both(7200.0) == 7200.0  # the guard was stopped
    boot.advance(3600.0)  # the machine was suspended: the other clock stood still
    assert both(0.5) == 3600.5
    assert both(0.5) == 0.0
    assert seen.seen_s == LONGEST_TICK_S + 1.0
    clock.now -= 10.0  # no clock should
    boot.now -= 10.0
    assert (seen.tick(), both(1.0)) == (0.0, 0.0)


def test_processes_are_looked_at_seldom_where_limits_are_long() -> None:
    assert [sample_every_s(floor_s) for floor_s in (5.0, 60.0, 600.0, 36000.0)] == [0.5, 1.0, 10.0, 10.0]
