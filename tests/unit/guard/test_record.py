"""The record that an attempt goes by, for runs that are started by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from spotune.core.environment import RunEnvironment
from spotune.core.errors import InputError
from spotune.core.keys import Keys
from spotune.core.records import Commit, RunRecord
from spotune.core.revisions import record_history
from spotune.core.store import Store
from spotune.guard.claim import Request, check_data, check_model, claim_attempt, read_or_create_run
from spotune.guard.journal import Machine
from spotune.guard.main import parse_arguments

KEYS = Keys("a-run")
CONFIG = {"model_name_or_path": "model", "data": [{"source": "data.jsonl"}], "max_steps": 5, "learning_rate": 1e-3}


class Hand:
    """A folder with a config, and attempts that are started in it."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(f"file://{folder}/bucket")
        (folder / "model").mkdir()
        (folder / "model/config.json").write_text("{}")
        (folder / "model/model.safetensors").write_text("weights")
        (folder / "data.jsonl").write_text('{"text": "a"}\n')
        self.write()

    def write(self, **edit: Any) -> None:
        Path("run.yaml").write_text(yaml.safe_dump({**CONFIG, **edit}))

    def run(self, *argv: str, **environ: str) -> RunRecord:
        return read_or_create_run(self.store, KEYS, RunEnvironment.read(environ), parse_arguments(list(argv)))


@pytest.fixture
def hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hand:
    monkeypatch.chdir(tmp_path)
    return Hand(tmp_path)


Said = Callable[[], str]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """What was said since it was asked last."""
    return lambda: capsys.readouterr().err


def test_config_is_not_followed_once_there_is_a_record(hand: Hand, said: Said) -> None:
    first = hand.run("run.yaml", "--set", "max_steps=7")
    assert first.config["max_steps"] == 7
    assert first.model_sha256
    assert said() == ""
    assert hand.run("run.yaml", "--set", "max_steps=7") == first
    assert hand.run("run.yaml") == first  # what was --set then is meant again
    assert said() == ""
    hand.write(learning_rate=2e-3)
    assert hand.run("run.yaml", "--set", "max_steps=9") == first
    line = "[spotune] run.yaml is not followed, the run goes on as it was submitted: learning_rate: 0.001 -> 0.002; "
    assert said() == line + "max_steps: 7 -> 9 (to follow it: --allow-config-change)\n"


def test_a_run_on_a_dev_cluster_says_whose_it_is(hand: Hand) -> None:
    record = hand.run("run.yaml", SPOTUNE_KIND="dev", SPOTUNE_TEAM="research", SPOTUNE_USER="ben")
    assert (record.kind, record.team, record.user) == ("dev", "research", "ben")
    for text, share in (("0.5", 0.5), ("", 0.0), ("half", 0.0), ("-1", 0.0), ("nan", 0.0)):
        env = RunEnvironment.read({"SPOTUNE_GPU_SHARE": text})
        assert env.gpu_share == share
    claimed = claim_attempt(hand.store, KEYS, Machine.read({}), gpu_share=0.5)
    assert claimed.gpu_share == 0.5


@pytest.mark.parametrize("text", [None, "a: [", "learning_rat: 1\n"])
def test_a_config_that_cannot_be_read_is_no_error_then(hand: Hand, said: Said, text: str | None) -> None:
    first = hand.run("run.yaml")
    Path("run.yaml").write_text(text) if text else Path("run.yaml").unlink()
    assert hand.run("run.yaml") == first
    assert hand.run() == first
    assert said() == ""


def test_the_flag_follows_it(hand: Hand, said: Said) -> None:
    first = hand.run("run.yaml")
    hand.write(learning_rate=2e-3)
    second = hand.run("run.yaml", "--max_steps", "9", "--allow-config-change")
    assert said() == "[spotune] a-run, revision 1: learning_rate: 0.001 -> 0.002; max_steps: 5 -> 9\n"
    assert (second.config["learning_rate"], second.config["max_steps"]) == (2e-3, 9)
    assert (second.revision, second.allowed, second.created_at) == (1, ["learning_rate"], first.created_at)
    assert record_history(hand.store, KEYS) == [first, second]
    assert hand.run("run.yaml", "--max_steps", "9", "--allow-config-change") == second  # and again: nothing new
    assert hand.run("run.yaml", "--max_steps", "9") == second
    assert said() == ""


def test_the_environment_does_the_same(hand: Hand) -> None:
    hand.run("run.yaml")
    hand.write(seed=3)
    assert hand.run(SPOTUNE_CONFIG="run.yaml", SPOTUNE_ALLOW_CONFIG_CHANGE="0").revision == 0
    assert hand.run(SPOTUNE_CONFIG="run.yaml", SPOTUNE_ALLOW_CONFIG_CHANGE="1").config["seed"] == 3


