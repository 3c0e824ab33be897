"""Each claim of docs/explanation/security.md has a test: those that no other file has are here."""

import json
import os
import re
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spotune.core.keys import Keys
from spotune.core.records import RunRecord, TerminalMarker
from spotune.core.revisions import record_in_force
from spotune.guard import multinode
from spotune.guard.claim import standing_verdict
from spotune.launch import engine
from spotune.launch.local.engine import LocalInfra
from spotune.launch.local.machine import keep_environment
from spotune.launch.skypilot import client as skypilot_client
from spotune.launch.skypilot.engine import SkyInfra
from tests.real_sky import RealSky
from tests.unit.launch.skypilot.fake_client import FakeClient
from tests.unit.launch.test_damage import Home
from tests.unit.project import CONFIG, Project

ROOT = Path(__file__).parents[2]
LEFT_OUT, TAKES = "tests/unit/cli/test_code_left_out.py", "tests/unit/cli/test_takes.py"
NAMES, HERE = "tests/unit/launch/test_secretfiles.py", "tests/unit/test_security.py"
SENT = "tests/unit/launch/skypilot/test_sent.py"
STRANGERS = "tests/unit/guard/test_strangers.py"
CODE = "tests/unit/launch/test_code.py"
ENV, MACHINE = "tests/unit/core/test_envrule.py", "tests/e2e/test_env_rule.py"
CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN",
               "WANDB_API_KEY", "AZURE_CLIENT_SECRET", "GITHUB_TOKEN", "MY_KEY")  # fmt: skip
# A claim, in the page's words -> the test that holds it.
CLAIMS = {
    "whoever can read it can read all": (HERE, "test_a_reader_of_the_bucket_sees_config_data_and_code"),
    "cancel or revise any run that stands still": (HERE, "test_a_writer_to_the_bucket_cancels_a_run"),
    "the same under `takes`": (TAKES, "test_overrides_env_and_remote_code_are_listed_and_secrets_hidden"),
    "up to 1 MiB": (HERE, "test_a_large_new_file_is_named_only"),
    "it is not encrypted": (STRANGERS, "test_a_follower_that_comes_again_takes_its_own_place"),
    "speak as one of them with": (STRANGERS, "test_a_follower_that_talks_rubbish_is_gone"),
    "without these ids, crash": (STRANGERS, "test_a_stranger_is_turned_away"),
    "hold up or fill the leader": (STRANGERS, "test_a_stranger_without_end_fills_no_memory"),
    "10 s and 4 KiB": (HERE, "test_a_stranger_has_so_long_and_so_much"),
    "they refuse with exit code 2": (TAKES, "test_a_run_that_another_user_revised_is_resumed_only_when_agreed"),
    "`resume` shows the list before it asks": (TAKES, "test_resume_of_another_users_run_says_whose_it_is"),
    "until the run has ended": (HERE, "test_the_kept_value_of_a_secret_goes_with_the_end_of_its_run"),
    "handed to SkyPilot's server": (HERE, "test_credentials_are_in_no_record_and_not_in_the_task"),
    "The name alone is recorded": (HERE, "test_credentials_are_in_no_record_and_not_in_the_task"),
    "not in any record": (HERE, "test_credentials_are_in_no_record_and_not_in_the_task"),
    "in the same file, until the run has ended": (HERE, "test_a_local_run_keeps_the_shells_environment_in_one_file"),
    "The patch has changed files": (CODE, "test_new_code_is_in_the_patch_and_data_is_named"),
    "a bucket of SkyPilot's on the way": (HERE, "test_skypilot_passes_the_folder_through_a_bucket_of_its_own"),
    "or in a `.skyignore`": (SENT, "test_skypilot_itself_says_what_is_not_sent"),
    "read a secret given by `--secret`": (HERE, "test_a_secret_is_in_no_record"),
    "put another config in force": (HERE, "test_a_writer_to_the_bucket_chooses_model_data_and_remote_code"),
    "set `LD_PRELOAD`, `PATH` or the like": (MACHINE, "test_a_forged_record_cannot_set_the_loaders_names"),
    "a machine goes by its own environment": (MACHINE, "test_who_starts_the_machine_may_allow_a_name"),
    "choose model, data and `env:` names that are harmless": (ENV, "test_other_names_are_free"),
    "set names that decide which code runs": (ENV, "test_a_name_that_decides_what_runs_needs_the_flag"),
    "that file is yours alone": (HERE, "test_the_kept_value_of_a_secret_is_its_owners_alone"),
    "They are no proof": (HERE, "test_a_writer_to_the_bucket_chooses_model_data_and_remote_code"),
    "list what a run takes": (TAKES, "test_overrides_env_and_remote_code_are_listed_and_secrets_hidden"),
    "are `(hidden)`": (TAKES, "test_overrides_env_and_remote_code_are_listed_and_secrets_hidden"),
    "if another user owns it": (TAKES, "test_files_of_another_user_are_named"),
    "if it lies in another user's home": (TAKES, "test_what_lies_in_another_users_home_is_theirs"),
    "if it is from the hub": (TAKES, "test_a_model_of_the_hub_is_its_organisations"),
    "another user's run made it": (TAKES, "test_the_result_of_another_users_run_is_theirs"),
    "A run is its submitter's": (TAKES, "test_resume_of_another_users_run_says_whose_it_is"),
    "ask if another user has revised": (TAKES, "test_a_run_that_another_user_revised_is_resumed_only_when_agreed"),
    "where it goes on from a run": (TAKES, "test_train_goes_on_with_what_another_user_revised_only_when_agreed"),
    "since you submitted or revised": (TAKES, "test_yes_or_a_word_of_ones_own_since_is_enough"),
    "`hub_token` is refused": (HERE, "test_a_token_of_the_hub_is_refused_in_a_config"),
    "in the queue or SkyPilot's record": (HERE, "test_env_of_the_command_line_is_in_the_task"),
    "in the bucket, in clear: not for secrets": (HERE, "test_env_of_a_config_is_in_the_record"),
    "not in the record: it is taken out of the URL": (LEFT_OUT, "test_the_token_in_a_repositorys_url_is_not_recorded"),
    "**by name**": (NAMES, "test_names_of_secrets"),
    "Not `tokenizer.json`": (NAMES, "test_names_of_code_and_configs"),
    "**by content**": (NAMES, "test_contents_of_secrets_by_line"),
    "no placeholders": (NAMES, "test_code_and_placeholders_are_no_secrets"),
    "files that look like secrets stay here, whole": (LEFT_OUT, "test_new_secrets_stay_here_and_the_plan_says_so"),
    "so does what a change takes out of it": (LEFT_OUT, "test_changed_files_with_secrets_stay_here_whole"),
    "The plan says what goes and what stays": (LEFT_OUT, "test_without_secrets_nothing_is_left_out"),
    "A left-out file that the run uses is refused": (LEFT_OUT, "test_a_left_out_file_that_the_run_uses_is_refused"),
    "all files that git does not ignore": (SENT, "test_skypilot_itself_says_what_is_not_sent"),
    "the bucket gets the hash alone": (LEFT_OUT, "test_changed_files_with_secrets_stay_here_whole"),
}  # fmt: skip


