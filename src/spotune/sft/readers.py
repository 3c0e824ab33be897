"""Reads data files as blocks of rows, in bounded memory: JSON lines, a JSON list, CSV, Parquet and Arrow.

Arrow reads a block at once if it can, with the types that the format gives. If a row is odd or wrong, the same block is
read row by row. That names the row, and keeps what only some rows have.
"""

import csv
import gzip
import io
import json
import sys
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from spotune.core.errors import InputError
from spotune.core.fingerprint import is_lfs_pointer, kind_of
from spotune.sft.rows import OPTIONAL, PLAIN, Chunk, Columns, RowError, chunk_of, plain_chunk

BLOCK_BYTES = 4 << 20
BLOCK_ROWS = 10_000
_BOM = b"\xef\xbb\xbf"
_JSON_REMEDY = "one JSON object per line, or one list of objects"


@dataclass(frozen=True)
class Block:
    first_row: int  # its number in the file, from 1
    table: pa.Table | pa.RecordBatch | None  # the rows as Arrow read them, None if it could not
    rows: Callable[[], Iterator[tuple[int, Any]]]  # (number, row) pairs; raises RowError for bytes that are not a row
    size: int = 0  # the bytes of the rows in the file, about

    def chunk(self, columns: Columns) -> Chunk:
        """Returns the rows as Arrow columns of the format. Raises RowError for the first row that does not fit."""
        found = plain_chunk(self.table, columns, self.first_row) if self.table is not None else None
        return found or chunk_of(self.rows(), columns)


class Reader:
    """Reads a data file. Subclasses define how."""

    names: list[str]  # its columns; for JSON those of its first row
    has_rows: bool

    def _tables(self, wanted: list[str]) -> Iterator[Any]:
        """Yields the rows as Arrow tables of the ``wanted`` columns, of any length."""
        raise NotImplementedError

    def blocks(self, columns: Columns) -> Iterator[Block]:
        """Yields the rows in their order. Raises RowError, OSError and pyarrow's errors."""
        number = 1
        for table in self._tables(self._wanted(columns)):
            for start in range(0, table.num_rows, BLOCK_ROWS):
                part = table.slice(start, BLOCK_ROWS)
                yield Block(number, part, partial(_table_rows, part, number), part.nbytes)
                number += part.num_rows

    def _wanted(self, columns: Columns) -> list[str]:
        return [name for name in dict.fromkeys((*columns.names.values(), *OPTIONAL)) if name in self.names]


def open_file(file: str, url: str) -> Reader:
    """Returns the reader for a local file's ending; ``url`` is its origin, for messages.

    Raises InputError for a Git LFS pointer or a wrong ending, OSError if the file cannot be read.
    """
    kind, compression = kind_of(file) or ("", "")
    if is_lfs_pointer(file):
        raise InputError(url, "is a Git LFS pointer, not the data", remedy="git lfs pull")
    if kind == "json":
        return JsonReader(lambda: open_bytes(file, compression))
    if kind == "csv":
        return CsvReader(lambda: open_bytes(file, compression))
    if kind in ("parquet", "arrow"):
        if compression:
            with open_bytes(file, compression) as data:
                source = pa.BufferReader(data.read())
        else:
            source = pa.memory_map(file)
        return ParquetReader(source) if kind == "parquet" else ArrowReader(source)
    raise InputError(url, "is not a data file by its name", remedy="see data: in docs/reference/config.md")


def open_bytes(file: str, compression: str) -> IO[bytes]:
    if compression == "gzip":
        return gzip.open(file, "rb")  # type: ignore[return-value]
    if compression == "zstd":
        return io.BufferedReader(_Stream(pa.CompressedInputStream(pa.OSFile(file), "zstd")), BLOCK_BYTES)
    return open(file, "rb")


