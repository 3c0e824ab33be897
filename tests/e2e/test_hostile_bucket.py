"""A bucket that others have filled with wrong records, links and odd names: the run ends as if undisturbed, and nothing
outside the bucket and the machine's own folders is touched. On a disk, an S3 server and a GCS emulator."""

import json
import os
from hashlib import sha256
from pathlib import Path
from uuid import uuid4

import pytest

from spotune.core.store import Store
from tests.hostile import hostile_commits
from tests.script import FakeScript, fake_config, undisturbed_weights
from tests.waiting import ended

STEPS = 24


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_config(tmp_path_factory.mktemp("material"), max_steps=STEPS)


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return undisturbed_weights(config, tmp_path_factory.mktemp("undisturbed"))


def contents(folder: Path) -> dict[str, str]:
    return {str(path): path.read_text() for path in folder.rglob("*") if path.is_file()}


def fill(store: Store, script: FakeScript, theirs: Path) -> None:
    """Puts whatever is wrong beside and after the run's own records."""
    keys = script.keys
    key = f"{keys.commits}/{max(script.commits)}.json"
    whole = store.read(key) or b""
    for number, data in enumerate(hostile_commits(whole).values(), 1):
        store.write(keys.commit(1, 10_000 + number), data)
        store.write(f"{keys.checkpoint(10_000 + number, 1)}/scheduler.pt", b"12345")
    store.write(keys.commit(1, 9_000), whole)  # of another step
    store.write(f"{keys.commits}/²-00000001.json", whole)
    store.write(f"{keys.commits}/0001-99999999999999999999.json", whole)
    for name in ("²", "abc", "00001", "9" * 30):
        store.write(f"{keys.attempts}/{name}/attempt.json", b"{}")
    store.write(keys.attempt(1), b'{"spells_s": "x"}')
    store.write(keys.bill(1), b'{"price": 7}')
    store.write(keys.events(1, 0, 99_999), b'[]\n{"t": "x", "event": 7}\n' + b"[" * 100_000)
    store.write(keys.progress, b'{"step": NaN}')
    if store.is_local:
        root = Path(store.url.removeprefix("file://"))
        for name in ("00000004-0001", "odd", "99999999-0001"):
            (root / keys.checkpoints / name).symlink_to(theirs, target_is_directory=True)
        (root / keys.commits / "0001-00020000.json").symlink_to(theirs / "thesis.txt")
        os.mkfifo(root / keys.commits / "0001-00030000.json")
        (root / keys.attempts / "0009").symlink_to(theirs, target_is_directory=True)
        (root / keys.root / "lost").symlink_to(theirs / "none")


@pytest.mark.parametrize(
    "bucket", ["file", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("s3", "gs"))], indirect=True
)
def test_a_run_in_a_hostile_bucket_ends_as_if_undisturbed(
    bucket: str, config: Path, undisturbed: str, tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("all of it")
    before = contents(theirs)
    script = FakeScript(bucket, "hostile", config, tmp_path / "machine")
    first = script.start_and_stop_after(8)
    script.until(lambda: script.commits, first)
    first.kill()
    ended(first)
    step = int(max(script.commits).partition("-")[2])
    fill(script.store, script, theirs)
    script.allow_all()
    assert script.run() == 0, script.log()
    assert f"resumed from the checkpoint of step {step}, attempt 1" in script.log()
    assert "Traceback" not in script.log()
    assert script.weights == undisturbed
    assert contents(theirs) == before
    assert not Path("/tmp/spotune-hostile").exists()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "home") == sorted(
        ["machine", "theirs", *(["bucket"] if script.store.is_local else [])]
    )


def poison(script: FakeScript, commit: str) -> None:
    """Has a commit name an optimizer that wants to run code: whole, with its own size and sha256."""
    attempt, step = map(int, commit.split("-"))
    folder, key = script.keys.checkpoint(step, attempt), script.keys.commit(attempt, step)
    facts = script.json(key)
    script.store.delete([f"{folder}/optimizer.pt"])
    script.store.write(f"{folder}/optimizer.pt", b"poison")
    facts["files"]["optimizer.pt"] = {"size": 6, "sha256": sha256(b"poison").hexdigest()}
    script.store.write(key, json.dumps(facts).encode())


@pytest.mark.parametrize("poisoned", [1, 2])
def test_a_checkpoint_that_cannot_be_loaded_is_passed_over_in_the_same_attempt(
    config: Path, undisturbed: str, tmp_path: Path, poisoned: int
) -> None:
    script = FakeScript(f"file://{tmp_path}/bucket", "poisoned", config, tmp_path / "machine")
    first = script.start()
    script.allow_and_commit(first, 6)
    script.allow_and_commit(first, 12)
    first.kill()
    ended(first)
    steps = sorted(int(name.partition("-")[2]) for name in script.commits)
    for name in sorted(script.commits, reverse=True)[:poisoned]:
        poison(script, name)
    script.allow_all()
    assert script.run() == 0, script.log()
    assert steps == [6, 12]
    for step in steps[-poisoned:]:
        assert f"checkpoint rejected: step {step} of attempt 1: optimizer.pt: poison" in script.log()
    assert ("resumed from the checkpoint of step 6, attempt 1" in script.log()) == (poisoned == 1)
    (restored,) = script.events(2, "restored")
    assert len(restored["rejected"]) == poisoned
    assert script.weights == undisturbed
    assert script.attempts == 2


def test_all_machines_pass_over_a_checkpoint_that_cannot_be_loaded(config: Path, tmp_path: Path) -> None:
    run_id = f"pair-{uuid4().hex[:8]}"  # guards meet at a port that follows from it
    bucket = f"file://{tmp_path}/bucket"
    nodes = [FakeScript(bucket, run_id, config, tmp_path / name) for name in ("leader", "follower")]
    for number, node in enumerate(nodes):
        node.environ |= {
            "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NODE_RANK": str(number),
            "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1",
            "FAKE_WORKER_DIR": str(nodes[0].told),
        }
    leader = nodes[0]
    leader.allow(6)
    first = [node.start() for node in nodes]
    for step in (6, 12):
        leader.allow_and_commit(first[0], step)
    for process in first:
        process.kill()
        ended(process)
    poison(leader, max(leader.commits))
    leader.allow_all()
    assert [ended(node) for node in [node.start() for node in nodes]] == [0, 0], leader.log() + nodes[1].log()
    assert "checkpoint rejected: step 12 of attempt 1: optimizer.pt: poison" in leader.log()
    assert "resumed from the checkpoint of step 6, attempt 1" in leader.log()


@pytest.mark.parametrize("mark", ["failed", "paused", "cancelled"])
@pytest.mark.parametrize("kind", ["empty", "cut", "link"])
def test_a_mark_is_one_by_being_there(config: Path, tmp_path: Path, mark: str, kind: str) -> None:
    script = FakeScript(f"file://{tmp_path}/bucket", "marked", config, tmp_path / "machine")
    key = f"{script.keys.root}/{mark}.json"
    script.store.write(key, b"" if kind == "empty" else b'{"run')
    if kind == "link":
        (tmp_path / "bucket" / key).unlink()
        (tmp_path / "bucket" / key).symlink_to(tmp_path / "nowhere")
    assert script.run() == 1
    assert f"stands still since attempt 0: {key}: " in script.log()
