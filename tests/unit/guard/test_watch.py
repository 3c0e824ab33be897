"""What the guard does while its ranks run: a clock that the test moves, and ranks that do as the test says."""

import os
import shlex
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spotune.core.environment import NUM_PROCESSES, WORKER
from spotune.core.errors import Fenced, StoreError
from spotune.core.protocol import CONTROL, Outcome, WorkerJob, read_json
from spotune.core.store import Store
from spotune.guard.attempt import FENCE_S, GREET_S, Watch
from spotune.guard.checkpoints import sealed
from spotune.guard.claim import claim_attempt
from spotune.guard.journal import Journal, Node
from spotune.guard.multinode import Leader
from spotune.guard.ranks import PEER_GRACE_S, Ranks
from spotune.guard.restore import Restored
from spotune.guard.restore_thread import Ready
from spotune.guard.save_schedule import SaveCost
from spotune.guard.stalls import Stall
from tests.clocks import Clock, QuickNotices
from tests.unit.guard.attempts import KEYS, make_context, stage
from tests.waiting import until

PATIENCE_S = 60.0


class ScriptedRanks:
    """Runs as long as there are acts: each look at it plays one."""

    def __init__(self, acts: list[Callable[[], Any]], outcome: Outcome) -> None:
        self._acts, self._outcome = acts, outcome

    @property
    def running(self) -> bool:
        if not self._acts:
            return False
        self._acts.pop(0)()
        return True

    def outcome(self) -> Outcome:
        return self._outcome


class FreshStart:
    """The checkpoint is there: a fresh start."""

    ready, error, has_died = Ready(Restored(), 0.0), None, False


