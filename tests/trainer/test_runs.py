"""Whole runs of real training through the script: killed, noticed and resumed, they end as if undisturbed."""

import resource
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest
import yaml

from drill.machine import command_of
from spotune.core.environment import NUM_PROCESSES
from spotune.guard.finish import COPIED
from spotune.launch.local.machine import is_live
from tests.conftest import reach
from tests.hostile import hostile_commits
from tests.script import Script
from tests.tiny import make_model, rows, write_jsonl
from tests.waiting import ended, until

pytestmark = pytest.mark.slow

STEPS = 18
LORA = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.1, "lora_target_modules": ["all-linear"]}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with dropout, data, and two configs: full fine-tuning, and LoRA."""
    folder = tmp_path_factory.mktemp("material")
    make_model(folder / "model", dropout=0.1)
    write_jsonl(folder / "data" / "train.jsonl", rows(200))
    config: dict[str, Any] = {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "data"),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "packing": True,
        "max_length": 64,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 4,
        "save_steps": 6,
    }
    (folder / "full.yaml").write_text(yaml.safe_dump(config))
    (folder / "lora.yaml").write_text(yaml.safe_dump(config | LORA))
    return folder


@pytest.fixture(scope="module")
def undisturbed(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The weights of a config's run to which nothing happens; made when they are asked for first."""
    found: dict[str, str] = {}

    def weights_of(config: str) -> str:
        if config not in found:
            home = tmp_path_factory.mktemp("undisturbed")
            script = Script(f"file://{home}/bucket", "undisturbed", material / f"{config}.yaml", home)
            assert script.run() == 0, script.log()
            found[config] = script.weights
        return found[config]

    return weights_of


def workers(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    children = psutil.Process(process.pid).children()
    return [child for child in children if "spotune.sft.worker" in command_of(child)]


def notice_in_a_save(script: Script, process: "subprocess.Popen[str]", at: str) -> int:
    """A notice while training stands in a save: it ends one step after it. Returns the exit code."""
    script.wait_at(process, at)
    script.notify(process)
    script.wait_until_told_to_stop(process)
    script.pass_on(at)
    return ended(process)


@pytest.mark.parametrize(("config", "scheme"), [("lora", "file"), ("full", "s3")])
def test_killed_and_noticed_it_ends_as_if_undisturbed(
    material: Path,
    undisturbed: Callable[[str], str],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    config: str,
    scheme: str,
) -> None:
    whole = undisturbed(config)
    reach(scheme, request, monkeypatch)
    bucket = f"file://{tmp_path}/bucket" if scheme == "file" else f"s3://spotune/{tmp_path.name}-{time.time_ns()}"
    script = Script(bucket, "killed", material / f"{config}.yaml")
    first = script.start(stop_at="snapshot:2")
    script.wait_at(first, "snapshot")  # at step 12
    script.until(lambda: script.commits, first)
    (worker,) = workers(first)
    first.kill()  # no notice
    ended(first)
    until(lambda: not is_live(worker), "the worker outlives its guard")
    second = script.start(stop_at="snapshot")
    assert notice_in_a_save(script, second, "snapshot") == 75, script.log()
    assert "resumed from the checkpoint of step 6, attempt 1" in script.log()
    noticed = script.json(script.keys.progress)
    assert (noticed["phase"], noticed["step"]) == ("preempted", 13)
    assert script.run() == 0, script.log()
    assert "resumed from the checkpoint of step 13, attempt 2" in script.log()
    assert script.weights == whole
    certificate = script.json(script.keys.completed)
    assert (certificate["attempt"], certificate["step"]) == (3, STEPS)


def test_two_machines_are_one_attempt_and_equal_two_ranks_of_one(material: Path, tmp_path: Path) -> None:
    run_id = f"pair-{uuid4().hex[:8]}"  # guards meet at a port that follows from it
    nodes = [
        Script(f"file://{tmp_path}/bucket", run_id, material / "lora.yaml", tmp_path / f"node-{number}")
        for number in (0, 1)
    ]
    for number, node in enumerate(nodes):
        node.environ |= {
            "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NODE_RANK": str(number),
            "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1",
        }
    leader, follower = nodes
    first, second = leader.start(stop_at="snapshot"), follower.start()
    leader.wait_at(first, "snapshot")
    second.terminate()  # a notice to one machine of two ends in one commit by both
    leader.wait_for_text(first, "[spotune] SIGTERM on node 1: ")
    leader.wait_until_told_to_stop(first)
    leader.pass_on("snapshot")
    assert (ended(first), ended(second)) == (75, 75), leader.log() + follower.log()
    commit = leader.json(leader.keys.commit(1, 7))
    assert commit["world_size"] == 2
    assert {"rng_state_0.pth", "rng_state_1.pth", "spotune.json", "spotune_1.json"} <= commit["files"].keys()
    again = [node.start() for node in nodes]
    assert [ended(node) for node in again] == [0, 0], leader.log() + follower.log()
    assert "resumed from the checkpoint of step 7, attempt 1" in leader.log()
    one = Script(f"file://{tmp_path}/bucket", "one-machine", material / "lora.yaml", tmp_path / "one")
    assert one.run(**{NUM_PROCESSES: "2"}) == 0, one.log()
    assert leader.weights == one.weights


def test_a_worker_that_the_kernel_kills_is_worth_another_machine(
    material: Path, undisturbed: Callable[[str], str], tmp_path: Path
) -> None:
    """As its out-of-memory killer does it: SIGKILL, without a word."""
    script = Script(f"file://{tmp_path}/bucket", "oom", material / "lora.yaml")
    process = script.start(stop_at="snapshot:2")
    script.wait_at(process, "snapshot")
    (worker,) = workers(process)
    worker.kill()
    assert ended(process) == 75, script.log()
    assert "rank 0 was killed by SIGKILL without a word" in script.log()
    assert "0001-00000006" in script.commits
    assert not script.store.exists(script.keys.failed)
    assert script.run() == 0, script.log()
    assert script.weights == undisturbed("lora")


def test_a_full_local_disk_costs_checkpoints_not_the_run(
    material: Path, undisturbed: Callable[[str], str], tmp_path: Path
) -> None:
    """No file may become as large as the optimizer's: what a full disk says, to the one file that does not fit."""
    script = Script(f"file://{tmp_path}/bucket", "full", material / "full.yaml")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    weights = (material / "model" / "model.safetensors").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(weights * 1.2), before[1]))  # the optimizer's has twice as much
    try:
        process = script.start()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ended(process) == 0, script.log()
    assert "step 6 is not saved: [Errno 27] File too large" in script.log()
    assert script.commits == []
    assert script.weights == undisturbed("full")