class _Stream(io.RawIOBase):
    """Wraps a stream of Arrow or Python and counts its quotes."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.quotes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self.quotes += data.count(b'"')
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


def spoilt(error: BaseException) -> bool:
    """Returns whether a reader's error means that the bytes do not fit the file's name."""
    if isinstance(error, OSError) and error.errno is None:
        return True  # gzip's and Arrow's; a disk's faults have a number
    return isinstance(error, (EOFError, zlib.error, pa.ArrowInvalid, pa.ArrowNotImplementedError, csv.Error))


class JsonReader(Reader):
    """JSON lines, or one JSON list of objects."""

    def __init__(self, open: Callable[[], IO[bytes]]) -> None:
        self._open = open
        self._list: list[Any] | None = None
        self.first: Any = None
        number, head = 1, b""
        with open() as data:
            for at, line in enumerate(data, 1):
                if line.removeprefix(_BOM).strip():
                    number, head = at, line.removeprefix(_BOM)
                    break
        self.has_rows = bool(head)
        if head.lstrip().startswith(b"["):
            self._list = self._as_list()
        if self._list is not None:
            self.has_rows = bool(self._list)
            self.first = self._list[0] if self._list else None
        elif head:
            self.first = next(row for _, row in self._parse(head, number))
        if self.has_rows and not isinstance(self.first, Mapping):
            raise RowError(number, "not an object with named columns")
        self.names = list(self.first) if self.has_rows else []

    def _as_list(self) -> list[Any] | None:
        """Returns the rows of a file that is one list; None if each line is a list."""
        with self._open() as data:
            text = data.read().removeprefix(_BOM)
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            if error.msg == "Extra data":
                return None
            raise RowError(error.lineno, f"not JSON: {error}", _JSON_REMEDY) from error
        except (UnicodeDecodeError, RecursionError) as error:
            raise RowError(1, f"not JSON: {error}") from error
        return found if isinstance(found, list) else None

    def blocks(self, columns: Columns) -> Iterator[Block]:
        if self._list is not None:
            for start in range(0, len(self._list), BLOCK_ROWS):
                rows = self._list[start : start + BLOCK_ROWS]
                yield Block(start + 1, None, partial(enumerate, rows, start + 1))
            return
        names = dict.fromkeys(columns.names.values())
        # The types that the format gives. A prompt or a completion has the first row's type.
        schema = pa.schema([(name, PLAIN if isinstance(self.first.get(name), list) else pa.string()) for name in names])
        number = 1
        for block in self._lines():
            yield Block(number, _read_json(block, schema), partial(self._parse, block, number), len(block))
            number += block.count(b"\n")

    def _lines(self) -> Iterator[bytes]:
        """Yields whole lines, about BLOCK_BYTES at a time; a longer line comes whole."""
        with self._open() as data:
            rest = [data.read(len(_BOM)).removeprefix(_BOM)]
            while piece := data.read(BLOCK_BYTES):
                end = piece.rfind(b"\n") + 1
                if not end:
                    rest.append(piece)
                    continue
                yield b"".join([*rest, piece[:end]])
                rest = [piece[end:]]
            if last := b"".join(rest):
                yield last + b"\n"

    def _parse(self, block: bytes, number: int) -> Iterator[tuple[int, Any]]:
        for at, line in enumerate(block.split(b"\n"), number):
            if not line.strip():
                continue
            try:
                yield at, json.loads(line.decode())
            except UnicodeDecodeError as error:
                raise _not_utf8(at, error.object[error.start]) from error
            except (ValueError, RecursionError) as error:
                raise RowError(at, f"not JSON: {error}", _JSON_REMEDY) from error


def _read_json(block: bytes, schema: pa.Schema) -> pa.Table | None:
    """Returns the lines by Arrow's parser, which needs one object a line and no key twice; None for anything odd.

    Infers keys that the schema lacks, so that a message with more keys is found.
    """
    try:
        table = pa.json.read_json(
            pa.BufferReader(block),
            read_options=pa.json.ReadOptions(use_threads=False, block_size=len(block) + 1),
            parse_options=pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="infer"),
        )
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OverflowError):
        return None
    # Each line must begin an object, else a blank line would hide a line with two.
    lines = block.count(b"\n{") + block.startswith(b"{")
    return table if table.num_rows == lines == block.count(b"\n") else None


class CsvReader(Reader):
    """Comma-separated text with a header. Every cell is text."""

    def __init__(self, open: Callable[[], IO[bytes]]) -> None:
        self._open = open
        with open() as data, closing(self._records(data)) as records:
            self.names, first = next(records, []), next(records, [])
        self.has_rows = bool(first)
        if twice := [name for name in dict.fromkeys(self.names) if self.names.count(name) > 1]:
            raise RowError(0, f"the header has {twice[0]!r} twice")

    def blocks(self, columns: Columns) -> Iterator[Block]:
        done = 0
        try:
            for table in self._tables(self._wanted(columns)):
                yield Block(done + 1, table, partial(_table_rows, table, done + 1), table.nbytes)
                done += table.num_rows
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # a cell that is longer than a block, or a wrong row
            yield from self._blocks_by_row(done)

    def _tables(self, wanted: list[str]) -> Iterator[pa.RecordBatch]:
        with self._open() as data:
            counted = _Stream(data)
            reader = pa.csv.open_csv(
                counted,  # Arrow holds some thirty blocks
                read_options=pa.csv.ReadOptions(use_threads=False, block_size=1 << 20),
                parse_options=pa.csv.ParseOptions(newlines_in_values=True),
                convert_options=pa.csv.ConvertOptions(
                    include_columns=wanted,
                    column_types=dict.fromkeys(wanted, pa.string()),
                    strings_can_be_null=False,
                ),
            )
            yield from (batch for batch in reader if batch.num_rows)
        if counted.quotes % 2:  # Arrow takes the rest of the file into a cell whose quote is not closed
            with self._open() as data, closing(self._records(data)) as records:
                deque(records, maxlen=0)

    def _blocks_by_row(self, skip: int) -> Iterator[Block]:
        """Yields the rows after the first ``skip``, by Python's reader."""
        with self._open() as data, closing(self._records(data)) as records:
            next(records, None)
            rows, size = [], 0
            for number, cells in enumerate(records, 1):
                if number <= skip:
                    continue
                if len(cells) != len(self.names):
                    raise RowError(number, f"has {len(cells)} cells, but the header has {len(self.names)}")
                rows.append((number, dict(zip(self.names, cells, strict=True))))
                size += sum(map(len, cells))
                if size >= BLOCK_BYTES:
                    yield Block(rows[0][0], None, partial(iter, rows), size)
                    rows, size = [], 0
            if rows:
                yield Block(rows[0][0], None, partial(iter, rows), size)

    @staticmethod
    def _records(data: IO[bytes]) -> Generator[list[str], None, None]:
        """Yields the header and the rows, each a list of cells. Skips empty lines. Raises RowError."""
        csv.field_size_limit(sys.maxsize)
        text = io.TextIOWrapper(data, "utf-8-sig", errors="surrogateescape", newline="")
        try:
            number = 0
            for cells in csv.reader(text, strict=True):
                if not cells:
                    continue
                for cell in cells:
                    if not cell.isascii():
                        cell.encode()
                yield cells
                number += 1
        except UnicodeEncodeError as error:
            raise _not_utf8(number, ord(error.object[error.start]) - 0xDC00) from error
        except csv.Error as error:
            what = "a quote is not closed" if "end of data" in str(error) else str(error)
            raise RowError(number, f"not CSV: {what}") from error
        finally:
            text.detach()


