"""The supervisor's decisions that depend on time, on a clock that stands still until the test moves it."""

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from spotune.contracts.exchange import write_json
from spotune.contracts.keys import Keys
from spotune.contracts.records import Commit, Mark
from spotune.contracts.store import Store
from spotune.launch.infra import Submission
from spotune.launch.local import processes, supervisor
from spotune.launch.local.layout import MARKER, Layout
from spotune.launch.local.queue import Queue
from spotune.launch.local.rows import Attempt, Job
from spotune.launch.local.settle import RETRY_S
from spotune.launch.local.supervisor import CANCEL_GRACE_S, IDLE_S, POLL_S, Supervisor, serve
from spotune.launch.local.watch import SPAWN_S
from tests.waiting import until

T = 1000.0
# Says that it is up, then heeds nothing but SIGKILL and the end of the tests; what it is sent goes to the file.
DEAF = 'trap "echo told >> $0" TERM; echo up >> $0; while kill -0 $PPID; do sleep 1 & wait $!; done'


class Lab:
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
        until(lambda: not processes.members(None, self.queue.attempts(run_id)[-1].marker))

    def signals(self, run_id: str, attempt: int = 1) -> list[str]:
        """What the machine has noted: that it is up, then what it was sent."""
        file = self.layout.attempt(run_id, attempt).folder / "signals"
        return file.read_text().split() if file.exists() else []

    def job(self, run_id: str) -> Job:
        job = self.queue.job(run_id)
        assert job
        return job


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path)
    yield lab
    for run_id, machine in lab.machines.items():
        if machine.poll() is None:
            lab.kill(run_id)


def test_a_machine_that_vanishes_again_and_again_is_replaced_slower_and_slower(lab: Lab) -> None:
    lab.submit("run-a")
    lab.tick()
    for number, wait_s in enumerate((0, 1, 2, 4, 8, 16, 30, 30), 1):
        lab.end("run-a", 137 if number % 2 else None)
        if wait_s:
            assert lab.job("run-a").state == "RECOVERING"
            lab.new_supervisor()  # none of it is in a supervisor's memory
            lab.tick(wait_s - 0.25)
            assert len(lab.starts) == number
            lab.tick(0.25)
        assert len(lab.starts) == number + 1


def test_a_new_commit_resets_the_slowing_down(lab: Lab) -> None:
    lab.submit("run-a")
    lab.tick()
    for step in range(1, 5):
        lab.store.create(
            Keys("run-a").commit(1, step), Commit(run_id="run-a", step=step, attempt=1, files={}).to_bytes()
        )
        lab.end("run-a", 137)
        assert lab.is_up("run-a")
        assert lab.job("run-a").faults == 1
    lab.end("run-a", 137)
    assert (lab.is_up("run-a"), lab.job("run-a").faults) == (False, 2)


def test_priority_first_then_order_of_submission_and_nothing_overtakes(lab: Lab) -> None:
    for run_id, priority in (("first", 0), ("low-1", 0), ("low-2", 0), ("high", 5), ("lowest", -5)):
        lab.submit(run_id, priority=priority)
        if run_id == "first":
            lab.tick()
    for _ in range(5):
        lab.tick(60.0)
        lab.end(lab.starts[-1][0], 1)
    assert [run_id for run_id, _ in lab.starts] == ["first", "high", "low-1", "low-2", "lowest"]


def test_a_small_job_does_not_overtake_one_that_waits_for_more_gpus(lab: Lab) -> None:
    lab.queue.note("slots", 2)
    lab.queue.note("gpus", [{"device": "0", "name": "L4"}, {"device": "1", "name": "L4"}])
    for run_id, accelerators in (("first", "L4:1"), ("both", "L4:2"), ("last", "L4:1")):
        lab.submit(run_id, accelerators=accelerators)
    lab.tick()
    assert [run_id for run_id, _ in lab.starts] == ["first"]
    lab.end("first", 1)
    assert [run_id for run_id, _ in lab.starts] == ["first", "both"]
    lab.end("both", 1)
    assert [run_id for run_id, _ in lab.starts] == ["first", "both", "last"]


def test_a_job_that_waits_for_its_next_attempt_lets_others_run(lab: Lab) -> None:
    lab.submit("run-a", priority=1)
    lab.tick()
    lab.end("run-a", None)
    lab.submit("run-b")
    lab.end("run-a", None)  # the second fault in a row: one second
    assert [run_id for run_id, _ in lab.starts] == ["run-a", "run-a", "run-b"]


def test_a_notice_comes_at_once_and_the_end_when_it_is_over(lab: Lab) -> None:
    lab.submit("run-a")
    lab.tick()
    until(lambda: lab.signals("run-a") == ["up"])
    lab.queue.ask("run-a", "preempt", 30.0)
    lab.tick()
    until(lambda: lab.signals("run-a") == ["up", "told"] or not lab.is_up("run-a"))
    lab.tick(29.75)
    assert lab.is_up("run-a")
    lab.tick(0.25)
    lab.machines["run-a"].wait()
    until(lambda: [lab.tick(), len(lab.starts) == 2][1])
    assert lab.queue.attempts("run-a")[0].end_reason == "preempted"
    assert (lab.job("run-a").faults, lab.job("run-a").not_before) == (0, lab.now)


