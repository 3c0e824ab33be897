"""A config, data or model that changes while a run stands still, on the local infrastructure.

The guard is real. The worker is tests/fake_worker.py: its weights depend on the learning rate, the data's rows and the
base model.
"""

import signal
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from spotune.core.keys import Keys
from spotune.core.records import Commit
from spotune.core.revisions import check_commit, record_history
from tests.local_project import LocalProject
from tests.script import FakeScript
from tests.waiting import ended

STEPS = 40
CONFIG = {"max_steps": STEPS, "save_steps": 4, "logging_steps": 4}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalProject]:
    project = LocalProject(tmp_path / "project", monkeypatch, **CONFIG)
    yield project
    project.machine.close()


def commits(project: LocalProject, run_id: str) -> list[Commit]:
    keys = project.store.keys(Keys(run_id).commits)
    return [Commit.from_bytes(project.store.read(key) or b"", key) for key in keys]


def rows_of(project: LocalProject) -> list[bytes]:
    return (project.folder / "data.jsonl").read_bytes().splitlines()


def result_of(project: LocalProject, run_id: str) -> bytes:
    """The weights of a finished run."""
    return project.store.read(f"{Keys(run_id).output}/model.safetensors") or b""


def change_data(project: LocalProject) -> None:
    path = project.folder / "data.jsonl"
    path.write_text(path.read_text().replace("row", "line"))


def cancelled_midway(project: LocalProject, run_id: str) -> str:
    """A run that was cancelled after step 6 and has a checkpoint of step 4."""
    project.allow(6)
    project.spotune("train", "run.yaml", "--name", run_id, "-d")
    project.wait_for_step(run_id, 6)
    project.wait_for_commit(run_id, 4)
    project.machine.moves_s = 60.0  # the worker does not stop before step 7, so it is killed
    project.spotune("cancel", run_id, "-y")
    project.machine.moves_s = 0.0
    assert project.row(run_id)["state"] == "CANCELLED"
    project.allow_all()
    return run_id


def chain(project: LocalProject, *parts: tuple[int, float, list[bytes]]) -> bytes:
    """The state of the fake worker's weights after parts of (last step, learning rate, rows)."""
    base = (project.folder / "model/model.safetensors").read_bytes()
    state, step = sha256(base + b"42").digest(), 0
    for last, rate, rows in parts:
        while step < last:
            step += 1
            state = sha256(state + str(step).encode() + str(rate).encode() + rows[step % len(rows)]).digest()
    return state


def test_a_longer_training_goes_on_and_what_is_edited_is_refused(project: LocalProject) -> None:
    run_id = cancelled_midway(project, "run-a")
    train = ("train", "run.yaml", "--name", run_id, "-d")
    line = project.refused(*train, "--set", "learning_rate=0.002", "--set", "max_steps=48")
    assert "another config: learning_rate: 0.001 -> 0.002; max_steps: 40 -> 48 (--allow-config-change" in line

    data, base = project.folder / "data.jsonl", project.folder / "model/model.safetensors"
    for path, name, key in ((data, "data.jsonl", "data"), (base, "model.safetensors", "model_name_or_path")):
        before = path.read_bytes()
        path.write_bytes(before[:-2] + b" \n" if path == data else before[:-1] + bytes([before[-1] ^ 1]))
        assert name in project.refused(*train)
        project.spotune("resume", run_id)  # whoever does not look here is stopped on the machine
        row = project.end(run_id)
        assert row["state"] == "FAILED"
        assert row["reason"].startswith(f"run.yaml: {key}: ")
        assert f"changed since the run began: {name} (put it back, or spotune resume run-a" in row["reason"]
        path.write_bytes(before)

    resumed = project.spotune("resume", run_id, "--set", "max_steps=48").stdout
    assert "PENDING, changed: max_steps: 40 -> 48" in resumed
    row = project.end(run_id)
    assert (row["state"], row["step"], row["max_steps"]) == ("SUCCEEDED", 48, 48)
    assert "resumed from the checkpoint of step" in project.spotune("logs", run_id).stdout
    assert "is finished, with another config: max_steps: 48 -> 50" in project.refused(*train, "--set", "max_steps=50")

    project.spotune("train", "run.yaml", "--name", "whole", "--set", "max_steps=48", "-y")
    assert project.report(run_id)["weights_sha256"] == project.report("whole")["weights_sha256"]


def test_with_the_flag_anything_goes_on(project: LocalProject) -> None:
    run_id = cancelled_midway(project, "run-a")
    rows = rows_of(project)
    change_data(project)
    words = ("train", "run.yaml", "--name", run_id, "--set", "learning_rate=0.002", "--allow-config-change")
    done = project.spotune(*words)
    line = done.stdout + done.stderr
    assert "goes on with a change: learning_rate: 0.001 -> 0.002; data: data.jsonl; goes on at the same step" in line
    assert "resumed from the checkpoint of step" in line
    assert "is not followed" not in line
    row = project.row(run_id)
    assert (row["state"], row["step"]) == ("SUCCEEDED", STEPS)
    history = record_history(project.store, Keys(run_id))
    assert [record.allowed for record in history] == [[], ["learning_rate", "data"]]
    made_with = {commit.config_sha256 for commit in commits(project, run_id)}
    assert history[1].config_sha256 in made_with
    for commit in commits(project, run_id):
        check_commit(commit, history)
    expected = chain(project, (4, 0.001, rows), (STEPS, 0.002, rows_of(project)))
    assert expected.hex().encode() in result_of(project, run_id)  # from step 5 on with the new rate and rows


def test_by_hand(project: LocalProject) -> None:
    script = FakeScript(project.store.url, "by-hand", Path("run.yaml"), project.home)
    first = script.start_and_stop_after(6)
    first.send_signal(signal.SIGTERM)
    project.wait_for_stop("by-hand")
    script.allow_all()
    assert ended(first) == 75

    rows = rows_of(project)
    change_data(project)
    seen = len(script.log())
    assert script.run("--learning_rate", "0.002") == 2
    not_followed, why = script.log()[seen:].splitlines()
    assert (
        "run.yaml is not followed, the run goes on as it was submitted: learning_rate: 0.001 -> 0.002" in not_followed
    )
    assert why.startswith("run.yaml: data: training data changed since the run began: data.jsonl (put it back, or")
    assert project.row("by-hand")["state"] == "FAILED"

    assert "changed: data: data.jsonl" in project.spotune("resume", "by-hand", "--allow-config-change").stdout
    seen = len(script.log())
    assert script.run("--learning_rate", "0.002", "--allow-config-change") == 0, script.log()
    assert "by-hand, revision 2: learning_rate: 0.001 -> 0.002\n" in script.log()[seen:]
    assert "resumed from the checkpoint of step" in script.log()[seen:]
    history = record_history(project.store, Keys("by-hand"))
    assert [record.allowed for record in history] == [[], ["data"], ["learning_rate"]]
    expected = chain(project, (7, 0.001, rows), (STEPS, 0.002, rows_of(project)))
    assert expected.hex().encode() in result_of(project, "by-hand")
