"""One entry of ``data:`` -> one data set with the columns of its format, every row checked."""

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spotune.contracts.errors import InputError, SpotuneError, shown
from spotune.contracts.fingerprint import resolve_source
from spotune.sft.align import concatenate
from spotune.sft.fetch import fetch
from spotune.sft.rows import OPTIONAL, check_row, columns_of, find_misfit

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_REMEDY = {
    "messages": 'each row {"messages": [{"role": "user", "content": "…"}, …]}',
    "prompt_completion": 'each row {"prompt": "…", "completion": "…"}',
    "text": 'each row {"text": "…"}',
}


@dataclass(frozen=True)
class Source:
    """An entry of ``data:``, with the names that messages need."""

    entry: Mapping[str, Any]
    config_path: str
    key: str
    text_field: str

    @property
    def url(self) -> str:
        return str(self.entry["source"])

    @property
    def names(self) -> dict[str, str]:
        """Our column names -> the file's."""
        return dict(self.entry.get("columns") or {})

    def error(self, what: str, remedy: str = "", key: str = "") -> InputError:
        return InputError(self.config_path, what, key=f"{self.key}.{key}" if key else self.key, remedy=remedy)


def load(source: Source, cache: Path) -> tuple[Any, str]:
    """(data set, format) of a source. Raises InputError naming file and row for what does not fit."""
    if source.url.startswith("hf://") and not source.url.startswith("hf://datasets/"):
        files: dict[str, str] = {}
        parts = [_load_hub(source)]
    else:
        urls = resolve_source(source.url, source.config_path, f"{source.key}.source")
        files = {fetch(url, cache, source.config_path, f"{source.key}.source"): url for url in urls}
        parts = [_load_group(source, builder, group, files) for builder, group in _by_builder(files).items()]
    if not any(len(part) for part in parts):
        raise InputError(source.url, "has no rows")
    shaped = [_with_columns(source, part) for part in parts if len(part)]
    dataset, format = concatenate([dataset for dataset, _ in shaped], source.config_path), shaped[0][1]
    if any(other != format for _, other in shaped):
        raise source.error(f"the files of {source.url} have different formats", "name one with format:")
    if limit := source.entry.get("limit"):
        dataset = dataset.select(range(min(limit, len(dataset))))
    try:
        misfit = find_misfit(dataset, format, source.text_field)
    except ValueError as error:
        _scan(source, files, format)
        raise InputError(source.url, f"cannot be read: {error}") from error
    if misfit:
        if misfit.is_type:
            _scan(source, files, format)  # names the row itself where it can
        where, row = _place(files, misfit.row) if files else (source.url, misfit.row)
        raise InputError(where, misfit.what, key=f"row {row + 1}", remedy=_REMEDY[format])
    return dataset, format


def _load_hub(source: Source) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    name, _, revision = source.url.removeprefix("hf://").partition("@")
    split = source.entry.get("dataset_split") or "train"
    try:
        return load_dataset(name, name=source.entry.get("dataset_config"), revision=revision or None, split=split)
    except (DatasetNotFoundError, FileNotFoundError) as error:
        raise source.error(f"cannot find {source.url}: {error}", key="source") from error
    except ValueError as error:  # an unknown configuration or split; the message lists those that are there
        raise source.error(str(error), key="source") from error


