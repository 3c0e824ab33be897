"""A run with a budget, by the command line on the local infrastructure: real training, real money's arithmetic."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from spotune.contracts.keys import Keys
from spotune.contracts.store import Store
from spotune.cost.eventlog import parse_lines
from tests.processes import end_processes_of
from tests.tiny import make_model, rows, write_jsonl

SPOTUNE = [sys.executable, "-c", "from spotune.cli import main; main()"]
USD_PER_S = 0.001
STEPS = 60


class Project:
    """A folder with a config, whose machine costs ``USD_PER_S``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "home"
        for name in ("tasks", "config"):
            (folder / name).mkdir(parents=True)
        make_model(folder / "model", dropout=0.1)
        write_jsonl(folder / "data.jsonl", rows(400))
        config = {
            "model_name_or_path": "./model",
            "data": [{"source": "data.jsonl"}],
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 24,  # long beside what loading takes now more, now less
            "packing": True,
            "max_length": 64,
            "bf16": False,
            "gradient_checkpointing": False,
            "logging_steps": 4,
        }
        (folder / "run.yaml").write_text(yaml.safe_dump(config))
        self.settle({})
        task = {"run": f"{sys.executable} -m spotune.sft $SPOTUNE_CONFIG", "resources": {"use_spot": True}}
        (folder / "tasks/train.yaml").write_text(json.dumps(task))
        self.environ = {**os.environ, "SPOTUNE_HOME": str(self.home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def settle(self, budgets: dict[str, Any], usd_per_s: float = USD_PER_S) -> None:
        """The project's settings, with these monthly budgets and this price."""
        price = {"on_demand": usd_per_s * 3600, "spot": usd_per_s * 3600}
        settings = {"local": {"prices": {"cpu": price}}, "budgets": budgets}
        (self.folder / "config/spotune.yaml").write_text(yaml.safe_dump(settings))

    def spotune(self, *words: str, code: int = 0) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run(
            [*SPOTUNE, *words], cwd=self.folder, env=self.environ, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
        return done

    def report(self, run_id: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.spotune("cost", run_id, "--format", "json").stdout)
        return found

    def steps_of(self, run_id: str) -> list[float]:
        """When each step of the first attempt ended, epoch seconds."""
        store, keys = Store(f"file://{self.home}/bucket"), Keys(run_id)
        parts = [key for key in store.keys(keys.attempts) if "/0001/events-0-" in key]
        events = [event for key in parts for event in parse_lines(store.read(key) or b"")]
        return [event["t"] for event in events if event["event"] == "step"]

    def paused(self, run_id: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(Store(f"file://{self.home}/bucket").read(f"runs/{run_id}/paused.json") or "")
        return found


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    project = Project(tmp_path / "project")
    yield project
    end_processes_of(project.home)


def test_a_run_pauses_at_its_wall_and_a_raised_budget_changes_nothing_else(project: Project) -> None:
    project.spotune("train", "run.yaml", "--name", "whole", "-y")
    whole = project.report("whole")
    assert whole["cost_usd"] == pytest.approx(whole["paid_s"] * USD_PER_S)
    project.settle({}, usd_per_s=100 * USD_PER_S)
    assert project.report("whole") | {"reported_at": 0} == whole | {"reported_at": 0}  # the price was frozen
    project.settle({})
    phases = whole["phases"]
    until_half = whole["paid_s"] - phases["teardown_s"] - phases["useful_s"] / 2
    budget = round(until_half * USD_PER_S, 5)

    attached = project.spotune("train", "run.yaml", "--name", "halved", "-y", "--budget", str(budget), code=76)
    assert "spotune resume halved --budget" in attached.stdout + attached.stderr
    mark, paused = project.paused("halved"), project.report("halved")
    assert mark["exit_code"] == 76
    assert 0 < mark["step"] == paused["useful_steps"] < STEPS  # every step that was made is in the bucket
    assert paused["state"] == "PAUSED"
    assert [attempt["end_reason"] for attempt in paused["attempts"]] == ["paused"]
    assert 0.8 * budget < paused["cost_usd"]
    reached_at = paused["attempts"][0]["started_at"] + budget / USD_PER_S
    assert sum(at > reached_at for at in project.steps_of("halved")) <= 2  # on a clock: a slow machine leaves slowly

    assert project.spotune("train", "run.yaml", "--dryrun", "--budget", "", code=2).stderr.startswith("--budget: '' is")
    refused = project.spotune("resume", "halved", code=2)
    assert refused.stderr.startswith("halved: budget: has cost $")
    project.spotune("resume", "halved", "--budget", "0.001", code=2)
    raised = project.spotune("resume", "halved", "--budget", "1")
    assert "budget: " in raised.stdout
    project.spotune("logs", "halved", "--follow")
    done = project.report("halved")
    assert (done["state"], done["replayed_steps"], done["budget_usd"]) == ("SUCCEEDED", 0, 1.0)
    assert done["weights_sha256"] == whole["weights_sha256"]


def test_a_wall_before_the_first_step_pauses_and_says_at_which_step(project: Project) -> None:
    project.spotune("train", "run.yaml", "--name", "poor", "-y", "--budget", "$0.001", code=76)
    assert project.paused("poor")["step"] == 0
    row = next(row for row in json.loads(project.spotune("queue", "-a", "--format", "json").stdout))
    assert (row["state"], row["attempt"]) == ("PAUSED", 1)
    assert row["reason"].startswith("budget of $0.0010 used up at step 0: $0.00")


def test_what_the_month_has_left_is_a_wall_and_once_it_is_gone_nothing_starts(project: Project) -> None:
    project.settle({"users": {"*": 0.002}})
    planned = project.spotune("train", "run.yaml", "--dryrun").stdout
    assert "$0.0020 left of $0.0020" in planned
    refused = project.spotune("train", "run.yaml", "--name", "dear", "-y", "--budget", "1", code=2)
    assert refused.stderr.startswith("--budget: $1.00 is more than is left: user ")
    attached = project.spotune("train", "run.yaml", "--name", "first", "-y", code=76)
    assert "this month used up at step 0" in attached.stdout + attached.stderr
    for words in (
        ["train", "run.yaml", "--name", "second", "-y"],
        ["resume", "first"],
        ["train", "run.yaml", "--dryrun"],
    ):
        refused = project.spotune(*words, code=2)
        assert "config/spotune.yaml: budgets.users.*: user " in refused.stderr
        assert refused.stdout == ""
    runs = {row["run_id"] for row in json.loads(project.spotune("queue", "-a", "--format", "json").stdout)}
    assert runs == {"first"}
    project.settle({})
    project.spotune("resume", "first")  # without a month's budget its wall is gone
    project.spotune("logs", "first", "--follow")
    assert project.report("first")["state"] == "SUCCEEDED"


def test_a_budget_that_nothing_could_count_is_refused(project: Project) -> None:
    (project.folder / "config/spotune.yaml").write_text("budgets: {users: {'*': 0}}\n")
    for words in ("train run.yaml --dryrun --budget 1", "train run.yaml --name free -y --budget 1"):
        refused = project.spotune(*words.split(), code=2)
        assert refused.stderr.startswith("--budget: cannot be kept: ")
    project.spotune("train", "run.yaml", "--name", "free", "-y", "-d")  # what has no price spends nothing of a month
    project.spotune("cancel", "free", "-y")
    assert project.spotune("resume", "free", "--budget", "1", code=2).stderr.startswith("--budget: cannot be kept: ")
    project.spotune("resume", "free")
    project.spotune("cancel", "free", "-y")
    report = project.report("free")
    assert report["cost_usd"] is None or report["paid_s"] == 0
