"""Merge and push after the certificate, with a fake worker: done once, marked, harmless to cut off or to fail."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from spotune.core.fingerprint import model_files, model_sha256
from spotune.core.keys import Keys
from spotune.core.protocol import OUTPUT
from spotune.core.records import Progress, RunRecord
from spotune.core.store import Store
from spotune.guard.claim import claim_attempt
from spotune.guard.finish import certify
from spotune.guard.journal import Node
from spotune.launch.local.machine import is_live
from tests.fake_worker import write_weights
from tests.script import FakeScript, fake_config
from tests.waiting import ended, until

KEYS = Keys("a-run")
BOTH = {"use_peft": True, "merge_adapter": True, "push_to_hub": True}


def certified(store: Store, folder: Path, **config: Any) -> None:
    """A run that ended at step 7 of attempt 1, with a certificate."""
    config = {"model_name_or_path": str(folder / "model")} | config
    (folder / "model").mkdir()
    (folder / "model" / "model.safetensors").write_bytes(b"base")
    model = model_files(config, "c", folder / "hashes")
    output = folder / "made" / OUTPUT
    output.mkdir(parents=True)
    write_weights(output / "adapter_model.safetensors", b"state")
    (output / "adapter_config.json").write_text("{}")
    run = RunRecord(
        run_id="a-run",
        created_at=0,
        user="u",
        config_path="c",
        config=config,
        config_sha256="",
        data_sha256="",
        model_sha256=model_sha256(model),
        model_files=model,
    )
    store.write(KEYS.run, run.to_bytes())
    store.write(KEYS.progress, Progress(run_id="a-run", attempt=1, step=7, max_steps=7).to_bytes())
    claim_attempt(store, KEYS, Node.read({}))
    certify(store, KEYS, 1, 7, output.parent)


@pytest.fixture
def owing(local_store: Store, tmp_path: Path) -> Callable[..., FakeScript]:
    """Makes the script on a certified run with the pending extras of its config."""

    def make(**config: Any) -> FakeScript:
        certified(local_store, tmp_path, **config)
        return FakeScript(local_store.url, "a-run", tmp_path / "run.yaml")

    return make


@pytest.fixture
def script(owing: Callable[..., FakeScript]) -> FakeScript:
    return owing(push_to_hub=True)


def hub_of(script: FakeScript) -> Any:
    """What was pushed under the run's own name: commits and files."""
    file = script.told / "hub.json"
    return json.loads(file.read_text())["a-run"] if file.exists() else None


def start_push_that_hangs(script: FakeScript, **environ: str) -> Any:
    (script.told / "asked").unlink(missing_ok=True)
    script.tell("push", "hang")
    process = script.start(**environ)
    script.until((script.told / "asked").exists, process)
    return process


def let_pushes_go(script: FakeScript) -> None:
    (script.told / "push").unlink()


def last_line(script: FakeScript) -> str:
    return script.log().splitlines()[-1]


def test_everything_is_done_in_the_attempt_that_trains(tmp_path: Path) -> None:
    config = fake_config(tmp_path / "material", **BOTH)
    script = FakeScript(f"file://{tmp_path}/bucket", "a-run", config)
    assert script.run() == 0, script.log()
    certificate, merged, pushed = (script.json(key) for key in (KEYS.completed, KEYS.merge_completed, KEYS.pushed))
    assert [record["attempt"] for record in (certificate, merged, pushed)] == [1, 1, 1]
    assert certificate["completed_at"] <= merged["completed_at"] <= pushed["at"]
    assert merged["weights_sha256"] == certificate["weights_sha256"]
    assert hub_of(script)["files"] == sorted(certificate["files"])
    assert script.run() == 0
    assert last_line(script) == "[spotune] a-run is finished and certified already"
    assert script.attempts == 1


