"""What the run trains on and is evaluated on: ``data:``, or TRL's own ``datasets`` and ``dataset_name``.

``load_data`` is the seam: whatever reads and mixes behind it (later also streamed), the trainer gets
data sets of rows in one of TRL's formats.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spotune.contracts.datafiles import file_state, notices
from spotune.contracts.errors import InputError
from spotune.contracts.exchange import Job
from spotune.contracts.fingerprint import data_files
from spotune.contracts.records import fingerprint
from spotune.sft.arguments import Arguments
from spotune.sft.mixture import counts, divide, interleave
from spotune.sft.sources import Source, dataset_of, one_layout, read_all, twins


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
    text_field, cache = args.training.dataset_text_field, Path(job.cache)
    sources = [
        Source(entry, job.config_path, f"data[{at}]", text_field, _recorded(job, str(entry["source"])))
        for at, entry in enumerate(entries)
    ]
    reads = [read_all(source, cache) for source in sources]
    layout = one_layout([read for inside in reads for read in inside])
    datasets = [dataset_of(inside, layout, cache) for inside in reads]
    _say([*notices(entries, job.config_path), *twins([read.part for inside in reads for read in inside])])
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


def _recorded(job: Job, source: str) -> list[dict[str, Any]]:
    """The facts of a source's files in the run's record; an entry that is there twice has the same ones."""
    return list({file["url"]: file for file in job.data_files if file.get("source") == source}.values())


def _say(lines: list[str]) -> None:
    """Prints what people may not have meant, once for all ranks."""
    if os.environ.get("RANK", "0") == "0":
        for line in lines:
            print(f"[spotune] data: {line}", file=sys.stderr)


def _held_out(source: Source, dataset: Any, seed: int) -> tuple[Any, Any]:
    count = source.held_out(len(dataset))
    if not count:
        return dataset, None
    kept, out = divide(len(dataset), count, seed)
    return dataset.select(kept), dataset.select(out)


def _first(dataset: Any, limit: int | None) -> Any:
    return dataset if limit is None or len(dataset) <= limit else dataset.select(np.arange(limit))


def _load_as_trl(args: Arguments, job: Job, wants_evaluation: bool) -> Data:
    """What TRL's own script does with ``datasets`` and ``dataset_name``, and nothing else."""
    import datasets
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
    from trl import get_dataset

    script = args.script
    key = "datasets" if args.datasets.datasets else "dataset_name"
    files = _local_files(job)
    states = [file_state(file["url"]) for file in files]
    if files:  # datasets knows a file by its name and time; this folder is of these contents
        contents = fingerprint([[Path(file["url"]).name, file["sha256"]] for file in files])
        datasets.config.HF_DATASETS_CACHE = Path(job.cache) / "by-content" / contents[:24]
    try:
        if args.datasets.datasets:
            np.random.seed(args.training.seed)  # test_split_size takes its rows by this; a resume must get the same
            found = get_dataset(args.datasets)
        else:
            found = load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)
    except (DatasetNotFoundError, DatasetGenerationError, FileNotFoundError, ValueError) as error:
        raise InputError(job.config_path, f"cannot be loaded: {error.__cause__ or error}", key=key) from error
    for file, state in zip(files, states, strict=True):
        if file_state(file["url"]) != state:
            raise InputError(file["url"], "was changed while it was read", remedy="try again once nobody writes to it")
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


def _local_files(job: Job) -> list[dict[str, Any]]:
    """The local files that TRL's own keys name, with their hashes. Raises InputError if the record has others."""
    found = [file for file in data_files(job.config, job.config_path) if "sha256" in file]
    recorded = [file for file in job.data_files if "sha256" in file]
    for file, known in zip(found, recorded, strict=False):
        if file["sha256"] != known["sha256"]:
            what = "is not the file that the run was submitted with: its sha256 differs"
            raise InputError(file["url"], what, remedy="put it back, or submit a new run")
    return found
