"""The supervisor's decisions that depend on time, on a clock that stands still until the test moves it."""

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from spotune.core.errors import StoreError
from spotune.core.keys import Keys
from spotune.core.protocol import write_json
from spotune.core.records import Commit, Mark
from spotune.core.store import Store
from spotune.launch.engine import Submission
from spotune.launch.local import machine as local_machine
from spotune.launch.local import supervisor
from spotune.launch.local.database import Attempt, Job
from spotune.launch.local.layout import MARKER, Layout
from spotune.launch.local.queue import Queue
from spotune.launch.local.supervisor import CANCEL_GRACE_S, IDLE_S, POLL_S, Supervisor, serve
from spotune.launch.local.watch import RETRY_S, SPAWN_S
from tests.waiting import until

T = 1000.0
# Says that it is up, then heeds nothing but SIGKILL and the end of the tests; what it is sent goes to the file.
DEAF = 'trap "echo told >> $0" TERM; echo up >> $0; while kill -0 $PPID; do sleep 1 & wait $!; done'


class World:
    """A queue, a supervisor and machines that do nothing until the test ends them."""

    def __init__(self, folder: Path) -> None:
        self.now = T
        self.layout, self.store = Layout(folder / "home"), Store(f"file://{folder}/bucket")
        self.layout.make()
        self.queue = Queue(self.layout.database)
        self.queue.create()
        self.machines: dict[str, subprocess.Popen[bytes]] = {}
        self.starts: list[tuple[str, float]] = []
        self.new_supervisor()

    def new_supervisor(self) -> None:
        self.supervisor = Supervisor(self.layout, lambda: self.now, self._start, lambda line: None)

    def _start(self, layout: Layout, job: Job, attempt: Attempt, devices: Sequence[str]) -> "subprocess.Popen[bytes]":
        files = layout.attempt(job.run_id, attempt.attempt)
        files.folder.mkdir(parents=True)
        command = ["bash", "-c", DEAF, str(files.folder / "signals")]
        environ = {"PATH": os.environ["PATH"], MARKER: attempt.marker}
        self.machines[job.run_id] = subprocess.Popen(command, env=environ, start_new_session=True)
        self.starts.append((job.run_id, self.now))
        write_json(files.running, {"at": self.now, "setup_s": 0.0})
        return self.machines[job.run_id]

    def submit(self, run_id: str, **options: Any) -> None:
        task = {"run": "x", "resources": {"accelerators": options.pop("accelerators", None)}}
        submission = Submission(run_id=run_id, task=task, workdir="/", user="ada", **options)
        self.queue.add(submission, self.store.url, at=self.now)

    def tick(self, after_s: float = 0.0) -> None:
        self.now += after_s
        self.supervisor.tick()

    def is_up(self, run_id: str) -> bool:
        return self.machines[run_id].poll() is None

    def comes_up(self, run_id: str) -> None:
        """Returns once the machine no longer heeds a notice."""
        until(lambda: self.signals(run_id) == ["up"])

    def end(self, run_id: str, exit_code: int | None) -> None:
        """The machine is gone; with ``exit_code``, its program had ended before."""
        attempt = self.queue.attempts(run_id)[-1]
        if exit_code is not None:
            exited = {"exit_code": exit_code, "phase": "run", "setup_s": 0.0, "ended_at": self.now}
            write_json(self.layout.attempt(run_id, attempt.attempt).exit, exited)
        self.kill(run_id)
        until(lambda: [self.tick(), self.queue.attempts(run_id)[attempt.attempt - 1].settled][1])

    def kill(self, run_id: str) -> None:
        machine = self.machines[run_id]
        os.killpg(machine.pid, signal.SIGKILL)
        machine.wait()
        until(lambda: not local_machine.members(None, self.queue.attempts(run_id)[-1].marker))

    def signals(self, run_id: str, attempt: int = 1) -> list[str]:
        """What the machine has noted: that it is up, then what it was sent."""
        file = self.layout.attempt(run_id, attempt).folder / "signals"
        return file.read_text().split() if file.exists() else []

    def job(self, run_id: str) -> Job:
        job = self.queue.job(run_id)
        assert job
        return job


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    for run_id, machine in world.machines.items():
        if machine.poll() is None:
            world.kill(run_id)


