"""Local state after a power cut, a full disk or somebody's hands: a line names it, and all other jobs go on."""

import json
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spotune.cli import main
from spotune.core.errors import SpotuneError
from spotune.core.io import write_state
from spotune.core.keys import Keys
from spotune.core.records import Mark
from spotune.core.store import Store
from spotune.launch.engine import Submission
from spotune.launch.local import database, supervisor
from spotune.launch.local.database import VERSION, Attempt, Job, NewerState
from spotune.launch.local.engine import LocalInfra
from spotune.launch.local.layout import Layout
from spotune.launch.local.machine import keep_environment, machine_environment
from spotune.launch.local.queue import Queue
from spotune.launch.local.supervisor import DISK_S, FAULT_S, MOST_FAULTY_S, Supervisor, serve
from tests.commands import cli_runner
from tests.hostile import HOW, spoil

T = 1_700_000_000.0
RUNS = ("run-a", "run-b", "run-c")
OLD_TABLES = """
CREATE TABLE jobs (id INTEGER PRIMARY KEY AUTOINCREMENT, run_id TEXT UNIQUE NOT NULL, position INTEGER NOT NULL,
    priority INTEGER NOT NULL, state TEXT NOT NULL, user TEXT NOT NULL, bucket TEXT NOT NULL, submission TEXT NOT NULL,
    interactive INTEGER NOT NULL, submitted_at REAL NOT NULL, started_at REAL, ended_at REAL,
    attempt INTEGER NOT NULL DEFAULT 0, reason TEXT NOT NULL DEFAULT '', exit_code INTEGER);
INSERT INTO jobs (run_id, position, priority, state, user, bucket, submission, interactive, submitted_at)
    VALUES ('run-a', 1, 0, 'PENDING', 'ada', 'file:///nowhere',
            '{"task": {"run": "x"}, "workdir": "/", "secrets": [], "preemptions": []}', 0, 1000.0);
"""


class Home:
    """A SPOTUNE_HOME with three jobs: ``run-a`` has ended, ``run-b`` has a machine, ``run-c`` waits."""

    def __init__(self, folder: Path) -> None:
        self.now, self.lines = T, list[str]()
        self.layout, self.store = Layout(folder / "home"), Store(f"file://{folder}/home/bucket")
        self.layout.make()
        self.queue = Queue(self.layout.database)
        self.queue.create(self.lines.append)
        self.started: list[str] = []
        self.machines: list[subprocess.Popen[bytes]] = []
        for run_id in RUNS:
            self.submit(run_id)
        mark = Mark(run_id="run-a", attempt=0, at=T, reason="cancelled by ada", exit_code=1)
        self.store.create(Keys("run-a").cancelled, mark.to_bytes())
        self.supervisor = self.new_supervisor()
        for _ in range(2):
            self.supervisor.tick()

    def new_supervisor(self) -> Supervisor:
        return Supervisor(self.layout, lambda: self.now, self.start, self.lines.append)

    def submit(self, run_id: str) -> None:
        task = {"run": "x", "resources": {"use_spot": True}}
        kept = self.layout.environment(run_id)
        self.queue.add(
            Submission(run_id, task, "/", "ada"),
            self.store.url,
            lambda: keep_environment(kept, {"PATH": os.environ["PATH"]}, {"TOKEN": "s3cret"}),
            self.now,
        )

    def start(self, layout: Layout, job: Job, attempt: Attempt, devices: Any) -> "subprocess.Popen[bytes]":
        """A machine that does nothing, once everything that a real one needs is read and written."""
        self.started.append(job.run_id)
        environ = machine_environment(layout, job, attempt, devices)
        write_state(layout.attempt(job.run_id, attempt.attempt).attempt, attempt)
        self.machines.append(subprocess.Popen(["sleep", "60"], env=environ, start_new_session=True))
        return self.machines[-1]

    def verbs(self) -> None:
        """Every verb answers in lines, never with a traceback."""
        for words in (["queue"], ["queue", "-a"], ["logs", "run-a"], ["cost", "--since", "9999d"], ["cost", "run-b"]):
            done = cli_runner().invoke(main, words)
            assert done.exception is None or isinstance(done.exception, SystemExit), (words, done.exception)
            assert "Traceback" not in done.output + done.stderr

    def listed(self) -> set[str]:
        done = cli_runner().invoke(main, ["queue", "-a", "--format", "json"])
        assert done.exit_code == 0, done.stderr + repr(done.exception)
        return {row["run_id"] for row in json.loads(done.stdout)}

    def states(self) -> dict[str, str]:
        return {job.run_id: job.state for job in self.queue.jobs()}

    def end(self) -> None:
        for child in self.machines:
            child.kill()
            child.wait()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LocalInfra, "_wake", lambda self: None)  # the test is the supervisor
    home = Home(tmp_path)
    yield home
    home.end()


