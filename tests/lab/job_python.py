"""A Python for the jobs with what the trainer's environment has installed, made in a second or two.

Nothing is installed anew.

Jobs run as an account that cannot read root's folders. What it can read is used where it lies; the rest is linked
into the lab's folder (hard links: no second copy of the data, and the lab may be deleted without a thought). The
project's own code is not among it: a job runs what SkyPilot brought along, ``src`` below its folder.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from spotune.launch.task import find_trainer
from tests.lab.layout import Layout
from tests.lab.machine import may_run

SCRIPT = """\
#!/bin/sh
export PYTHONPATH="$PWD/src${{PYTHONPATH:+:$PYTHONPATH}}"
{library}exec {python} "$@"
"""
FACTS = """\
import json, os, sys, sysconfig
print(json.dumps([os.path.realpath(sys.executable), sys.base_prefix, sysconfig.get_path("purelib")]))
"""
ROOT = Path(__file__).parents[2]
LEFT_OUT = shutil.ignore_patterns("site-packages", "test", "idlelib", "tkinter", "share", "*.a")


@dataclass(frozen=True)
class Trainer:
    """The trainer's environment: its interpreter with links followed, that interpreter's own folder, its packages."""

    python: Path
    base: Path
    packages: Path

    @classmethod
    def read(cls) -> "Trainer":
        """Raises InputError where there is no trainer's Python."""
        python = find_trainer({}, ROOT)  # not SPOTUNE_PYTHON: in the lab's shell that is the Python made here
        done = subprocess.run([python, "-c", FACTS], capture_output=True, text=True, check=True)
        return cls(*map(Path, json.loads(done.stdout)))


def install(lab: Layout) -> None:
    """Writes ``lab.job_python``."""
    trainer = Trainer.read()
    folder = lab.job_python.parent
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    packages, python, library = trainer.packages, trainer.python, ""
    if not may_run(lab, "ls", str(packages)):
        packages = link_tree(packages, folder / "packages")
    if not may_run(lab, str(python), "-c", "0"):
        copy = link_tree(trainer.base, folder / "base", LEFT_OUT)
        python = copy / python.relative_to(trainer.base)
        # Its search path for libraries names the place that it was built for.
        library = f'export LD_LIBRARY_PATH="{copy}/lib${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}"\n'
    environment = make_environment(folder / "environment", python, packages, trainer.packages.parent.name)
    lab.job_python.write_text(SCRIPT.format(library=library, python=environment))
    lab.job_python.chmod(0o755)


def make_environment(folder: Path, python: Path, packages: Path, version: str) -> Path:
    """A virtual environment that finds ``packages``, but not what their own .pth files name; returns its Python.

    ``version``: as in the folder's name, ``python3.11``.
    """
    site = folder / "lib" / version / "site-packages"
    site.mkdir(parents=True)
    (folder / "bin").mkdir()
    (folder / "bin" / "python").symlink_to(python)
    (folder / "pyvenv.cfg").write_text(f"home = {python.parent}\ninclude-system-site-packages = false\n")
    (site / "lab.pth").write_text(f"{packages}\n")
    return folder / "bin" / "python"


def link_tree(source: Path, target: Path, left_out: Callable[[str, list[str]], set[str]] | None = None) -> Path:
    """A tree of hard links, of copies where the file system is another one."""
    shutil.copytree(source, target, symlinks=True, ignore=left_out, copy_function=_link)
    return target


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
