"""A store that does not answer: what is tried again, after which pauses, and for how long. The clock is the test's."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spotune.core.errors import Fenced, Misplaced, SpotuneError, StoreError
from spotune.core.protocol import OUTPUT, EventLog, Staged
from spotune.core.records import Certificate
from spotune.core.store import Store
from spotune.guard.attempt import CERTIFY_PAUSE_S, Attempt
from spotune.guard.checkpoints import PAUSES_S, Uploader
from spotune.guard.claim import claim_attempt
from spotune.guard.extras import LEAVE_S, PAUSE_S, Extras, TakenAway
from spotune.guard.journal import Journal, Node
from spotune.guard.main import read_verdict
from spotune.guard.multinode import Leader
from spotune.guard.restore_thread import PAUSES_S as RESTORE_PAUSES_S
from spotune.guard.restore_thread import RestoreThread
from tests.clocks import Clock, QuickNotices
from tests.fake_worker import write_weights
from tests.unit.guard.attempts import KEYS, make_context
from tests.waiting import LIMIT_S, until

GONE = StoreError("the bucket is gone")


@pytest.fixture
def clock() -> Clock:
    return Clock(1000.0)


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None, str], list[str]]:
    """Makes the next ``count`` calls of one verb of the store fail, all with None; returns the calls that failed."""

    def make(count: int | None, verb: str) -> list[str]:
        failed: list[str] = []
        real = getattr(Store, verb)

        def call(self: Store, *arguments: Any) -> Any:
            if count is None or len(failed) < count:
                failed.append(verb)
                raise GONE
            return real(self, *arguments)

        monkeypatch.setattr(Store, verb, call)
        return failed

    return make


def staged(step: int) -> Staged:
    return Staged(step, f"/nowhere/{step}", epoch=0.0, tokens=0, world_size=1, threads=1)


class Pauses(tuple[float, ...]):
    """As many pauses as there really are, none of which takes time; ``asked``: which ones were taken."""

    asked: list[Any]

    def __getitem__(self, index: Any) -> Any:
        self.asked.append(index)
        return super().__getitem__(index)


def test_an_upload_is_tried_again_with_growing_pauses(capsys: pytest.CaptureFixture[str]) -> None:
    pauses, left = Pauses([0.0] * len(PAUSES_S)), [GONE, OSError("no route"), GONE, GONE, GONE]
    pauses.asked = []

    def work(one: Staged) -> None:
        if left:
            raise left.pop(0)

    uploader = Uploader(work, pauses_s=pauses)
    uploader.submit(staged(5))
    assert uploader.drain(LIMIT_S)
    uploader.close()
    assert pauses.asked == [0, 1, 2, 3, 3]
    assert PAUSES_S == (1.0, 4.0, 15.0, 60.0)
    assert capsys.readouterr().err.count("step 5 is not committed yet: ") == 5


def test_how_long_the_store_has_been_away_counts_from_the_first_failure(clock: Clock) -> None:
    tries: list[float] = []

    def work(one: Staged) -> None:
        tries.append(clock())
        if len(tries) < 3:
            clock.advance(10)
            raise GONE

    uploader = Uploader(work, clock, pauses_s=(3600.0,))
    uploader.submit(staged(5))
    until(lambda: uploader.error)
    assert uploader.away_s == 10
    clock.advance(7)
    assert uploader.away_s == 17
    uploader.submit(staged(6))  # a newer one ends the pause
    until(lambda: len(tries) == 2 and uploader.away_s == 27)
    uploader.submit(staged(7))
    assert uploader.drain(LIMIT_S)
    uploader.close()
    assert (uploader.away_s, uploader.error) == (0, None)


def test_nobody_waits_for_an_upload_that_only_people_can_help(clock: Clock) -> None:
    """The machine is paid for meanwhile. A newer checkpoint may have another place."""

    def work(one: Staged) -> None:
        if one.step == 5:
            raise Misplaced("runs/a-run/checkpoints/00000005-0001: a pipe, not a folder (remove it)")

    uploader = Uploader(work, clock, pauses_s=(3600.0,))
    uploader.submit(staged(5))
    began = time.monotonic()
    assert not uploader.drain(LIMIT_S)
    assert time.monotonic() - began < LIMIT_S / 2
    assert isinstance(uploader.error, Misplaced)
    uploader.submit(staged(6))
    assert uploader.drain(LIMIT_S)
    uploader.close()


def test_an_attempt_that_is_fenced_off_tries_nothing_again(clock: Clock) -> None:
    def work(one: Staged) -> None:
        raise Fenced("attempt 2 has taken over")

    uploader = Uploader(work, clock)
    uploader.submit(staged(5))
    assert not uploader.drain(LIMIT_S)
    uploader.close()
    assert uploader.fenced


def test_the_journal_sends_what_it_could_not_with_the_next_part(
    local_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> bool:
        raise GONE

    with monkeypatch.context() as patch:
        patch.setattr(Store, "create", fail)
        journal = Journal(local_store, KEYS, 1, tmp_path / "events")
        journal.write("commit", step=5)
        journal.write("notice", source="SIGTERM")
        with pytest.raises(StoreError, match="the bucket is gone"):
            journal.close()
    assert local_store.keys(KEYS.attempts) == []
    journal.write("end", reason="preempted")
    journal.close()
    (part,) = local_store.keys(KEYS.attempts)
    events = [json.loads(line)["event"] for line in (local_store.read(part) or b"").splitlines()]
    assert [event for event in events if event != "alive"] == ["commit", "notice", "end"]


@pytest.fixture
def attempt(local_store: Store, tmp_path: Path, clock: Clock) -> Iterator[Attempt]:
    """Attempt 1, with all its steps made."""
    claim_attempt(local_store, KEYS, Node.read({}))
    context = make_context(local_store, tmp_path, patience_s=40.0)
    made = Attempt(context, QuickNotices(clock), clock)
    (context.folder / OUTPUT).mkdir()
    write_weights(context.folder / OUTPUT / "model.safetensors", b"state")
    yield made
    made.journal.close()


def test_a_result_is_certified_once_the_bucket_is_back(
    attempt: Attempt, clock: Clock, away: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    away(2, "upload_new")
    assert attempt._certify(7).step == 7
    assert clock.slept == [CERTIFY_PAUSE_S] * 2
    assert capsys.readouterr().err.count("the result is not certified yet: the bucket is gone") == 2


def test_a_result_is_given_up_after_patience(
    attempt: Attempt, clock: Clock, away: Callable[..., list[str]], local_store: Store
) -> None:
    failed = away(None, "upload_new")
    with pytest.raises(StoreError, match="the bucket is gone; all 7 steps are made, the result is not in the bucket"):
        attempt._certify(7)
    assert clock.slept == [CERTIFY_PAUSE_S] * 3  # 45 s, more than the 40 of its patience
    assert len(failed) == 4
    assert not local_store.exists(KEYS.completed)


def test_a_result_is_tried_for_as_long_as_the_machine_lasts(
    attempt: Attempt, clock: Clock, away: Callable[..., list[str]]
) -> None:
    away(None, "upload_new")
    attempt.notices.give("SIGTERM", 20.0)
    with pytest.raises(StoreError, match="all 7 steps are made"):
        attempt._certify(7)
    assert clock.slept == [CERTIFY_PAUSE_S, 20.0 - CERTIFY_PAUSE_S]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("place", ["output/model.safetensors", "output/completed.json"])
def test_what_is_no_file_in_the_place_of_the_result_ends_the_attempt_at_once(
    attempt: Attempt, clock: Clock, local_store: Store, make: Callable[[Path], None], place: str
) -> None:
    """Somebody has to remove it: no machine is paid for meanwhile."""
    there = Path(local_store.url.removeprefix("file://"), KEYS.root, place)
    there.parent.mkdir()
    make(there)
    with pytest.raises(SpotuneError, match=rf"^{KEYS.root}/{place}: .*remove it") as error:
        attempt._certify(7)
    assert (error.value.exit_code, clock.slept) == (2, [])


def test_an_extra_is_pending_at_once_where_no_file_can_lie(local_store: Store, tmp_path: Path, clock: Clock) -> None:
    context = make_context(local_store, tmp_path)
    journal = Journal(local_store, KEYS, 1, tmp_path / "events.jsonl")
    certificate = Certificate(run_id="a-run", attempt=1, step=7, weights_sha256="w", files={})
    extras = Extras(context, certificate, QuickNotices(clock), journal, clock)

    def work() -> None:
        raise Misplaced("runs/a-run/merged: a link, not a folder (remove it)")

    with pytest.raises(Misplaced):
        extras._patiently(work)
    assert clock.slept == []
    journal.close()


@pytest.mark.parametrize("failures", [3, 4])
def test_a_checkpoint_is_fetched_in_several_tries(
    local_store: Store,
    tmp_path: Path,
    clock: Clock,
    away: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    failures: int,
) -> None:
    monkeypatch.setattr("spotune.guard.claim.check_data", lambda run: None)
    monkeypatch.setattr("spotune.guard.restore_thread.record_history", lambda store, keys: [])
    monkeypatch.setattr("spotune.guard.restore_thread.newest_commit", lambda store, keys: None)
    away(failures, "keys")
    context = make_context(local_store, tmp_path)
    (context.folder / OUTPUT).mkdir(parents=True)
    EventLog(tmp_path / "events").close()
    journal = Journal(local_store, KEYS, 1, tmp_path / "events")
    restoring = RestoreThread(context, journal, Leader("a-run", context.machine, ""), clock.sleep)
    until(lambda: restoring.ready or restoring.error)
    restoring._thread.join()
    journal.close()
    assert clock.slept == list(RESTORE_PAUSES_S)
    assert (restoring.error is None, restoring.ready is None) == ((True, False) if failures == 3 else (False, True))
    assert not restoring.has_died


@pytest.mark.parametrize(("patience_s", "slept"), [(0.0, []), (3.0, [1.0, 1.0, 1.0])])
def test_the_first_look_at_the_bucket_has_patience(
    local_store: Store, clock: Clock, away: Callable[..., list[str]], patience_s: float, slept: list[float]
) -> None:
    away(None, "exists")
    with pytest.raises(StoreError, match="the bucket is gone"):
        read_verdict(local_store, KEYS, patience_s, clock, clock.sleep)
    assert clock.slept == slept


def test_the_first_look_finds_the_bucket_that_comes_back(
    local_store: Store, clock: Clock, away: Callable[..., list[str]]
) -> None:
    away(2, "exists")
    assert read_verdict(local_store, KEYS, 300.0, clock, clock.sleep) is None
    assert clock.slept == [1.0, 1.0]


@pytest.fixture
def extras(local_store: Store, tmp_path: Path, clock: Clock) -> Iterator[Extras]:
    journal = Journal(local_store, KEYS, 1, tmp_path / "events")
    certificate = Certificate(
        run_id="a-run", attempt=1, step=7, weights_sha256=hashlib.sha256().hexdigest(), completed_at=0.0, files={}
    )
    context = make_context(local_store, tmp_path, patience_s=40.0)
    yield Extras(context, certificate, QuickNotices(clock), journal, clock)
    journal.close()


def test_extras_try_the_bucket_again_for_as_long_as_it_may_be_away(
    extras: Extras, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    left: list[StoreError] = [GONE, GONE]

    def work() -> str:
        if left:
            raise left.pop()
        return "done"

    assert extras._patiently(work) == "done"
    assert clock.slept == [PAUSE_S] * 2
    assert "tried again in 15 s: the bucket is gone" in capsys.readouterr().err
    left[:] = [GONE] * 99
    with pytest.raises(StoreError):
        extras._patiently(work)
    assert clock.slept[2:] == [PAUSE_S] * 3


def test_extras_go_on_until_shortly_before_the_machine_goes(
    extras: Extras, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    extras._wait(1)
    extras.notices.give("SIGTERM", 30.0)
    extras._wait(1)
    clock.advance(30.0 - LEAVE_S - 2)
    extras._wait(1)
    with pytest.raises(TakenAway):
        extras._wait(1)
    assert capsys.readouterr().err.count("SIGTERM: the result is certified, extras go on while there is time") == 1


def test_extras_stop_at_once_for_somebody_at_the_keyboard(extras: Extras) -> None:
    extras.notices.give("SIGINT")
    with pytest.raises(TakenAway):
        extras._wait(1)
    assert extras.notices.left_s > LEAVE_S
