"""Reads ``data:`` entries as the trainer does, without a trainer."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from spotune.core.protocol import WorkerJob
from spotune.sft.data import Data, load_data


def read(*entries: dict[str, Any], cache: Path, data_files: list[dict[str, Any]] | None = None, **config: Any) -> Data:
    """The data sets of ``data:`` entries, with a config's further keys."""
    training = SimpleNamespace(
        eval_strategy=config.pop("eval_strategy", "no"), seed=1, data_seed=None, dataset_text_field="text"
    )
    job = WorkerJob("r", 1, {"data": list(entries), **config}, "c.yaml", str(cache), data_files=data_files or [])
    return load_data(SimpleNamespace(training=training), job)  # type: ignore[arg-type]


def read_rows(*entries: dict[str, Any], cache: Path, **config: Any) -> list[dict[str, Any]]:
    """The training rows as Python values."""
    return list(read(*entries, cache=cache, **config).train)
