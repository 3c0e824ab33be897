"""A bucket that goes away or misbehaves while a run trains, and a local disk that is full: nothing is lost."""

import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.conftest import reach
from tests.faultproxy import FaultProxy, Plan
from tests.script import Script
from tests.tiny import make_model, rows, write_jsonl

STEPS = 60


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    make_model(folder / "model", dropout=0.1)
    write_jsonl(folder / "data" / "train.jsonl", rows(400))
    config = {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "data"),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 12,
        "packing": True,
        "max_length": 64,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_steps": 3,
    }
    (folder / "full.yaml").write_text(yaml.safe_dump(config))
    # Small files: what a request may take before it is given up grows with them.
    config |= {"use_peft": True, "lora_r": 4, "lora_dropout": 0.1, "lora_target_modules": ["all-linear"]}
    (folder / "lora.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def undisturbed(material: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The weights of each config without any fault."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("undisturbed")
        for name, value in {"SPOTUNE_HOME": str(home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}.items():
            patch.setenv(name, value)
        for name in ("lora", "full"):
            script = Script(f"file://{home}/bucket", name, material / f"{name}.yaml")
            assert script.run() == 0, script.log()
            found[name] = script.weights
    return found


@pytest.fixture
def proxy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    reach("s3", request, monkeypatch)
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as made:
        monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
        yield made


@pytest.fixture
def script(proxy: FaultProxy, material: Path, tmp_path: Path) -> Script:
    return Script(f"s3://spotune/{tmp_path.name}-{time.time_ns()}", "away", material / "lora.yaml")


def wait_for_text(script: Script, text: str, process: "subprocess.Popen[str]", seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while text not in script.log():
        assert process.poll() is None, script.log()
        assert time.monotonic() < deadline, script.log()
        time.sleep(0.05)


def test_training_goes_on_without_the_bucket(proxy: FaultProxy, script: Script, undisturbed: dict[str, str]) -> None:
    script.environ["SPOTUNE_BUCKET_PATIENCE"] = "24s"  # one request holds out for a quarter of it
    process = script.start()
    script.wait_for_step(process, 4)
    proxy.away = True
    wait_for_text(script, "is not committed yet", process)
    proxy.away = False
    assert process.wait(300) == 0, script.log()
    assert script.weights == undisturbed["lora"]


def test_a_bucket_that_stays_away_ends_the_run_and_loses_nothing(
    proxy: FaultProxy, script: Script, undisturbed: dict[str, str]
) -> None:
    script.environ["SPOTUNE_BUCKET_PATIENCE"] = "2s"
    process = script.start()
    script.wait_for_step(process, 6)
    proxy.away = True
    assert process.wait(300) == 75, script.log()
    line = next(line for line in script.log().splitlines() if "the last good step in the bucket is" in line)
    last, stranded = map(int, re.findall(r"in the bucket is (\d+); step (\d+) is on this machine's disk", line)[0])
    assert last < stranded < STEPS
    proxy.away = False
    assert f"{max(script.commits)[5:]}" == f"{last:08d}"
    assert script.run() == 0, script.log()
    assert f"step {stranded} was still on this machine's disk, and is committed now" in script.log()
    assert f"resumed from the checkpoint of step {stranded}, attempt 2" in script.log()
    assert script.weights == undisturbed["lora"]


def test_a_bucket_with_every_fault(proxy: FaultProxy, script: Script, undisturbed: dict[str, str]) -> None:
    faults = {"error": 0.05, "reset": 0.05, "lost": 0.03, "truncate": 0.03, "flip": 0.02, "delay": 0.05, "delay_s": 0.3}
    at_the_door, inside = Plan(**faults), Plan(**faults, expired=0.03)  # credentials that never worked are bad input

    def start() -> "subprocess.Popen[str]":
        proxy.plan = at_the_door
        process = script.start()
        script.wait_for_step(process, 1)
        proxy.plan = inside
        return process

    first = start()
    script.wait_for_step(first, 9)
    first.kill()
    first.wait()
    second = start()
    script.wait_for_step(second, 20)
    second.send_signal(signal.SIGTERM)
    assert second.wait(300) == 75, script.log()
    assert start().wait(300) == 0, script.log()
    proxy.plan = Plan()
    assert script.weights == undisturbed["lora"]
    assert {"error", "reset", "lost"} <= {name for name, count in proxy.dealt.items() if count}, proxy.dealt


def test_a_full_local_disk_costs_checkpoints_not_the_run(
    material: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    """No file may become as large as the optimizer's: what a full disk says, to the one file that does not fit."""
    script = Script(f"file://{tmp_path}/bucket", "full", material / "full.yaml")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    weights = (material / "model" / "model.safetensors").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(weights * 1.2), before[1]))  # the optimizer's has twice as much
    try:
        process = script.start()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert process.wait(300) == 0, script.log()
    assert "step 3 is not saved: [Errno 27] File too large" in script.log()
    assert script.commits == []
    assert script.weights == undisturbed["full"]
