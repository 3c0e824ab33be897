"""Ranks that hang, each in another phase: the attempt ends as stalled, with stacks, and the next one as if undisturbed.

The watchdog's clock is the test's: it goes by the default limits, and only a rank that stands still is a stall.
"""

import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from spotune.core.environment import NUM_PROCESSES, PATIENCE
from tests.script import FakeScript, fake_config, undisturbed_weights
from tests.waiting import ended, until

STEPS = 24
GUARD = Path(__file__).parents[1] / "guard_with_watchdog_clock.py"
LONG_S = 100_000  # longer than any limit


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_config(tmp_path_factory.mktemp("material"), max_steps=STEPS)


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return undisturbed_weights(config, tmp_path_factory.mktemp("undisturbed"))


class WatchedScript(FakeScript):
    """The script with a watchdog whose clock the test moves."""

    def __init__(self, config: Path, folder: Path, how: str = "jumps", run_id: str = "watched") -> None:
        super().__init__(f"file://{folder}/bucket", run_id, config, folder / "home")
        self._clock = folder / "clock"
        self.let_pass(0)
        self.entry = [str(GUARD), str(self._clock), how]

    def let_pass(self, seconds: int) -> None:
        part = self._clock.with_name(".clock")
        part.write_text(str(seconds))
        part.rename(self._clock)

    @property
    def passed(self) -> str:
        """What the watchdog has seen of it."""
        seen = self._clock.with_suffix(".seen")
        return seen.read_text() if seen.exists() else ""

    def hang(self, part: str, how: str = "hang") -> None:
        """Has the guard's calls to the bucket hang whose keys have this in them."""
        part_file = self._clock.with_name(".hang")
        part_file.write_text(part)
        part_file.rename(self._clock.with_name(how))

    def wait_until_it_hangs(self, process: "subprocess.Popen[str]", seen_s: int = 40) -> None:
        """Returns once a call hangs, and the watchdog has seen it."""
        self.until(self._clock.with_name("hangs").exists, process)
        self.let_pass(seen_s)
        self.until(lambda: self.passed == str(seen_s), process)

    def repair(self) -> None:
        for name in ("hang", "crawl", "hangs"):
            self._clock.with_name(name).unlink(missing_ok=True)

    def stop_a_rank(self, process: "subprocess.Popen[str]", rank: int = 0) -> None:
        """SIGSTOP to a rank; returns once it stands still."""
        worker = self.workers(process)[rank]
        worker.suspend()
        until(lambda: worker.status() == psutil.STATUS_STOPPED)

    def stall(self, process: "subprocess.Popen[str]", rank: int = 0) -> int:
        """Stops a rank for long; returns the attempt's exit code."""
        self.stop_a_rank(process, rank)
        self.let_pass(LONG_S)
        return ended(process)


@pytest.fixture
def script(config: Path, tmp_path: Path) -> WatchedScript:
    return WatchedScript(config, tmp_path)


def start_loading(script: WatchedScript) -> "subprocess.Popen[str]":
    script.tell("load")
    process = script.start()
    script.until(lambda: script.seen().get("phase") == "restore" or script.workers(process), process)
    return process


def start_evaluating(script: WatchedScript) -> "subprocess.Popen[str]":
    script.tell("evaluate", "8")
    process = script.start()
    script.until(lambda: script.seen().get("phase") == "eval", process)
    script.until(lambda: (script.seen().get("committed_step") or 0) >= 6, process)
    return process


def start_saving(script: WatchedScript) -> "subprocess.Popen[str]":
    script.allow(6)
    process = script.start(stop_at="snapshot:2")
    script.until(lambda: (script.seen().get("committed_step") or 0) >= 6, process)
    script.allow_all()
    script.wait_at(process, "snapshot")
    return process


def start_stepping(script: WatchedScript) -> "subprocess.Popen[str]":
    process = script.start_and_stop_after(8)
    script.until(lambda: (script.seen().get("committed_step") or 0) >= 6, process)
    return process