def files_in(folder: Path) -> list[Path]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    assert found
    return found


def set_credentials(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """What a shell has of clouds and hubs; every value has the same beginning."""
    for name in CREDENTIALS:
        monkeypatch.setenv(name, f"v4lu3-{name}")
    (folder / "key.json").write_text('{"private_key": "v4lu3-google"}')
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(folder / "key.json"))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    return Project(tmp_path / "project", monkeypatch)


@pytest.mark.parametrize("claim", CLAIMS)
def test_the_page_makes_the_claim_and_its_test_is_there(claim: str) -> None:
    page = " ".join((ROOT / "docs/explanation/security.md").read_text().split())
    file, test = CLAIMS[claim]
    assert claim in page
    assert re.search(rf"(?m)^def {test}\(", (ROOT / file).read_text())


def test_a_secret_is_in_no_record(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "v4lu3-0f-th3-s3cr3t")
    project.submit("run-a", "--secret", "MY_KEY")
    files = [path for path in (project.home / "bucket").rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if b"v4lu3" in path.read_bytes()]
    plan = project.run("train", "run.yaml", "--secret", "MY_KEY", "--dryrun", "--format", "json").stdout
    assert "MY_KEY" in plan
    assert "v4lu3" not in plan


def test_the_kept_value_of_a_secret_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "kept" / "run-a.json"
    keep_environment(path, {}, {"MY_KEY": "value"})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_writer_to_the_bucket_chooses_model_data_and_remote_code(project: Project) -> None:
    project.submit()
    keys = Keys("run-a")
    record = RunRecord.from_bytes(project.store.read(keys.run) or b"")
    config = {**record.config, "model_name_or_path": "eve/model", "trust_remote_code": True}
    forged = replace(record, config=config, revision=1, revised_by="ada")  # under the submitter's name
    project.store.create(keys.revision(1), forged.to_bytes())
    found = record_in_force(project.store, keys)
    assert found
    assert (found.config["model_name_or_path"], found.revised_by) == ("eve/model", "ada")


def test_a_stranger_has_so_long_and_so_much() -> None:
    assert (multinode.HELLO_S, multinode.HELLO_MOST_BYTES) == (10.0, 4 << 10)


def make_repository(project: Project) -> None:
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a", "commit", "-qm", "a"]):
        subprocess.run(["git", *command], cwd=project.folder, check=True)


