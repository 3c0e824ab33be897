"""Runs tests on a machine that has no time for them: other programs compute, and every process stands still once.

    python -m tests.stress [--seed N] [--stop-s 5] pytest tests/unit

Beside the command runs ``stress-ng --cpu 4``. Every process of the tests (pytest, its workers, and whatever they start,
detached or not) is stopped once, at a random instant of its life, for ``--stop-s`` seconds. A process that a test has
stopped itself is left alone while it stands. Prints the seed and how many were stopped; exits as the command does.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from uuid import uuid4

import psutil

MARKER = "STRESS_RUN"  # in the environment of every process of the tests, but for those that get a clean one
LOOK_S = 0.1
MEAN_S = 2.0  # of a process's life until it is stopped: long-lived ones are, short-lived ones sometimes
STOPPED_S = 5.0
NO_PROGRAM = "stress-ng is not installed: apt-get install stress-ng"

Key = tuple[int, float]  # a process's pid and its start: it names the process for good


@dataclass
class Stops:
    """Which processes have been seen, when each is to be stopped, and which stand still now.

    ``signal``: sends a signal to a process. ``stood``: whether a process stands still already.
    """

    rng: random.Random
    stop_s: float
    send: Callable[[Key, int], bool]
    stands: Callable[[Key], bool]
    due: dict[Key, float] = field(default_factory=dict)
    until: dict[Key, float] = field(default_factory=dict)
    done: set[Key] = field(default_factory=set)

    def look(self, living: set[Key], now: float) -> None:
        """One look at the processes of the tests: stops those whose instant has come, continues those who stood."""
        for key in sorted(living - self.due.keys()):
            self.due[key] = now + self.rng.expovariate(1 / MEAN_S)
        for key, end in list(self.until.items()):
            if now >= end or key not in living:
                self.send(key, signal.SIGCONT)
                del self.until[key]
        for key in sorted(living - self.done):
            if now >= self.due[key] and not self.stands(key) and self.send(key, signal.SIGSTOP):
                self.done.add(key)
                self.until[key] = now + self.stop_s

    def let_go(self) -> None:
        """Continues everybody who stands still because of us."""
        for key in self.until:
            self.send(key, signal.SIGCONT)
        self.until.clear()


def send(key: Key, number: int) -> bool:
    """Signals this process, and no later one with its pid; returns whether it was there."""
    with suppress(psutil.Error, OSError):
        process = psutil.Process(key[0])
        if process.create_time() == key[1] and process.status() != psutil.STATUS_ZOMBIE:
            process.send_signal(number)
            return True
    return False


def stands(key: Key) -> bool:
    """Whether somebody else has stopped it, or is tracing it."""
    with suppress(psutil.Error):
        return psutil.Process(key[0]).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    return False


class Family:
    """The processes of a command, found by their parents, their session and a marker in their environment.

    Each process is judged once, when it is new: who is a stranger then stays one.
    """

    def __init__(self, root: int, marker: str, foreign: set[int]) -> None:
        self._marker, self._foreign = marker, foreign
        self._members: set[Key] = set()
        self._strangers: set[Key] = set()
        self._pids = {root}
        self._sessions = {root}

    def look(self) -> set[Key]:
        """Its members that live."""
        everybody = {
            (each.pid, each.create_time()): each for each in psutil.process_iter() if each.pid not in self._foreign
        }
        living = self._members & everybody.keys()
        self._pids = {pid for pid, _ in living} | (self._pids if not self._members else set())
        new = everybody.keys() - self._members - self._strangers
        for key in sorted(new, key=lambda key: key[1]):  # parents come first
            with suppress(psutil.Error, OSError):
                if self._is_ours(key, everybody[key]):
                    self._members.add(key)
                    living.add(key)
                    self._pids.add(key[0])
                    self._sessions.add(os.getsid(key[0]))
                else:
                    self._strangers.add(key)
        self._strangers &= everybody.keys()
        return living

    def _is_ours(self, key: Key, process: psutil.Process) -> bool:
        if key[0] in self._pids or process.ppid() in self._pids or os.getsid(key[0]) in self._sessions:
            return True
        return process.environ().get(MARKER) == self._marker


def run(command: list[str], seed: int, stop_s: float) -> int:
    """Runs the command under stress; returns its exit code."""
    program = shutil.which("stress-ng")
    if not program:
        print(NO_PROGRAM, file=sys.stderr)
        return 2
    print(f"stress: seed {seed}", flush=True)
    # setpriv: it ends with this process, however this one ends.
    burn = ["setpriv", "--pdeathsig", "TERM", program, "--cpu", "4", "--quiet"]
    nowhere = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    burner = subprocess.Popen(burn, start_new_session=True, **nowhere)
    stops = Stops(random.Random(seed), stop_s, send, stands)
    marker = uuid4().hex
    try:
        tests = subprocess.Popen(command, env={**os.environ, MARKER: marker}, start_new_session=True)
        family = Family(tests.pid, marker, {os.getpid(), burner.pid})
        try:
            while (code := tests.poll()) is None:
                stops.look(family.look(), time.monotonic())
                time.sleep(LOOK_S)
        except BaseException:
            stops.let_go()
            with suppress(ProcessLookupError):
                os.killpg(tests.pid, signal.SIGINT)
            tests.wait()
            raise
    finally:
        stops.let_go()
        with suppress(ProcessLookupError):
            os.killpg(burner.pid, signal.SIGTERM)
        burner.wait()
    print(f"stress: seed {seed}: {len(stops.done)} of {len(stops.due)} processes were stopped for {stop_s:g} s")
    return code


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.stress", description="Runs tests under stress.")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--stop-s", type=float, default=STOPPED_S)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="pytest and its arguments")
    given = parser.parse_args(argv)
    words = given.command[1:] if given.command[:1] == ["--"] else given.command
    if not words:
        parser.error("which tests? e.g. pytest tests/unit")
    command = [sys.executable, "-m", *words] if words[0] == "pytest" else words
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # nobody is left standing
    return run(command, given.seed, given.stop_s)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
