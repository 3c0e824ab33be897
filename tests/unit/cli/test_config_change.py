"""A run that exists and a config, data or model that changed: what goes on, what is refused, and what is said."""

import json
import subprocess
from pathlib import Path

import pytest

from spotune.core.keys import Keys
from spotune.core.records import Certificate, Commit, Mark, RunRecord
from spotune.core.revisions import record_history, record_in_force
from tests.unit.project import Project

KEYS = Keys("run-a")
TRAIN = ("train", "run.yaml", "--name", "run-a", "-y", "-d")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    return Project(tmp_path / "project", monkeypatch)


@pytest.fixture
def ended(project: Project) -> Project:
    """run-a, submitted and cancelled."""
    project.submit()
    project.run("cancel", "run-a", "-y")
    assert project.store.exists(KEYS.cancelled)
    project.infra.calls.clear()
    return project


def record(project: Project) -> RunRecord:
    found = record_in_force(project.store, KEYS)
    assert found
    return found


def goes_on(project: Project, *arguments: str) -> str:
    """Runs a verb that puts run-a back into the queue; returns what was said."""
    result = project.run(*arguments)
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert ("resume", "run-a") in project.infra.calls
    assert not project.store.exists(KEYS.cancelled)
    return result.stderr if arguments[0] == "train" else result.stdout


def refused(project: Project, *arguments: str) -> str:
    """Runs a verb that is refused and leaves everything as it was; returns the line."""
    before = project.store.keys("runs"), len(project.infra.submissions), list(project.infra.calls)
    result = project.run(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), (result.stderr, result.exception)
    assert result.stderr.count("\n") == 1
    assert before == (project.store.keys("runs"), len(project.infra.submissions), list(project.infra.calls))
    return result.stderr.rstrip("\n")


def test_training_length_logging_and_saving_change_freely(ended: Project) -> None:
    free = "--set max_steps=40 --set logging_steps=1 --set save_steps=3 --set output_dir=out --save-every 7".split()
    said = goes_on(ended, *TRAIN, *free)
    line = said.splitlines()[-1]
    assert line.startswith("run-a: PENDING, and goes on with a change: logging_steps: 10 -> 1; max_steps: 9 -> 40; ")
    assert "save_every: not set -> 7" in line
    found = record(ended)
    assert (found.revision, found.allowed, found.config["max_steps"], found.save_every) == (1, [], 40, "7")
    assert (found.run_id, found.user, found.prices) == ("run-a", "ada", record_history(ended.store, KEYS)[0].prices)
    assert json.loads(ended.store.read(KEYS.run) or b"")["config"]["max_steps"] == 9  # as submitted, for good
    assert len(ended.infra.submissions) == 1


def test_a_resume_may_move_the_watchdogs_limit(ended: Project) -> None:
    result = ended.run("resume", "run-a", "--stall-after", "0")
    assert "run-a: PENDING, changed: stall_after: not set -> 0." in result.stdout, result.stderr
    assert (record(ended).stall_after, record(ended).allowed) == ("0", [])
    ended.run("cancel", "run-a", "-y")
    wrong = ended.run("resume", "run-a", "--stall-after", "soon")
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert wrong.stderr == "--stall-after: 'soon' is not a duration (30s, 5m, 1.5h or 2d)\n"


def test_train_prints_the_run_id_alone_all_the_same(ended: Project) -> None:
    assert ended.run(*TRAIN, "--set", "max_steps=40").stdout == "run-a\n"
    ended.run("cancel", "run-a", "-y")
    result = ended.run("train", "run.yaml", "--name", "run-a", "--set", "max_steps=50", "--format", "json")
    assert json.loads(result.stdout) == {"run_id": "run-a"}


def test_what_is_the_same_in_other_words_is_no_change(ended: Project) -> None:
    ended.write("run.yaml", (ended.folder / "run.yaml").read_text().replace("1e-3", "0.001") + "packing: false\n")
    assert refused(ended, *TRAIN) == "run-a: has ended CANCELLED (spotune resume run-a)"
    ended.run("resume", "run-a")
    assert ended.run(*TRAIN).stdout == "run-a\n"  # under way, and the same
    assert record(ended).revision == 0


def test_every_changed_key_is_named_with_both_values(ended: Project) -> None:
    sets = "--set learning_rate=2e-3 --set lora_r=8 --set max_steps=40".split()
    expected = "learning_rate: 1e-3 -> 2e-3; lora_r: 16 -> 8; max_steps: 9 -> 40"
    remedy = "(--allow-config-change to go on with it, or choose another --name)"
    assert refused(ended, *TRAIN, *sets) == f"--name: run-a exists with another config: {expected} {remedy}"
    said = goes_on(ended, *TRAIN, *sets, "--allow-config-change")
    assert said.splitlines()[-1] == f"run-a: PENDING, and goes on with a change: {expected}"
    assert record(ended).allowed == ["learning_rate", "lora_r"]


