"""What the run trains on and is evaluated on: ``data:``, or TRL's own ``datasets`` and ``dataset_name``.

``load_data`` is the seam: whatever reads and mixes behind it (later also streamed), the trainer gets
data sets of rows in one of TRL's formats.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from spotune.contracts.errors import InputError
from spotune.contracts.exchange import Job
from spotune.contracts.machinefaults import is_machine_fault
from spotune.sft.align import aligned
from spotune.sft.arguments import Arguments
from spotune.sft.mixture import counts, divide, held_out_count, interleave
from spotune.sft.origins import Origins, distinct, joined
from spotune.sft.sources import Source, load


@dataclass(frozen=True)
class Data:
    """Data sets of rows, and where each row comes from; ``evaluation`` is None when the config evaluates nothing."""

    train: Any
    evaluation: Any
    train_origins: Origins
    evaluation_origins: Origins | None


def load_data(args: Arguments, job: Job) -> Data:
    """Reads, checks and mixes the data that the config names. Raises InputError."""
    wants_evaluation = args.training.eval_strategy != "no"
    data = _load_own(args, job) if job.config.get("data") else _load_as_trl(args, job, wants_evaluation)
    if not wants_evaluation:
        return replace(data, evaluation=None, evaluation_origins=None)
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
    names = distinct([source.url for source in sources], [source.key for source in sources])
    divided = [
        _held_out(source, dataset, Origins.of_one(name, len(dataset)), seed)
        for source, dataset, name in zip(sources, datasets, names, strict=True)
    ]
    training, held_out = [kept for kept, _ in divided], [out for _, out in divided if out is not None]
    sizes = [len(dataset) for dataset, _ in training]
    taken = counts(sizes, [entry.get("weight") for entry in entries])
    train, origins = training[0]
    if len(training) > 1 or taken != sizes:
        order = interleave(sizes, taken, seed)
        train = concatenate_datasets([dataset for dataset, _ in training]).select(order)
        origins = joined([found for _, found in training]).select(order)
    limit = job.config.get("data_limit")
    if not held_out:
        return Data(_first(train, limit), None, origins.first(limit), None)
    evaluation = concatenate_datasets([dataset for dataset, _ in held_out])
    of_evaluation = joined([found for _, found in held_out])
    return Data(_first(train, limit), _first(evaluation, limit), origins.first(limit), of_evaluation.first(limit))


Part = tuple[Any, Origins]  # a data set, and where its rows come from


def _held_out(source: Source, dataset: Any, origins: Origins, seed: int) -> tuple[Part, Part | None]:
    split = source.entry.get("split")
    if not split:
        return (dataset, origins), None
    count = held_out_count(len(dataset), split)
    if count >= len(dataset):
        raise source.error(f"holds out {count} of {len(dataset)} rows, so that none are left to train on", key="split")
    kept, out = divide(len(dataset), count, seed)
    return (dataset.select(kept), origins.select(kept)), (dataset.select(out), origins.select(out))


def _first(dataset: Any, limit: int | None) -> Any:
    return dataset if limit is None or len(dataset) <= limit else dataset.select(np.arange(limit))


def _load_as_trl(args: Arguments, job: Job, wants_evaluation: bool) -> Data:
    """What TRL's own script does with ``datasets`` and ``dataset_name``, and nothing else."""
    from datasets import load_dataset
    from trl import get_dataset

    script = args.script
    key = "datasets" if args.datasets.datasets else "dataset_name"
    try:
        if args.datasets.datasets:
            np.random.seed(args.training.seed)  # test_split_size takes its rows by this; a resume must get the same
            found = get_dataset(args.datasets)
        else:
            found = load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)
    except Exception as error:  # only what the config names is read here
        if is_machine_fault(error):
            raise
        _reach(args.datasets.datasets)
        raise InputError(job.config_path, f"cannot be loaded: {error.__cause__ or error}", key=key) from error
    splits = {"dataset_train_split": script.dataset_train_split}
    if wants_evaluation:
        splits["dataset_test_split"] = script.dataset_test_split
    for name, split in splits.items():
        if split not in found:
            remedy = f"it has {', '.join(found)}"
            raise InputError(job.config_path, f"the data set has no split {split!r}", key=name, remedy=remedy)
    train = found[script.dataset_train_split]
    if hasattr(train, "__len__") and not len(train):
        raise InputError(job.config_path, "the data set has no rows", key=key)
    name = script.dataset_name or ", ".join(file for entry in args.datasets.datasets for file in _named(entry))
    if not wants_evaluation:
        return Data(train, None, _origins(name, train), None)
    evaluation = found[script.dataset_test_split]
    return Data(train, evaluation, _origins(name, train), _origins(name, evaluation))


def _reach(entries: Any) -> None:
    """Raises ConnectionError for a URL of ``data_files`` whose server is away: `datasets` calls that a missing file."""
    import fsspec

    for entry in entries or []:
        for url in _named(entry):
            if "://" in url and "*" not in url:
                try:
                    filesystem, path = fsspec.core.url_to_fs(url)
                    filesystem.info(path)
                except Exception as error:
                    if is_machine_fault(error):
                        raise ConnectionError(f"cannot reach {url}: {error.__cause__ or error}") from error


def _named(entry: Any) -> list[str]:
    """The files that an entry of ``datasets`` names, else its path."""
    files = entry.data_files.values() if isinstance(entry.data_files, dict) else [entry.data_files or entry.path]
    return [str(one) for file in files for one in (file if isinstance(file, list) else [file])]


def _origins(name: str, dataset: Any) -> Origins:
    return Origins.of_one(name, len(dataset) if hasattr(dataset, "__len__") else None)
