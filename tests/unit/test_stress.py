"""The stress that tests are run under: who is stopped, when, and who is left alone."""

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests import stress
from tests.stress import Family, Key, Stops
from tests.waiting import ended, until

A, B = (1, 1.0), (2, 2.0)


class Machine:
    """Processes that only remember what was sent to them."""

    def __init__(self) -> None:
        self.sent: list[tuple[Key, int]] = []
        self.standing: set[Key] = set()

    def send(self, key: Key, number: int) -> bool:
        self.sent.append((key, number))
        (self.standing.add if number == signal.SIGSTOP else self.standing.discard)(key)
        return True

    def stops(self, seed: int = 0) -> Stops:
        return Stops(random.Random(seed), 5.0, self.send, self.standing.__contains__)


def test_each_is_stopped_once_for_as_long_as_was_said() -> None:
    machine = Machine()
    stops = machine.stops()
    stood: dict[Key, list[int]] = {A: [], B: []}
    for now in range(100):
        stops.look({A, B}, float(now))
        for key in machine.standing:
            stood[key].append(now)
    for seconds in stood.values():
        assert seconds == list(range(seconds[0], seconds[0] + 5))
    assert stops.done == {A, B}
    assert machine.standing == set()


def test_the_seed_decides_when() -> None:
    def dues(seed: int) -> dict[Key, float]:
        stops = Machine().stops(seed)
        stops.look({A, B}, 0.0)
        return stops.due

    assert dues(1) == dues(1) != dues(2)


def test_who_was_stopped_by_a_test_is_not_continued() -> None:
    machine = Machine()
    stops = machine.stops()
    machine.standing.add(A)
    for now in range(100):
        stops.look({A}, float(now))
    assert machine.sent == []
    machine.standing.discard(A)
    stops.look({A}, 100.0)
    assert machine.sent == [(A, signal.SIGSTOP)]


def test_who_stands_is_let_go_at_the_end() -> None:
    machine = Machine()
    stops = machine.stops()
    stops.look({A}, 0.0)
    stops.look({A}, 1000.0)
    assert machine.standing == {A}
    stops.let_go()
    assert machine.standing == set()


DETACHED = """
import os, subprocess, sys
child = [sys.executable, "-c", "print(flush=True); input()"]
started = subprocess.Popen(child, stdin=0, stdout=subprocess.PIPE, start_new_session=True)
started.stdout.readline()
print(started.pid, flush=True)
os._exit(0) if sys.argv[1] == "leave" else input()
"""


@pytest.mark.parametrize("parent", ["leave", "stay"])
def test_processes_that_detached_belong_to_it(parent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child in a session of its own, whose parent has ended or not, is found; nobody else is."""
    environ = {**os.environ, stress.MARKER: "this run"}
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    stranger = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    first = subprocess.Popen([sys.executable, "-c", DETACHED, parent], env=environ, **streams, start_new_session=True)  # type: ignore[call-overload]
    assert first.stdout
    child = int(first.stdout.readline())
    if parent == "leave":
        ended(first)
    found = {pid for pid, _ in Family(first.pid, "this run", {os.getpid()}).look()}
    assert child in found
    assert not {stranger.pid, os.getpid()} & found
    for process in (first, stranger):
        process.communicate(b"\n")
    until(lambda: not psutil.pid_exists(child), "the child ends with its input")


SUITE = """
import time
from pathlib import Path
def test_it():
    while not Path(__file__).with_name("stopped").exists():
        time.sleep(0.01)
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("stress-ng"), reason="no stress-ng here")
def test_a_suite_is_stopped_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def send(key: Key, number: int) -> bool:
        if number == signal.SIGSTOP:
            (tmp_path / "stopped").touch()
        return real(key, number)

    real = stress.send
    monkeypatch.setattr(stress, "send", send)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process is not stress's own
    (tmp_path / "test_it.py").write_text(SUITE)
    suite = ["pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", str(tmp_path)]
    assert stress.main(["--seed", "7", "--stop-s", "0.2", *suite]) == 0
    said = capfd.readouterr().out
    assert "stress: seed 7\n" in said
    assert "1 passed" in said
    assert "1 of 1 processes were stopped for 0.2 s" in said


def test_without_the_program_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert stress.main(["pytest"]) == 2
    assert capsys.readouterr().err == "stress-ng is not installed: apt-get install stress-ng\n"
