"""The script itself, attempt after attempt, as tests start and watch it: with real training, or with a fake worker."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from drill.machine import command_of
from spotune.core.environment import FAILPOINT_DIR, FAILPOINTS, GRACE_S, STATUS_FILE, WORKER
from spotune.core.keys import Keys
from spotune.core.protocol import CONTROL, read_json
from spotune.core.store import Store
from tests.waiting import LIMIT_S, ended, until

FAKE_WORKER = Path(__file__).with_name("fake_worker.py")
_started: "list[subprocess.Popen[str]]" = []


def end_attempts() -> None:
    """Kills the attempts that a failed test has left; their workers die with them."""
    while _started:
        process = _started.pop()
        process.kill()
        process.wait()


class Script:
    """``python -m spotune.sft`` on one run, attempt after attempt; all of them write one log.

    Args:
        bucket: its URL.
        config: the config file.
        home: SPOTUNE_HOME of the machine; default that of the test.

    Attributes:
        entry: what Python is to run.
    """

    def __init__(self, bucket: str, run_id: str, config: Path, home: Path | None = None) -> None:
        self.store, self.keys, self.config = Store(bucket), Keys(run_id), config
        self.home = home or Path(os.environ["SPOTUNE_HOME"])
        self.status = self.home / f"{run_id}.json"
        self.log_file = self.home / f"{run_id}.log"
        self.failpoints = self.home / "failpoints"
        self.home.mkdir(parents=True, exist_ok=True)
        self.entry = ["-m", "spotune.sft"]
        self.environ = {
            "SPOTUNE_BUCKET": bucket,
            "SPOTUNE_RUN_ID": run_id,
            "SPOTUNE_HOME": str(self.home),
            STATUS_FILE: str(self.status),
            GRACE_S: str(2 * LIMIT_S),  # so that no decision depends on how quick this machine is
        }

    def start(self, *flags: str, stop_at: str = "", **environ: str) -> "subprocess.Popen[str]":
        """Starts an attempt. ``stop_at``: failpoints, see ``spotune.core.io``."""
        self.status.unlink(missing_ok=True)
        self.failpoints.mkdir(exist_ok=True)
        for file in self.failpoints.iterdir():
            file.unlink()
        held = {FAILPOINTS: stop_at, FAILPOINT_DIR: str(self.failpoints)} if stop_at else {}
        command = [sys.executable, *self.entry, str(self.config), *flags]
        with open(self.log_file, "a") as log:
            known = {**os.environ, **self.environ, **held, **environ}
            process = subprocess.Popen(command, env=known, stdout=log, stderr=log, text=True)
        _started.append(process)
        return process

    def run(self, *flags: str, **environ: str) -> int:
        """One attempt to its end; returns its exit code."""
        return ended(self.start(*flags, **environ))

    def until(self, look: Callable[[], Any], process: "subprocess.Popen[str]") -> Any:
        """Waits while the attempt runs; an attempt that has ended is looked at once more."""

        def seen() -> Any:
            is_over = process.poll() is not None
            found = look()
            assert found or not is_over, f"ended with {process.returncode}: {self.log()[-3000:]}"
            return found

        return until(seen, lambda: self.log()[-3000:])

    def wait_for_step(self, process: "subprocess.Popen[str]", step: int) -> None:
        self.until(lambda: (self.seen().get("step") or 0) >= step, process)

    def wait_for_text(self, process: "subprocess.Popen[str]", text: str) -> None:
        self.until(lambda: text in self.log(), process)

    def wait_at(self, process: "subprocess.Popen[str]", failpoint: str) -> None:
        """Returns once the attempt stands at the failpoint; ``pass_on`` lets it go."""
        self.until((self.failpoints / failpoint).exists, process)

    def pass_on(self, failpoint: str) -> None:
        (self.failpoints / failpoint).unlink()

    def seen(self) -> dict[str, Any]:
        """What the attempt has told its machine so far: step, phase and more."""
        found: dict[str, Any] = json.loads(self.status.read_text()) if self.status.exists() else {}
        return found

    def notify(self, process: "subprocess.Popen[str]", number: signal.Signals = signal.SIGTERM) -> None:
        """Gives the machine a notice; returns once the guard has understood it."""
        notices = self.log().count(f"[spotune] {number.name}: ")
        process.send_signal(number)
        self.until(lambda: self.log().count(f"[spotune] {number.name}: ") > notices, process)

    def wait_until_told_to_stop(self, process: "subprocess.Popen[str]") -> None:
        """Returns once the guard has asked its ranks to stop: the next step that they take is the last."""

        def told() -> bool:
            attempts = sorted((self.home / "work" / self.keys.run_id / "node-0").glob("[0-9]*"))
            asked = read_json(attempts[-1] / CONTROL) if attempts else None
            return bool(asked and asked["stop"])

        self.until(told, process)

    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""

    def json(self, key: str) -> Any:
        data = self.store.read(key)
        return None if data is None else json.loads(data)

    def events(self, attempt: int, kind: str = "") -> list[dict[str, Any]]:
        """The events of an attempt in the bucket, in order."""
        parts = [key for key in self.store.keys(self.keys.attempts) if f"/{attempt:04d}/events-0-" in key]
        parts.sort(key=lambda key: int(key.rpartition("-")[2].partition(".")[0]))
        lines = [json.loads(line) for key in parts for line in (self.store.read(key) or b"").splitlines()]
        return [line for line in lines if not kind or line["event"] == kind]

    @property
    def weights(self) -> str:
        found: str = self.json(self.keys.completed)["weights_sha256"]
        return found

    @property
    def commits(self) -> list[str]:
        return [Path(key).stem for key in self.store.keys(self.keys.commits)]

    @property
    def attempts(self) -> int:
        return len(self.store.folders(self.keys.attempts))


class FakeWorkers:
    """What a test tells the fake workers of a run, by files in the folder ``told``."""

    told: Path

    @property
    def worker_environ(self) -> dict[str, str]:
        """Has a guard start tests/fake_worker.py in place of real training."""
        self.told.mkdir(parents=True, exist_ok=True)
        return {WORKER: shlex.quote(str(FAKE_WORKER)), "FAKE_WORKER_DIR": str(self.told)}

    def tell(self, name: str, text: str = "") -> None:
        """Writes a file for the worker, whole."""
        part = self.told / f".{name}"
        part.write_text(text)
        part.rename(self.told / name)

    def allow(self, step: int) -> None:
        """The worker may take steps up to this one, and waits before the next."""
        self.tell("steps", str(step))

    def allow_all(self) -> None:
        """The worker may load, and take every step."""
        for name in ("load", "steps"):
            (self.told / name).unlink(missing_ok=True)


class FakeScript(FakeWorkers, Script):
    """The script with tests/fake_worker.py for training: the guard is real, and the test releases each step."""

    def __init__(self, bucket: str, run_id: str, config: Path, home: Path | None = None) -> None:
        super().__init__(bucket, run_id, config, home)
        self.told = self.home / "told"
        self.environ |= self.worker_environ

    def allow_and_commit(self, process: "subprocess.Popen[str]", step: int) -> None:
        """Lets an attempt take steps up to one that it saves; returns once that is committed.

        Of two checkpoints that wait the guard uploads the newer one only: who wants both asks for them one by one.
        """
        self.allow(step)
        self.until(lambda: (self.seen().get("committed_step") or 0) >= step, process)

    def start_and_stop_after(self, step: int, *flags: str, **environ: str) -> "subprocess.Popen[str]":
        """An attempt that has taken ``step`` steps of the run, and waits before the next one."""
        self.allow(step)
        process = self.start(*flags, **environ)
        self.wait_for_step(process, step)
        return process

    def notify_and_release(self, process: "subprocess.Popen[str]") -> int:
        """A notice in the middle of a step, which is then let go; returns the exit code."""
        self.notify(process)
        self.wait_until_told_to_stop(process)
        self.allow_all()
        return ended(process)

    def workers(self, process: "subprocess.Popen[str]") -> list[psutil.Process]:
        """The ranks of an attempt."""
        children = psutil.Process(process.pid).children()
        return [child for child in children if FAKE_WORKER.name in command_of(child)]


def fake_config(folder: Path, **changes: Any) -> Path:
    """Writes a base model, data and ``run.yaml`` for the fake worker; returns the config's path."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "model" / "model.safetensors").write_bytes(b"base")
    (folder / "data.jsonl").write_text("".join(f'{{"text": "row {number}"}}\n' for number in range(50)))
    config = {
        "model_name_or_path": str(folder / "model"),
        "data": [{"source": str(folder / "data.jsonl")}],
        "max_steps": 24,
        "learning_rate": 1e-3,
        "save_steps": 6,
        "logging_steps": 4,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump({**config, **changes}))
    return folder / "run.yaml"


def undisturbed_weights(config: Path, home: Path) -> str:
    """The weights of a run with the fake worker to which nothing happens."""
    script = FakeScript(f"file://{home}/bucket", "undisturbed", config, home)
    assert script.run() == 0, script.log()
    return script.weights
