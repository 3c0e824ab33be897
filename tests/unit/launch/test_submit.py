"""Two that submit one run at a time: it is a whole run, and each is told so."""

import subprocess
import time
from pathlib import Path
from typing import Any

import click.testing
import pytest

from spotune.core.errors import InfraError
from spotune.core.keys import Keys
from spotune.core.store import Store
from spotune.launch.engine import JobStatus, Submission
from tests.filesystems import file_system, fill
from tests.unit.fake_infra import FakeInfra
from tests.unit.project import Project

KEYS = Keys("run-a")
TRAIN = ("train", "run.yaml", "--name", "run-a", "-y", "-d")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setattr(FakeInfra, "now", time.time() + 86_400)
    return Project(tmp_path / "project", monkeypatch)


def overtaken(project: Project, monkeypatch: pytest.MonkeyPatch, *by: str) -> list[click.testing.Result]:
    """Lets another ``train`` come in between, the moment that the next one hands its job over; returns how it went."""
    submit, told = FakeInfra.submit, list[click.testing.Result]()

    def slow(infra: FakeInfra, submission: Submission) -> None:
        monkeypatch.setattr(FakeInfra, "submit", submit)
        told.append(project.run(*by))
        submit(infra, submission)

    monkeypatch.setattr(FakeInfra, "submit", slow)
    return told


def test_the_slower_one_is_told_so_and_deletes_nothing(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    faster = overtaken(project, monkeypatch, *TRAIN)
    slower = project.run(*TRAIN)
    for result in (*faster, slower):
        assert (result.exit_code, result.stdout) == (0, "run-a\n"), result.stderr
    assert "run-a: submitted already" in slower.stderr
    assert project.store.exists(KEYS.run)


@pytest.mark.parametrize("stopped_by", [KeyboardInterrupt, InfraError])
def test_one_that_is_stopped_leaves_the_record_to_the_job_that_another_has_submitted(
    project: Project, monkeypatch: pytest.MonkeyPatch, stopped_by: type[BaseException]
) -> None:
    submit = FakeInfra.submit

    def stopped(infra: FakeInfra, submission: Submission) -> None:
        monkeypatch.setattr(FakeInfra, "submit", submit)
        assert project.run(*TRAIN).exit_code == 0
        raise stopped_by("stopped")

    monkeypatch.setattr(FakeInfra, "submit", stopped)
    assert project.run(*TRAIN).exit_code in (3, 130)
    assert [job.run_id for job in project.infra.jobs()] == ["run-a"]
    assert KEYS.run in project.store.keys("runs")


def test_who_comes_second_and_is_refused_leaves_the_code_of_the_first(project: Project) -> None:
    project.submit()
    kept = project.store.keys(KEYS.code)
    project.store.write(f"{KEYS.code}/commit.json", b"the first one's")
    project.infra.states.clear()
    FakeInfra.refuses.append("no quota")
    assert project.run(*TRAIN).exit_code == 3
    assert project.store.read(f"{KEYS.code}/commit.json") == b"the first one's"
    assert set(project.store.keys(KEYS.code)) == {*kept, f"{KEYS.code}/commit.json"}


def test_both_find_a_record_without_a_job(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.submit()
    project.infra.states.clear()
    faster = overtaken(project, monkeypatch, *TRAIN)
    slower = project.run(*TRAIN)
    assert [result.exit_code for result in (*faster, slower)] == [0, 0], slower.stderr
    assert project.store.exists(KEYS.run)


def test_the_slower_ones_change_is_refused(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.submit()
    project.infra.states.clear()
    overtaken(project, monkeypatch, *TRAIN, "--set", "max_steps=40")
    slower = project.run(*TRAIN, "--set", "max_steps=50")
    assert slower.exit_code == 2
    assert set(project.store.keys("runs")) == {KEYS.run, KEYS.revision(2)}  # the faster one's


def test_a_job_of_before_is_another_run(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeInfra, "now", 1.0)
    project.submit()
    project.store.delete([KEYS.run])
    refused: Any = project.run(*TRAIN)
    assert (refused.exit_code, project.store.keys("runs")) == (2, [])
    assert refused.stderr.splitlines()[-1] == "--name: run-a is in this machine's queue already (another --name)"


def test_a_full_bucket_gets_nothing_of_a_refused_run(project: Project, tmp_path: Path) -> None:
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "run.yaml"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], cwd=project.folder, check=True)
    project.write("more.py", "x = 1\n" * 2000)  # goes along with the run's code
    codes = set()
    with file_system(tmp_path / "bucket") as folder:
        for left_kb in range(0, 64, 4):
            fill(folder, left_kb << 10)
            before = sorted(folder.rglob("*"))
            result = project.run(*TRAIN, "--set", f"seed={left_kb}", env={"SPOTUNE_BUCKET": f"file://{folder}"})
            codes.add(result.exit_code)
            if result.exit_code == 0:
                break
            assert sorted(folder.rglob("*")) == before
            assert "No space left" in result.stderr.splitlines()[-1]
            assert not project.infra.states
    assert codes == {0, 3}


@pytest.mark.parametrize(
    ("verb", "state", "finds", "records"),
    [
        (("resume", "run-a", "-y"), "FAILED", 1, 2),  # one fresh record after the user's answer
        (("cancel", "run-a", "-y"), "RUNNING", 2, 0),  # one fresh status after the end
        (("logs", "run-a"), "RUNNING", 1, 0),
        (("preempt", "run-a", "--no-notice", "-y"), "RUNNING", 1, 0),
    ],
)
def test_a_verb_finds_its_run_and_reads_its_record_once(
    project: Project, monkeypatch: pytest.MonkeyPatch, verb: tuple[str, ...], state: str, finds: int, records: int
) -> None:
    project.submit()
    project.infra.turn("run-a", state=state, attempt=1)
    jobs, read, calls = FakeInfra.jobs, Store.read, list[str]()

    def counted_jobs(infra: FakeInfra, run_ids: list[str] | None = None, everyone: bool = False) -> list[JobStatus]:
        calls.append("find")
        return jobs(infra, run_ids, everyone)

    def counted_read(store: Store, key: str) -> bytes | None:
        calls.extend(["record"] if key == KEYS.run else [])
        return read(store, key)

    monkeypatch.setattr(FakeInfra, "jobs", counted_jobs)
    monkeypatch.setattr(Store, "read", counted_read)
    result = project.run(*verb)
    assert result.exit_code == 0, result.stderr
    assert (calls.count("find"), calls.count("record")) == (finds, records)
