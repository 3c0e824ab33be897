"""A row of the queue that cannot be read: it says so itself, the others are listed, and nothing of it is started."""

import sqlite3
from pathlib import Path

import pytest

from spotune.core.keys import Keys
from spotune.core.records import TerminalMarker
from spotune.core.store import Store
from spotune.launch.engine import Submission
from spotune.launch.local.engine import LocalInfra
from spotune.launch.local.layout import LocalFolders
from spotune.launch.local.programs import probe
from spotune.launch.local.queue import Queue
from spotune.launch.local.supervisor import Supervisor


def test_a_job_that_is_marked_as_cancelled_gets_no_machine(tmp_path: Path) -> None:
    layout, store = LocalFolders(tmp_path), Store(f"file://{tmp_path}/bucket")
    layout.make()
    queue = Queue(layout.database)
    queue.create()
    queue.add(Submission("run-a", {"run": "true"}, str(tmp_path), "ada"), store.url)
    mark = TerminalMarker(run_id="run-a", attempt=0, at=1.0, reason="cancelled by ada", exit_code=1)
    store.create(Keys("run-a").cancelled, mark.to_bytes())
    Supervisor(layout).tick()
    job = queue.job("run-a")
    assert job
    assert (job.state, job.reason, queue.attempts("run-a")) == ("CANCELLED", "cancelled by ada", [])
    assert probe(store.url, "run-a").cancelled == "cancelled by ada"


@pytest.mark.parametrize("submission", ["{bad", "[]", "{}", '{"task": {}, "colour": 1}'])
def test_a_bad_row(tmp_path: Path, submission: str) -> None:
    layout = LocalFolders(tmp_path)
    layout.make()
    queue = Queue(layout.database)
    queue.create()
    for name in ("bad", "good"):
        queue.add(Submission(name, {"run": "true"}, str(tmp_path), "ada"), "file:///bucket")
    with sqlite3.connect(layout.database) as connection:
        connection.execute("UPDATE jobs SET submission = ? WHERE run_id = 'bad'", (submission,))
        connection.execute("UPDATE jobs SET state = 'CANCELLED' WHERE run_id = 'good'")
    connection.close()
    bad, good = queue.jobs()
    assert (bad.run_id, bad.state) == ("bad", "PENDING")
    assert bad.reason.startswith("its row in queue.db cannot be read: ")
    assert (good.run_id, good.reason, good.task) == ("good", "", {"run": "true"})
    assert not Supervisor(layout).tick()
    ended = queue.job("bad")
    assert ended
    assert (ended.state, ended.exit_code, queue.attempts("bad")) == ("FAILED", 2, [])


@pytest.mark.parametrize("column", ["started_at", "ended_at"])
@pytest.mark.parametrize("value", [-1, 2**62, 1_700_000_000_000, 1e308, "x"])
def test_a_time_that_is_none_counts_as_not_said(tmp_path: Path, column: str, value: object) -> None:
    """No interval follows from it, and so no bill in a bucket that others share."""
    infra = LocalInfra(tmp_path, {})
    layout, queue = LocalFolders(tmp_path), Queue(LocalFolders(tmp_path).database)
    layout.make()
    queue.create()
    queue.add(Submission("run-a", {"run": "true"}, str(tmp_path), "ada"), "file:///bucket")
    with sqlite3.connect(layout.database) as connection:
        for number in (1, 2):
            words = "INSERT INTO attempts (run_id, attempt, marker, slots, boot, started_at, ended_at, settled)"
            values = ("run-a", number, f"m{number}", "[0]", "b", 1.7e9, 1.7e9 + 60, 1)
            connection.execute(f"{words} VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
        connection.execute(f"UPDATE attempts SET {column} = ? WHERE attempt = 2", (value,))
    connection.close()
    assert [(row.started_at, row.ended_at) for row in infra.history("run-a")] == [(1.7e9, 1.7e9 + 60)]
    damaged = queue.attempts("run-a")[1]
    assert getattr(damaged, column) in (0.0, None)
    assert damaged.settled
