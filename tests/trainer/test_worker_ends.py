"""However a rank ends, it says how: bad input in one line, stopped, failed; and it dies with its guard."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from spotune.core.protocol import CONTROL, RESTORED, Outcome, outcome_path, write_json
from tests import tiny
from tests.ranks import Nursery, events, make_folder, restore
from tests.waiting import until


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ends")
    tiny.make_model(folder / "model")
    tiny.make_model(folder / "mute", chat_template=None)
    tiny.make_model(folder / "unmarked", chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    tiny.write_jsonl(folder / "train.jsonl", tiny.rows(16))
    tiny.write_jsonl(folder / "bad.jsonl", [*tiny.rows(3), {"messages": []}])
    source = {"source": str(folder / "train.jsonl")}
    return {
        "model_name_or_path": str(folder / "model"),
        "data": [source],
        "max_steps": 2,
        "bf16": False,
        "max_length": 64,
    }


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "malformed row": ({"data": [{"source": "FOLDER/bad.jsonl"}]}, "bad.jsonl: row 4: messages is empty (each row {"),
    "no chat template": ({"model_name_or_path": "FOLDER/mute"}, "model_name_or_path: the model has no chat template"),
    "no generation marks": ({"model_name_or_path": "FOLDER/unmarked", "assistant_only_loss": True}, "config.yaml: "),
    "packing without a length": ({"packing": True, "max_length": None}, "`max_length` can't be `None`"),
    "no such module": ({"use_peft": True, "lora_target_modules": ["nope"]}, "Target modules nope not found"),
    "no such token": ({"eos_token": "<|nope|>"}, "'<|nope|>') is not found"),
    "steps do not match": (
        {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "epoch"},
        "there are no held-out rows",
    ),
    "no GPU": ({"bf16": None}, "bf16: needs a GPU, and this machine has none (it is TRL's default)"),
    "no such split": (
        {"data": None, "dataset_name": "FOLDER", "dataset_train_split": "tarin"},
        "dataset_train_split: ",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(ranks: Nursery, base: dict[str, Any], tmp_path: Path, name: str) -> None:
    changes, expected = BAD[name]
    home = str(Path(base["model_name_or_path"]).parent)
    placed = {key: json.loads(json.dumps(value).replace("FOLDER", home)) for key, value in changes.items()}
    folder = make_folder(tmp_path / "folder", base | placed)
    (outcome,) = ranks.run(folder)
    assert outcome["how"] == "bad_input", outcome
    assert expected in outcome["message"]
    assert "\n" not in outcome["message"]


def test_stopped_before_training(ranks: Nursery, base: dict[str, Any], tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "folder", base)
    write_json(folder / CONTROL, {"stop": True, "save": 0})
    assert ranks.run(folder) == [asdict(Outcome("stopped"))]
    refused = make_folder(tmp_path / "refused", base)
    write_json(
        refused / RESTORED, {"checkpoint": None, "tokens": 0, "error": "no commit verifies", "best_checkpoint": None}
    )
    assert ranks.run(refused)[0]["how"] == "stopped"


def test_a_checkpoint_that_is_not_whole_fails(ranks: Nursery, base: dict[str, Any], tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "folder", base)
    checkpoint = folder / "trainer" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    restore(folder, checkpoint)
    (outcome,) = ranks.run(folder)
    assert outcome["how"] == "failed"
    assert "checkpoint-1: not a whole checkpoint, optimizer.pt, scheduler.pt is missing" in outcome["message"]


def test_asked_saves_and_phases(ranks: Nursery, base: dict[str, Any], tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "folder", base | {"logging_steps": 1})
    write_json(folder / CONTROL, {"stop": False, "save": 1})
    assert ranks.run(folder)[0]["how"] == "completed"
    assert [event["step"] for event in events(folder, "save")] == [1, 2]  # asked for; the last step
    expected = ["load", "train", "save", "train", "save", "train", "teardown"]
    assert [event["phase"] for event in events(folder, "phase")] == expected
    (plan,) = events(folder, "plan")
    assert (plan["max_steps"], plan["trainable_parameters"]) == (2, plan["total_parameters"])
    assert {"loss", "learning_rate", "step", "epoch"} <= set(events(folder, "log")[0])


GUARD = """
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-m", "spotune.sft.worker", sys.argv[1]])
print(worker.pid, flush=True)
worker.wait()
"""


@pytest.mark.slow
def test_deaf_to_signals_and_dead_with_its_guard(base: dict[str, Any], tmp_path: Path) -> None:
    # More rows than it trains on, one a step: a loader that has delivered its whole epoch may die unnoticed.
    tiny.write_jsonl(tmp_path / "train.jsonl", tiny.rows(2000))
    config = base | {"data": [{"source": str(tmp_path / "train.jsonl")}], "per_device_train_batch_size": 1}
    config |= {"max_steps": 100_000, "num_train_epochs": 1e6, "dataloader_num_workers": 1}
    folder = make_folder(tmp_path / "folder", config)
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    guard = subprocess.Popen(
        [sys.executable, "-c", GUARD, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environ
    )
    assert guard.stdout
    rank = int(guard.stdout.readline())
    try:
        until(lambda: is_deaf(rank))  # from its first lines on, long before it has imported all
        os.kill(rank, signal.SIGTERM)
        wait_for_step(folder, 3)
        assert children(rank)
        for process in (rank, *children(rank)):
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGURG):
                with suppress(ProcessLookupError):
                    os.kill(process, number)
        wait_for_step(folder, last_step(folder) + 20)
        assert not outcome_path(folder, 0).exists()
    finally:
        guard.kill()
        guard.communicate()
    until(lambda: not is_running(rank))


def is_deaf(pid: int) -> bool:
    """Whether it ignores SIGTERM, as /proc says it."""
    (ignored,) = re.findall(r"^SigIgn:\s*([0-9a-f]+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(ignored, 16) >> (signal.SIGTERM - 1) & 1)


def wait_for_step(folder: Path, step: int) -> None:
    until(lambda: last_step(folder) >= step or outcome_path(folder, 0).exists())
    assert last_step(folder) >= step, outcome_path(folder, 0).read_text()


def last_step(folder: Path) -> int:
    """The newest whole line's step; the log is being written."""
    log = folder / "events-0.jsonl"
    steps = re.findall(r'"step", "step": (\d+), .*}\n', log.read_text()) if log.exists() else []
    return int(steps[-1]) if steps else 0


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # gone before it is opened, or before it is read
        return False
