"""What of the code goes to the bucket, what stays here, and what the plan says of both: by real git."""

import subprocess
from pathlib import Path

import pytest

from spotune.core.keys import Keys
from tests.unit.project import CONFIG, Project

TOKEN = "hf" + "_QwErTyUiOpAsDfGhJkLzXcVbNmQwErTyUi"  # in two parts: this file holds no secret
KEY = "-----BEGIN PRIVATE" + " KEY-----\n" + "MIIEpAIBAAKCAQEA\n" * 8
UNTRACKED = {
    "secrets.yaml": "db: hunter2hunter2\n",
    "credentials.ini": "[a]\nuser = x\n",
    "local.toml": "a = 1\n",
    "env.sh": "export A=1\n",
    "deploy.yaml": f"hub:\n  token: {TOKEN}\n",
    "new.py": "x = 1\n",
}


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@y", *words], cwd=folder, check=True)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A checkout with committed code, a committed .envrc among it."""
    project = Project(tmp_path / "project", monkeypatch)
    project.write(".gitignore", "home/\n")
    project.write(".envrc", "export A=1\n")
    project.write("train.py", "x = 1\n" * 30)
    project.write("old.py", f'x = 1\nTOKEN = "{TOKEN}"\n')
    git(project.folder, "init", "-q")
    git(project.folder, "add", ".")
    git(project.folder, "commit", "-qm", "one")
    return project


def in_the_bucket(project: Project) -> str:
    """All of the code in the bucket, as one text."""
    keys = project.store.keys(Keys("run-a").root)
    return "\n".join((project.store.read(key) or b"").decode(errors="replace") for key in keys)


def plan_of(project: Project, *arguments: str) -> list[str]:
    result = project.run("train", "run.yaml", "--name", "run-a", "--dryrun", *arguments)
    assert result.exit_code == 0, result.stderr
    return [" ".join(line.split()) for line in result.stdout.splitlines()]


def test_new_secrets_stay_here_and_the_plan_says_so(project: Project) -> None:
    for name, text in UNTRACKED.items():
        project.write(name, text)
    plan = plan_of(project)
    (code,) = [line for line in plan if line.startswith("code ")]
    assert code.endswith(", 1 new file")
    (left,) = [line for line in plan if line.startswith("left out ")]
    assert left == (
        "left out credentials.ini (its name), deploy.yaml (line 2 looks like a Hugging Face token),"
        " env.sh (its name), local.toml (its name), secrets.yaml (its name)"
    )
    project.submit()
    sent = in_the_bucket(project)
    assert "new.py" in sent
    assert not [text for name, text in UNTRACKED.items() if name != "new.py" and text in sent]
    assert TOKEN not in sent
    assert "hunter2" not in sent


def test_changed_files_with_secrets_stay_here_whole(project: Project) -> None:
    project.write(".envrc", "export PASSWORD=tr0ub4dor\n")
    project.write("train.py", "x = 2\n" + "x = 1\n" * 28 + f"{KEY}x = 1\n")
    project.write("old.py", "x = 1\n")  # what is taken out of a file is in a patch too
    plan = plan_of(project)
    (left,) = [line for line in plan if line.startswith("left out ")]
    assert left == (
        "left out .envrc (its name), old.py (its change shows what looks like a Hugging Face token),"
        " train.py (line 30 looks like a"
        " private key)"
    )
    found = project.json("train", "run.yaml", "--name", "run-a", "--dryrun")["code"]
    assert [one["path"] for one in found["left_out"]] == [".envrc", "old.py", "train.py"]
    project.submit()
    sent = in_the_bucket(project)
    assert "tr0ub4dor" not in sent
    assert TOKEN not in sent
    assert "PRIVATE KEY" not in sent
    assert "x = 2" not in sent
    again = project.run("train", "--from", "run-a", "-y", "-d", "--name", "run-b")
    assert ".envrc, old.py, train.py may have changed: it was left out" in again.stderr


def test_a_renamed_secret_and_a_binary_one_stay_here(project: Project) -> None:
    project.write("raw.bin", "\0" + "a" * 100)
    git(project.folder, "add", "raw.bin")
    git(project.folder, "commit", "-qm", "two")
    git(project.folder, "mv", ".envrc", "harmless.txt")
    project.write("raw.bin", "\0" + TOKEN)
    (left,) = [line for line in plan_of(project) if line.startswith("left out ")]
    assert left == "left out harmless.txt (its name), raw.bin (line 1 looks like a Hugging Face token)"


