"""A bucket that goes away or misbehaves while a run trains: nothing is lost."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spotune.core.environment import PATIENCE
from tests.conftest import reach
from tests.faultproxy import FaultProxy, Plan
from tests.script import FakeScript, fake_config, undisturbed_weights
from tests.waiting import ended

STEPS = 24


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_config(tmp_path_factory.mktemp("material"), max_steps=STEPS)


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights that every disturbed run must end with."""
    return undisturbed_weights(config, tmp_path_factory.mktemp("undisturbed"))


class Folder:
    """A local bucket that a test takes away and brings back, each at one instant."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._link = folder / "folder", folder / "bucket"
        self._folder.mkdir()
        self.url = f"file://{self._link}"
        self.come_back()

    def go_away(self) -> None:
        """From now on every verb fails at once, with the error of a link to a name that is too long."""
        self._point_to(Path("x" * 300))

    def come_back(self) -> None:
        self._point_to(self._folder)

    def _point_to(self, target: Path) -> None:
        new = self._link.with_name("new")
        new.symlink_to(target)
        new.replace(self._link)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


@pytest.fixture
def script(folder: Folder, config: Path) -> FakeScript:
    return FakeScript(folder.url, "away", config)


def start_without_bucket(script: FakeScript, folder: Folder) -> "subprocess.Popen[str]":
    """An attempt with step 6 committed; its bucket goes away before anything of step 12 is uploaded."""
    script.allow(0)
    process = script.start(stop_at="staged:2")
    script.allow_and_commit(process, 6)
    script.allow(12)
    script.wait_at(process, "staged")
    assert script.commits == ["0001-00000006"]
    folder.go_away()
    script.pass_on("staged")
    script.wait_for_text(process, "step 12 is not committed yet: ")
    return process


def test_training_goes_on_without_the_bucket(script: FakeScript, folder: Folder, undisturbed: str) -> None:
    process = start_without_bucket(script, folder)
    script.allow(17)
    script.wait_for_step(process, 17)
    folder.come_back()
    script.allow_and_commit(process, 18)
    script.allow_all()
    assert ended(process) == 0, script.log()
    assert script.weights == undisturbed


def test_a_bucket_that_stays_away_ends_the_attempt_and_loses_nothing(
    script: FakeScript, folder: Folder, undisturbed: str
) -> None:
    script.environ[PATIENCE] = "1s"
    process = start_without_bucket(script, folder)
    script.wait_until_told_to_stop(process)
    script.allow_all()
    assert ended(process) == 75, script.log()
    line = "the last good step in the bucket is 6; step 13 is on this machine's disk, the next attempt here commits it"
    assert line in script.log()
    folder.come_back()
    assert script.commits == ["0001-00000006"]
    assert not script.store.exists(script.keys.failed)
    assert script.run() == 0, script.log()
    assert "step 13 was still on this machine's disk, and is committed now" in script.log()
    assert "resumed from the checkpoint of step 13, attempt 2" in script.log()
    assert script.weights == undisturbed


def test_a_bucket_that_is_away_at_the_end_gets_the_result_once_it_is_back(
    script: FakeScript, folder: Folder, undisturbed: str
) -> None:
    process = script.start(stop_at="result-uploaded")
    script.wait_at(process, "result-uploaded")
    folder.go_away()
    script.pass_on("result-uploaded")
    script.wait_for_text(process, "the result is not certified yet: ")
    folder.come_back()
    process.terminate()  # the pause before the next try ends with the notice
    assert ended(process) == 0, script.log()
    assert script.weights == undisturbed


def test_a_bucket_that_stays_away_at_the_end_is_tried_again_by_the_next_attempt(
    script: FakeScript, folder: Folder, undisturbed: str
) -> None:
    script.environ["SPOTUNE_GRACE_S"] = "0"
    process = script.start(stop_at="result-uploaded")
    script.wait_at(process, "result-uploaded")
    folder.go_away()
    script.pass_on("result-uploaded")
    script.wait_for_text(process, "the result is not certified yet: ")
    process.terminate()
    assert ended(process) == 75, script.log()
    assert f"; all {STEPS} steps are made, the result is not in the bucket" in script.log()
    folder.come_back()
    assert script.run() == 0, script.log()
    assert script.json(script.keys.completed)["attempt"] == 2
    assert script.weights == undisturbed


@pytest.fixture
def proxy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    reach("s3", request, monkeypatch)
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as made:
        monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
        yield made


@pytest.mark.slow
def test_a_bucket_with_every_fault(proxy: FaultProxy, config: Path, undisturbed: str, tmp_path: Path) -> None:
    script = FakeScript(f"s3://spotune/{tmp_path.name}-{time.time_ns()}", "faults", config)
    faults = {"error": 0.05, "reset": 0.05, "lost": 0.03, "truncate": 0.03, "flip": 0.02, "delay": 0.05, "delay_s": 0.3}
    at_the_door, inside = Plan(**faults), Plan(**faults, expired=0.03)  # credentials that never worked are bad input

    def start(step: int) -> "subprocess.Popen[str]":
        proxy.plan = at_the_door
        script.allow(1)
        process = script.start()
        script.wait_for_step(process, 1)
        proxy.plan = inside
        script.allow(step)
        script.wait_for_step(process, step)
        return process

    def commits_beyond(count: int) -> Callable[[], bool]:
        return lambda: proxy.count("PUT", f"{script.keys.commits}/") > count

    first = start(9)
    script.until(commits_beyond(0), first)
    first.kill()
    ended(first)
    second = start(16)
    assert script.notify_and_release(second) == 75, script.log()
    third = start(18)
    script.allow_all()
    assert ended(third) == 0, script.log()
    proxy.plan = Plan()
    assert script.weights == undisturbed
    assert {"error", "reset", "lost"} <= {name for name, count in proxy.dealt.items() if count}, proxy.dealt
