"""Which files a source names: one rule for a folder, a pattern and a name, on disk and in stores."""

import os
from pathlib import Path

import pytest

from spotune.core.errors import InputError
from spotune.core.fingerprint import data_files, data_sha256, find_files, kind_of, notices, open_store


def names(source: str) -> list[str]:
    return [Path(name).name for name in find_files(source, "c.yaml", "data[0].source").files]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jsonl", ("json", "")),
        ("A.JSONL", ("json", "")),
        ("a.ndjson.gz", ("json", "gzip")),
        ("a.Json.Zst", ("json", "zstd")),
        ("a.CSV", ("csv", "")),
        ("a.parquet", ("parquet", "")),
        ("a.arrow", ("arrow", "")),
        ("a.feather", ("arrow", "")),
        ("a.gz", None),
        ("a.jsonl.bak", None),
        ("jsonl", None),
        (".jsonl", None),
    ],
)
def test_an_ending_says_what_a_file_is(name: str, kind: tuple[str, str] | None) -> None:
    assert kind_of(name) == kind


def test_a_folder_and_a_pattern_take_the_same_files(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.JSONL", "c.ndjson.gz", "d.txt", ".e.jsonl"):
        (tmp_path / name).write_text("")
    taken = ["a.jsonl", "b.JSONL", "c.ndjson.gz"]
    assert names(str(tmp_path)) == names(f"{tmp_path}/*") == names(f"file://{tmp_path}") == taken
    assert find_files(str(tmp_path), "c.yaml", "").left_out == [str(tmp_path / "d.txt")]


@pytest.mark.parametrize("bucket", ["s3", "gs"], indirect=True)
@pytest.mark.parametrize("name", ["train[0].jsonl", "a*.jsonl", "x::y.jsonl", "s3::z.jsonl", "what?.jsonl"])
def test_an_object_that_exists_is_that_object(bucket: str, name: str) -> None:
    filesystem, root = open_store(bucket)
    for one in (name, "train0.jsonl", "ab.jsonl"):
        filesystem.pipe_file(f"{root}/rows/{one}", b'{"text": "a"}\n')
    filesystem.pipe_file(f"{root}/rows/notes.txt", b"")
    assert names(f"{bucket}/rows/{name}") == [name]
    found = find_files(f"{bucket}/rows", "c.yaml", "")
    assert sorted(Path(one).name for one in found.files) == sorted(["ab.jsonl", name, "train0.jsonl"])
    assert [Path(one).name for one in found.left_out] == ["notes.txt"]
    assert names(f"{bucket}/rows/t*.jsonl") == sorted(one for one in (name, "train0.jsonl") if one.startswith("t"))
    (facts,) = data_files({"data": [{"source": f"{bucket}/rows/{name}"}]}, "c.yaml")
    assert facts["size"] == 14
    assert facts["checksum"]


def test_a_file_without_a_known_ending_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("")
    with pytest.raises(InputError, match=r"rows.txt is not a data file by its name \(\.txt\) \(JSONL, "):
        names(str(tmp_path / "rows.txt"))
    with pytest.raises(InputError, match="holds no data file, but rows.txt"):
        names(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "is_named"),
    [("test.jsonl", True), ("my-val.parquet", True), ("eval_rows.csv", True), ("contest.jsonl", False)],
)
def test_held_out_files_beside_training_files(tmp_path: Path, name: str, is_named: bool) -> None:
    (tmp_path / "train.jsonl").write_text("")
    (tmp_path / name).write_text("")
    assert bool(notices([{"source": str(tmp_path)}], "c.yaml")) == is_named
    assert not notices([{"source": str(tmp_path), "split": 0.1}], "c.yaml")
    assert not notices([{"source": str(tmp_path / name)}], "c.yaml")


def test_local_files_of_trl_keys_count_by_their_content(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    for named in (
        {"path": "json", "data_files": str(file)},
        {"path": "json", "data_files": {"train": [str(tmp_path / "*.jsonl")]}},
        {"path": "json", "data_dir": str(tmp_path)},
        {"path": str(tmp_path), "data_files": "rows.jsonl"},
        {"path": str(tmp_path)},
    ):
        config = {"datasets": [named]}
        found = []
        for text in ("one", "two"):
            file.write_text(text)
            found.append(data_sha256(config, data_files(config, "c.yaml")))
        assert found[0] != found[1], named


@pytest.mark.parametrize(
    "source", ["/", "/**/*.jsonl", "/proc", "/proc/**", "/sys/class", "/dev/", "//proc/self/../**"]
)
def test_a_place_without_end_is_refused_at_once(source: str) -> None:
    with pytest.raises(InputError, match=r"is not a place for data \(name the data's own folder\)"):
        names(source)


@pytest.mark.parametrize("source", ["ftp://host/a.jsonl", "sftp://host/a.jsonl", "github://o:r@main/a.jsonl"])
def test_a_store_that_is_not_read_from(source: str) -> None:
    with pytest.raises(InputError, match="is not a store that data is read from"):
        names(source)


def test_a_fifo_is_not_data(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="no file matches"):
        names(str(tmp_path / "a.jsonl"))