def test_pending_extras_are_done_once_and_nothing_else_is(script: FakeScript) -> None:
    certificate = script.store.read(KEYS.completed)
    assert script.run() == 0, script.log()
    assert "pending extras: push_to_hub; attempt 2 does only these" in script.log()
    mark = script.json(KEYS.pushed)
    assert (mark["run_id"], mark["attempt"], mark["repo_id"]) == ("a-run", 2, "a-run")
    assert [mark["oid"]] == hub_of(script)["commits"]
    assert hub_of(script)["files"] == ["adapter_config.json", "adapter_model.safetensors"]  # no completed.json
    end = script.events(2)[-1]
    assert (end["event"], end["reason"], end["step"]) == ("end", "completed", 7)
    assert [event["phase"] for event in script.events(2, "phase")] == ["teardown", "restore", "teardown"]
    progress = script.json(KEYS.progress)
    assert (progress["step"], progress["max_steps"]) == (7, 7)
    (script.told / "asked").unlink()
    assert script.run() == 0
    assert last_line(script) == "[spotune] a-run is finished and certified already"
    assert not (script.told / "asked").exists()
    assert script.store.folders(KEYS.attempts) == ["0001", "0002"]
    assert script.store.read(KEYS.completed) == certificate


def test_a_push_that_fails_is_reported_and_stays_pending(script: FakeScript) -> None:
    script.tell("push", "the hub refuses it, HTTP 401")
    assert script.run() == 0
    line = last_line(script)
    assert line.startswith("[spotune] push_to_hub is pending: the hub refuses it, HTTP 401; ")
    assert line.endswith(f"SPOTUNE_BUCKET={script.store.url} SPOTUNE_RUN_ID=a-run python -m spotune.sft")
    assert script.events(2)[-1]["message"] == "push_to_hub is pending: the hub refuses it, HTTP 401"
    assert not script.store.exists(KEYS.pushed)
    assert not script.store.exists(KEYS.failed)
    let_pushes_go(script)
    assert script.run() == 0, script.log()
    assert script.json(KEYS.pushed)["attempt"] == 3


@pytest.mark.parametrize("failpoint", ["merged", "merged-uploaded", "pushed"])
def test_killed_between_any_two_steps_the_next_attempt_does_the_rest(
    owing: Callable[..., FakeScript], failpoint: str
) -> None:
    script = owing(**BOTH)
    certificate = script.store.read(KEYS.completed)
    process = script.start(stop_at=failpoint)
    script.wait_at(process, failpoint)
    process.kill()
    ended(process)
    assert script.store.exists(KEYS.merge_completed) == (failpoint == "pushed")
    assert not script.store.exists(KEYS.pushed)
    assert script.run() == 0, script.log()
    merged = script.json(KEYS.merge_completed)
    assert merged["attempt"] == (2 if failpoint == "pushed" else 3)
    assert merged["weights_sha256"] == script.weights
    there = set(script.store.keys(KEYS.merged)) - {KEYS.merge_completed}
    assert there == {f"{KEYS.merged}/{name}" for name in merged["files"]}
    assert script.json(KEYS.pushed)["attempt"] == 3
    assert [script.json(KEYS.pushed)["oid"]] == hub_of(script)["commits"]
    assert script.store.read(KEYS.completed) == certificate
    assert not script.events(3, "step")  # nothing is trained again


def test_the_machine_goes_while_the_hub_hangs(script: FakeScript) -> None:
    process = start_push_that_hangs(script, SPOTUNE_GRACE_S="5.5")
    process.terminate()
    assert ended(process) == 75, script.log()
    assert "SIGTERM: the result is certified, extras go on while there is time" in script.log()
    assert "push_to_hub is pending: the machine goes; the next attempt does it" in script.log()
    assert script.events(2)[-1]["reason"] == "preempted"
    assert [event["source"] for event in script.events(2, "notice")] == ["SIGTERM"]
    let_pushes_go(script)
    assert script.run() == 0, script.log()
    assert script.json(KEYS.pushed)["attempt"] == 3


