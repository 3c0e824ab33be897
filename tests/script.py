"""The script itself, attempt after attempt, as tests start and watch it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from spotune.contracts.keys import Keys
from spotune.contracts.store import Store


class Script:
    """``python -m spotune.sft`` on one run, attempt after attempt."""

    def __init__(self, bucket: str, run_id: str, config: Path) -> None:
        self.store, self.keys, self.config = Store(bucket), Keys(run_id), config
        self.status = Path(os.environ["SPOTUNE_HOME"]) / f"{run_id}.json"
        self.status.parent.mkdir(parents=True, exist_ok=True)
        self.environ = {"SPOTUNE_BUCKET": bucket, "SPOTUNE_RUN_ID": run_id, "SPOTUNE_STATUS_FILE": str(self.status)}

    def start(self, *flags: str) -> "subprocess.Popen[str]":
        self.status.unlink(missing_ok=True)
        command = [sys.executable, "-m", "spotune.sft", str(self.config), *flags]
        with open(self.status.with_suffix(".log"), "a") as log:
            return subprocess.Popen(command, env={**os.environ, **self.environ}, stdout=log, stderr=log, text=True)

    def run(self, *flags: str) -> int:
        return self.start(*flags).wait(300)

    def wait_for_step(self, process: "subprocess.Popen[str]", step: int) -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            if self.status.exists() and json.loads(self.status.read_text())["step"] >= step:
                return
            time.sleep(0.02)
        raise AssertionError(f"step {step} was not reached: {self.log()[-2000:]}")

    def log(self) -> str:
        return self.status.with_suffix(".log").read_text()

    def json(self, key: str) -> Any:
        data = self.store.read(key)
        return None if data is None else json.loads(data)

    @property
    def weights(self) -> str:
        found: str = self.json(self.keys.completed)["weights_sha256"]
        return found

    @property
    def commits(self) -> list[str]:
        return [Path(key).stem for key in self.store.keys(self.keys.commits)]
