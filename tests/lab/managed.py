"""A managed job of the lab while it runs: what it has done, by what it wrote into its bucket, and where it is."""

import json
import time
from dataclasses import dataclass, replace
from typing import Any

from spotune.core.keys import Keys
from spotune.core.store import Store
from tests.lab import sky, slurm
from tests.lab.layout import LabError, Layout, Node

START_S = 900.0  # two minutes on an idle machine


@dataclass(frozen=True)
class Attempt:
    """One attempt of a run, as its events tell it."""

    number: int
    restored: int
    steps: tuple[int, ...]
    notices: tuple[str, ...]
    end: str

    @property
    def last_step(self) -> int:
        return max(self.steps, default=self.restored)


@dataclass(frozen=True)
class Managed:
    """A managed job and the run that it makes."""

    lab: Layout
    job_id: int
    name: str
    store: Store

    @property
    def keys(self) -> Keys:
        return Keys(f"{self.name}-j{self.job_id}")

    @property
    def job(self) -> sky.Job:
        return sky.job(self.lab, self.job_id)

    def read(self, key: str) -> Any:
        data = self.store.read(key)
        return None if data is None else json.loads(data)

    @property
    def weights(self) -> str:
        """``weights_sha256`` of the certificate, empty while there is none."""
        certificate = self.read(self.keys.completed)
        return str(certificate["weights_sha256"]) if certificate else ""

    def attempts(self) -> list[Attempt]:
        """All attempts so far, by rank 0's events."""
        return [self._attempt(number) for number in range(1, self.count_attempts() + 1)]

    def count_attempts(self) -> int:
        number = 0
        while self.store.exists(self.keys.attempt(number + 1)):
            number += 1
        return number

    def _attempt(self, number: int) -> Attempt:
        events: list[dict[str, Any]] = []
        part = 0
        while data := self.store.read(self.keys.events(number, 0, part)):
            events += [json.loads(line) for line in data.splitlines()]
            part += 1
        of = {
            kind: [event for event in events if event["event"] == kind]
            for kind in ("restored", "step", "notice", "end")
        }
        return Attempt(
            number=number,
            restored=int(of["restored"][-1]["step"] or 0) if of["restored"] else 0,
            steps=tuple(int(event["step"]) for event in of["step"]),
            notices=tuple(str(event["source"]) for event in of["notice"]),
            end=str(of["end"][-1]["reason"]) if of["end"] else "",
        )

    def replayed(self) -> list[int]:
        """For each attempt, how many of its steps an earlier one had made already."""
        made: set[int] = set()
        again = []
        for attempt in self.attempts():
            again.append(len(made & set(attempt.steps)))
            made |= set(attempt.steps)
        return again

    def wait_for_attempt(self, number: int, steps: int = 3, commits: int = 0, seconds: float = START_S) -> None:
        """Returns when the attempt has made so many steps and so many commits; raises LabError when it does not."""
        deadline = time.monotonic() + seconds
        while True:
            if self.store.exists(self.keys.attempt(number)):
                attempt = self._attempt(number)
                if len(attempt.steps) >= steps and len(self.commits(number)) >= commits:
                    return
            job = self.job
            if job.ended or time.monotonic() > deadline:
                raise LabError(f"{job} while waiting for attempt {number}\n{self.story()}")
            time.sleep(0.5)

    def commits(self, attempt: int) -> list[str]:
        return [key for key in self.store.keys(self.keys.commits) if f"/{attempt:04d}-" in key]

    def nodes(self) -> list[Node]:
        """Where it runs now."""
        for line in slurm.jobs(self.lab, "%j %T %N"):
            name, state, where = line.split(" ", 2)
            if name.startswith(f"{self.name}-{self.job_id}-") and state == "RUNNING":
                names = slurm.ask(self.lab, "scontrol", "show", "hostnames", where).split()
                return [node for node in self.lab.nodes if node.name in names]
        return []

    def slurm_id(self) -> str:
        """Its Slurm job, empty when it has none now."""
        found = [line.split()[0] for line in slurm.jobs(self.lab, "%i %j") if f" {self.name}-{self.job_id}-" in line]
        return found[0] if found else ""

    def wait_for_success(self, seconds: float = START_S) -> str:
        """The weights, once SkyPilot says SUCCEEDED; raises LabError for any other end."""
        job = sky.wait_for_end(self.lab, self.job_id, seconds)
        if job.status != "SUCCEEDED" or not self.weights:
            raise LabError(f"{job}, weights {self.weights or 'none'}\n{self.story()}")
        return self.weights

    def story(self) -> str:
        """What became of it, for whoever reads a failure."""
        lines = [" ".join(str(word) for word in event) for event in sky.job_events(self.lab, self.job_id)]
        for attempt in self.attempts():
            lines.append(f"{len(attempt.steps)} steps: {replace(attempt, steps=attempt.steps[-1:])}")
        logs = sorted((self.lab.home / "sky_logs" / "jobs_controller").glob(f"{self.job_id}*.log"))
        return "\n".join([*lines, *(log.read_text()[-4000:] for log in logs)])
