"""A submission to this machine's queue that is stopped half way: nothing of the run, or all of it."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from spotune.core.errors import InfraError, InputError, SubmissionUnknown
from spotune.core.keys import Keys
from spotune.launch import engine
from spotune.launch.engine import Submission
from spotune.launch.local import engine as local_engine
from spotune.launch.local.database import AttemptRow
from spotune.launch.local.engine import TAKE_UP_S, LocalInfra
from spotune.launch.local.layout import LocalFolders
from spotune.launch.local.queue import Queue
from spotune.launch.local.supervisor import Supervisor
from tests.unit.project import Project

SUBMISSION = Submission("run-a", {"run": "x"}, "/", "ada", secrets={"KEY": "v"})
MACHINE = AttemptRow(run_id="run-a", attempt=1, marker="m", boot="b", started_at=1.0)


@pytest.fixture
def local(tmp_path: Path) -> LocalInfra:
    return LocalInfra(tmp_path, {})


def interrupted(before: Callable[[], Any] = lambda: None) -> Callable[..., None]:
    def start(*_: object) -> None:
        before()
        raise KeyboardInterrupt

    return start


def test_without_a_supervisor_nothing_stays(local: LocalInfra) -> None:
    local.layout.supervisor_log.mkdir()
    with pytest.raises(InfraError, match="the supervisor cannot be started: .*supervisor.log") as refused:
        local.submit(SUBMISSION)
    assert not isinstance(refused.value, SubmissionUnknown)
    assert "\n" not in str(refused.value)
    assert (local.jobs(), local.layout.environment("run-a").exists()) == ([], False)


def test_the_verb_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    backend = engine.BACKENDS["local"]
    project = Project(tmp_path / "project", monkeypatch)
    monkeypatch.setitem(engine.BACKENDS, "local", backend)
    (project.home / "local/supervisor.log").mkdir(parents=True)
    result = project.run("train", "run.yaml", "--name", "run-a", "-d")
    assert (result.exit_code, result.stdout, capfd.readouterr().err) == (3, "", "")
    assert result.stderr.splitlines()[-1].startswith("the supervisor cannot be started: ")
    assert project.store.keys("runs") == []
    assert project.json("queue") == []


def test_a_home_that_cannot_be_written_is_named(local: LocalInfra) -> None:
    (local.layout.root / "jobs").touch()
    with pytest.raises(
        InputError, match=r"^SPOTUNE_HOME: cannot write .*/jobs/run-a/environment.json: Not a directory$"
    ):
        local.submit(SUBMISSION)
    assert local.jobs() == []


def test_a_run_whose_folder_is_gone_does_not_go_on(
    tmp_path: Path, local: LocalInfra, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "work"
    Queue(local.layout.database).add(replace(SUBMISSION, workdir=str(folder), secrets={}), "file:///b")
    monkeypatch.setattr(local_engine, "start", lambda *_: None)
    with pytest.raises(InputError, match=r"^run-a: its folder .*/work is gone \(spotune train --from run-a\)$"):
        local.check_resumable("run-a")
    folder.mkdir()
    local.check_resumable("run-a")
    (local.layout.root / "jobs").mkdir(exist_ok=True)
    (local.layout.root / "jobs/run-a").rmdir()
    (local.layout.root / "jobs/run-a").touch()
    with pytest.raises(InputError, match="^SPOTUNE_HOME: cannot write .*/jobs/run-a/environment.json: "):
        local.check_resumable("run-a")  # before the marks go, not after


def test_ctrl_c_takes_it_back(local: LocalInfra, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_engine, "start", interrupted())
    with pytest.raises(KeyboardInterrupt):
        local.submit(SUBMISSION)
    assert (local.jobs(), local.layout.environment("run-a").exists()) == ([], False)


def test_one_that_has_begun_stays_known(local: LocalInfra, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(local.layout.database)
    monkeypatch.setattr(local_engine, "start", interrupted(lambda: queue.start(MACHINE)))
    says = r"^interrupted; run-a has begun and goes on \(end it: spotune cancel run-a\)$"
    with pytest.raises(SubmissionUnknown, match=says):
        local.submit(SUBMISSION)
    assert [job.state for job in queue.jobs()] == ["STARTING"]
    assert local.layout.environment("run-a").exists()


def test_only_what_this_one_has_added_is_withdrawn(local: LocalInfra) -> None:
    queue, forgotten = Queue(local.layout.database), list[str]()
    queue.add(SUBMISSION, "file:///b", at=5.0)
    assert queue.withdraw("run-a", 4.0, lambda: forgotten.append("run-a"))
    assert (len(queue.jobs()), forgotten) == (1, [])
    assert queue.withdraw("run-a", 5.0, lambda: forgotten.append("run-a"))
    assert (queue.jobs(), forgotten) == ([], ["run-a"])


def test_a_withdrawn_job_gets_no_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = LocalFolders(tmp_path)
    layout.make()
    queue = Queue(layout.database)
    queue.create()
    queue.add(SUBMISSION, "file:///b", at=5.0)
    active = queue.active()
    queue.withdraw("run-a", 5.0, lambda: None)
    monkeypatch.setattr(Queue, "active", lambda _: active)  # the supervisor had read it before
    Supervisor(layout).tick()
    assert queue.attempts("run-a") == []


def test_ctrl_c_ends_a_dev_run_that_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = Project(tmp_path / "project", monkeypatch)
    submit = type(project.infra).submit

    def begun(one: Any, submission: Submission) -> None:
        submit(one, submission)
        raise SubmissionUnknown("interrupted") from KeyboardInterrupt()

    monkeypatch.setattr(type(project.infra), "submit", begun)
    result = project.run("dev", "run", "run.yaml", "--name", "run-a")
    assert (result.exit_code, "run-a: stopped" in result.stderr) == (130, True)
    assert ("cancel", "run-a") in project.infra.calls
    assert project.store.exists(Keys("run-a").run)


class SilentSupervisor:
    """It runs, and takes nothing up; ``sleep`` is the clock of who waits for it."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(local_engine, "is_running", lambda _: True)
        self.infra = LocalInfra(home, {}, clock=lambda: self.now, sleep=self.sleep)
        self.queue = Queue(self.infra.layout.database)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize("kind", ["cancel", "preempt"])
