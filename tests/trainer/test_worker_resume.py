"""Kill a rank anywhere and resume from what was staged: the end is the same, bit for bit."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from spotune.core.protocol import CONTROL, OUTPUT, TRAINER, Outcome, outcome_path, read_json, staged_path, write_json
from tests import tiny
from tests.ranks import (
    Nursery,
    events,
    free_port,
    kill,
    let_go,
    make_folder,
    rank_environment,
    restore,
    wait_for,
    wait_until_held,
    weights,
)


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
    assert events(whole, "predicted")[0]["step"] == 2  # a sign of life of the first evaluation

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


def stop(folder: Path, save: int = 0) -> None:
    write_json(folder / CONTROL, {"stop": True, "save": save})


def stop_and_resume(ranks: Nursery, config: dict[str, Any], place: Path, after: str, **job: Any) -> tuple[Path, Path]:
    """Stops a run when an event of this kind is seen, resumes it elsewhere; returns both folders."""
    stopped = make_folder(place / "stopped", config, **job)
    ranks.start(stopped, hold=after)
    wait_until_held(stopped)
    stop(stopped)
    let_go(stopped)
    outcome = wait_for(outcome_path(stopped, 0), stopped)
    assert outcome["how"] == "stopped", outcome
    resumed = hand_over(stopped, place / "resumed", config, outcome["step"], **job)
    assert ranks.run(resumed)[0]["how"] == "completed"
    return stopped, resumed


# The highest loss is an early one: so the best model is one of before the stop.
BEST = {"load_best_model_at_end": True, "save_steps": 2, "metric_for_best_model": "loss", "greater_is_better": True}


@pytest.mark.parametrize(
    ("name", "changes", "after"),
    [
        ("on a step", {}, '"step", "step": 3'),
        ("in an evaluation", {"per_device_eval_batch_size": 1}, '"phase": "eval"'),
        ("epoch strategies", {"eval_strategy": "epoch", "logging_strategy": "epoch"}, '"step", "step": 7'),
        ("best model", BEST, '"step", "step": 7'),
    ],
    ids=lambda value: value if isinstance(value, str) and '"' not in value else "",
)
def test_stopped_by_the_guard(
    ranks: Nursery, base: dict[str, Any], tmp_path: Path, name: str, changes: dict[str, Any], after: str
) -> None:
    config = base | {"save_strategy": "steps"} | changes
    if changes.get("eval_strategy") == "epoch":
        config |= {"save_strategy": "epoch"}
    whole = make_folder(tmp_path / "whole", config)
    assert ranks.run(whole)[0]["how"] == "completed"
    stopped, resumed = stop_and_resume(ranks, config, tmp_path, after)
    assert weights(resumed) == weights(whole)
    assert logs_of(stopped, resumed) == logs_of(whole)
    if "load_best_model_at_end" in changes:
        best = read_json(resumed / OUTPUT / "trainer_state.json")["best_global_step"]
        assert best < read_json(outcome_path(stopped, 0))["step"]


def test_resumed_at_its_last_step(ranks: Nursery, base: dict[str, Any], tmp_path: Path) -> None:
    """Killed between the last checkpoint and the result: nothing is trained again, and not a step more."""
    config = base | {"max_steps": 5}
    whole = make_folder(tmp_path / "whole", config)
    ranks.run(whole)
    resumed = hand_over(whole, tmp_path / "resumed", config, 5)
    assert ranks.run(resumed) == [asdict(Outcome("completed", 5))]
    assert events(resumed, "step") == []
    assert weights(resumed) == weights(whole)


@pytest.mark.slow
def test_two_ranks(ranks: Nursery, base: dict[str, Any], tmp_path: Path) -> None:
    """Every rank has its own randomness, and both continue it, after a kill and after a stop within an evaluation."""
    config = base | {"use_peft": True, "lora_dropout": 0.1, "per_device_train_batch_size": 1}
    whole = make_folder(tmp_path / "whole", config)
    assert [outcome["how"] for outcome in ranks.run(whole, 2, MASTER_PORT=free_port())] == ["completed"] * 2

    killed = make_folder(tmp_path / "killed", config, save_steps=4)
    port = free_port()
    pids = [ranks.start(killed, log=f"log-{rank}", MASTER_PORT=port, **rank_environment(rank, 2)) for rank in (0, 1)]
    wait_for(staged_path(killed, 4), killed)
    wait_for(staged_path(killed, 4, rank=1), killed)
    for pid in pids:
        kill(pid)
    resumed = hand_over(killed, tmp_path / "resumed", config, 4, save_steps=4)
    assert {path.name for path in (resumed / TRAINER / "checkpoint-4").glob("rng*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }
    assert [outcome["how"] for outcome in ranks.run(resumed, 2, MASTER_PORT=free_port())] == ["completed"] * 2
    assert weights(resumed) == weights(whole)
    assert logs_of(killed, resumed) == logs_of(whole)

    stopped = make_folder(tmp_path / "stopped", config, save_seconds=0.2)
    port = free_port()
    for rank in (0, 1):
        hold = '"phase": "eval"' if rank == 0 else ""
        ranks.start(stopped, log=f"log-{rank}", hold=hold, MASTER_PORT=port, **rank_environment(rank, 2))
    wait_until_held(stopped)
    stop(stopped)
    let_go(stopped)
    outcomes = [wait_for(outcome_path(stopped, rank), stopped) for rank in (0, 1)]
    assert outcomes[0] == outcomes[1]
    assert outcomes[0]["how"] == "stopped"
    resumed = hand_over(stopped, tmp_path / "resumed again", config, outcomes[0]["step"])
    assert [outcome["how"] for outcome in ranks.run(resumed, 2, MASTER_PORT=free_port())] == ["completed"] * 2
    assert weights(resumed) == weights(whole)
    assert logs_of(stopped, resumed) == logs_of(whole)


def test_what_one_rank_wants_both_do(ranks: Nursery, base: dict[str, Any], tmp_path: Path) -> None:
    """Only rank 0's clock says that a save is due, here after each step."""
    folder = make_folder(tmp_path / "folder", base | {"max_steps": 2}, save_seconds=1e-9)
    assert [outcome["how"] for outcome in ranks.run(folder, 2)] == ["completed"] * 2
    assert [event["step"] for event in events(folder, "save")] == [1, 2]
    assert all(staged_path(folder, 1, rank).exists() for rank in (0, 1))


def test_a_resume_with_another_learning_rate_trains_at_that_rate(
    ranks: Nursery, base: dict[str, Any], tmp_path: Path
) -> None:
    """A run may go on with a changed config: the schedule goes on at the same step, from the new rate."""
    config = {**base, "max_steps": 8, "logging_steps": 4, "lr_scheduler_type": "linear"}
    before = make_folder(tmp_path / "before", config, save_steps=4)
    ranks.run(before)
    resumed = hand_over(before, tmp_path / "resumed", {**config, "learning_rate": 4e-3}, 4, save_steps=4)
    assert ranks.run(resumed)[0]["how"] == "completed"
    rates = [
        [line["learning_rate"] for line in events(folder, "log") if "learning_rate" in line]
        for folder in (before, resumed)
    ]
    assert rates[0][-1] == pytest.approx(2e-3 / 8)
    assert rates[1] == pytest.approx([4e-3 / 8])
