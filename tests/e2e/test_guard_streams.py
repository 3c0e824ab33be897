"""A print decides nothing: the guard and its ranks with streams that are closed, full or narrow."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.script import FakeScript, fake_config, undisturbed_weights
from tests.waiting import ended

STREAMS = {
    "full": "> /dev/full 2> /dev/full",
    "closed": "<&- >&- 2>&-",
    "no reader": "2>&1 | true",
    "ascii": "| cat",
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_config(tmp_path_factory.mktemp("material"), max_steps=6)


@pytest.fixture(scope="module")
def weights(config: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return undisturbed_weights(config, tmp_path_factory.mktemp("undisturbed"))


def start(script: FakeScript, streams: str, *flags: str) -> "subprocess.Popen[bytes]":
    line = f'set -o pipefail; "$@" {STREAMS[streams]}'
    command = ["bash", "-c", line, "bash", sys.executable, "-m", "spotune.sft", str(script.config), *flags]
    env = {**os.environ, **script.environ, "PYTHONIOENCODING": "ascii" if streams == "ascii" else "utf-8"}
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("streams", STREAMS)
def test_a_run_ends_with_its_certificate(config: Path, weights: str, tmp_path: Path, streams: str) -> None:
    script = FakeScript(f"file://{tmp_path}/bucket", "quiet", config, tmp_path / "home")
    assert ended(start(script, streams)) == 0
    assert script.weights == weights
    assert ended(start(script, streams)) == 0  # certified already


@pytest.mark.parametrize("streams", STREAMS)
def test_a_run_that_fails_says_so_by_its_code_and_its_mark(config: Path, tmp_path: Path, streams: str) -> None:
    script = FakeScript(f"file://{tmp_path}/bucket", "fails", config, tmp_path / "home")
    script.tell("fault", '{"step": 3, "how": "failed"}')
    assert ended(start(script, streams)) == 1
    assert script.json(script.keys.failed)["exit_code"] == 1
    other = FakeScript(f"file://{tmp_path}/bucket", "bad", tmp_path / "ünknown.yaml", tmp_path / "home")
    assert ended(start(other, streams)) == 2
