"""What every infrastructure must do: a backend's own test module subclasses ``InfraContract`` and gives a ``bench``.

Jobs are shell commands, so that a test takes as long as the engine takes. What they remember from one machine to the
next lies in the bucket: nothing else is theirs for longer than a machine.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from spotune.core.errors import InputError
from spotune.core.keys import Keys
from spotune.core.records import TerminalMarker
from spotune.core.store import Store
from spotune.launch.engine import ACTIVE, Infra, JobStatus, Submission
from spotune.launch.status import certify
from tests.waiting import LIMIT_S, POLL_S, until

RUN = '"${SPOTUNE_BUCKET#file://}/runs/$SPOTUNE_RUN_ID"'
CERTIFY = f'mkdir -p {RUN}/output && echo "{{}}" > {RUN}/output/completed.json'
# For an hour, should nobody end it; a trap is heeded at once.
WAIT = "while [ $SECONDS -lt 3600 ]; do sleep 60 & wait $!; done"
HOLD = "until [ -e go ]; do sleep 0.05; done"  # until the test lets it go
NOW = "date +%s.%N"
UP = f"echo up; touch {RUN}/up"
HEEDS = f"trap 'echo told to go; touch {RUN}/told; exit 75' TERM; {UP}; {WAIT}"
DEAF = f"trap '' TERM; {UP}; {WAIT}"
# Sets $ended from the second attempt on.
SECOND_TIME = f"mkdir -p {RUN}; [ -e {RUN}/been ] && ended=1; touch {RUN}/been; "


@dataclass
class Bench:
    """An infrastructure, and how to use it in few words.

    Attributes:
        heeds, deaf: commands of a job that hears that its machine goes, and of one that does not.
        resources: of every job's task, beside its own.
        pause: what happens between two looks.
        move: lets so many seconds pass for the engine, where its clock is the test's.
        notice_s: long enough for any job that heeds it.
        limit_s: of each wait.
        one_slot: one job at a time runs, the others wait for it.
        keeps_logs: of machines that have vanished too, and every line of them for those who follow.
        knows_setup: how long ``setup:`` took.
        kills_silently: a machine taken without notice says nothing at all to what runs on it.
        reads_bucket: the engine itself knows a certified run, and starts no further machine for it.
    """

    infra: Infra
    store: Store
    workdir: str
    pause: Callable[[], None] = lambda: time.sleep(POLL_S)
    move: Callable[[float], None] = lambda seconds: None
    notice_s: float = 15.0
    limit_s: float = LIMIT_S
    heeds: str = HEEDS
    deaf: str = DEAF
    resources: dict[str, Any] = field(default_factory=lambda: {"use_spot": True})
    place: str = "local"
    one_slot: bool = True
    keeps_logs: bool = True
    knows_setup: bool = True
    kills_silently: bool = True
    reads_bucket: bool = True
    submitted: list[str] = field(default_factory=list)

    def submit(self, run_id: str, run: str, **options: Any) -> str:
        setup, resources = options.pop("setup", ""), options.pop("resources", {})
        envs = {"SPOTUNE_BUCKET": self.store.url, "SPOTUNE_RUN_ID": run_id}
        task = {"name": run_id, "setup": setup, "run": run, "envs": envs}
        task["resources"] = {**self.resources, "priority": options.get("priority", 0), **resources}
        options = {"infra": self.place, "workdir": self.workdir, "user": "tester", **options}
        self.run_folder(run_id)
        self.infra.submit(Submission(run_id=run_id, task=task, **options))
        self.submitted.append(run_id)
        return run_id

    def run_folder(self, run_id: str) -> Path:
        """The run's folder in the bucket, where its jobs may write whoever they run as."""
        if not self.store.url.startswith("file://"):
            return Path(self.workdir)
        folder = Path(self.store.url.removeprefix("file://"), "runs", run_id)
        for path in (folder.parent, folder):
            path.mkdir(parents=True, exist_ok=True)
            path.chmod(0o777)
        return folder

    def job(self, run_id: str) -> JobStatus:
        """As the verbs show it: the engine's word, corrected by the bucket."""
        return certify(self.infra.jobs([run_id])[0], self.store)

    def log(self, run_id: str) -> list[str]:
        return list(self.infra.logs(run_id, follow=False))

    def until(self, what: Callable[[], Any]) -> Any:
        """Waits for something to be true; fails, saying how things stand, when it takes too long."""

        def look() -> Any:
            found = what()
            if not found:
                self.pause()
            return found

        return until(look, self.infra.jobs, self.limit_s)

    def end(self, run_id: str) -> JobStatus:
        """Waits for the engine's end, which comes after that of a certified run."""
        self.until(lambda: self.infra.jobs([run_id])[0].state not in ACTIVE)
        return self.job(run_id)

    def comes_up(self, run_id: str) -> None:
        """Waits for one of ``heeds`` and ``deaf`` by its file: to ask some engines for a log costs seconds of CPU."""
        self.until((self.run_folder(run_id) / "up").exists)

    def says(self, run_id: str, line: str, times: int = 1) -> None:
        self.until(lambda: self.log(run_id).count(line) >= times)


