"""What the run trains on and is evaluated on: ``data:``, or TRL's own ``datasets`` and ``dataset_name``.

``load_data`` is the seam: whatever reads and mixes behind it (later also streamed), the trainer gets
data sets of rows in one of TRL's formats.
"""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from spotune.core.data_files import changed_while_read, file_state, not_as_submitted, notices
from spotune.core.errors import InputError
from spotune.core.fingerprint import data_files
from spotune.core.machine_faults import is_machine_fault
from spotune.core.protocol import Job
from spotune.core.records import fingerprint
from spotune.sft.arguments import Arguments
from spotune.sft.mixture import Origins, counts, distinct, divide, interleave, joined
from spotune.sft.sources import Source, dataset_of, one_layout, read_all, twins


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
    text_field, cache = args.training.dataset_text_field, Path(job.cache)
    sources = [
        Source(entry, job.config_path, f"data[{at}]", text_field, _recorded(job, str(entry["source"])))
        for at, entry in enumerate(entries)
    ]
    reads = [read_all(source, cache) for source in sources]
    layout = one_layout([read for inside in reads for read in inside])
    datasets = [dataset_of(inside, layout, cache) for inside in reads]
    _say([*notices(entries, job.config_path), *twins([read.part for inside in reads for read in inside])])
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


def _recorded(job: Job, source: str) -> list[dict[str, Any]]:
    """The facts of a source's files in the run's record; an entry that is there twice has the same ones."""
    return list({file["url"]: file for file in job.data_files if file.get("source") == source}.values())


def _say(lines: list[str]) -> None:
    """Prints what people may not have meant, once for all ranks."""
    if os.environ.get("RANK", "0") == "0":
        for line in lines:
            print(f"[spotune] data: {line}", file=sys.stderr)


Part = tuple[Any, Origins]  # a data set, and where its rows come from


def _held_out(source: Source, dataset: Any, origins: Origins, seed: int) -> tuple[Part, Part | None]:
    count = source.held_out(len(dataset))
    if not count:
        return (dataset, origins), None
    kept, out = divide(len(dataset), count, seed)
    return (dataset.select(kept), origins.select(kept)), (dataset.select(out), origins.select(out))


def _first(dataset: Any, limit: int | None) -> Any:
    return dataset if limit is None or len(dataset) <= limit else dataset.select(np.arange(limit))


def _load_as_trl(args: Arguments, job: Job, wants_evaluation: bool) -> Data:
    """What TRL's own script does with ``datasets`` and ``dataset_name``, and nothing else."""
    import datasets
    from datasets import load_dataset
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
    except Exception as error:  # only what the config names is read here
        if is_machine_fault(error):
            raise
        _reach(args.datasets.datasets)
        raise InputError(job.config_path, f"cannot be loaded: {error.__cause__ or error}", key=key) from error
    for file, state in zip(files, states, strict=True):
        if file_state(file["url"]) != state:
            raise changed_while_read(file["url"])
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


def _local_files(job: Job) -> list[dict[str, Any]]:
    """The local files that TRL's own keys name, with their hashes. Raises InputError if the record has others."""
    found = [file for file in data_files(job.config, job.config_path) if "sha256" in file]
    recorded = [file for file in job.data_files if "sha256" in file]
    for file, known in zip(found, recorded, strict=False):
        if file["sha256"] != known["sha256"]:
            raise not_as_submitted(file["url"], "sha256")
    return found
