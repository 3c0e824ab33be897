"""What counts as work, on real processes. There is no GPU here: a stand-in for nvidia-smi is on PATH."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from spotune.idle import (
    Process,
    cpu_look,
    editor_look,
    gpu_look,
    job_look,
    jupyter_look,
    processes,
    session_look,
    shut_down,
)
from tests.waiting import ended, until

BURN = "while True: pass"


@contextmanager
def running(*command: str, **options: object) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, **options)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.kill()
        ended(process)


def signs_of(pid: int, before: dict[int, Process], after: dict[int, Process], elapsed_s: float) -> list[str]:
    """The CPU signs of one process between two looks that are said to be so far apart."""
    look = cpu_look(0.25)
    assert look(before, 1000.0) == []  # nothing to compare with
    return [sign.what for sign in look({pid: after[pid]}, 1000.0 + elapsed_s)]


def computed(pid: int, seconds: float = 0.2) -> tuple[dict[int, Process], dict[int, Process]]:
    """What two looks see, between which a process has used so much of a core, however long that took."""
    before = processes()
    until(lambda: processes()[pid].cpu_s - before[pid].cpu_s >= seconds, "it computes")
    return before, processes()


def test_a_process_that_computes_works() -> None:
    with running(sys.executable, "-c", BURN) as busy:
        before, after = computed(busy.pid)
        used = after[busy.pid].cpu_s - before[busy.pid].cpu_s
        assert signs_of(busy.pid, before, after, used * 2) == [f"{after[busy.pid].name} uses 50 % of a core"]
        assert signs_of(busy.pid, before, after, used * 5) == []  # 20 % is not enough


def test_a_process_that_waits_does_not() -> None:
    with running("sleep", "600") as idle, running(sys.executable, "-c", BURN) as busy:
        before, after = computed(busy.pid)
        assert signs_of(idle.pid, before, after, 0.2) == []


def test_skypilots_own_processes_do_not() -> None:
    with running(sys.executable, "-c", f"# sky.skylet.skylet\n{BURN}") as skylet:
        before, after = computed(skylet.pid)
        assert signs_of(skylet.pid, before, after, 0.2) == []


def test_short_lived_children_are_their_parents() -> None:
    """Each child is young whenever somebody looks; what it used is its parent's once it has ended."""
    loop = "while :; do sh -c 'for n in 1 2 3 4 5 6 7 8 9; do :; done'; done"
    with running("bash", "-c", loop, start_new_session=True) as parent:
        try:
            before, after = computed(parent.pid)
            assert signs_of(parent.pid, before, after, 0.2)
        finally:
            os.killpg(parent.pid, 9)


