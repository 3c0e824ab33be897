"""SkyPilot's managed jobs, history and logs as runs: everything that needs no SkyPilot."""

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spotune.core.errors import InfraError
from spotune.core.money import Place
from spotune.launch.skypilot import client
from spotune.launch.skypilot.client import attempts_in, exit_code, lines_of, program_line
from spotune.launch.skypilot.engine import SkyInfra
from spotune.launch.skypilot.jobs import (
    Event,
    ManagedJob,
    Usage,
    exit_code_in,
    intervals,
    managed_job,
    run_status,
    usages,
)

MARKS = {"user": "ada", "infra": "slurm/lab/spot", "bucket": "file:///b", "priority": 0}


def job(**changes: Any) -> ManagedJob:
    given: dict[str, Any] = {"id": 7, "run_id": "run-a", "status": "RUNNING", "submitted_at": 10.0, "start_at": 40.0}
    given |= {"cluster": "run-a-7", "marks": MARKS, "infra": "slurm/lab/spot", "region": "lab"}
    return ManagedJob(**(given | changes))


def test_a_record_is_read_as_it_comes() -> None:
    record = SimpleNamespace(
        job_id=7, job_name="run-a", status=SimpleNamespace(value="RECOVERING"), submitted_at=10.0, start_at=40.0,
        end_at=None, recovery_count=1, failure_reason=None,
        details="Recovering: Cluster preempted or failed, recovering",
        cloud="Slurm", region="lab", zone="spot", priority=5, user_name="root", metadata={"spotune": MARKS},
        current_cluster_name=None, cluster_name_on_cloud="run-a-7-abc",
    )  # fmt: skip
    found = managed_job(record)
    assert (found.infra, found.cluster, found.cluster_on_cloud) == ("slurm/lab/spot", "run-a-7", "run-a-7-abc")
    status = run_status([found])
    assert (status.state, status.priority, status.user, status.bucket) == ("RECOVERING", 5, "ada", "file:///b")
    assert (status.attempt, status.recoveries, status.infra) == (2, 1, "slurm/lab/spot")
    assert status.reason == "Cluster preempted or failed, recovering"


def test_places_that_skypilot_does_not_know_yet() -> None:
    record = SimpleNamespace(
        job_id=7, job_name="run-a", status="PENDING", submitted_at=None, start_at=None, end_at=None,
        recovery_count=None, failure_reason=None, details=None, cloud="-", region="-", zone="-", priority=None,
        user_name=None, metadata=None, current_cluster_name=None, cluster_name_on_cloud="-",
    )  # fmt: skip
    found = managed_job(record)
    assert (found.infra, found.cluster_on_cloud, found.attempts, found.marks) == ("", "", 0, None)


@pytest.mark.parametrize(
    ("status", "state", "reason"),
    [
        ("PENDING", "PENDING", "In backoff"),
        ("STARTING", "STARTING", "In backoff"),
        ("RUNNING", "RUNNING", ""),
        ("CANCELLING", "RUNNING", "being cancelled"),
        ("SUCCEEDED", "SUCCEEDED", ""),
        ("CANCELLED", "CANCELLED", "cancelled"),
        ("FAILED_NO_RESOURCE", "FAILED", "no machine could be had: nothing left"),
        ("SOMETHING_NEW", "RUNNING", ""),
    ],
)
def test_states(status: str, state: str, reason: str) -> None:
    found = run_status([job(status=status, details="In backoff", failure_reason="nothing left")])
    assert (found.state, found.reason) == (state, reason)
    assert found.by_infra == (status == "FAILED_NO_RESOURCE")


