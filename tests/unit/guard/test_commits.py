"""Commit, restore and retention; what a bucket's kind may change on every kind."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spotune.core.errors import Fenced, StoreError
from spotune.core.protocol import TRAINER, Staged, staged_path, write_json
from spotune.core.records import Commit
from spotune.core.store import Store
from spotune.guard.checkpoints import (
    Committer,
    Lineage,
    Retention,
    StagingFolder,
    commit_checkpoint,
    seal,
    seal_path,
    sealed,
)
from spotune.guard.claim import check_fence, claim_attempt, latest_attempt
from spotune.guard.journal import Context, Journal, Node
from spotune.guard.restore import list_commits, newest_commit, restore
from spotune.guard.restore_thread import find_stranded
from spotune.guard.save_schedule import SaveCost
from tests.unit.guard.attempts import FILES, KEYS, RUN, make_checkpoint, make_context
from tests.waiting import LIMIT_S, until


@pytest.fixture(autouse=True)
def close_journals() -> Iterator[None]:
    """Each test closes the journals that it has opened."""
    yield
    while _open:
        _open.pop().close()


_open: list[Journal] = []


def make_committer(store: Store, folder: Path, attempt: int = 1, keep: int = 2) -> Committer:
    context = make_context(store, folder, attempt)
    journal = Journal(store, KEYS, attempt, folder / "events")
    _open.append(journal)
    retention = Retention(store, KEYS, attempt, keep)
    return Committer(context, Lineage(RUN, attempt, "", 0), retention, journal, lambda step: {}, SaveCost())


def staged(folder: Path, step: int, best_step: int | None = None, leave_out: str = "") -> Staged:
    return make_checkpoint(folder / "scratch" / "0001", step, leave_out, best_step=best_step)


def commit_steps(store: Store, folder: Path, *steps: int, attempt: int = 1, keep: int = 9) -> Committer:
    committer = make_committer(store, folder, attempt, keep)
    for step in steps:
        committer.submit(staged(folder, step))
        assert committer.drain(LIMIT_S), committer.error
    committer.close()
    return committer


def test_what_is_committed_is_restored(store: Store, tmp_path: Path) -> None:
    commit_steps(store, tmp_path, 10, 20)
    found = restore(store, KEYS, tmp_path / "other")
    assert found.commit
    assert found.checkpoint
    assert (found.commit.step, found.commit.tokens, found.rejected) == (20, 200, [])
    assert {p.relative_to(found.checkpoint).as_posix() for p in found.checkpoint.rglob("*") if p.is_file()} == set(
        FILES
    )
    assert (found.checkpoint / "optimizer.pt").read_bytes() == b"optimizer.pt of step 20" * 1000


def test_nothing_committed_is_a_fresh_start(local_store: Store, tmp_path: Path) -> None:
    local_store.write(f"{KEYS.checkpoint(10, 1)}/optimizer.pt", b"uploaded, never committed")
    assert restore(local_store, KEYS, tmp_path).commit is None
    assert newest_commit(local_store, KEYS) is None


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "unreadable commit"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(local_store: Store, tmp_path: Path, damage: str) -> None:
    commit_steps(local_store, tmp_path, 10, 20)
    key = f"{KEYS.checkpoint(20, 1)}/optimizer.pt"
    whole = local_store.read(key) or b""
    match damage:
        case "flipped":
            local_store.write(key, b"X" + whole[1:])
        case "cut":
            local_store.write(key, whole[:-1])
        case "missing":
            local_store.delete([key])
        case _:
            local_store.write(KEYS.commit(1, 20), b"{")
    found = restore(local_store, KEYS, tmp_path / "other")
    assert found.commit
    assert found.commit.step == 10
    assert len(found.rejected) == 1
    assert "step 20 of attempt 1" in found.rejected[0]


@pytest.mark.parametrize("needed", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_a_checkpoint_without_its_state_is_bad(local_store: Store, tmp_path: Path, needed: str) -> None:
    committer = make_committer(local_store, tmp_path)
    committer.submit(staged(tmp_path, 10, leave_out=needed))
    assert committer.drain(LIMIT_S)
    committer.close()
    found = restore(local_store, KEYS, tmp_path / "other")
    assert found.commit is None
    assert needed.split(".")[0] in found.rejected[0]


def test_the_newest_is_the_highest_attempt_then_step(local_store: Store, tmp_path: Path) -> None:
    commit_steps(local_store, tmp_path, 30, attempt=1)
    commit_steps(local_store, tmp_path, 20, attempt=2)
    found = newest_commit(local_store, KEYS)
    assert found
    assert (found.attempt, found.step) == (2, 20)


def test_of_those_waiting_the_newest_wins(local_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committer = make_committer(local_store, tmp_path)
    with committer._changed:  # the thread cannot take the first before the last is there
        for step in (10, 20, 30):
            committer.submit(staged(tmp_path, step))
    assert committer.drain(LIMIT_S)
    committer.close()
    assert [number for number, _ in list_commits(local_store, KEYS)] == [(1, 30)]
    assert not (tmp_path / "scratch" / "0001" / "trainer" / "checkpoint-10").exists()


def test_a_later_attempt_fences_off(local_store: Store, tmp_path: Path) -> None:
    machine = Node.read({})
    first, second = (claim_attempt(local_store, KEYS, machine) for _ in range(2))
    assert (first.attempt, second.attempt, latest_attempt(local_store, KEYS)) == (1, 2, 2)
    with pytest.raises(Fenced, match="attempt 2 has taken over"):
        check_fence(local_store, KEYS, 1)
    check_fence(local_store, KEYS, 2)
    committer = make_committer(local_store, tmp_path, attempt=1)
    committer.submit(staged(tmp_path, 10))
    assert not committer.drain(LIMIT_S)
    committer.close()
    assert committer.fenced
    assert list_commits(local_store, KEYS) == []


def test_a_failing_upload_is_said_and_the_next_one_mends_it(
    local_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: Store, local: Path, key: str) -> None:
        raise StoreError("the bucket is gone")

    committer = make_committer(local_store, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "upload", refuse)
        committer.submit(staged(tmp_path, 10))
        until(lambda: committer.error)
    committer.submit(staged(tmp_path, 20))
    assert committer.drain(LIMIT_S)
    committer.close()
    assert "step 10 is not committed yet: the bucket is gone" in capsys.readouterr().err
    assert [number for number, _ in list_commits(local_store, KEYS)] == [(1, 20)]


def steps_left(store: Store) -> list[int]:
    return [step for (_, step), _ in list_commits(store, KEYS)]


def test_retention_keeps_the_last_and_the_best(store: Store, tmp_path: Path) -> None:
    commit_steps(store, tmp_path, 10, 20, 30, 40)
    Retention(store, KEYS, 1, keep=2).tidy(best_step=10)
    assert steps_left(store) == [40, 30, 10]
    assert store.folders(KEYS.checkpoints) == ["00000010-0001", "00000030-0001", "00000040-0001"]
    Retention(store, KEYS, 1, keep=1).tidy()
    assert steps_left(store) == [40, 30]  # never one alone: it may turn out to be damaged


def test_retention_keeps_every_third_for_good(local_store: Store, tmp_path: Path) -> None:
    commit_steps(local_store, tmp_path, *range(10, 90, 10))
    retention = Retention(local_store, KEYS, 1, keep=2, keep_every=3)
    for _ in range(2):  # what was read once is known the second time
        retention.tidy()
        assert steps_left(local_store) == [80, 70, 60, 30]


def test_a_damaged_commit_neither_protects_nor_displaces(local_store: Store, tmp_path: Path) -> None:
    commit_steps(local_store, tmp_path, 10, 20, 30)
    bad = [KEYS.commit(1, 20), KEYS.commit(1, 30)]
    Retention(local_store, KEYS, 2, keep=2, bad=bad).tidy()
    assert steps_left(local_store) == [30, 20, 10]  # 10 is the only good one: everything stays
    commit_steps(local_store, tmp_path, 15, attempt=2)
    Retention(local_store, KEYS, 2, keep=2, bad=bad).tidy()
    assert steps_left(local_store) == [15, 10]


def test_orphans_of_earlier_attempts_are_swept(local_store: Store, tmp_path: Path) -> None:
    commit_steps(local_store, tmp_path, 10)
    for name in (KEYS.checkpoint(20, 1), KEYS.checkpoint(20, 2), KEYS.checkpoint(30, 3)):
        local_store.write(f"{name}/optimizer.pt", b"half")
    Retention(local_store, KEYS, 3).tidy()
    assert local_store.folders(KEYS.checkpoints) == ["00000010-0001", "00000030-0003"]


def commit_with_best(store: Store, folder: Path) -> None:
    commit_steps(store, folder, 5, 10)
    committer = make_committer(store, folder, keep=9)
    committer.submit(staged(folder, 20, best_step=10))
    assert committer.drain(LIMIT_S)
    committer.close()


def test_best_checkpoint_comes_back_too(local_store: Store, tmp_path: Path) -> None:
    commit_with_best(local_store, tmp_path)
    found = restore(local_store, KEYS, tmp_path / "other")
    assert found.best
    assert found.best.name == "checkpoint-10"
    assert found.best_key == KEYS.commit(1, 10)


def test_without_its_best_checkpoint_a_commit_is_bad(local_store: Store, tmp_path: Path) -> None:
    """Gone on with, the run would end with another model than it should, without a word."""
    commit_with_best(local_store, tmp_path)
    local_store.delete([f"{KEYS.checkpoint(10, 1)}/optimizer.pt"])
    found = restore(local_store, KEYS, tmp_path / "other")
    assert found.commit
    assert found.commit.step == 5
    assert found.rejected[0] == "step 20 of attempt 1: its best checkpoint, step 10: optimizer.pt is missing"


def test_a_commit_pruned_meanwhile_leads_to_the_newer_one(
    local_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A zombie commits once more, and tidies up what its successor is about to fetch."""
    commit_steps(local_store, tmp_path, 10)
    download = Store.download

    def meanwhile(self: Store, key: str, local: Path) -> dict[str, Any]:
        monkeypatch.setattr(Store, "download", download)
        commit_steps(local_store, tmp_path, 20)
        local_store.delete([KEYS.commit(1, 10), *local_store.keys(KEYS.checkpoint(10, 1))])
        return download(self, key, local)

    monkeypatch.setattr(Store, "download", meanwhile)
    found = restore(local_store, KEYS, tmp_path / "other")
    assert found.commit
    assert (found.commit.step, found.rejected) == (20, [])


