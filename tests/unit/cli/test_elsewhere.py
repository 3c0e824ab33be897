"""The verbs over two engines at once: this machine, and a SkyPilot that only remembers, or does not answer."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from spotune.core.errors import InfraError, SubmissionUnknown
from spotune.core.keys import Keys
from spotune.core.records import PriceRow, RunRecord, TerminalMarker
from spotune.launch import engine
from spotune.launch.engine import JobStatus, PaidInterval, Submission
from spotune.launch.plan import Offers
from spotune.launch.skypilot.offers import Wanted
from tests.unit.cost.cases import claim, event
from tests.unit.fake_infra import FakeInfra
from tests.unit.project import Project
from tests.waiting import until


class FakeSky(FakeInfra):
    """SkyPilot as the verbs see it; ``silent``: its server does not answer."""

    name = "skypilot"
    submissions: ClassVar[dict[str, Submission]] = {}
    states: ClassVar[dict[str, JobStatus]] = {}
    calls: ClassVar[list[tuple[Any, ...]]] = []
    refuses: ClassVar[list[str]] = []
    silent: ClassVar[list[str]] = []
    foreign: ClassVar[list[str]] = []  # not submitted from here

    def jobs(self, run_ids: list[str] | None = None, everyone: bool = False) -> list[JobStatus]:
        if self.silent and (not run_ids or everyone or set(run_ids) & set(self.states)):
            raise InfraError("SkyPilot: the server does not answer (sky api start)")
        self.calls.append(("jobs", everyone))
        return [job for job in super().jobs(run_ids) if everyone or job.run_id not in self.foreign]

    def submit(self, submission: Submission) -> None:
        super().submit(submission)
        self.turn(submission.run_id, infra=submission.infra)

    def history(self, run_id: str) -> list[PaidInterval]:
        raise InfraError("SkyPilot: the server does not answer (sky api start)")


def offers(wanted: Wanted, at: float) -> Offers:
    rows = [
        PriceRow(infra="aws", region="us-east-1", zone=zone, use_spot=spot, price_usd_per_hour=usd, source="catalog")
        for zone, spot, usd in (("a", True, 0.4), ("b", True, 0.5), ("*", False, 0.8))
    ]
    resources = wanted.task["resources"]
    kinds = frozenset(bool(one["use_spot"]) for one in resources.get("any_of") or [resources])
    chosen = next(row for row in rows if row.use_spot == (True in kinds))
    return Offers(wanted.task, rows, chosen, ("a note",), kinds)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setitem(engine.BACKENDS, "skypilot", f"{__name__}:FakeSky")
    monkeypatch.setattr("spotune.launch.engine.import_module", _import_module)
    monkeypatch.setattr("spotune.launch.skypilot.offers.make_offers", offers)
    monkeypatch.setattr("spotune.launch.skypilot.client.excluded_files", lambda folder: [])
    monkeypatch.setattr("spotune.launch.settings.Workspace.check_bucket_reaches", lambda self, infra: None)
    FakeSky.reset()
    FakeSky.silent.clear()
    FakeSky.foreign.clear()
    made = Project(tmp_path / "project", monkeypatch)
    made.make_checkout()
    return made


def test_a_folder_that_no_machine_could_be_set_up_from_is_refused(project: Project) -> None:
    (project.folder / "requirements-trainer.lock").unlink()
    result = project.run("train", "run.yaml", "--infra", "aws", "--dryrun")
    assert result.exit_code == 2
    assert result.stderr.endswith("has no requirements-trainer.lock (cd to a checkout of spotune)\n")


def _import_module(name: str) -> Any:
    """pytest's importlib mode gives this module a name of its own, which cannot be imported again."""
    import importlib
    import sys

    return sys.modules[name] if name in sys.modules else importlib.import_module(name)


def test_a_run_elsewhere_has_the_prices_of_all_places(project: Project) -> None:
    project.submit("run-a", "--infra", "aws", "--use-spot", "--cpus", "4+", "--memory", "16+")
    submission = FakeSky.submissions["run-a"]
    assert (submission.infra, submission.workdir) == ("aws", str(project.folder))
    assert submission.task["resources"]["cpus"] == "4+"
    assert not project.infra.submissions
    record = RunRecord.from_bytes(project.store.read("runs/run-a/run.json") or b"")
    assert (record.infra, record.use_spot, len(record.prices)) == ("aws", True, 3)


