"""The watchdog beside the guard's main loop: what it looks at, what it leaves, and that a guard that hangs ends too."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spotune.core.store import Store
from spotune.guard import ranks, stalls
from spotune.guard.journal import Journal
from spotune.guard.multinode import Leader
from spotune.guard.ranks import Work
from spotune.guard.save_schedule import SaveCost
from spotune.guard.stalls import END_S, EXIT_S, LONGEST_TICK_S, Watchdog
from tests.clocks import Clock
from tests.unit.guard.attempts import KEYS, RUN, make_context
from tests.waiting import LIMIT_S, until

TICK_S = LONGEST_TICK_S


class Scene:
    """A watchdog over ranks that do nothing, with a clock that the test moves."""

    def __init__(self, store: Store, folder: Path, stall_after: str = "60s", patience_s: float = 60.0) -> None:
        self.clock, self.left, self.is_leaving = Clock(1000.0), [], False
        self.slept: list[float] = []
        self.messages = []
        run = replace(RUN, stall_after=stall_after)
        context = make_context(store, folder, run=run, patience_s=patience_s)
        context.folder.mkdir(parents=True)
        self.journal = Journal(store, KEYS, 1, folder / "events")
        self.events: list[dict[str, Any]] = []
        self.journal.listen(self.events.append)
        self.leader = Leader("a-run", context.machine, "")
        self.dog = Watchdog(
            context,
            self.journal,
            self.leader,
            SaveCost(),
            uploading=lambda: None,
            is_leaving=lambda: self.is_leaving,
            end_attempt=self.end_attempt,
            clock=self.clock,
            boot=self.clock,
            leave=self.left.append,
            sleep=self.slept.append,
        )

    left: list[int]
    messages: list[str]

    def end_attempt(self, message: str) -> int:
        self.messages.append(message)
        return 75

    def pass_s(self, seconds: float) -> None:
        for _ in range(int(seconds / TICK_S)):
            self.clock.advance(TICK_S)
            self.dog.probe()


@pytest.fixture
def make(local_store: Store, tmp_path: Path) -> Iterator[Callable[..., Scene]]:
    scenes = []

    def begin(**facts: Any) -> Scene:
        scenes.append(Scene(local_store, tmp_path, **facts))
        return scenes[-1]

    yield begin
    for scene in scenes:
        scene.dog.close(0)
        scene.journal.close()


def test_a_stall_is_an_event_and_a_line_with_where_the_stacks_are(
    make: Callable[..., Scene], capsys: pytest.CaptureFixture[str], local_store: Store
) -> None:
    scene = make()
    scene.journal.write("restored", step=0)
    scene.journal.write("phase", phase="train")
    scene.pass_s(180)
    assert (scene.dog.stall, scene.dog.message) == (None, "")
    scene.pass_s(TICK_S)
    (event,) = [one for one in scene.events if one["event"] == "stall"]
    assert (event["phase"], event["silent_s"], event["limit_s"]) == ("train", 185.0, 180.0)
    assert "no step for 185 s: the stacks of all ranks are recorded, then the attempt ends" in capsys.readouterr().err
    place = f"{local_store.url}/runs/a-run/attempts/0001/stacks-0.txt"
    assert scene.dog.message == f"stalled: no step for 185 s (limit 180 s); stacks: {place}"


def test_a_step_while_stacks_are_recorded_undoes_the_stall(
    make: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = make()

    def collect(folder: Path, pids: object) -> list[Path]:
        scene.clock.advance(20.0)
        scene.journal.write("phase", phase="train")
        stacks = folder / "stacks-0.txt"
        stacks.write_text("stacks")
        return [stacks]

    monkeypatch.setattr(stalls, "collect_stacks", collect)
    scene.pass_s(65)
    assert "a sign of life has come meanwhile: the attempt goes on" in capsys.readouterr().err
    assert scene.dog.stall is None
    assert not list(scene.dog._context.folder.iterdir())
    scene.pass_s(180)
    assert scene.dog.stall is None
    assert "the guard did not run" not in capsys.readouterr().err
    assert not [one for one in scene.events if one["event"] == "stall"]


def test_ranks_that_end_by_themselves_meanwhile_have_not_stalled(
    make: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = make()
    monkeypatch.setattr(stalls, "collect_stacks", lambda folder, pids: scene.dog.stop(has_stalled=False) or [])
    scene.pass_s(70)
    assert scene.dog.stall is None
    assert not [one for one in scene.events if one["event"] == "stall"]


def test_an_attempt_that_ended_otherwise_is_not_ended_again(
    make: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = make()
    stalled(scene, monkeypatch)
    scene.dog.stop(has_stalled=False)
    scene.dog.close(0)
    scene.dog._thread.join(LIMIT_S)
    assert scene.left == []


def test_a_call_to_the_bucket_that_hangs_after_the_ranks_have_ended_ends_the_process(
    make: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch, local_store: Store
) -> None:
    monkeypatch.setattr(stalls, "TICK_S", 0.001)
    scene = make()
    scene.dog.start({})
    scene.dog.stop(has_stalled=False)
    with local_store.calls.call("upload", "runs/a-run/output/x"):
        until(lambda: scene.dog._stalls._calls)
        for _ in range(30):
            scene.clock.advance(TICK_S)
            until(lambda: scene.dog._time.seen_s == scene.clock.now - 1000.0 or scene.left)
        scene.dog._thread.join(LIMIT_S)
    assert scene.left == [75]
    assert "stalled: no answer from the bucket to: upload runs/a-run/output/x for 6" in scene.messages[0]
    (event,) = [one for one in scene.events if one["event"] == "stall"]
    assert (event["phase"], event["limit_s"]) == ("upload", 60.0)
    stacks = next(scene.dog._context.folder.glob("stacks-0.txt")).read_text()
    assert "the guard, process" in stacks
    assert "test_watchdog.py" in stacks


def test_a_stalled_upload_is_not_waited_for_as_long_as_the_bucket_may_be_away(
    make: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stalls, "HUNG_END_S", 0.001)
    monkeypatch.setattr(stalls, "TICK_S", 0.001)
    scene = make(patience_s=1e6)
    scene.dog._stalls._patience_s = 60.0
    scene.dog._uploading = lambda: 3
    scene.journal.write("restored", step=0)
    scene.journal.write("phase", phase="train")
    scene.pass_s(70)
    assert scene.dog.stall
    assert scene.dog.stall.phase == "upload"
    scene.dog.start({})
    until(lambda: scene.left)
    assert len(scene.messages) == 1


def test_time_that_the_guard_missed_is_said_and_not_counted(
    make: Callable[..., Scene], capsys: pytest.CaptureFixture[str]
) -> None:
    scene = make()
    scene.pass_s(55)
    scene.clock.advance(7200)
    scene.pass_s(60)
    assert scene.dog.stall is None
    assert "the guard did not run for 7205 s; the watchdog does not count that time" in capsys.readouterr().err


def test_a_machine_that_is_about_to_go_has_no_stalls(make: Callable[..., Scene]) -> None:
    scene = make()
    scene.is_leaving = True
    scene.pass_s(1000)
    assert scene.dog.stall is None
    assert not [one for one in scene.events if one["event"] == "stall"]


def test_other_machines_that_load_excuse_this_one(make: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch) -> None:
    scene = make()
    monkeypatch.setattr(ranks, "work_of", lambda groups: Work())
    monkeypatch.setattr(Leader, "works", property(lambda self: [Work(cpu_s=scene.clock.now)]))
    scene.pass_s(600)
    assert scene.dog.stall is None
    monkeypatch.setattr(Leader, "works", property(lambda self: [Work(cpu_s=scene.clock.now, stopped=True)]))
    scene.pass_s(70)
    assert scene.dog.stall


def test_where_it_is_off_nothing_is_started(make: Callable[..., Scene]) -> None:
    scene = make(stall_after="0")
    scene.dog.start({0: 1})
    assert not scene.dog._thread.is_alive()


def stalled(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the watchdog's own thread notice a stall."""
    monkeypatch.setattr(stalls, "TICK_S", 0.001)
    scene.pass_s(60)
    scene.clock.advance(TICK_S)
    scene.dog.start({})
    until(lambda: scene.dog.stall)


def test_a_guard_that_hangs_is_ended(make: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch) -> None:
    scene = make(patience_s=0.001 - END_S)
    stalled(scene, monkeypatch)
    scene.dog.stop(has_stalled=True)
    until(lambda: scene.left)
    assert (scene.left, scene.slept) == ([75], [])


def test_a_process_that_does_not_end_after_the_attempt_is_ended_with_its_code(
    make: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = make()
    stalled(scene, monkeypatch)
    scene.dog.stop(has_stalled=True)
    assert scene.left == []
    scene.dog.close(1)
    scene.dog._thread.join(LIMIT_S)
    assert (scene.left, scene.slept) == ([1], [EXIT_S])


def test_a_guard_that_stays_until_it_is_killed_is_let_be(
    make: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = make()
    stalled(scene, monkeypatch)
    scene.is_leaving = True
    scene.dog.close(75)
    scene.dog._thread.join(LIMIT_S)
    assert scene.left == []
