"""A config, data or model that changes while a run stands still: real training on the local infrastructure."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from spotune.contracts.keys import Keys
from spotune.contracts.records import Commit
from spotune.contracts.revisions import check_commit, record_history
from spotune.contracts.store import Store
from tests.processes import end_processes_of
from tests.tiny import make_model, rows, write_jsonl

STEPS = 40
CONFIG = {
    "model_name_or_path": "model",
    "data": [{"source": "data.jsonl"}],
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 20,  # a step takes long enough to be hit
    "learning_rate": 1e-3,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 4,
    "save_steps": 4,
}
SPOTUNE = [sys.executable, "-c", "from spotune.cli import main; main()"]


class Project:
    """A folder with a model, data, a config and the plain training task, and spotune in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "home"
        make_model(folder / "model", dropout=0.1)
        write_jsonl(folder / "data.jsonl", rows(200))
        (folder / "run.yaml").write_text(yaml.safe_dump(CONFIG))
        (folder / "tasks").mkdir()
        task = {"run": 'exec "$SPOTUNE_PYTHON" -m spotune.sft "$SPOTUNE_CONFIG"', "resources": {"use_spot": True}}
        (folder / "tasks/train.yaml").write_text(json.dumps(task))
        self.environ = {**os.environ, "SPOTUNE_HOME": str(self.home)}
        self.store = Store(f"file://{self.home}/bucket")

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [*SPOTUNE, *arguments]
        return subprocess.run(command, cwd=self.folder, env=self.environ, capture_output=True, text=True, timeout=300)

    def refused(self, *arguments: str) -> str:
        ran = self.run(*arguments)
        assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (2, "", 1), ran.stderr
        return ran.stderr

    def accepted(self, *arguments: str) -> str:
        ran = self.run(*arguments)
        assert ran.returncode == 0, (ran.stdout, ran.stderr)
        return ran.stdout + ran.stderr

    def by_hand(self, run_id: str, *flags: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "spotune.sft", "run.yaml", *flags]
        environ = {**self.environ, "SPOTUNE_RUN_ID": run_id, "SPOTUNE_STATUS_FILE": str(self.home / "status.json")}
        (self.home / "status.json").unlink(missing_ok=True)
        return subprocess.Popen(command, cwd=self.folder, env=environ, stderr=subprocess.PIPE, text=True)

    def row(self, run_id: str) -> dict[str, Any]:
        rows = json.loads(self.run("queue", "-a", "--format", "json").stdout)
        found: dict[str, Any] = next(row for row in rows if row["run_id"] == run_id)
        return found

    def wait_for_step(self, run_id: str, step: int) -> None:
        deadline = time.monotonic() + 300
        while (seen := self.row(run_id))["step"] is None or seen["step"] < step:
            assert time.monotonic() < deadline, seen
            assert seen["state"] != "FAILED", seen
            time.sleep(0.1)

    def end(self, run_id: str) -> dict[str, Any]:
        self.run("logs", run_id, "-f")
        return self.row(run_id)

    def commits(self, run_id: str) -> list[Commit]:
        keys = self.store.keys(Keys(run_id).commits)
        return [Commit.from_bytes(self.store.read(key) or b"", key) for key in keys]


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    project = Project(tmp_path / "project")
    yield project
    end_processes_of(project.home)


def cancelled_midway(project: Project, run_id: str) -> str:
    project.accepted("train", "run.yaml", "--name", run_id, "-d")
    project.wait_for_step(run_id, 6)
    project.accepted("cancel", run_id, "-y")
    assert project.row(run_id)["state"] == "CANCELLED"
    assert project.commits(run_id)
    return run_id