def test_how_a_program_failed() -> None:
    told = "Job exited with exit code 3 (user program failure). To see the details, run: sky jobs logs --controller 7"
    failed = run_status([job(status="FAILED", failure_reason=told, end_at=90.0)])
    assert (failed.state, failed.exit_code, failed.reason, failed.ended_at) == ("FAILED", 3, "exited with code 3", 90.0)
    setup = run_status([job(status="FAILED_SETUP", failure_reason=told)])
    assert setup.reason == "setup exited with code 3"
    refused = "[sky.exceptions.ResourcesUnavailableError] No such machine: 1x Slurm. To fix: relax or change the …"
    (status,) = [run_status([job(status="FAILED_PRECHECKS", failure_reason=refused)])]
    assert status.reason == "refused: No such machine: 1x Slurm"
    unknown = "Job failed (FAILED) (user program failure). To see the details, run: sky jobs logs --controller 7"
    assert (
        run_status([job(status="FAILED", failure_reason=unknown)]).reason
        == "Job failed (FAILED) (user program failure)"
    )
    assert [exit_code_in(text) for text in ("exit codes [0, 75, 1]", "exit code 0", "none")] == [75, 0, None]


def test_a_run_and_its_resumes_are_one_run() -> None:
    first = job(id=7, status="CANCELLED", recoveries=2, submitted_at=10.0, end_at=80.0)
    second = job(id=9, status="STARTING", submitted_at=100.0, start_at=None)
    found = run_status([second, first])
    assert (found.state, found.submitted_at, found.started_at, found.ended_at) == ("STARTING", 10.0, 40.0, None)
    assert (found.attempt, found.recoveries) == (4, 3)


def test_a_row_of_cost_report() -> None:
    resources = SimpleNamespace(
        cloud="Slurm",
        region="lab",
        zone="spot",
        instance_type="2CPU--4GB--L4:1",
        accelerators={"L4": 1},
        use_spot=False,
    )
    row = {"name": "run-a-7", "num_nodes": 2, "resources": resources, "usage_intervals": [(100, 160), (170, None)]}
    first, second = usages(row)
    assert (first.cluster, first.started_at, first.ended_at, first.nodes) == ("run-a-7", 100.0, 160.0, 2)
    place = first.place
    assert (place.infra, place.region, place.zone, place.accelerators) == ("slurm", "lab", "spot", "L4:1")
    assert second.ended_at is None


def use(began: float, ended: float | None, cluster: str = "run-a-7") -> Usage:
    return Usage(cluster, began, ended, Place("slurm", "lab", "spot", accelerators="L4:1", use_spot=False))


def test_why_each_machine_went() -> None:
    events = [
        Event(40.0, "RUNNING"),
        Event(100.0, "RECOVERING", "Cluster preempted or failed, recovering"),
        Event(150.0, "RUNNING", "Job has recovered"),
        Event(200.0, "RECOVERING", "Job exited with exit code 75. Restarting the job (exit code(s) [75] matched …"),
        Event(300.0, "SUCCEEDED"),
    ]
    used = [use(120, 205), use(20, 102), use(210, 310), use(0, 5, "other-8")]
    rows = intervals("run-a", [job(status="SUCCEEDED")], used, {7: events}, ["lab/spot"])
    assert [(row.end_reason, row.exit_code) for row in rows] == [("preempted", None), ("exited", 75), ("exited", 0)]
    assert [row.started_at for row in rows] == [20, 120, 210]
    assert all(row.use_spot for row in rows)
    assert (rows[0].infra, rows[0].region, rows[0].zone) == ("slurm", "lab", "spot")


def test_machines_without_events() -> None:
    assert [row.end_reason for row in intervals("run-a", [job()], [use(20, 50), use(60, None)], {})] == ["lost", ""]
    (row,) = intervals("run-a", [job(status="CANCELLED")], [use(20, 50)], {})
    assert (row.end_reason, row.use_spot) == ("cancelled", False)
    (row,) = intervals("run-a", [job(status="FAILED", failure_reason="exit code 3")], [use(20, 50)], {})
    assert (row.end_reason, row.exit_code) == ("exited", 3)