def test_a_checkout_below_the_repositorys_top(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    git(project.folder, "mv", "train.py", "träin me.py")
    (project.folder / "below").mkdir()
    for name in ("run.yaml", "data.jsonl", "model"):
        (project.folder / name).rename(project.folder / "below" / name)
    monkeypatch.chdir(project.folder / "below")
    project.write("below/secrets.yaml", "a: 1\n")
    project.write("träin me.py", f"x = 1\ntoken = '{TOKEN}'\n")
    (left,) = [line for line in plan_of(project) if line.startswith("left out ")]
    assert left == "left out ../träin me.py (line 2 looks like a Hugging Face token), secrets.yaml (its name)"


def test_without_secrets_nothing_is_left_out(project: Project) -> None:
    project.write("train.py", "x = 2\n")
    project.write("more.py", "y = 1\n")
    project.write("notes.ipynb", "{}")
    plan = plan_of(project)
    assert [line for line in plan if line.startswith("left out")] == []
    assert [line.partition(", ")[2] for line in plan if line.startswith("code ")] == ["1 changed and 1 new files"]
    assert "names only 1 new file" in plan


TASK = "resources: {}\nenvs: {SPOTUNE_PYTHON: python3}\nrun: |\n  "
GO = f"{TASK}exec python go.py\n"
CASES: list[tuple[dict[str, str], str, str]] = [
    ({"tasks/train.yaml": f"{TASK}. ./env.sh && exec x\n", "env.sh": "A=1\n"}, "env.sh", "the task's commands"),
    ({"tasks/train.yaml": GO, "go.py": "open('local.toml')\n", "local.toml": "a = 1\n"}, "local.toml", "go.py"),
    ({"tasks/train.yaml": GO, "go.py": "import mine\n", "mine.py": f"T = '{TOKEN}'\n"}, "mine.py", "go.py"),
    ({"tasks/train.yaml": f"{TASK}export HF_TOKEN={TOKEN}\n"}, "tasks/train.yaml", "the task"),
    (
        {"run.yaml": f"{CONFIG}chat_template_path: token.jinja\n", "token.jinja": "{{ messages }}"},
        "token.jinja",
        "the config's chat_template_path",
    ),
    (
        {"run.yaml": f"{CONFIG}deepspeed: secrets/ds.json\n", "secrets/ds.json": "{}"},
        "secrets/ds.json",
        "the config's deepspeed",
    ),
    (
        {"run.yaml": CONFIG.replace("data.jsonl", "private_key.json"), "private_key.json": '{"text": "a"}\n'},
        "private_key.json",
        "the config's data",
    ),
    ({"model/local.json": "{}"}, "model/local.json", "the config's model_name_or_path"),
    ({"run.yaml": f"{CONFIG}env: {{K: {TOKEN}}}\n"}, "run.yaml", "the config"),
]


@pytest.mark.parametrize(("files", "left", "who"), CASES)
def test_a_left_out_file_that_the_run_uses_is_refused(
    project: Project, files: dict[str, str], left: str, who: str
) -> None:
    for name, text in files.items():
        project.write(name, text)
    result = project.run("train", "run.yaml", "--name", "run-a", "-y", "-d")
    assert (result.exit_code, result.stdout) == (2, ""), (result.stderr, result.exception)
    assert result.stderr.startswith(f"{left}: is left out of the code snapshot (")
    assert result.stderr.endswith(
        f"and {who} uses it (give the secret by --secret NAME and take it out of the file, or commit the file)\n"
    )
    assert result.stderr.count("\n") == 1
    assert project.store.keys("runs") == []


def test_the_token_in_a_repositorys_url_is_not_recorded(project: Project) -> None:
    task = f"workdir: {{url: 'https://ada:{TOKEN}@host/x.git', ref: main}}\n{TASK}exec python -m spotune.sft\n"
    project.write("tasks/train.yaml", task)
    assert "code https://host/x.git at main" in plan_of(project)
