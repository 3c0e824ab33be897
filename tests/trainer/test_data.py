"""``data:``: sources read, told apart, checked row by row, held out, mixed and aligned."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spotune.core.errors import InputError
from spotune.core.protocol import WorkerJob
from spotune.sft.data import Data, load_data
from tests import tiny

Loader = Callable[..., Data]


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loader:
    """Loads ``data:`` entries with a config's further keys."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def load(*entries: dict[str, Any], **config: Any) -> Data:
        training = SimpleNamespace(
            eval_strategy=config.pop("eval_strategy", "no"), seed=1, data_seed=None, dataset_text_field="text"
        )
        job = WorkerJob("r", 1, {"data": list(entries), **config}, "c.yaml", str(tmp_path / "cache"))
        return load_data(SimpleNamespace(training=training), job)  # type: ignore[arg-type]

    return load


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("format", ["messages", "prompt_completion", "text"])
def test_formats_are_told_from_columns(read: Loader, tmp_path: Path, format: str) -> None:
    rows = tiny.rows(5, format)
    assert read({"source": write(tmp_path / "a.jsonl", *rows)}).train.to_list() == rows


def test_kinds_of_files_in_one_folder(read: Loader, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "a.jsonl", {"text": "a"})
    (folder / "b.json").write_text(json.dumps([{"text": "b"}, {"text": "b2"}]))
    (folder / "c.csv").write_text("text\nc\n")
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "d"}\n'))
    (folder / "notes.md").write_text("no data")
    import datasets

    datasets.Dataset.from_list([{"text": "e"}]).to_parquet(folder / "e.parquet")
    assert sorted(read({"source": str(folder)}).train["text"]) == ["a", "b", "b2", "c", "d", "e"]
    assert sorted(read({"source": str(folder / "*.jsonl*")}).train["text"]) == ["a", "d"]


def test_columns_are_renamed_and_others_left_out(read: Loader, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", {"question": "q", "answer": "a", "prompt": "not this", "id": 3})
    train = read({"source": source, "columns": {"prompt": "question", "completion": "answer"}}).train
    assert train.to_list() == [{"prompt": "q", "completion": "a"}]


def test_held_out_rows_are_not_trained_on(read: Loader, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", *({"text": f"row {number}"} for number in range(50)))
    shared = read({"source": source, "split": 0.1}, eval_strategy="steps")
    assert (len(shared.train), len(shared.evaluation)) == (45, 5)
    assert not set(shared.train["text"]) & set(shared.evaluation["text"])
    counted = read({"source": source, "split": 1.0, "limit": 20}, eval_strategy="steps", data_limit=10)
    assert (len(counted.train), len(counted.evaluation)) == (10, 1)
    again = read({"source": source, "split": 0.1}, eval_strategy="steps")
    assert again.evaluation["text"] == shared.evaluation["text"]


def test_weights_mix_without_repeating(read: Loader, tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", *({"text": f"a{number}"} for number in range(60)))
    second = write(tmp_path / "b.jsonl", *({"text": f"b{number}"} for number in range(60)))
    mixed = read({"source": first, "weight": 3}, {"source": second, "weight": 1}).train["text"]
    assert len(mixed) == len(set(mixed)) == 80
    assert [sum(text[0] == "b" for text in mixed[at : at + 20]) for at in range(0, 80, 20)] == [5, 5, 5, 5]
    again = [read({"source": first, "weight": 3}, {"source": second, "weight": 1}).train for _ in range(2)]
    assert mixed == again[0]["text"]
    assert again[0]._fingerprint == again[1]._fingerprint  # or every attempt would tokenize it anew
    assert len(read({"source": first}, {"source": second}).train) == 120


def test_schemas_are_aligned(read: Loader, tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "q", "name": "n"}]})
    second = write(tmp_path / "b.jsonl", {"messages": [{"content": "a", "role": "assistant"}], "id": 1})
    rows = read({"source": first}, {"source": second}).train.to_list()
    said = [{key: value for key, value in row["messages"][0].items() if value} for row in rows]
    assert said == [{"role": "user", "content": "q", "name": "n"}, {"role": "assistant", "content": "a"}]