def test_lines_come_as_the_program_wrote_them() -> None:
    assert list(lines_of(["a\nb", None, "c\n", "d"])) == ["a", "bc", "d"]
    assert program_line("\x1b[36m(run-a, pid=12)\x1b[0m told (to) go") == "told (to) go"
    assert program_line("(worker1, rank=1, pid=12, ip=127.0.0.3) hello") == "[1] hello"
    assert program_line("(head, rank=0, pid=12) hello") == "hello"
    assert program_line("(run-a, pid=12)") == ""
    assert program_line("├── Waiting for task resources on 1 node.") is None
    assert program_line("✓ Job finished (status: SUCCEEDED).") is None
    assert (
        program_line("(run-a, pid=12) never ended\x1b[32m✓ Job finished (status: SUCCEEDED).\x1b[0m") == "never ended"
    )
    assert program_line("a line of nobody's") == "a line of nobody's"


def test_a_failed_jobs_exit_code() -> None:
    end = "(run-a, pid=12) step 9\nERROR: \x1b[31mJob 4 failed with return code list:\x1b[0m {} {}\n✗ Job finished\n"
    assert exit_code(end.format("[76]", "")) == 76
    assert exit_code(end.format("[0, 137, 2]", "(A Worker failed with return code 2, …)")) == 2
    assert exit_code(end.format("[137]", "")) == 137
    assert exit_code("(run-a, pid=12) ERROR: Job 4 failed with return code list: [3]\n✓ Job finished") is None


def test_attempts_that_ended_by_themselves_are_in_the_controllers_log() -> None:
    controller = """Started monitoring.
The user job failed (JobStatus.FAILED). Please check the logs below.
== Logs of the user job (ID: 6) ==

\x1b[2m├── \x1b[0m\x1b[2mWaiting for task resources on 1 node.\x1b[0m
\x1b[2m└── \x1b[0mJob started. Streaming logs... (Ctrl-C to exit log streaming; job will not be killed)
(run-a, pid=12) step 1
ERROR: \x1b[31mJob 1 failed with return code list:\x1b[0m [75]

== End of logs (ID: 6) ==
Exit code 75 matched recover_on_exit_codes, triggering recovery
== Logs of the user job (ID: 6) ==
step 2
== End of logs (ID: 6) ==
"""
    assert attempts_in(controller.splitlines()) == [["step 1"], ["step 2"]]


# Of the lab, as SkyPilot 0.14.1 gave them: a job preempted with notice, one that was cancelled, one that failed.
RECORDED = json.loads(Path(__file__).with_name("lab_records.json").read_text())


@pytest.mark.parametrize(
    ("job_id", "state", "attempt", "ends"),
    [
        (2, "SUCCEEDED", 2, [("preempted", None), ("exited", 0)]),
        (3, "CANCELLED", 1, [("cancelled", None)]),
        (4, "FAILED", 1, [("exited", 75)]),
    ],
)
def test_what_the_lab_recorded(job_id: int, state: str, attempt: int, ends: list[tuple[str, int | None]]) -> None:
    (found,) = [one for one in RECORDED if one["record"]["job_id"] == job_id]
    one = managed_job(SimpleNamespace(**found["record"]))
    status = run_status([one])
    assert (status.state, status.attempt, status.infra, status.user) == (state, attempt, "slurm/lab/spot", "tester")
    assert status.ended_at
    rows = [{**row, "resources": SimpleNamespace(**row["resources"])} for row in found["cost_rows"]]
    used = [usage for row in rows for usage in usages(row)]
    events = [Event(*event) for event in found["events"]]
    machines = intervals("run-a", [one], used, {job_id: events}, ["lab/spot"])
    assert [(machine.end_reason, machine.exit_code) for machine in machines] == ends
    assert all(machine.use_spot and machine.zone == "spot" and machine.ended_at for machine in machines)
    assert all(before.ended_at <= after.started_at for before, after in pairwise(machines) if before.ended_at)