def test_a_large_new_file_is_named_only(project: Project) -> None:
    make_repository(project)
    for name, size in (("small.py", 100), ("large.py", (1 << 20) + 1)):
        project.write(name, f"# text of {name} {'x' * size}\n")
    project.submit()
    everything = b"".join(path.read_bytes() for path in files_in(project.home / "bucket"))
    assert b"text of small.py" in everything
    assert b"text of large.py" not in everything


def test_a_reader_of_the_bucket_sees_config_data_and_code(project: Project) -> None:
    make_repository(project)
    project.write("new.py", "print('mine')\n")
    project.submit()
    everything = b"".join(path.read_bytes() for path in files_in(project.home / "bucket"))
    for told in (b"learning_rate", b"data.jsonl", b"print('mine')"):
        assert told in everything


def test_a_writer_to_the_bucket_cancels_a_run(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a file, or by the verb under any name."""
    project.submit("run-a")
    project.submit("run-b")
    forged = TerminalMarker(run_id="run-a", attempt=0, at=1.7e9, reason="cancelled by ada", exit_code=1)
    project.store.create(Keys("run-a").cancelled, forged.to_bytes())
    assert standing_verdict(project.store, Keys("run-a")) == 1  # its next machine trains nothing
    monkeypatch.setenv("SPOTUNE_USER", "eve")
    assert project.run("cancel", "run-b", "-y").exit_code == 0
    assert b"eve" in (project.store.read(Keys("run-b").cancelled) or b"")


def test_credentials_are_in_no_record_and_not_in_the_task(
    project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    set_credentials(monkeypatch, tmp_path)
    project.submit("run-a", "--secret", "MY_KEY")
    submission = replace(project.infra.submissions["run-a"], infra="aws")
    client, tasks = FakeClient(), list[Any]()
    client.Task.from_yaml_config = lambda config: tasks.append(config) or config
    monkeypatch.setattr(skypilot_client, "sdk", lambda: client)
    SkyInfra(project.home, os.environ).submit(submission)
    assert (project.home / "skypilot/runs/run-a.json").exists()
    assert not [path for path in files_in(project.home) if b"v4lu3" in path.read_bytes()]
    (task,) = tasks
    assert task.pop("secrets") == {"MY_KEY": "v4lu3-MY_KEY"}
    assert "v4lu3" not in json.dumps(task)
    assert b"MY_KEY" in (project.home / "skypilot/runs/run-a.json").read_bytes()


def test_a_local_run_keeps_the_shells_environment_in_one_file(
    project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    set_credentials(monkeypatch, tmp_path)
    monkeypatch.setitem(engine.BACKENDS, "local", "spotune.launch.local.engine:LocalInfra")
    monkeypatch.setattr(LocalInfra, "_wake", lambda self: None)
    monkeypatch.setenv("SPOTUNE_PYTHON", sys.executable)
    project.submit("run-a", "--secret", "MY_KEY")
    (kept,) = [path for path in files_in(project.home) if b"v4lu3" in path.read_bytes()]
    assert kept == project.home / "local/jobs/run-a/environment.json"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600


def test_the_kept_value_of_a_secret_goes_with_the_end_of_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path)
    try:
        assert home.states() == {"run-a": "CANCELLED", "run-b": "STARTING", "run-c": "PENDING"}
        assert not home.layout.environment("run-a").exists()
        assert home.layout.environment("run-c").exists()
    finally:
        home.end()


@pytest.mark.xdist_group("sky")
def test_skypilot_passes_the_folder_through_a_bucket_of_its_own(tmp_path: Path, sky_says: RealSky) -> None:
    """The pinned SkyPilot still does so: a managed job's folder is uploaded to a store before its machine is there."""
    ask = """
import inspect, json
from sky.jobs.server import core
from sky.utils import controller_utils
name = "maybe_translate_local_file_mounts_and_sync_up"
source = inspect.getsource(getattr(controller_utils, name))
print(json.dumps([name in inspect.getsource(core), "intermediate storage" in source, "workdir" in source]))
"""
    assert sky_says.json(tmp_path, ask) == [True, True, True]


def test_a_token_of_the_hub_is_refused_in_a_config(project: Project) -> None:
    project.write("run.yaml", f"{CONFIG}hub_token: abc\n")
    refused = project.run("train", "run.yaml", "-y", "-d")
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert "hub_token: a secret would be written to run.json" in refused.stderr


def test_env_of_the_command_line_is_in_the_task(project: Project) -> None:
    project.submit("run-a", "--env", "PYTHONPATH=mine")
    assert project.infra.submissions["run-a"].task["envs"]["PYTHONPATH"] == "mine"
    assert b"PYTHONPATH" not in (project.store.read(Keys("run-a").run) or b"")


def test_env_of_a_config_is_in_the_record(project: Project) -> None:
    project.write("run.yaml", f"{CONFIG}env: {{NCCL_DEBUG: INFO}}\n")
    project.submit()
    assert b"NCCL_DEBUG" in (project.store.read(Keys("run-a").run) or b"")
