"""The record that a run goes by: ``run.json`` as submitted, or the newest revision of it.

``run.json`` is never rewritten. What is changed on purpose while a run stands still is a whole record of its own,
``revisions/<n>.json``, create-only: whoever reads a run reads the highest one, and finds in all of them together
what its checkpoints may have been made with.
"""

from collections.abc import Sequence
from dataclasses import replace

from spotune.contracts.configvalues import number_of
from spotune.contracts.errors import InputError
from spotune.contracts.keys import Keys, commit_of, revision_of
from spotune.contracts.marks import read_mark
from spotune.contracts.records import Commit, RunRecord
from spotune.contracts.store import Store

VERSIONS = "versions"  # in ``RunRecord.allowed``


def record_in_force(store: Store, keys: Keys) -> RunRecord | None:
    """The newest revision, else ``run.json``; None when there is no such run."""
    submitted = record_as_submitted(store, keys)
    numbers = _numbers(store, keys) if submitted else []
    return _read(store, keys, keys.revision(numbers[-1])) if numbers else submitted


def record_as_submitted(store: Store, keys: Keys) -> RunRecord | None:
    """``run.json``; None when there is no such run. Raises BadRecord where it is another run's: a copied folder."""
    return _read(store, keys, keys.run)


def record_history(store: Store, keys: Keys) -> list[RunRecord]:
    """``run.json`` and all revisions, oldest first; empty when there is no such run."""
    submitted = record_as_submitted(store, keys)
    if submitted is None:
        return []
    later = [_read(store, keys, keys.revision(number)) for number in _numbers(store, keys)]
    return [submitted, *(record for record in later if record)]


def revised(before: RunRecord, wanted: RunRecord, by: str, at: float) -> RunRecord:
    """The next revision of ``before``: what ``wanted`` trains; who submitted it, when and at what price stay."""
    return replace(
        before,
        config_path=wanted.config_path,
        profile=wanted.profile,
        overrides=wanted.overrides,
        config=wanted.config,
        config_sha256=wanted.config_sha256,
        data_sha256=wanted.data_sha256,
        data_files=wanted.data_files,
        model_sha256=wanted.model_sha256,
        model_files=wanted.model_files,
        save_every=wanted.save_every or before.save_every,
        stall_after=wanted.stall_after or before.stall_after,
        budget_usd=before.budget_usd if wanted.budget_usd is None else wanted.budget_usd,
        month_usd=wanted.month_usd,
        month_of=wanted.month_of,
        revision=before.revision + 1,
        revised_at=at,
        revised_by=by,
        allowed=[],
    )


def write_revision(store: Store, keys: Keys, record: RunRecord) -> None:
    """Puts a revision in force; raises InputError when somebody else has made one in the meantime."""
    if not store.create(keys.revision(record.revision), record.to_bytes()):
        raise InputError(keys.run_id, "was changed by somebody else just now", remedy="try again")


def check_length(store: Store, keys: Keys, record: RunRecord) -> None:
    """Raises InputError for a training length that the newest checkpoint is beyond already."""
    steps = number_of(record.config.get("max_steps")) or 0
    newest = max((number for key in store.keys(keys.commits) if (number := commit_of(key))), default=(0, 0))[1]
    if 0 < steps < newest:
        what = f"{steps:.0f} steps, but the newest checkpoint is of step {newest} already"
        raise InputError(keys.run_id, what, key="max_steps", remedy=f"{newest} or more, or another --name")


def check_commit(commit: Commit, history: Sequence[RunRecord]) -> None:
    """Raises InputError for a checkpoint that was made with a config, data or model that the run never had.

    A fingerprint that is missing on either side, as in records of earlier versions, says nothing.
    """
    names = ("config_sha256", "data_sha256", "model_sha256")

    def fits(record: RunRecord, name: str) -> bool:
        made_with, recorded = getattr(commit, name), getattr(record, name)
        return not made_with or not recorded or made_with == recorded

    if any(all(fits(record, name) for name in names) for record in history):
        return
    wrong = [name.removesuffix("_sha256") for name in names if not any(fits(record, name) for record in history)]
    where = Keys(commit.run_id).commit(commit.attempt, commit.step)
    what = f"made with another {' and '.join(wrong) or 'config, data and model'} than this run has or ever had"
    raise InputError(where, what, remedy="submit it as a new run, under another name")


def allows_other_versions(commit: Commit, history: Sequence[RunRecord]) -> bool:
    """Returns whether a revision made after the commit lets the run go on under other versions of its libraries."""
    return any(VERSIONS in record.allowed and record.revision > commit.revision for record in history)


def refused_versions(store: Store, keys: Keys) -> tuple[str, ...]:
    """Returns the changed libraries that the run failed because of, ``datasets 5.0.1 -> 5.2.0``; empty for none."""
    mark = read_mark(store, keys.failed)
    return tuple(mark.versions) if mark else ()


def _numbers(store: Store, keys: Keys) -> list[int]:
    return sorted(number for key in store.keys(keys.revisions) if (number := revision_of(key)))


def _read(store: Store, keys: Keys, key: str) -> RunRecord | None:
    data = store.read(key)
    if data is None:
        return None
    return RunRecord.from_bytes(data, key)
