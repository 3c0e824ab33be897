"""Checks the rows of each format and turns them into Arrow columns.

messages           messages: [{role, content}, ...]; ShareGPT's {from, value} is read as {role, content}
prompt_completion  prompt and completion: both text, or both lists of messages
text               text

The format decides a column's type, never the values: text stays text, whatever it looks like. Messages with only the
keys ``role`` and ``content`` are Arrow structs. If some have more keys (tool calls, names, reasoning), each message is
JSON text, which ``datasets`` decodes: a chat template gets the keys that the row has, and no others.
"""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
OPTIONAL = ("tools", "chat_template_kwargs")  # columns for the chat template, in rows that have them
REMEDIES = {
    "messages": 'each row {"messages": [{"role": "user", "content": "…"}, …]}',
    "prompt_completion": 'each row {"prompt": "…", "completion": "…"}',
    "text": 'each row {"text": "…"}',
}
TEXT, MESSAGES = "text", "a list of {role, content}"  # the kinds of a column, as messages name them
PLAIN = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
AS_JSON = pa.list_(pa.json_())
_TRL_NAMES = {"from": "role", "value": "content"}  # as TRL's maybe_convert_to_chatml renames them


class RowError(ValueError):
    """A row does not fit. ``row`` is its number in the file, or its line's in JSON lines, from 1.

    An empty ``remedy`` means: write rows as the format needs them.
    """

    def __init__(self, row: int, what: str, remedy: str = "") -> None:
        super().__init__(f"row {row}: {what}")
        self.row, self.what, self.remedy = row, what, remedy


@dataclass(frozen=True)
class Columns:
    """The columns to read of a file."""

    format: str  # a key of FORMATS
    names: Mapping[str, str]  # our name -> the file's name, for the columns that the format needs


@dataclass(frozen=True)
class RowLayout:
    """The Arrow types of the columns that some or all rows need."""

    kinds: Mapping[str, str] = field(default_factory=dict)  # our name -> TEXT or MESSAGES
    has_json: bool = False  # some message has other keys than role and content
    optional: frozenset[str] = frozenset()  # the columns of OPTIONAL that some row has

    def __or__(self, other: "RowLayout") -> "RowLayout":
        """Returns the layout that holds both; columns of both must have the same kind."""
        kinds = {**self.kinds, **other.kinds}
        return RowLayout(kinds, self.has_json or other.has_json, self.optional | other.optional)

    def schema(self) -> pa.Schema:
        messages = AS_JSON if self.has_json else PLAIN
        needed = [(name, pa.string() if kind == TEXT else messages) for name, kind in self.kinds.items()]
        return pa.schema([*needed, *((name, pa.json_()) for name in OPTIONAL if name in self.optional)])


@dataclass(frozen=True)
class Chunk:
    """Rows as Arrow columns under our names, in the narrowest layout that holds them."""

    arrays: Mapping[str, pa.Array]
    layout: RowLayout
    rows: int
    first_row: int  # its number in the file, from 1

    def batch(self, layout: RowLayout) -> pa.RecordBatch:
        schema = layout.schema()
        return pa.record_batch([self._column(one.name, one.type) for one in schema], schema=schema)

    def _column(self, name: str, kind: pa.DataType) -> pa.Array:
        array = self.arrays.get(name)
        if array is None:
            return _optional_array(name, [None] * self.rows)
        if array.type == kind:
            return array
        return _messages_array([[_dumps(message) for message in talk] for talk in array.to_pylist()])


def format_of(names: Iterable[str], columns: Mapping[str, str], text_field: str) -> str | None:
    """Returns the first format whose columns a file has, else None; ``columns`` maps our names to the file's."""
    present = set(names)
    for format in FORMATS:
        if all(theirs in present for theirs in columns_of(format, present, columns, text_field).names.values()):
            return format
    return None


def columns_of(format: str, names: Iterable[str], columns: Mapping[str, str], text_field: str) -> Columns:
    needed = (text_field,) if format == "text" else FORMATS[format]
    found = {ours: columns.get("text" if format == "text" else ours, ours) for ours in needed}
    if format == "messages" and "messages" not in columns and "messages" not in names and "conversations" in names:
        found["messages"] = "conversations"  # ShareGPT
    return Columns(format, found)