def test_a_second_notice_does_not_put_the_end_off(lab: Lab) -> None:
    lab.submit("run-a")
    lab.tick()
    lab.queue.ask("run-a", "preempt", 30.0)
    lab.tick()
    lab.queue.ask("run-a", "preempt", 300.0)
    lab.tick()
    assert lab.queue.attempts("run-a")[0].kill_at == T + 30.0


def test_a_cancelled_job_has_a_grace(lab: Lab) -> None:
    lab.submit("run-a")
    lab.tick()
    lab.queue.ask("run-a", "cancel")
    lab.tick()
    lab.tick(CANCEL_GRACE_S - 0.25)
    assert lab.is_up("run-a")
    lab.tick(0.25)
    lab.machines["run-a"].wait()
    until(lambda: [lab.tick(), lab.job("run-a").state == "CANCELLED"][1])
    assert len(lab.starts) == 1


def test_a_lost_machine_was_paid_until_its_last_heartbeat(lab: Lab) -> None:
    """After a reboot nothing of it can be found; nothing that has the same process id now is touched."""
    lab.submit("run-a")
    lab.tick()
    files = lab.layout.attempt("run-a", 1)
    files.heartbeat.touch()
    os.utime(files.heartbeat, (T + 70, T + 70))
    lab.queue.update_attempt(lab.queue.attempts("run-a")[0], boot="the boot before")
    first = lab.machines["run-a"]
    lab.now += 1000.0
    lab.new_supervisor()
    lab.tick()
    lost = lab.queue.attempts("run-a")[0]
    assert (lost.ended_at, lost.end_reason) == (T + 70, "lost")
    assert first.poll() is None
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()


def test_a_machine_that_is_seen_longer_than_its_heartbeat_was_paid_until_then(lab: Lab) -> None:
    lab.submit("run-a")
    lab.tick()
    files = lab.layout.attempt("run-a", 1)
    files.heartbeat.touch()
    os.utime(files.heartbeat, (T + 5, T + 5))
    lab.tick(60.0)  # it still runs
    lab.kill("run-a")
    lab.tick(100.0)
    assert lab.queue.attempts("run-a")[0].ended_at == T + 60.0


def test_a_machine_that_was_never_started_is_lost_after_a_while(lab: Lab) -> None:
    """The supervisor died between its note and the start."""
    lab.submit("run-a")
    lab.queue.start(Attempt("run-a", 1, "a marker", processes.boot_id(), started_at=lab.now))
    lab.tick(SPAWN_S - 0.25)
    assert lab.queue.attempts("run-a")[0].ended_at is None
    lab.tick(0.25)
    assert [row.end_reason for row in lab.queue.attempts("run-a")] == ["lost", ""]


def test_planned_preemptions_come_when_they_are_due_and_once(lab: Lab) -> None:
    lab.submit("run-a", preemptions=({"after_s": 20.0}, {"at_step": 40.0}))
    lab.tick(5.0)
    lab.tick(19.75)  # since it has begun to run, not since it was submitted
    assert lab.is_up("run-a")
    lab.tick(0.25)
    until(lambda: [lab.tick(), len(lab.starts) == 2][1])
    status = lab.layout.attempt("run-a", 2).status
    write_json(status, {"step": 39})
    lab.tick(1000.0)
    assert lab.is_up("run-a")
    write_json(status, {"step": 40})
    until(lambda: [lab.tick(), len(lab.starts) == 3][1])
    write_json(lab.layout.attempt("run-a", 3).status, {"step": 41})
    lab.tick(1000.0)
    lab.tick()
    assert lab.is_up("run-a")
    assert [row.end_reason for row in lab.queue.attempts("run-a")] == ["preempted", "preempted", ""]


def test_a_bucket_that_does_not_answer_is_asked_again_after_a_while(lab: Lab) -> None:
    key = Keys("run-a").failed
    lab.submit("run-a")
    lab.tick()
    lab.store.write(key, b"half a rec")
    lab.kill("run-a")
    lab.tick()
    lab.tick()
    assert lab.job("run-a").reason.startswith("waiting for its bucket: ")
    lab.store.delete([key])
    lab.store.create(key, Mark(run_id="run-a", attempt=1, at=T, reason="bad data", exit_code=2).to_bytes())
    lab.tick(RETRY_S - 0.25)
    assert lab.job("run-a").state == "RUNNING"
    lab.tick(0.25)
    assert (lab.job("run-a").state, lab.job("run-a").reason) == ("FAILED", "bad data")


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
