"""Streams, other numbers of ranks, and sharded models: resumed exactly, or with the same rows."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from spotune.core.protocol import RESTORED, TRAINER, outcome_path, read_json, staged_path
from tests import tiny
from tests.ranks import (
    Nursery,
    events,
    free_port,
    kill,
    log_text,
    make_folder,
    rank_environment,
    restore,
    verdict_on,
    wait_for,
    weights,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("exactness")
    tiny.make_model(folder / "model", dropout=0.1)
    tiny.write_jsonl(folder / "data" / "train.jsonl", tiny.rows(25, "text"))
    tiny.write_jsonl(folder / "even" / "train.jsonl", tiny.rows(24, "text"))
    return {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "data"),
        "max_length": 48,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 2e-3,
        "logging_steps": 1,
        "bf16": False,
        "gradient_checkpointing": False,
    }


def move(killed: Path, folder: Path, config: dict[str, Any], step: int, ranks: int = 1, **job: Any) -> Path:
    """A new machine: only the staged checkpoint comes along."""
    parts = [wait_for(staged_path(killed, step, rank), killed) for rank in range(ranks)]
    make_folder(folder, config, attempt=2, **job)
    checkpoint = folder / TRAINER / f"checkpoint-{step}"
    shutil.copytree(parts[0]["checkpoint"], checkpoint)
    restore(folder, checkpoint, parts[0]["tokens"])
    return folder


def losses(*folders: Path) -> dict[int, float]:
    """The loss of each step, that of the last folder which has it."""
    return {line["step"]: line["loss"] for folder in folders for line in events(folder, "log") if "loss" in line}


# 25 rows in batches of 2, 2 a step: an epoch ends in the middle of a step, and its rest goes on in the next one.
STREAMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "workers": {"dataloader_num_workers": 1},
    "packed": {"packing": True},
    "epoch strategies": {"eval_strategy": "no", "logging_strategy": "epoch", "save_strategy": "epoch"},
}


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("plain", 7),
        *(pytest.param("plain", step, marks=pytest.mark.slow) for step in (3, 6, 15)),
        *(pytest.param(name, step, marks=pytest.mark.slow) for name in [*STREAMS][1:] for step in (7, 15)),
    ],
)
def test_a_stream_goes_on_in_any_epoch(
    ranks: Nursery, base: dict[str, Any], tmp_path: Path, name: str, step: int
) -> None:
    config = base | {"dataset_streaming": True, "max_steps": 17} | STREAMS[name]
    whole = make_folder(tmp_path / "whole", config, save_steps=step)
    assert [outcome["how"] for outcome in ranks.run(whole)] == ["completed"], log_text(whole)
    resumed = move(whole, tmp_path / "resumed", config, step, save_steps=step)
    assert ranks.run(resumed)[0]["how"] == "completed", log_text(resumed)
    assert [event["step"] for event in events(resumed, "step")] == list(range(step + 1, 18))
    assert weights(resumed) == weights(whole)
    if name == "plain":
        assert losses(resumed).items() <= losses(whole).items()


def rows_by_step(folder: Path, ranks: int) -> dict[int, list[str]]:
    """What each step has trained on, all ranks together; from the rows that tests/ranks.py writes down."""
    found: dict[int, list[str]] = {}
    for rank in range(ranks):
        for step, rows in (read_json(folder / f"rows-{rank}.json") or {}).items():
            found.setdefault(int(step), []).extend(rows)
    return {step: sorted(rows) for step, rows in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_another_number_of_ranks_trains_on_the_same_rows(
    ranks: Nursery, base: dict[str, Any], tmp_path: Path, before: int, after: int, streaming: bool
) -> None:
    """An even number of rows: where they do not suffice for all ranks, Accelerate fills up the last batch."""
    config = base | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 14}
    config |= {"dataset_streaming": streaming, "dataset_name": base["dataset_name"].replace("data", "even")}
    whole = make_folder(tmp_path / "whole", config, save_steps=5)
    assert {outcome["how"] for outcome in ranks.run(whole, before, kind="watched")} == {"completed"}, log_text(whole)
    rows = read_json(staged_path(whole, 5))["global_batch"]
    assert rows == 2 * before
    moved = move(whole, tmp_path / "moved", config, 5, before, save_steps=5, global_batch=rows)
    assert {outcome["how"] for outcome in ranks.run(moved, after, kind="watched")} == {"completed"}, log_text(moved)
    assert "gradient_accumulation_steps" in log_text(moved)
    expected = {step: seen for step, seen in rows_by_step(whole, before).items() if step > 5}
    assert len(expected) == 9
    assert rows_by_step(moved, after) == expected
    assert losses(moved)[14] == pytest.approx(losses(whole)[14], rel=0.05)


def test_ranks_that_cannot_keep_the_rows_of_a_step_are_refused(
    ranks: Nursery, base: dict[str, Any], tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "folder", base | {"max_steps": 2}, global_batch=6)
    (outcome,) = ranks.run(folder)
    assert outcome["how"] == "completed", "6 rows are 3 batches of 2"
    folder = make_folder(tmp_path / "odd", base | {"max_steps": 2}, global_batch=7)
    (outcome,) = ranks.run(folder)
    assert outcome["how"] == "bad_input"
    assert "per_device_train_batch_size: a step of this run takes 7 rows, which 1 ranks cannot" in outcome["message"]


SHARDED = {"optimizer_0", "pytorch_model_fsdp_0"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapter", "state", "expected"),
    [
        (True, "SHARDED_STATE_DICT", SHARDED),
        (False, "SHARDED_STATE_DICT", SHARDED),
        (False, "FULL_STATE_DICT", {"optimizer.bin", "pytorch_model_fsdp.bin", "model.safetensors"}),
    ],
    ids=["LoRA", "full", "full, gathered"],
)
def test_fsdp_killed_and_resumed(
    ranks: Nursery, base: dict[str, Any], tmp_path: Path, adapter: bool, state: str, expected: set[str]
) -> None:
    fsdp = {"fsdp_version": 2, "state_dict_type": state}
    config = base | {"fsdp": True, "fsdp_config": fsdp, "max_steps": 8, "use_peft": adapter}
    whole = make_folder(tmp_path / "whole", config, save_steps=3)
    assert {outcome["how"] for outcome in ranks.run(whole, 2, kind="fsdp")} == {"completed"}, log_text(whole)
    assert "FSDP runs: FSDP version 2" in log_text(whole)  # not DDP, which Accelerate makes of it on a CPU

    killed = make_folder(tmp_path / "killed", config, save_steps=3)
    port = free_port()
    pids = [
        ranks.start(killed, log=f"log-{rank}", kind="fsdp", MASTER_PORT=port, **rank_environment(rank, 2))
        for rank in (0, 1)
    ]
    for rank in (0, 1):
        wait_for(staged_path(killed, 3, rank), killed)
    for pid in pids:
        kill(pid)
    resumed = move(killed, tmp_path / "resumed", config, 3, 2, save_steps=3)
    names = {path.relative_to(resumed / TRAINER / "checkpoint-3").as_posix().split("/")[0]
             for path in (resumed / TRAINER / "checkpoint-3").rglob("*")}  # fmt: skip
    assert expected | {"scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"} <= names
    assert {outcome["how"] for outcome in ranks.run(resumed, 2, kind="fsdp")} == {"completed"}, log_text(resumed)
    assert [event["step"] for event in events(resumed, "step")] == list(range(4, 9))
    assert weights(resumed) == weights(whole)


@pytest.mark.slow
def test_fsdp_runs_no_code_from_a_checkpoint(ranks: Nursery, base: dict[str, Any], tmp_path: Path) -> None:
    """Of torch's own reader the same file makes a program: tests/trainer/test_shards.py."""
    fsdp = {"fsdp_version": 2, "state_dict_type": "SHARDED_STATE_DICT"}
    config = base | {"fsdp": True, "fsdp_config": fsdp, "max_steps": 4}
    whole = make_folder(tmp_path / "whole", config, save_steps=3)
    assert {outcome["how"] for outcome in ranks.run(whole, 2, kind="fsdp")} == {"completed"}, log_text(whole)
    resumed = move(whole, tmp_path / "resumed", config, 3, 2, save_steps=3)
    for path in (resumed / TRAINER / "checkpoint-3").glob("*/.metadata"):
        poisoned = pickle.loads(path.read_bytes())
        poisoned.planner_data = Touch(str(tmp_path / "ran"))
        path.unlink()  # it may be a hard link
        path.write_bytes(pickle.dumps(poisoned))
    assert "completed" not in {outcome["how"] for outcome in ranks.run(resumed, 2, kind="fsdp")}
    assert "which no checkpoint needs" in log_text(resumed)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_fsdp_asks_for_another_checkpoint_in_place_of_a_poisoned_one(
    ranks: Nursery, base: dict[str, Any], tmp_path: Path
) -> None:
    fsdp = {"fsdp_version": 2, "state_dict_type": "SHARDED_STATE_DICT"}
    config = base | {"fsdp": True, "fsdp_config": fsdp, "max_steps": 4}
    whole = make_folder(tmp_path / "whole", config, save_steps=2)
    assert {outcome["how"] for outcome in ranks.run(whole, 2, kind="fsdp")} == {"completed"}, log_text(whole)
    resumed = move(whole, tmp_path / "resumed", config, 2, 2, save_steps=2)
    good = resumed / TRAINER / "checkpoint-2"
    poisoned = resumed / "poisoned" / "checkpoint-2"
    shutil.copytree(good, poisoned)
    (poisoned / "optimizer_0/.metadata").unlink()  # it may be a hard link
    (poisoned / "optimizer_0/.metadata").write_bytes(pickle.dumps(Touch(str(tmp_path / "ran"))))
    tokens = read_json(resumed / RESTORED)["tokens"]
    (resumed / RESTORED).unlink()
    port = free_port()
    for rank in (0, 1):
        ranks.start(resumed, log=f"log-{rank}", kind="fsdp", MASTER_PORT=port, **rank_environment(rank, 2))
    what = "optimizer_0/.metadata: not a sharded checkpoint's metadata: names io.open, which no checkpoint needs"
    assert verdict_on(resumed, poisoned, 0) == what
    assert verdict_on(resumed, good, 1) == ""
    restore(resumed, good, tokens)
    assert [wait_for(outcome_path(resumed, rank), resumed)["how"] for rank in (0, 1)] == ["completed"] * 2
    assert weights(resumed) == weights(whole)
    assert not (tmp_path / "ran").exists()


class Touch:
    """Makes a file where it is unpickled by a reader that calls what a file names."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (self._path, "w")
