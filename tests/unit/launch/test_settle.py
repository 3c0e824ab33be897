"""What becomes of a job whose machine has ended while its bucket does not answer: by real queue, and a real helper."""

import socket
from pathlib import Path

from spotune.launch.infra import Submission
from spotune.launch.local.layout import Layout
from spotune.launch.local.queue import Queue
from spotune.launch.local.rows import Attempt
from spotune.launch.local.settle import CANCEL_TIMEOUT_S, Settler
from tests.clocks import Clock
from tests.waiting import LIMIT_S


def test_a_cancelled_job_does_not_wait_for_its_bucket(tmp_path: Path) -> None:
    clock = Clock(1000.0)
    layout = Layout(tmp_path)
    layout.make()
    queue = Queue(layout.database)
    queue.create()
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        envs = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{deaf.getsockname()[1]}",
            "PYTHONPATH": str(Path("src").resolve()),
        }
        envs |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
        queue.add(Submission(run_id="run-a", task={"run": "x", "envs": envs}, workdir="/", user="ana"), "s3://b/x")
        attempt = Attempt(run_id="run-a", attempt=1, marker="m", boot="b", started_at=1.0)
        queue.start(attempt)
        settler = Settler(layout, queue, clock)

        def settled() -> bool:
            job = queue.job("run-a")
            assert job
            return settler.settle(job, attempt) is not None

        assert not settled()
        deaf.settimeout(LIMIT_S)
        with deaf.accept()[0]:  # the helper asks, and gets no answer
            clock.now += CANCEL_TIMEOUT_S + 1.0
            assert not settled()  # it may have been preempted, and whether it is certified decides
            queue.mark_cancelling("run-a")
            assert settled()
    job = queue.job("run-a")
    assert job
    assert (job.state, job.reason) == ("CANCELLED", "cancelled")
