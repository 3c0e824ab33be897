"""The verbs against an infrastructure that only remembers."""

import ast
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spotune.cli import VERBS, duration
from spotune.cli.runs import exit_code_of, live_view, settled
from spotune.core.environment import RunEnvironment
from spotune.core.errors import InputError
from spotune.core.keys import Keys
from spotune.core.records import Certificate, RunRecord, TerminalMarker
from spotune.core.store import Store
from spotune.guard.claim import read_or_create_run
from spotune.guard.main import parse_arguments
from spotune.launch.engine import JobStatus
from spotune.launch.local.layout import Gpu
from spotune.launch.skypilot import dev
from spotune.launch.status import as_row
from tests.unit.project import Project


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    return Project(tmp_path / "project", monkeypatch)


def certify(project: Project, run_id: str) -> None:
    done = Certificate(run_id=run_id, attempt=2, step=9, weights_sha256="x", completed_at=7.0, files={})
    project.store.create(Keys(run_id).completed, done.to_bytes())


def test_help_lists_every_verb(project: Project) -> None:
    result = project.run("--help")
    assert result.exit_code == 0
    for verb, help_text in VERBS.items():
        assert f"  {verb} " in result.stdout
        assert help_text.split()[0] in result.stdout


def test_the_list_of_verbs_says_what_they_say_themselves(project: Project) -> None:
    for verb, help_text in VERBS.items():
        if verb not in ("check", "cost"):
            assert " ".join(project.run(verb, "--help").stdout.split()).count(help_text.rstrip(".")) == 1, verb


def test_train_d_prints_the_run_id_alone(project: Project) -> None:
    result = project.run("train", "run.yaml", "--name", "run-a", "-y", "-d")
    assert result.stdout == "run-a\n"
    record = RunRecord.from_bytes(project.store.read("runs/run-a/run.json") or b"")
    assert record.config["max_steps"] == 9  # profile prod
    assert "profiles" not in record.config
    assert (record.user, record.kind, record.infra) == ("ada", "prod", "local")
    assert {(row.use_spot, row.price_usd_per_hour) for row in record.price_rows()} == {(True, 0.04), (False, 0.096)}


def test_train_as_json_implies_d_and_y(project: Project) -> None:
    found = project.json("train", "run.yaml")
    assert list(found) == ["run_id"]
    assert found["run_id"].startswith("run-")
    assert found["run_id"] in project.infra.submissions


def test_train_passes_everything_on(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "s3cret")
    monkeypatch.setattr("spotune.launch.plan.find_gpus", lambda environ: [Gpu("0", "L4"), Gpu("1", "L4")])
    project.write("plan.jsonl", '{"after_s": 20}\n\n{"at_step": 40, "notice_s": 30}\n')
    options = "--priority 7 --no-use-spot --gpus L4:2 --env A=b=c --secret TOKEN --save-every 5m --set max_steps=3"
    options += " --stall-after 20m"
    project.submit("run-a", *options.split(), "--preemptions", "plan.jsonl")
    submission = project.infra.submissions["run-a"]
    assert submission.priority == 7
    assert submission.secrets == {"TOKEN": "s3cret"}
    assert submission.preemptions == ({"after_s": 20.0}, {"at_step": 40.0, "notice_s": 30.0})
    assert submission.workdir == str(project.folder)
    resources, envs = submission.task["resources"], submission.task["envs"]
    assert (resources["accelerators"], resources["use_spot"], resources["priority"]) == ("L4:2", False, 7)
    assert resources["job_recovery"]["recover_on_exit_codes"] == [75]
    assert envs["A"] == "b=c"
    assert (envs["SPOTUNE_RUN_ID"], envs["SPOTUNE_CONFIG"]) == ("run-a", "run.yaml")
    data = project.store.read("runs/run-a/run.json") or b""
    assert b"s3cret" not in data
    record = RunRecord.from_bytes(data)
    assert (record.save_every, record.stall_after, record.config["max_steps"]) == ("5m", "20m", 3)


def test_dryrun_does_nothing(project: Project) -> None:
    result = project.run("train", "run.yaml", "--dryrun", "--name", "run-a")
    assert "run-a" in result.stdout
    assert "0.040" in result.stdout
    plan = project.json("train", "run.yaml", "--dryrun", "--name", "run-a")
    assert plan["chosen"]["price_usd_per_hour"] == 0.04
    assert not project.infra.submissions
    assert not project.store.keys("runs")