def test_a_certified_run_starts_no_training(material: Path, tmp_path: Path) -> None:
    script = Script(f"file://{tmp_path}/bucket", "again", material / "lora.yaml")
    assert script.run("--max_steps", "2", "--output_dir", str(tmp_path / "mine")) == 0, script.log()
    certified = {path.name for path in (tmp_path / "mine").iterdir()}
    assert certified == {*script.json(script.keys.completed)["files"], COPIED}
    before = script.log()
    assert script.run() == 0
    assert script.log() == before + "[spotune] again is finished and certified already\n"


def test_weights_that_are_not_finite_are_neither_committed_nor_certified(material: Path, tmp_path: Path) -> None:
    """The run fails for good and keeps its last finite checkpoint, from which it can go on at another rate."""
    script = Script(f"file://{tmp_path}/bucket", "diverges", material / "full.yaml")
    fatal = ("--learning_rate", "1e30", "--lr_scheduler_type", "cosine", "--warmup_steps", "0", "--save_steps", "1")
    assert script.run(*fatal) == 1, script.log()
    line = "the weights are not finite since step 2; the last finite checkpoint is of step 1 (lower learning_rate"
    assert line in script.log()
    assert script.json(script.keys.failed)["reason"].startswith(line)
    assert script.commits == ["0001-00000001"]
    assert script.json(script.keys.completed) is None
    assert "Traceback" not in script.log()
    before = script.log()
    assert script.run(*fatal) == 1
    assert script.log().removeprefix(before).count("\n") == 1  # no worker was started again


def test_a_narrow_locale_changes_nothing(material: Path, undisturbed: Callable[[str], str], tmp_path: Path) -> None:
    """What libraries print at the end has a letter that ASCII lacks."""
    script = Script(f"file://{tmp_path}/bucket", "narrow", material / "lora.yaml")
    assert script.run(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii") == 0, script.log()
    assert script.weights == undisturbed("lora")
    assert "\\u2705 Training completed." in script.log()


@pytest.mark.parametrize("phase", ["load", "train"])
def test_a_stopped_rank_is_a_stall_and_the_next_attempt_ends_as_if_undisturbed(
    material: Path, undisturbed: Callable[[str], str], tmp_path: Path, phase: str
) -> None:
    """By the watchdog's own clock: the limit is short, but only a rank that is stopped does nothing for so long."""
    script = Script(f"file://{tmp_path}/bucket", "stalled", material / "lora.yaml")
    written = script.home / "work" / "stalled" / "node-0" / "0001" / "events-0.jsonl"
    first = script.start(stop_at="snapshot:2" if phase == "train" else "", SPOTUNE_STALL_AFTER="5s")
    if phase == "train":
        script.until(lambda: (script.seen().get("committed_step") or 0) >= 6, first)
        script.wait_at(first, "snapshot")
        script.pass_on("snapshot")
    last = '"step", "step": 13' if phase == "train" else '"phase": "load"'
    script.until(lambda: written.exists() and last in written.read_text(), first)
    (worker,) = workers(first)
    worker.suspend()
    assert ended(first) == 75, script.log()
    (stall,) = script.events(1, "stall")
    assert stall["phase"] == phase
    assert stall["silent_s"] >= stall["limit_s"] >= 5
    assert script.events(1, "end")[-1]["reason"] == "stalled", script.log()
    stacks = (script.store.read(script.keys.stacks(1, 0)) or b"").decode()
    assert "state T (stopped by a signal)" in stacks
    assert script.run("--allow-config-change", SPOTUNE_STALL_AFTER="10m") == 0, script.log()
    assert script.weights == undisturbed("lora")
    assert script.attempts == 2


def test_a_run_in_a_hostile_bucket_ends_as_if_undisturbed(
    bucket: str, material: Path, undisturbed: Callable[[str], str], tmp_path: Path
) -> None:
    """Its newest whole commit is followed by a hundred that are wrong."""
    script = Script(bucket, "hostile", material / "lora.yaml", tmp_path / "machine")
    first = script.start()
    script.until(lambda: script.commits, first)
    first.kill()
    ended(first)
    newest = max(script.commits)
    whole = script.store.read(f"{script.keys.commits}/{newest}.json") or b""
    for number, data in enumerate(hostile_commits(whole).values(), 1):
        script.store.write(script.keys.commit(1, 10_000 + number), data)
        script.store.write(f"{script.keys.checkpoint(10_000 + number, 1)}/scheduler.pt", b"12345")
    assert script.run() == 0, script.log()
    assert f"resumed from the checkpoint of step {int(newest.partition('-')[2])}, attempt 1" in script.log()
    assert script.weights == undisturbed("lora")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name not in ("home", "bucket")) == ["machine"]