def test_the_config_file_itself_may_have_changed(ended: Project) -> None:
    ended.write("other.yaml", (ended.folder / "run.yaml").read_text() + "seed: 3\nlogging_steps: 2\n")
    line = refused(ended, "train", "other.yaml", "--name", "run-a", "-y")
    assert "logging_steps: 10 -> 2; seed: 42 -> 3" in line
    goes_on(ended, "train", "other.yaml", "--name", "run-a", "-y", "-d", "--allow-config-change")
    assert (record(ended).config_path, record(ended).config["seed"]) == ("other.yaml", 3)


def test_nothing_changes_of_a_run_that_is_under_way(project: Project) -> None:
    project.submit()
    for state in ("PENDING", "STARTING", "RUNNING", "RECOVERING"):
        project.infra.turn("run-a", state=state)
        for arguments in (("--set", "max_steps=40"), ("--set", "seed=1", "--allow-config-change")):
            line = refused(project, *TRAIN, *arguments)
            assert line.startswith("--name: run-a is under way with another config: ")
            assert "(spotune cancel run-a first, or choose another --name)" in line
        assert f"is {state}" in refused(project, "resume", "run-a", "--set", "max_steps=40")


def test_nothing_changes_of_a_run_that_is_certified(ended: Project) -> None:
    done = Certificate(run_id="run-a", attempt=1, step=9, weights_sha256="x", completed_at=7.0, files={})
    ended.store.create(KEYS.completed, done.to_bytes())
    for arguments in (("--set", "max_steps=40"), ("--set", "seed=1", "--allow-config-change")):
        line = refused(ended, *TRAIN, *arguments)
        assert line.startswith("--name: run-a is finished, with another config: ")
        assert line.endswith("(choose another --name)")
    assert "is SUCCEEDED" in refused(ended, "resume", "run-a", "--set", "max_steps=40")


def test_a_length_that_the_newest_checkpoint_is_beyond(ended: Project) -> None:
    ended.store.create(KEYS.commit(1, 6), Commit(run_id="run-a", step=6, attempt=1, files={}).to_bytes())
    line = "run-a: max_steps: 4 steps, but the newest checkpoint is of step 6 already (6 or more, or another --name)"
    assert refused(ended, *TRAIN, "--set", "max_steps=4") == line
    assert refused(ended, "resume", "run-a", "--set", "max_steps=4") == line
    goes_on(ended, "resume", "run-a", "--set", "max_steps=6")


def test_changed_data(ended: Project) -> None:
    ended.write("data.jsonl", '{"text": "b"}\n')
    remedy = "(--allow-config-change to go on with it, or choose another --name)"
    assert refused(ended, *TRAIN) == f"--name: run-a exists with other data: data.jsonl {remedy}"
    before = record(ended).data_sha256
    said = goes_on(ended, *TRAIN, "--allow-config-change")
    assert "data: data.jsonl; goes on at the same step and position, now in the new data" in said
    assert record(ended).data_sha256 != before
    assert record(ended).allowed == ["data"]


def test_changed_model(ended: Project) -> None:
    ended.write("model/config.json", '{"a": 1}')
    ended.write("model/model.safetensors", "weights")
    line = refused(ended, *TRAIN)
    assert "exists with another model: config.json, model.safetensors (added) (--allow" in line
    goes_on(ended, "resume", "run-a", "--allow-config-change")
    assert record(ended).allowed == ["model"]
    ended.run("cancel", "run-a", "-y")
    assert "has ended CANCELLED" in refused(ended, *TRAIN)  # no change any more


def test_a_run_of_last_week_has_no_fingerprint_of_its_model(project: Project) -> None:
    project.submit()
    old = json.loads(project.store.read(KEYS.run) or b"")
    for name in ("model_sha256", "model_files", "revision", "revised_at", "revised_by", "allowed"):
        del old[name]
    project.store.write(KEYS.run, json.dumps(old).encode())
    project.write("model/config.json", '{"a": 1}')
    assert project.run(*TRAIN).stdout == "run-a\n"  # under way, and nothing known to be another
    project.run("cancel", "run-a", "-y")
    goes_on(project, *TRAIN, "--set", "max_steps=40")
    assert record(project).model_sha256


