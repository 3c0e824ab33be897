"""Set-up from nothing: what ``tasks/setup.sh`` costs a machine that trains, and whether each extra installs by itself.

    python benchmarks/setup.py [COMMIT...]                   # default: the last commit with one environment, and HEAD
    python benchmarks/setup.py --extras [--installer pip]    # spotune[launcher], spotune[trainer]; default installer uv

Each commit is checked out in a folder of its own and set up with an empty HOME, so that no cache helps. Packages are
those of the environment that the script makes, bytes what its folder takes on disk. Seconds are those of the wall
clock; CPU time depends less on what else the machine does.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ONE_ENVIRONMENT = "4a9b72c"  # the last commit before .venv-train
ENVIRONMENTS = (".venv-train", ".venv")
UV, TORCH = "uv==0.13.9", "torch==2.13.0"
# What the extra brings, and what it must not bring.
EXTRAS = {"launcher": ("sky", "torch"), "trainer": ("trl", "sky")}
FOREIGN = ("SPOTUNE_", "VIRTUAL_ENV", "UV_", "XDG_", "PYTHONPATH")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commits", nargs="*", default=[ONE_ENVIRONMENT, "HEAD"])
    parser.add_argument("--extras", action="store_true", help="install each extra into a fresh environment instead")
    parser.add_argument("--installer", choices=("uv", "pip"), default="uv")
    options = parser.parse_args()
    if options.extras:
        for name in EXTRAS:
            install_extra(name, options.installer)
        return
    print("| commit | environment | packages | on disk | `tasks/setup.sh` | its CPU time | again |")
    print("|---|---|---|---|---|---|---|")
    for commit in options.commits:
        print(measure(commit), flush=True)


@contextmanager
def empty_home() -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder, and an environment with an empty HOME in it."""
    with tempfile.TemporaryDirectory(prefix="setup-") as name:
        folder = Path(name)
        (folder / "home").mkdir()
        kept = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN)}
        yield folder, {**kept, "HOME": str(folder / "home"), "PIP_CACHE_DIR": str(folder / "home/.cache/pip")}


def measure(commit: str) -> str:
    """The table's row of one commit."""
    with empty_home() as (folder, environ):
        checkout = folder / "spotune"
        call(["git", "clone", "--quiet", "--shared", "--no-checkout", str(ROOT), str(checkout)], ROOT, environ)
        full = subprocess.run(["git", "rev-parse", commit], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        call(["git", "checkout", "--quiet", full.strip()], checkout, environ)
        used = cpu_seconds()
        first = call(["bash", "tasks/setup.sh"], checkout, environ)
        used = cpu_seconds() - used
        again = call(["bash", "tasks/setup.sh"], checkout, environ)
        made = next(checkout / name for name in ENVIRONMENTS if (checkout / name).is_dir())
        packages = len(list(made.glob("lib/python*/site-packages/*.dist-info")))
        figures = f"{packages} | {bytes_on_disk(made) / 1e9:.2f} GB | {first:.0f} s | {used:.0f} s | {again:.1f} s"
        return f"| {full[:7]} | `{made.name}` | {figures} |"


def cpu_seconds() -> float:
    """User and system time of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def bytes_on_disk(folder: Path) -> int:
    """What all files below a folder take, hard links once."""
    facts = (path.lstat() for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    return 512 * sum({(each.st_dev, each.st_ino): each.st_blocks for each in facts}.values())


def install_extra(name: str, installer: str) -> None:
    """Installs ``spotune[name]`` as a user would; ends the program where that fails, or brings too much."""
    brings, brings_not = EXTRAS[name]
    with empty_home() as (folder, environ):
        venv, wanted = folder / "venv", f"{ROOT}[{name}]"
        python = str(venv / "bin" / "python")
        call([sys.executable, "-m", "venv", str(venv)], folder, environ)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        seconds = 0.0
        if installer == "uv":
            call([*pip, UV], folder, environ)
            if name == "trainer":  # as the Makefile does: pip also takes a wheel that lies on disk
                seconds += call([*pip, TORCH], folder, environ)
            seconds += call(
                [str(venv / "bin/uv"), "pip", "install", "--quiet", "--python", python, wanted], folder, environ
            )
        else:
            seconds += call([*pip, wanted], folder, environ)
        call([python, "-m", "pip", "check", "--quiet", "--disable-pip-version-check"], folder, environ)
        call([python, "-c", f"import {brings}, spotune.core.store"], folder, environ)
        has_more = subprocess.run([python, "-c", f"import {brings_not}"], env=environ, capture_output=True, check=False)
        if not has_more.returncode:
            sys.exit(f"spotune[{name}] brings {brings_not} too")
        packages = len(list(venv.glob("lib/python*/site-packages/*.dist-info")))
        print(f"spotune[{name}] with {installer}: {packages} packages in {seconds:.0f} s", flush=True)


def call(command: list[str], folder: Path, environ: Mapping[str, str]) -> float:
    """Runs a command and returns its wall seconds; ends the program with its output where it fails."""
    began = time.monotonic()
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(
            f"{' '.join(command)} ended with exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return time.monotonic() - began


if __name__ == "__main__":
    if shutil.which("git") is None:
        sys.exit("git is needed")
    main()
