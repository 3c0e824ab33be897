"""What the run trains on and is evaluated on: ``data:``, or TRL's own ``datasets`` and ``dataset_name``.

``load_data`` is the seam: whatever reads and mixes behind it (later also streamed), the trainer gets
data sets of rows in one of TRL's formats.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spotune.contracts.errors import InputError
from spotune.contracts.exchange import Job
from spotune.sft.align import aligned
from spotune.sft.arguments import Arguments
from spotune.sft.mixture import counts, divide, held_out_count, interleave
from spotune.sft.sources import Source, load


@dataclass(frozen=True)
class Data:
    """Data sets of rows; ``evaluation`` is None when the config evaluates nothing."""

    train: Any
    evaluation: Any


def load_data(args: Arguments, job: Job) -> Data:
    """Reads, checks and mixes the data that the config names. Raises InputError."""
    wants_evaluation = args.training.eval_strategy != "no"
    data = _load_own(args, job) if job.config.get("data") else _load_as_trl(args, job, wants_evaluation)
    if not wants_evaluation:
        return Data(data.train, None)
    if data.evaluation is None:
        remedy = 'split: 0.05 on an entry of data, or eval_strategy: "no"'
        raise InputError(
            job.config_path, "there are no held-out rows to evaluate on", key="eval_strategy", remedy=remedy
        )
    return data


def _load_own(args: Arguments, job: Job) -> Data:
    from datasets import concatenate_datasets

    entries = job.config["data"]
    seed = args.training.data_seed if args.training.data_seed is not None else args.training.seed
    text_field = args.training.dataset_text_field
    sources = [Source(entry, job.config_path, f"data[{index}]", text_field) for index, entry in enumerate(entries)]
    loaded = [load(source, Path(job.cache)) for source in sources]
    formats = list(dict.fromkeys(format for _, format in loaded))
    if len(formats) > 1:
        remedy = "give all of them one format; columns: maps names"
        raise InputError(
            job.config_path, f"the sources have different formats: {', '.join(formats)}", key="data", remedy=remedy
        )
    datasets = aligned([dataset for dataset, _ in loaded], job.config_path)
    training, held_out = [], []
    for source, dataset in zip(sources, datasets, strict=True):
        kept, out = _held_out(source, dataset, seed)
        training.append(kept)
        held_out += [out] if out is not None else []
    sizes = [len(dataset) for dataset in training]
    taken = counts(sizes, [entry.get("weight") for entry in entries])
    train = training[0]
    if len(training) > 1 or taken != sizes:
        train = concatenate_datasets(training).select(interleave(sizes, taken, seed))
    evaluation = concatenate_datasets(held_out) if held_out else None
    limit = job.config.get("data_limit")
    return Data(_first(train, limit), _first(evaluation, limit) if evaluation is not None else None)


def _held_out(source: Source, dataset: Any, seed: int) -> tuple[Any, Any]:
    split = source.entry.get("split")
    if not split:
        return dataset, None
    count = held_out_count(len(dataset), split)
    if count >= len(dataset):
        raise source.error(f"holds out {count} of {len(dataset)} rows, so that none are left to train on", key="split")
    kept, out = divide(len(dataset), count, seed)
    return dataset.select(kept), dataset.select(out)


def _first(dataset: Any, limit: int | None) -> Any:
    return dataset if limit is None or len(dataset) <= limit else dataset.select(np.arange(limit))


def _load_as_trl(args: Arguments, job: Job, wants_evaluation: bool) -> Data:
    """What TRL's own script does with ``datasets`` and ``dataset_name``, and nothing else."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
    from trl import get_dataset

    script = args.script
    key = "datasets" if args.datasets.datasets else "dataset_name"
    try:
        if args.datasets.datasets:
            np.random.seed(args.training.seed)  # test_split_size takes its rows by this; a resume must get the same
            found = get_dataset(args.datasets)
        else:
            found = load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)
    except (DatasetNotFoundError, DatasetGenerationError, FileNotFoundError, ValueError) as error:
        raise InputError(job.config_path, f"cannot be loaded: {error.__cause__ or error}", key=key) from error
    splits = {"dataset_train_split": script.dataset_train_split}
    if wants_evaluation:
        splits["dataset_test_split"] = script.dataset_test_split
    for name, split in splits.items():
        if split not in found:
            remedy = f"it has {', '.join(found)}"
            raise InputError(job.config_path, f"the data set has no split {split!r}", key=name, remedy=remedy)
    if hasattr(found[script.dataset_train_split], "__len__") and not len(found[script.dataset_train_split]):
        raise InputError(job.config_path, "the data set has no rows", key=key)
    return Data(found[script.dataset_train_split], found[script.dataset_test_split] if wants_evaluation else None)
