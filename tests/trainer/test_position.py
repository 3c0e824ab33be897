"""The place in the data outlives another batch size, accumulation and drop_last, or the run is refused."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, SeedableRandomSampler, skip_first_batches
from torch.utils.data import BatchSampler

from spotune.core.errors import InputError
from spotune.core.protocol import RESTORED, TRAINER, read_json, staged_path, write_json
from spotune.sft.data import Layout, Position, Start, length, place
from spotune.sft.trainer import SpotTrainer
from tests import tiny
from tests.ranks import Nursery, events, log_text, make_folder, restore, wait_for, weights

ROWS, STEP = 40, 27  # 27 steps of two rows: 7 steps, 14 rows into the second epoch
AT = "epoch 1.35, row 14 of 40"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("base")
    tiny.make_model(folder / "model", dropout=0.1)
    lines = [{"text": f"row {number} {tiny.WORDS[number % 20]}"} for number in range(ROWS)]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "model_name_or_path": str(folder / "model"),
        "data": [{"source": str(folder / "train.jsonl")}],
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "max_length": 32,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
    }


@pytest.fixture(scope="module")
def whole(ranks: Nursery, base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run with a checkpoint in the middle of its second epoch."""
    folder = make_folder(tmp_path_factory.mktemp("whole") / "run", base, save_steps=STEP)
    assert ranks.run(folder, kind="watched")[0] == {"how": "completed", "step": 40, "message": "", "versions": []}
    return folder


def rows_of(folder: Path, *steps: int) -> list[str]:
    """The rows of these steps in their order, or of all."""
    seen = read_json(folder / "rows-0.json")
    return [row for step, rows in seen.items() for row in rows if not steps or int(step) in steps]


def go_on(before: Path, folder: Path, config: dict[str, Any], step: int, **job: Any) -> Path:
    """A new machine with the checkpoint of ``step``, under a config."""
    make_folder(folder, config, attempt=2, **job)
    staged = wait_for(staged_path(before, step), before)
    target = folder / TRAINER / f"checkpoint-{step}"
    shutil.copytree(staged["checkpoint"], target)
    restore(folder, target, staged["tokens"])
    return folder


