"""One entry of ``data:`` -> one data set with the columns of its format, every row checked."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from spotune.contracts.errors import InputError, SpotuneError
from spotune.contracts.fingerprint import resolve_source
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


def load(source: Source) -> tuple[Any, str]:
    """(data set, format) of a source. Raises InputError naming file and row for what does not fit."""
    if source.url.startswith("hf://") and not source.url.startswith("hf://datasets/"):
        dataset, files = _load_hub(source), []
    else:
        files = resolve_source(source.url, source.config_path, f"{source.key}.source")
        dataset = _load_files(source, files)
    if len(dataset) == 0:
        raise InputError(source.url, "has no rows")
    dataset, format = _with_columns(source, dataset)
    if limit := source.entry.get("limit"):
        dataset = dataset.select(range(min(limit, len(dataset))))
    misfit = find_misfit(dataset, format, source.text_field)
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


def _load_files(source: Source, files: list[str]) -> Any:
    from datasets import concatenate_datasets

    groups: dict[str, list[str]] = {}
    for file in files:
        suffix = "." + file.split("?")[0].removesuffix(".gz").rsplit(".", 1)[-1].lower()
        if suffix not in BUILDERS:
            raise InputError(file, "is no data file", remedy="JSONL, JSON, CSV or Parquet, also gzipped")
        groups.setdefault(BUILDERS[suffix], []).append(file)
    parts = [_load_group(source, builder, group) for builder, group in groups.items()]
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def _load_group(source: Source, builder: str, files: list[str]) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    options: dict[str, Any] = {}
    if files[0].startswith(("gs://", "gcs://")) and os.environ.get("STORAGE_EMULATOR_HOST"):
        options["storage_options"] = {"token": "anon"}
    try:
        return load_dataset(builder, data_files=files, split="train", **options)
    except FileNotFoundError as error:
        raise source.error(f"cannot read {source.url}: {error}", key="source") from error
    except (DatasetGenerationError, ValueError, TypeError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, (ConnectionError, TimeoutError)):
            raise
        _scan(source, files, source.entry.get("format") or "")
        raise InputError(source.url, f"cannot be read: {cause}") from error


def _with_columns(source: Source, dataset: Any) -> tuple[Any, str]:
    """The data set with the columns of its format only, under our names."""
    for ours, theirs in source.names.items():
        if theirs not in dataset.column_names:
            remedy = f"it has {', '.join(dataset.column_names)}"
            raise source.error(f"{source.url} has no column {theirs!r}", remedy, f"columns.{ours}")
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


def _scan(source: Source, files: list[str], format: str) -> None:
    """Reads JSON files row by row, to name the file and row of what a fast reader only says is there."""
    for file in files:
        if BUILDERS.get("." + file.removesuffix(".gz").rsplit(".", 1)[-1]) != "json":
            continue
        for number, text in _json_rows(file):
            try:
                row = json.loads(text) if isinstance(text, str) else text
            except ValueError as error:
                raise InputError(
                    file, f"not JSON: {error}", key=f"row {number}", remedy="one JSON object per line"
                ) from error
            told = format or _format_of_row(row, source)
            fault = check_row(row, told, source.names, source.text_field) if told else None
            if fault:
                raise InputError(file, fault, key=f"row {number}", remedy=_REMEDY[told])


def _format_of_row(row: Any, source: Source) -> str:
    for format in ("messages", "prompt_completion", "text"):
        needed = columns_of(format, source.text_field)
        if isinstance(row, dict) and all(source.names.get(name, name) in row for name in needed):
            return format
    return ""


def _json_rows(file: str) -> Iterator[tuple[int, Any]]:
    """(number from 1, line or parsed row) of a JSON lines file, or of a JSON file with one list in it."""
    import fsspec

    with fsspec.open(file, "rt", compression="infer", encoding="utf-8", errors="replace") as lines:
        first = next((line for line in lines if line.strip()), "")
        lines.seek(0)
        if first.lstrip().startswith("["):
            try:
                parsed = json.load(lines)
            except ValueError as error:
                raise InputError(file, f"not JSON: {error}") from error
            yield from enumerate(parsed, 1)
            return
        yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _place(files: list[str], row: int) -> tuple[str, int]:
    """The file, and the row in it, of a row of all files together; only the way to an error pays for this."""
    if len(files) == 1:
        return files[0], row
    for file in files:
        builder = BUILDERS["." + file.removesuffix(".gz").rsplit(".", 1)[-1].lower()]
        count = len(_load_group(Source({"source": file}, "", "", "text"), builder, [file]))
        if row < count:
            return file, row
        row -= count
    raise SpotuneError(f"row {row} is beyond the files")
