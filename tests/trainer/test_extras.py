"""Merge and push after the certificate, for real. What the guard makes of them: tests/e2e/test_extras.py."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from spotune.core.protocol import EXTRAS, OUTPUT, PUSH, Answer, ExtraJob, write_json
from spotune.guard.extras import TIMEOUT_S, run_extra
from spotune.launch.local.machine import send
from tests.clocks import Clock
from tests.fake_hub import TOKEN, Hub, fake_hub
from tests.script import Script
from tests.tiny import make_model, rows, write_jsonl
from tests.waiting import ended, until

REPO = "acme/orders"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with fake_hub() as made:
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")  # the fake hub has LFS alone
        yield made


@pytest.fixture
def config(tmp_path: Path) -> Path:
    folder = tmp_path / "material"
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


@pytest.mark.slow
def test_a_trained_adapter_is_merged_and_pushed_once_over_three_attempts(
    config: Path, tmp_path: Path, hub: Hub
) -> None:
    """One is killed while it uploads the merged model, one before it can mark its push."""
    script = Script(f"file://{tmp_path}/bucket", "extras", config)
    keys = script.keys
    kill_at(script, "merged-uploaded")
    half = {key: script.store.read(key) for key in script.store.keys(keys.merged)}
    assert half
    kill_at(script, "pushed")
    certificate, merged = script.json(keys.completed), script.json(keys.merge_completed)
    assert script.json(keys.pushed) is None
    assert [record["attempt"] for record in (certificate, merged)] == [1, 2]
    assert {key: script.store.read(key) for key in half} == half  # a second merge gives the same bytes
    assert set(hub.main(REPO).files) == set(certificate["files"])
    card = yaml.safe_load(hub.main(REPO).files["README.md"].split(b"---")[1])
    assert "base_model" not in card  # a path of this machine is nothing that the hub takes
    assert hub.private[REPO]
    check_merged(script)
    assert script.run() == 0, script.log()
    pushed = script.json(keys.pushed)
    assert pushed["attempt"] == 3
    assert certificate["completed_at"] <= merged["completed_at"] <= pushed["at"]
    assert len(hub.main(REPO).commits) == 2
    assert pushed["oid"] == hub.main(REPO).commits[1]["oid"]
    assert not [*script.events(2, "step"), *script.events(3, "step")]  # nothing is trained again


def kill_at(script: Script, failpoint: str) -> None:
    process = script.start(stop_at=failpoint)
    script.wait_at(process, failpoint)
    process.kill()
    ended(process)


def check_merged(script: Script) -> None:
    """The merged model in the bucket computes what the certified adapter on its base does."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    root = Path(script.store.url.removeprefix("file://"))
    base = AutoModelForCausalLM.from_pretrained(script.config.parent / "model", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(root / script.keys.merged, dtype=torch.float32).eval()
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        plain = base.eval()(tokens).logits
        wanted = PeftModel.from_pretrained(base, root / script.keys.output).eval()(tokens).logits
        found = merged(tokens).logits
    assert torch.allclose(found, wanted, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An attempt's folder with a result to push."""
    (tmp_path / OUTPUT).mkdir()
    write_json(tmp_path / EXTRAS, ExtraJob("a-run", 1, "", {}))
    return tmp_path


@pytest.fixture
def children() -> Callable[[], set[psutil.Process]]:
    """Looks for the processes that this test has started."""
    others = set(psutil.Process().children())
    return lambda: set(psutil.Process().children()) - others


def test_a_push_that_hangs_is_ended_after_an_hour(
    folder: Path, hub: Hub, children: Callable[[], set[psutil.Process]]
) -> None:
    hub.faults, clock = {"create": ["hang"]}, Clock(1000.0)

    def wait(seconds: float) -> None:
        until(lambda: hub.asked)
        clock.advance(60)

    answer = run_extra(PUSH, folder, {}, os.environ, wait, clock=clock)
    assert answer == Answer(False, f"not done after {TIMEOUT_S:.0f} s")
    assert not children()


def test_a_push_that_vanishes_is_an_answer(folder: Path, hub: Hub, children: Callable[[], set[psutil.Process]]) -> None:
    hub.faults = {"create": ["hang"]}

    def kill_when_asked(seconds: float) -> None:
        until(lambda: hub.asked)
        send(children(), signal.SIGKILL)

    answer = run_extra(PUSH, folder, {}, os.environ, kill_when_asked)
    assert answer == Answer(False, "its process was killed by SIGKILL without a word")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "the hub is offline here (HF_HUB_OFFLINE)"),
        ({"HF_TOKEN": "hf_wrong"}, "the hub refuses it, HTTP 401 (--secret HF_TOKEN"),
    ],
)
def test_what_the_hub_says_is_the_answer(folder: Path, hub: Hub, environ: dict[str, str], message: str) -> None:
    answer = run_extra(PUSH, folder, {}, {**os.environ, **environ}, time.sleep)
    assert not answer.done
    assert answer.message.startswith(message)