def strand(store: Store, folder: Path, step: int, config_sha256: str = "c") -> Context:
    """A sealed checkpoint of attempt 1 on the disk; returns the context of attempt 2."""
    seal(folder / "scratch" / "0001", staged(folder, step), config_sha256)
    return make_context(store, folder, attempt=2)


def test_what_was_stranded_is_committed_by_the_next_attempt(local_store: Store, tmp_path: Path) -> None:
    commit_steps(local_store, tmp_path, 10)
    context = strand(local_store, tmp_path, 20)
    newest = newest_commit(local_store, KEYS)
    found = find_stranded(context, newest)
    assert found
    commit = commit_checkpoint(local_store, KEYS, Lineage(RUN, 2, KEYS.commit(1, 10), 1), found)
    assert (commit.attempt, commit.step, commit.ordinal) == (2, 20, 2)
    restored = restore(local_store, KEYS, tmp_path / "other")
    assert restored.commit
    assert restored.commit.step == 20


@pytest.mark.parametrize("fault", ["behind the bucket", "another config", "a flipped byte", "a file gone", "no RNG"])
def test_what_is_not_to_be_trusted_stays_behind(local_store: Store, tmp_path: Path, fault: str) -> None:
    commit_steps(local_store, tmp_path, 10)
    context = strand(
        local_store, tmp_path, 10 if fault == "behind the bucket" else 20, "e" if fault == "another config" else "c"
    )
    victim = tmp_path / "scratch" / "0001" / "trainer" / "checkpoint-20" / "optimizer.pt"
    if fault == "a flipped byte":
        victim.write_bytes(b"X" + victim.read_bytes()[1:])
    elif fault == "a file gone":
        victim.unlink()
    elif fault == "no RNG":
        (left,) = sealed(tmp_path / "scratch" / "0001")
        files = {name: facts for name, facts in left.files.items() if name != "rng_state.pth"}
        write_json(seal_path(tmp_path / "scratch" / "0001", 20), replace(left, files=files))
    assert find_stranded(context, newest_commit(local_store, KEYS)) is None


