"""Who dies with whom: real processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.waiting import LIMIT_S, until

RANK = """
import os, sys, time
from spotune.sft.worker import die_with_parent
die_with_parent(os.environ, 0.1)
def fork():
    if os.fork() == 0:
        open(f"{sys.argv[1]}/child-{os.getpid()}", "w").close()
        while not os.path.exists(f"{sys.argv[1]}/asked"):
            time.sleep(0.01)
        open(f"{sys.argv[1]}/alive-{os.getpid()}", "w").close()
        time.sleep(300)
fork()
if "thread" in sys.argv:
    import threading
    thread = threading.Thread(target=fork)
    thread.start()
    thread.join()
open(f"{sys.argv[1]}/ready", "w").close()
time.sleep(300)
"""
# The rank dies between the fork and the moment when the child looks for its parent.
KILLED_WHILE_FORKING = """
import os, signal, sys, time
from spotune.sft.worker import die_with_parent
def wait_for_orphanage():
    open(f"{sys.argv[1]}/child-{os.getpid()}", "w").close()
    while os.getppid() == rank:
        time.sleep(0.01)
rank = os.getpid()
os.register_at_fork(after_in_child=wait_for_orphanage)  # before the lifeline looks
die_with_parent(os.environ, 0.1)
if os.fork() == 0:
    time.sleep(300)
time.sleep(0.3)
os.kill(rank, signal.SIGKILL)
"""


def children_in(folder: Path, count: int) -> list[int]:
    until(lambda: len(list(folder.glob("child-*"))) >= count)
    return [int(path.name[6:]) for path in folder.glob("child-*")]


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_what_a_rank_forks_dies_with_it(tmp_path: Path) -> None:
    rank = subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path)])
    (child,) = children_in(tmp_path, 1)
    rank.kill()
    rank.wait()
    until(lambda: gone(child))


def test_a_thread_that_ends_takes_nothing_along(tmp_path: Path) -> None:
    rank = subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path), "thread"])
    found = children_in(tmp_path, 2)
    until((tmp_path / "ready").exists)  # the thread has ended by now
    (tmp_path / "asked").touch()
    for pid in found:
        until(lambda pid=pid: (tmp_path / f"alive-{pid}").exists() or gone(pid))  # type: ignore[misc]
    assert not any(gone(pid) for pid in found)
    for pid in (rank.pid, *found):
        os.kill(pid, signal.SIGKILL)
    rank.wait()


def test_one_that_is_killed_while_it_forks_leaves_nobody(tmp_path: Path) -> None:
    rank = subprocess.Popen([sys.executable, "-c", KILLED_WHILE_FORKING, str(tmp_path)])
    (child,) = children_in(tmp_path, 1)
    rank.wait()
    until(lambda: gone(child))


@pytest.mark.parametrize("guard", ["1", "999999"])
def test_a_guard_that_was_gone_before_the_rank_began(tmp_path: Path, guard: str) -> None:
    environ = {**os.environ, "SPOTUNE_GUARD_PID": guard}
    rank = subprocess.run([sys.executable, "-c", RANK, str(tmp_path)], env=environ, timeout=LIMIT_S, check=False)
    assert rank.returncode == -signal.SIGKILL
    assert not list(tmp_path.iterdir())
