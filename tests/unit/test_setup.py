"""What a task's ``setup`` does on a machine: the real script and the real make, with what they call played by scripts.

A machine here is a PATH with little more than coreutils. Its interpreters tell the version that they are made with,
and note what they are asked to install; nothing is.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TASKS = ["dev.yaml", "notebook.yaml", "train.yaml", "train-multinode.yaml"]
TOOLS = ["bash", "sh", "cp", "dirname", "echo", "mkdir", "rm", "sleep", "touch"]
PYTHON = """#!/bin/bash
# An interpreter of {version}.
case "$1 $2" in
  "-c import jupyterlab"*) exit 1 ;;
  "-c "*) exec {real} -c "import sys; sys.version_info = {version}; exec(sys.argv[1])" "$2" ;;
  "-m venv") rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python"; cp "{tools}/installer" "$4/bin/uv" ;;
esac
echo "python {version} $*" >> {log}
"""
UV = """#!/bin/bash
echo "uv $*" >> {log}
[ "$1" = venv ] || exit 0
for folder; do :; done
mkdir -p "$folder/bin"; cp {tools}/python3.11 "$folder/bin/python"; cp {tools}/installer "$folder/bin/uv"
"""


class Machine:
    """Where ``setup`` runs: the project's files, and a ``log`` of what was called."""

    def __init__(self, folder: Path, version: tuple[int, int]) -> None:
        self.project, self.tools, self._log = folder / "sky_workdir", folder / "bin", folder / "log"
        self.tools.mkdir(parents=True)
        shutil.copytree(ROOT / "tasks", self.project / "tasks")
        for name in ("Makefile", "pyproject.toml", *(path.name for path in ROOT.glob("requirements-*.lock"))):
            shutil.copy(ROOT / name, self.project)
        for name in TOOLS:
            self.link(name)
        self.python("python3", version)
        self.python("python3.11", (3, 11))
        self.script("installer", '#!/bin/bash\necho "brings ${*: -1}" >> {log}\n')

    def link(self, name: str) -> None:
        found = shutil.which(name)
        assert found, name
        (self.tools / name).symlink_to(found)

    def script(self, name: str, text: str) -> None:
        (self.tools / name).write_text(text.replace("{tools}", str(self.tools)).replace("{log}", str(self._log)))
        (self.tools / name).chmod(0o755)

    def python(self, name: str, version: tuple[int, int]) -> None:
        self.script(name, PYTHON.replace("{version}", repr(version)).replace("{real}", sys.executable))

    def setup(self, task: str, **environ: str) -> str:
        """Runs a task's setup, which must succeed; returns what it called."""
        return self.run(yaml.safe_load((self.project / "tasks" / task).read_text())["setup"], **environ)

    def run(self, script: str, **environ: str) -> str:
        """Runs a line of shell, which must succeed; returns what it called."""
        self._log.write_text("")
        given = {"PATH": str(self.tools), "HOME": str(self.project.parent), **environ}
        done = subprocess.run(
            ["bash", "-c", script], cwd=self.project, env=given, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return self._log.read_text()

    @property
    def is_ready(self) -> bool:
        return (self.project / ".venv-train/.ready").is_file()


@pytest.mark.parametrize("task", TASKS)
def test_on_skypilots_images(tmp_path: Path, task: str) -> None:
    """Python 3.10, and uv already there."""
    machine = Machine(tmp_path, (3, 10))
    machine.link("make")
    machine.script("uv", UV)
    called = machine.setup(task)
    assert machine.is_ready
    assert called.startswith("uv venv --quiet --seed --python 3.11 .venv-train\n")
    assert "python (3, 11) -m pip install --quiet --disable-pip-version-check torch==" in called
    assert "(3, 10)" not in called
    assert "install" not in machine.setup(task).replace("jupyterlab", "")


def test_on_a_machine_with_a_python_that_will_do(tmp_path: Path) -> None:
    """Nothing is fetched from elsewhere than the package index."""
    machine = Machine(tmp_path, (3, 12))
    machine.link("make")
    assert "python (3, 12) -m venv --clear .venv-train\n" in machine.setup("train.yaml")
    assert machine.is_ready


def test_a_machine_that_trains_gets_the_trainer_alone(tmp_path: Path) -> None:
    machine = Machine(tmp_path, (3, 12))
    machine.link("make")
    called = machine.setup("train.yaml")
    assert [line for line in called.splitlines() if line.startswith("brings")] == [
        "brings requirements-trainer.lock",
        "brings .",
    ]
    assert not (machine.project / ".venv").exists()


def test_make_setup_makes_both(tmp_path: Path) -> None:
    """Whatever is there already stays; the trainer's test tools come last, and only here."""
    machine = Machine(tmp_path, (3, 12))
    machine.link("make")
    machine.setup("train.yaml")
    called = machine.run("make setup")
    brought = [line.removeprefix("brings ") for line in called.splitlines() if line.startswith("brings")]
    assert brought == ["requirements-launcher.lock", ".", "requirements-trainer-test.lock"]
    assert "torch" not in called
    assert (machine.project / ".venv/.ready").is_file()
    assert machine.run("make setup") == machine.run("make setup-train") == ""


def test_a_lock_that_changed_is_installed_again(tmp_path: Path) -> None:
    machine = Machine(tmp_path, (3, 12))
    machine.link("make")
    machine.run("make setup")
    (machine.project / "requirements-trainer.lock").write_text("changed")
    called = machine.run("make setup")
    assert "brings requirements-trainer.lock" in called
    assert "launcher" not in called


@pytest.mark.parametrize("version", [(3, 10), (3, 12)])
def test_an_environment_that_was_left_half_made(tmp_path: Path, version: tuple[int, int]) -> None:
    machine = Machine(tmp_path, version)
    machine.link("make")
    machine.script("uv", UV)
    half = machine.project / ".venv-train/bin/python"
    half.parent.mkdir(parents=True)
    half.write_text("#!/bin/bash\nexit 1\n")
    half.chmod(0o755)
    machine.setup("train.yaml")
    assert machine.is_ready


def test_in_a_pod_without_make(tmp_path: Path) -> None:
    machine = Machine(tmp_path, (3, 10))
    machine.script("uv", UV)
    machine.script(
        "apt-get",
        f"#!{shutil.which('bash')}\necho apt-get $* >> {{log}}\n"
        f"[ $1 = update ] || {shutil.which('ln')} -s {shutil.which('make')} {{tools}}/make\n",
    )
    assert machine.setup("train.yaml").startswith("apt-get update -qq\napt-get install -qq -y make\nuv venv")
    assert machine.is_ready


@pytest.mark.parametrize("task", TASKS)
def test_an_environment_that_is_there_already(tmp_path: Path, task: str) -> None:
    machine = Machine(tmp_path, (3, 10))
    assert machine.setup(task, SPOTUNE_PYTHON="/shared/env/bin/python") == ""
    assert not machine.is_ready


def test_what_cannot_be_set_up_fails(tmp_path: Path) -> None:
    machine = Machine(tmp_path, (3, 10))
    machine.link("make")
    machine.script("curl", "#!/bin/bash\nexit 6\n")
    with pytest.raises(AssertionError):
        machine.setup("train.yaml")
