"""SkyPilot's client with a server behind it that only remembers: what ``engine.sdk`` gives in tests of what asks it."""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

MARKS = {"bucket": "file:///b", "user": "ada", "infra": "slurm/lab", "priority": 0}


class FakeClient:
    """A request is a thunk.

    Attributes:
        rows: the queue.
        under_way: names of the jobs that requests are submitting.
        waits: called by whoever waits for a submission, e.g. to press Ctrl-C.
        late: a request that is told to end gets its job into the queue all the same.
        away: the exception that every question ends with, once it is set.
    """

    def __init__(self) -> None:
        self.rows: list[SimpleNamespace] = []
        self.under_way: list[str] = []
        self.said: list[str] = []
        self.waits: Callable[[], None] = lambda: None
        self.late = False
        self.away: Exception | None = None
        self.Task = SimpleNamespace(from_yaml_config=lambda config: config)
        self.jobs = SimpleNamespace(launch=self._launch, queue_v2=self._queue, cancel=self._cancel)

    def get(self, request: Callable[[], Any]) -> Any:
        self._answer()
        return request()

    def api_status(self) -> list[SimpleNamespace]:
        self._answer()
        body = {"env_vars": {}, "task": "run: x"}
        return [
            SimpleNamespace(request_id="r0", name="sky.status", request_body="null"),
            SimpleNamespace(request_id="r1", name="sky.jobs.launch", request_body="null"),  # somebody else's
            *(
                SimpleNamespace(
                    request_id=name, name="sky.jobs.launch", request_body=json.dumps({**body, "name": name})
                )
                for name in self.under_way
            ),
        ]

    def api_cancel(self, request_ids: list[str], silent: bool) -> Callable[[], list[str]]:
        self.said.append(f"end request {' '.join(request_ids)}")
        for name in request_ids:
            self.under_way.remove(name)
            if self.late:
                self.add(name)
        return lambda: request_ids

    def add(self, name: str, status: str = "PENDING") -> SimpleNamespace:
        fields = (
            "start_at end_at recovery_count failure_reason details cloud region zone priority user_name"
            " current_cluster_name cluster_name_on_cloud"
        )
        row = SimpleNamespace(
            **dict.fromkeys(fields.split()),
            job_id=len(self.rows) + 1,
            job_name=name,
            status=status,
            submitted_at=5.0,
            metadata={"spotune": MARKS},
        )
        self.rows.append(row)
        return row

    def _answer(self) -> None:
        if self.away:
            raise self.away

    def _launch(self, task: Any, name: str) -> Callable[[], Any]:
        self._answer()
        self.under_way.append(name)

        def wait() -> Any:
            self.waits()
            self.under_way.remove(name)
            return [self.add(name).job_id], None

        return wait

    def _queue(self, name_match: str | None, job_ids: list[int] | None, **options: Any) -> Callable[[], Any]:
        found = [row for row in self.rows if name_match in (None, row.job_name)]
        return lambda: ([row for row in found if job_ids is None or row.job_id in job_ids], len(found), {}, 0)

    def _cancel(self, job_ids: list[int]) -> Callable[[], None]:
        self.said.append(f"cancel {job_ids}")

        def cancel() -> None:
            for row in self.rows:
                if row.job_id in job_ids:
                    row.status = "CANCELLED"

        return cancel