def test_the_best_one_is_not_dropped_for_a_newer_one(local_store: Store, tmp_path: Path) -> None:
    committer = make_committer(local_store, tmp_path, keep=9)
    with committer._changed:
        for step in (10, 20, 30):
            committer.submit(staged(tmp_path, step, best_step=10))
    assert committer.drain(LIMIT_S)
    committer.close()
    assert steps_left(local_store) == [30, 10]


def test_all_ranks_make_a_checkpoint_complete(tmp_path: Path) -> None:
    staging = StagingFolder(tmp_path, ranks=2)
    facts = {"size": 1, "sha256": "0" * 64}
    part = Staged(5, str(tmp_path / TRAINER / "checkpoint-5"), epoch=1.0, tokens=9, world_size=2, threads=1)
    write_json(staged_path(tmp_path, 5, 1), replace(part, files={"rng_state_1.pth": facts}))
    assert staging.collect() == []
    write_json(staged_path(tmp_path, 5, 0), replace(part, files={"rng_state_0.pth": facts}))
    (found,) = staging.collect()
    assert set(found.files) == {"rng_state_0.pth", "rng_state_1.pth"}
    assert staging.collect() == []
    assert staging.collected == [found]


def test_records_survive_fields_of_tomorrow() -> None:
    data = b'{"run_id": "r", "step": 1, "attempt": 1, "files": {}, "invented_tomorrow": 1}'
    assert Commit.from_bytes(data).step == 1
    with pytest.raises(StoreError, match=r"x\.json: not a Commit"):
        Commit.from_bytes(b'{"step": 1}', "x.json")
