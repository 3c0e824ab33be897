"""What is owed after the certificate: done by the next attempt alone, marked once, harmless to cut off or to fail."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import save_file

from spotune.contracts.exchange import OUTPUT
from spotune.contracts.extras import MERGE, PUSH, asked_for
from spotune.contracts.keys import Keys
from spotune.contracts.records import Progress, RunRecord
from spotune.contracts.store import Store
from spotune.guard.admission import claim_attempt
from spotune.guard.extra_process import run_extra
from spotune.guard.extras import debt_of
from spotune.guard.finish import certify
from spotune.guard.machine import Machine
from spotune.launch.local.processes import is_live, send
from tests.fake_hub import TOKEN, Hub, fake_hub

KEYS = Keys("a-run")
REPO = "somebody/a-run"


def certified(store: Store, folder: Path, **config: Any) -> Store:
    """A run that ended at step 7 of attempt 1, with a certificate."""
    output = folder / "made" / OUTPUT
    output.mkdir(parents=True)
    save_file({"w": np.arange(1000, dtype=np.float32)}, output / "adapter_model.safetensors")
    (output / "adapter_config.json").write_text("{}")
    run = RunRecord(
        run_id="a-run", created_at=0, user="u", config_path="c", config=config, config_sha256="", data_sha256=""
    )
    store.write(KEYS.run, run.to_bytes())
    store.write(KEYS.progress, Progress(run_id="a-run", attempt=1, step=7, max_steps=7).to_bytes())
    claim_attempt(store, KEYS, Machine.read({}))
    certify(store, KEYS, 1, 7, output.parent)
    return store


class Script:
    """``python -m spotune.sft`` on the certified run."""

    def __init__(self, store: Store, hub: Hub) -> None:
        self.store, self.log = store, ""
        self.environ = {
            "SPOTUNE_BUCKET": store.url, "SPOTUNE_RUN_ID": "a-run", "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        }  # fmt: skip

    def start(self, **environ: str) -> "subprocess.Popen[str]":
        command, known = [sys.executable, "-m", "spotune.sft"], {**os.environ, **self.environ, **environ}
        return subprocess.Popen(command, env=known, stderr=subprocess.PIPE, text=True)

    def run(self, **environ: str) -> int:
        process = self.start(**environ)
        self.log = process.communicate(timeout=300)[1]
        return process.returncode

    def json(self, key: str) -> Any:
        return json.loads(self.store.read(key) or b"null")

    def end_of(self, attempt: int) -> dict[str, Any]:
        parts = [key for key in self.store.keys(KEYS.attempts) if f"/{attempt:04d}/events-0-" in key]
        lines = [line for key in parts for line in (self.store.read(key) or b"").splitlines()]
        found: dict[str, Any] = json.loads(lines[-1])
        return found


@pytest.fixture
def hub() -> Iterator[Hub]:
    with fake_hub() as made:
        yield made


@pytest.fixture
def script(local_store: Store, tmp_path: Path, hub: Hub) -> Script:
    return Script(certified(local_store, tmp_path, push_to_hub=True), hub)


def wait_for(there: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_owed_is_what_is_asked_for_and_has_no_mark(store: Store, tmp_path: Path) -> None:
    assert asked_for({"merge_adapter": "yes", "push_to_hub": "false"}) == (MERGE,)
    certified(store, tmp_path, merge_adapter=True, push_to_hub=True)
    assert debt_of(store, KEYS)[1:] == ((MERGE, PUSH),)  # type: ignore[index]
    store.create(KEYS.merge_completed, b"{}")
    assert debt_of(store, KEYS)[1:] == ((PUSH,),)  # type: ignore[index]
    store.create(KEYS.pushed, b"{}")
    assert debt_of(store, KEYS) is None


def test_what_is_owed_is_done_once_and_nothing_else_is(script: Script, hub: Hub) -> None:
    certificate = script.store.read(KEYS.completed)
    assert script.run() == 0, script.log
    assert "owes push_to_hub: attempt 2 does that alone" in script.log
    mark = script.json(KEYS.pushed)
    assert (mark["run_id"], mark["attempt"], mark["repo_id"]) == ("a-run", 2, REPO)
    assert mark["oid"] == hub.main(REPO).commits[1]["oid"]
    assert set(hub.main(REPO).files) == {"adapter_model.safetensors", "adapter_config.json"}  # no completed.json
    assert (script.end_of(2)["reason"], script.end_of(2)["step"]) == ("completed", 7)
    assert (script.json(KEYS.progress)["step"], script.json(KEYS.progress)["max_steps"]) == (7, 7)
    asked = len(hub.asked)
    assert script.run() == 0
    assert script.log == "[spotune] a-run is finished and certified already\n"
    assert (len(hub.asked), script.store.folders(KEYS.attempts)) == (asked, ["0001", "0002"])
    assert script.store.read(KEYS.completed) == certificate


def test_what_fails_is_said_and_stays_owed(script: Script, hub: Hub) -> None:
    assert script.run(HF_TOKEN="hf_wrong") == 0
    line = script.log.splitlines()[-1]
    assert line.startswith("[spotune] push_to_hub is owed: the hub refuses it, HTTP 401 (--secret HF_TOKEN")
    again = f"SPOTUNE_BUCKET={script.store.url} SPOTUNE_RUN_ID=a-run python -m spotune.sft"
    assert line.endswith(again)
    assert script.end_of(2)["message"].startswith("push_to_hub is owed: ")
    assert not script.store.exists(KEYS.pushed)
    assert not script.store.exists(KEYS.failed)
    assert script.run() == 0, script.log
    assert script.json(KEYS.pushed)["attempt"] == 3


def test_killed_before_the_mark_it_makes_no_second_commit(script: Script, hub: Hub, tmp_path: Path) -> None:
    held = tmp_path / "held"
    process = script.start(SPOTUNE_HOLD_AT="pushed", SPOTUNE_HOLD_FILE=str(held))
    wait_for(held.exists)
    process.kill()
    process.communicate()
    assert not script.store.exists(KEYS.pushed)
    assert script.run() == 0, script.log
    assert script.json(KEYS.pushed)["oid"] == hub.main(REPO).commits[-1]["oid"]
    assert len(hub.main(REPO).commits) == 2


def test_the_machine_goes_while_the_hub_hangs(script: Script, hub: Hub) -> None:
    hub.faults = {"create": ["hang"]}
    process = script.start(SPOTUNE_GRACE_S="6")
    wait_for(lambda: hub.asked)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    log = process.communicate(timeout=300)[1]
    assert process.returncode == 75, log
    assert time.monotonic() - began < 6  # before the machine goes
    assert "SIGTERM: the result is certified, extras go on while there is time" in log
    assert "push_to_hub is owed: the machine goes; the next attempt does it" in log
    assert script.end_of(2)["reason"] == "preempted"
    assert script.run() == 0, script.log
    assert script.json(KEYS.pushed)["attempt"] == 3


def test_the_process_dies_with_its_guard_and_at_a_keyboard_at_once(script: Script, hub: Hub) -> None:
    hub.faults = {"create": ["hang", "hang"]}
    for number, code in ((signal.SIGKILL, -9), (signal.SIGINT, 75)):
        asked = len(hub.asked)
        process = script.start()
        wait_for(lambda asked=asked: len(hub.asked) > asked)  # type: ignore[misc]
        children = psutil.Process(process.pid).children()
        assert len(children) == 1
        process.send_signal(number)
        process.communicate(timeout=300)
        assert process.returncode == code
        psutil.wait_procs(children, timeout=300)
        assert not any(is_live(child) for child in children)


def test_a_later_attempt_does_it_alone(script: Script, hub: Hub) -> None:
    hub.faults = {"commit": ["hang"]}
    zombie = script.start()
    wait_for(lambda: any("/commit/" in asked for asked in hub.asked))
    claim_attempt(script.store, KEYS, Machine.read({}))
    hub.stopped.set()  # it is told that the connection is gone, and tries again
    log = zombie.communicate(timeout=300)[1]
    assert zombie.returncode == 0
    assert "attempt 2 of a-run is fenced off: attempt 3 has taken over" in log
    assert not script.store.exists(KEYS.pushed)


def test_other_machines_of_the_job_have_nothing_to_do(script: Script, hub: Hub) -> None:
    assert script.run(SKYPILOT_NODE_RANK="1", SKYPILOT_NUM_NODES="2") == 0
    assert script.log == "[spotune] a-run is finished and certified already\n"
    assert not hub.asked


def test_a_result_that_is_not_as_certified_is_not_pushed(script: Script, hub: Hub) -> None:
    script.store.write(f"{KEYS.output}/adapter_config.json", b"[]")
    assert script.run() == 0
    assert "push_to_hub is owed: runs/a-run/output/adapter_config.json: not what was certified" in script.log
    assert not hub.asked


def test_a_certificate_that_cannot_be_read_is_one_all_the_same(script: Script, hub: Hub) -> None:
    script.store.write(KEYS.completed, b"{")
    assert script.run() == 0
    assert "push_to_hub: still owed: runs/a-run/output/completed.json: not a Certificate" in script.log


def test_a_process_that_hangs_or_vanishes_is_an_answer(tmp_path: Path, hub: Hub) -> None:
    environ = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    (tmp_path / OUTPUT).mkdir()
    (tmp_path / "extras.json").write_text(
        json.dumps({"run_id": "a-run", "step": 1, "weights_sha256": "", "config": {}})
    )
    hub.faults = {"create": ["hang", "hang"]}
    answer = run_extra(PUSH, tmp_path, {}, environ, time.sleep, timeout_s=2.0)
    assert (answer.done, answer.message) == (False, "not done after 2 s")
    asked, others = len(hub.asked), set(psutil.Process().children())

    def kill_when_asked(seconds: float) -> None:
        time.sleep(seconds)
        if len(hub.asked) > asked:
            send(set(psutil.Process().children()) - others, signal.SIGKILL)

    answer = run_extra(PUSH, tmp_path, {}, environ, kill_when_asked)
    assert (answer.done, answer.message) == (False, "its process was killed by SIGKILL without a word")