@pytest.mark.parametrize(("printed", "count"), [("0, 0\n1, 1\n", 0), ("0, 0\n1, 97\n", 1), ("0, [N/A]\n", 0)])
def test_a_gpu_in_use_works(printed: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = tmp_path / "nvidia-smi"
    stand_in.write_text(f"#!/bin/sh\ncat <<END\n{printed}END\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert len(gpu_look(2, 1000.0)) == count


def test_no_gpu_is_no_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_look(2, 1000.0) == []


def process(pid: int, parent: int, name: str, command: str = "", tty: int = 0) -> tuple[int, Process]:
    return pid, Process(pid, parent, name, command or name, pid, 0.0, tty)


def test_sessions() -> None:
    everybody = dict(
        [
            process(10, 1, "sshd", "sshd: me@pts/0"),
            process(11, 10, "bash", "-bash", tty=34816),
            process(20, 1, "sshd", "sshd: me@notty"),
            process(21, 20, "bash", "bash"),
            process(30, 1, "sshd", "sshd: me"),  # forwards a port: nobody below it
            process(40, 1, "sshd-session", "sshd-session: me@notty"),
            process(41, 40, "bash", "bash --login -c …"),
            process(42, 41, "python", "/home/me/skypilot-runtime/bin/python -u -c …"),  # SkyPilot asks something
        ]
    )
    found = [sign.what for sign in session_look(everybody, 1.0)]
    assert found == ["ssh session with a terminal (bash)", "ssh session without a terminal (bash)"]


SERVER = """
import socket, sys
listening = socket.create_server(("127.0.0.1", 0))
print(listening.getsockname()[1], flush=True)
connections = []
while True:
    connections.append(listening.accept())
"""


def test_an_editors_server_works_while_a_window_is_connected(tmp_path: Path) -> None:
    script = tmp_path / ".vscode-server" / "server.py"
    script.parent.mkdir()
    script.write_text(SERVER)
    with running(sys.executable, str(script), stdout=subprocess.PIPE) as server:
        assert server.stdout
        port = int(server.stdout.readline())
        assert editor_look(processes(), 1.0) == []
        with socket.create_connection(("127.0.0.1", port)):
            signs = until(lambda: editor_look(processes(), 1.0), "the server accepts it")
            assert [sign.what for sign in signs] == ["VS Code is connected"]
        server.stdout.close()


@contextmanager
def jupyter(folder: Path, kernels: list[dict[str, str]]) -> Iterator[list[str]]:
    """A server that answers as Jupyter does, and its file; yields what it was asked."""
    asked: list[str] = []

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(json.dumps(kernels).encode())

        def do_POST(self) -> None:
            self.answer(b"")

        def answer(self, body: bytes) -> None:
            asked.append(f"{self.command} {self.path} {self.headers['Authorization']}")
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        facts = {"url": f"http://127.0.0.1:{server.server_port}/", "token": "t0k", "pid": os.getpid()}
        (folder / "jpserver-1.json").write_text(json.dumps(facts))
        (folder / "jpserver-2.json").write_text(json.dumps({**facts, "pid": 2**22 + 1}))  # of one that was killed
        yield asked
        server.shutdown()


def test_kernels(tmp_path: Path) -> None:
    kernels = [
        {"name": "python3", "execution_state": "busy", "last_activity": "2026-11-25T01:00:00.000000Z"},
        {"name": "bash", "execution_state": "idle", "last_activity": "2026-11-25T01:00:00.000000Z"},
    ]
    now = 1795570000.0
    with jupyter(tmp_path, kernels) as asked:
        busy, idle = jupyter_look(tmp_path, now)
        assert (busy.what, busy.at) == ("Jupyter kernel python3 is busy", now)
        assert (idle.what, idle.at) == ("Jupyter kernel bash", 1795568400.0)
        assert shut_down(tmp_path) == 1
    assert asked == ["GET /api/kernels token t0k", "POST /api/shutdown token t0k"]


ODD = {
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n",
    "half an answer": b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n[{",
    "a line without end": b"HTTP/1.1 200 " + b"O" * 70_000,
    "an object": b'HTTP/1.1 200 OK\r\n\r\n{"message": "hello"}',
    "a number": b"HTTP/1.1 200 OK\r\n\r\n7",
    "a list of names": b'HTTP/1.1 200 OK\r\n\r\n["python3"]',
    "lists in lists": b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 200_000,
}


@pytest.mark.parametrize("said", ODD.values(), ids=ODD)
def test_a_server_that_is_no_jupyter_hides_none(said: bytes, tmp_path: Path) -> None:
    """Another program on the port of a server that was killed: it counts for nothing, and the look goes on."""
    with socket.create_server(("127.0.0.1", 0)) as odd, jupyter(tmp_path, [{"execution_state": "busy"}]):
        facts = {"url": f"http://127.0.0.1:{odd.getsockname()[1]}/", "pid": os.getpid()}
        (tmp_path / "jpserver-0.json").write_text(json.dumps(facts))
        threading.Thread(target=answer_twice, args=(odd, said), daemon=True).start()
        assert [sign.what for sign in jupyter_look(tmp_path, 1.0)] == ["Jupyter kernel kernel is busy"]
        shut_down(tmp_path)


def answer_twice(listening: socket.socket, said: bytes) -> None:
    with suppress(OSError):  # who asks hangs up when it has heard enough
        for _ in range(2):
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(said)


@pytest.mark.parametrize("facts", [{"url": "no address"}, {"url": "http://127.0.0.1:x/"}, {"pid": 10**30}])
def test_a_file_that_is_no_servers_hides_none(facts: dict[str, object], tmp_path: Path) -> None:
    with jupyter(tmp_path, [{"execution_state": "busy"}]):
        (tmp_path / "jpserver-0.json").write_text(
            json.dumps({"url": "http://127.0.0.1:1/", "pid": os.getpid(), **facts})
        )
        assert len(jupyter_look(tmp_path, 1.0)) == 1


def test_jobs(tmp_path: Path) -> None:
    import sqlite3

    assert job_look(tmp_path, 1, 1.0) == []
    (tmp_path / ".sky").mkdir()
    table = sqlite3.connect(tmp_path / ".sky" / "jobs.db")
    table.execute("CREATE TABLE jobs (job_id INTEGER, job_name TEXT, status TEXT)")
    rows = [(1, "watcher", "RUNNING"), (2, "demo", "RUNNING"), (3, "notebook", "RUNNING"), (4, "old", "SUCCEEDED")]
    table.executemany("INSERT INTO jobs VALUES (?, ?, ?)", rows)
    table.commit()
    table.close()
    assert [sign.what for sign in job_look(tmp_path, 1, 1.0)] == ["job 2 (demo)"]