FILES = (
    "queue.db",
    "queue.db-wal",
    "queue.db-shm",
    "queue.lock",
    "supervisor.lock",
    "supervisor.log",
    "kept/run-b.json",
    "jobs/run-b/environment.json",
    "jobs/run-c/environment.json",
    "jobs/run-b/log.txt",
    "jobs/run-b/0001/attempt.json",
    "jobs/run-b/0001/machine.json",
    "jobs/run-b/0001/running.json",
    "jobs/run-b/0001/exit.json",
    "jobs/run-b/0001/status.json",
    "jobs/run-b/0001/look.json",
    "jobs/run-b/0001/heartbeat",
    "jobs/run-b/0001",
    "jobs/run-b",
    "jobs/run-c/0001",
)


@given(st.lists(st.tuples(st.sampled_from(FILES), st.sampled_from(HOW)), min_size=1, max_size=3))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_no_state_file_ends_a_verb_or_the_supervisor(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, damage: list[tuple[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SPOTUNE_HOME", str(folder / "home"))
    monkeypatch.setattr(LocalInfra, "_wake", lambda self: None)
    home = Home(folder)
    try:
        for name, how in damage:
            spoil(home.layout.root / name, how)
        home.verbs()
        home.new_supervisor().mend()
        for _ in range(3):
            home.now += 60.0
            home.new_supervisor().tick()
        home.verbs()
        assert {"run-a", "run-c"} <= home.listed()
        home.submit("run-d")
        assert "run-d" in home.listed()
    finally:
        home.end()


@pytest.mark.slow
@given(
    st.sampled_from(("jobs", "attempts", "requests", "facts")),
    st.data(),
    st.sampled_from(["x", "", -1, 2**62, -1e300, 1e308, b"\xff\0", "[", "{}", '{"task": []}', "../../etc"]),
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_no_value_of_a_row_ends_a_verb_or_the_supervisor(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, table: str, data: Any, value: Any
) -> None:
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SPOTUNE_HOME", str(folder / "home"))
    monkeypatch.setattr(LocalInfra, "_wake", lambda self: None)
    home = Home(folder)
    try:
        home.queue.note("slots", 1)
        home.queue.ask("run-b", "preempt", 1.0)
        names = [
            column.split()[0] for column in database.TABLES[table] if "(" not in column and "id INTEGER" not in column
        ]
        column = data.draw(st.sampled_from(names))
        with closing(sqlite3.connect(home.layout.database)) as connection, connection:
            where = " WHERE run_id = 'run-b'" if table != "facts" else ""
            connection.execute(f"UPDATE {table} SET {column} = ?{where}", (value,))
        home.verbs()
        for _ in range(3):
            home.now += 60.0
            home.supervisor.tick()
        home.verbs()
        assert {"run-a", "run-c"} <= home.listed()
    finally:
        home.end()


@pytest.mark.parametrize("how", ["empty", "cut", "zeros", "text", "folder", "pipe", "loop"])
def test_a_damaged_queue_is_set_aside_and_made_anew(home: Home, how: str) -> None:
    before = home.queue.jobs(), home.queue.attempts("run-b")[0]
    for name in ("queue.db-wal", "queue.db-shm"):
        (home.layout.root / name).unlink(missing_ok=True)
    spoil(home.layout.database, how)
    home.lines.clear()
    home.queue.create(home.lines.append)
    assert home.lines[-1] == f"{home.layout.database}: made anew, with 3 jobs from {home.layout.root / 'kept'}"
    if how != "empty":
        aside = home.layout.root / "queue.db.damaged-1"
        assert os.path.lexists(aside)
        assert home.lines[0].startswith(f"{home.layout.database}: ")
        assert home.lines[0].endswith(f": set aside as {aside.name}")
    after = home.queue.jobs(), home.queue.attempts("run-b")[0]
    assert [(job.id, job.run_id, job.task, job.priority) for job in after[0]] == [
        (job.id, job.run_id, job.task, job.priority) for job in before[0]
    ]
    assert (after[1].marker, after[1].slots, after[1].settled) == (before[1].marker, before[1].slots, False)
    assert home.states() == {"run-a": "CANCELLED", "run-b": "RUNNING", "run-c": "PENDING"}


def test_a_supervisor_mends_its_queue_and_goes_on(home: Home) -> None:
    """The queue is damaged under it, between two rounds."""
    home.layout.database.write_bytes(b"\0" * 4096)
    tried = home.new_supervisor()
    with pytest.raises(SpotuneError, match=r"queue.db: file is not a database \(any verb makes it anew"):
        tried.tick()
    tried.mend()
    assert tried.tick()
    assert set(home.states()) == set(RUNS)


def test_a_supervisor_outlives_a_queue_that_fails_for_a_while(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    now, rounds = [T], iter([OSError(28, "No space left on device")] * 3)

    def tick(_: Supervisor) -> bool:
        if fault := next(rounds, None):
            raise fault
        return False

    monkeypatch.setattr(Supervisor, "tick", tick)
    serve(home.layout, 1.0, lambda: now[0], lambda s: now.__setitem__(0, now[0] + s), home.lines.append)
    assert len([line for line in home.lines if "the queue fails, is tried again: " in line]) == 1
    assert now[0] >= T + 3 * FAULT_S

    def always(_: Supervisor) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Supervisor, "tick", always)
    began = now[0]
    with pytest.raises(OSError, match="No space"):
        serve(home.layout, 1.0, lambda: now[0], lambda s: now.__setitem__(0, now[0] + s), home.lines.append)
    assert now[0] > began + MOST_FAULTY_S


def test_a_newer_queue_is_refused_and_left_alone(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    with closing(sqlite3.connect(home.layout.database)) as connection:
        connection.execute(f"PRAGMA user_version = {VERSION + 1}")
    for words in (["queue"], ["logs", "run-a"], ["cancel", "run-c", "-y"]):
        done = cli_runner().invoke(main, words)
        assert (done.exit_code, done.stdout) == (3, "")
        what = f"made by a newer spotune, version {VERSION + 1} and not {VERSION} (upgrade spotune)"
        assert done.stderr == f"{home.layout.database}: {what}\n"
    with pytest.raises(NewerState):
        serve(home.layout, 1.0, lambda: home.now, lambda s: None, home.lines.append)
    assert supervisor.main([str(home.layout.home)]) == 3
    assert len(capfd.readouterr().out.splitlines()) == 1
    with closing(sqlite3.connect(home.layout.database)) as connection:
        connection.execute(f"PRAGMA user_version = {VERSION}")
    assert set(home.states()) == set(RUNS)


def test_an_older_queue_is_migrated_in_one_line(tmp_path: Path) -> None:
    layout, lines = Layout(tmp_path), list[str]()
    layout.make()
    with closing(sqlite3.connect(layout.database)) as connection:
        connection.executescript(OLD_TABLES)
    queue = Queue(layout.database)
    for _ in range(2):
        queue.create(lines.append)
    added = "jobs.not_before, jobs.restarts, jobs.faults, jobs.last_commit, jobs.fired, jobs.cancelling"
    assert lines == [f"{layout.database}: migrated from version 0 to 1, with {added} added"]
    (job,) = queue.jobs()
    assert (job.run_id, job.state, job.task, job.fired) == ("run-a", "PENDING", {"run": "x"}, [])
    assert json.loads((layout.root / "kept/run-a.json").read_text())["user"] == "ada"


def test_a_job_without_its_environment_is_not_started(home: Home) -> None:
    """It would run without its secrets. Its slot goes to the next."""
    home.submit("run-d")
    home.queue.note("slots", 2)
    kept = home.layout.environment("run-c")
    spoil(kept, "cut")
    for _ in range(2):
        home.supervisor.tick()
    assert (home.started[-1], len(home.machines)) == ("run-d", 2)
    job = home.queue.job("run-c")
    assert job
    assert (job.state, job.reason) == ("FAILED", f"{kept}: not whole JSON (spotune resume run-c)")
    assert kept.with_name("environment.json.damaged-1").exists()
    assert f"{kept}: not whole JSON: set aside as environment.json.damaged-1" in home.lines


def test_a_full_disk_costs_a_job_no_verdict(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    real = home.start

    def full(*_: Any) -> "subprocess.Popen[bytes]":
        raise OSError(28, "No space left on device")

    home.end()
    home.supervisor._start_machine = full
    home.now += 60.0
    for _ in range(3):
        home.supervisor.tick()
    assert home.queue.job("run-b")
    assert home.states()["run-b"] == "RECOVERING"
    home.supervisor._start_machine = real
    home.now += DISK_S
    home.supervisor.tick()
    assert home.started[-1] == "run-b"


def test_one_job_that_raises_does_not_stop_the_others(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    home.end()

    def settle(self: Any, job: Job, attempt: Attempt) -> None:
        raise KeyError("no such thing")

    monkeypatch.setattr("spotune.launch.local.watch.Settler.settle", settle)
    home.queue.note("slots", 2)
    home.now += 60.0
    for _ in range(4):
        home.supervisor.tick()
    assert home.started == ["run-b", "run-c"]
    said = [line for line in home.lines if "run-b cannot go on, is tried again: KeyError: 'no such thing'" in line]
    assert len(said) == 1