def test_on_this_machine_nobody_is_asked_where_nobody_is(project: Project) -> None:
    result = project.run("train", "run.yaml", "-d", "--name", "run-a", input="")
    assert (result.exit_code, result.stdout) == (0, "run-a\n")


def test_the_plan_is_agreed_to_or_not(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spotune.cli.can_ask", lambda: True)
    no = project.run("train", "run.yaml", "-d", "--name", "run-a", input="n\n")
    assert (no.exit_code, no.stdout) == (1, "")
    nobody = project.run("train", "run.yaml", "-d", "--name", "run-a", input="")
    assert nobody.exit_code == 2
    assert "add -y" in nobody.stderr
    assert not project.store.keys("runs")
    yes = project.run("train", "run.yaml", "-d", "--name", "run-a", input="\n")
    assert yes.stdout == "run-a\n"


def test_attached_train_streams_and_ends_with_the_run(project: Project) -> None:
    project.submit()
    project.infra.turn("run-a", state="RUNNING", attempt=1)
    certify(project, "run-a")
    result = project.run("logs", "run-a", "-f")
    assert result.stdout == "a line\nbar 100%\n"
    assert "run-a: SUCCEEDED at step 9" in result.stderr


def test_an_existing_run(project: Project) -> None:
    project.submit()
    assert project.run("train", "run.yaml", "--name", "run-a", "-y", "-d").stdout == "run-a\n"  # under way: attaches
    other = project.run("train", "run.yaml", "--name", "run-a", "-y", "--set", "max_steps=4")
    assert other.exit_code == 2
    assert "another config" in other.stderr
    project.infra.turn("run-a", state="FAILED", reason="why")
    ended = project.run("train", "run.yaml", "--name", "run-a", "-y")
    assert ended.exit_code == 2
    assert "spotune resume run-a" in ended.stderr
    certify(project, "run-a")
    done = project.run("train", "run.yaml", "--name", "run-a", "-y")
    assert done.exit_code == 0
    assert "SUCCEEDED already" in done.stderr


def test_a_refused_submission_leaves_nothing_behind(project: Project) -> None:
    project.infra.refuses.append("no quota")
    result = project.run("train", "run.yaml", "-y", "-d", "--name", "run-a")
    assert (result.exit_code, result.stdout, result.stderr.splitlines()[-1]) == (3, "", "no quota")
    assert not project.store.keys("runs")
    project.infra.refuses.clear()
    project.submit("run-a")


def test_a_launcher_that_died_after_run_json_is_repaired(project: Project) -> None:
    project.submit()
    project.infra.states.clear()
    project.infra.submissions.clear()
    project.submit()
    assert "run-a" in project.infra.submissions


def commit(folder: Path) -> None:
    (folder / "helper.py").write_text("x = 1\n")  # not added
    for command in ("init -q", "add run.yaml", "-c user.name=x -c user.email=x@y commit -qm one"):
        subprocess.run(["git", *command.split()], cwd=folder, check=True)


def test_code_is_recorded(project: Project) -> None:
    commit(project.folder)
    project.write("run.yaml", (project.folder / "run.yaml").read_text() + "seed: 1\n")
    project.submit()
    facts = json.loads(project.store.read("runs/run-a/code/commit.json") or b"")
    assert facts["dirty"]
    assert len(facts["commit"]) == 40
    assert b"+seed: 1" in (project.store.read("runs/run-a/code/diff.patch") or b"")
    promoted = project.run("train", "--from", "run-a", "--name", "run-b", "-y", "-d")
    assert promoted.stdout == "run-b\n", promoted.stderr
    project.write("run.yaml", (project.folder / "run.yaml").read_text() + "logging_steps: 1\n")
    changed = project.run("train", "--from", "run-a", "-y", "-d")
    assert changed.exit_code == 2
    assert "has changed since" in changed.stderr


def test_a_run_of_a_dev_cluster_is_promoted(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its record is made on the cluster, which has no git: the launcher leaves beside it which code it sent."""
    commit(project.folder)
    workspace = project.workspace(SPOTUNE_BUCKET=project.store.url)
    kept = dev.keep_code("run-a", workspace)
    on_it = {"SPOTUNE_KIND": "dev", "SPOTUNE_PROFILE": "dev", "SPOTUNE_CONFIG": "run.yaml", "SPOTUNE_USER": "ada"}
    env = RunEnvironment.read({"SPOTUNE_BUCKET": project.store.url, **on_it})
    record = read_or_create_run(project.store, Keys("run-a"), env, parse_arguments([]))
    assert len(record.code["commit"]) == 40
    assert dev.keep_code("run-a", workspace) == []  # it has begun: what is sent now is not what it began with
    assert kept == ["runs/run-a/code/commit.json", "runs/run-a/code/diff.patch"]
    promoted = project.run("train", "--from", "run-a", "--name", "run-b", "-y", "-d")
    assert promoted.stdout == "run-b\n", promoted.stderr
    project.write("helper.py", "x = 2\n")
    changed = project.run("train", "--from", "run-a", "-y", "-d")
    line = (
        f"run-a: its code has changed since: its uncommitted changes are different ({project.store.url}/{kept[1]} has"
    )
    assert changed.stderr.startswith(line)


def test_a_resume_says_and_keeps_what_code_it_goes_on_with(project: Project) -> None:
    commit(project.folder)
    project.submit()
    project.run("cancel", "run-a", "-y")
    assert project.run("resume", "run-a").stderr == ""
    project.run("cancel", "run-a", "-y")
    project.write("helper.py", "x = 2\n")
    resumed = project.run("resume", "run-a")
    assert resumed.exit_code == 0
    line = "run-a: its code is not what it was submitted with: its uncommitted changes are different\n"
    assert resumed.stderr == line
    (kept,) = [key for key in project.store.keys("runs/run-a/code") if key.count("/") == 4 and "patch" in key]
    assert b"+x = 2" in (project.store.read(kept) or b"")


def test_a_bare_launch_that_never_began_is_listed_and_may_go_on(project: Project) -> None:
    """Its config was bad, so that there is no record; the mark keeps SkyPilot from trying it again and again."""
    keys = Keys("run-a")
    mark = TerminalMarker(run_id="run-a", attempt=0, at=7.0, reason="run.yaml: no such file", exit_code=2)
    project.store.create(keys.failed, mark.to_bytes())
    (row,) = project.json("queue", "-a")
    assert (row["run_id"], row["state"], row["reason"]) == ("run-a", "FAILED", "run.yaml: no such file")
    assert "has no run.json" in project.run("resume", "run-a", "--set", "max_steps=3").stderr
    resumed = project.run("resume", "run-a")
    assert resumed.stdout.startswith("run-a: may go on. Start it again as before"), resumed.stderr
    assert project.store.keys("runs") == []


def test_a_run_whose_bucket_is_away_does_not_begin_anew(project: Project) -> None:
    project.submit()
    project.run("cancel", "run-a", "-y")
    (project.home / "bucket").rename(project.home / "away")
    project.infra.calls.clear()
    resumed = project.run("resume", "run-a")
    assert resumed.exit_code == 2
    assert resumed.stderr == f"run-a: has no run.json in its bucket (is all of {project.store.url} there?)\n"
    assert ("resume", "run-a") not in project.infra.calls


def test_promotion_needs_a_commit(project: Project) -> None:
    project.submit()
    result = project.run("train", "--from", "run-a", "-y", "-d")
    assert result.exit_code == 2
    assert "git commit" in result.stderr


def test_queue(project: Project) -> None:
    assert project.json("queue") == []
    project.submit("run-a")
    project.submit("run-b", "--priority", "5")
    project.infra.turn("run-a", state="SUCCEEDED", ended_at=10.0)  # long ago, and without a certificate
    assert [row["run_id"] for row in project.json("queue")] == ["run-b"]
    rows = {row["run_id"]: row for row in project.json("queue", "-a")}
    assert (rows["run-a"]["state"], rows["run-a"]["reason"]) == ("FAILED", "ended without a certificate")
    expected = (
        "run_id state priority submitted_at started_at ended_at attempt recoveries step max_steps infra user reason"
    )
    assert list(rows["run-b"]) == expected.split()
    assert "run-b" in project.run("queue").stdout


def test_a_run_that_only_the_bucket_knows(project: Project) -> None:
    project.submit("run-a")
    project.infra.states.clear()
    mark = TerminalMarker(run_id="run-a", attempt=1, at=5.0, reason="bad data", exit_code=2)
    project.store.create(Keys("run-a").failed, mark.to_bytes())
    (row,) = project.json("queue", "-a")
    assert (row["state"], row["reason"], row["ended_at"]) == ("FAILED", "bad data", 5.0)
    cleared = project.run("resume", "run-a")  # started by hand or by a bare sky: it is cleared, not queued
    assert cleared.exit_code == 0
    assert "SPOTUNE_RUN_ID=run-a" in cleared.stdout
    assert not project.store.exists(Keys("run-a").failed)
    assert not project.infra.states


def test_a_bucket_out_of_reach_hides_no_job(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.submit("run-a")

    def refuse(self: Store, key: str) -> bytes:
        raise InputError("SPOTUNE_BUCKET", "access denied")

    monkeypatch.setattr(Store, "read", refuse)
    (row,) = project.json("queue")
    assert (row["state"], row["reason"]) == ("PENDING", "as the queue says: SPOTUNE_BUCKET: access denied")


def test_a_bucket_that_is_away_hides_no_job(project: Project) -> None:
    project.submit("run-a")
    (project.home / "bucket").rename(project.home / "elsewhere")
    (project.home / "bucket").symlink_to("x" * 300)  # every request fails at once
    result = project.run("queue", "-a", "--format", "json")
    (row,) = json.loads(result.stdout)
    assert (row["run_id"], row["state"]) == ("run-a", "PENDING")
    assert row["reason"].startswith("as the queue says: ")
    (line,) = result.stderr.splitlines()
    assert line.startswith("runs that only the bucket knows are not listed: ")
    assert result.exit_code == 0


@pytest.mark.parametrize(("now", "when"), [(-1.0, "before the year 2000"), (8e9, "after the year 2199")])
def test_a_clock_that_is_not_set_is_refused(
    project: Project, monkeypatch: pytest.MonkeyPatch, now: float, when: str
) -> None:
    monkeypatch.setattr(time, "time", lambda: now)
    result = project.run("train", "run.yaml", "-y", "-d")
    says = f"this machine: its clock is set {when} (set it: timedatectl set-time)\n"
    assert (result.exit_code, result.stderr) == (2, says)
    assert not project.infra.states


def test_cancel_marks_before_it_signals(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.submit()
    seen: list[bool] = []
    monkeypatch.setattr(
        type(project.infra),
        "cancel",
        lambda infra, run_id: (
            seen.append(project.store.exists(Keys(run_id).cancelled)) or infra.turn(run_id, state="CANCELLED")
        ),
    )
    result = project.run("cancel", "run-a", "-y")
    assert result.exit_code == 0
    assert seen == [True]
    assert "CANCELLED" in result.stdout


def test_a_cancel_that_was_stopped_before_the_engine_knew(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    project.submit()
    with monkeypatch.context() as patch:
        patch.setattr(type(project.infra), "cancel", interrupted)
        assert project.run("cancel", "run-a", "-y").exit_code == 130
    project.infra.turn("run-a", state="FAILED", attempt=4, reason="stands still since attempt 0", exit_code=1)
    (row,) = project.json("queue", "-a")
    assert (row["state"], row["reason"]) == ("CANCELLED", "cancelled by ada")
    mark = TerminalMarker(run_id="run-a", attempt=1, at=5.0, reason="bad luck", exit_code=1)
    project.store.create("runs/run-a/failed.json", mark.to_bytes())
    (row,) = project.json("queue", "-a")
    assert (row["state"], row["reason"]) == ("FAILED", "bad luck")
    assert project.run("resume", "run-a").exit_code == 0
    assert not project.store.exists("runs/run-a/cancelled.json")


def test_cancel_of_an_ended_run_does_nothing(project: Project) -> None:
    project.submit()
    certify(project, "run-a")
    assert project.run("cancel", "run-a", "-y").stdout == "run-a: SUCCEEDED already\n"
    assert not project.store.exists(Keys("run-a").cancelled)


def test_resume_clears_the_marks(project: Project) -> None:
    project.submit()
    active = project.run("resume", "run-a")
    assert active.exit_code == 2
    assert "is PENDING" in active.stderr
    project.run("cancel", "run-a", "-y")
    assert project.run("resume", "run-a").exit_code == 0
    assert not project.store.exists(Keys("run-a").cancelled)
    assert ("resume", "run-a") in project.infra.calls


def test_preempt(project: Project) -> None:
    project.submit()
    project.infra.turn("run-a", state="RUNNING")
    assert project.run("preempt", "run-a", "--notice", "2m").exit_code == 0
    assert project.run("preempt", "run-a", "--no-notice").exit_code == 0
    assert project.infra.calls == [("preempt", "run-a", 120.0), ("preempt", "run-a", 0.0)]


def test_the_nearest_run_is_named(project: Project) -> None:
    project.submit("run-a")
    assert "did you mean run-a?" in project.run("logs", "run-b").stderr


def test_dev_run_is_interactive_and_cancelled_by_ctrl_c(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("spotune.cli.runs.follow", interrupted)
    result = project.run("dev", "run", "run.yaml", "--name", "run-a")
    assert result.exit_code == 130
    submission = project.infra.submissions["run-a"]
    assert submission.interactive
    record = RunRecord.from_bytes(project.store.read("runs/run-a/run.json") or b"")
    assert (record.kind, record.config["max_steps"]) == ("dev", 1)
    assert ("cancel", "run-a") in project.infra.calls


def test_a_dev_run_and_a_production_run_are_never_the_same(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spotune.cli.runs.follow", lambda *_: 0)
    project.write("run.yaml", "model_name_or_path: ./model\ndata: [{source: data.jsonl}]\n")  # no profiles
    prod, dev = ("train", "run.yaml", "-y", "--no-use-spot", "--name"), ("dev", "run", "run.yaml", "--name")
    assert project.run(*prod, "prod-1").exit_code == 0
    assert project.run(*dev, "dev-1").exit_code == 0
    for command, name, what in ((dev, "prod-1", "a production run"), (prod, "dev-1", "a dev run")):
        refused = project.run(*command, name)
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert refused.stderr == f"--name: {name} is {what} (choose another --name)\n"
    assert project.infra.calls == []


def test_ctrl_c_leaves_a_job_running(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("spotune.cli.runs.follow", interrupted)
    result = project.run("train", "run.yaml", "--name", "run-a", "-y")
    assert result.exit_code == 130
    assert "spotune logs -f run-a" in result.stderr
    assert not project.infra.calls


def test_check(project: Project) -> None:
    found = project.json("check", "run.yaml")
    assert found["profiles"] == ["dev", "prod"]
    machine = project.json("check")
    assert machine["slots"] >= 1
    assert project.run("check", "run.yaml").exit_code == 0


@pytest.mark.parametrize(
    ("state", "engine_code", "code"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 3, 1),
        ("FAILED", 2, 2),
        ("FAILED", 75, 75),
        ("PAUSED", 76, 76),
        ("CANCELLED", None, 1),
    ],
)
def test_exit_codes(state: str, engine_code: int | None, code: int) -> None:
    status = JobStatus("run-a", state, 0, "ada", "local", 1.0, exit_code=engine_code)  # type: ignore[arg-type]
    assert exit_code_of(status) == code
    assert as_row(status)["state"] == state


def test_what_the_infrastructure_ended_is_3() -> None:
    status = JobStatus("run-a", "FAILED", 0, "ada", "aws", 1.0, by_infra=True)
    assert exit_code_of(status) == 3


def test_the_live_line_takes_any_log_line_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with live_view("run-a") as (say, show):
        say("a line with [brackets] and [/] in it")
        show(JobStatus("run-a", "RUNNING", 0, "ada", "local", 1.0, step=3, max_steps=9, loss=1.5))
        show(JobStatus("run-a", "RECOVERING", 0, "ada", "local", 1.0))
    assert "a line with [brackets] and [/] in it" in capsys.readouterr().out


def test_words() -> None:
    assert [duration(s) for s in (0, 59, 60, 723, 18_120, 273_600)] == ["0s", "59s", "1m", "12m 3s", "5h 2m", "3d 4h"]
    assert settled("a\rb\r") == "b"


def test_no_verb_imports_an_engine_or_a_trainer(project: Project) -> None:
    """`--help`, `queue`, `check` and `train -d` stay light: measured in a fresh process."""
    heavy = {"sky", "torch", "transformers", "trl", "pydantic", "rich", "numpy", "fsspec"}
    script = (
        "import sys; from spotune.cli import main\n"
        "for line in sys.argv[1:]:\n"
        "    try: main(line.split())\n"
        "    except SystemExit as end: assert not end.code, line\n"
        f"    assert not {heavy} & set(sys.modules), line"
    )
    lines = ("--help", "train --help", "queue", "check run.yaml", "train run.yaml --dryrun")
    ran = subprocess.run([sys.executable, "-c", script, *lines], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_only_click_and_the_core_are_imported_at_the_top_of_a_verb() -> None:
    allowed = ("click", "spotune.cli", "spotune.core")
    standard = sys.stdlib_module_names
    for path in (Path(__file__).parents[3] / "src/spotune/cli").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.startswith(allowed) or name.split(".")[0] in standard, f"{path.name}: {name}"