class InfraContract:
    """Subclass it as ``TestX(InfraContract)``."""

    def test_a_certified_run_succeeds(self, bench: Bench) -> None:
        bench.submit("run-a", f"echo hello; {CERTIFY}")
        job = bench.end("run-a")
        assert (job.state, job.attempt, job.recoveries) == ("SUCCEEDED", 1, 0)
        assert job.submitted_at <= (job.started_at or 0) <= (job.ended_at or 0)

    def test_exit_0_without_a_certificate_is_no_success(self, bench: Bench) -> None:
        bench.submit("run-a", "echo nothing done")
        job = bench.end("run-a")
        assert (job.state, job.reason) == ("FAILED", "ended without a certificate")

    def test_exit_75_gets_the_next_attempt(self, bench: Bench) -> None:
        bench.submit("run-a", f"{SECOND_TIME} if [ $ended ]; then {CERTIFY}; else exit 75; fi")
        job = bench.end("run-a")
        assert (job.state, job.attempt, job.recoveries) == ("SUCCEEDED", 2, 1)

    def test_a_code_that_the_task_names_is_recovered_from(self, bench: Bench) -> None:
        recovery = {"job_recovery": {"recover_on_exit_codes": [41]}}
        bench.submit("run-a", f"{SECOND_TIME} if [ $ended ]; then {CERTIFY}; else exit 41; fi", resources=recovery)
        assert bench.end("run-a").attempt == 2

    def test_an_error_ends_it(self, bench: Bench) -> None:
        bench.submit("run-a", "exit 3")
        job = bench.end("run-a")
        assert (job.state, job.exit_code, job.attempt) == ("FAILED", 3, 1)

    def test_errors_are_repeated_as_often_as_the_task_says(self, bench: Bench) -> None:
        bench.submit("run-a", "exit 3", resources={"job_recovery": {"max_restarts_on_errors": 2}})
        job = bench.end("run-a")
        assert (job.state, job.exit_code, job.attempt) == ("FAILED", 3, 3)

    def test_a_run_that_failed_for_good_is_not_repeated(self, bench: Bench) -> None:
        mark = TerminalMarker(run_id="run-a", attempt=1, at=time.time(), reason="the data is bad", exit_code=2)
        bench.store.create(Keys("run-a").failed, mark.to_bytes())
        restarts = 5 if bench.reads_bucket else 1  # else each is a machine more, that the guard leaves at once
        bench.submit("run-a", "exit 2", resources={"job_recovery": {"max_restarts_on_errors": restarts}})
        job = bench.end("run-a")
        assert (job.state, job.reason, job.exit_code) == ("FAILED", "the data is bad", 2)
        assert job.attempt == 1 or not bench.reads_bucket

    def test_a_run_at_its_budget_is_paused(self, bench: Bench) -> None:
        mark = TerminalMarker(run_id="run-a", attempt=1, at=time.time(), reason="budget of $5 used up", exit_code=76)
        bench.store.create(Keys("run-a").paused, mark.to_bytes())
        bench.submit("run-a", "exit 76")
        job = bench.end("run-a")
        assert (job.state, job.reason) == ("PAUSED", "budget of $5 used up")

    def test_priority_first_then_order_of_submission(self, bench: Bench) -> None:
        if not bench.one_slot:
            pytest.skip("more than one job at a time runs")
        bench.submit("first", f"{HOLD}; {CERTIFY}")
        bench.until(lambda: bench.job("first").state == "RUNNING")
        for run_id, priority in (("low-1", 0), ("low-2", 0), ("high", 5), ("lowest", -5)):
            bench.submit(run_id, f"echo {run_id} >> order; {CERTIFY}", priority=priority)
        waiting = [job.run_id for job in bench.infra.jobs() if job.state == "PENDING"]
        assert waiting == ["high", "low-1", "low-2", "lowest"]
        Path(bench.workdir, "go").touch()
        bench.end("lowest")
        assert Path(bench.workdir, "order").read_text().split() == waiting

    def test_a_pending_run_is_cancelled(self, bench: Bench) -> None:
        if not bench.one_slot:
            pytest.skip("more than one job at a time runs")
        bench.submit("first", bench.heeds)
        bench.submit("second", f"touch ran; {CERTIFY}")
        bench.infra.cancel("second")
        assert bench.job("second").state == "CANCELLED"
        assert bench.infra.history("second") == []

    def test_a_running_run_is_cancelled_and_resumed(self, bench: Bench) -> None:
        bench.submit("run-a", f"{SECOND_TIME} [ $ended ] && {CERTIFY} && exit 0; {bench.heeds}")
        bench.comes_up("run-a")
        bench.infra.cancel("run-a")
        assert bench.job("run-a").state == "CANCELLED"
        assert bench.infra.history("run-a")[0].end_reason == "cancelled"
        bench.infra.cancel("run-a")  # no error
        bench.infra.resume("run-a")
        job = bench.end("run-a")
        assert (job.state, job.attempt, job.reason) == ("SUCCEEDED", 2, "")

    def test_preempted_with_notice(self, bench: Bench) -> None:
        bench.submit("run-a", f"{SECOND_TIME} [ $ended ] && {CERTIFY} && exit 0; {bench.heeds}")
        bench.comes_up("run-a")
        bench.infra.preempt("run-a", bench.notice_s)
        job = bench.end("run-a")
        assert (job.state, job.recoveries) == ("SUCCEEDED", 1)
        assert (bench.run_folder("run-a") / "told").exists()
        assert "told to go" in bench.log("run-a") or not bench.keeps_logs
        assert [row.end_reason for row in bench.infra.history("run-a")] == ["preempted", "exited"]

    def test_preempted_without_notice(self, bench: Bench) -> None:
        bench.submit("run-a", f"{SECOND_TIME} [ $ended ] && {CERTIFY} && exit 0; {bench.heeds}")
        bench.comes_up("run-a")
        bench.infra.preempt("run-a", 0)
        assert bench.end("run-a").state == "SUCCEEDED"
        assert not (bench.run_folder("run-a") / "told").exists() or not bench.kills_silently

    def test_the_notice_has_an_end(self, bench: Bench) -> None:
        bench.submit("run-a", f"{SECOND_TIME} [ $ended ] && {CERTIFY} && exit 0; {bench.deaf}")
        bench.comes_up("run-a")
        bench.infra.preempt("run-a", 1)
        bench.move(1)
        assert bench.end("run-a").state == "SUCCEEDED"
        assert [row.end_reason for row in bench.infra.history("run-a")] == ["preempted", "exited"]

    def test_killed_after_the_certificate_is_a_success(self, bench: Bench) -> None:
        bench.submit("run-a", f"[ -e {RUN}/output/completed.json ] && exit 0; {CERTIFY}; {bench.deaf}")
        bench.comes_up("run-a")
        bench.infra.preempt("run-a", 0)
        job = bench.end("run-a")
        assert job.state == "SUCCEEDED"
        assert job.attempt == 1 or not bench.reads_bucket

    def test_logs_follow_to_the_end_over_all_attempts(self, bench: Bench) -> None:
        bench.submit("run-a", f"{SECOND_TIME} echo line; [ $ended ] || exit 75; printf 'last, unended'; {CERTIFY}")
        lines = list(bench.infra.logs("run-a", follow=True))
        assert lines.count("line") == 2 or not bench.keeps_logs
        assert lines[-1] == "last, unended"
        assert bench.log("run-a").count("line") == 2  # an attempt that ended by itself left its lines
        assert bench.job("run-a").state == "SUCCEEDED"

    def test_history_has_a_row_for_each_machine(self, bench: Bench) -> None:
        setup = f"mkdir -p {RUN}; {NOW} >> {RUN}/times; {NOW} >> {RUN}/times"
        bench.submit("run-a", f"{SECOND_TIME} {NOW} >> {RUN}/times; [ $ended ] || exit 75; {CERTIFY}", setup=setup)
        bench.end("run-a")
        bench.until(lambda: all(row.ended_at for row in bench.infra.history("run-a")))
        first, second = bench.infra.history("run-a")
        assert first.ended_at
        assert second.ended_at
        times = [float(line) for line in (bench.run_folder("run-a") / "times").read_text().split()]
        assert first.ended_at - first.started_at >= times[2] - times[0]
        assert first.ended_at <= second.started_at
        assert first.setup_s >= times[1] - times[0] or not bench.knows_setup
        assert (first.exit_code, second.exit_code) == (75, 0)
        assert first.use_spot

    def test_a_task_sees_what_a_managed_job_sees(self, bench: Bench) -> None:
        names = ["TASK_ID", "MANAGED_JOB_ID", "NODE_RANK", "NODE_IPS", "NUM_NODES", "NUM_GPUS_PER_NODE", "CLUSTER_INFO"]
        say = "; ".join(f'echo "{name}=$SKYPILOT_{name}" >> {RUN}/seen' for name in names)
        bench.submit("run-a", f"{SECOND_TIME} {say}; [ $ended ] || exit 75; {CERTIFY}")
        bench.end("run-a")
        lines = (bench.run_folder("run-a") / "seen").read_text().splitlines()
        for name in names:
            values = [line for line in lines if line.startswith(f"{name}=")]
            assert len(values) == 2, name
            assert values[0] == values[1], name
            assert values[0] != f"{name}="

    def test_an_unknown_run_is_an_input_error(self, bench: Bench) -> None:
        for verb in (bench.infra.cancel, bench.infra.resume, lambda run_id: bench.infra.preempt(run_id, 0)):
            with pytest.raises(InputError, match="nobody"):
                verb("nobody")
