"""A commit that is wrong anywhere inside is passed over for the one before, on every store, and harms nothing."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from spotune.core.errors import Misplaced, StoreError
from spotune.core.protocol import write_json
from spotune.core.records import Commit
from spotune.core.store import Store
from spotune.guard.budget import _earlier_usd
from spotune.guard.checkpoints import Retention, seal, seal_path
from spotune.guard.claim import claim_attempt, earlier_uptimes, latest_attempt
from spotune.guard.extras import surviving_logs
from spotune.guard.journal import Node
from spotune.guard.restore import last_event, newest_commit, restore
from spotune.guard.restore_thread import find_stranded
from tests.hostile import hostile_commits
from tests.unit.guard import test_commits
from tests.unit.guard.attempts import FILES, KEYS, RUN, make_checkpoint, make_context
from tests.unit.guard.test_commits import commit_steps


@pytest.fixture(autouse=True)
def close_journals() -> Iterator[None]:
    yield
    while test_commits._open:
        test_commits._open.pop().close()


def contents(store: Store) -> dict[str, bytes | None]:
    return {name: store.read(name) for place in (KEYS.commits, KEYS.checkpoints) for name in store.keys(place)}


@pytest.mark.parametrize(
    "bucket", ["file", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("s3", "gs"))], indirect=True
)
def test_each_is_passed_over(store: Store, tmp_path: Path) -> None:
    commit_steps(store, tmp_path, 10, 20)
    key = KEYS.commit(1, 20)
    before = contents(store)
    home = tmp_path / "home"
    for number, (name, data) in enumerate(hostile_commits(before[key] or b"").items()):
        store.write(key, data)
        newest = newest_commit(store, KEYS)
        assert newest, name
        if number % 10 and not store.is_local:  # records are read by the same code; to download takes its time
            continue
        found = restore(store, KEYS, home / "trainer")
        assert found.commit, name
        assert (found.commit.step, found.checkpoint) == (10, home / "trainer" / "checkpoint-10"), name
        assert [line.startswith("step 20 of attempt 1: ") for line in found.rejected] == [True], name
        assert not any("\n" in line for line in found.rejected), name
    store.write(key, before[key] or b"")
    assert contents(store) == before
    assert sorted(path.name for path in home.iterdir()) == ["trainer"]
    assert sorted(path.name for path in (home / "trainer").iterdir()) == ["checkpoint-10"]
    assert not Path("/tmp/spotune-hostile").exists()


def test_a_commit_of_a_newer_version_is_continued(store: Store, tmp_path: Path) -> None:
    commit_steps(store, tmp_path, 10, 20)
    facts = json.loads(store.read(KEYS.commit(1, 20)) or b"")
    facts |= {"schema_version": 2, "shiny": {"x": [1]}}
    for file in facts["files"].values():
        file["crc32"] = "00000000"
    store.write(KEYS.commit(1, 20), json.dumps(facts).encode())
    found = restore(store, KEYS, tmp_path / "other")
    assert found.commit
    assert (found.commit.step, found.rejected) == (20, [])


@pytest.mark.parametrize("place", ["file", "folder"])
def test_a_link_in_a_checkpoint_is_passed_over(local_store: Store, tmp_path: Path, place: str) -> None:
    """Even if the bytes that it leads to are those that were committed."""
    commit_steps(local_store, tmp_path, 10, 20)
    folder = tmp_path / "bucket" / KEYS.checkpoint(20, 1)
    link = folder if place == "folder" else folder / "scheduler.pt"
    link.rename(tmp_path / "moved")
    link.symlink_to(tmp_path / "moved")
    found = restore(local_store, KEYS, tmp_path / "other")
    assert found.commit
    assert found.commit.step == 10
    assert "a link, not a" in found.rejected[0]


def test_a_link_in_the_place_of_a_checkpoint_is_not_swept(local_store: Store, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.pdf").write_text("all of it")
    commit_steps(local_store, tmp_path, 10, 20, 30)
    checkpoints = tmp_path / "bucket" / KEYS.checkpoints
    for name in ("00000005-0001", "00000006-²", "-", "odd-0001", "00000007-0001-0001"):
        (checkpoints / name).symlink_to(theirs, target_is_directory=True)
    (checkpoints / "00000008-²").mkdir()
    (checkpoints / "00000009-0001").mkdir()
    (checkpoints / "00000009-0001/x").symlink_to(theirs / "thesis.pdf")
    Retention(local_store, KEYS, attempt=2).tidy()
    assert [path.read_text() for path in theirs.iterdir()] == ["all of it"]


def test_pruning_a_checkpoint_that_is_a_link_removes_nothing_of_it(local_store: Store, tmp_path: Path) -> None:
    commit_steps(local_store, tmp_path, 10, 20, 30)
    theirs = tmp_path / "theirs"
    folder = tmp_path / "bucket" / KEYS.checkpoint(10, 1)
    folder.rename(theirs)
    folder.symlink_to(theirs, target_is_directory=True)
    retention = Retention(local_store, KEYS, attempt=1, keep=2)
    with pytest.raises(StoreError, match="a link, not a folder"):
        retention.tidy()
    retention.tidy()
    assert len(list(theirs.rglob("*"))) == len(FILES) + 1


@pytest.mark.parametrize("place", ["attempts", "commits", "checkpoints"])
def test_a_link_in_the_place_of_a_runs_folder_ends_the_attempt(local_store: Store, tmp_path: Path, place: str) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    local_store.write(KEYS.run, RUN.to_bytes())
    (tmp_path / "bucket" / KEYS.root / place).symlink_to(theirs, target_is_directory=True)

    def attempt() -> None:
        claim_attempt(local_store, KEYS, Node.read({}))
        restore(local_store, KEYS, tmp_path / "other")

    with pytest.raises(Misplaced, match=f"{place}: a link, not a folder") as error:
        attempt()
    assert error.value.exit_code == 2
    assert list(theirs.iterdir()) == []


ODD = ["abc", "²", "1", "00001", "0001x", "-001", "0001 ", "9" * 40, "٠٠٠١", "12345678901"]


def test_folders_with_odd_names_claim_nothing(local_store: Store) -> None:
    for name in ODD:
        local_store.write(f"{KEYS.attempts}/{name}/attempt.json", b"{}")
        local_store.write(f"{KEYS.commits}/{name}-00000010.json", b"{}")
        local_store.write(f"{KEYS.revisions}/{name}.json", b"{}")
        local_store.write(f"{KEYS.attempts}/0001/events-0-{name}.jsonl", b"{}")
    assert latest_attempt(local_store, KEYS) == 1
    assert claim_attempt(local_store, KEYS, Node.read({})).attempt == 2
    assert newest_commit(local_store, KEYS) is None


@pytest.mark.parametrize("data", [b"", b"[]", b'{"attempt": "1"}', b"[" * 100_000])
def test_a_claim_that_cannot_be_read_stops_nothing(local_store: Store, data: bytes) -> None:
    local_store.write(KEYS.attempt(1), data)
    assert claim_attempt(local_store, KEYS, Node.read({})).attempt == 2
    assert earlier_uptimes(local_store, KEYS, 1) == []


LINES = [b"7", b"[]", b'{"event": "end", "t": "x"}', b'{"t": NaN, "event": []}', b"[" * 100_000, b"\xff", b'{"t": {}}']


@pytest.mark.parametrize("line", LINES)
def test_events_that_are_none_stop_nothing(local_store: Store, line: bytes) -> None:
    claim = claim_attempt(local_store, KEYS, Node.read({}))
    local_store.write(KEYS.events(1, 0, 0), b'{"event": "log", "step": 3, "loss": 1.0}\n' + line + b'\n{"event": "log"')
    assert isinstance(last_event(local_store, KEYS, 1), dict)
    assert earlier_uptimes(local_store, KEYS, 1) is not None
    assert _earlier_usd(local_store, KEYS, RUN, claim.attempt + 1, 0.0) == 0.0
    assert surviving_logs(local_store, KEYS) == [{"step": 3, "loss": 1.0}]


def test_a_far_attempt_costs_no_requests_for_those_before_it(local_store: Store) -> None:
    local_store.write(KEYS.attempt(999_999), b"{}")
    asked: list[str] = []
    read = local_store.read
    local_store.read = lambda key: asked.append(key) or read(key)  # type: ignore[method-assign, func-returns-value]
    _earlier_usd(local_store, KEYS, RUN, 1_000_000, 0.0)
    assert len(asked) == 2


SEALS = {
    "of another folder": {"checkpoint": "/etc"},
    "that leads out": {"files": {"../../secret": {"size": 1, "sha256": "0" * 64}}},
    "of an absolute name": {"files": {"/etc/passwd": {"size": 1, "sha256": "0" * 64}}},
    "of a billion ranks": {"world_size": 10**9},
    "of text": {"step": "30"},
    "of a list": {"files": []},
}


@pytest.mark.parametrize("wrong", SEALS)
def test_a_seal_that_is_wrong_seals_nothing(local_store: Store, tmp_path: Path, wrong: str) -> None:
    context = make_context(local_store, tmp_path, attempt=2)
    folder = context.scratch / "0001"
    staged = make_checkpoint(folder, 30, config_sha256="c")
    write_json(seal_path(folder, 30), {**vars(staged), "unknown": 1, **SEALS[wrong]})
    write_json(seal_path(folder, 31), ["no", "seal"])
    seal_path(folder, 32).write_bytes(b"[" * 100_000)
    assert find_stranded(context, None) is None


def test_links_in_a_checkpoint_of_this_machine_are_not_uploaded(local_store: Store, tmp_path: Path) -> None:
    context = make_context(local_store, tmp_path, attempt=2)
    folder = context.scratch / "0001"
    whole = seal(folder, make_checkpoint(folder, 30), "c")
    assert find_stranded(context, None) == whole
    (tmp_path / "secret").write_bytes((Path(whole.checkpoint) / "optimizer.pt").read_bytes())
    (Path(whole.checkpoint) / "optimizer.pt").unlink()
    (Path(whole.checkpoint) / "optimizer.pt").symlink_to(tmp_path / "secret")
    assert find_stranded(context, None) is None


def test_our_own_commits_are_commits(local_store: Store, tmp_path: Path) -> None:
    commit_steps(local_store, tmp_path, 10)
    key = KEYS.commit(1, 10)
    assert Commit.from_bytes(local_store.read(key) or b"", key).to_bytes() == local_store.read(key)
    assert os.listdir(tmp_path / "bucket") == ["runs"]
