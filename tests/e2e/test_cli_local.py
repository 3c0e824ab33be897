"""The command line against the real local infrastructure: attached, detached, interrupted. Tasks are shell commands."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from spotune.launch.local.layout import LocalFolders
from spotune.launch.local.queue import Queue
from tests.contract.infra_contract import CERTIFY, WAIT
from tests.processes import end_processes_of, named
from tests.waiting import LIMIT_S, until

SPOTUNE = [sys.executable, "-c", "from spotune.cli import main; main()"]


class Shell:
    """A project whose task is a shell command, and spotune in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "home"
        (folder / "tasks").mkdir(parents=True)
        (folder / "model").mkdir()
        (folder / "model/config.json").write_text("{}")
        (folder / "data.jsonl").write_text('{"text": "a"}\n')
        (folder / "run.yaml").write_text("model_name_or_path: ./model\ndata: [{source: data.jsonl}]\n")
        self.environ = {**os.environ, "SPOTUNE_HOME": str(self.home)}

    def task(self, run: str) -> None:
        (self.folder / "tasks/train.yaml").write_text(json.dumps({"run": run, "resources": {"use_spot": True}}))

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [*SPOTUNE, *arguments], cwd=self.folder, env=self.environ, stdout=pipe, stderr=pipe, text=True
        )

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [*SPOTUNE, *arguments]
        return subprocess.run(
            command, cwd=self.folder, env=self.environ, capture_output=True, text=True, timeout=LIMIT_S
        )

    def state(self, run_id: str) -> str:
        rows = json.loads(self.run("queue", "--format", "json").stdout)
        return next(row["state"] for row in rows if row["run_id"] == run_id)

    def queue_state(self, run_id: str) -> str:
        """The same, without the start of a process."""
        job = Queue(LocalFolders(self.home).database).job(run_id)
        return job.state if job else ""


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    shell = Shell(tmp_path / "project")
    yield shell
    end_processes_of(shell.home)


def interrupt_after(process: "subprocess.Popen[str]", line: str) -> tuple[str, str]:
    """Ctrl-C once ``line`` was printed; returns what came on both streams."""
    assert process.stdout
    seen = ""
    while line not in seen:
        printed = process.stdout.readline()
        assert printed, f"ended before it said {line}: {seen}"
        seen += printed
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=LIMIT_S)
    return seen + out, err


def test_attached_train_ends_with_the_runs_code(shell: Shell) -> None:
    shell.task(f"echo 'hello from the task'; {CERTIFY}")
    good = shell.run("train", "run.yaml", "-y", "--name", "good")
    assert (good.returncode, good.stdout) == (0, "[spotune] attempt 1\nhello from the task\n")
    assert "good: SUCCEEDED" in good.stderr
    shell.task("exit 1")
    bad = shell.run("train", "run.yaml", "-y", "--name", "bad")
    assert bad.returncode == 1
    assert "exited with code 1" in bad.stderr


def test_ctrl_c_detaches_from_a_job_and_cancel_stops_it(shell: Shell) -> None:
    shell.task(f"echo up; {WAIT}")
    out, err = interrupt_after(shell.start("train", "run.yaml", "-y", "--name", "run-a"), "up")
    assert "Traceback" not in out + err
    assert "spotune logs -f run-a" in err
    until(lambda: shell.queue_state("run-a") != "STARTING")  # the log may be quicker than the supervisor
    assert shell.state("run-a") == "RUNNING"
    cancelled = shell.run("cancel", "run-a", "-y")
    assert (cancelled.returncode, cancelled.stderr) == (0, "")
    assert shell.state("run-a") == "CANCELLED"


def test_ctrl_c_stops_a_dev_run(shell: Shell) -> None:
    shell.task(f"echo up; {WAIT}")
    process = shell.start("dev", "run", "run.yaml", "--name", "run-a")
    out, err = interrupt_after(process, "up")
    assert process.returncode == 130
    assert "Traceback" not in out + err
    assert shell.state("run-a") == "CANCELLED"
    assert named(shell.home, "bash", "sleep") == []
