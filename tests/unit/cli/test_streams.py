"""Streams that are closed, full or of a narrow encoding: a verb says so in one line, or does without them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import spotune
from tests.unit.project import Project

VERB = f"{sys.executable} -c 'from spotune.cli import main; main()'"
NOBODY = "[Y/n] stdin: no terminal to confirm on (add -y)\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    return Project(tmp_path / "project", monkeypatch)


def shell(project: Project, line: str, **environ: str) -> subprocess.CompletedProcess[str]:
    line = line.replace("spotune", VERB)
    env = {**os.environ, "PYTHONPATH": str(Path(spotune.__file__).parents[1]), **environ}
    return subprocess.run(
        ["bash", "-c", line], cwd=project.folder, env=env, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("stdin", ["<&-", "</dev/null"])
def test_nobody_to_ask_is_one_line(project: Project, stdin: str) -> None:
    done = shell(project, f"spotune dev down {stdin}")
    assert (done.returncode, done.stderr.endswith(NOBODY), done.stderr.count("\n")) == (2, True, 1), done.stderr


@pytest.mark.parametrize("line", ["queue >&-", "train run.yaml --dryrun >&-", "train run.yaml --dryrun <&-", "-h >&-"])
def test_closed(project: Project, line: str) -> None:
    done = shell(project, f"spotune {line}")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("line", ["cost", "queue", "--help", "train --help", "train run.yaml --dryrun"])
def test_full(project: Project, line: str, unbuffered: str) -> None:
    done = shell(project, f"spotune {line} > /dev/full", PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stderr) == (1, "cannot write the output: No space left on device\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("streams", ["2> /dev/full", "2>&-", "2> >(exec true)"])
def test_what_stderr_cannot_take_changes_no_exit_code(project: Project, streams: str, unbuffered: str) -> None:
    for line, code in (("queue", 0), ("train run.yaml --dryrun", 0), ("queue --wrong", 2), ("logs no-such-run", 2)):
        assert shell(project, f"spotune {line} {streams}", PYTHONUNBUFFERED=unbuffered).returncode == code, line


@pytest.mark.parametrize("line", ["queue --help", "train run.yaml --dryrun", "cost"])
def test_a_reader_that_leaves_gets_no_traceback(project: Project, line: str) -> None:
    done = shell(project, f"spotune {line} | head -c 1; exit ${{PIPESTATUS[0]}}")
    assert done.returncode in (0, 1)
    assert done.stderr == ""


def test_narrow(project: Project) -> None:
    done = shell(project, "spotune train run.yaml --dryrun", PYTHONIOENCODING="latin-1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "0.040   ?\n" in done.stdout


def test_a_run_goes_on_without_its_reader(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def followed(*_: object) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("spotune.cli.runs.follow", followed)
    done = project.run("train", "run.yaml", "--name", "run-a", "-y")
    assert done.exit_code == 1
    assert "run-a goes on (follow it: spotune logs -f run-a)\n" in done.stderr