def _not_utf8(row: int, byte: int) -> RowError:
    return RowError(row, f"not UTF-8: it holds the byte {byte:#04x}", "save the file as UTF-8")


class ParquetReader(Reader):
    def __init__(self, source: Any) -> None:
        self._file = pa.parquet.ParquetFile(source)
        self.names = self._file.schema_arrow.names
        self.has_rows = self._file.metadata.num_rows > 0

    def _tables(self, wanted: list[str]) -> Iterator[pa.RecordBatch]:
        facts = self._file.metadata
        groups = [facts.row_group(at) for at in range(facts.num_row_groups)]
        widest = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=1.0)
        rows = int(max(1, min(BLOCK_ROWS, BLOCK_BYTES * 4 // max(1.0, widest))))
        yield from self._file.iter_batches(rows, columns=wanted, use_threads=False)


class ArrowReader(Reader):
    """An Arrow file, also Feather, or a stream that ``datasets`` wrote."""

    def __init__(self, source: Any) -> None:
        try:
            self._file = pa.ipc.open_file(source)
            self._count = self._file.num_record_batches
        except pa.ArrowInvalid:
            source.seek(0)
            self._file, self._count = pa.ipc.open_stream(source), None
        self.names = self._file.schema.names
        self.has_rows = True  # a file without rows has no blocks

    def _tables(self, wanted: list[str]) -> Iterator[pa.RecordBatch]:
        batches = (self._file.get_batch(at) for at in range(self._count)) if self._count is not None else self._file
        yield from (batch.select(wanted) for batch in batches)


class HubReader(Reader):
    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self.names = dataset.column_names
        self.has_rows = len(dataset) > 0

    def _tables(self, wanted: list[str]) -> Iterator[pa.Table]:
        yield from self._dataset.select_columns(wanted).with_format("arrow").iter(BLOCK_ROWS)


def _table_rows(table: Any, number: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number, row) pairs of a table. A row does not have a key that is null in a struct."""
    names = table.schema.names
    columns = [table.column(name) for name in names]
    for at in range(table.num_rows):
        try:
            values = [_without_nulls(column[at].as_py()) for column in columns]
        except UnicodeDecodeError as error:
            raise RowError(number + at, "not UTF-8") from error
        yield number + at, dict(zip(names, values, strict=True))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None or key == "content"}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
