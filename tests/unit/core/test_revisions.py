"""The record in force, and what a checkpoint may have been made with."""

from dataclasses import replace
from typing import Any

import pytest

from spotune.core.errors import BadRecord, InputError
from spotune.core.keys import Keys, revision_of
from spotune.core.records import Commit, RunRecord
from spotune.core.revisions import check_commit, check_length, record_history, record_in_force, revised, write_revision
from spotune.core.store import Store

KEYS = Keys("run-a")
SUBMITTED = RunRecord(
    run_id="run-a",
    created_at=1.0,
    user="ada",
    config_path="run.yaml",
    config={"max_steps": 5},
    config_sha256="c0",
    data_sha256="d0",
    model_sha256="m0",
    save_every="5m",
    prices=[{"infra": "local"}],
)


def wanted(**facts: Any) -> RunRecord:
    return replace(SUBMITTED, **({"run_id": "other", "created_at": 9.0, "user": "bob", "prices": []} | facts))


def test_the_highest_revision_is_in_force(store: Store) -> None:
    assert record_in_force(store, KEYS) is None
    assert record_history(store, KEYS) == []
    store.create(KEYS.run, SUBMITTED.to_bytes())
    assert record_in_force(store, KEYS) == SUBMITTED
    first = revised(SUBMITTED, wanted(config_sha256="c1", save_every=""), "bob", 7.0)
    write_revision(store, KEYS, first)
    second = revised(first, wanted(config_sha256="c2"), "cleo", 8.0)
    write_revision(store, KEYS, second)
    assert record_in_force(store, KEYS) == second
    assert [one.config_sha256 for one in record_history(store, KEYS)] == ["c0", "c1", "c2"]
    assert (first.run_id, first.created_at, first.user, first.prices) == ("run-a", 1.0, "ada", [{"infra": "local"}])
    assert (first.revision, first.revised_by, first.revised_at, first.save_every) == (1, "bob", 7.0, "5m")
    with pytest.raises(InputError, match="run-a: was changed by somebody else just now"):
        write_revision(store, KEYS, second)
    assert record_in_force(store, KEYS) == second


@pytest.mark.parametrize(("key", "revision"), [(KEYS.revision(1), 0), (KEYS.revision(2), 1), (KEYS.run, 1)])
def test_a_record_under_the_name_of_another_revision_is_none(store: Store, key: str, revision: int) -> None:
    """One that said 0 would be in force without anybody being asked: it would pass as submitted."""
    store.create(KEYS.run, SUBMITTED.to_bytes())
    store.write(key, replace(SUBMITTED, revision=revision, revised_by="eva").to_bytes())
    for read in (record_in_force, record_history):
        with pytest.raises(BadRecord, match=f"^{key}: revision: {revision}, not that of its name"):
            read(store, KEYS)


def test_the_key_of_a_revision() -> None:
    assert revision_of(KEYS.revision(3)) == 3
    assert revision_of(KEYS.run) is None


@pytest.mark.parametrize(("steps", "refused"), [(-1, False), (7, False), (6, True), ("6", True), (None, False)])
def test_a_length_that_is_behind(local_store: Store, steps: Any, refused: bool) -> None:
    local_store.write(KEYS.commit(1, 9), b"{}")
    local_store.write(KEYS.commit(2, 7), b"{}")  # the newest: attempt 1's checkpoint of step 9 was damaged
    record = replace(SUBMITTED, config={"max_steps": steps})
    if refused:
        with pytest.raises(InputError, match="run-a: max_steps: 6 steps, but the newest checkpoint is of step 7"):
            check_length(local_store, KEYS, record)
    else:
        check_length(local_store, KEYS, record)


def commit(config: str = "c0", data: str = "d0", model: str = "m0") -> Commit:
    return Commit(
        run_id="run-a", step=6, attempt=1, config_sha256=config, data_sha256=data, model_sha256=model, files={}
    )


def test_a_checkpoint_is_of_a_record_that_the_run_had() -> None:
    later = replace(SUBMITTED, config_sha256="c1", data_sha256="d1")
    old = replace(SUBMITTED, model_sha256="")
    check_commit(commit(), [SUBMITTED])
    check_commit(commit(), [SUBMITTED, later])
    check_commit(commit("c1", "d1"), [SUBMITTED, later])
    check_commit(commit(model=""), [SUBMITTED])  # made by an earlier version
    check_commit(commit(model="mX"), [old])
    for strange, history, what in (
        (commit("cX"), [SUBMITTED], "config"),
        (commit(data="dX"), [SUBMITTED, later], "data"),
        (commit(model="mX"), [SUBMITTED, later], "model"),
        (commit("cX", "dX"), [SUBMITTED], "config and data"),
        (commit("c1", "d0"), [SUBMITTED, later], "config, data and model"),  # each was, but never together
    ):
        with pytest.raises(InputError, match=f"commits/0001-00000006.json: made with another {what} than this run has"):
            check_commit(strange, history)
