"""What is written down of ranks that hang: of stopped ones, of running ones, of those that are gone."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from spotune.core.protocol import python_stacks_path
from spotune.core.store import Store
from spotune.guard import ranks
from spotune.guard.ranks import collect_stacks, upload_stacks
from tests.unit.guard.attempts import KEYS
from tests.waiting import until

pytestmark = pytest.mark.skipif(not ranks.PROC.joinpath("self", "stat").exists(), reason="reads /proc")

SLEEPS = "import time\nprint('up', flush=True)\ntime.sleep(3600)"
WRITES = f"""
import faulthandler, sys
from spotune.core.protocol import STACKS_SIGNAL
faulthandler.register(STACKS_SIGNAL, open(sys.argv[1], "w"), all_threads=True)
def waits_for_a_peer():
    {SLEEPS.replace(chr(10), chr(10) + "    ")}
waits_for_a_peer()
"""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a program that leads a process group, as ranks do; returns once it is up."""
    started = []

    def begin(program: str, *arguments: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", program, *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0)
        started.append(process)
        assert process.stdout
        assert process.stdout.readline() == "up\n"
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def no_py_spy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")


def stop(process: "subprocess.Popen[str]") -> None:
    looked_at = psutil.Process(process.pid)
    looked_at.suspend()
    until(lambda: looked_at.status() == psutil.STATUS_STOPPED)


def test_a_stopped_rank_is_described_by_the_kernel(start: Start, tmp_path: Path) -> None:
    process = start(WRITES, str(python_stacks_path(tmp_path, 3)))
    stop(process)
    (path,) = collect_stacks(tmp_path, {3: process.pid})
    assert path.name == "stacks-3.txt"
    text = path.read_text()
    assert text.startswith(f"rank 3, process {process.pid} (python")
    assert ", state T (stopped by a signal)\n" in text
    assert "py-spy: not installed on this machine" in text
    assert "its own Python stacks: it cannot write them in state T" in text
    threads = text.partition("threads, as the kernel sees them:\n")[2]
    assert threads.startswith(f"  {process.pid} python")
    assert process.poll() is None


def test_a_running_rank_writes_its_own_python_stacks(start: Start, tmp_path: Path) -> None:
    process = start(WRITES, str(python_stacks_path(tmp_path, 0)))
    collect_stacks(tmp_path, {0: process.pid})
    text = (tmp_path / "stacks-0.txt").read_text()
    assert "its own Python stacks:\n" in text
    assert "in waits_for_a_peer" in text
    assert process.poll() is None


def test_a_rank_without_a_handler_is_not_sent_the_signal(start: Start, tmp_path: Path) -> None:
    process = start(SLEEPS)
    collect_stacks(tmp_path, {0: process.pid})
    assert "it does not write them yet (it is still starting)" in (tmp_path / "stacks-0.txt").read_text()
    assert process.poll() is None


def test_other_processes_of_a_rank_are_listed(start: Start, tmp_path: Path) -> None:
    process = start(
        f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3600)'])\n{SLEEPS}"
    )
    (child,) = psutil.Process(process.pid).children()
    collect_stacks(tmp_path, {0: process.pid})
    others = (tmp_path / "stacks-0.txt").read_text().partition("its other processes:\n")[2]
    assert f"  {child.pid} python" in others
    child.kill()


def test_a_rank_that_is_gone_is_said_to_be(start: Start, tmp_path: Path) -> None:
    process = start("print('up', flush=True)")
    process.wait()
    collect_stacks(tmp_path, {1: process.pid})
    assert (tmp_path / "stacks-1.txt").read_text() == f"rank 1, process {process.pid}: is gone\n"


@pytest.mark.parametrize(("code", "said"), [(0, "py-spy dump --nonblocking:\nThread 7 (idle)"), (1, "exit code 1: No")])
def test_py_spy_is_used_where_it_is_installed(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, said: str
) -> None:
    program = tmp_path / "bin" / "py-spy"
    program.parent.mkdir()
    asked = '[ "$1 $2 $3" = "dump --nonblocking --pid" ] || exit 9'
    says = "echo 'Thread 7 (idle)'" if code == 0 else "echo 'No permission' >&2"
    program.write_text(f"#!/bin/sh\n{asked}\n{says}\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    process = start(SLEEPS)
    collect_stacks(tmp_path, {0: process.pid})
    assert said in (tmp_path / "stacks-0.txt").read_text()


def test_a_file_is_never_larger_than_its_limit(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "MOST_BYTES", 100)
    collect_stacks(tmp_path, {0: start(SLEEPS).pid})
    assert (tmp_path / "stacks-0.txt").stat().st_size == 100


def test_whatever_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    monkeypatch.setattr(ranks, "describe_rank", lambda *_: os.read(reading, 1).decode())
    assert collect_stacks(tmp_path, {0: 1}, timeout_s=0.01) == []
    os.write(writing, b"x")
    until((tmp_path / "stacks-0.txt").exists)
    os.close(reading)
    os.close(writing)


def test_they_go_to_the_attempts_folder_once(local_store: Store, tmp_path: Path) -> None:
    for rank in (0, 11):
        (tmp_path / f"stacks-{rank}.txt").write_text(f"rank {rank}")
    upload_stacks(local_store, KEYS, 4, tmp_path)
    assert local_store.read("runs/a-run/attempts/0004/stacks-11.txt") == b"rank 11"
    (tmp_path / "stacks-0.txt").write_text("another")
    upload_stacks(local_store, KEYS, 4, tmp_path)
    assert local_store.read(KEYS.stacks(4, 0)) == b"rank 0"


def test_work_is_that_of_the_group_and_only_a_stopped_rank_counts_as_stopped(start: Start) -> None:
    process = start(f"import time\nwhile time.process_time() < 0.1: pass\n{SLEEPS}")
    before = ranks.work_of({process.pid})
    assert before
    assert not before.stopped
    assert before.cpu_s >= 0.05
    assert before.moved_bytes > 0
    stop(process)
    after = ranks.work_of({process.pid})
    assert after
    assert after.stopped
    assert ranks.work_of(set()) == ranks.Work()


def test_a_system_without_proc_does_not_know(tmp_path: Path) -> None:
    assert ranks.work_of({1}, tmp_path) is None
    assert ranks.moved_bytes(1, tmp_path) == 0
    assert ranks.processes_in({1}, tmp_path / "none") == []
    assert ranks.read_stat(tmp_path) is None
