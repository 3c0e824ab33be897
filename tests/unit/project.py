"""A small project in a folder: a config with its data and model folder, and the fake infrastructure."""

import json
from pathlib import Path
from typing import Any

import click.testing
import pytest

from spotune.cli import main
from spotune.core.store import Store
from spotune.launch import engine
from spotune.launch.settings import Workspace
from tests.commands import cli_runner
from tests.unit.fake_infra import FakeInfra

CONFIG = """\
model_name_or_path: ./model
learning_rate: 1e-3
max_steps: 5
data: [{source: data.jsonl}]
profiles:
  dev: {max_steps: 1}
  prod: {max_steps: 9}
"""


class Project:
    """What a test of the launcher needs; ``run`` calls the command line in this process."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.home = folder, folder / "home"
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "config.json").write_text("{}")
        (folder / "data.jsonl").write_text('{"text": "a"}\n')
        self.write("run.yaml", CONFIG)
        monkeypatch.setenv("SPOTUNE_HOME", str(self.home))
        monkeypatch.setenv("SPOTUNE_USER", "ada")
        monkeypatch.chdir(folder)
        monkeypatch.setitem(engine.BACKENDS, "local", "tests.unit.fake_infra:FakeInfra")
        FakeInfra.reset()
        self.infra = FakeInfra()
        self.store = Store(f"file://{self.home}/bucket")

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def make_checkout(self) -> None:
        """What a machine of SkyPilot's sets its environment up from, by name only."""
        for name in (
            "tasks/setup.sh",
            "Makefile",
            "pyproject.toml",
            "requirements-trainer.lock",
            "src/spotune/__init__.py",
        ):
            self.write(name, "")

    def run(self, *arguments: str, input: str | None = None, env: dict[str, str] | None = None) -> click.testing.Result:
        return cli_runner().invoke(main, arguments, input=input, env=env, prog_name="spotune")

    def submit(self, name: str = "run-a", *arguments: str) -> str:
        result = self.run("train", "run.yaml", "--name", name, "-y", "-d", *arguments)
        assert result.exit_code == 0, result.stderr
        return name

    def workspace(self, **environ: str) -> Workspace:
        return Workspace.open({"SPOTUNE_HOME": str(self.home), "SPOTUNE_USER": "ada", **environ}, self.folder)

    def json(self, *arguments: str) -> Any:
        result = self.run(*arguments, "--format", "json")
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)