def test_the_flag_without_a_config(hand: Hand, said: Said) -> None:
    hand.run("run.yaml", SPOTUNE_SAVE_EVERY="5m", SPOTUNE_STALL_AFTER="20m")
    Path("run.yaml").unlink()
    Path("data.jsonl").write_text('{"text": "b"}\n')
    second = hand.run("--allow-config-change", "--set", "logging_steps=2")
    assert (second.config["logging_steps"], second.save_every, second.allowed) == (2, "5m", ["data"])
    assert second.stall_after == "20m"
    assert "now in the new data" in said()
    check_data(second)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["none.yaml"], "none.yaml: no such file"),
        (["run.yaml", "--set", "stepz=1"], "run.yaml: stepz: unknown key"),
        (["run.yaml", "--set", "max_steps=2"], "a-run: max_steps: 2 steps, but the newest checkpoint is of step 4"),
    ],
)
def test_with_the_flag_the_config_has_to_be_right(hand: Hand, argv: list[str], says: str) -> None:
    hand.run("run.yaml")
    hand.store.create(KEYS.commit(1, 4), Commit(run_id="a-run", step=4, attempt=1, files={}).to_bytes())
    with pytest.raises(InputError, match=says):
        hand.run(*argv, "--allow-config-change")
    assert len(record_history(hand.store, KEYS)) == 1


def test_a_run_of_the_launcher_is_held_against_its_own_recipe(hand: Hand, said: Said) -> None:
    hand.write(profiles={"prod": {"max_steps": 9}})
    first = hand.run("run.yaml", "--set", "seed=3", SPOTUNE_PROFILE="prod")
    submitted = json.loads(hand.store.read(KEYS.run) or b"") | {"infra": "local", "profile": ""}
    hand.store.write(KEYS.run, json.dumps(submitted).encode())
    environ = {"SPOTUNE_PROFILE": "prod", "SPOTUNE_CONFIG": "run.yaml"}
    assert hand.run("run.yaml", **environ).config == first.config  # the machine's command line lacks --set seed=3
    assert said() == ""
    hand.write(profiles={"prod": {"max_steps": 8}})
    hand.run("run.yaml", **environ)
    way = "spotune cancel a-run, then spotune train run.yaml --name a-run"
    assert f"max_steps: 9 -> 8 (to follow it: {way})" in said()


def test_changed_data_is_named(hand: Hand) -> None:
    Path("rows").mkdir()
    for name in ("a", "b", "c"):
        Path(f"rows/{name}.jsonl").write_text('{"text": "a"}\n')
    hand.write(data=[{"source": "rows"}])
    run = hand.run("run.yaml")
    check_data(run)
    Path("rows/a.jsonl").write_text('{"text": "b"}\n')
    Path("rows/b.jsonl").unlink()
    Path("rows/d.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(InputError) as error:
        check_data(run)
    assert str(error.value) == (
        "run.yaml: data: training data changed since the run began: rows/a.jsonl, rows/d.jsonl (added), "
        "rows/b.jsonl (gone) (put it back, or spotune resume a-run --allow-config-change)"
    )


def test_a_changed_model_is_named(hand: Hand, tmp_path: Path) -> None:
    run = hand.run("run.yaml")
    check_model(run, tmp_path / "cache")
    Path("model/model.safetensors").write_text("other weights")
    with pytest.raises(InputError) as error:
        check_model(run, tmp_path / "cache")
    assert str(error.value) == (
        "run.yaml: model_name_or_path: model changed since the run began: model.safetensors "
        "(put it back, or spotune resume a-run --allow-config-change)"
    )
    Path("model").rename("moved")
    with pytest.raises(InputError, match="run.yaml: model_name_or_path: no folder model on this machine"):
        check_model(run)
    check_model(RunRecord.from_dict({**json.loads(run.to_bytes()), "model_sha256": ""}))  # of an earlier version


@pytest.mark.parametrize("key", [KEYS.run, KEYS.revision(1)])
def test_a_damaged_record_is_for_people_to_mend(hand: Hand, key: str) -> None:
    hand.run("run.yaml")
    hand.store.write(key, b"{}")
    with pytest.raises(InputError, match=f"a-run: {key}: not a RunRecord: .*put the record back"):
        hand.run("run.yaml")


def test_request() -> None:
    assert parse_arguments(["a.yaml", "--allow-config-change", "--packing"]) == Request(
        "a.yaml", "", ("packing=true",), True
    )