TALK = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
PAIR = {"prompt": "p", "completion": "c"}
FAULTS: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "empty file": ([], {}, "has no rows"),
    "broken line": ([TALK, '{"messages": ['], {}, "row 2: not JSON"),
    "no object": ([TALK, "3"], {}, "row 2: not an object"),
    "text for messages": ([TALK, {"messages": "hello"}], {}, "row 2: messages is text, not a list of"),
    "only text for messages": ([{"messages": "hello"}], {}, "row 1: messages is text, not a list of"),
    "no role": ([TALK, {"messages": [{"content": "q"}]}], {}, "row 2: "),
    "no content": ([TALK, {"messages": [{"role": "user", "content": None}]}], {}, "row 2: a message in messages has"),
    "no message": ([TALK, TALK, {"messages": []}], {}, "row 3: messages is empty"),
    "silence": ([TALK, {"messages": [{"role": "user", "content": ""}]}], {}, "row 2: the messages in"),
    "from without value": ([{"messages": [{"from": "human"}]}], {}, "row 1: a message in messages has no content"),
    "missing prompt": ([PAIR, {"completion": "c"}], {}, "row 2: prompt is missing"),
    "blank completion": ([PAIR, {"prompt": "p", "completion": "  "}], {}, "row 2: completion is empty"),
    "number for text": ([{"text": 3}], {"format": "text"}, "row 1: text is int"),
    "unknown columns": ([{"q": "a", "r": "b"}], {}, "its columns (q, r) fit no format"),
    "lacks its format": ([{"text": "a"}], {"format": "messages"}, "has no column 'messages'"),
    "no such column": ([PAIR], {"columns": {"prompt": "question"}}, "has no column 'question'"),
    "nothing left": ([PAIR, PAIR], {"split": 2}, "holds out 2 of 2 rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_name_file_and_row(read: Loader, tmp_path: Path, name: str) -> None:
    rows, entry, expected = FAULTS[name]
    source = write(tmp_path / "bad.jsonl", *rows)
    with pytest.raises(InputError) as raised:
        read({"source": source, **entry})
    message = str(raised.value)
    assert expected in message
    assert "\n" not in message
    assert "bad.jsonl" in message or "c.yaml: data[0]" in message


def test_a_fault_in_the_second_file_is_placed_there(read: Loader, tmp_path: Path) -> None:
    write(tmp_path / "1.jsonl", TALK, TALK)
    write(tmp_path / "2.jsonl", TALK, {"messages": []})
    with pytest.raises(InputError, match=r"2\.jsonl: row 2: messages is empty"):
        read({"source": str(tmp_path / "*.jsonl")})


def test_formats_do_not_mix(read: Loader, tmp_path: Path) -> None:
    entries = [{"source": write(tmp_path / "a.jsonl", TALK)}, {"source": write(tmp_path / "b.jsonl", PAIR)}]
    with pytest.raises(InputError, match="different formats: messages, prompt_completion"):
        read(*entries)


def test_evaluation_needs_held_out_rows(read: Loader, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no held-out rows"):
        read({"source": write(tmp_path / "a.jsonl", TALK, TALK)}, eval_strategy="steps")


@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_rows_in_a_bucket(read: Loader, bucket: str, tmp_path: Path) -> None:
    import fsspec

    filesystem, root = fsspec.core.url_to_fs(bucket)
    filesystem.pipe_file(f"{root}/rows/a.jsonl.gz", gzip.compress(b'{"text": "a"}\n'))
    filesystem.pipe_file(f"{root}/rows/b.jsonl", b'{"text": "b"}\n{"text": ""}\n')
    assert read({"source": f"{bucket}/rows/a*"}).train["text"] == ["a"]
    with pytest.raises(InputError, match=r"b\.jsonl: row 2: text is empty"):
        read({"source": f"{bucket}/rows/"})


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl.gz", b'{"text": "a"}\n', r"a\.jsonl\.gz: cannot be read: .*gzip"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9)[:-9], r"a\.jsonl\.gz: cannot be read: "),
        ("a.csv.gz", b"text\na\n", r"a\.csv\.gz: cannot be read: .*gzip"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "\xff"}\n',
            r"a\.jsonl: row 2: not UTF-8: .*0xff \(save the file as UTF-8\)",
        ),
        (
            "a.jsonl",
            b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xff", "completion": "b"}\n',
            r"a\.jsonl: row 2: not UTF-8: .*0xff \(save the file as UTF-8\)",
        ),
        ("a.csv", b"text\n\xff\n", r"a\.csv: row 1: not UTF-8: "),
        ("a.jsonl", b'[1, 2]\n{"text": "a"}\n', r"a\.jsonl: row 1: not an object"),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 100_000 + b"\n", r"a\.jsonl: row 2: not JSON"),
    ],
    ids=[
        *("not gzip", "cut gzip", "csv not gzip", "text not UTF-8", "prompt not UTF-8", "csv not UTF-8"),
        *("a list", "lists in lists"),
    ],
)
def test_bytes_that_are_no_rows(read: Loader, tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        read({"source": str(tmp_path / name)})
    assert str(caught.value).count("\n") == 0
