"""What ranks, extras and other machines leave for the guard, damaged: never a traceback, and the attempt goes on."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spotune.core.keys import Keys
from spotune.core.protocol import (
    FACTS,
    MERGE,
    PUSH,
    STAGED,
    TRAINER,
    Outcome,
    answer_path,
    events_path,
    outcome_path,
    staged_path,
    write_json,
)
from spotune.core.records import TerminalMarker
from spotune.core.store import Store
from spotune.guard import extras
from spotune.guard.checkpoints import StagingFolder
from spotune.guard.claim import leave_mark
from spotune.guard.journal import Journal
from spotune.guard.ranks import Ranks
from spotune.guard.save_schedule import SPOT, ControlFile, Inputs, SaveCost, SaveScheduler
from spotune.guard.stalls import Stalls
from tests.hostile import HOW, changed, spoil, values
from tests.unit.guard.attempts import KEYS, make_context, stage

T = 1_700_000_000.0
OUTCOME = {"how": "failed", "step": 5, "message": "why", "versions": ["a 1 -> 2"]}
ANSWER = {"done": True, "message": "", "facts": {"check": "same", "repo_id": "a/b", "oid": "0", "url": "u"}}
EVENTS: list[dict[str, Any]] = [
    {"t": T, "event": "phase", "phase": "train"},
    {"t": T, "event": "plan", "max_steps": 9, "num_train_epochs": 1.0},
    {"t": T, "event": "step", "step": 1, "tokens": 9, "data_wait_s": 0.1},
    {"t": T, "event": "log", "step": 1, "loss": 1.0},
    {"t": T, "event": "save", "step": 1, "stall_s": 0.5},
    {"t": T, "event": "written", "step": 1, "write_s": 0.5, "bytes": 9},
    {"t": T, "event": "unsaved", "step": 1, "message": "disk full"},
    {"t": T, "event": "commit", "step": 1, "upload_s": 0.5, "bytes": 9},
    {"t": T, "event": "restored", "step": 1, "commit": None, "rejected": [], "restore_s": 1.0},
    {"t": T, "event": "end", "reason": "failed", "exit_code": 1, "step": 1, "message": "why"},
]
SETTINGS = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def put(path: Path, damage: Any) -> None:
    """Damages a file: in one of the ways of ``spoil``, or with other JSON in it."""
    if isinstance(damage, str):
        spoil(path, damage)
    else:
        spoil(path, "empty")
        path.write_text(json.dumps(damage))


def damage(whole: dict[str, Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.sampled_from(HOW), changed(whole), values.filter(lambda value: not isinstance(value, str)))


@SETTINGS
@given(data=st.data())
def test_a_damaged_word_of_a_rank_costs_its_checkpoint_only(tmp_path_factory: Any, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("exchange")
    staging = StagingFolder(folder, ranks=1)
    first, second = stage(folder, 5), stage(folder, 6)
    path = staged_path(folder, 5)
    put(path, data.draw(damage(json.loads(path.read_bytes()))))
    found = staging.collect()
    assert found[-1] == second
    assert all(staged.step == first.step and staged.checkpoint == first.checkpoint for staged in found[:-1])
    assert staging.collect() == []


def test_a_word_about_another_folder_or_step_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder of a checkpoint is uploaded and removed: it is the attempt's own."""
    staging, staged = StagingFolder(tmp_path, ranks=1), stage(tmp_path, 5)
    for step, changes in ((6, {"checkpoint": "/etc"}), (7, {"checkpoint": staged.checkpoint}), (8, {"step": 8})):
        write_json(staged_path(tmp_path, step), {**vars(staged), "step": step, **changes})
    (tmp_path / STAGED / "00000009-x.json").write_text("{}")
    assert staging.collect() == [staged]
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        f"[spotune] the checkpoint of step {step} is not committed" for step in (6, 7, 8)
    ]
    assert all(line.endswith(": checkpoint: not the one of step " + str(step) + " in this folder")
               for step, line in zip((6, 7, 8), lines, strict=True))  # fmt: skip
    assert (tmp_path / TRAINER / "checkpoint-5").is_dir()


@SETTINGS
@given(data=st.data())
def test_a_damaged_outcome_is_worth_another_machine(tmp_path_factory: Any, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("exchange")
    ranks = Ranks.__new__(Ranks)
    ranks._folder, ranks._first_rank = folder, 0
    ranks._processes = [SimpleNamespace(returncode=1)]  # type: ignore[list-item]
    put(outcome_path(folder, 0), data.draw(damage(OUTCOME)))
    outcome = ranks.outcome()
    assert isinstance(outcome, Outcome)
    outcome.message.encode()
    if outcome.how == "retry" and "damaged" in outcome.message:
        assert outcome.message.startswith("rank 0 left a damaged outcome-0.json: ")


@SETTINGS
@given(data=st.data(), name=st.sampled_from((MERGE, PUSH)))
def test_a_damaged_answer_means_that_an_extra_is_not_done(
    tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch, data: st.DataObject, name: str
) -> None:
    folder = tmp_path_factory.mktemp("exchange")
    path, damaged = answer_path(folder, name), data.draw(damage(ANSWER))

    def command(*_: Any) -> list[str]:
        put(path, damaged)
        return ["true"]

    monkeypatch.setattr(extras, "worker_command", command)
    monkeypatch.setattr(extras, "_kill", subprocess.Popen.wait)
    answer = extras.run_extra(name, folder, {}, {}, lambda seconds: None)
    if answer.done:
        assert all(isinstance(answer.facts[fact], str) for fact in FACTS[name])


@SETTINGS
@given(data=st.data(), whole=st.sampled_from(EVENTS))
def test_a_damaged_line_of_the_log_is_left_out(
    tmp_path_factory: Any, data: st.DataObject, whole: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("exchange")
    log, store = events_path(folder, 0), Store(f"file://{folder}/bucket")
    line = data.draw(st.one_of(changed(whole).map(json.dumps), values.map(json.dumps), st.just("[" * 10_000)))
    log.write_text("".join(f"{json.dumps(event)}\n" for event in EVENTS) + f"{line}\n{json.dumps(EVENTS[2])}\n")
    save_cost, context = SaveCost(), make_context(store, folder)
    journal = Journal(store, KEYS, 1, folder / "none")
    journal._worker_log = log
    inputs = Inputs(restore_s=1.0, age_s=1.0, spells_s=(), prior=SPOT)
    for listener in (
        save_cost.on_event,
        Stalls(60.0, 60.0).on_event,
        SaveScheduler(inputs, save_cost, ControlFile(folder), journal).on_event,
    ):
        journal.listen(listener)
    journal.poll()
    assert journal.progress.step == 1
    journal.close()
    assert context.store.read(KEYS.progress)


def test_a_reason_with_half_a_surrogate_pair_is_read_again(local_store: Store) -> None:
    """So Python spells the name of a file that is not UTF-8; a mark that nobody can read would hide the reason."""
    assert Outcome("failed", message="no such file caf\udce9").message == r"no such file caf\udce9"
    keys = Keys("run-a")
    leave_mark(local_store, keys.failed, "run-a", 1, reason="caf\udce9", exit_code=2)
    assert TerminalMarker.from_bytes(local_store.read(keys.failed) or b"", keys.failed).reason == r"caf\udce9"
