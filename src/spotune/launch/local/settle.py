"""What follows when a machine is gone: look at the bucket, decide, write it down."""

import subprocess
import sys
import time
from collections.abc import Callable

from spotune.contracts.localstate import make_room, read_as, write_state
from spotune.launch.local.layout import Layout
from spotune.launch.local.look import Look, look
from spotune.launch.local.machine import kept_environment, texts
from spotune.launch.local.queue import Queue
from spotune.launch.local.rows import Attempt, Job
from spotune.launch.local.verdict import Ending, Patience, Verdict, decide

LOOK_TIMEOUT_S = 120.0
CANCEL_TIMEOUT_S = 20.0  # of a job that is cancelled: somebody waits, and little hangs on the answer
RETRY_S = 3.0  # between two tries at a bucket that does not answer


class Settler:
    """Decides about jobs whose machine has ended; never waits for a bucket."""

    def __init__(self, layout: Layout, queue: Queue, clock: Callable[[], float] = time.time) -> None:
        self._layout, self._queue, self._clock = layout, queue, clock
        self._helpers: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
        self._not_before: dict[str, float] = {}

    def settle(self, job: Job, attempt: Attempt) -> Verdict | None:
        """The job's next state, None while the bucket has not answered."""
        seen = self._look(job, attempt)
        if seen is None:
            return None
        ending = Ending(
            exit_code=attempt.exit_code,
            phase=attempt.phase,
            preempted=attempt.taking == "preempted",
            cancelled=job.cancelling,
        )
        demand = job.demand
        patience = Patience(
            max_restarts=demand.max_restarts,
            recover_codes=demand.recover_codes,
            restarts=job.restarts,
            faults=job.faults,
            commit=job.last_commit,
            interactive=job.interactive,
        )
        verdict = decide(ending, seen, patience)
        self._queue.settle(job.run_id, verdict, seen.commit, self._clock())
        return verdict

    def _look(self, job: Job, attempt: Attempt) -> Look | None:
        """What the bucket says, None while it is being asked; one that does not answer is asked again."""
        if self._is_helper_busy(job, attempt):
            return None
        files = self._layout.attempt(attempt.run_id, attempt.attempt)
        seen = read_as(files.look, Look)
        is_open = seen is None or (seen.error and not job.cancelling)
        if is_open and self._clock() >= self._not_before.get(attempt.marker, 0.0):
            self._not_before[attempt.marker] = self._clock() + RETRY_S
            if not job.bucket.startswith("file://"):
                self._ask(job, attempt)
                return None
            seen = look(job.bucket, job.run_id)  # answers at once, and needs no credentials
            write_state(files.look, seen)
        if seen is None:
            return None
        if seen.error and not job.cancelling:  # a cancelled one that is certified is found to be so when it is listed
            self._queue.explain(job, f"waiting for its bucket: {seen.error}")
            return None
        return seen

    def _ask(self, job: Job, attempt: Attempt) -> None:
        """Lets a helper ask, in the job's environment."""
        answer = self._layout.attempt(attempt.run_id, attempt.attempt).look
        make_room(answer)
        command = [sys.executable, "-P", "-m", "spotune.launch.local.look", job.bucket, job.run_id, str(answer)]
        environ = kept_environment(self._layout, job.run_id) | texts(job.task.get("envs"))
        helper = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL)
        self._helpers[attempt.marker] = (helper, self._clock())

    def _is_helper_busy(self, job: Job, attempt: Attempt) -> bool:
        helper, since = self._helpers.get(attempt.marker, (None, 0.0))
        if helper is None:
            return False
        if helper.poll() is None:
            now, limit_s = self._clock(), CANCEL_TIMEOUT_S if job.cancelling else LOOK_TIMEOUT_S
            if now - since <= limit_s:
                return True
            helper.kill()
            helper.wait()
            silent = Look(error=f"it has not answered for {limit_s:g} s", at=now)
            write_state(self._layout.attempt(attempt.run_id, attempt.attempt).look, silent)
        del self._helpers[attempt.marker]
        return False