def plain_chunk(table: pa.Table, columns: Columns, first_row: int) -> Chunk | None:
    """Returns the rows of a table at once; None if each row must be checked alone.

    That is so if a row does not fit, a message has more than role and content, or Arrow cannot cast a type.
    """
    if any(name in table.column_names and table[name].null_count < table.num_rows for name in OPTIONAL):
        return None
    arrays: dict[str, pa.Array] = {}
    kinds: dict[str, str] = {}
    try:
        table.validate(full=True)  # the readers of JSON and Parquet do not check that text is UTF-8
        for ours, theirs in columns.names.items():
            column = table[theirs]
            array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
            if isinstance(array, pa.ChunkedArray):
                array = pa.concat_arrays(array.chunks)
            found = _plain_text(ours, array) if _is_text(array.type) else _plain_messages(ours, array)
            if found is None:
                return None
            arrays[ours], kinds[ours] = found, TEXT if found.type == pa.string() else MESSAGES
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, KeyError):
        return None
    expected = {"messages": {MESSAGES}, "text": {TEXT}}.get(columns.format)
    if len(set(kinds.values())) > 1 or (expected and set(kinds.values()) != expected):
        return None
    return Chunk(arrays, RowLayout(kinds), table.num_rows, first_row)


def _is_text(kind: pa.DataType) -> bool:
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(inner) or pa.types.is_large_string(inner) or pa.types.is_string_view(inner))


def _plain_text(name: str, array: pa.Array) -> pa.Array | None:
    array = array.cast(pa.string())
    if array.null_count or (name != "prompt" and _has(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(array)), 0))):
        return None
    return array


def _plain_messages(name: str, array: pa.Array) -> pa.Array | None:
    inner = getattr(array.type, "value_type", None)
    if inner is None or not pa.types.is_struct(inner) or {one.name for one in inner} != {"role", "content"}:
        return None
    if not all(_is_text(one.type) for one in inner) or array.null_count:
        return None
    array = array.cast(PLAIN)
    flat, lengths = array.flatten(), pc.list_value_length(array)
    roles, contents = flat.field("role"), flat.field("content")
    if flat.null_count or roles.null_count or contents.null_count:
        return None
    if _has(pc.equal(lengths, 0)):
        return None
    # The messages of a row are all empty if the text up to its end is as long as the text up to its start.
    lengths_so_far = pc.cumulative_sum(pc.utf8_length(contents).cast(pa.int64()))
    ends = pc.cumulative_sum(lengths.cast(pa.int64()))
    upto = lengths_so_far.take(pc.subtract(ends, 1))
    before = pa.concat_arrays([pa.array([0], pa.int64()), upto[:-1]]) if len(upto) else upto
    return None if _has(pc.equal(upto, before)) else array


def _has(mask: pa.Array) -> bool:
    return bool(pc.any(mask).as_py())


def chunk_of(rows: Iterable[tuple[int, Any]], columns: Columns) -> Chunk:
    """Checks (number, row) pairs and returns them as a chunk. Raises RowError for the first that does not fit."""
    values: dict[str, list[Any]] = {ours: [] for ours in (*columns.names, *OPTIONAL)}
    numbers: list[int] = []
    kinds: dict[str, str] = {}
    for number, row in rows:
        try:
            _take(row, columns, values, kinds, numbers)
        except ValueError as error:
            raise RowError(number, str(error)) from error
        numbers.append(number)
    has_json = any(
        message.keys() != {"role", "content"} or not isinstance(message["content"], str)
        for ours, kind in kinds.items()
        if kind == MESSAGES
        for talk in values[ours]
        for message in talk
    )
    optional = frozenset(name for name in OPTIONAL if any(value is not None for value in values[name]))
    layout = RowLayout(kinds, has_json, optional)
    try:
        arrays = {ours: _array(ours, values[ours], layout) for ours in (*columns.names, *optional)}
    except UnicodeEncodeError:
        raise _half_character(numbers, values) from None
    return Chunk(arrays, layout, len(numbers), numbers[0] if numbers else 1)


def _take(
    row: Any, columns: Columns, values: Mapping[str, list[Any]], kinds: dict[str, str], numbers: list[int]
) -> None:
    """Adds a row's values. Raises ValueError with what is wrong with the row."""
    if not isinstance(row, Mapping):
        raise ValueError("not an object with named columns")
    taken: dict[str, Any] = {}
    for ours, theirs in columns.names.items():
        value = row.get(theirs)
        if value is None:
            raise ValueError(f"{theirs} is missing")
        taken[ours] = _value(ours, theirs, value, columns.format)
    found = {ours: TEXT if isinstance(value, str) else MESSAGES for ours, value in taken.items()}
    if len(set(found.values())) > 1:
        what = " and ".join(f"{columns.names[ours]} is {kind}" for ours, kind in found.items())
        raise ValueError(f"{what}: both must be text, or both lists of messages")
    for ours, kind in found.items():
        if kinds.setdefault(ours, kind) != kind:
            raise ValueError(f"{columns.names[ours]} is {kind}, but {kinds[ours]} in row {numbers[0]}")
    for name in OPTIONAL:
        values[name].append(_optional(name, row.get(name)))
    for ours, value in taken.items():
        values[ours].append(value)