def test_a_longer_training_goes_on_and_what_is_edited_is_refused(project: Project) -> None:
    run_id = cancelled_midway(project, "run-a")
    train = ("train", "run.yaml", "--name", run_id, "-d")
    line = project.refused(*train, "--set", "learning_rate=0.002", "--set", "max_steps=48")
    assert "another config: learning_rate: 0.001 -> 0.002; max_steps: 40 -> 48 (--allow-config-change" in line

    data, weights = project.folder / "data.jsonl", project.folder / "model/model.safetensors"
    for path, name, key in ((data, "data.jsonl", "data"), (weights, "model.safetensors", "model_name_or_path")):
        before = path.read_bytes()
        path.write_bytes(before[:-2] + b" \n" if path == data else before[:-1] + bytes([before[-1] ^ 1]))
        assert name in project.refused(*train)
        project.accepted("resume", run_id)  # whoever does not look here is stopped on the machine
        ended = project.end(run_id)
        assert ended["state"] == "FAILED"
        assert ended["reason"].startswith(f"run.yaml: {key}: ")
        assert f"changed since the run began: {name} (put it back, or spotune resume run-a" in ended["reason"]
        path.write_bytes(before)

    assert "PENDING, changed: max_steps: 40 -> 48" in project.accepted("resume", run_id, "--set", "max_steps=48")
    ended = project.end(run_id)
    assert (ended["state"], ended["step"], ended["max_steps"]) == ("SUCCEEDED", 48, 48)
    assert "resumed from the checkpoint of step" in project.run("logs", run_id).stdout
    assert "is finished, with another config: max_steps: 48 -> 50" in project.refused(*train, "--set", "max_steps=50")


def test_with_the_flag_anything_goes_on(project: Project) -> None:
    run_id = cancelled_midway(project, "run-a")
    write_jsonl(project.folder / "data.jsonl", rows(200, seed=1))
    line = project.accepted(
        *("train", "run.yaml", "--name", run_id, "--set", "learning_rate=0.002", "--allow-config-change")
    )
    assert "goes on with a change: learning_rate: 0.001 -> 0.002; data: data.jsonl; goes on at the same step" in line
    assert "resumed from the checkpoint of step" in line
    assert "is not followed" not in line
    assert f"'learning_rate': '{0.002 / STEPS:g}'" in line  # at the last step, from the new rate
    ended = project.row(run_id)
    assert (ended["state"], ended["step"]) == ("SUCCEEDED", STEPS)
    history = record_history(project.store, Keys(run_id))
    assert [record.allowed for record in history] == [[], ["learning_rate", "data"]]
    made_with = {commit.config_sha256 for commit in project.commits(run_id)}
    assert history[1].config_sha256 in made_with
    for commit in project.commits(run_id):
        check_commit(commit, history)


def test_by_hand(project: Project) -> None:
    first = project.by_hand("by-hand")
    status, deadline = project.home / "status.json", time.monotonic() + 300
    while not status.exists() or json.loads(status.read_text())["step"] < 6:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=300)
    assert first.returncode == 75

    write_jsonl(project.folder / "data.jsonl", rows(200, seed=1))
    _, said = project.by_hand("by-hand", "--learning_rate", "0.002").communicate(timeout=300)
    not_followed, why = said.splitlines()
    assert (
        "run.yaml is not followed, the run goes on as it was submitted: learning_rate: 0.001 -> 0.002" in not_followed
    )
    assert why.startswith("run.yaml: data: training data changed since the run began: data.jsonl (put it back, or")
    assert project.row("by-hand")["state"] == "FAILED"

    assert "changed: data: data.jsonl" in project.accepted("resume", "by-hand", "--allow-config-change")
    last = project.by_hand("by-hand", "--learning_rate", "0.002", "--allow-config-change")
    _, said = last.communicate(timeout=300)
    assert last.returncode == 0, said
    assert "by-hand, revision 2: learning_rate: 0.001 -> 0.002\n" in said
    assert "resumed from the checkpoint of step" in said
    history = record_history(project.store, Keys("by-hand"))
    assert [record.allowed for record in history] == [[], ["data"], ["learning_rate"]]