def test_a_run_that_may_get_either_kind_may_lose_its_machine(project: Project) -> None:
    project.write("tasks/train.yaml", "run: x\nresources: {any_of: [{use_spot: false}, {use_spot: true}]}\n")
    for name, flag in (("run-a", ()), ("run-b", ("--no-use-spot",))):
        project.submit(name, "--infra", "aws", *flag)
    records = [RunRecord.from_bytes(project.store.read(f"runs/run-{name}/run.json") or b"") for name in "ab"]
    assert [(one.use_spot, one.may_be_on_demand) for one in records] == [(True, True), (False, False)]


def test_the_plan_shows_places_and_notes(project: Project) -> None:
    shown = project.run("train", "run.yaml", "--infra", "aws", "--no-use-spot", "--dryrun").stdout
    assert "aws/us-east-1/a" in shown
    assert "note        a note" in shown
    (chosen,) = [line for line in shown.splitlines() if "✔" in line]
    assert "0.800" in chosen
    assert not FakeSky.submissions


def test_elsewhere_somebody_must_agree(project: Project) -> None:
    refused = project.run("train", "run.yaml", "--infra", "aws", "-d", input="")
    assert refused.exit_code == 2
    assert "add -y" in refused.stderr
    assert not FakeSky.submissions


def test_a_run_is_in_one_engine_only(project: Project) -> None:
    for name, first, second in (("run-a", "local", "aws"), ("run-b", "aws", "local")):
        project.submit(name, "--infra", first)
        again = project.run("train", "run.yaml", "--name", name, "-y", "-d", "--infra", second)
        assert (again.exit_code, again.stdout) == (0, f"{name}\n"), again.stderr
        assert f"{name}: submitted already" in again.stderr
    assert (list(project.infra.submissions), list(FakeSky.submissions)) == (["run-a"], ["run-b"])


def test_the_queue_has_both(project: Project) -> None:
    project.submit("run-a", "--infra", "aws")
    project.submit("run-b")
    rows = project.json("queue")
    assert [(row["run_id"], row["infra"]) for row in rows] == [("run-b", "local"), ("run-a", "aws")]
    project.json("queue", "-a")
    assert FakeSky.calls[-1] == ("jobs", True)


def test_a_server_that_does_not_answer_hides_no_local_run(project: Project) -> None:
    project.submit("run-a", "--infra", "aws")
    project.submit("run-b")
    FakeSky.silent.append("x")
    result = project.run("queue", "--format", "json")
    assert result.exit_code == 0
    assert "run-b" in result.stdout
    assert "run-a" not in result.stdout
    assert result.stderr == "SkyPilot: the server does not answer (sky api start)\n"
    assert project.run("cost").exit_code == 0
    logs = project.run("logs", "run-a")
    assert (logs.exit_code, logs.stdout) == (3, "")
    assert project.run("logs", "run-b").exit_code == 0


def test_a_runs_own_word_for_its_failure(project: Project) -> None:
    project.submit("run-a", "--infra", "aws")
    FakeSky().turn("run-a", state="FAILED", reason="exited with code 2", exit_code=2, attempt=1, ended_at=9e9)
    mark = TerminalMarker(run_id="run-a", attempt=1, at=5.0, reason="row 7 is no JSON", exit_code=2)
    project.store.create(Keys("run-a").failed, mark.to_bytes())
    (row,) = project.json("queue")
    assert (row["state"], row["reason"]) == ("FAILED", "row 7 is no JSON")


def test_verbs_reach_the_engine_that_has_the_run(project: Project) -> None:
    project.submit("run-a", "--infra", "aws")
    FakeSky().turn("run-a", state="RUNNING", infra="aws/us-east-1/us-east-1a")  # where it landed
    assert project.run("preempt", "run-a", "--no-notice").exit_code == 0
    assert project.run("cancel", "run-a", "-y").exit_code == 0
    assert project.run("resume", "run-a").exit_code == 0
    assert [call[0] for call in FakeSky.calls if call[0] != "jobs"] == [
        "preempt",
        "cancel",
        "check_resumable",
        "resume",
    ]
    assert not project.infra.calls


