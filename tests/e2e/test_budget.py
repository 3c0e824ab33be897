"""Runs with a budget, by the command line on the local infrastructure: a real guard, and a worker that waits.

A budget's clock is the test's, so a wall is reached when the test says so. How the wall is reckoned:
tests/unit/guard/test_wall.py.
"""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import guard_with_clock
from tests.local_project import LocalProject

GUARD = Path(guard_with_clock.__file__)
USD_PER_S = 0.001
AT_ONCE = 1000.0  # US dollars a second: any budget is used up before the first step


class Project(LocalProject):
    """A project whose machine costs ``USD_PER_S``.

    Attributes:
        clock: a file: seconds that the budgets of runs are ahead of the time of day.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(folder, monkeypatch)
        self.clock = folder / "clock"
        self.write_task(f"-P {shlex.quote(str(GUARD))} {shlex.quote(str(self.clock))}")
        (folder / "config").mkdir()
        self.settle({})

    def settle(self, budgets: dict[str, Any], usd_per_s: float = USD_PER_S) -> None:
        """Writes the project's settings, with these monthly budgets and this price."""
        price = {"on_demand": usd_per_s * 3600, "spot": usd_per_s * 3600}
        settings = {"local": {"prices": {"cpu": price}}, "budgets": budgets}
        (self.folder / "config/spotune.yaml").write_text(yaml.safe_dump(settings))

    def steps_of(self, run_id: str) -> int:
        """Returns how many steps the run's first attempt has taken."""
        keys = [key for key in self.store.keys(f"runs/{run_id}/attempts") if "/0001/events-0-" in key]
        lines = [json.loads(line) for key in keys for line in (self.store.read(key) or b"").splitlines()]
        return sum(line["event"] == "step" for line in lines)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    project = Project(tmp_path / "project", monkeypatch)
    yield project
    project.machine.close()


def test_a_run_pauses_at_its_wall_and_a_raised_budget_changes_nothing_else(project: Project) -> None:
    project.spotune("train", "run.yaml", "--name", "whole", "-y")
    whole = project.report("whole")
    assert whole["cost_usd"] == pytest.approx(whole["paid_s"] * USD_PER_S)
    project.settle({}, usd_per_s=100 * USD_PER_S)
    assert project.report("whole") | {"reported_at": 0} == whole | {"reported_at": 0}  # the price was frozen
    project.settle({})

    project.allow(7)
    project.spotune("train", "run.yaml", "--name", "halved", "-y", "-d", "--budget", "100")
    project.wait_for_step("halved", 7)
    project.clock.write_text("200000")
    project.wait_for_stop("halved")
    project.allow_all()
    row = project.end("halved")
    assert (row["state"], row["attempt"]) == ("PAUSED", 1)
    assert row["reason"].startswith("budget of $100.00 used up at step 8: $200.")
    assert "spotune resume halved --budget" in project.spotune("logs", "halved").stdout
    mark, paused = project.paused("halved"), project.report("halved")
    assert (mark["exit_code"], mark["reason"]) == (76, row["reason"])
    assert mark["step"] == paused["useful_steps"] == 8  # the step that was under way, and it is in the bucket
    assert project.steps_of("halved") == 8
    assert paused["state"] == "PAUSED"
    assert [attempt["end_reason"] for attempt in paused["attempts"]] == ["paused"]

    for words in ([], ["--budget", "0.001"], ["--budget", "100"]):
        assert project.refused("resume", "halved", *words).startswith("halved: budget: has cost $")
    raised = project.spotune("resume", "halved", "--budget", "1000")
    assert "budget: " in raised.stdout
    project.end("halved")
    done = project.report("halved")
    assert (done["state"], done["replayed_steps"], done["budget_usd"]) == ("SUCCEEDED", 0, 1000.0)
    assert done["weights_sha256"] == whole["weights_sha256"]


def test_a_wall_before_the_first_step_pauses_and_says_at_which_step(project: Project) -> None:
    project.settle({}, AT_ONCE)
    project.tell("load")
    done = project.spotune("train", "run.yaml", "--name", "poor", "-y", "--budget", "$0.001", code=76)
    assert "spotune resume poor --budget" in done.stdout + done.stderr
    assert project.paused("poor")["step"] == 0
    row = project.row("poor")
    assert (row["state"], row["attempt"]) == ("PAUSED", 1)
    assert row["reason"].startswith("budget of $0.0010 used up at step 0: $")
    assert project.steps_of("poor") == 0


def test_a_budget_that_is_no_amount_is_refused(project: Project) -> None:
    assert project.refused("train", "run.yaml", "--dryrun", "--budget", "").startswith("--budget: '' is")


def test_what_the_month_has_left_is_a_wall_and_once_it_is_gone_nothing_starts(project: Project) -> None:
    project.settle({"users": {"*": 0.002}}, AT_ONCE)
    project.tell("load")
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
    assert [job.run_id for job in project.machine.queue.jobs()] == ["first"]
    project.settle({})
    project.allow_all()
    project.spotune("resume", "first")  # without a month's budget its wall is gone
    assert project.end("first")["state"] == "SUCCEEDED"


def test_a_budget_that_nothing_could_count_is_refused(project: Project) -> None:
    (project.folder / "config/spotune.yaml").write_text("budgets: {users: {'*': 0}}\n")
    for words in ("train run.yaml --dryrun --budget 1", "train run.yaml --name free -y --budget 1"):
        assert project.spotune(*words.split(), code=2).stderr.startswith("--budget: cannot be kept: ")
    project.tell("load")
    project.spotune("train", "run.yaml", "--name", "free", "-y", "-d")  # what has no price spends nothing of a month
    project.spotune("cancel", "free", "-y")
    refused = project.spotune("resume", "free", "--budget", "1", code=2)
    assert refused.stderr.startswith("--budget: cannot be kept: ")
    project.spotune("resume", "free")
    project.spotune("cancel", "free", "-y")
    report = project.report("free")
    assert report["cost_usd"] is None or report["paid_s"] == 0
