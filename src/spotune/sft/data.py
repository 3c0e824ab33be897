"""What the run trains on and is evaluated on: ``data:``, or TRL's own ``datasets`` and ``dataset_name``.

``load_data`` is the seam: whatever reads and mixes behind it (later also streamed), the trainer gets
data sets of rows in one of TRL's formats.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from spotune.contracts.errors import InputError
from spotune.contracts.exchange import Job
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
    loaded = [load(source) for source in sources]
    formats = list(dict.fromkeys(format for _, format in loaded))
    if len(formats) > 1:
        remedy = "give all of them one format; columns: maps names"
        raise InputError(
            job.config_path, f"the sources have different formats: {', '.join(formats)}", key="data", remedy=remedy
        )
    datasets = _aligned([dataset for dataset, _ in loaded], job.config_path)
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


def _aligned(datasets: list[Any], where: str) -> list[Any]:
    """The same columns and types in all: a message has the fields that any source's messages have."""
    import pyarrow as pa
    from datasets import Features

    wanted: dict[str, pa.DataType] = {}
    for dataset in datasets:
        for field in dataset.features.arrow_schema:
            wanted[field.name] = _united(wanted.get(field.name), field.type)
    schema = pa.schema(list(wanted.items()))
    features = Features.from_arrow_schema(schema)
    try:
        return [_cast(dataset, features, schema) for dataset in datasets]
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise InputError(where, f"the sources' columns differ in kind: {error}", key="data") from error


def _cast(dataset: Any, features: Any, schema: Any) -> Any:
    if dataset.features == features:
        return dataset
    options = {"fn_kwargs": {"schema": schema}, "features": features, "remove_columns": dataset.column_names}
    return dataset.with_format("arrow").map(_fit, batched=True, **options).with_format(None)


def _united(known: Any, new: Any) -> Any:
    import pyarrow as pa

    if known is None or pa.types.is_null(known):
        return new
    if pa.types.is_list(known) and pa.types.is_list(new):
        return pa.list_(_united(known.value_type, new.value_type))
    if pa.types.is_struct(known) and pa.types.is_struct(new):
        fields = {field.name: field.type for field in known}
        for field in new:
            fields[field.name] = _united(fields.get(field.name), field.type)
        return pa.struct(list(fields.items()))
    return known


def _fit(table: Any, schema: Any) -> Any:
    """An Arrow table with the schema's columns; ones that it lacks are null."""
    import pyarrow as pa

    columns = []
    for field in schema:
        if field.name in table.column_names:
            columns.append(_fit_array(table[field.name].combine_chunks(), field.type))
        else:
            columns.append(pa.nulls(table.num_rows, field.type))
    return pa.table(columns, schema=schema)


def _fit_array(array: Any, kind: Any) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    if array.type == kind:
        return array
    if pa.types.is_list(kind) and pa.types.is_list(array.type):
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        inner = _fit_array(pc.list_flatten(array), kind.value_type)
        return pa.ListArray.from_arrays(pa.array(offsets), inner, type=kind, mask=pc.is_null(array))
    if pa.types.is_struct(kind) and pa.types.is_struct(array.type):
        present = {field.name for field in array.type}
        parts = []
        for field in kind:
            known = pc.struct_field(array, field.name) if field.name in present else pa.nulls(len(array))
            parts.append(_fit_array(known, field.type))
        return pa.StructArray.from_arrays(parts, fields=list(kind), mask=pc.is_null(array))
    return array.cast(kind)


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
