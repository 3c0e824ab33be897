"""What becomes of a job whose machine has ended while its bucket does not answer: by real queue, and a real helper."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from spotune.launch.engine import Submission
from spotune.launch.local.database import AttemptRow, JobRow, Verdict
from spotune.launch.local.layout import LocalFolders
from spotune.launch.local.queue import Queue
from spotune.launch.local.watch import CANCEL_TIMEOUT_S, PROBE_TIMEOUT_S, Settler

T = 1000.0
ATTEMPT = AttemptRow(run_id="run-a", attempt=1, marker="m", boot="b", started_at=1.0)


class Silent:
    """A job whose machine has ended, and whose bucket takes connections and says nothing."""

    def __init__(self, folder: Path, port: int) -> None:
        layout = LocalFolders(folder)
        layout.make()
        self.now, self.queue = T, Queue(layout.database)
        self.queue.create()
        envs = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
        envs["PYTHONPATH"] = str(Path("src").resolve())
        self.queue.add(Submission(run_id="run-a", task={"run": "x", "envs": envs}, workdir="/", user="ana"), "s3://b/x")
        self.queue.start(ATTEMPT)
        self.settler = Settler(layout, self.queue, lambda: self.now)

    @property
    def job(self) -> JobRow:
        job = self.queue.job("run-a")
        assert job
        return job

    def settle(self, at: float) -> Verdict | None:
        self.now = at
        return self.settler.settle(self.job, ATTEMPT)


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[Silent]:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        silent = Silent(tmp_path, deaf.getsockname()[1])
        yield silent
        for helper, _ in silent.settler._helpers.values():
            helper.kill()
            helper.wait()


def test_a_cancelled_job_does_not_wait_for_its_bucket(silent: Silent) -> None:
    assert silent.settle(T) is None
    assert silent.settle(T + CANCEL_TIMEOUT_S + 1) is None  # whether it is certified decides
    silent.queue.mark_cancelling("run-a")
    assert silent.settle(T + CANCEL_TIMEOUT_S) is None
    assert silent.settle(T + CANCEL_TIMEOUT_S + 1)
    assert (silent.job.state, silent.job.reason) == ("CANCELLED", "cancelled")


def test_a_helper_that_hangs_is_ended_and_the_bucket_asked_again(silent: Silent) -> None:
    silent.settle(T)
    first = silent.settler._helpers["m"][0]
    assert silent.settle(T + PROBE_TIMEOUT_S) is None
    assert first.poll() is None
    assert silent.settle(T + PROBE_TIMEOUT_S + 1) is None
    assert first.poll() is not None
    assert silent.settler._helpers["m"][0] is not first
    assert silent.job.state == "STARTING"