def test_the_machine_that_trained_goes_while_the_hub_hangs(tmp_path: Path) -> None:
    config = fake_config(tmp_path / "material", push_to_hub=True)
    script = FakeScript(f"file://{tmp_path}/bucket", "a-run", config)
    process = start_push_that_hangs(script, SPOTUNE_GRACE_S="0")
    process.terminate()
    assert ended(process) == 75, script.log()
    assert script.store.exists(KEYS.completed)
    assert not script.store.exists(KEYS.failed)
    let_pushes_go(script)
    assert script.run() == 0, script.log()
    assert script.json(KEYS.completed)["attempt"] == 1
    assert script.json(KEYS.pushed)["attempt"] == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 75)])
def test_the_process_of_an_extra_ends_with_its_guard(script: FakeScript, number: signal.Signals, code: int) -> None:
    process = start_push_that_hangs(script)
    (child,) = psutil.Process(process.pid).children()
    process.send_signal(number)
    assert ended(process) == code
    until(lambda: not is_live(child), "the process outlives its guard")


def test_a_later_attempt_does_it_alone(script: FakeScript) -> None:
    zombie = start_push_that_hangs(script)
    claim_attempt(script.store, KEYS, Node.read({}))
    let_pushes_go(script)
    assert ended(zombie) == 0, script.log()
    assert "attempt 2 of a-run is fenced off: attempt 3 has taken over" in script.log()
    assert not script.store.exists(KEYS.pushed)


def test_other_machines_of_the_job_have_nothing_to_do(script: FakeScript) -> None:
    assert script.run(SKYPILOT_NODE_RANK="1", SKYPILOT_NUM_NODES="2") == 0
    assert script.log() == "[spotune] a-run is finished and certified already\n"
    assert not (script.told / "asked").exists()


def test_a_result_that_is_not_as_certified_is_not_pushed(script: FakeScript) -> None:
    script.store.write(f"{KEYS.output}/adapter_config.json", b"[]")
    assert script.run() == 0
    assert "push_to_hub is pending: runs/a-run/output/adapter_config.json: not what was certified" in script.log()
    assert not (script.told / "asked").exists()


def test_a_certificate_that_cannot_be_read_ends_the_attempt_well(script: FakeScript) -> None:
    script.store.write(KEYS.completed, b"{")
    assert script.run() == 0
    assert "push_to_hub: still pending: runs/a-run/output/completed.json: not a Certificate" in script.log()


@pytest.mark.parametrize("fault", ["the merge fails", "the base model is gone"])
def test_a_merge_that_fails_does_not_stop_the_push(
    owing: Callable[..., FakeScript], tmp_path: Path, fault: str
) -> None:
    script, model = owing(**BOTH), tmp_path / "model"
    if fault == "the merge fails":
        script.tell("merge", "no")
    else:
        model.rename(tmp_path / "elsewhere")
    assert script.run() == 0
    reason = "no; " if fault == "the merge fails" else f"c: model_name_or_path: no folder {model} on this machine"
    assert f"[spotune] merge_adapter is pending: {reason}" in script.log()
    assert script.json(KEYS.pushed)["attempt"] == 2
    if fault == "the merge fails":
        (script.told / "merge").unlink()
    else:
        (tmp_path / "elsewhere").rename(model)
    assert script.run() == 0, script.log()
    assert script.json(KEYS.merge_completed)["attempt"] == 3
    assert script.json(KEYS.pushed)["attempt"] == 2
    assert len(hub_of(script)["commits"]) == 1


def test_a_push_that_fails_does_not_take_the_merge_back(owing: Callable[..., FakeScript]) -> None:
    script = owing(**BOTH)
    script.tell("push", "the hub refuses it, HTTP 403")
    assert script.run() == 0
    assert "[spotune] push_to_hub is pending: the hub refuses it, HTTP 403" in script.log()
    assert script.json(KEYS.merge_completed)["attempt"] == 2
    let_pushes_go(script)
    assert script.run() == 0, script.log()
    assert script.json(KEYS.pushed)["attempt"] == 3
    assert script.json(KEYS.merge_completed)["attempt"] == 2
