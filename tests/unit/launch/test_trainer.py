"""Which Python trains on this machine, and what a submission says where there is none."""

import os
import sys
from pathlib import Path

import pytest

from spotune.core.errors import InputError
from spotune.launch import task as launch_task
from spotune.launch.local.engine import LocalInfra
from spotune.launch.local.layout import LocalFolders
from spotune.launch.local.machine import keep_environment, kept_environment
from spotune.launch.task import find_trainer, trainer_of
from tests.unit.project import Project

USES_IT = {"run": 'exec "${SPOTUNE_PYTHON:-.venv-train/bin/python}" -m spotune.sft "$SPOTUNE_CONFIG"'}
HAS_ITS_OWN = {"run": "exec /opt/python -m spotune.sft x.yaml"}


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither spotune's own checkout nor this Python trains, whatever environment the test runs in."""
    monkeypatch.setattr(launch_task.spotune, "__file__", str(tmp_path / "site-packages" / "spotune" / "x" / "y.py"))
    monkeypatch.setattr(launch_task, "find_spec", lambda name: None)


def program(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return str(path)


def test_the_places_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, checkout = tmp_path / "project", tmp_path / "checkout"
    monkeypatch.setattr(launch_task, "find_spec", lambda name: name == "trl" or None)
    assert find_trainer({}, project) == sys.executable
    monkeypatch.setattr(launch_task.spotune, "__file__", str(checkout / "src" / "spotune" / "__init__.py"))
    of_checkout = program(checkout / ".venv-train/bin/python")
    assert find_trainer({}, project) == of_checkout
    of_project = program(project / ".venv-train/bin/python")
    assert find_trainer({"SPOTUNE_PYTHON": ""}, project) == of_project
    given = program(tmp_path / "given" / "python9")
    assert find_trainer({"SPOTUNE_PYTHON": given}, project) == given
    assert find_trainer({"SPOTUNE_PYTHON": "../given/python9"}, project) == str(project / "../given/python9")
    assert find_trainer({"SPOTUNE_PYTHON": "python9", "PATH": str(tmp_path / "given")}, project) == given


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    """The link's own place is what tells Python which environment it belongs to."""
    link = tmp_path / ".venv-train/bin/python"
    link.parent.mkdir(parents=True)
    link.symlink_to(sys.executable)
    assert find_trainer({}, tmp_path) == str(link)


@pytest.mark.parametrize("given", ["missing", "/no/such/python", ".", "plain", "./plain"])
def test_a_given_python_that_cannot_be_started(given: str, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("not executable")
    line = r"^SPOTUNE_PYTHON: '.*' is not an executable file \(the path of a Python that has spotune\[trainer\]"
    with pytest.raises(InputError, match=line) as caught:
        find_trainer({"SPOTUNE_PYTHON": given, "PATH": str(tmp_path)}, tmp_path)
    assert caught.value.exit_code == 2


def test_no_python_trains_here(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        find_trainer({}, tmp_path)
    missing = f"no Python that trains: {tmp_path}/.venv-train/bin/python is missing"
    assert str(caught.value) == f"SPOTUNE_PYTHON: {missing} (make setup-train, or SPOTUNE_PYTHON=PYTHON)"


def test_a_task_may_have_its_own_interpreter(tmp_path: Path) -> None:
    assert trainer_of(HAS_ITS_OWN, {}, tmp_path) == ""
    assert trainer_of(HAS_ITS_OWN, {"SPOTUNE_PYTHON": "/no/such/python"}, tmp_path) == ""
    for task in (USES_IT, {**HAS_ITS_OWN, "setup": '[ -n "$SPOTUNE_PYTHON" ] || make setup-train'}):
        with pytest.raises(InputError):
            trainer_of(task, {}, tmp_path)
    given = program(tmp_path / "given")
    assert trainer_of({**USES_IT, "envs": {"SPOTUNE_PYTHON": given}}, {"SPOTUNE_PYTHON": "/none"}, tmp_path) == given
    assert trainer_of(HAS_ITS_OWN, {"SPOTUNE_PYTHON": given}, tmp_path) == given


def test_a_job_keeps_it(tmp_path: Path) -> None:
    """The supervisor may be another installation's: it has no say in what trains."""
    layout = LocalFolders(tmp_path)
    keep_environment(layout.environment("run-a"), {"SPOTUNE_PYTHON": "other"}, {}, "/opt/python")
    assert kept_environment(layout, "run-a") == {"SPOTUNE_PYTHON": "/opt/python"}


@pytest.mark.parametrize("verb", [["train", "--infra", "local", "-y", "-d"], ["dev", "run"]])
@pytest.mark.parametrize("given", [None, "/no/such/python"])
def test_a_submission_is_refused_before_anything_is_written(
    verb: list[str], given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project(tmp_path / "project", monkeypatch)
    project.write("tasks/train.yaml", f"run: {USES_IT['run']!r}\nresources: {{use_spot: true}}\n")
    if given:
        monkeypatch.setenv("SPOTUNE_PYTHON", given)
    before = sorted(project.folder.rglob("*"))
    result = project.run(*verb, "run.yaml", "--name", "run-a")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("SPOTUNE_PYTHON: ")
    assert result.stderr.count("\n") == 1
    assert sorted(project.folder.rglob("*")) == before


def test_the_queue_takes_no_job_that_nothing_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spotune.launch.engine import Submission

    monkeypatch.setattr(LocalInfra, "_wake", lambda self: None)
    infra = LocalInfra(tmp_path / "home", dict(os.environ))
    job = Submission(run_id="run-a", task=USES_IT, workdir=str(tmp_path), user="ada")
    with pytest.raises(InputError, match="make setup-train"):
        infra.submit(job)
    assert infra.jobs() == []
    python = program(tmp_path / ".venv-train/bin/python")
    infra.submit(job)
    assert kept_environment(infra.layout, "run-a")["SPOTUNE_PYTHON"] == python


def test_check_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = Project(tmp_path / "project", monkeypatch)
    project.write("tasks/train.yaml", "run: x\n")
    assert "make setup-train" in project.json("check")["trainer"]
    python = program(project.folder / ".venv-train/bin/python")
    assert project.json("check")["trainer"] == python
