"""What a row must look like in each format: checked for all rows, column by column where Arrow can.

messages           messages: [{role, content}, ...]
prompt_completion  prompt and completion: text, or lists of {role, content}
text               text
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

MESSAGES = "a list of {role, content}"
OPTIONAL = ("tools", "chat_template_kwargs")
BATCH_ROWS = 10_000


@dataclass(frozen=True)
class Misfit:
    """The first row (from 0) that does not fit, and why; ``is_type``: the column's type is wrong as a whole."""

    row: int
    what: str
    is_type: bool = False


def columns_of(format: str, text_field: str = "text") -> tuple[str, ...]:
    """The columns that a format needs."""
    return {"messages": ("messages",), "prompt_completion": ("prompt", "completion")}.get(format, (text_field,))


def find_misfit(dataset: Any, format: str, text_field: str) -> Misfit | None:
    """Checks every row of a data set. Raises ValueError for text that is not UTF-8: JSON is read without a look."""
    start = 0
    for table in dataset.with_format("arrow").iter(BATCH_ROWS):
        table.validate(full=True)
        found = [_column_misfit(name, table[name], format) for name in columns_of(format, text_field)]
        misfits = [misfit for misfit in found if misfit]
        if misfits:
            first = min(misfits, key=lambda misfit: misfit.row)
            return Misfit(start + first.row, first.what, first.is_type)
        start += table.num_rows
    return None


def _column_misfit(name: str, column: pa.ChunkedArray, format: str) -> Misfit | None:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        return _messages_misfit(name, array) if format != "text" else Misfit(0, f"{name} is a list, not text", True)
    if format == "messages" or not (pa.types.is_string(array.type) or pa.types.is_large_string(array.type)):
        wanted = MESSAGES if format == "messages" else "text"
        return Misfit(0, f"{name} is {_type_name(array.type)}, not {wanted}", True)
    if (row := _first(pc.is_null(array))) is not None:
        return Misfit(row, f"{name} is missing")
    if name != "prompt" and (row := _first(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(array)), 0))) is not None:
        return Misfit(row, f"{name} is empty")
    return None


def _messages_misfit(name: str, array: pa.Array) -> Misfit | None:
    if (row := _first(pc.is_null(array))) is not None:
        return Misfit(row, f"{name} is missing")
    if name != "prompt" and (row := _first(pc.equal(pc.list_value_length(array), 0))) is not None:
        return Misfit(row, f"{name} is empty")
    inner = array.type.value_type
    if not pa.types.is_struct(inner) or not {"role", "content"} <= {field.name for field in inner}:
        return Misfit(0, f"{name} is a list of {_type_name(inner)}, not {MESSAGES}", True)
    flat, parents = pc.list_flatten(array), pc.list_parent_indices(array)
    roles, contents = pc.struct_field(flat, "role"), pc.struct_field(flat, "content")
    if not pa.types.is_string(roles.type) and len(flat):
        return Misfit(0, f"role is {_type_name(roles.type)}, not text", True)
    if (at := _first(pc.or_(pc.is_null(flat), pc.is_null(roles)))) is not None:
        return Misfit(parents[at].as_py(), f"a message in {name} has no role")
    if not pa.types.is_string(contents.type):  # parts of a multimodal message, or nothing but nulls
        is_parts = pa.types.is_list(contents.type)
        return None if is_parts else Misfit(0, f"content is {_type_name(contents.type)}, not text", True)
    lacking = pc.is_null(contents)
    if "tool_calls" in {field.name for field in inner}:
        lacking = pc.and_(lacking, pc.is_null(pc.struct_field(flat, "tool_calls")))
    if (at := _first(lacking)) is not None:
        return Misfit(parents[at].as_py(), f"a message in {name} has no content")
    return _first_silent(name, array, parents, contents)


def _first_silent(name: str, array: pa.Array, parents: pa.Array, contents: pa.Array) -> Misfit | None:
    """The first row all of whose messages are empty."""
    lengths = pc.fill_null(pc.utf8_length(contents), 1).to_numpy(zero_copy_only=False)
    said = np.bincount(parents.to_numpy(zero_copy_only=False), weights=lengths, minlength=len(array))
    has_any = pc.list_value_length(array).to_numpy(zero_copy_only=False) > 0
    silent = np.flatnonzero((said == 0) & has_any)
    return Misfit(int(silent[0]), f"the messages in {name} are empty") if len(silent) else None


def _first(mask: pa.Array) -> int | None:
    at = pc.index(mask, True).as_py()
    return at if at >= 0 else None


def _type_name(kind: pa.DataType) -> str:
    if pa.types.is_null(kind):
        return "nothing"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text"
    if pa.types.is_struct(kind):
        return "{" + ", ".join(field.name for field in kind) + "}"
    return "a list" if pa.types.is_list(kind) else str(kind)


def check_row(row: Any, format: str, names: Mapping[str, str], text_field: str) -> str | None:
    """What is wrong with one row of JSON, None when it fits; ``names`` maps our columns to the file's."""
    if not isinstance(row, dict):
        return "not an object with named columns"
    if not format:
        return None
    for name in columns_of(format, text_field):
        theirs = names.get(name, name)
        if row.get(theirs) is None:
            return f"{theirs} is missing"
        if (fault := next(_value_faults(theirs, row[theirs], format), None)) is not None:
            return fault
    return None


def _value_faults(name: str, value: Any, format: str) -> Iterator[str]:
    if isinstance(value, str):
        if format == "messages":
            yield f"{name} is text, not {MESSAGES}"
    elif format == "text" or not isinstance(value, list):
        yield f"{name} is {type(value).__name__}, not {MESSAGES if format == 'messages' else 'text'}"
    else:
        for message in value:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                yield f"{name} is not {MESSAGES}"
            elif message.get("content") is None and not message.get("tool_calls"):
                yield f"a message in {name} has no content"
            elif not isinstance(message.get("content", ""), (str, list, type(None))):
                yield f"content is {type(message['content']).__name__}, not text"
