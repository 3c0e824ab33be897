"""A LoRA run that is merged and pushed after its certificate, and killed between any two steps of that."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from spotune.contracts.keys import Keys
from spotune.contracts.store import Store
from tests.fake_hub import TOKEN, Hub, fake_hub
from tests.processes import kill_tree
from tests.tiny import make_model, rows, write_jsonl

KEYS = Keys("extras")
REPO = "acme/orders"


class Script:
    """``python -m spotune.sft`` on the run in one bucket; ``log`` grows over attempts."""

    def __init__(self, folder: Path, config: Path) -> None:
        self.store, self.config, self.folder = Store(f"file://{folder}/bucket"), config, folder
        self.log_file = folder / "log"
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, *flags: str, **environ: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "spotune.sft", str(self.config), *flags]
        known = {"SPOTUNE_BUCKET": self.store.url, "SPOTUNE_RUN_ID": "extras", "SPOTUNE_HOME": f"{self.folder}/home"}
        with open(self.log_file, "ab") as log:
            return subprocess.Popen(command, env={**os.environ, **known, **environ}, stdout=log, stderr=log)

    def run(self, *flags: str, **environ: str) -> int:
        return self.start(*flags, **environ).wait(180)

    def kill_at(self, hold: str, *flags: str) -> None:
        """Kills the whole tree, without a notice, at one instant of the protocol."""
        held = self.folder / "held"
        held.unlink(missing_ok=True)
        process = self.start(*flags, SPOTUNE_HOLD_AT=hold, SPOTUNE_HOLD_FILE=str(held))
        deadline = time.monotonic() + 300
        while not held.exists():
            assert process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.05)
        kill_tree(psutil.Process(process.pid))
        process.wait()

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def json(self, key: str) -> Any:
        return json.loads(self.store.read(key) or b"null")

    def copy(self, folder: Path) -> "Script":
        shutil.copytree(self.folder / "bucket", folder / "bucket")
        return Script(folder, self.config)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with fake_hub() as made:
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")  # the fake hub has LFS alone
        yield made


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extras")
    make_model(folder / "model")
    write_jsonl(folder / "data" / "train.jsonl", rows(100))
    settings = {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "data"),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_length": 64,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_peft": True,
        "lora_r": 4,
        "merge_adapter": True,
        "push_to_hub": True,
        "hub_model_id": REPO,
        "hub_private_repo": True,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def killed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Script:
    """Trained and certified, and killed with the merged model on its disk alone: all extras are owed."""
    script = Script(tmp_path_factory.mktemp("killed"), config)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("HF_HUB_OFFLINE", "1"), ("OMP_NUM_THREADS", "1"), ("HF_HOME", f"{script.folder}/hf")):
            patch.setenv(name, value)
        script.kill_at("merged")
    return script


def test_all_is_done_in_the_attempt_that_trains(config: Path, tmp_path: Path, hub: Hub) -> None:
    script = Script(tmp_path / "run", config)
    assert script.run() == 0, script.log
    certificate, merged, pushed = (script.json(key) for key in (KEYS.completed, KEYS.merge_completed, KEYS.pushed))
    assert [record["attempt"] for record in (certificate, merged, pushed)] == [1, 1, 1]
    assert certificate["completed_at"] <= merged["completed_at"] <= pushed["at"]
    assert set(hub.main(REPO).files) == set(certificate["files"])
    card = yaml.safe_load(hub.main(REPO).files["README.md"].split(b"---")[1])
    assert "base_model" not in card  # a path of this machine is nothing that the hub takes
    assert hub.private[REPO]
    check_merged(script, config)
    assert script.run() == 0
    assert script.log.endswith("[spotune] extras is finished and certified already\n")


def check_merged(script: Script, config: Path) -> None:
    """The merged model in the bucket computes what the certified adapter on its base does."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    root = Path(script.store.url.removeprefix("file://"))
    base = AutoModelForCausalLM.from_pretrained(config.parent / "model", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(root / KEYS.merged, dtype=torch.float32).eval()
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        plain = base.eval()(tokens).logits
        wanted = PeftModel.from_pretrained(base, root / KEYS.output).eval()(tokens).logits
        found = merged(tokens).logits
    assert torch.allclose(found, wanted, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-2)


@pytest.fixture(scope="module")
def undisturbed(killed: Script, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The merged weights that every disturbed merge must end with."""
    script = killed.copy(tmp_path_factory.mktemp("undisturbed") / "run")
    assert script.run(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1") == 0
    assert "[spotune] push_to_hub is owed: the hub is offline here (HF_HUB_OFFLINE)" in script.log
    found: str = script.json(KEYS.merge_completed)["weights_sha256"]
    return found


@pytest.mark.parametrize("hold", ["merged", "merged-uploaded", "pushed"])
def test_killed_anywhere_the_next_attempt_does_what_is_owed(
    killed: Script, undisturbed: str, tmp_path: Path, hub: Hub, hold: str
) -> None:
    script = killed.copy(tmp_path / "run")
    before = script.store.read(KEYS.completed)
    assert before
    assert not script.store.exists(KEYS.merge_completed)
    script.kill_at(hold)
    assert script.store.exists(KEYS.merge_completed) == (hold == "pushed")
    assert script.run() == 0, script.log
    assert script.store.read(KEYS.completed) == before
    merged = script.json(KEYS.merge_completed)
    assert (merged["attempt"], merged["weights_sha256"]) == (2 if hold == "pushed" else 3, undisturbed)
    assert "loss" not in script.log  # nothing is trained again
    check_merged(script, killed.config)
    there = set(script.store.keys(KEYS.merged)) - {KEYS.merge_completed}
    assert there == {f"{KEYS.merged}/{name}" for name in merged["files"]}
    assert len(hub.main(REPO).commits) == 2
    assert script.json(KEYS.pushed)["oid"] == hub.main(REPO).commits[1]["oid"]


def test_a_machine_that_goes_meanwhile_leaves_a_certified_run(config: Path, tmp_path: Path, hub: Hub) -> None:
    script = Script(tmp_path / "run", config)
    hub.faults = {"create": ["hang"]}
    process = script.start("--merge_adapter", "false", SPOTUNE_GRACE_S="6")
    deadline = time.monotonic() + 300
    while not any("/repos/create" in asked for asked in hub.asked):
        assert time.monotonic() < deadline, script.log
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75, script.log
    assert script.store.exists(KEYS.completed)
    assert not script.store.exists(KEYS.failed)
    assert script.run() == 0, script.log
    assert script.json(KEYS.completed)["attempt"] == 1
    assert script.json(KEYS.pushed)["attempt"] == 2


def test_a_merge_that_fails_keeps_the_push_from_nothing(killed: Script, tmp_path: Path, hub: Hub, config: Path) -> None:
    script = killed.copy(tmp_path / "run")
    model = config.parent / "model"
    model.rename(config.parent / "elsewhere")
    try:
        assert script.run() == 0
    finally:
        (config.parent / "elsewhere").rename(model)
    assert "[spotune] merge_adapter is owed: " in script.log
    assert script.json(KEYS.pushed)["attempt"] == 2
    assert script.run() == 0, script.log
    assert script.json(KEYS.merge_completed)["attempt"] == 3
    assert sum("/commit/" in asked for asked in hub.asked) == 1


def test_a_push_that_fails_is_made_up_for(killed: Script, tmp_path: Path, hub: Hub) -> None:
    script = killed.copy(tmp_path / "run")
    hub.faults = {"commit": [403]}
    assert script.run() == 0
    assert "[spotune] push_to_hub is owed: the hub refuses it, HTTP 403" in script.log
    assert script.json(KEYS.merge_completed)["attempt"] == 2
    assert script.run() == 0, script.log
    assert script.json(KEYS.pushed)["attempt"] == 3
