"""A project on this machine: verbs and supervisor in the test's process, the script with the fake worker in its own."""

import json
import sys
from pathlib import Path
from typing import Any

import click.testing
import pytest

from spotune.cli import main
from spotune.core.environment import PYTHON
from spotune.core.keys import Keys, commit_of
from spotune.core.protocol import CONTROL, read_json
from spotune.core.store import Store
from spotune.launch.engine import ACTIVE
from tests.commands import cli_runner
from tests.local_machine import LocalMachine
from tests.script import FakeWorkers, fake_config
from tests.waiting import until


class LocalProject(FakeWorkers):
    """A folder with a model, data, ``run.yaml`` and the training task, and ``spotune`` in it.

    Attributes:
        told: the fake worker's folder, see tests/fake_worker.py.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **config: Any) -> None:
        paths = {"model_name_or_path": "model", "data": [{"source": "data.jsonl"}]}
        fake_config(folder, **{**paths, **config})
        self.folder, self.home = folder, folder / "home"
        self.store = Store(f"file://{self.home}/bucket")
        self.told = folder / "told"
        (folder / "tasks").mkdir()
        self.write_task()
        monkeypatch.setenv("SPOTUNE_HOME", str(self.home))
        monkeypatch.chdir(folder)
        self.machine = LocalMachine(self.home)
        self.machine.serve_verbs(monkeypatch)

    def write_task(self, guard: str = "-m spotune.sft") -> None:
        """Writes the training task; ``guard``: what Python runs."""
        run = f'exec "${PYTHON}" {guard} "$SPOTUNE_CONFIG"'
        envs = {PYTHON: sys.executable, **self.worker_environ}
        task = {"run": run, "envs": envs, "resources": {"use_spot": True}}
        (self.folder / "tasks/train.yaml").write_text(json.dumps(task))

    def spotune(self, *words: str, code: int = 0) -> click.testing.Result:
        """A verb; asserts its exit code."""
        done = cli_runner().invoke(main, words, prog_name="spotune")
        assert done.exit_code == code, done.stdout[-2000:] + done.stderr[-2000:] + repr(done.exception)
        return done

    def refused(self, *words: str) -> str:
        """The one line of a verb that refuses and prints nothing else."""
        done = self.spotune(*words, code=2)
        assert (done.stdout, done.stderr.count("\n")) == ("", 1), done.stderr
        return done.stderr

    def row(self, run_id: str) -> dict[str, Any]:
        rows = json.loads(self.spotune("queue", "-a", "--format", "json").stdout)
        found: dict[str, Any] = next(row for row in rows if row["run_id"] == run_id)
        return found

    def wait_for_step(self, run_id: str, step: int) -> None:
        def has_come() -> bool:
            self.machine.wait()
            (status,) = self.machine.infra({}).jobs([run_id])
            assert status.state in ACTIVE, status
            return (status.step or 0) >= step

        until(has_come, lambda: self.machine.queue.job(run_id))

    def wait_for_stop(self, run_id: str) -> None:
        """Returns once the guard has asked its worker to stop."""

        def is_asked() -> bool:
            self.machine.wait()
            controls = (self.home / "work" / run_id).glob(f"**/{CONTROL}")
            return any((read_json(control) or {}).get("stop") for control in controls)

        until(is_asked, lambda: self.machine.queue.job(run_id))

    def wait_for_commit(self, run_id: str, step: int) -> None:
        """Returns once the checkpoint of that step is in the bucket."""

        def is_there() -> bool:
            self.machine.wait()
            found = [commit_of(key) for key in self.store.keys(Keys(run_id).commits)]
            return any(commit and commit[1] == step for commit in found)

        until(is_there, lambda: self.machine.queue.job(run_id))

    def end(self, run_id: str) -> dict[str, Any]:
        """Waits for the run's end; returns its row in the queue."""
        self.spotune("logs", run_id, "--follow")
        return self.row(run_id)

    def report(self, run_id: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.spotune("cost", run_id, "--format", "json").stdout)
        return found

    def paused(self, run_id: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.store.read(Keys(run_id).paused) or "{}")
        return found
