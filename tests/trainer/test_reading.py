"""Rows come out of the reader as they went into a file, whatever wrote it; and what is trained on is what it says."""

import csv
import gzip
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas
import polars
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from spotune.core.errors import InputError
from spotune.core.fingerprint import data_files
from spotune.sft import readers
from spotune.sft.readers import JsonReader
from spotune.sft.rows import RowError, chunk_of, columns_of, plain_chunk
from tests.reading import read_rows

Rows = list[dict[str, Any]]
SHARED = Path(__file__).resolve().parents[3] / "shared" / "cases"


# -- writers ------------------------------------------------------------------------------------------------------


def as_jsonl(rows: Rows, path: Path) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def as_ascii_jsonl(rows: Rows, path: Path) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\r\n" for row in rows).encode()))


def as_json_list(rows: Rows, path: Path) -> None:
    path.write_text(json.dumps(rows, indent=1), "utf-8")


def as_csv(rows: Rows, path: Path) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(flat(rows))


def flat(rows: Rows) -> Rows:
    """Rows whose messages are JSON text, for files that have no lists."""
    return [
        {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()} for row in rows
    ]


def arrow_table(rows: Rows) -> pa.Table:
    return pa.Table.from_pylist(rows)


def arrow_file(rows: Rows, path: Path) -> None:
    table = arrow_table(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def arrow_stream(rows: Rows, path: Path) -> None:
    table = arrow_table(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def zstd_jsonl(rows: Rows, path: Path) -> None:
    with pa.output_stream(str(path), compression="zstd") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())


WRITERS: dict[str, tuple[str, Callable[[Rows, Path], Any]]] = {
    "json": ("jsonl", as_jsonl),
    "ascii, gzip, CRLF": ("JSONL.GZ", as_ascii_jsonl),
    "one list": ("json", as_json_list),
    "zstd": ("ndjson.zst", zstd_jsonl),
    "pandas JSON": ("Jsonl", lambda rows, path: pandas.DataFrame(rows).to_json(path, orient="records", lines=True)),
    "polars JSON": ("ndjson", lambda rows, path: polars.DataFrame(rows).write_ndjson(path)),
    "csv": ("csv", as_csv),
    "pandas CSV": ("CSV", lambda rows, path: pandas.DataFrame(flat(rows)).to_csv(path, index=False)),
    "polars CSV": ("csv", lambda rows, path: polars.DataFrame(flat(rows)).write_csv(path)),
    "pyarrow CSV": ("csv", lambda rows, path: pa.csv.write_csv(arrow_table(flat(rows)), path)),
    "pandas Parquet": ("parquet", lambda rows, path: pandas.DataFrame(rows).to_parquet(path)),
    "polars Parquet": ("parquet", lambda rows, path: polars.DataFrame(rows).write_parquet(path)),
    "pyarrow Parquet": ("parquet", lambda rows, path: pa.parquet.write_table(arrow_table(rows), path)),
    "Arrow file": ("arrow", arrow_file),
    "Arrow stream": ("arrow", arrow_stream),
    "polars Arrow": ("ipc", lambda rows, path: polars.DataFrame(rows).write_ipc(path)),
    "pandas Feather": ("feather", lambda rows, path: pandas.DataFrame(rows).to_feather(path)),
}  # fmt: skip

# -- rows ---------------------------------------------------------------------------------------------------------

LOOKS_LIKE = [
    "2024-05-01",
    "01233",
    "3.50",
    "TRUE",
    "NA",
    "null",
    "nan",
    "1e5",
    "2024-05-01T00:00:00Z",
    "-0",
    "[1]",
    "{}",
]
TEXT = some.one_of(
    some.text(), some.sampled_from(LOOKS_LIKE), some.sampled_from(["\r", "\n", '"', "\u2028", "a,b", "\0"])
)
SAID = TEXT.filter(lambda text: bool(text.strip()))
NO_CR = some.text(some.characters(exclude_categories=("Cs",), exclude_characters="\r")) | some.sampled_from(LOOKS_LIKE)
PAIRS = some.lists(some.fixed_dictionaries({"prompt": TEXT, "completion": SAID}), min_size=1, max_size=6)
TALKS = some.lists(
    some.builds(
        lambda question, answer: {
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        },
        TEXT,
        SAID,
    ),
    min_size=1,
    max_size=6,
)
NO_CR_PAIRS = some.lists(
    some.fixed_dictionaries({"prompt": NO_CR, "completion": NO_CR.filter(lambda text: bool(text.strip()))}),
    min_size=1,
    max_size=6,
)


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows, so that a file has many."""
    monkeypatch.setattr(readers, "BLOCK_BYTES", 256)
    monkeypatch.setattr(readers, "BLOCK_ROWS", 2)


def check_round_trip(name: str, rows: Rows, shards: int) -> None:
    ending, write = WRITERS[name]
    with TemporaryDirectory() as folder:
        data = Path(folder, "data")
        data.mkdir()
        size = -(-len(rows) // shards)
        for number, start in enumerate(range(0, len(rows), size)):
            write(rows[start : start + size], data / f"{number}.{ending}")
        assert read_rows({"source": str(data)}, cache=Path(folder, "cache")) == rows


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "pandas CSV"])
@settings(max_examples=15)
@given(rows=PAIRS | TALKS, shards=some.integers(1, 3))
def test_rows_come_out_as_they_went_in(name: str, rows: Rows, shards: int) -> None:
    check_round_trip(name, rows, shards)


@settings(max_examples=15)
@given(rows=NO_CR_PAIRS | TALKS, shards=some.integers(1, 3))
def test_cells_of_pandas_come_out_as_they_went_in(rows: Rows, shards: int) -> None:
    """pandas leaves a carriage return unquoted, which ends the line for every reader, its own too."""
    check_round_trip("pandas CSV", rows, shards)


@pytest.mark.parametrize("name", WRITERS)
def test_rows_of_megabytes(name: str) -> None:
    long = 'wörd, "said"\n' * 300_000
    check_round_trip(name, [{"prompt": "p", "completion": "c"}, {"prompt": long, "completion": long + "."}], 1)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", WRITERS)
def test_blocks_join_without_a_seam(name: str) -> None:
    rows = [{"prompt": f"p{number}\n" * (number % 7), "completion": f"c{number}"} for number in range(60)]
    check_round_trip(name, rows, 2)
    talks = [
        {"messages": [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": "a" * number + "."}]}
        for number in range(40)
    ]
    check_round_trip(name, talks, 3)


SHORT = some.text(max_size=3)
LINES = [
    '{"prompt":"a","completion":"b"} {"prompt":"c","completion":"d"}',
    '{"prompt":"a","prompt":"b","completion":"c"}',
    '{"prompt":"\\ud800","completion":"c"}',
    '{"prompt":NaN,"completion":"c"}',
    *("", " ", "[]", "{", '{"prompt":"a",', '"completion":"b"}'),
]
# Nor may a line without a row hide one with two.
JSON_LINES = some.one_of(
    some.fixed_dictionaries({"prompt": SHORT, "completion": SHORT}).map(json.dumps),
    some.dictionaries(some.sampled_from(["prompt", "completion", "id"]), some.none() | some.integers() | SHORT).map(
        json.dumps
    ),
    some.sampled_from(LINES),
)


@settings(max_examples=200)
@given(lines=some.lists(JSON_LINES, max_size=4))
def test_the_quick_way_reads_what_the_slow_way_reads(lines: list[str]) -> None:
    text = '{"prompt": "p", "completion": "c"}\n' + "".join(line + "\n" for line in lines)
    reader = JsonReader(lambda: io.BytesIO(text.encode()))
    columns = columns_of("prompt_completion", reader.names, {}, "text")
    for block in reader.blocks(columns):
        quick = plain_chunk(block.table, columns, block.first_row) if block.table is not None else None
        if quick is None:
            continue  # the slow way is what is taken
        slow = chunk_of(block.rows(), columns)
        assert quick.batch(quick.layout).equals(slow.batch(slow.layout))


# -- more than text -----------------------------------------------------------------------------------------------

CALL = {
    "type": "function",
    "function": {"name": "brew", "arguments": {"cups": 2, "note": None, "p": 0.30000000000000004}},
}
TOOLS = [{"type": "function", "function": {"name": "brew", "parameters": {"most": 10**30}}}]
ASKED, ANSWERED = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
ODD: Rows = [
    {"messages": [ASKED, {**ANSWERED, "reasoning": "r", "weight": 1}]},
    {"messages": [{**ASKED, "name": "n"}, ANSWERED]},
    {"messages": [ASKED, {**CALLED, "content": ""}], "tools": TOOLS},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, CALLED]},
    {"messages": [ASKED, ANSWERED], "chat_template_kwargs": {"think": False}},
]


def test_what_only_some_messages_have_is_carried(tmp_path: Path, cache: Path) -> None:
    plain = [
        {"messages": [{"role": "user", "content": f"q{at}"}, {"role": "assistant", "content": "a"}]} for at in range(9)
    ]
    as_jsonl(plain, tmp_path / "a.jsonl")
    as_jsonl(plain[:2] + ODD, tmp_path / "b.jsonl")
    found = read_rows({"source": str(tmp_path / "*.jsonl")}, cache=cache)
    assert [row["messages"] for row in found] == [row["messages"] for row in plain + plain[:2] + ODD]
    assert [row["tools"] for row in found] == [row.get("tools") for row in plain + plain[:2] + ODD]
    assert [row["chat_template_kwargs"] for row in found][-1] == {"think": False}
    assert all(row["chat_template_kwargs"] == {} for row in found[:-1])


def test_a_key_that_is_null_is_a_key_that_is_not_there(tmp_path: Path, cache: Path) -> None:
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    as_jsonl([{"messages": [{**message, "name": None} for message in talk], "tools": None}], tmp_path / "a.jsonl")
    assert read_rows({"source": str(tmp_path / "a.jsonl")}, cache=cache) == [{"messages": talk}]
    mixed = [{"messages": talk}, {"messages": [{**talk[0], "name": "n"}, talk[1]]}]
    pa.parquet.write_table(arrow_table(mixed), tmp_path / "b.parquet")
    assert read_rows({"source": str(tmp_path / "b.parquet")}, cache=cache) == mixed


def test_columns_that_are_not_needed_do_no_harm(tmp_path: Path, cache: Path) -> None:
    as_jsonl([{"text": "a", "score": 1}, {"text": "b", "score": "high"}], tmp_path / "a.jsonl")
    as_jsonl([{"text": "c", "score": {"x": [1, "y"]}}], tmp_path / "b.jsonl")
    pa.parquet.write_table(pa.table({"text": ["d"], "score": pa.array([b"\xff"])}), tmp_path / "c.parquet")
    assert read_rows({"source": str(tmp_path)}, cache=cache) == [{"text": text} for text in "abcd"]


@pytest.mark.parametrize(
    "kind",
    [pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())],
    ids=["large_string", "string_view", "dictionary"],
)
def test_every_kind_of_arrow_text_is_text(tmp_path: Path, kind: pa.DataType, cache: Path) -> None:
    inner = pa.string() if pa.types.is_dictionary(kind) else kind
    message = pa.struct([("content", inner), ("role", inner)])
    talk = [{"content": "q", "role": "user"}, {"content": "a", "role": "assistant"}]
    for number, of in enumerate(
        [pa.list_(message), pa.large_list(message), pa.list_(message, 2), pa.list_view(message)]
    ):
        file = tmp_path / f"{number}.arrow"
        table = pa.table({"messages": pa.array([talk, talk], of)})
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        assert read_rows({"source": str(file)}, cache=cache) == [{"messages": talk}] * 2
    pa.parquet.write_table(pa.table({"text": pa.array(["001", "x"]).cast(kind)}), tmp_path / "text.parquet")
    assert read_rows({"source": str(tmp_path / "text.parquet")}, cache=cache) == [{"text": "001"}, {"text": "x"}]


# -- faults -------------------------------------------------------------------------------------------------------


def fault(folder: Path) -> str:
    with pytest.raises(InputError) as raised:
        read_rows({"source": str(folder)}, cache=folder.with_name(f"{folder.name}-cache"))
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_conflicts_name_both_files_and_the_row(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "q"}]
    as_jsonl([{"prompt": talk, "completion": talk}], tmp_path / "a.jsonl")
    as_jsonl([{"prompt": "p", "completion": "c"}], tmp_path / "b.jsonl")
    found = fault(tmp_path)
    assert "b.jsonl: row 1: prompt is text, but a list of {role, content} in" in found
    assert "a.jsonl (row 1)" in found
    as_jsonl([{"text": "t"}], tmp_path / "b.jsonl")
    assert "b.jsonl: has the columns of text, but" in fault(tmp_path)


def test_a_row_of_another_kind_is_named(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "q"}]
    as_jsonl([{"prompt": "p", "completion": "c"}] * 3 + [{"prompt": talk, "completion": talk}], tmp_path / "a.jsonl")
    assert "a.jsonl: row 4: prompt is a list of {role, content}, but text in row 1" in fault(tmp_path)


def test_half_a_character_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "\\ud83d"}\n')
    assert "a.jsonl: row 2: holds half of a character" in fault(tmp_path)


def test_a_csv_row_with_a_cell_too_many_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text\n"one\ntwo"\nthree,four\n')
    assert "a.csv: row 2: has 2 cells, but the header has 1" in fault(tmp_path)
    (tmp_path / "a.csv").write_text("text,text\na,b\n")
    assert "a.csv: header: the header has 'text' twice" in fault(tmp_path)


def test_a_quote_that_is_not_closed_is_named(tmp_path: Path) -> None:
    """As in a file that was cut off; the rest of it is not one cell."""
    (tmp_path / "a.csv").write_text('text\na\n"b\nc\nd\n')
    assert "a.csv: row 2: not CSV: a quote is not closed" in fault(tmp_path)


def test_a_quote_inside_a_cell(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.csv").write_text('text\n5" wide\n')
    assert read_rows({"source": str(tmp_path)}, cache=cache) == [{"text": '5" wide'}]


def test_rows_are_lines_in_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\n{"text": "a"}\n\n{"text": 5}\n')
    assert "a.jsonl: row 4: text is int, not text" in fault(tmp_path)


# -- the same file ------------------------------------------------------------------------------------------------


def test_a_file_is_known_by_its_content(tmp_path: Path, cache: Path) -> None:
    """Another file of the same name, size and time is read anew."""
    file = tmp_path / "a.jsonl"
    for text in ("one", "two"):
        as_jsonl([{"text": text}], file)
        os.utime(file, ns=(1_000_000_000, 1_000_000_000))
        assert read_rows({"source": str(file)}, cache=cache) == [{"text": text}]


def test_rows_are_those_of_the_record(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "a.jsonl"
    as_jsonl([{"text": "one"}], file)
    recorded = data_files({"data": [{"source": str(file)}]}, "c.yaml")
    assert read_rows({"source": str(file)}, cache=cache, data_files=recorded) == [{"text": "one"}]
    as_jsonl([{"text": "two"}], file)
    with pytest.raises(InputError, match="not the file that the run was submitted with"):
        read_rows({"source": str(file)}, cache=cache, data_files=recorded)


def test_a_damaged_copy_is_read_anew(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "a.jsonl"
    as_jsonl([{"text": "one"}], file)
    read_rows({"source": str(file)}, cache=cache)
    for kept in (cache / "rows").glob("*.json"):
        kept.write_text("{")
    assert read_rows({"source": str(file)}, cache=cache) == [{"text": "one"}]


# -- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["train[0].jsonl", "a*.jsonl", "what?.jsonl", "x::y.jsonl", "**.jsonl", "a b#c%20.jsonl"]
)
def test_a_path_that_exists_is_that_path(tmp_path: Path, name: str, cache: Path) -> None:
    as_jsonl([{"text": "wrong"}], tmp_path / "train0.jsonl")
    as_jsonl([{"text": "wrong"}], tmp_path / "ab.jsonl")
    as_jsonl([{"text": "right"}], tmp_path / name)
    assert read_rows({"source": str(tmp_path / name)}, cache=cache) == [{"text": "right"}]


def test_a_folder_with_a_pattern_in_its_name(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "run[1]*"
    folder.mkdir()
    as_jsonl([{"text": "right"}], folder / "a.jsonl")
    assert read_rows({"source": str(folder)}, cache=cache) == [{"text": "right"}]


@pytest.mark.parametrize("name", ["train.txt", "train", "train.jsonl.bak", "train.tsv"])
def test_a_file_without_a_known_ending_is_refused(tmp_path: Path, name: str, cache: Path) -> None:
    (tmp_path / name).write_text('{"text": "a"}\n')
    with pytest.raises(InputError, match="is not a data file by its name"):
        read_rows({"source": str(tmp_path / name)}, cache=cache)


def test_what_is_left_out_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    as_jsonl([{"text": "a"}], tmp_path / "train.jsonl")
    as_jsonl([{"text": "b"}], tmp_path / "test.jsonl")
    (tmp_path / "notes.txt").write_text("")
    shutil.copy(tmp_path / "train.jsonl", tmp_path / "train copy.jsonl")
    read_rows({"source": str(tmp_path)}, cache=cache)
    said = capsys.readouterr().err
    assert "not read, since the ending is not a data file's: notes.txt" in said
    assert "test.jsonl is trained on too (name the training files alone, or give split)" in said
    assert "are the same file, trained on twice" in said


def test_one_file_in_two_entries(tmp_path: Path, capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    file = tmp_path / "a.jsonl"
    as_jsonl([{"text": str(number)} for number in range(9)], file)
    assert len(read_rows({"source": str(file)}, {"source": str(tmp_path)}, cache=cache)) == 18
    assert "is in data[0] and data[1], and trained on twice" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"data\[1\].source: .*is in data\[0\] too"):
        read_rows({"source": str(file), "split": 2}, {"source": str(file)}, cache=cache)


def test_a_git_lfs_pointer_says_so(tmp_path: Path, cache: Path) -> None:
    for ending in ("jsonl", "csv", "parquet", "jsonl.gz"):
        file = tmp_path / f"a.{ending}"
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        with pytest.raises(InputError, match=r"is a Git LFS pointer, not the data \(git lfs pull\)"):
            read_rows({"source": str(file)}, cache=cache)


# -- the cases of the field ---------------------------------------------------------------------------------------


def plain(*rows: Any) -> Rows:
    return [dict(row) for row in rows]


def json_rows(*names: str) -> Callable[[], Rows]:
    def read() -> Rows:
        return [json.loads(line) for name in names for line in (SHARED / name).read_text().splitlines() if line]

    return read


def csv_rows() -> Rows:
    found: Rows = []
    for name in ("a.csv", "b.csv"):
        with open(SHARED / "csv-zip-codes" / name, newline="") as file:
            found += list(csv.DictReader(file))
    return found


READ: dict[str, Callable[[], Rows]] = {
    "csv-zip-codes": csv_rows,
    "jsonl-dates": json_rows("jsonl-dates/a.jsonl", "jsonl-dates/b.jsonl"),
    "brackets/train[0].jsonl": json_rows("brackets/train[0].jsonl"),
    "endings": json_rows("endings/a.jsonl", "endings/b.JSONL", "endings/c.ndjson"),
    "tool-calls.jsonl": json_rows("tool-calls.jsonl"),
    "some-names.jsonl": json_rows("some-names.jsonl"),
    "empty-shard": json_rows("empty-shard/b.jsonl"),
    "unneeded-column": lambda: [
        {"messages": row["messages"]} for row in json_rows("unneeded-column/a.jsonl", "unneeded-column/b.jsonl")()
    ],
    "long-prompt.jsonl": json_rows("long-prompt.jsonl"),
    "sharegpt.jsonl": lambda: [
        {"messages": [{"role": one["from"], "content": one["value"]} for one in row["conversations"]]}
        for row in json_rows("sharegpt.jsonl")()
    ],
    "polars-types.parquet": lambda: pa.parquet.read_table(SHARED / "polars-types.parquet").to_pylist(),
}
REFUSED = {
    "git-lfs-pointer.jsonl": "git-lfs-pointer.jsonl: is a Git LFS pointer, not the data (git lfs pull)",
    "latin1.csv": "latin1.csv: row 1: not UTF-8: it holds the byte 0xe9 (save the file as UTF-8)",
    "prompt-list-completion-text.jsonl": (
        "list-completion-text.jsonl: row 1: prompt is a list of {role, content} and completion is text: both must be"
    ),
}


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("needs the shared cases beside the checkout")
    return SHARED


@pytest.mark.parametrize("name", READ)
def test_cases_are_read_as_they_are(shared: Path, tmp_path: Path, name: str, cache: Path) -> None:
    expected = READ[name]()
    found = read_rows({"source": str(shared / name)}, cache=cache)
    assert [without_nothing(row) for row in found] == [without_nothing(row) for row in expected]


def without_nothing(value: Any) -> Any:
    """A value without keys that say nothing."""
    if isinstance(value, dict):
        return {key: without_nothing(inner) for key, inner in value.items() if inner not in (None, {})}
    return [without_nothing(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", REFUSED)
def test_cases_that_are_refused(shared: Path, tmp_path: Path, name: str, cache: Path) -> None:
    with pytest.raises(InputError) as raised:
        read_rows({"source": str(shared / name)}, cache=cache)
    assert REFUSED[name] in str(raised.value)


def test_row_errors_say_their_row() -> None:
    assert str(RowError(3, "is empty")) == "row 3: is empty"