class Scene:
    """A watch over attempt 1, and what a test can see of it."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.clock = Clock(1000.0)
        self.notices = QuickNotices(self.clock)
        self.notices.user_grace_s = 1000.0
        context = make_context(store, folder, patience_s=PATIENCE_S)
        claim_attempt(store, KEYS, context.machine)
        self.folder = context.folder
        (self.folder / "staged").mkdir(parents=True)
        self.journal = Journal(store, KEYS, 1, folder / "events")
        job = WorkerJob("a-run", 1, {}, "c", "cache", save_steps=1)
        leader = Leader("a-run", context.machine, "")
        self.watch = Watch(context, job, self.journal, leader, self.notices, SaveCost(), self.clock)

    def play(self, *acts: Callable[[], Any], how: str = "completed") -> Outcome:
        ranks = ScriptedRanks(list(acts), Outcome(how))  # type: ignore[arg-type]
        return self.watch.until_ended(ranks, FreshStart())  # type: ignore[arg-type]

    def train_to(self, step: int) -> None:
        self.journal.write("step", step=step, tokens=step)

    def stage(self, step: int) -> None:
        stage(self.folder, step)

    def wait_for_error(self) -> None:
        assert self.watch.committer
        until(lambda: self.watch.committer and self.watch.committer.error)

    @property
    def is_told_to_stop(self) -> bool:
        return bool((read_json(self.folder / CONTROL) or {})["stop"])

    def close(self) -> None:
        if self.watch.committer:
            self.watch.committer.close()
        self.journal.close()


@pytest.fixture
def scene(local_store: Store, tmp_path: Path) -> Iterator[Scene]:
    made = Scene(local_store, tmp_path)
    yield made
    made.close()


def test_a_later_attempt_is_looked_for_every_15_seconds(scene: Scene, local_store: Store) -> None:
    seen: list[str] = []
    claim_attempt(local_store, KEYS, Node.read({}))
    with pytest.raises(Fenced, match="attempt 2 has taken over"):
        scene.play(
            lambda: scene.clock.advance(FENCE_S - 1),
            lambda: seen.append("not looked for yet"),
            lambda: scene.clock.advance(1),
            lambda: seen.append("too late"),
        )
    assert seen == ["not looked for yet"]


def test_a_bucket_that_cannot_say_is_asked_again_later(
    scene: Scene, local_store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def refuse(self: Store, prefix: str) -> list[str]:
        asked.append(prefix)
        raise StoreError("the bucket is gone")

    monkeypatch.setattr(Store, "folders", refuse)
    advance = lambda: scene.clock.advance(FENCE_S)  # noqa: E731
    assert scene.play(advance, lambda: None, advance).how == "completed"
    assert len(asked) == 2
    assert "cannot look for later attempts now: the bucket is gone" in capsys.readouterr().err


def test_training_stops_once_the_bucket_was_away_for_longer_than_patience(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Store, local: Path, key: str) -> None:
        raise StoreError("the bucket is gone")

    monkeypatch.setattr(Store, "upload", refuse)
    told: list[bool] = []
    scene.play(
        lambda: None,
        lambda: scene.stage(1),
        scene.wait_for_error,
        lambda: scene.clock.advance(PATIENCE_S - 1),
        lambda: told.append(scene.is_told_to_stop),
        lambda: scene.clock.advance(2),
        lambda: told.append(scene.is_told_to_stop),
        lambda: scene.stage(2),
        how="stopped",
    )
    assert told == [False, True]
    scene.watch.finish_uploads()
    assert [staged.step for staged in sealed(scene.folder)] == [2, 1]  # for the next attempt on this machine
    expected = "the bucket is gone; the last good step in the bucket is 0; step 2 is on this machine's disk"
    assert scene.watch.why_stopped().startswith(expected)


def test_uploads_are_waited_for_as_long_as_patience_and_the_machine_last(scene: Scene) -> None:
    assert scene.watch._time_to_upload_s() == PATIENCE_S
    scene.notices.give("SIGTERM", 20.0)
    assert scene.watch._time_to_upload_s() == 20.0
    scene.clock.advance(30)
    assert scene.watch._time_to_upload_s() == 0.0


def test_a_notice_is_passed_on_to_the_ranks_once(scene: Scene) -> None:
    told: list[bool] = []
    events: list[dict[str, Any]] = []
    scene.journal.listen(events.append)
    scene.play(
        lambda: scene.train_to(3),
        lambda: told.append(scene.is_told_to_stop),
        lambda: scene.notices.give("SIGTERM"),
        lambda: told.append(scene.is_told_to_stop),
        lambda: scene.notices.give("SIGTERM"),
        how="stopped",
    )
    assert told == [False, True]
    assert [event["source"] for event in events if event["event"] == "notice"] == ["SIGTERM"]


def test_with_nothing_new_to_save_the_ranks_are_not_waited_for(scene: Scene) -> None:
    seen: list[str] = []
    scene.notices.give("SIGTERM")
    assert scene.play(lambda: None, lambda: seen.append("waited")).how == "stopped"
    assert seen == []
    assert not scene.is_told_to_stop


def test_a_notice_at_the_end_lets_the_result_go_on_its_way(scene: Scene) -> None:
    seen: list[str] = []
    scene.train_to(3)
    scene.journal.write("phase", phase="teardown")
    scene.notices.give("SIGTERM")
    assert scene.play(lambda: None, lambda: seen.append("waited")).how == "completed"
    assert seen == ["waited"]
    assert not scene.is_told_to_stop


def test_a_machine_that_is_gone_ends_the_attempt(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Leader, "lost", True)
    outcome = scene.play(lambda: None)
    assert (outcome.how, outcome.message) == ("retry", "a machine of this job is gone")


@pytest.mark.parametrize("by", ["the plan", "the clock"])
def test_where_the_records_are_is_said_once_there_is_something_to_run(
    scene: Scene, capsys: pytest.CaptureFixture[str], by: str
) -> None:
    said: list[int] = []

    def count() -> None:
        said.append(capsys.readouterr().err.count("a-run: attempt 1 on "))

    begin = lambda: scene.journal.write("plan", max_steps=5) if by == "the plan" else scene.clock.advance(GREET_S + 1)  # noqa: E731
    scene.play(lambda: None, count, begin, count, lambda: None, count)
    assert said == [0, 1, 0]


HANGING = "import os, sys, time; os.environ['RANK'] == '0' and sys.exit(1); time.sleep(3600)"


def test_ranks_that_hang_after_one_has_failed_are_killed_after_a_grace(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(HANGING)
    clock = Clock(1000.0)
    machine = Node.read({NUM_PROCESSES: "2"})
    environ = {**os.environ, WORKER: shlex.join([str(tmp_path / "worker.py")])}
    ranks = Ranks(tmp_path, machine, 0, environ, clock)
    try:
        until(lambda: ranks._processes[0].poll() is not None)
        assert ranks.running
        clock.advance(PEER_GRACE_S)
        assert ranks.running
        clock.advance(1)
        assert ranks.running  # the look that kills
        assert not ranks.running
        assert ranks._processes[1].returncode == -signal.SIGKILL
        outcome = ranks.outcome()
        assert (outcome.how, outcome.message) == ("retry", "rank 0 ended with exit code 1 without a word")
    finally:
        ranks.kill()


def test_a_rank_that_cannot_die_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one in state D, which no signal reaches: here the signal is lost on its way."""
    (tmp_path / "worker.py").write_text("import time; time.sleep(3600)")
    environ = {**os.environ, WORKER: shlex.join([str(tmp_path / "worker.py")])}
    ranks = Ranks(tmp_path, Node.read({}), 0, environ)
    pid = ranks.pids[0]
    with monkeypatch.context() as patch:
        patch.setattr("spotune.guard.ranks.os.killpg", lambda pid, number: None)
        patch.setattr("spotune.guard.ranks.DIE_S", 0.0)
        ranks.kill()
    said = capsys.readouterr().err
    assert said == f"[spotune] rank 0 (process {pid}) does not die: it waits for a disk or a device, and is left\n"
    ranks.kill()
    assert ranks._processes[0].returncode == -signal.SIGKILL


def test_a_stall_ends_the_attempt_and_a_hung_upload_is_not_waited_for(scene: Scene) -> None:
    found: list[Stall] = []
    ranks = ScriptedRanks(
        [lambda: None, lambda: found.append(Stall("upload", 9.0, 8.0, 0.0)), lambda: None], Outcome("completed")
    )
    outcome = scene.watch.until_ended(ranks, FreshStart(), lambda: found[0] if found else None)  # type: ignore[arg-type]
    assert (outcome.how, outcome.message) == ("retry", "no byte of a checkpoint was uploaded")
    assert scene.watch._time_to_upload_s() == 0.0
