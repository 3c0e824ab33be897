"""A Python for the jobs with what this environment has installed, made in a second or two: nothing is installed anew.

Jobs run as an account that cannot read root's folders. What it can read is used where it lies; the rest is linked
into the lab's folder (hard links: no second copy of the data, and the lab may be deleted without a thought). The
project's own code is not among it: a job runs what SkyPilot brought along, ``src`` below its folder.
"""

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

from tests.lab.layout import Layout
from tests.lab.machine import may_run

SCRIPT = """\
#!/bin/sh
export PYTHONPATH="$PWD/src${{PYTHONPATH:+:$PYTHONPATH}}"
{library}exec {python} "$@"
"""
LEFT_OUT = shutil.ignore_patterns("site-packages", "test", "idlelib", "tkinter", "share", "*.a")


def install(lab: Layout) -> None:
    """Writes ``lab.job_python``."""
    folder = lab.job_python.parent
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    packages = Path(sysconfig.get_path("purelib"))
    if not may_run(lab, "ls", str(packages)):
        packages = link_tree(packages, folder / "packages")
    base = Path(sys.base_prefix)
    python, library = Path(os.path.realpath(sys.executable)), ""
    if not may_run(lab, str(python), "-c", "0"):
        copy = link_tree(base, folder / "base", LEFT_OUT)
        python = copy / python.relative_to(base)
        # Its search path for libraries names the place that it was built for.
        library = f'export LD_LIBRARY_PATH="{copy}/lib${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}"\n'
    environment = make_environment(folder / "environment", python, packages)
    lab.job_python.write_text(SCRIPT.format(library=library, python=environment))
    lab.job_python.chmod(0o755)


def make_environment(folder: Path, python: Path, packages: Path) -> Path:
    """A virtual environment that finds ``packages``, but not what their own .pth files name; returns its Python."""
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
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