def test_what_nobody_takes_up_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    silent = SilentSupervisor(tmp_path, monkeypatch)
    silent.queue.add(SUBMISSION, "file:///b")
    silent.queue.start(MACHINE)
    ask = silent.infra.cancel if kind == "cancel" else partial(silent.infra.preempt, notice_s=0.0)
    with pytest.raises(InfraError, match="^run-a: the supervisor does not answer, nothing was done; see ") as told:
        ask("run-a")
    assert not isinstance(told.value, SubmissionUnknown)
    assert silent.queue.requests() == []
    assert silent.now == pytest.approx(TAKE_UP_S, abs=1.0)


def test_a_cancel_that_nobody_takes_up_leaves_no_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = Project(tmp_path / "project", monkeypatch)
    project.submit()
    mark = Keys("run-a").cancelled

    def refuse(error: InfraError) -> Callable[..., None]:
        def cancel(*_: object) -> None:
            assert project.store.exists(mark)
            raise error

        return cancel

    monkeypatch.setattr(type(project.infra), "cancel", refuse(InfraError("run-a: no answer")))
    assert project.run("cancel", "run-a", "-y").exit_code == 3
    assert not project.store.exists(mark)
    monkeypatch.setattr(type(project.infra), "cancel", refuse(SubmissionUnknown("run-a: being cancelled")))
    assert project.run("cancel", "run-a", "-y").exit_code == 3
    assert project.store.exists(mark)
    monkeypatch.setattr(type(project.infra), "cancel", refuse(InfraError("run-a: no answer")))
    assert project.run("cancel", "run-a", "-y").exit_code == 3
    assert project.store.exists(mark)  # of the cancel before, which is under way
