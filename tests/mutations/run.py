"""Does the suite notice when the code is wrong? Puts the faults of mutations.yaml in and runs who should see them.

    python tests/mutations/run.py --jobs 2                      all of them
    python tests/mutations/run.py --only lowest-priority-first  one
    python tests/mutations/run.py --unmutated                   do the tests that it relies on pass without a fault?

Every fault is put into a copy of the checkout (what git tracks or would track), so that the checkout itself stays as
it is. A fault that makes the tests run out of time counts as caught: it would be seen. Tests wait at most 90 s for
something, not 300. Prints a table.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[2]
MUTATIONS = Path(__file__).with_name("mutations.yaml")
TRAINER_TESTS = "tests/trainer"  # what is below it needs the trainer's libraries
TRAINER_ENVIRONMENT = ".venv-train"
TIMEOUT_S = 600.0
LIMIT, SHORT_LIMIT = "LIMIT_S = 300.0", "LIMIT_S = 90.0"  # tests/waiting.py
TESTS_FAILED = 1  # pytest's exit code; any other but 0 says that it could not run them


@dataclass(frozen=True)
class Mutation:
    """A fault: the line ``before`` of ``file`` (below src/spotune) becomes ``after``; ``tests`` should notice."""

    name: str
    file: str
    before: str
    after: str
    property: str
    tests: tuple[str, ...]

    def apply(self, copy: Path) -> None:
        """Puts the fault into a copy of the checkout; raises ValueError where the line is not there exactly once."""
        path = copy / "src/spotune" / self.file
        lines = path.read_text().splitlines(keepends=True)
        found = [number for number, line in enumerate(lines) if line.strip() == self.before]
        if len(found) != 1:
            raise ValueError(f"{self.name}: {self.file} has the line {len(found)} times, not once: {self.before}")
        lines[found[0]] = lines[found[0]].replace(self.before, self.after)
        path.write_text("".join(lines))


@dataclass(frozen=True)
class Result:
    """What became of one mutation: ``caught``, ``NOT caught``, or what kept its tests from running.

    ``by``: the test that failed, and why.
    """

    mutation: Mutation
    verdict: str
    by: str
    seconds: float


@dataclass(frozen=True)
class Pythons:
    """The interpreters of the two environments."""

    plain: str
    trainer: str

    def of(self, test: str) -> str:
        return self.trainer if test.startswith(TRAINER_TESTS) else self.plain


def read_mutations(path: Path, tests: Path | None = None) -> list[Mutation]:
    """All of a file; ``tests`` (name -> list) says what to run in place of what the file says."""
    entries = yaml.safe_load(path.read_text())
    others = yaml.safe_load(tests.read_text()) if tests else {}
    return [Mutation(**entry | {"tests": tuple(others.get(entry["name"], entry["tests"]))}) for entry in entries]


def copy_checkout(target: Path) -> None:
    """Copies what git tracks or would track of the checkout."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def shorten_waits(copy: Path) -> None:
    """Lowers the limit of what tests wait for: with a fault in it, many a test waits for what never comes."""
    path = copy / "tests/waiting.py"
    text = path.read_text()
    if LIMIT not in text:
        raise ValueError(f"{path.name} does not have {LIMIT}")
    path.write_text(text.replace(LIMIT, SHORT_LIMIT))


def try_out(mutation: Mutation, is_applied: bool, pythons: Pythons, timeout_s: float) -> Result:
    """Runs a mutation's tests, one group of the same interpreter after the other, up to the first that fails."""
    began = time.monotonic()
    if not mutation.tests:
        return Result(mutation, "no tests given", "", 0.0)
    with TemporaryDirectory(prefix="mutation-") as folder:
        copy = Path(folder, "copy")
        copy_checkout(copy)
        shorten_waits(copy)
        # The launcher looks for it in its own checkout: without it no job is accepted, whatever the fault.
        (copy / TRAINER_ENVIRONMENT).symlink_to(Path(pythons.trainer).absolute().parents[1])
        if is_applied:
            mutation.apply(copy)
        verdict, by = "NOT caught", ""
        for python, group in groupby(mutation.tests, pythons.of):
            left_s = timeout_s - (time.monotonic() - began)
            verdict, by = run_tests(copy, python, list(group), left_s)
            if verdict != "NOT caught":
                break
    return Result(mutation, verdict, by, time.monotonic() - began)


