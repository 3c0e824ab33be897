"""The faults of one run stay that run's: all other runs are listed, and one line names the one that is not."""

import json
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from click.testing import Result

from spotune.cli import main
from spotune.core.store import Store
from spotune.launch.engine import Submission
from spotune.launch.local.database import Attempt
from spotune.launch.local.engine import LocalInfra
from spotune.launch.local.layout import Layout
from spotune.launch.local.queue import Queue
from tests.commands import cli_runner
from tests.unit.cost.cases import RUN_ID, T, three_attempts
from tests.unit.cost.test_read import write

NOBODY = 65534
SINCE = ("--since", "9999d")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bucket with two runs, ``good`` and ``bad``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LocalInfra, "_wake", lambda self: None)
    store = Store(f"file://{tmp_path}/home/bucket")
    for name in ("good", "bad"):
        write(store, three_attempts(), run_id=name)
    return tmp_path / "home/bucket/runs"


def spotune(*arguments: str) -> Result:
    return cli_runner().invoke(main, arguments)


@pytest.mark.parametrize("part", ["", "run.json", "attempts", "revisions", "progress.json"])
@pytest.mark.parametrize("how", ["folder", "loop", "file"])
def test_what_stands_in_the_place_of_a_file_or_a_folder(runs: Path, part: str, how: str) -> None:
    path = runs / "bad" / part
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if how == "folder":
        (path / "inner").mkdir(parents=True)
    elif how == "loop":
        path.symlink_to(path.name)
    else:
        path.write_bytes(b"x")
    for words in (["queue", "-a", "--format", "json"], ["cost", *SINCE, "--format", "json"]):
        done = spotune(*words)
        assert done.exit_code == 0, done.stderr + repr(done.exception)
        listed = {row["run_id"] for row in json.loads(done.stdout)}
        assert "good" in listed
        lines = done.stderr.splitlines()
        assert len(lines) <= 1, lines
        assert all("bad" in line for line in lines)
    for by in ("user", "team", "day"):
        done = spotune("cost", *SINCE, "--by", by, "--format", "json")
        assert done.exit_code == 0, done.stderr + repr(done.exception)
        assert json.loads(done.stdout)


def test_a_folder_that_is_removed_while_the_run_trains(tmp_path: Path, runs: Path) -> None:
    layout = Layout(tmp_path / "home")
    layout.make()
    queue = Queue(layout.database)
    queue.create()
    queue.add(Submission("bad", {"run": "x"}, "/", "ada"), f"file://{tmp_path}/home/bucket", at=T)
    attempt = Attempt(run_id="bad", attempt=1, marker="m", boot="b", started_at=T + 10, slots=[0])
    queue.start(attempt)
    queue.run_began(attempt, T + 20, 5.0)
    queue.update_attempt(attempt, ended_at=T + 110)
    shutil.rmtree(runs / "bad")
    done = spotune("queue", "-a", "--format", "json")
    row = next(row for row in json.loads(done.stdout) if row["run_id"] == "bad")
    where = f"file://{tmp_path}/home/bucket"
    assert (row["state"], row["reason"]) == ("RUNNING", f"its folder is gone from {where} (spotune cancel bad)")
    done = spotune("cost", *SINCE, "--format", "json")
    assert done.exit_code == 0, done.stderr + repr(done.exception)
    (row,) = [row for row in json.loads(done.stdout) if row["run_id"] == "bad"]
    assert (row["paid_s"], row["user"]) == (100.0, "ada")
    assert "runs/bad/run.json: missing, its folder was removed" in done.stderr
    done = spotune("cost", "bad", "--format", "json")
    assert done.exit_code == 0, done.stderr + repr(done.exception)
    assert json.loads(done.stdout)["paid_s"] == 100.0


@pytest.mark.parametrize(("mode", "made"), [(0o2775, 0o664), (0o2770, 0o660), (0o755, 0o644), (0o700, 0o600)])
def test_new_files_get_the_buckets_mode(tmp_path: Path, mode: int, made: int) -> None:
    """Whatever the umask, and whatever the mode of the file that is uploaded."""
    root = tmp_path / "bucket"
    root.mkdir()
    root.chmod(mode)
    before = os.umask(0o077)
    try:
        store, weights = Store(f"file://{root}"), tmp_path / "model.safetensors"
        weights.write_bytes(b"w")
        weights.chmod(0o600)
        store.upload(weights, f"runs/{RUN_ID}/output/model.safetensors")
        store.write(f"runs/{RUN_ID}/progress.json", b"{}")
        store.create(f"runs/{RUN_ID}/run.json", b"{}")
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in root.rglob("*") if path.is_file()} == {oct(made)}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize("part", [".", "run.json", "attempts", "attempts/0001/attempt.json", "progress.json"])
def test_a_run_that_others_may_not_read(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """As its owner's umask 077 leaves it."""
    with TemporaryDirectory() as folder:
        store = Store(f"file://{folder}/bucket")
        for name in ("good", "bad"):
            write(store, three_attempts(), run_id=name)
        store.write("runs/bad/progress.json", b"{}")
        for path in (Path(folder), *Path(folder).rglob("*")):
            os.chown(path, NOBODY, NOBODY)
        secret = Path(folder, "bucket/runs/bad", part)
        os.chown(secret, 0, 0)
        secret.chmod(0o700 if secret.is_dir() else 0o600)
        monkeypatch.setenv("SPOTUNE_HOME", f"{folder}/home")
        monkeypatch.setenv("SPOTUNE_BUCKET", store.url)
        monkeypatch.chdir(folder)
        os.seteuid(NOBODY)
        try:
            done = [spotune("queue", "-a", "--format", "json"), spotune("cost", *SINCE, "--format", "json")]
            done.append(spotune("cost", *SINCE, "--by", "user", "--format", "json"))
        finally:
            os.seteuid(0)
        for one in done:
            assert one.exit_code == 0, one.stderr + repr(one.exception)
            assert len(one.stderr.splitlines()) <= 1, one.stderr
            assert all("bad" in line for line in one.stderr.splitlines())
        for one in done[:2]:
            assert "good" in {row["run_id"] for row in json.loads(one.stdout)}