def test_resume_with_set(ended: Project) -> None:
    said = goes_on(ended, "resume", "run-a", "--set", "max_steps=40")
    assert said == "run-a: PENDING, changed: max_steps: 9 -> 40. Follow it: spotune logs -f run-a\n"
    assert (record(ended).config["max_steps"], record(ended).overrides) == (40, ["max_steps=40"])
    ended.run("cancel", "run-a", "-y")
    line = refused(ended, "resume", "run-a", "--set", "learning_rate=2e-3", "--set", "max_steps=50")
    expected = "learning_rate: 1e-3 -> 2e-3; max_steps: 40 -> 50"
    remedy = "(--allow-config-change, or a run of its own)"
    assert line == f"run-a: would go on with another config: {expected} {remedy}"
    goes_on(ended, "resume", "run-a", "--set", "learning_rate=2e-3", "--allow-config-change")
    assert (record(ended).revision, record(ended).config["max_steps"]) == (2, 40)


def test_resume_with_what_is_so_already_writes_nothing(ended: Project) -> None:
    goes_on(ended, "resume", "run-a", "--set", "max_steps=9", "--allow-config-change")
    assert record(ended).revision == 0


def test_resume_does_not_look_at_data_that_is_elsewhere(ended: Project) -> None:
    (ended.folder / "data.jsonl").unlink()
    goes_on(ended, "resume", "run-a", "--set", "max_steps=40")


def test_a_run_that_only_the_bucket_knows_may_go_on_changed(ended: Project) -> None:
    ended.infra.states.clear()
    ended.store.create(f"{KEYS.attempts}/0001/attempt.json", b"{}")
    result = ended.run("resume", "run-a", "--set", "max_steps=40")
    expected = "run-a: may go on, changed: max_steps: 9 -> 40. Start it again as before, with SPOTUNE_RUN_ID=run-a\n"
    assert result.stdout == expected
    mark = Mark(run_id="run-a", attempt=1, at=5.0, reason="bad luck", exit_code=1)
    ended.store.create(KEYS.failed, mark.to_bytes())
    result = ended.run("train", "run.yaml", "--name", "run-a", "-y", "--set", "max_steps=50")  # nothing to follow
    assert result.exit_code == 0
    assert "may go on with a change: max_steps: 40 -> 50. Start it again as before" in result.stderr
    assert not ended.store.exists(KEYS.failed)
    assert record(ended).config["max_steps"] == 50


