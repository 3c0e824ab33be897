"""Odd shapes of data train to the very weights of the same text in plain JSON lines."""

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from tests import tiny
from tests.ranks import Nursery, log_text, make_folder, weights

SHARED = Path(__file__).resolve().parents[3] / "shared" / "cases"
# Says all that a message has, so that a key too many or too few gives other weights.
TEMPLATE = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% for key in message | list | sort if key not in ('role', 'content') %}"
    "{{ key }}={{ message[key] | tojson }};{% endfor %}"
    "{{ message.content }}<|end|>{% endfor %}"
)
STEPS = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True, "bf16": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("cases") / "model", chat_template=TEMPLATE)


def trained(ranks: Nursery, folder: Path, model: Path, **config: Any) -> dict[str, bytes]:
    made = make_folder(folder, {"model_name_or_path": str(model), "report_to": "none", **STEPS, **config})
    ended = ranks.run(made)[0]
    assert ended["how"] == "completed", (ended, log_text(made)[-2000:])
    return weights(made)


def lines(*names: str) -> list[dict[str, Any]]:
    return [json.loads(line) for name in names for line in (SHARED / name).read_text().splitlines() if line]


def cells() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name in ("a.csv", "b.csv"):
        with open(SHARED / "csv-zip-codes" / name, newline="") as file:
            found += list(csv.DictReader(file))
    return found


def renamed(row: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": one["from"], "content": one["value"]} for one in row["conversations"]]}


SAME: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "csv-zip-codes": cells,
    "jsonl-dates": lambda: lines("jsonl-dates/a.jsonl", "jsonl-dates/b.jsonl"),
    "brackets/train[0].jsonl": lambda: lines("brackets/train[0].jsonl"),
    "endings": lambda: lines("endings/a.jsonl", "endings/b.JSONL", "endings/c.ndjson"),
    "empty-shard": lambda: lines("empty-shard/b.jsonl"),
    "unneeded-column": lambda: [
        {"messages": row["messages"]} for row in lines("unneeded-column/a.jsonl", "unneeded-column/b.jsonl")
    ],
    "polars-types.parquet": lambda: pa.parquet.read_table(SHARED / "polars-types.parquet").to_pylist(),
    "sharegpt.jsonl": lambda: [renamed(row) for row in lines("sharegpt.jsonl")],
}


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared cases beside the checkout")
@pytest.mark.parametrize("name", SAME)
def test_an_odd_shape_trains_to_the_same_weights(ranks: Nursery, model: Path, tmp_path: Path, name: str) -> None:
    plain = tiny.write_jsonl(tmp_path / "plain.jsonl", SAME[name]())
    expected = trained(ranks, tmp_path / "expected", model, data=[{"source": str(plain)}])
    assert trained(ranks, tmp_path / "found", model, data=[{"source": str(SHARED / name)}]) == expected


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared cases beside the checkout")
@pytest.mark.parametrize("name", ["tool-calls.jsonl", "some-names.jsonl", "sharegpt.jsonl"])
def test_trl_trains_to_the_same_weights(ranks: Nursery, model: Path, tmp_path: Path, name: str) -> None:
    """TRL's own keys read the file by ``datasets``, which keeps what only some messages have as it is."""
    files = [{"path": "json", "data_files": str(SHARED / name)}]
    expected = trained(ranks, tmp_path / "expected", model, datasets=files)
    assert trained(ranks, tmp_path / "found", model, data=[{"source": str(SHARED / name)}]) == expected


SLOW = [pytest.param(keys, marks=pytest.mark.slow) for keys in ("datasets", "dataset_name")]


@pytest.mark.parametrize("keys", ["data", *SLOW])
def test_another_file_under_the_same_name_is_trained_on(ranks: Nursery, model: Path, tmp_path: Path, keys: str) -> None:
    """A file of the same path, size and time, as reproducible archives and ``cp -p`` make it."""

    def train(number: int, seed: int) -> dict[str, bytes]:
        file = tmp_path / "rows" / "train.jsonl"
        tiny.write_jsonl(file, [{"text": f"row {seed}{at}"} for at in range(8)])
        os.utime(file, ns=(1_000_000_000, 1_000_000_000))
        given: dict[str, Any] = {
            "data": {"data": [{"source": str(file)}]},
            "datasets": {"datasets": [{"path": "json", "data_files": str(file)}]},
            "dataset_name": {"dataset_name": str(file.parent)},
        }[keys]
        folder = tmp_path / f"run-{number}"
        found = trained(ranks, folder, model, **given)
        shutil.rmtree(folder)
        return found

    first, second, again = train(1, seed=1), train(2, seed=2), train(3, seed=1)
    assert first != second
    assert first == again
