"""What else is in the cluster's queue."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from urllib.parse import quote

from spotune.keeper.files import one_line
from spotune.keeper.signs import Sign

# A job of one of these names only waits for somebody: the keeper judges a notebook by its kernels.
WAITING = ("keeper", "notebook")
_ACTIVE = ("INIT", "PENDING", "SETTING_UP", "RUNNING")


def job_look(runtime: Path, own: int | None, now: float) -> list[Sign]:
    """A sign for each job that is not over, from SkyPilot's own table (sky/skylet/job_lib.py).

    Without the table, or with one of another shape, there are no signs: SkyPilot waits for its jobs by itself, this
    only keeps the idle time from running meanwhile.
    """
    path = runtime / ".sky" / "jobs.db"
    if not path.is_file():  # SQLite would wait for a pipe
        return []
    marks = ",".join("?" * len(_ACTIVE))
    try:
        table = sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=5)
        try:
            rows = table.execute(f"SELECT job_id, job_name FROM jobs WHERE status IN ({marks})", _ACTIVE).fetchall()
        finally:
            table.close()
    except sqlite3.Error:
        return []
    return [Sign(one_line(f"job {job} ({name})"), now) for job, name in rows if job != own and name not in WAITING]