def _by_builder(files: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for file, url in files.items():
        if (builder := builder_of(file)) is None:
            raise InputError(url, "is no data file", remedy="JSONL, JSON, CSV or Parquet, also gzipped")
        groups.setdefault(builder, []).append(file)
    return groups


def builder_of(file: str) -> str | None:
    """The reader of ``datasets`` for a file, by its name."""
    return BUILDERS.get("." + file.removesuffix(".gz").rsplit(".", 1)[-1].lower())


def _load_group(source: Source, builder: str, group: list[str], files: Mapping[str, str]) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        return load_dataset(builder, data_files=group, split="train")
    except (DatasetGenerationError, ValueError, TypeError, StopIteration, OSError, EOFError) as error:
        cause = error.__cause__ or error
        _scan(source, {file: files[file] for file in group}, source.entry.get("format") or "")
        raise InputError(source.url, f"cannot be read: {cause}") from error


def _with_columns(source: Source, dataset: Any) -> tuple[Any, str]:
    """The data set with the columns of its format only, under our names."""
    for ours, theirs in source.names.items():
        if theirs not in dataset.column_names:
            remedy = f"it has {', '.join(dataset.column_names)}"
            raise source.error(f"{source.url} has no column {shown(theirs)}", remedy, f"columns.{ours}")
        if ours != theirs:
            dataset = dataset.remove_columns(ours) if ours in dataset.column_names else dataset
            dataset = dataset.rename_column(theirs, ours)
    present = dataset.column_names
    format = source.entry.get("format") or _tell_format(source, present)
    needed = columns_of(format, source.text_field)
    if missing := [name for name in needed if name not in present]:
        remedy = f"it has {', '.join(present)}; name it with columns: {{{missing[0]}: …}}"
        raise InputError(source.url, f"has no column {missing[0]!r}, which the format {format} needs", remedy=remedy)
    return dataset.select_columns([*needed, *(name for name in OPTIONAL if name in present)]), format


def _tell_format(source: Source, present: list[str]) -> str:
    for format in ("messages", "prompt_completion", "text"):
        if all(name in present for name in columns_of(format, source.text_field)):
            return format
    remedy = "name them with columns: {prompt: …, completion: …}, {messages: …} or {text: …}"
    raise InputError(source.url, f"its columns ({', '.join(present)}) fit no format", remedy=remedy)


def _scan(source: Source, files: Mapping[str, str], format: str) -> None:
    """Reads JSON files row by row, to name the file and row of what a fast reader only says is there."""
    count = 0
    for file, url in files.items():
        if builder_of(file) != "json":
            return
        for number, text in _json_rows(file, url):
            count += 1
            try:
                text.encode() if isinstance(text, str) else None
                row = json.loads(text) if isinstance(text, str) else text
            except UnicodeEncodeError as error:
                raise InputError(url, "not UTF-8", key=f"row {number}", remedy="save the file as UTF-8") from error
            except (ValueError, RecursionError) as error:
                remedy = "one JSON object per line"
                raise InputError(url, f"not JSON: {error}", key=f"row {number}", remedy=remedy) from error
            told = format or _format_of_row(row, source)
            fault = check_row(row, told, source.names, source.text_field)
            if fault:
                raise InputError(url, fault, key=f"row {number}", remedy=_REMEDY.get(told, ""))
    if count == 0:
        raise InputError(source.url, "has no rows")


def _format_of_row(row: Any, source: Source) -> str:
    for format in ("messages", "prompt_completion", "text"):
        needed = columns_of(format, source.text_field)
        if isinstance(row, dict) and all(source.names.get(name, name) in row for name in needed):
            return format
    return ""


def _json_rows(file: str, url: str) -> Iterator[tuple[int, Any]]:
    """(number from 1, line or parsed row) of a JSON lines file, or of a JSON file with one list in it.

    What is not UTF-8 in a line becomes surrogates, which no text can be encoded with.
    """
    import fsspec

    try:
        with fsspec.open(file, "rt", compression="infer", encoding="utf-8", errors="surrogateescape") as lines:
            first = next((line for line in lines if line.strip()), "")
            lines.seek(0)
            if first.lstrip().startswith("[") and not (_is_json(first) and next(lines) and any(map(str.strip, lines))):
                lines.seek(0)
                yield from enumerate(json.load(lines), 1)
                return
            lines.seek(0)
            yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    except (ValueError, RecursionError) as error:
        raise InputError(url, f"not JSON: {error}") from error
    except (OSError, EOFError, zlib.error) as error:  # a name that ends in .gz, and no gzip in it
        raise InputError(url, f"cannot be read: {error}") from error


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _place(files: Mapping[str, str], row: int) -> tuple[str, int]:
    """The file, and the row in it, of a row of all files together; only the way to an error pays for this."""
    for group in _by_builder(files).values():
        for file in group:
            if len(files) == 1:
                return files[file], row
            count = len(
                _load_group(Source({"source": files[file]}, "", "", "text"), str(builder_of(file)), [file], files)
            )
            if row < count:
                return files[file], row
            row -= count
    raise SpotuneError(f"row {row} is beyond the files")
