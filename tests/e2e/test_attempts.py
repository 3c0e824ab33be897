"""Attempts of real training, killed and resumed through the script itself."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from drill.machine import command_of
from tests.script import Script
from tests.tiny import make_model, rows, write_jsonl

STEPS = 24


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with dropout, data, and a config that saves often; made once."""
    folder = tmp_path_factory.mktemp("material")
    make_model(folder / "model", dropout=0.1)
    write_jsonl(folder / "data" / "train.jsonl", rows(400))
    config = {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "data"),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 12,  # a step takes long enough to be hit
        "learning_rate": 1e-3,
        "packing": True,
        "max_length": 64,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 4,
        "save_steps": 6,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def undisturbed(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The weights that every disturbed run must end with."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("undisturbed")
        patch.setenv("SPOTUNE_HOME", str(home))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        script = Script(f"file://{home}/bucket", "undisturbed", material / "run.yaml")
        assert script.run() == 0, script.log()
        yield script.weights


@pytest.fixture
def script(bucket: str, material: Path) -> Script:
    return Script(bucket, "killed", material / "run.yaml")


@pytest.fixture
def local_script(material: Path, tmp_path: Path) -> Callable[[str], Script]:
    return lambda run_id: Script(f"file://{tmp_path}/bucket", run_id, material / "run.yaml")


def test_killed_and_noticed_it_ends_as_if_undisturbed(script: Script, undisturbed: str) -> None:
    first = script.start()
    script.wait_for_step(first, 8)
    first.kill()  # no notice: the guard is gone, its worker must not outlive it
    first.wait()
    second = script.start()
    script.wait_for_step(second, 13)
    second.send_signal(signal.SIGTERM)
    second.send_signal(signal.SIGTERM)  # preemption signals more than once
    assert second.wait(300) == 75, script.log()
    noticed = script.json(script.keys.progress)
    assert noticed["phase"] == "preempted"
    assert f"0002-{noticed['step']:08d}" in script.commits  # saved at the step's end, nothing to repeat
    assert script.run() == 0, script.log()
    assert script.weights == undisturbed
    certificate = script.json(script.keys.completed)
    assert (certificate["attempt"], certificate["step"]) == (3, STEPS)
    assert script.run() == 0  # certified already
    assert len(script.store.folders(script.keys.attempts)) == 3
    assert "torch" not in script.log().partition("is finished and certified")[2]


def test_a_damaged_checkpoint_is_passed_over(
    local_script: Callable[[str], Script], undisturbed: str, tmp_path: Path
) -> None:
    script = local_script("damaged")
    first = script.start()
    script.wait_for_step(first, 14)
    first.send_signal(signal.SIGTERM)
    assert first.wait(300) == 75
    newest = max(script.commits)
    step, attempt = int(newest[5:]), int(newest[:4])
    victim = tmp_path / "bucket" / script.keys.checkpoint(step, attempt) / "optimizer.pt"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(bytes(data))
    assert script.run() == 0, script.log()
    assert f"checkpoint rejected: step {step} of attempt 1: optimizer.pt" in script.log()
    assert script.weights == undisturbed


def test_a_zombie_is_fenced_off(local_script: Callable[[str], Script], undisturbed: str) -> None:
    script = local_script("zombie")
    zombie = script.start()
    script.wait_for_step(zombie, 8)
    zombie.send_signal(signal.SIGSTOP)  # cut off, not dead: its worker goes on, and another machine is given the run
    before = set(script.commits)
    script.environ["SPOTUNE_HOME"] = os.environ["SPOTUNE_HOME"] + "-other"  # another machine
    assert script.run() == 0, script.log()
    zombie.send_signal(signal.SIGCONT)
    assert zombie.wait(300) == 75
    assert "fenced off" in script.log()
    assert {name for name in script.commits if name.startswith("0001")} <= before
    assert script.weights == undisturbed


def test_two_faults_in_a_row_are_the_last(local_script: Callable[[str], Script]) -> None:
    script = local_script("faulty")
    script.environ["SPOTUNE_SAVE_EVERY"] = "1000"  # so that nothing is committed
    for expected in (75, 1):
        process = script.start()
        script.wait_for_step(process, 1)
        (worker,) = (
            child for child in psutil.Process(process.pid).children() if "spotune.sft.worker" in command_of(child)
        )
        worker.kill()
        assert process.wait(300) == expected, script.log()
    mark = script.json(script.keys.failed)
    assert mark["exit_code"] == 1
    assert "SIGKILL" in mark["reason"]
    assert script.run() == 1  # until `resume`
    assert len(script.store.folders(script.keys.attempts)) == 2


def _two_nodes(script: Script, home: Path) -> "list[subprocess.Popen[str]]":
    """The guards of a two-machine job, both on this one: each with a home of its own."""
    started = []
    for node in (0, 1):
        places = {
            "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NODE_RANK": str(node),
            "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1",
        }
        script.environ |= {**places, "SPOTUNE_HOME": f"{home}/node-{node}", "SPOTUNE_STATUS_FILE": ""}
        if node == 0:
            script.environ["SPOTUNE_STATUS_FILE"] = str(script.status)
        started.append(script.start())
    return started


def test_two_machines_are_one_attempt(local_script: Callable[[str], Script], tmp_path: Path) -> None:
    script = local_script("pair")
    first, second = _two_nodes(script, tmp_path)
    script.wait_for_step(first, 8)
    second.send_signal(signal.SIGTERM)  # a notice to one machine of two ends in one commit by both
    assert (first.wait(300), second.wait(300)) == (75, 75), script.log()
    step = script.json(script.keys.progress)["step"]
    commit = script.json(script.keys.commit(1, step))
    assert commit["world_size"] == 2
    assert {"rng_state_0.pth", "rng_state_1.pth", "spotune.json", "spotune_1.json"} <= commit["files"].keys()
    assert [node.wait(300) for node in _two_nodes(script, tmp_path)] == [0, 0], script.log()
    other = local_script("pair-undisturbed")
    assert [node.wait(300) for node in _two_nodes(other, tmp_path)] == [0, 0], other.log()
    assert script.weights == other.weights
