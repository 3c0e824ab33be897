"""What of a working tree goes with a run: by real git."""

import subprocess
from pathlib import Path

import pytest

from spotune.contracts.errors import InputError
from spotune.launch import code
from spotune.launch.code import differs, read_code, sent_code


def git(folder: Path, *arguments: str) -> str:
    told = ("-c", "user.name=x", "-c", "user.email=x@y")
    return subprocess.run(["git", *told, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "train.py").write_text("x = 1\n")
    (tmp_path / ".gitignore").write_text("out/\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    return tmp_path


def test_new_code_is_in_the_patch_and_data_is_named(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert not read_code(folder).dirty
    (folder / "train.py").write_text("x = 2\n")
    (folder / "new [a]*.py").write_text("y = 1\n")
    (folder / "notes.ipynb").write_text("{}")
    (folder / "out").mkdir()
    (folder / "out/log.py").write_text("ignored")
    before = git(folder, "status", "--porcelain")
    found = read_code(folder)
    assert git(folder, "status", "--porcelain") == before  # its index is as it was
    assert found.untracked == ("new [a]*.py", "notes.ipynb")
    assert found.facts()["dirty"]
    other = tmp_path_factory.mktemp("other")
    git(other, "clone", "-q", str(folder), ".")
    subprocess.run(["git", "apply", "-"], cwd=other, input=found.diff, check=True)
    assert [(other / name).read_text() for name in ("train.py", "new [a]*.py")] == ["x = 2\n", "y = 1\n"]
    (folder / "notes.ipynb").write_text("{ }")
    assert read_code(folder).facts() == found.facts()
    (folder / "new [a]*.py").write_text("y = 2\n")
    assert read_code(folder).facts()["diff_sha256"] != found.facts()["diff_sha256"]


def test_a_huge_difference_has_a_fingerprint_and_a_word(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "MAX_PATCH_BYTES", 1 << 20)
    (folder / "train.py").write_text("x = 1\n" * 400_000)
    found = read_code(folder)
    assert not found.is_kept
    assert found.facts()["diff_bytes"] == len(found.diff) > 1 << 20
    assert found.notes() == ["uncommitted changes of 2 MiB are not kept with the run (1 MiB at most)"]


def test_a_repository_that_cannot_be_compared_is_not_taken_for_clean(folder: Path) -> None:
    (folder / ".git/index").write_bytes(b"broken")
    with pytest.raises(InputError, match="git cannot say what differs"):
        read_code(folder)


def test_no_git_no_commit(tmp_path: Path) -> None:
    assert read_code(tmp_path).facts() == {}
    git(tmp_path, "init", "-q")
    assert read_code(tmp_path).facts() == {}


def test_a_git_reference_is_the_code_that_is_sent(folder: Path) -> None:
    here = sent_code({"workdir": "."}, folder).facts()
    named = sent_code({"workdir": {"url": "https://x/y.git", "ref": "main"}}, folder).facts()
    assert (named["url"], named["commit"], named["branch"]) == ("https://x/y.git", "", "main")
    assert sent_code({"workdir": {"url": "https://x/y.git", "ref": "a" * 40}}, folder).commit == "a" * 40
    assert differs(here, named) == "from https://x/y.git, not the folder"
    assert differs(here, here) == ""
    git(folder, "commit", "-qm", "two", "--allow-empty")
    there = read_code(folder).facts()
    assert differs(here, there) == f"commit {there['commit'][:12]}, not {here['commit'][:12]}"