def test_another_batch_goes_on_at_the_row(ranks: Nursery, base: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    config = base | {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    moved = go_on(whole, tmp_path / "moved", config, STEP, save_steps=29)
    outcome = ranks.run(moved, kind="watched")[0]
    # 26 rows are left of 40: four steps of six, one of two.
    assert (outcome["how"], outcome["step"]) == ("completed", STEP + 5), outcome
    assert f"goes on in {AT} (before: {AT}), in steps of 6 rows instead of 2" in log_text(moved)
    assert rows_of(moved) == rows_of(whole, *range(STEP + 1, 41))
    assert events(moved, "plan")[0]["max_steps"] == STEP + 5
    assert events(moved, "log")[-1]["epoch"] == 2.0
    # The rest of that epoch is of its own making by now. Taken away once more, it goes on in the same way.
    again = go_on(moved, tmp_path / "again", config, 29, save_steps=29)
    assert ranks.run(again, kind="watched")[0]["step"] == STEP + 5
    assert rows_of(again) == rows_of(moved, 30, 31, 32)
    assert weights(again) == weights(moved)
    assert "goes on in" not in log_text(again)


def test_an_earlier_checkpoint_is_placed_by_its_commit(
    ranks: Nursery, base: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    """It says its steps of the epoch; how many rows these had, the commit does. Steps in all come from max_steps."""
    config = base | {"gradient_accumulation_steps": 2, "max_steps": 36}
    old = go_on(whole, tmp_path / "old", config, STEP)
    extra = old / TRAINER / f"checkpoint-{STEP}" / "spotune.json"
    facts = read_json(extra)
    del facts["position"]
    write_json(extra, facts)
    write_json(old / RESTORED, {**read_json(old / RESTORED), "global_batch": 2})
    assert ranks.run(old, kind="watched")[0]["step"] == 36
    rest = rows_of(whole, *range(STEP + 1, 41))
    assert rows_of(old)[: len(rest)] == rest
    assert len(rows_of(old)) == len(rest) + 8  # two more steps, of the third epoch


def test_a_place_that_is_gone_is_refused(ranks: Nursery, base: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    packed = go_on(whole, tmp_path / "packed", base | {"packing": True}, STEP)
    outcome = ranks.run(packed)[0]
    assert outcome["how"] == "bad_input"
    said = f"config.yaml: packing: the run is at {AT}, and packing false -> true makes other rows of the same text ("
    assert outcome["message"].startswith(said)
    assert not events(packed, "step")


@pytest.mark.slow
def test_a_stream_goes_on_in_whole_steps_or_is_refused(ranks: Nursery, base: dict[str, Any], tmp_path: Path) -> None:
    config = {name: value for name, value in base.items() if name not in ("data", "num_train_epochs")}
    folder = Path(base["data"][0]["source"]).parent
    stream = config | {"dataset_name": str(folder), "dataset_streaming": True, "max_steps": 12}
    first = make_folder(tmp_path / "first", stream, save_steps=6)
    assert ranks.run(first, kind="watched")[0]["how"] == "completed"
    wide = go_on(first, tmp_path / "wide", stream | {"per_device_train_batch_size": 4, "max_steps": 9}, 6)
    assert ranks.run(wide, kind="watched")[0]["step"] == 9
    assert rows_of(wide) == rows_of(first, *range(7, 13))
    odd = go_on(first, tmp_path / "odd", stream | {"per_device_train_batch_size": 5}, 6)
    outcome = ranks.run(odd)[0]
    assert outcome["how"] == "bad_input"
    assert "the run is at epoch 1, row 12 of a stream, which steps of 5 rows do not come to" in outcome["message"]


@pytest.mark.slow
def test_two_ranks_go_on_at_the_row_in_a_later_epoch(ranks: Nursery, base: dict[str, Any], tmp_path: Path) -> None:
    """And with nothing changed, as ever."""

    def rows(folder: Path, *steps: int) -> list[set[str]]:
        seen = [read_json(folder / f"rows-{rank}.json") for rank in (0, 1)]
        return [{row for rank in seen for row in rank[str(step)]} for step in steps]

    first = make_folder(tmp_path / "first", base, save_steps=13)  # 10 steps of four rows an epoch
    assert ranks.run(first, world_size=2, kind="watched")[0]["step"] == 20
    for name, changes, steps in (("same", {}, 20), ("moved", {"per_device_train_batch_size": 7}, 15)):
        folder = make_folder(tmp_path / name, base | changes, attempt=2)
        checkpoint = folder / TRAINER / "checkpoint-13"
        shutil.copytree(read_json(staged_path(first, 13))["checkpoint"], checkpoint)
        restore(folder, checkpoint)
        assert ranks.run(folder, world_size=2, kind="watched")[0]["step"] == steps, log_text(folder)
        left = set().union(*rows(first, *range(14, 21)))
        assert set().union(*rows(folder, *range(14, steps + 1))) == left
    assert rows(tmp_path / "same", *range(14, 21)) == rows(first, *range(14, 21))


def loader(rows: int, batch: int, ranks: int = 1, rank: int = 0, drop_last: bool = False) -> Any:
    """As Accelerate prepares Trainer's."""
    data = list(range(rows))
    sampler = SeedableRandomSampler(data, generator=torch.Generator(), data_seed=7)  # type: ignore[no-untyped-call]
    batches: Any = BatchSampler(sampler, batch, drop_last)
    if ranks > 1:
        batches = BatchSamplerShard(batches, ranks, rank)
    return DataLoaderShard(data, batch_sampler=batches)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(
    ("rows", "row", "batch", "accumulation"), [(40, 14, 3, 2), (41, 40, 2, 1), (23, 5, 4, 3), (9, 9, 2, 2)]
)
def test_the_rest_of_an_epoch_is_there_once(
    rows: int, row: int, batch: int, accumulation: int, ranks: int, drop_last: bool
) -> None:
    order = [number for found in loader(rows, 1) for number in found.tolist()]
    seen = []
    for rank in range(ranks):
        held = loader(rows, batch, ranks, rank, drop_last)
        layout = Layout(held)
        assert layout.batch_rows == batch * ranks
        start = layout.start(0, row, accumulation)
        if start.epoch:
            assert rows - row < batch * ranks or row == rows
            return
        with layout.rows_from(start.row, start.skipped):
            taken = [found.tolist() for found in skip_first_batches(held, start.skipped)]
        assert len(taken) == start.batches - start.skipped
        assert len(held) == len(loader(rows, batch, ranks, rank, drop_last))  # as before
        seen.append(taken)
    found = [number for batches in zip(*seen, strict=True) for one in batches for number in one]
    left = order[row:]
    if drop_last:
        assert found == left[: len(left) // (batch * ranks) * batch * ranks]
    else:
        assert found[: len(left)] == left
        assert set(found[len(left) :]) <= set(order[: batch * ranks])  # what fills up the last batches


def test_the_length_counts_what_is_left() -> None:
    start = Start(epoch=1, row=14, skipped=6, skipped_steps=3, batches=15, steps=8)
    assert length(start, done=27, epoch_steps=7, max_steps=-1, epochs=2) == (32, 2)
    assert length(start, done=27, epoch_steps=7, max_steps=-1, epochs=3.5) == (32 + 11, 4)
    assert length(start, done=27, epoch_steps=7, max_steps=-1, epochs=1.5) == (28, 2)
    assert length(start, done=27, epoch_steps=7, max_steps=-1, epochs=1.0) == (27, 1)
    assert length(start, done=27, epoch_steps=7, max_steps=30, epochs=9) == (30, 2)
    assert length(start, done=27, epoch_steps=7, max_steps=33, epochs=9) == (33, 3)


MADE_BY = {"packing": False, "packing_strategy": None, "max_length": 32, "train_sampling_strategy": "random"}
BEFORE = Position(1, 14, 40, 2, MADE_BY)


def now(rows: int = 40, step_rows: int = 2, **changes: Any) -> Position:
    return Position(0, 0, rows, step_rows, MADE_BY | changes)


@pytest.mark.parametrize(
    ("before", "after", "place_now"),
    [
        (BEFORE, now(step_rows=6), (1, 14)),
        (BEFORE, now(max_length=64), (1, 14)),  # without packing a row stays the same row
        (BEFORE, now(rows=50), (1, 14)),  # the data was changed on purpose
        (BEFORE, now(rows=10), (2, 0)),
        (Position(1, 0, 40, 2, MADE_BY), now(rows=9, packing=True), (1, 0)),
        (Position(1, 40, 40, 2, MADE_BY), now(rows=9, packing=True), (2, 0)),
        (Position(1, 14, step_rows=2), now(packing=True), (1, 14)),  # an earlier version's checkpoint does not say
    ],
)
def test_a_place_that_is_still_there(before: Position, after: Position, place_now: tuple[int, int]) -> None:
    assert place(before, after, "config.yaml") == place_now


@pytest.mark.parametrize(
    ("before", "after", "key", "why"),
    [
        (MADE_BY, now(packing=True), "packing", "packing false -> true makes other rows of the same text"),
        (MADE_BY | {"packing": True}, now(packing=True, max_length=64), "max_length", "32 -> 64 makes other rows"),
        (MADE_BY, now(rows=38, max_length=16), "max_length", "32 -> 16 leaves 38 rows of 40, in another order"),
        (MADE_BY, now(train_sampling_strategy="sequential"), "train_sampling_strategy", "random -> sequential brings"),
        (
            MADE_BY | {"train_sampling_strategy": "group_by_length"},
            now(step_rows=6, train_sampling_strategy="group_by_length"),
            "train_sampling_strategy",
            "under group_by_length the order of rows follows the batch",
        ),
    ],
)
def test_a_place_that_is_not(before: dict[str, Any], after: Position, key: str, why: str) -> None:
    with pytest.raises(InputError) as caught:
        place(Position(1, 14, 40, 2, before), after, "config.yaml")
    assert str(caught.value).startswith(f"config.yaml: {key}: the run is at {AT}, and ")
    assert why in str(caught.value)


def test_keys_of_tied_weights_are_not_missing(ranks: Nursery, base: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base["model_name_or_path"], tie_word_embeddings=True)
    model.tie_weights()
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(base["model_name_or_path"]).save_pretrained(tmp_path / "model")
    config = base | {"model_name_or_path": str(tmp_path / "model"), "max_steps": 4}
    first = make_folder(tmp_path / "first", config, save_steps=2)
    assert ranks.run(first)[0]["how"] == "completed"
    second = go_on(first, tmp_path / "second", config, 2)
    assert ranks.run(second)[0]["how"] == "completed"
    assert weights(second) == weights(first)
    assert "missing keys" not in log_text(second)


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        (["lm_head.weight"], None),
        (["model.embed.weight"], None),
        (["lm_head.weight", "model.embed.weight"], ["lm_head.weight", "model.embed.weight"]),
        (["lm_head.weight", "model.norm.weight"], ["model.norm.weight"]),
    ],
)
def test_keys_that_are_missing_are_named(
    missing: list[str], told: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("transformers.trainer.logger.warning", said.append)
    trainer = object.__new__(SpotTrainer)
    tied = {"lm_head.weight": "model.embed.weight"}
    trainer.model = SimpleNamespace(all_tied_weights_keys=tied, _keys_to_ignore_on_save=None)
    trainer._issue_warnings_after_load(torch.nn.modules.module._IncompatibleKeys(missing, []))
    assert said == ([] if told is None else [f"There were missing keys in the checkpoint model loaded: {told}."])
