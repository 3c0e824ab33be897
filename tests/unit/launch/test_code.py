"""What of a working tree goes with a run: by real git."""

import subprocess
from pathlib import Path

import pytest

from spotune.core.errors import InputError
from spotune.launch import code
from spotune.launch.code import Code, differs, read_code, sent_code


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
    assert not read_code(folder).facts()["dirty"]
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


SETTINGS = (
    *("diff.noprefix=true", "diff.mnemonicPrefix=true", "diff.relative=true", "diff.submodule=log"),
    *("diff.ignoreSubmodules=all", "diff.algorithm=patience", "diff.indentHeuristic=false", "diff.context=1"),
    *("diff.interHunkContext=9", "diff.renames=false", "diff.renameLimit=1", "diff.orderFile=../order"),
    *("diff.suppressBlankEmpty=true", "diff.external=echo", "diff.upper.textconv=tr a-z A-Z <", "color.ui=always"),
    *("core.abbrev=12", "core.quotePath=false"),
)


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder below a repository's own in which something is changed of every kind that a setting shows otherwise."""
    top = tmp_path_factory.mktemp("changed") / "top"
    here, lines = top / "here", [f"line {number}\n" for number in range(40)]
    here.mkdir(parents=True)
    (top.parent / "order").write_text("*z.py\n")
    git(top, "init", "-q")
    git(top, "init", "-q", "here/sub")
    git(here / "sub", "commit", "-qm", "one", "--allow-empty")
    (top / ".gitattributes").write_text("*.up diff=upper\n")
    (top / "above.py").write_text("x = 1\n")
    (here / "a.up").write_text("small\n")
    (here / "moved.py").write_text("c\n}\n{\n{\n")
    (here / "lines.py").write_text("".join(lines))
    (here / "z.py").write_text("@cached\ndef one():\n    pass\n\n\n@cached\ndef two():\n    pass\n")
    for name in ("ä", "b"):
        (here / f"{name}.py").write_text("".join(f"{name} {line}" for line in lines))
    git(top, "add", ".")
    git(top, "commit", "-qm", "one")
    git(here / "sub", "commit", "-qm", "two", "--allow-empty")
    (top / "above.py").write_text("x = 2\n")
    (here / "a.up").write_text("large\n")
    (here / "moved.py").write_text("{\nd\n}\nb\n")
    (here / "lines.py").write_text("".join([*lines[:8], "\n", "new\n", *lines[8:20], "new\n", *lines[20:]]))
    (here / "z.py").write_text("\n\n".join(f"@cached\ndef {name}():\n    pass\n" for name in ("one", "half", "two")))
    for name in ("ä", "b"):
        (here / f"{name}.py").rename(here / f"{name}2.py").write_text("".join(f"{name} {line}" for line in lines[:-1]))
    git(here, "add", "-A", ".", ":!sub")
    return here


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_patch_does_not_follow_the_users_settings(
    changed: Path, setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gits_own() -> bytes:
        return subprocess.run(["git", "diff", "--binary", "HEAD"], cwd=changed, check=True, capture_output=True).stdout

    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "config"))
    plain = gits_own()
    assert read_code(changed).diff == plain  # as it is without any setting
    git(changed, "config", "--global", *setting.split("=", 1))
    assert gits_own() != plain  # the setting does something here
    assert read_code(changed).diff == plain


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
    assert read_code(tmp_path) == Code()
    git(tmp_path, "init", "-q")
    assert read_code(tmp_path) == Code()


def test_a_repository_of_somebody_else_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "below").mkdir()
    assert read_code(folder / "below").notes() == []
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    refused = read_code(folder / "below")
    assert refused.facts() == {}
    (note,) = refused.notes()
    assert "dubious ownership" in note
    assert note.endswith(f"git config --global --add safe.directory {folder}")


def test_the_environment_names_no_other_repository(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "new.py").write_text("y = 1\n")
    expected = read_code(folder)
    other = tmp_path_factory.mktemp("other")
    git(other, "init", "-q")
    (other / "secret.py").write_text("z = 1\n")
    git(other, "add", ".")
    git(other, "commit", "-qm", "another")
    named = {"GIT_DIR": ".git", "GIT_COMMON_DIR": ".git", "GIT_OBJECT_DIRECTORY": ".git/objects"}
    named |= {"GIT_WORK_TREE": ".", "GIT_INDEX_FILE": ".git/index", "GIT_PREFIX": "", "GIT_ATTR_SOURCE": "HEAD"}
    for name, place in named.items():  # as git sets them for a hook
        monkeypatch.setenv(name, str(other / place))
    monkeypatch.setenv("GIT_CONFIG_COUNT", "many")
    assert read_code(folder) == expected
    assert expected.commit
    assert expected.untracked == ("new.py",)


def test_git_leaves_no_name_of_a_repository_in_the_environment() -> None:
    listed = subprocess.run(["git", "rev-parse", "--local-env-vars"], capture_output=True, text=True, check=True)
    assert not set(listed.stdout.split()) - code._LOCAL


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
