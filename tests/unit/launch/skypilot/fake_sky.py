"""SkyPilot's client with clusters that are only remembered: what `dev` calls of it, requests answered at once."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from spotune.launch.skypilot import client


class NotSupportedError(Exception):
    """As SkyPilot's."""


class ClusterNotUpError(Exception):
    """As SkyPilot's."""


class FakeSky:
    """``clusters`` by name; ``jobs`` of all of them; ``calls``: what was asked, in order.

    ``cloud``: where a launch without a place comes to. ``tells``: what each further look at a log does: writes to the
    stream and returns a code, or raises.
    """

    exceptions = SimpleNamespace(NotSupportedError=NotSupportedError, ClusterNotUpError=ClusterNotUpError)
    StatusRefreshMode = SimpleNamespace(AUTO="auto")
    Task = SimpleNamespace(from_yaml_config=dict)

    def __init__(self) -> None:
        self.me, self.cloud = "ada", "AWS"
        self.cannot_stop: tuple[str, ...] = ("RunPod", "Slurm")
        self.clusters: dict[str, SimpleNamespace] = {}
        self.jobs: list[SimpleNamespace] = []
        self.calls: list[tuple[Any, ...]] = []
        self.tells: list[Callable[[Any], int]] = []

    def add(self, name: str, user: str = "ada", cloud: str = "AWS", **changes: Any) -> SimpleNamespace:
        resources = SimpleNamespace(accelerators={"L4": 1}, zone=None)
        given = {
            "name": name, "status": SimpleNamespace(value="UP"), "cloud": cloud, "region": "somewhere", "nodes": 1,
            "launched_at": 0, "autostop": 2, "to_down": True, "cpus": "4", "memory": "16", "is_managed": False,
            "user_name": user, "user_hash": f"{user}-hash", "handle": SimpleNamespace(launched_resources=resources),
        }  # fmt: skip
        self.clusters[name] = SimpleNamespace(**(given | changes))
        return self.clusters[name]

    def add_job(self, name: str, status: str = "SUCCEEDED") -> int:
        self.jobs.append(
            SimpleNamespace(job_id=len(self.jobs) + 1, job_name=name, status=SimpleNamespace(value=status))
        )
        return len(self.jobs)

    def asked(self, verb: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == verb]

    # SkyPilot's own names from here on

    def get(self, answer: Any) -> Any:
        return answer

    def stream_and_get(self, answer: Any, output_stream: Any = None) -> Any:
        return answer

    def status(self, cluster_names: Any = None, refresh: Any = None, all_users: bool = False, **_: Any) -> Any:
        return [
            one
            for one in self.clusters.values()
            if (all_users or one.user_name == self.me) and (cluster_names is None or one.name in cluster_names)
        ]

    def launch(self, task: Any, cluster_name: str, idle_minutes_to_autostop: int, down: bool) -> Any:
        self.calls.append(("launch", task, down))
        infra = task["resources"].get("infra", "")
        self.add(cluster_name, self.me, infra or self.cloud)
        return self.add_job(task["name"]), None

    def exec(self, task: Any, cluster_name: str) -> Any:
        self.calls.append(("exec", task))
        return self.add_job(task["name"]), None

    def queue(self, cluster_name: str) -> Any:
        return self.jobs[::-1]

    def tail_logs(self, name: str, job_id: int, follow: bool, output_stream: Any) -> int:
        self.calls.append(("tail_logs", job_id))
        return self.tells.pop(0)(output_stream) if self.tells else 0

    def autostop(self, name: str, minutes: int, down: bool) -> None:
        self.calls.append(("autostop", minutes, down))
        if not down and self.clusters[name].cloud in self.cannot_stop:
            raise NotSupportedError("Autostop is not supported")

    def stop(self, name: str) -> None:
        self.clusters[name].status = SimpleNamespace(value="STOPPED")

    def down(self, name: str) -> None:
        del self.clusters[name]

    def cancel(self, name: str, job_ids: list[int]) -> None:
        self.calls.append(("cancel", job_ids))

    def api_cancel(self, requests: Any, silent: bool) -> None:
        self.calls.append(("api_cancel",))


@pytest.fixture
def sky(monkeypatch: pytest.MonkeyPatch) -> FakeSky:
    fake = FakeSky()
    monkeypatch.setattr(client, "sdk", lambda: fake)
    return fake