def run_tests(copy: Path, python: str, tests: list[str], timeout_s: float) -> tuple[str, str]:
    """The verdict on a copy, and the test that gave it; whatever the tests have started is gone afterwards."""
    source = f"{copy}/src"  # in front of an installed package, for all children too
    options = ["-x", "-q", "-p", "no:cacheprovider", "-rfE", f"--basetemp={copy.parent}/tmp"]
    environ = {**os.environ, "PYTHONPATH": source}
    with open(copy.parent / "output", "w+") as output:
        process = subprocess.Popen(
            [python, "-m", "pytest", *options, *tests],
            cwd=copy, env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            code = process.wait(max(1.0, timeout_s))
        except subprocess.TimeoutExpired:
            return "caught", f"a timeout of {timeout_s:.0f} s"
        finally:
            process.kill()
            process.wait()
            end_processes_of(source)
        output.seek(0)
        said = output.read()
    if code == 0:
        return "NOT caught", ""
    failed = re.findall(r"^(?:FAILED|ERROR) (.*)$", said, re.MULTILINE)
    if code != TESTS_FAILED:
        return f"cannot be run (pytest: {code})", (failed or said.strip().splitlines() or [""])[-1]
    return "caught", failed[0] if failed else "?"


def end_processes_of(source: str) -> None:
    """Kills what still runs the code of a copy: it says so in its environment."""
    while left := list(processes_of(source)):
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=1.0)


def processes_of(source: str) -> Iterator[psutil.Process]:
    """Live processes whose PYTHONPATH leads to a copy."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            is_ours = source in process.environ().get("PYTHONPATH", "").split(os.pathsep)
            if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def table(results: list[Result]) -> str:
    """The results as a table of Markdown, and the figure."""
    lines = ["| name | file | result | by | seconds |", "|---|---|---|---|---|"]
    for result in results:
        by = result.by.partition(" - ")[0]
        lines.append(
            f"| {result.mutation.name} | {result.mutation.file} | {result.verdict} | {by} | {result.seconds:.0f} |"
        )
    caught = sum(result.verdict == "caught" for result in results)
    return "\n".join([*lines, "", f"{caught} of {len(results)} caught"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="runs the tests")
    trainer = str(ROOT / TRAINER_ENVIRONMENT / "bin/python")
    parser.add_argument("--trainer-python", default=trainer, help=f"runs those below {TRAINER_TESTS}")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this mutation; may be repeated")
    parser.add_argument("--tests", type=Path, metavar="FILE", help="YAML, name -> tests, in place of mutations.yaml's")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, metavar="S", help="for each; counts as caught")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="mutations at once")
    parser.add_argument("--unmutated", action="store_true", help="run the same tests without the faults")
    given = parser.parse_args()

    mutations = read_mutations(MUTATIONS, given.tests)
    if unknown := set(given.only) - {mutation.name for mutation in mutations}:
        parser.error(f"no such mutation: {', '.join(sorted(unknown))}")
    chosen = [mutation for mutation in mutations if not given.only or mutation.name in given.only]
    pythons = Pythons(given.python, given.trainer_python)

    def work(mutation: Mutation) -> Result:
        result = try_out(mutation, not given.unmutated, pythons, given.timeout)
        print(f"{result.verdict}: {mutation.name} ({result.seconds:.0f} s) {result.by}", file=sys.stderr, flush=True)
        return result

    with ThreadPoolExecutor(given.jobs) as pool:
        print(table(list(pool.map(work, chosen))))


if __name__ == "__main__":
    main()
