"""Files and answers of others on a dev cluster, damaged or without an end: the watcher goes on, and ends in time."""

import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spotune import idle
from spotune import idle as looking
from spotune.idle import Settings, Sign, gpu_look, job_look, jupyter_look, keep, look
from tests.clocks import Clock
from tests.hostile import HOW, changed, spoil, values
from tests.waiting import LIMIT_S

KERNEL = {"name": "python3", "execution_state": "idle", "last_activity": "2026-11-25T01:30:00.123456Z"}
FILES = (
    ".spotune",
    ".spotune/watcher.newest",
    ".spotune/watcher.json",
    ".sky",
    ".sky/jobs.db",
    "jupyter",
    "jupyter/jpserver-1.json",
)
SETTINGS = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


class Answers(BaseHTTPRequestHandler):
    """Gives the same answer to everything; ``drips``: a byte now and then, without an end."""

    body: ClassVar[bytes] = b""
    drips: ClassVar[bool] = False

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(self.body)
            while self.drips:
                self.wfile.write(b" ")
                time.sleep(0.05)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as made:
        made.daemon_threads = True
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_address[1]}/"
        Answers.drips = False
        made.shutdown()


def settings_of(home: Path) -> Settings:
    told = {"SPOTUNE_IDLE_MINUTES": "10", "SPOTUNE_WATCHER_LOOK_S": "60", "JUPYTER_RUNTIME_DIR": str(home / "jupyter")}
    return Settings.read(told, home)


@contextmanager
def limited(seconds: float = LIMIT_S) -> Iterator[None]:
    """Fails, naming what hangs, what takes longer."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


def furnish(home: Path, url: str) -> None:
    for name in (".spotune", ".sky", "jupyter"):
        (home / name).mkdir(parents=True)
    for name in ("watcher.newest", "watcher.json"):
        (home / ".spotune" / name).write_text("{}")
    (home / "jupyter/jpserver-1.json").write_text(json.dumps({"url": url, "token": "t", "pid": os.getpid()}))
    with closing(sqlite3.connect(home / ".sky/jobs.db")) as table, table:
        table.execute("CREATE TABLE jobs (job_id INTEGER, job_name TEXT, status TEXT)")


@SETTINGS
@given(damage=st.lists(st.tuples(st.sampled_from(FILES), st.sampled_from(HOW)), min_size=1, max_size=3), data=st.data())
def test_the_watcher_ends_in_time_whatever_lies_there(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    server: str,
    damage: list[tuple[str, str]],
    data: st.DataObject,
) -> None:
    home, clock = tmp_path_factory.mktemp("home"), Clock(1_800_000_000.0)
    furnish(home, server)
    Answers.body = json.dumps(data.draw(st.one_of(values, changed(KERNEL).map(lambda kernel: [kernel])))).encode()
    monkeypatch.setattr(looking, "processes", lambda job: {})  # those of this machine are no part of it
    monkeypatch.setenv("PATH", str(home))
    for name, how in damage:
        spoil(home / name, how)

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        if clock.now > 1_800_000_000.0 + 1200:  # a kernel may be busy for ever
            raise TimeoutError

    with suppress(TimeoutError):
        assert keep(settings_of(home), look(settings_of(home)), clock, sleep) == 0


@SETTINGS
@given(facts=changed({"url": "http://127.0.0.1:1/", "token": "t", "pid": 1}))
def test_what_says_that_it_is_a_jupyter_server(tmp_path_factory: pytest.TempPathFactory, facts: dict[str, Any]) -> None:
    runtime = tmp_path_factory.mktemp("jupyter")
    (runtime / "jpserver-1.json").write_text(json.dumps(facts))
    assert jupyter_look(runtime, 1000.0) == []


@pytest.mark.parametrize("at", ["0001-01-01T00:00:00", "9999-12-31T23:59:59.999999", "0001-01-01T00:00:00+14:00"])
def test_a_time_that_no_clock_can_show(tmp_path: Path, server: str, at: str) -> None:
    furnish(tmp_path, server)
    Answers.body = json.dumps([{**KERNEL, "last_activity": at}]).encode()
    assert all(sign.at <= 1000.0 for sign in jupyter_look(tmp_path / "jupyter", 1000.0))


def test_an_answer_without_an_end(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(tmp_path, server)
    monkeypatch.setattr(idle, "TIMEOUT_S", 0.5)
    Answers.body, Answers.drips = b"[", True
    with limited(5.0):
        assert jupyter_look(tmp_path / "jupyter", 1000.0) == []
    Answers.body, Answers.drips = b'["' + b"x" * (4 << 20) + b'"]', False
    assert jupyter_look(tmp_path / "jupyter", 1000.0) == []
    long = [{**KERNEL, "name": "x" * 9999 + "\n", "execution_state": "busy"}]
    Answers.body = json.dumps(long).encode()
    (sign,) = jupyter_look(tmp_path / "jupyter", 1000.0)
    assert len(sign.what) < 200


def test_jobs_of_a_table_that_is_strange(tmp_path: Path) -> None:
    folder = tmp_path / "a%20b?mode=rwc#"
    (folder / ".sky").mkdir(parents=True)
    with closing(sqlite3.connect(folder / ".sky/jobs.db")) as table, table:
        table.execute("CREATE TABLE jobs (job_id, job_name, status)")
        table.execute("INSERT INTO jobs VALUES ('x', 'a\nb', 'RUNNING'), (NULL, x'ff00', 'PENDING')")
    assert [sign.what for sign in job_look(folder, 7, 1.0)] == ["job x (a b)", "job None (b'\\xff\\x00')"]


@pytest.mark.parametrize("printed", ["0, \\262\n", "\\377\\376\n", "0, 2e999\n", ",,,\n"])
def test_a_gpu_tool_that_prints_anything(printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = tmp_path / "nvidia-smi"
    stand_in.write_text(f"#!/bin/sh\nprintf '{printed}'\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert gpu_look(2, 1000.0) == []


def test_a_look_that_fails_is_one_line_and_the_others_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> list[Sign]:
        raise KeyError("no such thing")

    monkeypatch.setattr(looking, "gpu_look", fails)
    monkeypatch.setattr(looking, "jupyter_look", lambda runtime, now: [Sign("a kernel", now)])
    everywhere = look(settings_of(tmp_path))
    for _ in range(3):
        assert "a kernel" in [sign.what for sign in everywhere(1.0)]
    assert capsys.readouterr().out == "watcher: cannot look at GPUs: KeyError: 'no such thing'\n"
