"""A machine's own word on what a config's ``env:`` may set: the guard is real, and what it reads is forged."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.script import FakeScript, fake_config

LINE = (
    "runs/run-a/run.json: env.LD_PRELOAD: decides what the loader loads"
    " (leave it out, or allow it: --allow-env LD_PRELOAD)\n"
)


@pytest.fixture
def script(tmp_path: Path) -> FakeScript:
    """A run of which only the record is in the bucket."""
    script = FakeScript(f"file://{tmp_path}/bucket", "run-a", fake_config(tmp_path / "material", max_steps=2))
    assert script.run("--set", "max_steps=1") == 0, script.log()
    for key in script.store.keys(script.keys.root):
        if key != script.keys.run:
            script.store.delete([key])
    script.log_file.unlink()
    return script


def forge(script: FakeScript, **changes: Any) -> None:
    record = script.json(script.keys.run)
    script.store.delete([script.keys.run])
    record["config"] |= changes
    record["allowed_env"] = ["LD_PRELOAD", "SPOTUNE_BUCKET"]  # the forger's word is none
    script.store.create(script.keys.run, json.dumps(record).encode())


def test_a_forged_record_cannot_set_the_loaders_names(script: FakeScript) -> None:
    forge(script, env={"LD_PRELOAD": "/tmp/evil.so"})
    assert script.run() == 2
    assert script.log() == LINE
    assert script.attempts == 0  # nothing of it has begun


def test_who_starts_the_machine_may_allow_a_name(script: FakeScript) -> None:
    forge(script, env={"LD_PRELOAD": ""})
    assert script.run("--allow-env", "LD_PRELOAD") == 0, script.log()
    assert script.run(SPOTUNE_ALLOW_ENV="LD_PRELOAD") == 0, script.log()


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"SPOTUNE_BUCKET": "file:///x"}, "env.SPOTUNE_BUCKET: is for spotune to set"),
        (["LD_PRELOAD=x"], "env: ['LD_PRELOAD=x'] is not a mapping"),
        ({"A=B": "x"}, "env.A=B: is not the name of an environment variable"),
    ],
)
def test_a_forged_env_is_one_line(script: FakeScript, env: Any, says: str) -> None:
    forge(script, env=env)
    assert script.run("--allow-env", "LD_PRELOAD", "--allow-env", "SPOTUNE_BUCKET") == 2
    assert says in script.log()
    assert script.log().count("\n") == 1


def test_what_a_finished_run_owes_is_held_to_the_rule(script: FakeScript) -> None:
    assert script.run() == 0, script.log()
    script.log_file.unlink()
    forge(script, env={"LD_PRELOAD": "/tmp/evil.so"}, push_to_hub=True)
    assert script.run() == 2
    assert script.log().endswith(LINE)
