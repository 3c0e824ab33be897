"""A checkpoint that was made under other versions of the libraries: refused and allowed, with the real worker."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from spotune.core.errors import OtherVersions
from spotune.core.fingerprint import ORDER_LIBRARIES, installed_versions
from spotune.core.keys import Keys
from spotune.core.protocol import WorkerJob
from spotune.core.records import Commit, TerminalMarker
from spotune.core.revisions import record_history
from spotune.sft.preflight import outcome_of
from spotune.sft.worker import check_versions
from tests.script import Script
from tests.tiny import make_model, rows, write_jsonl

KEYS = Keys("run-a")
JOB = WorkerJob(run_id="run-a", attempt=2, config={}, config_path="run.yaml", cache="")
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


class Run(Script):
    """A run by hand, in the current folder."""

    def resume(self, *flags: str) -> str:
        """``spotune resume``, which must succeed; returns what it prints."""
        command = [sys.executable, "-c", "from spotune.cli import main; main()", "resume", "run-a", *flags]
        known = {**os.environ, **self.environ}
        done = subprocess.run(command, env=known, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def made(self) -> dict[str, Commit]:
        return {key: Commit.from_bytes(self.store.read(key) or b"", key) for key in self.store.keys(KEYS.commits)}

    def make_as_if_under(self, versions: Callable[[dict[str, str]], dict[str, str]]) -> None:
        """Rewrites the commits as another environment would have written them."""
        for key, commit in self.made().items():
            self.store.write(key, replace(commit, versions=versions(commit.versions)).to_bytes())


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run whose machine was taken away after its first commit."""
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "model")
    write_jsonl(tmp_path / "data.jsonl", rows(60))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    run = Run(f"file://{tmp_path}/bucket", "run-a", Path("run.yaml"))
    process = run.start(stop_at="committed")
    run.wait_at(process, "committed")
    process.kill()
    process.wait()
    return run


def older(versions: dict[str, str]) -> dict[str, str]:
    return {**versions, "datasets": "5.0.1"}


@pytest.mark.slow
def test_a_commit_names_the_libraries(run: Run) -> None:
    (commit,) = run.made().values()
    assert set(ORDER_LIBRARIES) <= set(commit.versions)
    assert commit.versions == installed_versions()


@pytest.mark.slow
def test_refused_until_it_is_allowed_and_then_for_good(run: Run) -> None:
    run.make_as_if_under(older)
    now = installed_versions()["datasets"]
    assert run.run() == 2
    assert run.log().splitlines()[-1] == LINE.format(now)
    mark = TerminalMarker.from_bytes(run.store.read(KEYS.failed) or b"", KEYS.failed)
    assert mark.versions == [f"datasets 5.0.1 -> {now}"]

    run.resume()  # allows nothing
    assert run.run() == 2

    assert f"changed: versions: datasets 5.0.1 -> {now}" in run.resume("--allow-config-change")
    assert [record.allowed for record in record_history(run.store, KEYS)] == [[], ["versions"]]
    process = run.start(stop_at="restored")  # this machine goes before it has committed anything
    run.wait_at(process, "restored")
    process.kill()
    process.wait()
    assert run.run() == 0, run.log()
    assert f"rows may come in another order from here on: datasets 5.0.1 -> {now}\n" in run.log()
    newest = max(run.made().values(), key=lambda commit: (commit.attempt, commit.step))
    assert (newest.versions["datasets"], newest.revision) == (now, 1)


@pytest.mark.slow
def test_allowed_by_the_scripts_own_flag(run: Run) -> None:
    run.make_as_if_under(older)
    assert run.run("--allow-config-change") == 0, run.log()
    assert "rows may come in another order" in run.log()


@pytest.mark.slow
def test_what_a_commit_does_not_say_is_not_held_against_it(run: Run) -> None:
    run.make_as_if_under(lambda versions: {name: value for name, value in versions.items() if name != "numpy"})
    assert run.run() == 0, run.log()
    assert "resumed from the checkpoint of step" in run.log()
