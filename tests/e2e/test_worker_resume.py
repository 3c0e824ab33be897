"""Kill a rank anywhere and resume from what was staged: the end is the same, bit for bit."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests import tiny
from tests.ranks import (
    Nursery,
    events,
    free_port,
    kill,
    make_folder,
    nursery,
    rank_environment,
    restore,
    wait_for,
    weights,
)

from spotune.contracts.exchange import CONTROL, TRAINER, outcome_path, staged_path, write_json


@pytest.fixture(scope="module")
def ranks() -> Iterator[Nursery]:
    with nursery() as made:
        yield made


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("base")
    tiny.make_model(folder / "model", dropout=0.1)
    tiny.write_jsonl(folder / "train.jsonl", tiny.rows(72))
    return {
        "model_name_or_path": str(folder / "model"),
        "data": [{"source": str(folder / "train.jsonl"), "split": 8}],
        "packing": True,
        "max_length": 48,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "learning_rate": 2e-3,
        "logging_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "dataloader_num_workers": 1,
        "bf16": False,
    }


def hand_over(killed: Path, folder: Path, config: dict[str, Any], step: int, **job: Any) -> Path:
    """A new machine: only the staged checkpoint comes along."""
    make_folder(folder, config, attempt=2, **job)
    staged = wait_for(staged_path(killed, step), killed)
    checkpoint = folder / TRAINER / f"checkpoint-{step}"
    shutil.copytree(staged["checkpoint"], checkpoint)
    best = folder / TRAINER / f"checkpoint-{staged['best_step']}" if staged["best_step"] else None
    if best and best != checkpoint:
        shutil.copytree(killed / TRAINER / best.name, best)
    restore(folder, checkpoint, staged["tokens"], best)
    return folder


def logs_of(*folders: Path) -> dict[tuple[int, bool], dict[str, Any]]:
    """The log lines of a run by step, those of its last attempt; without what depends on the clock."""
    found = {}
    for folder in folders:
        for line in events(folder, "log"):
            if "train_runtime" not in line:
                timeless = {
                    key: value for key, value in line.items() if "per_second" not in key and "runtime" not in key
                }
                timeless.pop("t")
                found[(line["step"], "eval_loss" in line)] = timeless
    return found


def test_killed_after_a_checkpoint(ranks: Nursery, base: dict[str, Any], tmp_path: Path) -> None:
    whole = make_folder(tmp_path / "whole", base, save_steps=4)
    last = ranks.run(whole)[0]
    assert last["how"] == "completed"

    killed = make_folder(tmp_path / "killed", base, save_steps=4)
    pid = ranks.start(killed)
    wait_for(staged_path(killed, 4), killed)
    kill(pid)
    resumed = hand_over(killed, tmp_path / "resumed", base, 4, save_steps=4)
    assert ranks.run(resumed)[0]["how"] == "completed"
    assert weights(resumed) == weights(whole)
    assert logs_of(killed, resumed) == logs_of(whole)
    assert [event["step"] for event in events(resumed, "step")] == list(range(5, last["step"] + 1))
    assert events(resumed, "step")[-1]["tokens"] == events(whole, "step")[-1]["tokens"]
