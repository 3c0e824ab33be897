"""The counts are those of TRL's own preparation, row by row, for every way to truncate and pack."""

from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from spotune.sft.row_counts import BATCH_ROWS, Origins, RowCount, SourceCount, count_rows, rule_of

SPECIAL = {0, 1}
MODES: dict[str, dict[str, Any]] = {
    "keep start": {"max_length": 8},
    "keep end": {"max_length": 8, "truncation_mode": "keep_end"},
    "whole": {"max_length": None},
    "bfd": {"max_length": 8, "packing": True, "packing_strategy": "bfd"},
    "bfd, the end": {"max_length": 8, "packing": True, "packing_strategy": "bfd", "truncation_mode": "keep_end"},
    "split": {"max_length": 8, "packing": True, "packing_strategy": "bfd_split"},
    "wrapped": {"max_length": 8, "packing": True, "packing_strategy": "wrapped"},
}


def made(count: int) -> list[dict[str, list[int]]]:
    """Rows of every kind: long, short, without an answer, of special tokens alone, without tokens."""
    rng = Random(7)
    rows = []
    for _ in range(count):
        prompt, answer = rng.choice([0, 3, 7, 8, 20]), rng.choice([0, 1, 2, 12])
        low, high = rng.choice([(0, 1), (2, 90)])
        tokens = [rng.randint(low, high) for _ in range(prompt + answer)]
        rows.append({"input_ids": tokens, "labels": [-100] * prompt + tokens[prompt:]})
    return rows


def counted(rows: list[dict[str, list[int]]], args: SFTConfig, sources: int = 3) -> RowCount:
    source = np.arange(len(rows), dtype=np.int32) % sources
    origins = Origins(tuple("abc"[:sources]), source, np.arange(len(rows), dtype=np.int64) // sources)
    return count_rows(Dataset.from_list(rows), origins, rule_of(args, args.packing), SPECIAL)


def config(tmp_path: Any, mode: str) -> SFTConfig:
    args = SFTConfig(str(tmp_path), bf16=False, report_to="none")
    for name, value in MODES[mode].items():  # set afterwards: TRL warns that keep_end will go
        setattr(args, name, value)
    return args


def expected(row: dict[str, list[int]], args: SFTConfig) -> str:
    """What becomes of one row, one token at a time."""
    tokens, labels, most = row["input_ids"], row["labels"], args.max_length
    is_cut = most is not None and not (args.packing and args.packing_strategy != "bfd")
    kept = labels
    if is_cut:
        kept = labels[-most:] if args.truncation_mode == "keep_end" and not args.packing else labels[:most]
    lead = 0 if args.packing and args.packing_strategy == "wrapped" else 1
    if all(token in SPECIAL for token in tokens):
        return "empty"
    if all(label == -100 for label in kept[lead:]):
        return "unfit" if any(label != -100 for label in labels[lead:]) else "dropped"
    return "truncated" if len(kept) < len(labels) else "used"


@pytest.mark.parametrize("mode", MODES)
def test_each_row_is_counted_as_what_becomes_of_it(mode: str, tmp_path: Any) -> None:
    args, rows = config(tmp_path, mode), made(BATCH_ROWS * 2 + 17)  # more than one batch
    wanted = [[expected(row, args) for row in rows[source::3]] for source in range(3)]
    assert counted(rows, args).by_source() == [
        SourceCount(
            name,
            len(kinds),
            kinds.count("dropped") + kinds.count("unfit"),
            kinds.count("truncated"),
            kinds.count("empty"),
            kinds.count("unfit"),
        )
        for name, kinds in zip("abc", wanted, strict=True)
    ]


@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_those_that_trl_keeps(mode: str, tmp_path: Any) -> None:
    args, rows = config(tmp_path, mode), made(400)
    holder = SimpleNamespace(_tokenizer=None, completion_only_loss=True, chat_template=None)
    kept = SFTTrainer._prepare_dataset(holder, Dataset.from_list(rows), None, args, args.packing, None, "train")
    count = counted(rows, args)
    assert count.highest.value == max(max(ids) for ids in kept["input_ids"] if ids)
    pieces = kept["seq_lengths"] if "seq_lengths" in kept.column_names else [[len(ids)] for ids in kept["input_ids"]]
    assert count.longest.value == max(max(lengths) for lengths in pieces)


def test_the_row_of_the_highest_token_is_named(tmp_path: Any) -> None:
    rows = made(BATCH_ROWS + 50)
    rows[1031] = {"input_ids": [5, 6, 500], "labels": [-100, 6, 500]}
    rows[1032] = {"input_ids": [5] * 8 + [999], "labels": [5] * 8 + [999]}  # cut off
    rows[1033] = {"input_ids": [800] * 3, "labels": [-100] * 3}  # dropped
    count = counted(rows, config(tmp_path, "keep start"))
    assert (count.highest.value, count.origins.where(count.highest.index)) == (500, ("c", 344))
    rows[3]["labels"] = [-7 for _ in rows[3]["labels"]] or [-7]
    rows[3]["input_ids"] = [5 for _ in rows[3]["labels"]]
    count = counted(rows, config(tmp_path, "keep start"))
    assert (count.lowest.value, count.origins.where(count.lowest.index)) == (7, ("a", 2))


def test_rows_that_all_have_no_tokens(tmp_path: Any) -> None:
    count = counted([{"input_ids": [], "labels": []}] * 5, config(tmp_path, "keep start"), sources=1)
    assert (count.used, count.by_source()) == (0, [SourceCount("a", 5, 0, 0, 5, 0)])
