"""An infrastructure that only remembers, for tests of what is in front of it."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

from spotune.core.errors import AlreadyExists, InfraError, InputError
from spotune.launch.engine import Agree, JobStatus, PaidInterval, Submission


class FakeInfra:
    """Shared by all that a test opens; ``reset`` between tests."""

    name = "local"
    refresh_s = 0.0
    submissions: ClassVar[dict[str, Submission]] = {}
    states: ClassVar[dict[str, JobStatus]] = {}
    calls: ClassVar[list[tuple[Any, ...]]] = []
    refuses: ClassVar[list[str]] = []
    now = 1.0
    bought: ClassVar[list[str]] = []  # what preempt would terminate

    def __init__(self, **options: Any) -> None:
        self.options = options

    @classmethod
    def reset(cls) -> None:
        for remembered in (cls.submissions, cls.states, cls.calls, cls.refuses, cls.bought):
            remembered.clear()

    def submit(self, submission: Submission) -> None:
        if self.refuses:
            raise InfraError(self.refuses[0])
        if submission.run_id in self.states:
            raise AlreadyExists(
                "--name", f"{submission.run_id} is in this machine's queue already", remedy="another --name"
            )
        self.submissions[submission.run_id] = submission
        self.states[submission.run_id] = JobStatus(
            run_id=submission.run_id,
            state="PENDING",
            priority=submission.priority,
            user=submission.user,
            infra="local",
            submitted_at=self.now,
            bucket=submission.task["envs"]["SPOTUNE_BUCKET"],
        )

    def turn(self, run_id: str, **changes: Any) -> None:
        self.states[run_id] = replace(self.states[run_id], **changes)

    def check_resumable(self, run_id: str) -> None:
        self.calls.append(("check_resumable", run_id))

    def workdir(self, run_id: str) -> str:
        return self.submissions[run_id].workdir

    def resume(self, run_id: str) -> None:
        self.calls.append(("resume", run_id))
        self.turn(run_id, state="PENDING", reason="")

    def cancel(self, run_id: str) -> None:
        self.calls.append(("cancel", run_id))
        self.turn(run_id, state="CANCELLED", reason="cancelled")

    def preempt(self, run_id: str, notice_s: float, agree: Agree = lambda question: None) -> None:
        if run_id not in self.states:
            raise InputError(run_id, "no such run")
        if self.bought:
            agree(f"Terminate {self.bought[0]}?")
        self.calls.append(("preempt", run_id, notice_s))

    def jobs(self, run_ids: list[str] | None = None, everyone: bool = False) -> list[JobStatus]:
        return [job for job in self.states.values() if run_ids is None or job.run_id in run_ids]

    def logs(self, run_id: str, follow: bool) -> Iterator[str]:
        yield "a line"
        yield "bar 0%\rbar 100%"

    def history(self, run_id: str) -> list[PaidInterval]:
        return []
