"""The lab's SkyPilot, as a user has it: the ``sky`` program in the lab's HOME, and the record that its server keeps."""

import os
import pickle
import re
import sqlite3
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.lab import sky_home
from tests.lab.layout import LabError, Layout

ENDED = {"SUCCEEDED", "CANCELLED", "FAILED", "FAILED_SETUP", "FAILED_PRECHECKS", "FAILED_NO_RESOURCE"}
ENDED |= {"FAILED_CONTROLLER"}


def environ(lab: Layout) -> dict[str, str]:
    """The environment of ``sky`` in the lab: nothing of the caller's own runs or clouds leaks in."""
    foreign = ("SPOTUNE_", "SKYPILOT_", "SLURM_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    path = f"{Path(sys.executable).parent}:{kept.get('PATH', '')}"
    return {**kept, **sky_home.environ(lab), "PATH": path, "NO_COLOR": "1"}


def sky(lab: Layout, *words: str, cwd: Path | None = None, timeout: float = 600) -> str:
    """The output of ``sky WORDS``; raises LabError with the end of it when it fails."""
    done = start(lab, *words, cwd=cwd)
    try:
        output, _ = done.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as error:
        done.kill()
        done.communicate()
        raise LabError(f"sky {' '.join(words[:2])} did not end in {timeout:.0f} s") from error
    if done.returncode:
        raise LabError(f"sky {' '.join(words[:2])} ended with exit code {done.returncode}: {output[-2000:]}")
    return output


def start(lab: Layout, *words: str, cwd: Path | None = None) -> "subprocess.Popen[str]":
    """``sky WORDS``, not waited for."""
    program = str(Path(sys.executable).with_name("sky"))
    return subprocess.Popen(
        [program, *words],
        env=environ(lab),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_server(lab: Layout) -> None:
    """Starts the API server, and has it look which clouds there are."""
    output = sky(lab, "check", "slurm")
    if not re.search(r"Slurm.*enabled", output):
        raise LabError(f"sky check slurm: {output[-2000:]}")


@dataclass(frozen=True)
class Job:
    """A managed job as SkyPilot's server records it."""

    job_id: int
    name: str
    status: str
    recoveries: int
    reason: str

    @property
    def ended(self) -> bool:
        return self.status in ENDED


def job(lab: Layout, job_id: int) -> Job:
    """The job's row, read from the server's file: to ask the server costs seconds of CPU."""
    rows = _query(
        lab,
        "select spot_job_id, task_name, status, recovery_count, failure_reason from spot where spot_job_id = ?",
        job_id,
    )
    if not rows:
        raise LabError(f"there is no managed job {job_id}")
    number, name, status, recoveries, reason = rows[0]
    return Job(number, name or "", status, recoveries or 0, reason or "")


def job_events(lab: Layout, job_id: int) -> list[tuple[str, str, str]]:
    """What became of a managed job: (time, status, reason), oldest first."""
    return _query(lab, "select timestamp, new_status, reason from job_events where spot_job_id = ? order by id", job_id)


def paid(lab: Layout, job: str) -> list[tuple[float, float | None]]:
    """From when to when the clusters of a managed job of that name were paid for, by the server's own record."""
    rows = _query(lab, "select usage_intervals from cluster_history where name like ?", f"{job}-%", "state.db")
    return sorted(tuple(span) for (blob,) in rows for span in pickle.loads(blob))


def _query(lab: Layout, sql: str, value: int | str, file: str = "spot_jobs.db") -> list[tuple]:  # type: ignore[type-arg]
    connection = sqlite3.connect(f"file:{lab.home / '.sky' / file}?mode=ro", uri=True, timeout=10)
    try:
        return connection.execute(sql, (value,)).fetchall()
    finally:
        connection.close()


def launch_job(lab: Layout, *words: str, cwd: Path | None = None) -> int:
    """``sky jobs launch``, detached; returns the managed job's id."""
    output = sky(lab, "jobs", "launch", "-y", "-d", *words, cwd=cwd)
    found = re.search(r"Job submitted, ID: (\d+)|Managed Job ID: (\d+)", output)
    if not found:
        raise LabError(f"sky jobs launch names no job: {output[-2000:]}")
    return int(found[1] or found[2])


def wait_for_end(lab: Layout, job_id: int, seconds: float) -> Job:
    """The job once it has ended; raises LabError when it has not in time."""
    deadline = time.monotonic() + seconds
    while not (found := job(lab, job_id)).ended:
        if time.monotonic() > deadline:
            raise LabError(f"job {job_id} is {found.status} after {seconds:.0f} s: {job_events(lab, job_id)}")
        time.sleep(1)
    return found