def test_a_run_of_a_colleague_is_what_skypilot_says(project: Project) -> None:
    """Seen from a home whose settings say `infra: local` and that has no run of its own."""
    project.submit("run-a", "--infra", "aws")
    FakeSky().turn("run-a", state="RECOVERING", reason="Cluster preempted")
    FakeSky.foreign.append("run-a")
    (row,) = project.json("queue", "-a")
    assert (row["state"], row["reason"], row["infra"]) == ("RECOVERING", "Cluster preempted", "aws")
    refused = project.run("resume", "run-a")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "is RECOVERING" in refused.stderr
    assert project.run("cancel", "run-a", "-y").exit_code == 0
    assert ("cancel", "run-a") in FakeSky.calls


def test_no_verdict_on_a_run_that_nobody_can_be_asked_of(project: Project) -> None:
    project.submit("run-a", "--infra", "aws")
    FakeSky.foreign.append("run-a")
    FakeSky.states.clear()
    FakeSky.silent.append("x")
    result = project.run("queue", "-a", "--format", "json")
    (row,) = json.loads(result.stdout)
    assert (row["state"], row["reason"][:12]) == ("PENDING", "as last seen")


def test_nobody_pays_for_months_that_nobody_saw(project: Project) -> None:
    """A machine that was last heard of in 2023; SkyPilot, which would know its end, does not answer."""
    project.submit("run-a", "--infra", "aws")
    FakeSky.foreign.append("run-a")
    FakeSky.states.clear()
    FakeSky.silent.append("x")
    keys = Keys("run-a")
    project.store.create(keys.attempt(1), replace(claim(1, 20, infra="aws"), run_id="run-a").to_bytes())
    project.store.create(keys.events(1, 0, 0), json.dumps(event(50, "alive")).encode())
    result = project.run("cost", "run-a", "--format", "json")
    report = json.loads(result.stdout)
    assert (report["state"], report["paid_s"], report["unreconciled_s"]) == ("RUNNING", 30, 30)
    assert report["phases"]["queue_s"] < 3600
    assert "run-a is RUNNING as last seen: " in result.stderr
    assert project.run("resume", "run-a").exit_code == 2
    FakeSky.silent.clear()  # it answers, and has no such job
    (row,) = project.json("queue", "-a")
    assert (row["state"], row["reason"][-17:]) == ("FAILED", "nor in SkyPilot's")


def test_of_local_runs_alone_skypilot_is_not_asked(project: Project) -> None:
    project.submit("run-b")
    FakeSky.silent.append("x")
    assert [row["run_id"] for row in project.json("queue")] == ["run-b"]
    asked = [call for call in FakeSky.calls if call[0] == "jobs"]
    assert not asked


def test_a_paused_run_that_is_started_again_to_no_end_goes_on(project: Project) -> None:
    """SkyPilot's net for errors takes the pause for one: the run is RECOVERING, and every attempt ends at once."""
    project.submit("run-a", "--infra", "aws")
    FakeSky().turn("run-a", state="RECOVERING", attempt=1)
    refused = project.run("resume", "run-a")
    assert "is RECOVERING" in refused.stderr
    mark = TerminalMarker(run_id="run-a", attempt=1, at=5.0, reason="its budget is used up", exit_code=76)
    project.store.create(Keys("run-a").paused, mark.to_bytes())
    resumed = project.run("resume", "run-a")
    assert (resumed.exit_code, resumed.stderr) == (0, "")
    assert [call[0] for call in FakeSky.calls if call[0] != "jobs"] == ["check_resumable", "cancel", "resume"]
    assert not project.store.exists(Keys("run-a").paused)
    assert not project.store.exists(Keys("run-a").cancelled)


