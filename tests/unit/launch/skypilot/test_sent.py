"""Data and models that would not be on the machine are refused before it is paid for."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from spotune.core.errors import InputError
from spotune.core.fingerprint import data_files
from spotune.launch.skypilot import client
from spotune.launch.skypilot.task import check_sent
from tests.real_sky import RealSky

EXCLUDED = ["secret/"]
TASK: dict[str, Any] = {"workdir": "."}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    project = tmp_path / "project"
    for name in ("data/a.jsonl", "secret/b.jsonl", "model/config.json", "../elsewhere/c.jsonl"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("{}\n")
    (project / "linked").symlink_to(tmp_path / "elsewhere")
    (project / ".gitignore").write_text("secret/\n")
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    monkeypatch.setattr(client, "excluded_files", lambda _: EXCLUDED)
    monkeypatch.chdir(project)
    return project


def check(folder: Path, source: str, infra: str = "aws", task: dict[str, Any] = TASK, model: str = "./model") -> None:
    config = {"model_name_or_path": model, "data": [{"source": source}]}
    check_sent(config, data_files(config, "run.yaml"), "run.yaml", folder, task, infra)


def test_what_is_sent_passes(folder: Path) -> None:
    check(folder, "data/*.jsonl")
    check(folder, "data/a.jsonl", model="org/of-a-hub")
    check(folder, "secret/b.jsonl", task={"workdir": {"url": "https://x/y.git", "ref": "main"}})
    check(folder, f"{folder}/data/a.jsonl", "slurm/lab")  # its nodes see this disk
    check(folder, f"{folder}/data/a.jsonl", task={**TASK, "file_mounts": {f"{folder}/data": "s3://b/data"}})


@pytest.mark.xdist_group("sky")
def test_skypilot_itself_says_what_is_not_sent(folder: Path, sky_says: RealSky) -> None:
    ask = "import json; from spotune.launch.skypilot import client; print(json.dumps(client.excluded_files('.')))"
    assert sky_says.json(folder.parent, ask, cwd=folder) == EXCLUDED
    (folder / ".skyignore").write_text("model\n")
    assert sky_says.json(folder.parent, ask, cwd=folder) == ["model"]


@pytest.mark.parametrize(
    ("source", "model", "line"),
    [
        ("secret/b.jsonl", "./model", r"run.yaml: data: secret/b.jsonl is ignored by git, .*\(a .skyignore .*\)"),
        ("../elsewhere/c.jsonl", "./model", r"run.yaml: data: ../elsewhere/c.jsonl is not below .*/project, .*"),
        ("linked/c.jsonl", "./model", r"run.yaml: data: linked/c.jsonl is not below .*"),
        ("FOLDER/data/a.jsonl", "./model", r"run.yaml: data: .*/a.jsonl is a path of this machine \(.*\)"),
        ("data/a.jsonl", "FOLDER/model", r"run.yaml: model_name_or_path: .*/model is a path of this machine \(.*\)"),
    ],
)
def test_what_is_not_sent_is_refused(folder: Path, source: str, model: str, line: str) -> None:
    with pytest.raises(InputError, match=line):
        check(folder, source.replace("FOLDER", str(folder)), model=model.replace("FOLDER", str(folder)))
