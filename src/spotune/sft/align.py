"""Data sets with the same columns and types, so that they can be laid end to end."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spotune.contracts.errors import InputError


def concatenate(datasets: list[Any], where: str) -> Any:
    """The data sets end to end, aligned."""
    from datasets import concatenate_datasets

    return datasets[0] if len(datasets) == 1 else concatenate_datasets(aligned(datasets, where))


def aligned(datasets: list[Any], where: str) -> list[Any]:
    """The same columns and types in all: a message has the fields that any source's messages have."""
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
    columns = []
    for field in schema:
        if field.name in table.column_names:
            columns.append(_fit_array(table[field.name].combine_chunks(), field.type))
        else:
            columns.append(pa.nulls(table.num_rows, field.type))
    return pa.table(columns, schema=schema)


def _fit_array(array: Any, kind: Any) -> Any:
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