def test_a_machine_that_vanishes_again_and_again_is_replaced_slower_and_slower(world: World) -> None:
    world.submit("run-a")
    world.tick()
    for number, wait_s in enumerate((0, 1, 2, 4, 8, 16, 30, 30), 1):
        world.end("run-a", 137 if number % 2 else None)
        if wait_s:
            assert world.job("run-a").state == "RECOVERING"
            world.new_supervisor()  # none of it is in a supervisor's memory
            world.tick(wait_s - 0.25)
            assert len(world.starts) == number
            world.tick(0.25)
        assert len(world.starts) == number + 1


def test_a_new_commit_resets_the_slowing_down(world: World) -> None:
    world.submit("run-a")
    world.tick()
    for step in range(1, 5):
        world.store.create(
            Keys("run-a").commit(1, step), Commit(run_id="run-a", step=step, attempt=1, files={}).to_bytes()
        )
        world.end("run-a", 137)
        assert world.is_up("run-a")
        assert world.job("run-a").faults == 1
    world.end("run-a", 137)
    assert (world.is_up("run-a"), world.job("run-a").faults) == (False, 2)


def test_priority_first_then_order_of_submission_and_nothing_overtakes(world: World) -> None:
    for run_id, priority in (("first", 0), ("low-1", 0), ("low-2", 0), ("high", 5), ("lowest", -5)):
        world.submit(run_id, priority=priority)
        if run_id == "first":
            world.tick()
    for _ in range(5):
        world.tick(60.0)
        world.end(world.starts[-1][0], 1)
    assert [run_id for run_id, _ in world.starts] == ["first", "high", "low-1", "low-2", "lowest"]


def test_a_small_job_does_not_overtake_one_that_waits_for_more_gpus(world: World) -> None:
    world.queue.note("slots", 2)
    world.queue.note("gpus", [{"device": "0", "name": "L4"}, {"device": "1", "name": "L4"}])
    for run_id, accelerators in (("first", "L4:1"), ("both", "L4:2"), ("last", "L4:1")):
        world.submit(run_id, accelerators=accelerators)
    world.tick()
    assert [run_id for run_id, _ in world.starts] == ["first"]
    world.end("first", 1)
    assert [run_id for run_id, _ in world.starts] == ["first", "both"]
    world.end("both", 1)
    assert [run_id for run_id, _ in world.starts] == ["first", "both", "last"]


def test_a_job_that_waits_for_its_next_attempt_lets_others_run(world: World) -> None:
    world.submit("run-a", priority=1)
    world.tick()
    world.end("run-a", None)
    world.submit("run-b")
    world.end("run-a", None)  # the second fault in a row: one second
    assert [run_id for run_id, _ in world.starts] == ["run-a", "run-a", "run-b"]


def test_a_notice_comes_at_once_and_the_end_when_it_is_over(world: World) -> None:
    world.submit("run-a")
    world.tick()
    world.comes_up("run-a")
    world.queue.ask("run-a", "preempt", 30.0)
    world.tick()
    until(lambda: world.signals("run-a") == ["up", "told"] or not world.is_up("run-a"))
    world.tick(29.75)
    assert world.is_up("run-a")
    world.tick(0.25)
    world.machines["run-a"].wait()
    until(lambda: [world.tick(), len(world.starts) == 2][1])
    assert world.queue.attempts("run-a")[0].end_reason == "preempted"
    assert (world.job("run-a").faults, world.job("run-a").not_before) == (0, world.now)


def test_a_second_notice_does_not_put_the_end_off(world: World) -> None:
    world.submit("run-a")
    world.tick()
    world.comes_up("run-a")
    world.queue.ask("run-a", "preempt", 30.0)
    world.tick()
    world.queue.ask("run-a", "preempt", 300.0)
    world.tick()
    assert world.queue.attempts("run-a")[0].kill_at == T + 30.0


def test_a_cancelled_job_has_a_grace(world: World) -> None:
    world.submit("run-a")
    world.tick()
    world.comes_up("run-a")
    world.queue.ask("run-a", "cancel")
    world.tick()
    world.tick(CANCEL_GRACE_S - 0.25)
    assert world.is_up("run-a")
    world.tick(0.25)
    world.machines["run-a"].wait()
    until(lambda: [world.tick(), world.job("run-a").state == "CANCELLED"][1])
    assert len(world.starts) == 1