def test_a_missing_secret_changes_nothing(ended: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from spotune.core.errors import InputError

    def refuse(infra: object, run_id: str) -> None:
        raise InputError(run_id, "secret TOKEN is not set here")

    monkeypatch.setattr(type(ended.infra), "check_resumable", refuse)
    assert "TOKEN" in refused(ended, "resume", "run-a", "--set", "max_steps=40")


def test_two_revisions_at_once(ended: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = ended.infra.check_resumable

    def slow(infra: object, run_id: str) -> None:
        ended.store.create(KEYS.revision(1), record(ended).to_bytes())
        ours(run_id)

    monkeypatch.setattr(type(ended.infra), "check_resumable", slow)
    result = ended.run("resume", "run-a", "--set", "max_steps=40")
    assert (result.exit_code, result.stderr) == (2, "run-a: was changed by somebody else just now (try again)\n")
    assert ended.store.exists(KEYS.cancelled)


def test_a_launcher_that_died_after_run_json_and_a_longer_run(project: Project) -> None:
    project.submit()
    project.infra.states.clear()
    project.infra.submissions.clear()
    assert "another config: seed: 42 -> 1" in refused(project, *TRAIN, "--set", "seed=1")
    project.infra.refuses.append("no quota")
    assert project.run(*TRAIN, "--set", "max_steps=40").exit_code == 3
    assert project.store.keys("runs") == [KEYS.run]  # that launcher may be under way still
    project.infra.refuses.clear()
    project.submit("run-a", "--set", "max_steps=40")
    assert record(project).config["max_steps"] == 40
    assert project.infra.states["run-a"].state == "PENDING"


def test_a_dev_run_is_changed_under_another_name(project: Project) -> None:
    project.submit()
    old = json.loads(project.store.read(KEYS.run) or b"")
    project.store.write(KEYS.run, json.dumps(old | {"kind": "dev"}).encode())
    project.infra.turn("run-a", state="CANCELLED")
    assert refused(project, *TRAIN, "--set", "max_steps=40").endswith("(choose another --name)")


def test_the_question_says_what_changes(ended: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spotune.cli.can_ask", lambda: True)
    arguments = ("train", "run.yaml", "--name", "run-a", "-d", "--set", "max_steps=40")
    no = ended.run(*arguments, input="n\n")
    assert "Go on with run-a, changed: max_steps: 9 -> 40. Proceed? [Y/n]" in no.stderr
    assert (no.exit_code, record(ended).revision) == (1, 0)
    assert ended.run(*arguments, input="y\n").stdout == "run-a\n"
    assert record(ended).revision == 1


def test_secrets_are_not_shown(ended: Project) -> None:
    line = refused(ended, *TRAIN, "--set", "env={HF_TOKEN: hf_abc}")
    assert "env.HF_TOKEN: not set -> (hidden)" in line
    assert "hf_" not in line


def test_the_queue_and_the_bill_are_of_the_run_as_submitted(ended: Project) -> None:
    goes_on(ended, "resume", "run-a", "--set", "max_steps=40")
    ended.infra.states.clear()
    (row,) = ended.json("queue", "-a")
    assert (row["run_id"], row["user"], row["submitted_at"]) == ("run-a", "ada", record(ended).created_at)
    assert ended.json("cost", "run-a")["config"] == "run.yaml"


def test_what_is_promoted_is_the_record_in_force(project: Project) -> None:
    for command in ("init -q", "add run.yaml", "-c user.name=x -c user.email=x@y commit -qm one"):
        subprocess.run(["git", *command.split()], cwd=project.folder, check=True)
    project.submit()
    project.run("cancel", "run-a", "-y")
    goes_on(project, "resume", "run-a", "--set", "max_steps=40")
    promoted = project.run("train", "--from", "run-a", "--name", "run-b", "-y", "-d")
    assert promoted.stdout == "run-b\n", promoted.stderr
    found = record_in_force(project.store, Keys("run-b"))
    assert found
    assert (found.config["max_steps"], found.revision) == (40, 0)
    project.write("model/config.json", '{"a": 1}')
    line = refused(project, "train", "--from", "run-a", "--name", "run-c", "-y")
    assert line == "run-a: its model has changed since (submit the config itself)"


def test_check_and_dryrun_name_the_model(project: Project) -> None:
    checked = project.json("check", "run.yaml")["model_sha256"]
    assert checked == project.json("train", "run.yaml", "--dryrun")["model_sha256"]
    project.write("model/config.json", '{"a": 1}')
    assert project.json("check", "run.yaml")["model_sha256"] != checked


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("max_steps=3", "max_steps: 3 steps, but the newest checkpoint is of step 5"),
        ("seed=3", "--allow-config-change"),
    ],
)
def test_a_dry_run_refuses_what_the_submission_would(ended: Project, change: str, says: str) -> None:
    ended.store.write(KEYS.commit(1, 5), b"{}")
    assert says in refused(ended, *TRAIN, "--set", change)
    assert says in refused(ended, *TRAIN, "--set", change, "--dryrun")


@pytest.fixture
def refused_for_versions(ended: Project) -> Project:
    """run-a has failed: its newest checkpoint was made under another version of datasets."""
    ended.store.delete([KEYS.cancelled])
    facts = {"reason": "run.yaml: versions: …", "exit_code": 2, "versions": ["datasets 5.0.1 -> 5.2.0"]}
    ended.store.create(KEYS.failed, Mark(run_id="run-a", attempt=1, at=0.0, **facts).to_bytes())
    return ended


def test_other_versions_without_the_flag(refused_for_versions: Project) -> None:
    """They may have been installed again: the machine looks."""
    assert "changed" not in goes_on(refused_for_versions, "resume", "run-a")
    assert len(record_history(refused_for_versions.store, KEYS)) == 1


@pytest.mark.parametrize("verb", [("resume", "run-a"), TRAIN])
def test_other_versions_with_the_flag(refused_for_versions: Project, verb: tuple[str, ...]) -> None:
    said = goes_on(refused_for_versions, *verb, "--allow-config-change")
    assert "versions: datasets 5.0.1 -> 5.2.0; goes on at the same step and position, rows may come in" in said
    found = record(refused_for_versions)
    assert (found.revision, found.allowed) == (1, ["versions"])
    assert found.config_sha256 == record_history(refused_for_versions.store, KEYS)[0].config_sha256


def test_other_versions_and_another_rate(refused_for_versions: Project) -> None:
    said = goes_on(refused_for_versions, "resume", "run-a", "--set", "learning_rate=2e-3", "--allow-config-change")
    assert "learning_rate: 1e-3 -> 2e-3; versions: datasets 5.0.1 -> 5.2.0" in said
    assert record(refused_for_versions).allowed == ["learning_rate", "versions"]