BEGIN = "\x1b[2m├── \x1b[0m\x1b[2mWaiting for task resources on 1 node.\x1b[0m\n"


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[str | None]]]:
    """What SkyPilot streams: ``live`` one after another, and ``kept``, the log of the last machine."""
    given: dict[str, list[list[str | None]]] = {"live": [], "kept": []}

    def pieces(job_id: int, follow: bool, controller: bool = False) -> list[str | None]:
        return given["live"].pop(0) if follow else given["kept"][0]

    monkeypatch.setattr(client, "log_pieces", pieces)
    return given


def follow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *after: ManagedJob) -> list[str]:
    """All that a follower sees, of a job that stands as ``after`` at the end of each stream."""
    infra, standing = SkyInfra(tmp_path, {}, sleep=lambda seconds: None), iter([job(), *after])
    monkeypatch.setattr(infra, "_jobs_of", lambda *_: [next(standing)])
    return list(infra.logs("run-a", follow=True))


def test_a_follower_sees_each_line_once(
    streams: dict[str, list[list[str | None]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    streams["live"] = [
        [None, BEGIN, "(run-a, pid=1) one\n", None],  # ended early
        [
            BEGIN,
            "(run-a, pid=1) one\n",
            "(run-a, pid=1) two\n",
            BEGIN,
            "(run-a, pid=2) one\n",
        ],  # on to the next machine
        [None],  # gone before it came
    ]
    streams["kept"] = [[BEGIN, "(run-a, pid=2) one\n", "(run-a, pid=2) two\n", "three"]]
    seen = follow(monkeypatch, tmp_path, job(), job(), job(status="SUCCEEDED"))
    assert seen == ["one", "two", "one", "two", "three"]


def test_a_follower_of_a_job_that_is_over_at_once(
    streams: dict[str, list[list[str | None]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    streams["live"], streams["kept"] = [[None, None]], [[BEGIN, "(run-a, pid=2) all\n"]]
    assert follow(monkeypatch, tmp_path, job(status="FAILED")) == ["all"]


def test_a_follower_outlasts_a_server_that_is_started_anew(
    streams: dict[str, list[list[str | None]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    streams["live"] = [["(run-a, pid=1) one\n"], ["(run-a, pid=1) one\n", "(run-a, pid=1) two\n"]]
    streams["kept"] = [["(run-a, pid=1) one\n", "(run-a, pid=1) two\n"]]
    infra, answers = SkyInfra(tmp_path, {}, sleep=lambda seconds: None), iter([job(), None, job(status="SUCCEEDED")])

    def look(*_: object) -> list[ManagedJob]:
        if answer := next(answers):
            return [answer]
        raise InfraError("SkyPilot: no answer")

    monkeypatch.setattr(infra, "_jobs_of", look)
    assert list(infra.logs("run-a", follow=True)) == ["one", "two"]


def test_all_runs_are_asked_for_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And two runs of one name, in two buckets, stay two."""
    asked: list[str] = []
    records = [SimpleNamespace(**one["record"]) for one in RECORDED]
    rows = [{**row, "resources": SimpleNamespace(**row["resources"])} for one in RECORDED for row in one["cost_rows"]]

    def answer(name: str, value: object) -> None:
        monkeypatch.setattr(client, name, lambda *_: asked.append(name) or value)

    answer("managed_jobs", records)
    answer("cost_rows", rows)
    monkeypatch.setattr(client, "events", lambda job_id: asked.append(f"events {job_id}") or [])
    infra = SkyInfra(tmp_path, {"HOME": str(tmp_path)}, asks=True)
    listed = infra.jobs(everyone=True)
    assert len({job.bucket for job in listed}) == 3
    assert [job.attempt for job in listed] == [2, 1, 1]
    for _ in range(3):
        assert [row.end_reason for row in infra.history("run-a")] == ["exited"]  # the newest of that name
    assert asked == ["managed_jobs", "cost_rows"]