PHASES: dict[str, tuple[Callable[[WatchedScript], "subprocess.Popen[str]"], str]] = {
    "load": (start_loading, "no sign of life in the phase load"),
    "train": (start_stepping, "no step"),
    "eval": (start_evaluating, "no sign of life in the phase eval"),
    "save": (start_saving, "no sign of life in the phase save"),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_stopped_rank_ends_the_attempt_and_the_next_one_goes_on(
    script: WatchedScript, undisturbed: str, phase: str
) -> None:
    start, what = PHASES[phase]
    process = start(script)
    assert script.stall(process) == 75, script.log()
    (stall,) = script.events(1, "stall")
    assert (stall["phase"], stall["silent_s"] >= stall["limit_s"] >= 600) == (phase, True)
    (end,) = script.events(1, "end")
    assert (end["reason"], end["exit_code"]) == ("stalled", 75)
    assert f"\nstalled: {what} for " in script.log()
    stacks = (script.store.read(script.keys.stacks(1, 0)) or b"").decode()
    assert "state T (stopped by a signal)" in stacks
    assert "it cannot write them in state T" in stacks
    assert "threads, as the kernel sees them:\n" in stacks
    script.allow_all()
    (script.told / "evaluate").unlink(missing_ok=True)
    assert script.run() == 0, script.log()
    assert script.weights == undisturbed
    assert script.attempts == 2


def test_guard_and_ranks_stopped_together_are_no_stall(config: Path, undisturbed: str, tmp_path: Path) -> None:
    script = WatchedScript(config, tmp_path, how="misses")
    process = script.start_and_stop_after(8)
    workers = script.workers(process)
    for one in (psutil.Process(process.pid), *workers):
        one.suspend()
    script.let_pass(LONG_S)
    for one in (psutil.Process(process.pid), *workers):
        one.resume()
    script.wait_for_text(process, "the watchdog does not count that time")
    script.allow_all()
    assert ended(process) == 0, script.log()
    assert script.weights == undisturbed
    assert not script.events(1, "stall")


def test_one_stopped_rank_of_two_ends_both_and_leaves_the_stacks_of_both(script: WatchedScript) -> None:
    script.allow(8)
    process = script.start(**{NUM_PROCESSES: "2"})
    script.wait_for_step(process, 8)
    workers = script.workers(process)
    assert script.stall(process, rank=1) == 75, script.log()
    assert not any(worker.is_running() for worker in workers)
    texts = [(script.store.read(script.keys.stacks(1, rank)) or b"").decode() for rank in (0, 1)]
    states = ["stopped by a signal" in text.partition("\n")[0] for text in texts]
    assert sorted(states) == [False, True]


def test_a_stopped_rank_of_another_machine_leaves_the_stacks_of_all_machines(config: Path, tmp_path: Path) -> None:
    run_id = f"pair-{uuid4().hex[:8]}"  # guards meet at a port that follows from it
    leader = WatchedScript(config, tmp_path, run_id=run_id)
    follower = FakeScript(f"file://{tmp_path}/bucket", run_id, config, tmp_path / "other")
    for number, node in enumerate((leader, follower)):
        node.environ |= {
            "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NODE_RANK": str(number),
            "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1",
            "FAKE_WORKER_DIR": str(leader.told),
        }
    leader.allow(8)
    first, second = leader.start(), follower.start()
    leader.wait_for_step(first, 8)
    (worker,) = follower.workers(second)
    worker.suspend()
    until(lambda: worker.status() == psutil.STATUS_STOPPED)
    leader.let_pass(LONG_S)
    assert (ended(first), ended(second)) == (75, 75), leader.log() + follower.log()
    assert not worker.is_running()
    texts = [(leader.store.read(leader.keys.stacks(1, rank)) or b"").decode() for rank in (0, 1)]
    assert ["stopped by a signal" in text.partition("\n")[0] for text in texts] == [False, True]
    leader.allow_all()
    assert [ended(node) for node in (leader.start(), follower.start())] == [0, 0], leader.log() + follower.log()


def test_a_second_stall_without_a_commit_is_a_failure(script: WatchedScript) -> None:
    codes = []
    for seconds in (LONG_S, 2 * LONG_S):
        process = script.start_and_stop_after(3)
        script.stop_a_rank(process)
        script.let_pass(seconds)
        codes.append(ended(process))
    assert codes == [75, 1], script.log()
    failed = script.json(script.keys.failed)
    assert failed["reason"].startswith("two attempts in a row failed and committed nothing: stalled: no step for ")
    (end,) = script.events(2, "end")
    assert (end["reason"], end["exit_code"]) == ("stalled", 1)


@pytest.mark.slow
def test_an_upload_that_hangs_is_a_stall(tmp_path: Path) -> None:
    """Its limit is 30 s here; that of ranks that have made few steps is three times that."""
    often = fake_config(tmp_path / "material", max_steps=STEPS, save_steps=2)
    script = WatchedScript(often, tmp_path)
    script.allow(2)
    process = script.start(stop_at="uploading", **{PATIENCE: "20s", "SPOTUNE_STALL_AFTER": "30s"})
    script.wait_at(process, "uploading")
    script.let_pass(40)
    script.until(lambda: script.passed == "40", process)
    script.let_pass(80)
    assert ended(process) == 75, script.log()
    assert "\nstalled: no byte of a checkpoint was uploaded for " in script.log()
    (stall,) = script.events(1, "stall")
    assert stall["phase"] == "upload"
    script.allow_all()
    assert script.run() == 0, script.log()


def test_a_result_whose_upload_hangs_ends_the_attempt_and_the_next_one_finishes(
    script: WatchedScript, undisturbed: str
) -> None:
    script.hang("/output/model.safetensors")
    process = script.start()
    script.wait_until_it_hangs(process)
    script.let_pass(LONG_S)
    assert ended(process) == 75, script.log()
    what = f"no answer from the bucket to: upload {script.keys.output}/model.safetensors"
    assert f"\nstalled: {what} for " in script.log()
    (stall,) = script.events(1, "stall")
    assert (stall["phase"], stall["silent_s"] >= stall["limit_s"] >= 1800) == ("upload", True)
    (end,) = script.events(1, "end")
    assert (end["reason"], end["exit_code"]) == ("stalled", 75)
    stacks = (script.store.read(script.keys.stacks(1, 0)) or b"").decode()
    assert "the guard, process " in stacks
    assert "in upload_new" in stacks
    script.repair()
    assert script.run() == 0, script.log()
    assert script.weights == undisturbed
    assert script.attempts == 2


def test_a_bucket_that_hangs_as_a_whole_at_the_end_ends_the_attempt(script: WatchedScript, undisturbed: str) -> None:
    """Nothing can be written there: what was seen is left on this machine."""
    process = script.start_and_stop_after(8)
    script.until(lambda: (script.seen().get("committed_step") or 0) >= 6, process)
    script.hang("runs/")
    script.allow_all()
    script.wait_until_it_hangs(process)
    script.until(lambda: not script.workers(process), process)
    script.let_pass(LONG_S)
    assert ended(process) == 75, script.log()
    assert "\nstalled: no answer from the bucket to: " in script.log()
    assert script.seen()["phase"] == "stalled"
    (stacks,) = (script.home / "work").rglob("stacks-0.txt")
    assert f"the guard's stacks are in {stacks}" in script.log()
    script.repair()
    assert script.run() == 0, script.log()
    assert script.weights == undisturbed


def test_a_result_that_is_uploaded_slowly_is_no_stall(script: WatchedScript, undisturbed: str) -> None:
    script.hang("/output/model.safetensors", how="crawl")
    process = script.start()
    script.wait_until_it_hangs(process)
    for seconds in (2_000, 4_000, 6_000):
        script.let_pass(seconds)
        script.until(lambda seconds=seconds: script.passed == str(seconds), process)
    script.repair()
    assert ended(process) == 0, script.log()
    assert script.weights == undisturbed


def test_a_certified_run_whose_last_events_hang_has_succeeded(script: WatchedScript, undisturbed: str) -> None:
    process = script.start(stop_at="certified")
    script.wait_at(process, "certified")
    script.hang("/events-")
    script.pass_on("certified")
    script.wait_until_it_hangs(process)
    script.let_pass(LONG_S)
    assert ended(process) == 0, script.log()
    assert script.weights == undisturbed


@pytest.mark.parametrize("place", ["/checkpoints/", "/events-"])
def test_a_call_to_the_bucket_that_hangs_beside_training_ends_the_attempt(tmp_path: Path, place: str) -> None:
    """Its limit is 30 s here; that of ranks that have made few steps is three times that."""
    script = WatchedScript(fake_config(tmp_path / "material", max_steps=STEPS, save_steps=2), tmp_path)
    script.allow(1)
    process = script.start(**{PATIENCE: "20s", "SPOTUNE_STALL_AFTER": "30s"})
    script.wait_for_step(process, 1)
    script.hang(place)
    script.allow(2)
    script.wait_until_it_hangs(process)
    script.let_pass(80)
    assert ended(process) == 75, script.log()
    assert re.search(r"\nstalled: no (answer|byte).*limit 30 s", script.log())
    assert "the guard's stacks are in " in script.log()
    assert script.seen()["phase"] == "stalled"
    script.repair()
    script.allow_all()
    assert script.run() == 0, script.log()


def test_the_watchdog_can_be_off(config: Path, undisturbed: str, tmp_path: Path) -> None:
    script = WatchedScript(config, tmp_path)
    script.allow(8)
    process = script.start(SPOTUNE_STALL_AFTER="0")
    script.wait_for_step(process, 8)
    script.stop_a_rank(process)
    script.let_pass(LONG_S)
    script.workers(process)[0].send_signal(signal.SIGCONT)
    script.allow_all()
    assert ended(process) == 0, script.log()
    assert script.weights == undisturbed
    assert script.json(script.keys.run)["stall_after"] == "0"
