"""``spotune check`` looks at the rows of local files, in the trainer's Python."""

import json
from pathlib import Path

import pytest

from spotune.core.errors import InputError
from spotune.launch import plan
from spotune.launch.task import find_trainer
from tests.unit.project import Project


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    try:
        find_trainer({}, tmp_path)
    except InputError as error:
        pytest.skip(f"needs the trainer's environment: {error}")
    return Project(tmp_path / "project", monkeypatch)


def refusal(project: Project) -> str:
    result = project.run("check", "run.yaml")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_rows_are_counted(project: Project) -> None:
    project.write("data.jsonl", "".join(json.dumps({"text": f"row {number}"}) + "\n" for number in range(9)))
    found = project.json("check", "run.yaml")
    assert (found["rows_read"], found["rows_not_read"], found["notices"]) == (9, [], [])


def test_a_row_that_does_not_fit_is_named(project: Project) -> None:
    project.write("data.jsonl", '{"text": "a"}\n{"text": 3}\n')
    assert refusal(project) == 'data.jsonl: row 2: text is int, not text (each row {"text": "…"})\n'


def test_only_the_first_rows_of_large_files_are_read(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.check_rows, "__defaults__", (1000,))
    rows = [{"text": "row " * 99} for _ in range(20_000)]
    project.write("data.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    found = project.json("check", "run.yaml")
    assert 0 < found["rows_read"] < len(rows)
    assert found["rows_not_read"] == ["data.jsonl"]
    project.write("data.json", json.dumps(rows))
    project.write("run.yaml", "model_name_or_path: ./model\ndata: [{source: data.json}]\n")
    found = project.json("check", "run.yaml")
    assert (found["rows_read"], found["rows_not_read"]) == (0, ["data.json"])


def test_a_split_of_all_rows_is_refused(project: Project) -> None:
    project.write("run.yaml", "model_name_or_path: ./model\ndata: [{source: data.jsonl, split: 5}]\n")
    assert "run.yaml: data[0].split: holds out 5 of 1 rows, so that none are left to train on" in refusal(project)


def test_no_rows_at_all(project: Project) -> None:
    project.write("data.jsonl", "\n")
    assert refusal(project) == "data.jsonl: has no rows\n"


def test_a_file_without_a_known_ending(project: Project) -> None:
    project.write("rows.txt", "a\n")
    project.write("run.yaml", "model_name_or_path: ./model\ndata: [{source: rows.txt}]\n")
    assert "run.yaml: data[0].source: rows.txt is not a data file by its name (.txt)" in refusal(project)


def test_what_people_may_not_have_meant(project: Project) -> None:
    for name in ("rows/train.jsonl", "rows/test.jsonl", "rows/README.md"):
        project.write(name, '{"text": "a"}\n')
    project.write("run.yaml", "model_name_or_path: ./model\ndata: [{source: rows}, {source: rows/train.jsonl}]\n")
    first, second, third = project.json("check", "run.yaml")["notices"]
    assert first == "rows: not read, since the ending is not a data file's: README.md"
    assert second.startswith("rows: test.jsonl is trained on too")
    assert third == "rows/train.jsonl: is in data[0] and data[1], and trained on twice"


def test_without_a_trainer_it_says_what_it_could_not_read(project: Project) -> None:
    (project.folder / "nothing").write_text("")
    found = plan.check_rows(
        {"data": [{"source": "data.jsonl"}]}, "run.yaml", {"SPOTUNE_PYTHON": "./nothing"}, project.folder
    )
    assert found["rows_read"] == 0
    assert "SPOTUNE_PYTHON: './nothing' is not an executable file" in found["rows_not_read"][0]
