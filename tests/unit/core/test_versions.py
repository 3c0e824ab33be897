"""Libraries that decide the order of rows: what counts as a change, and what allows it."""

from dataclasses import replace

import pytest

from spotune.core.errors import OtherVersions
from spotune.core.fingerprint import ORDER_LIBRARIES, changed_versions, installed_versions
from spotune.core.keys import Keys
from spotune.core.records import Commit, RunRecord, TerminalMarker
from spotune.core.revisions import Change, allows_other_versions, refused_versions
from spotune.core.store import Store

KEYS = Keys("run-a")
THEN = {"datasets": "5.0.1", "numpy": "2.4.6", "torch": "2.13.0+cpu", "peft": "0.20.0", "spotune": "0.1.0"}


@pytest.mark.parametrize(
    ("before", "after", "changed"),
    [
        (THEN, THEN, []),
        (THEN, {**THEN, "datasets": "5.2.0"}, ["datasets 5.0.1 -> 5.2.0"]),
        ({**THEN, "datasets": "5.2.0"}, THEN, ["datasets 5.2.0 -> 5.0.1"]),
        (
            {**THEN, "trl": "1.16.0"},
            {**THEN, "trl": "1.16.1", "torch": "2.14.0"},
            ["torch 2.13.0+cpu -> 2.14.0", "trl 1.16.0 -> 1.16.1"],
        ),
        (THEN, {**THEN, "torch": "2.13.0+cu130"}, []),  # another build of the same version
        (THEN, {**THEN, "peft": "0.21.2", "spotune": "0.2.0"}, []),  # neither sees the order of rows
        ({}, THEN, []),  # a commit that says nothing
        ({"datasets": "5.2.0"}, {**THEN, "datasets": "5.2.0"}, []),  # or nothing of numpy
        (THEN, {}, []),
    ],
)
def test_what_counts_as_a_change(before: dict[str, str], after: dict[str, str], changed: list[str]) -> None:
    assert changed_versions(before, after) == changed


def test_what_is_recorded() -> None:
    found = installed_versions()
    assert set(found) <= {*ORDER_LIBRARIES, "peft", "spotune"}
    assert found["spotune"]


def test_an_allowance_is_for_what_was_committed_before_it() -> None:
    first = RunRecord(
        run_id="run-a", created_at=1e9, user="ada", config_path="c", config={}, config_sha256="c", data_sha256="d"
    )
    of_a_rate = replace(first, revision=1, allowed=["learning_rate"])
    of_versions = replace(first, revision=2, allowed=["versions"])
    later = replace(first, revision=3)
    commits = {
        revision: Commit(run_id="run-a", step=6, attempt=1, revision=revision, files={}) for revision in range(4)
    }
    for history, allowed in (
        ([first], set()),
        ([first, of_a_rate], set()),
        ([first, of_a_rate, of_versions], {0, 1}),
        ([first, of_a_rate, of_versions, later], {0, 1}),
    ):
        assert {number for number, commit in commits.items() if allows_other_versions(commit, history)} == allowed
    assert Commit.from_bytes(b'{"run_id": "run-a", "step": 6, "attempt": 1, "files": {}}').revision == 0


def test_what_a_run_failed_because_of(local_store: Store) -> None:
    assert refused_versions(local_store, KEYS) == ()
    old = b'{"run_id": "run-a", "attempt": 1, "at": 1e9, "reason": "x", "exit_code": 2}'
    local_store.write(KEYS.failed, old)
    assert refused_versions(local_store, KEYS) == ()
    changed = ["datasets 5.0.1 -> 5.2.0"]
    mark = TerminalMarker(run_id="run-a", attempt=1, at=1e9, reason="x", exit_code=2, versions=changed)
    local_store.write(KEYS.failed, mark.to_bytes())
    assert refused_versions(local_store, KEYS) == ("datasets 5.0.1 -> 5.2.0",)


def test_in_words() -> None:
    change = Change(versions=("datasets 5.0.1 -> 5.2.0", "trl 1.16.0 -> 1.17.0"))
    assert change
    assert change.bound == ["versions"]
    assert str(change) == "versions: datasets 5.0.1 -> 5.2.0, trl 1.16.0 -> 1.17.0"
    assert change.as_differing() == f"other {change}"
    assert change.as_followed() == f"{change}; goes on at the same step and position, rows may come in another order"
    error = OtherVersions("run.yaml", list(change.versions), "do this")
    assert error.exit_code == 2
    assert str(error) == (
        "run.yaml: versions: libraries changed since the checkpoint was made:"
        " datasets 5.0.1 -> 5.2.0, trl 1.16.0 -> 1.17.0 (do this)"
    )
