"""A checkpoint that was made under other versions of the libraries: refused and allowed, with the real worker."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from spotune.contracts.errors import OtherVersions
from spotune.contracts.exchange import Job
from spotune.contracts.keys import Keys
from spotune.contracts.records import Commit, Mark
from spotune.contracts.revisions import record_history
from spotune.contracts.store import Store
from spotune.contracts.versions import ORDER_LIBRARIES, installed_versions
from spotune.sft.faults import outcome_of
from spotune.sft.worker import check_versions
from tests.tiny import make_model, rows, write_jsonl

KEYS = Keys("run-a")
JOB = Job(run_id="run-a", attempt=2, config={}, config_path="run.yaml", cache="")
THEN, NOW = {"datasets": "5.0.1", "trl": "1.16.0"}, {"datasets": "5.2.0", "trl": "1.16.0", "numpy": "2.4.6"}
LINE = (
    "run.yaml: versions: libraries changed since the checkpoint was made: datasets 5.0.1 -> {}"
    " (install those that it was made with, or spotune resume run-a --allow-config-change)"
)
CONFIG = {
    "model_name_or_path": "model",
    "data": [{"source": "data.jsonl"}],
    "max_steps": 12,
    "per_device_train_batch_size": 2,
    "bf16": False,
    "activation_checkpointing": False,
    "logging_steps": 4,
    "save_steps": 4,
}


def test_the_worker_refuses() -> None:
    with pytest.raises(OtherVersions) as caught:
        check_versions(JOB, {"versions": THEN, "other_versions_allowed": False}, NOW)
    outcome = outcome_of(caught.value, 0)
    assert (outcome.how, outcome.message) == ("bad_input", LINE.format("5.2.0"))
    assert outcome.versions == ["datasets 5.0.1 -> 5.2.0"]


@pytest.mark.parametrize("restored", [{}, {"versions": {}}, {"versions": NOW}, {"versions": {"trl": "1.16.0"}}])
def test_the_worker_has_nothing_to_refuse(restored: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    check_versions(JOB, {**restored, "other_versions_allowed": False}, NOW)
    assert capsys.readouterr().err == ""


def test_the_worker_says_what_is_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    check_versions(JOB, {"versions": THEN, "other_versions_allowed": True}, NOW)
    line = "[spotune] rows may come in another order from here on: datasets 5.0.1 -> 5.2.0\n"
    assert capsys.readouterr().err == line


class Script:
    """A run by hand, in a folder with its model and data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_model(folder / "model")
        write_jsonl(folder / "data.jsonl", rows(60))
        (folder / "run.yaml").write_text(yaml.safe_dump(CONFIG))
        self.environ = {**os.environ, "SPOTUNE_HOME": str(folder / "home"), "SPOTUNE_RUN_ID": "run-a"}
        self.store = Store(f"file://{folder}/home/bucket")

    def start(self, *words: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", *words]
        return subprocess.Popen(command, cwd=self.folder, env=self.environ, stderr=subprocess.PIPE, text=True)

    def run(self, *words: str) -> tuple[int, str]:
        process = self.start(*words)
        _, said = process.communicate()
        return process.returncode, said

    def resume(self, *flags: str) -> tuple[int, str]:
        code = "from spotune.cli import main; main()"
        process = subprocess.run(
            [sys.executable, "-c", code, "resume", "run-a", *flags],
            cwd=self.folder, env=self.environ, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return process.returncode, process.stdout + process.stderr

    def commits(self) -> dict[str, Commit]:
        return {key: Commit.from_bytes(self.store.read(key) or b"", key) for key in self.store.keys(KEYS.commits)}

    def make_as_if_under(self, **versions: str) -> None:
        """The commits that are there, as another environment would have written them."""
        for key, commit in self.commits().items():
            data = json.loads(commit.to_bytes())
            self.store.write(key, json.dumps({**data, "versions": {**commit.versions, **versions}}).encode())


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """A run that was taken away after its first commit."""
    script = Script(tmp_path)
    process = script.start("spotune.sft", "run.yaml")
    while not script.store.keys(KEYS.commits):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    process.communicate()
    assert process.returncode == 75
    return script


@pytest.mark.slow
def test_a_commit_names_the_libraries(script: Script) -> None:
    for commit in script.commits().values():
        assert set(ORDER_LIBRARIES) <= set(commit.versions)
        assert commit.versions == installed_versions()


@pytest.mark.slow
def test_refused_until_it_is_allowed_and_then_for_good(script: Script) -> None:
    script.make_as_if_under(datasets="5.0.1")
    now = installed_versions()["datasets"]
    code, said = script.run("spotune.sft", "run.yaml")
    assert code == 2
    assert said.splitlines()[-1] == LINE.format(now)
    mark = Mark.from_bytes(script.store.read(KEYS.failed) or b"", KEYS.failed)
    assert mark.versions == [f"datasets 5.0.1 -> {now}"]

    assert script.resume()[0] == 0  # nothing is allowed by that
    assert script.run("spotune.sft", "run.yaml")[0] == 2

    code, said = script.resume("--allow-config-change")
    assert (code, f"changed: versions: datasets 5.0.1 -> {now}" in said) == (0, True)
    assert [record.allowed for record in record_history(script.store, KEYS)] == [[], ["versions"]]
    code, said = script.run("spotune.sft", "run.yaml")
    assert code == 0, said
    assert f"rows may come in another order from here on: datasets 5.0.1 -> {now}\n" in said
    newest = max(script.commits().values(), key=lambda commit: (commit.attempt, commit.step))
    assert (newest.versions["datasets"], newest.revision) == (now, 1)


@pytest.mark.slow
def test_allowed_by_the_scripts_own_flag(script: Script) -> None:
    script.make_as_if_under(datasets="5.0.1")
    code, said = script.run("spotune.sft", "run.yaml", "--allow-config-change")
    assert (code, "rows may come in another order" in said) == (0, True), said


@pytest.mark.slow
def test_what_a_commit_does_not_say_is_not_held_against_it(script: Script) -> None:
    for key, commit in script.commits().items():
        data = json.loads(commit.to_bytes())
        versions = {name: value for name, value in commit.versions.items() if name != "numpy"}
        script.store.write(key, json.dumps({**data, "versions": versions}).encode())
    code, said = script.run("spotune.sft", "run.yaml")
    assert code == 0, said
    assert "resumed from the checkpoint of step" in said
