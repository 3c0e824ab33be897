"""ssh sessions through a real sshd, where there is one."""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from spotune.idle import Process, processes, session_look
from tests.waiting import ended, until

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin")
pytestmark = pytest.mark.skipif(not SSHD or not shutil.which("ssh"), reason="no OpenSSH here")


@dataclass(frozen=True)
class Sshd:
    """An sshd that runs, and what connects to it."""

    pid: int
    port: int
    connect: Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[Sshd]:
    """Starts an sshd for this user alone."""
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {
        "ListenAddress": "127.0.0.1",
        "Port": port,
        "HostKey": tmp_path / "host",
        "AuthorizedKeysFile": tmp_path / "user.pub",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PermitRootLogin": "yes",
    }
    (tmp_path / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    started: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> "subprocess.Popen[bytes]":
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        started.append(subprocess.Popen(command, **streams))  # type: ignore[call-overload]
        return started[-1]

    assert SSHD
    daemon = start(SSHD, "-D", "-e", "-f", str(tmp_path / "sshd_config"))
    until(lambda: daemon.poll() is not None or listens(port), "sshd listens")
    if daemon.poll() is not None:
        pytest.skip("sshd does not start for this user")
    options = "BatchMode=yes StrictHostKeyChecking=no UserKnownHostsFile=/dev/null IdentitiesOnly=yes".split()
    common = ["ssh", "-F", "none", "-p", str(port), "-i", str(tmp_path / "user")]

    def connected(*arguments: str, flags: tuple[str, ...] = ()) -> "subprocess.Popen[bytes]":
        more = [part for option in options for part in ("-o", option)]
        return start(*common, *more, *flags, "127.0.0.1", *arguments)

    yield Sshd(daemon.pid, port, connected)
    for pid in below(daemon.pid):  # what runs without a terminal outlives its client
        if pid != daemon.pid:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    for process in reversed(started):
        process.kill()
        ended(process)


def below(root: int) -> dict[int, Process]:
    """An sshd and everything that it started."""
    everybody = processes()
    found = {root}
    while more := {each.pid for each in everybody.values() if each.parent in found} - found:
        found |= more
    return {pid: each for pid, each in everybody.items() if pid in found}


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def seen(daemon: int, command: str) -> list[str]:
    """The signs of sessions once ``command`` runs in one."""

    def runs() -> dict[int, Process] | None:
        everybody = below(daemon)
        there = any(each.command.endswith(command) and each.name == "sleep" for each in everybody.values())
        return everybody if there else None

    return [sign.what for sign in session_look(until(runs, f"no {command}"), 1.0)]


@pytest.mark.parametrize(("flags", "kind"), [((), "without a terminal"), (("-tt",), "with a terminal")])
def test_a_session_counts(sshd: Sshd, flags: tuple[str, ...], kind: str) -> None:
    sshd.connect("sleep 61", flags=flags)
    assert seen(sshd.pid, "sleep 61") == [f"ssh session {kind} (sleep)"]


def test_one_that_only_forwards_a_port_does_not(sshd: Sshd) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    tunnel = sshd.connect(flags=("-N", "-L", f"{port}:127.0.0.1:{sshd.port}"))
    with tunnelled(port) as line:
        assert line.startswith(b"SSH-2.0")
        assert tunnel.poll() is None
        assert session_look(below(sshd.pid), 1.0) == []


def test_spotunes_own_question_does_not(sshd: Sshd) -> None:
    sshd.connect("sleep 62; cat ~/.spotune/watcher.json")
    assert seen(sshd.pid, "sleep 62") == []


@contextmanager
def tunnelled(port: int) -> Iterator[bytes]:
    """What the far end of a tunnel says first, while the connection is open."""

    def connect() -> socket.socket | None:
        with suppress(OSError):
            return socket.create_connection(("127.0.0.1", port))
        return None

    with until(connect, "no tunnel") as connection:
        yield connection.recv(64)