def _value(ours: str, theirs: str, value: Any, format: str) -> Any:
    if format == "messages" and isinstance(value, str):
        parsed = _parsed(value) if value.lstrip().startswith("[") else None  # a CSV cell, or a column of JSON text
        value = parsed if isinstance(parsed, list) else value
    if isinstance(value, str):
        if format == "messages":
            raise ValueError(f"{theirs} is text, not {MESSAGES}")
        if ours != "prompt" and not value.strip():
            raise ValueError(f"{theirs} is empty")
        return value
    if format == "text" or not isinstance(value, Sequence):
        wanted = MESSAGES if format == "messages" else "text"
        raise ValueError(f"{theirs} is {_type_name(value)}, not {wanted}")
    if not value:
        raise ValueError(f"{theirs} is empty")
    talk = [_message(theirs, message) for message in value]
    if not any(message.get("content") or len(message) > 2 for message in talk):
        raise ValueError(f"the messages in {theirs} are empty")
    return talk


def _message(name: str, message: Any) -> dict[str, Any]:
    """Returns a message under TRL's names, without keys that are null: they mean the same as missing keys."""
    if isinstance(message, str):
        message = _parsed(message)
    if not isinstance(message, Mapping):
        raise ValueError(f"{name} is not {MESSAGES}")
    found = {_TRL_NAMES.get(key, key): value for key, value in message.items() if value is not None or key == "content"}
    if not isinstance(found.get("role"), str):
        has_role = found.get("role") is not None
        raise ValueError(f"{name} is not {MESSAGES}" if has_role else f"a message in {name} has no role")
    content = found.get("content")
    if content is None and not (found.get("tool_calls") or found.get("function_call")):  # a call needs no text
        raise ValueError(f"a message in {name} has no content")
    if not isinstance(content, (str, list, type(None))):
        raise ValueError(f"content is {_type_name(content)}, not text")
    return found


def _parsed(text: str) -> Any:
    """Returns what a text is the JSON of, else the text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _optional(name: str, value: Any) -> Any:
    """Returns a value of an optional column; JSON text is parsed, as TRL does with ``tools``."""
    if isinstance(value, str):
        value = _parsed(value) if value.strip() else None
    kind, named = (list, "a list of tools") if name == "tools" else (Mapping, "a mapping of names to values")
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{name} is {_type_name(value)}, not {named}")
    return value


def _array(name: str, values: list[Any], layout: RowLayout) -> pa.Array:
    if name in OPTIONAL:
        return _optional_array(name, values)
    if layout.kinds.get(name, TEXT) == TEXT:
        return pa.array(values, pa.string())
    if layout.has_json:
        return _messages_array([[_dumps(message) for message in talk] for talk in values])
    return pa.array(values, PLAIN)


def _messages_array(talks: list[list[str]]) -> pa.Array:
    flat = pa.array([text for talk in talks for text in talk], pa.string())
    offsets = [0, *itertools.accumulate(map(len, talks))]
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat.cast(pa.json_()), type=AS_JSON)


def _optional_array(name: str, values: list[Any]) -> pa.Array:
    # TRL passes chat_template_kwargs on to a call: none are an empty mapping.
    empty = "{}" if name == "chat_template_kwargs" else None
    texts = [empty if value is None else _dumps(value) for value in values]
    return pa.array(texts, pa.string()).cast(pa.json_())


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _half_character(numbers: Sequence[int], values: Mapping[str, Sequence[Any]]) -> RowError:
    """Returns the error for the first row with half of a surrogate pair, which UTF-8 text cannot hold."""
    for at, number in enumerate(numbers):
        for column in values.values():
            try:
                _dumps(column[at]).encode() if at < len(column) else None
            except UnicodeEncodeError:
                return RowError(number, "holds half of a character (a lone surrogate), which is not text")
    raise AssertionError("a value that cannot be encoded is in some row")


def _type_name(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(map(str, value)) + "}"
    return "a list" if isinstance(value, list) else type(value).__name__
