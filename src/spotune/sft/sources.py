"""Reads the entries of ``data:`` as data sets with the columns of their format, every row checked.

    file ─▶ its sha256 ─▶ is it the run record's? ─▶ rows in Arrow, kept by that sha256 ─▶ Dataset

This machine keeps rows by their content, never by a file's name and time: another file in its place is another content.

``python -m spotune.sft.sources`` checks the rows of local files for ``spotune check``, without torch. It reads a JSON
object from stdin, ``{"config": …, "config_path": …, "most_bytes": …}``, and prints another:
``{"rows": number of rows read, "partly": files not read to their end, "error": what does not fit, or ""}``.
"""

import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from spotune.core import fingerprint
from spotune.core.errors import InputError, SpotuneError, protect_output, shown
from spotune.core.protocol import read_json, write_json
from spotune.core.store.faults import is_machine_fault
from spotune.sft.readers import HubReader, Reader, open_bytes, open_file, spoilt
from spotune.sft.row_counts import held_out_count
from spotune.sft.rows import REMEDIES, Columns, RowError, RowLayout, columns_of, format_of

READER = 1  # part of the key of kept rows: another number reads everything again
ROWS = "rows"  # the folder of kept rows, below the cache


def fetch(url: str, cache: Path, where: str, key: str, checksum: str = "") -> str:
    """Returns the local path of a data file. Copies a store's file once, and anew when its checksum changes.

    A file is read twice, for its hash and its rows, so it is not streamed. A copy from a store without checksums (a
    plain web server) is not used again. ``checksum`` is the store's in the run's record, or empty. Raises InputError
    for a file that is missing, cannot be read, or has another checksum; StoreError if the store is away.
    """
    if not fingerprint.is_remote(url):
        return str(fingerprint.local_path(url.removeprefix("file://"), where, key))
    try:
        filesystem, path = fingerprint.open_store(url)
        facts = filesystem.info(path)
        found = fingerprint.checksum_of(facts)
        if checksum and found != checksum:
            raise fingerprint.not_as_submitted(url, "checksum in the store")
        folder = hashlib.sha256(f"{url}\n{found}\n{facts.get('size')}".encode()).hexdigest()[:24]
        target = cache / "sources" / folder / Path(path.split("?")[0]).name
        if found and target.exists() and target.stat().st_size == facts.get("size", target.stat().st_size):
            return str(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{os.getpid()}-{target.name}")  # ranks may fetch at the same time
        filesystem.get_file(path, str(part))
        if found and fingerprint.checksum_of(filesystem.info(path)) != found:
            raise fingerprint.changed_while_read(url)
        part.replace(target)
    except InputError:
        raise
    except FileNotFoundError as error:
        if is_machine_fault(error):  # fsspec raises this also for a web server that is away
            raise fingerprint.unreachable(url, where, key, error) from error
        raise InputError(where, f"no such file: {url}", key=key) from error
    except (PermissionError, ImportError) as error:
        raise InputError(where, f"cannot read {url}: {error}", key=key) from error
    except Exception as error:  # a store's client has errors of any class
        if isinstance(error, OSError) and error.errno is not None:
            raise  # this machine's disk
        raise fingerprint.unreachable(url, where, key, error) from error
    return str(target)


@dataclass(frozen=True)
class DataSource:
    entry: Mapping[str, Any]
    config_path: str
    key: str  # ``data[0]``, for messages
    text_field: str
    files: Sequence[Mapping[str, Any]] = ()  # of the run's record, in order: ``{url, size, sha256 | checksum}``

    @property
    def url(self) -> str:
        return str(self.entry["source"])

    def held_out(self, rows: int) -> int:
        """Returns how many of ``rows`` are held out. Raises InputError if none are left to train on."""
        split, limit = self.entry.get("split"), self.entry.get("limit")
        rows = min(rows, limit) if limit else rows
        count = held_out_count(rows, split) if split else 0
        if split and count >= rows:
            raise self.error(f"holds out {count} of {rows} rows, so that none are left to train on", key="split")
        return count

    def error(self, what: str, remedy: str = "", key: str = "") -> InputError:
        return InputError(self.config_path, what, key=f"{self.key}.{key}" if key else self.key, remedy=remedy)


@dataclass(frozen=True)
class Part:
    """One file of a source, or a whole data set of the hub."""

    source: DataSource
    url: str
    path: str  # on this machine; empty for the hub
    digest: str  # names the content
    state: tuple[int, ...] = ()  # the file's, before its hash was taken
    dataset: Any = None  # the hub's, else None

    def reader(self) -> Reader:
        return HubReader(self.dataset) if self.dataset is not None else open_file(self.path, self.url)


@dataclass(frozen=True)
class Read:
    """A part whose rows were read and fit."""

    part: Part
    columns: Columns
    layout: RowLayout  # the narrowest that holds the rows
    rows: int
    first_row: int  # its number in the file
    size: int = 0  # the bytes of the rows in the file, about
    is_whole: bool = True  # False if only the first blocks were read


def read_all(source: DataSource, cache: Path) -> list[Read]:
    """Reads the files of a source that have rows, and keeps the rows below ``cache``.

    Raises InputError, naming file and row, for what does not fit; StoreError, OSError and MemoryError for faults of the
    store or the machine.
    """
    reads = []
    for part in parts_of(source, cache):
        (cache / ROWS).mkdir(parents=True, exist_ok=True)
        with open(cache / ROWS / f"{_key(part)}.lock", "w") as lock:
            with suppress(OSError):  # a file system without locks: each rank reads for itself
                fcntl.flock(lock, fcntl.LOCK_EX)
            read = read_part(part, cache)
        reads += [read] if read else []
    if not reads:
        raise InputError(source.url, "has no rows")
    return reads


def dataset_of(reads: list[Read], layout: RowLayout, cache: Path) -> Any:
    from datasets import concatenate_datasets

    parts = [_dataset(read, layout, cache) for read in reads]
    whole = parts[0] if len(parts) == 1 else concatenate_datasets(parts)
    limit = reads[0].part.source.entry.get("limit")
    return whole.select(range(min(limit, len(whole)))) if limit else whole


def one_layout(reads: list[Read]) -> RowLayout:
    """Returns the layout that holds all rows. Raises InputError naming both files of a conflict."""
    layout, first = RowLayout(), reads[0]
    for read in reads:
        if read.columns.format != first.columns.format:
            formats = f"{first.columns.format}, {read.columns.format}"
            if first.part.source == read.part.source:
                what = f"has the columns of {read.columns.format}, but {first.part.url} those of {first.columns.format}"
                raise InputError(read.part.url, what, remedy="name one with format:")
            what = f"the sources have different formats: {formats} ({first.part.url} and {read.part.url})"
            remedy = "give all of them one format; columns: maps names"
            raise InputError(first.part.source.config_path, what, key="data", remedy=remedy)
        for name, kind in read.layout.kinds.items():
            if layout.kinds.get(name, kind) != kind:
                what = f"{name} is {kind}, but {layout.kinds[name]} in {first.part.url} (row {first.first_row})"
                raise InputError(read.part.url, what, key=f"row {read.first_row}", remedy="one kind for all rows")
        layout |= read.layout
    return layout


def twins(parts: list[Part]) -> list[str]:
    """Returns a line for each file that has the content of another file."""
    lines, seen = [], dict[str, Part]()
    for part in parts:
        first = seen.setdefault(part.digest, part)
        if first.url != part.url:
            lines.append(f"{first.url} and {part.url} are the same file, trained on twice")
    return lines


def parts_of(source: DataSource, cache: Path) -> Iterator[Part]:
    """Finds the source's files, brings them to this machine and takes their hashes."""
    if source.url.startswith("hf://") and not source.url.startswith("hf://datasets/"):
        dataset = _load_hub(source)
        yield Part(source, source.url, "", f"hub {dataset._fingerprint}", dataset=dataset)
        return
    key = f"{source.key}.source"
    urls = fingerprint.find_files(source.url, source.config_path, key).files
    if source.files and len(source.files) != len(urls):
        what = f"names {len(urls)} files, but the run was submitted with {len(source.files)}"
        raise InputError(source.url, what, remedy="put them back, or submit a new run")
    for url, recorded in zip(urls, source.files or [{}] * len(urls), strict=True):
        path = fetch(url, cache, source.config_path, key, str(recorded.get("checksum") or ""))
        try:
            state, facts = fingerprint.file_state(path), fingerprint.file_facts(Path(path))
        except (FileNotFoundError, PermissionError) as error:
            raise InputError(url, f"cannot be read: {error.strerror}") from error
        if recorded.get("sha256") not in (None, facts["sha256"]):
            raise fingerprint.not_as_submitted(url, "sha256")
        yield Part(source, url, path, str(facts["sha256"]), state)


def read_part(part: Part, cache: Path | None, most_bytes: int | None = None) -> Read | None:
    """Reads and checks a part's rows; None for a part without rows. Raises InputError.

    ``cache`` keeps the rows, if given. Else reading stops after about ``most_bytes``.
    """
    format = ""
    try:
        reader = part.reader()
        if not reader.has_rows:
            return None
        columns = _columns(part, reader)
        format = columns.format
        read = _recall(part, columns, cache) if cache else None
        read = read or _convert(part, reader, columns, RowLayout(), cache, most_bytes)
    except RowError as error:
        key = f"row {error.row}" if error.row else "header"
        raise InputError(part.url, error.what, key=key, remedy=error.remedy or REMEDIES.get(format, "")) from error
    except Exception as error:
        if spoilt(error) and not is_machine_fault(error):
            raise InputError(part.url, f"cannot be read: {error}") from error
        raise
    if part.state and part.state != fingerprint.file_state(part.path):
        raise fingerprint.changed_while_read(part.url)
    return read if read.rows else None


def _convert(
    part: Part, reader: Reader, columns: Columns, layout: RowLayout, cache: Path | None, most_bytes: int | None = None
) -> Read:
    """Checks each row of a part; with a cache, writes them in ``layout`` or the wider one that they need."""
    while True:
        found = _write(part, reader, columns, layout, cache, most_bytes)
        if isinstance(found, Read):
            return found
        layout = found


def _write(
    part: Part, reader: Reader, columns: Columns, layout: RowLayout, cache: Path | None, most_bytes: int | None
) -> Read | RowLayout:
    """Does so once; returns the layout that a block needs if it is wider than the blocks before it."""
    (rows, size, first_row), kinds = (0, 0, 1), dict(layout.kinds)
    writer = _Writer(cache / ROWS) if cache else None
    try:
        for block in reader.blocks(columns):
            if most_bytes is not None and size >= most_bytes:
                return Read(part, columns, layout, rows, first_row, size, is_whole=False)
            chunk = block.chunk(columns)
            if not chunk.rows:
                continue
            for name, kind in chunk.layout.kinds.items():
                if kinds.setdefault(name, kind) != kind:
                    what = f"{columns.names[name]} is {kind}, but {kinds[name]} in row {first_row}"
                    raise RowError(chunk.first_row, what)
            first_row = first_row if rows else chunk.first_row
            wider = layout | chunk.layout
            if rows and writer and wider != layout:
                return wider
            layout, rows, size = wider, rows + chunk.rows, size + block.size
            if writer:
                writer.write(chunk.batch(layout))
        read = Read(part, columns, layout, rows, first_row, size)
        if writer and rows:
            writer.keep(_rows_path(read, layout, writer.folder))
            facts = {"kinds": dict(layout.kinds), "has_json": layout.has_json, "optional": sorted(layout.optional)}
            write_json(writer.folder / f"{_key(part)}.json", {**facts, "rows": rows, "first_row": first_row})
        return read
    finally:
        if writer:
            writer.close()


class _Writer:
    """Writes rows to a file that appears whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / f".{os.getpid()}-{os.urandom(4).hex()}.part"
        self._stream: Any = None
        self._sink: Any = None

    def write(self, batch: pa.RecordBatch) -> None:
        if self._stream is None:
            self._sink = open(self._path, "wb")  # noqa: SIM115 - closed by keep or close
            self._stream = pa.ipc.new_stream(self._sink, batch.schema)
        self._stream.write_batch(batch)

    def keep(self, path: Path) -> None:
        self._stream.close()
        self._sink.flush()
        os.fsync(self._sink.fileno())
        self._sink.close()
        os.replace(self._path, path)

    def close(self) -> None:
        if self._sink is not None:
            self._sink.close()
            self._path.unlink(missing_ok=True)


def _dataset(read: Read, layout: RowLayout, cache: Path) -> Any:
    import datasets
    import datasets.features.features as codec
    from datasets.table import MemoryMappedTable

    # The library's own JSON reader refuses integers beyond 64 bits and rounds some numbers.
    codec.ujson_loads = json.loads
    path = _rows_path(read, layout, cache / ROWS)
    if not path.exists():
        _convert(read.part, read.part.reader(), read.columns, layout, cache)
    digest = hashlib.sha256(path.stem.encode()).hexdigest()[:16]
    return datasets.Dataset(MemoryMappedTable.from_file(str(path)), fingerprint=digest)


def _key(part: Part) -> str:
    """Returns a name for a part's content and for how it is read."""
    entry = {name: part.source.entry.get(name) for name in ("format", "columns")}
    facts = [READER, part.digest, fingerprint.kind_of(part.path), entry, part.source.text_field]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def _rows_path(read: Read, layout: RowLayout, folder: Path) -> Path:
    named = json.dumps([sorted(layout.kinds.items()), layout.has_json, sorted(layout.optional)])
    return folder / f"{_key(read.part)}-{hashlib.sha256(named.encode()).hexdigest()[:12]}.arrow"


def _recall(part: Part, columns: Columns, cache: Path) -> Read | None:
    """Returns what was read before of the same content, if it is still there."""
    try:
        facts = read_json(cache / ROWS / f"{_key(part)}.json")
    except ValueError:
        return None
    if not facts:
        return None
    layout = RowLayout(facts["kinds"], facts["has_json"], frozenset(facts["optional"]))
    read = Read(part, columns, layout, facts["rows"], facts["first_row"])
    return read if _rows_path(read, layout, cache / ROWS).exists() else None


def _columns(part: Part, reader: Reader) -> Columns:
    """Returns the columns to read. Raises InputError if the file lacks one."""
    source, present = part.source, ", ".join(map(str, reader.names))
    renamed = source.entry.get("columns") or {}  # our names -> the file's
    for ours, theirs in renamed.items():
        if theirs not in reader.names:
            raise source.error(f"{part.url} has no column {shown(theirs)}", f"it has {present}", f"columns.{ours}")
    format = source.entry.get("format") or format_of(reader.names, renamed, source.text_field)
    if not format:
        remedy = "name them with columns: {prompt: …, completion: …}, {messages: …} or {text: …}"
        raise InputError(part.url, f"its columns ({present}) fit no format", remedy=remedy)
    columns = columns_of(format, reader.names, renamed, source.text_field)
    for ours, theirs in columns.names.items():
        if theirs not in reader.names:
            remedy = f"it has {present}; name it with columns: {{{ours}: …}}"
            what = f"has no column {theirs!r}, which the format {format} needs"
            raise InputError(part.url, what, remedy=remedy)
    return columns


def _load_hub(source: DataSource) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    name, _, revision = source.url.removeprefix("hf://").partition("@")
    split = source.entry.get("dataset_split") or "train"
    try:
        return load_dataset(name, name=source.entry.get("dataset_config"), revision=revision or None, split=split)
    except (DatasetNotFoundError, FileNotFoundError, ValueError) as error:
        if is_machine_fault(error):
            raise
        # A ValueError is an unknown configuration or split; its message lists those that exist.
        is_missing = isinstance(error, (DatasetNotFoundError, FileNotFoundError))
        what = f"cannot find {source.url}: {error}" if is_missing else str(error)
        raise source.error(what, key="source") from error


def check_rows(config: Mapping[str, Any], config_path: str, most_bytes: int) -> dict[str, Any]:
    """Reads the rows of local ``data:`` files, about ``most_bytes`` in all. Raises InputError for a bad row."""
    reads, partly = list[Read](), list[str]()
    text_field = str(config.get("dataset_text_field") or "text")
    for index, entry in enumerate(config.get("data") or []):
        source = DataSource(entry, config_path, f"data[{index}]", text_field)
        if fingerprint.is_remote(source.url):
            continue
        found, skipped = list[Read](), list[str]()
        for url in fingerprint.find_files(source.url, config_path, f"data[{index}].source").files:
            left = most_bytes - sum(read.size for read in [*reads, *found])
            if left <= 0 or _is_large_list(url, left):
                skipped.append(url)
                continue
            read = read_part(Part(source, url, url.removeprefix("file://"), ""), None, left)
            found += [read] if read else []
            skipped += [url] if read and not read.is_whole else []
        if not found and not skipped:
            raise InputError(source.url, "has no rows")
        if not skipped:
            source.held_out(sum(read.rows for read in found))
        reads += found
        partly += skipped
    if reads:
        one_layout(reads)
    return {"rows": sum(read.rows for read in reads), "partly": partly}


def _is_large_list(path: str, most_bytes: int) -> bool:
    """Returns whether a file is a long JSON list, which can only be read whole."""
    kind, compression = fingerprint.kind_of(path) or ("", "")
    if kind != "json":
        return False
    with open_bytes(path.removeprefix("file://"), compression) as data:
        head = data.read(most_bytes + 1)
    return head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[") and len(head) > most_bytes


class _WithoutPandas:
    """Hides pandas from this process: pyarrow would import it, in a third of a second, for nothing here."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name)


if __name__ == "__main__":
    protect_output()
    sys.meta_path.insert(0, _WithoutPandas())
    asked = json.load(sys.stdin)
    try:
        found = {**check_rows(asked["config"], asked["config_path"], asked["most_bytes"]), "error": ""}
    except SpotuneError as error:
        found = {"rows": 0, "partly": [], "error": str(error)}
    print(json.dumps(found))
