"""What becomes of a job whose submission was stopped half way: nothing of it runs, or it stays known."""

from pathlib import Path

import pytest

from spotune.core.errors import InfraError, Taken, Unsettled
from spotune.launch.engine import Submission
from spotune.launch.skypilot import client as skypilot_client
from spotune.launch.skypilot.engine import Registry, SkyInfra
from tests.unit.launch.skypilot.fake_client import FakeClient

SUBMISSION = Submission("run-a", {"run": "x", "envs": {"SPOTUNE_BUCKET": "file:///b"}}, "/w", "ada", infra="aws")


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    client = FakeClient()
    monkeypatch.setattr(skypilot_client, "sdk", lambda: client)
    return client


@pytest.fixture
def infra(tmp_path: Path) -> SkyInfra:
    return SkyInfra(tmp_path, {}, sleep=lambda seconds: None)


def interrupt() -> None:
    raise KeyboardInterrupt


def states(infra: SkyInfra) -> list[tuple[str, str]]:
    return [(job.run_id, job.state) for job in infra.jobs()]


@pytest.mark.parametrize("late", [False, True])
def test_ctrl_c_ends_the_request_and_the_job_that_it_got(
    client: FakeClient, infra: SkyInfra, late: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    client.waits, client.late = interrupt, late
    with pytest.raises(KeyboardInterrupt):
        infra.submit(SUBMISSION)
    assert client.said == ["end request run-a", *(["cancel [1]"] if late else [])]
    assert not client.under_way
    assert all(row.status == "CANCELLED" for row in client.rows)
    assert infra.jobs() == []  # and the name is free
    assert capsys.readouterr().err == "run-a: being taken back from SkyPilot\n"


def test_ctrl_c_before_its_job_is_written_down(
    client: FakeClient, infra: SkyInfra, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Registry.write
    monkeypatch.setattr(Registry, "write", lambda one, entry: interrupt() if entry.jobs else write(one, entry))
    with pytest.raises(KeyboardInterrupt):
        infra.submit(SUBMISSION)
    assert client.said == ["cancel [1]"]
    assert infra.jobs() == []


def test_a_refusal_leaves_nothing(client: FakeClient, infra: SkyInfra) -> None:
    def refuse() -> None:
        client.under_way.clear()
        raise RuntimeError("no such thing")

    client.waits = refuse
    with pytest.raises(InfraError, match="no such thing") as refused:
        infra.submit(SUBMISSION)
    assert not isinstance(refused.value, Unsettled)
    assert infra.jobs() == []


def test_a_server_that_was_never_there_has_no_job(client: FakeClient, infra: SkyInfra) -> None:
    client.away = ConnectionError("no route")
    with pytest.raises(InfraError, match="no route") as refused:
        infra.submit(SUBMISSION)
    assert not isinstance(refused.value, Unsettled)
    client.away = None
    assert infra.jobs() == []


def test_a_server_that_goes_away_meanwhile_leaves_the_run_known(client: FakeClient, infra: SkyInfra) -> None:
    def leave() -> None:
        client.away = ConnectionError("no route")
        raise client.away

    client.waits = leave
    with pytest.raises(Unsettled, match=r"no route.*whether SkyPilot took run-a is not known \(spotune cancel run-a"):
        infra.submit(SUBMISSION)
    client.away = None
    (status,) = infra.jobs()
    assert (status.state, status.reason) == ("PENDING", "not in SkyPilot's queue yet")
    client.under_way.clear()
    client.add("run-a", "RUNNING")  # it had taken it
    assert states(infra) == [("run-a", "RUNNING")]
    infra.cancel("run-a")
    assert client.said == ["cancel [1]"]
    assert states(infra) == [("run-a", "CANCELLED")]


def test_a_submission_that_nobody_saw_the_end_of_can_be_cancelled(client: FakeClient, infra: SkyInfra) -> None:
    """Also by another process: its own was killed, say."""
    client.waits = interrupt
    client.late = True
    client.api_cancel = interrupt  # type: ignore[method-assign,assignment]  # the second Ctrl-C
    with pytest.raises(Unsettled, match="interrupted"):
        infra.submit(SUBMISSION)
    del client.api_cancel
    infra.cancel("run-a")
    assert client.said == ["end request run-a", "cancel [1]"]
    assert states(infra) == [("run-a", "CANCELLED")]


def test_one_that_never_got_a_job_is_cancelled_too(client: FakeClient, infra: SkyInfra, tmp_path: Path) -> None:
    infra.submit(SUBMISSION)
    registry = Registry(tmp_path)
    entry = registry.entry("run-a")
    assert entry
    client.rows.clear()
    registry.write(type(entry)(**{**vars(entry), "jobs": [], "submitting": True}))
    infra.cancel("run-a")
    assert states(infra) == [("run-a", "CANCELLED")]


def test_a_resume_that_is_stopped_stands_as_before(client: FakeClient, infra: SkyInfra) -> None:
    infra.submit(SUBMISSION)
    client.rows[0].status = "FAILED"
    assert states(infra) == [("run-a", "FAILED")]
    client.waits, client.late = interrupt, True
    with pytest.raises(KeyboardInterrupt):
        infra.resume("run-a")
    assert client.said == ["end request run-a", "cancel [2]"]
    assert states(infra) == [("run-a", "FAILED")]


def test_a_resume_that_nobody_saw_the_end_of_is_no_failed_run(client: FakeClient, infra: SkyInfra) -> None:
    """Else a second resume would launch a second job."""
    infra.submit(SUBMISSION)
    client.rows[0].status = "FAILED"
    infra.jobs()

    def leave() -> None:
        client.away = ConnectionError("no route")
        raise client.away

    client.waits = leave
    with pytest.raises(Unsettled):
        infra.resume("run-a")
    client.away = None
    assert states(infra) == [("run-a", "PENDING")]
    client.add("run-a", "STARTING")
    assert states(infra) == [("run-a", "STARTING")]
    client.rows[1].status = "FAILED"
    assert states(infra) == [("run-a", "FAILED")]
    client.waits = lambda: None
    infra.resume("run-a")
    assert states(infra) == [("run-a", "PENDING")]


def test_a_name_that_is_taken_here_is_bad_input(client: FakeClient, infra: SkyInfra) -> None:
    infra.submit(SUBMISSION)
    with pytest.raises(Taken, match=r"--name: run-a was submitted .* the bucket file:///b \(another --name\)"):
        infra.submit(SUBMISSION)


def test_of_two_at_once_one_is_launched(
    client: FakeClient, infra: SkyInfra, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken(*_: object) -> list[str]:  # asked after the first look whether the name is free
        monkeypatch.undo()
        monkeypatch.setattr(skypilot_client, "sdk", lambda: client)
        SkyInfra(tmp_path, {}).submit(SUBMISSION)
        return []

    monkeypatch.setattr(SkyInfra, "_preemptible", overtaken)
    with pytest.raises(Taken):
        infra.submit(SUBMISSION)
    assert states(infra) == [("run-a", "PENDING")]
    assert len(client.rows) == 1