def test_a_submission_of_unknown_end_stays_a_run(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def submit(self: FakeSky, submission: Submission) -> None:
        raise SubmissionUnknown("no route; whether SkyPilot took run-a is not known (spotune cancel run-a …)")

    monkeypatch.setattr(FakeSky, "submit", submit)
    result = project.run("train", "run.yaml", "--name", "run-a", "--infra", "aws", "-y", "-d")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "is not known" in result.stderr
    assert project.store.exists(Keys("run-a").run)


def test_what_was_bought_is_not_terminated_unasked(project: Project) -> None:
    project.submit("run-a", "--infra", "aws")
    FakeSky().turn("run-a", state="RUNNING")
    FakeSky.bought.append("the instance of cluster run-a-7-x on aws/us-east-1")
    refused = project.run("preempt", "run-a", "--no-notice", input="y\n")  # a pipe is no terminal
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert (
        "no terminal to confirm on: Terminate the instance of cluster run-a-7-x on aws/us-east-1? (add -y)"
        in refused.stderr
    )
    assert ("preempt", "run-a", 0.0) not in FakeSky.calls
    assert project.run("preempt", "run-a", "--no-notice", "-y").exit_code == 0
    assert ("preempt", "run-a", 0.0) in FakeSky.calls


def test_a_follower_bears_a_server_that_does_not_answer_for_a_while(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(["no", "no", "no", "yes"])

    def logs(self: FakeSky, run_id: str, follow: bool) -> Iterator[str]:
        yield "a line"
        self.silent.append("x")
        until(lambda: not self.silent)

    ask = FakeSky.jobs

    def jobs(self: FakeSky, *arguments: Any, **options: Any) -> list[JobStatus]:
        if self.silent and next(answers, "yes") == "yes":
            self.silent.clear()
            self.turn("run-a", state="SUCCEEDED")
        return ask(self, *arguments, **options)

    monkeypatch.setattr("spotune.cli.runs.REFRESH_S", 0.01)
    monkeypatch.setattr(FakeSky, "logs", logs)
    monkeypatch.setattr(FakeSky, "jobs", jobs)
    result = project.run("train", "run.yaml", "--name", "run-a", "--infra", "aws", "-y")
    assert result.exit_code == 1  # it ended, without a certificate
    assert result.stderr.count("engine unreachable, still following run-a: SkyPilot: the server does not answer") == 1


def test_a_follower_gives_up_after_a_while_and_says_that_the_run_goes_on(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logs(self: FakeSky, run_id: str, follow: bool) -> Iterator[str]:
        yield "a line"
        raise InfraError("SkyPilot: the server does not answer (sky api start)")

    monkeypatch.setattr(FakeSky, "logs", logs)
    result = project.run("train", "run.yaml", "--name", "run-a", "--infra", "aws", "-y")
    assert result.exit_code == 3
    assert result.stderr.endswith("does not answer (sky api start); run-a goes on (follow it: spotune logs -f run-a)\n")


def test_a_fault_in_the_log_is_not_waited_for(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def logs(self: FakeSky, run_id: str, follow: bool) -> Iterator[str]:
        yield "a line"
        raise KeyError("pid")

    monkeypatch.setattr(FakeSky, "logs", logs)
    result = project.run("train", "run.yaml", "--name", "run-a", "--infra", "aws", "-y")
    assert isinstance(result.exception, KeyError)


@pytest.mark.parametrize("silent", [False, True])
def test_check_asks_what_the_settings_name(project: Project, monkeypatch: pytest.MonkeyPatch, silent: bool) -> None:
    def survey(infra: str, *_: object) -> dict[str, Any]:
        if silent:
            raise InfraError("SkyPilot: the server does not answer (sky api start)")
        return {"infra": infra, "consolidation": "on", "problems": []}

    monkeypatch.setattr("spotune.launch.skypilot.task.survey_infra", survey)
    assert "problems" not in project.json("check")
    project.write("config/spotune.yaml", "infra: aws\n")
    found = project.json("check")
    assert (found["infra"], found["task"][-10:]) == ("aws", "train.yaml")
    assert found["problems"] == (["SkyPilot: the server does not answer (sky api start)"] if silent else [])
    assert "problems" not in project.json("check", "run.yaml")
    assert project.run("check", "--infra", "aws").exit_code == (3 if silent else 0)
    done = project.run("check", "run.yaml", "--infra", "aws")
    assert ("config_sha256" in done.stdout, "sky api start" in done.stderr) == (True, silent)