def test_a_lost_machine_was_paid_until_its_last_heartbeat(world: World) -> None:
    """After a reboot nothing of it can be found; nothing that has the same process id now is touched."""
    world.submit("run-a")
    world.tick()
    files = world.layout.attempt("run-a", 1)
    files.heartbeat.touch()
    os.utime(files.heartbeat, (T + 70, T + 70))
    world.queue.update_attempt(world.queue.attempts("run-a")[0], boot="the boot before")
    first = world.machines["run-a"]
    world.now += 1000.0
    world.new_supervisor()
    world.tick()
    lost = world.queue.attempts("run-a")[0]
    assert (lost.ended_at, lost.end_reason) == (T + 70, "lost")
    assert first.poll() is None
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()


def test_a_machine_that_is_seen_longer_than_its_heartbeat_was_paid_until_then(world: World) -> None:
    world.submit("run-a")
    world.tick()
    files = world.layout.attempt("run-a", 1)
    files.heartbeat.touch()
    os.utime(files.heartbeat, (T + 5, T + 5))
    world.tick(60.0)  # it still runs
    world.kill("run-a")
    world.tick(100.0)
    assert world.queue.attempts("run-a")[0].ended_at == T + 60.0


def test_a_machine_that_was_never_started_is_lost_after_a_while(world: World) -> None:
    """The supervisor died between its note and the start."""
    world.submit("run-a")
    world.queue.start(Attempt("run-a", 1, "a marker", local_machine.boot_id(), started_at=world.now))
    world.tick(SPAWN_S - 0.25)
    assert world.queue.attempts("run-a")[0].ended_at is None
    world.tick(0.25)
    assert [row.end_reason for row in world.queue.attempts("run-a")] == ["lost", ""]


def test_planned_preemptions_come_when_they_are_due_and_once(world: World) -> None:
    world.submit("run-a", preemptions=({"after_s": 20.0}, {"at_step": 40.0}))
    world.tick(5.0)
    world.tick(19.75)  # since it has begun to run, not since it was submitted
    assert world.is_up("run-a")
    world.tick(0.25)
    until(lambda: [world.tick(), len(world.starts) == 2][1])
    status = world.layout.attempt("run-a", 2).status
    write_json(status, {"step": 39})
    world.tick(1000.0)
    assert world.is_up("run-a")
    write_json(status, {"step": 40})
    until(lambda: [world.tick(), len(world.starts) == 3][1])
    write_json(world.layout.attempt("run-a", 3).status, {"step": 41})
    world.tick(1000.0)
    world.tick()
    assert world.is_up("run-a")
    assert [row.end_reason for row in world.queue.attempts("run-a")] == ["preempted", "preempted", ""]


def test_a_mark_that_cannot_be_read_ends_the_run_and_frees_its_slot(world: World) -> None:
    world.submit("run-a")
    world.tick()
    world.store.write(Keys("run-a").failed, b"half a rec")
    world.kill("run-a")
    world.tick()
    world.tick()
    assert world.job("run-a").state == "FAILED"
    assert world.job("run-a").reason.startswith("runs/run-a/failed.json: not a Mark: ")


def test_a_bucket_that_does_not_answer_is_asked_again_after_a_while(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exists(store: Store, key: str) -> bool:
        raise StoreError(f"{store.url}/{key}: cannot look up: timed out")

    key = Keys("run-a").failed
    world.submit("run-a")
    world.tick()
    with monkeypatch.context() as patch:
        patch.setattr(Store, "exists", exists)
        world.kill("run-a")
        world.tick()
        world.tick()
    assert world.job("run-a").reason.startswith("waiting for its bucket: ")
    world.store.create(key, Mark(run_id="run-a", attempt=1, at=T, reason="bad data", exit_code=2).to_bytes())
    world.tick(RETRY_S - 0.25)
    assert world.job("run-a").state == "RUNNING"
    world.tick(0.25)
    assert (world.job("run-a").state, world.job("run-a").reason) == ("FAILED", "bad data")


def test_a_supervisor_leaves_once_it_was_idle_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, now, rounds = Layout(tmp_path), [T], []
    layout.make()
    Queue(layout.database).create()

    def tick(_: Supervisor) -> bool:
        rounds.append(now[0])
        return now[0] < T + 100  # there is something to do until then

    def sleep(seconds: float) -> None:
        assert seconds == POLL_S
        now[0] += 0.25

    monkeypatch.setattr(supervisor.Supervisor, "tick", tick)
    serve(layout, clock=lambda: now[0], sleep=sleep)
    assert now[0] == T + 99.75 + IDLE_S
