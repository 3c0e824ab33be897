"""A row of the queue that cannot be read: it says so itself, the others are listed, and nothing of it is started."""

import sqlite3
from pathlib import Path

import pytest

from spotune.launch.infra import Submission
from spotune.launch.local.layout import Layout
from spotune.launch.local.queue import Queue
from spotune.launch.local.supervisor import Supervisor


@pytest.mark.parametrize("submission", ["{bad", "[]", "{}", '{"task": {}, "colour": 1}'])
def test_a_bad_row(tmp_path: Path, submission: str) -> None:
    layout = Layout(tmp_path)
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
