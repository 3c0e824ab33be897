"""Attempts of one run, killed, noticed and resumed through the script itself, with a fake worker for training."""

import signal
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest

from spotune.core.records import Mark
from spotune.launch.local.machine import is_live
from tests.script import FakeScript, fake_config, undisturbed_weights
from tests.waiting import ended, until

STEPS = 24


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_config(tmp_path_factory.mktemp("material"), max_steps=STEPS)


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights that every disturbed run must end with."""
    return undisturbed_weights(config, tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def local_script(config: Path, tmp_path: Path) -> Callable[..., FakeScript]:
    """Makes the script for a run in one local bucket; ``machine``: one with a disk of its own."""

    def make(run_id: str, machine: str = "home") -> FakeScript:
        return FakeScript(f"file://{tmp_path}/bucket", run_id, config, tmp_path / machine)

    return make


@pytest.mark.parametrize("bucket", ["file", "s3", pytest.param("gs", marks=pytest.mark.slow)], indirect=True)
def test_a_run_killed_and_noticed_ends_as_if_undisturbed(bucket: str, config: Path, undisturbed: str) -> None:
    script = FakeScript(bucket, "killed", config)
    first = script.start_and_stop_after(8)
    script.until(lambda: script.commits, first)
    (worker,) = script.workers(first)
    first.kill()
    ended(first)
    until(lambda: not is_live(worker), "the worker outlives its guard")
    second = script.start_and_stop_after(13)
    script.notify(second)
    second.send_signal(signal.SIGTERM)  # preemption signals more than once
    script.wait_until_told_to_stop(second)
    script.allow_all()
    assert ended(second) == 75, script.log()
    assert "resumed from the checkpoint of step 6, attempt 1" in script.log()
    noticed = script.json(script.keys.progress)
    assert (noticed["phase"], noticed["step"]) == ("preempted", 14)
    assert "0002-00000014" in script.commits  # saved at the end of the step: nothing is trained twice
    assert script.run() == 0, script.log()
    assert "resumed from the checkpoint of step 14, attempt 2" in script.log()
    assert script.weights == undisturbed
    certificate = script.json(script.keys.completed)
    assert (certificate["attempt"], certificate["step"]) == (3, STEPS)
    before = script.log()
    assert script.run() == 0
    assert script.log() == before + "[spotune] killed is finished and certified already\n"  # no worker was started
    assert script.attempts == 3


def test_a_damaged_checkpoint_is_passed_over(
    local_script: Callable[..., FakeScript], undisturbed: str, tmp_path: Path
) -> None:
    script = local_script("damaged")
    script.allow(0)
    first = script.start()
    script.allow_and_commit(first, 12)
    script.allow(14)
    script.wait_for_step(first, 14)
    assert script.notify_and_release(first) == 75, script.log()
    assert max(script.commits) == "0001-00000015"
    victim = tmp_path / "bucket" / script.keys.checkpoint(15, 1) / "optimizer.pt"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(bytes(data))
    assert script.run() == 0, script.log()
    assert "checkpoint rejected: step 15 of attempt 1: optimizer.pt is not what was committed (sha256)" in script.log()
    assert "resumed from the checkpoint of step 12, attempt 1" in script.log()
    assert script.weights == undisturbed


def test_a_commit_comes_after_its_files_and_not_after_a_later_attempt(
    local_script: Callable[..., FakeScript], undisturbed: str
) -> None:
    """A zombie: its machine was given up, but lives. It is held between its last file and its commit."""
    script, other = local_script("zombie"), local_script("zombie", machine="other")
    script.allow(6)
    zombie = script.start(stop_at="staged,uploaded:2")
    script.wait_at(zombie, "staged")
    assert script.commits == []
    assert script.store.keys(script.keys.checkpoints) == []
    script.pass_on("staged")
    script.allow_and_commit(zombie, 6)
    script.allow(12)
    script.wait_at(zombie, "uploaded")
    uploaded = {key.rpartition("/")[2] for key in script.store.keys(script.keys.checkpoint(12, 1))}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors"} <= uploaded
    assert script.commits == ["0001-00000006"]
    assert other.run() == 0, other.log()
    assert "resumed from the checkpoint of step 6, attempt 1" in other.log()
    commits = script.commits
    script.pass_on("uploaded")
    assert ended(zombie) == 75, script.log()
    assert "attempt 1 of zombie is fenced off: attempt 2 has taken over" in script.log()
    assert script.commits == commits
    assert not script.store.exists(script.keys.failed)
    assert script.weights == undisturbed


def test_a_result_is_not_certified_after_a_later_attempt(
    local_script: Callable[..., FakeScript], undisturbed: str
) -> None:
    script, other = local_script("late"), local_script("late", machine="other")
    zombie = script.start(stop_at="result-read")
    script.wait_at(zombie, "result-read")
    assert not script.store.exists(script.keys.completed)
    assert other.run() == 0, other.log()
    certificate = script.store.read(script.keys.completed)
    script.pass_on("result-read")
    assert ended(zombie) == 75, script.log()
    assert "attempt 1 of late is fenced off: attempt 2 has taken over" in script.log()
    assert script.store.read(script.keys.completed) == certificate
    assert script.json(script.keys.completed)["attempt"] == 2
    assert script.weights == undisturbed


def test_two_faults_in_a_row_are_the_last(local_script: Callable[..., FakeScript]) -> None:
    script = local_script("faulty")
    script.environ["SPOTUNE_SAVE_EVERY"] = "1000"  # so that nothing is committed
    for expected in (75, 1):
        process = script.start_and_stop_after(1)
        (worker,) = script.workers(process)
        worker.kill()
        assert ended(process) == expected, script.log()
    mark = Mark.from_bytes(script.store.read(script.keys.failed) or b"")
    assert mark.exit_code == 1
    assert "two attempts in a row failed and committed nothing: rank 0 was killed by SIGKILL" in mark.reason
    assert script.run() == 1  # until `resume`
    assert script.attempts == 2


def test_a_commit_between_two_faults_makes_them_two_first_ones(
    local_script: Callable[..., FakeScript], undisturbed: str
) -> None:
    script = local_script("faulty")
    for step in (1, 8):
        script.tell("fault", f'{{"step": {step}, "how": "raise"}}')
        assert script.run() == 75, script.log()
    assert "rank 0 ended with exit code 1 without a word" in script.log()
    assert script.run() == 0, script.log()
    assert script.weights == undisturbed


@pytest.mark.parametrize(("how", "code"), [("failed", 1), ("bad_input", 2)])
def test_what_a_rank_calls_final_is_final(local_script: Callable[..., FakeScript], how: str, code: int) -> None:
    script = local_script("final")
    script.tell("fault", f'{{"step": 3, "how": "{how}"}}')
    assert script.run() == code, script.log()
    mark = script.json(script.keys.failed)
    assert (mark["exit_code"], mark["step"]) == (code, 2)
    assert script.events(1)[-1]["reason"] == "failed"
    assert script.run() == code
    assert script.attempts == 1


@pytest.fixture
def pair(local_script: Callable[..., FakeScript]) -> Callable[[], tuple[FakeScript, FakeScript]]:
    """Makes the scripts of a job on two machines, both of them this one."""

    def make() -> tuple[FakeScript, FakeScript]:
        run_id = f"pair-{uuid4().hex[:8]}"  # guards meet at a port that follows from it
        nodes = local_script(run_id, machine=f"{run_id}-0"), local_script(run_id, machine=f"{run_id}-1")
        for number, node in enumerate(nodes):
            node.environ |= {
                "SKYPILOT_NUM_NODES": "2",
                "SKYPILOT_NODE_RANK": str(number),
                "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1",
                "FAKE_WORKER_DIR": str(nodes[0].told),
            }
        return nodes

    return make


def test_two_machines_are_one_attempt(pair: Callable[[], tuple[FakeScript, FakeScript]]) -> None:
    leader, follower = pair()
    leader.allow(8)
    first, second = leader.start(), follower.start()
    leader.wait_for_step(first, 8)
    second.send_signal(signal.SIGTERM)  # a notice to one machine of two ends in one commit by both
    leader.wait_for_text(first, "[spotune] SIGTERM on node 1: ")
    leader.wait_until_told_to_stop(first)
    leader.allow_all()
    assert (ended(first), ended(second)) == (75, 75), leader.log() + follower.log()
    assert leader.json(leader.keys.progress)["step"] == 9
    commit = leader.json(leader.keys.commit(1, 9))
    assert commit["world_size"] == 2
    assert {"rng_state_0.pth", "rng_state_1.pth", "spotune.json", "spotune_1.json"} <= commit["files"].keys()
    again = leader.start(), follower.start()
    assert [ended(node) for node in again] == [0, 0], leader.log() + follower.log()
    assert "resumed from the checkpoint of step 9, attempt 1" in leader.log()
    others = pair()
    whole = [node.start() for node in others]
    assert [ended(node) for node in whole] == [0, 0], others[0].log()
    assert leader.weights == others[0].weights


def test_a_machine_that_is_gone_ends_the_attempt_of_both(pair: Callable[[], tuple[FakeScript, FakeScript]]) -> None:
    leader, follower = pair()
    leader.allow(8)
    first, second = leader.start(), follower.start()
    leader.wait_for_step(first, 8)
    leader.until(lambda: leader.commits, first)
    second.kill()
    ended(second)
    assert ended(first) == 75, leader.log()
    leader.allow_all()
    assert [ended(node) for node in (leader.start(), follower.start())] == [0, 0], leader.log() + follower.log()
    assert "resumed from the checkpoint of step 6, attempt 1" in leader.log()


def test_a_result_that_is_not_finite_is_never_certified(local_script: Callable[..., FakeScript]) -> None:
    """Whatever a worker says of its result: the guard reads every element of it."""
    script = local_script("diverged")
    script.tell("fault", '{"step": 20, "how": "diverge"}')
    assert script.run() == 1
    assert "model.safetensors: tensor chain holds NaN or infinity: not a result to certify" in script.log()
    assert script.json(script.keys.completed) is None
    assert script.store.keys(script.keys.output) == []
    assert "NaN" in Mark.from_bytes(script.store.read(script.keys.failed) or b"").reason
    assert script.json(script.keys.progress)["loss"] == "nan"
    assert script.seen()["loss"] == "nan"
    assert {line["loss"] for line in script.events(1, "log") if line["step"] >= 20} == {"nan"}
    attempts = script.attempts
    assert script.run() == 1  # not again until somebody says `spotune resume`
    assert script.attempts == attempts
