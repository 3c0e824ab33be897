"""What a machine does and leaves behind when it ends before an attempt is claimed."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from spotune.core.keys import Keys
from spotune.core.records import TerminalMarker
from spotune.core.store import Store
from spotune.guard import main as guard
from tests.filesystems import file_system, remounted

KEYS = Keys("a-run")
MARK = TerminalMarker(run_id="a-run", attempt=3, at=0, reason="cancelled by u", exit_code=1, step=7)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPOTUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SPOTUNE_RUN_ID", KEYS.run_id)
    monkeypatch.setenv("SPOTUNE_BUCKET", f"file://{tmp_path}/bucket")
    return Store(f"file://{tmp_path}/bucket")


@pytest.mark.parametrize(
    ("argv", "ranks", "reason"),
    [
        (["none.yaml"], "", "none.yaml: no such file"),
        (["none.yaml", "--set"], "", "command line: "),
        (["none.yaml"], "many", "num_processes: many ranks"),
    ],
)
def test_bad_input_bars_the_net_of_restarts(
    store: Store, monkeypatch: pytest.MonkeyPatch, argv: list[str], ranks: str, reason: str
) -> None:
    monkeypatch.setenv("SPOTUNE_NUM_PROCESSES", ranks)
    assert guard.main(argv) == 2
    assert store.keys("runs") == []  # by hand it is put right and started again
    monkeypatch.setenv("SKYPILOT_MANAGED_JOB_ID", "7")
    assert guard.main(argv) == 2
    mark = TerminalMarker.from_bytes(store.read(KEYS.failed) or b"")
    assert (mark.attempt, mark.exit_code) == (0, 2)
    assert mark.reason.startswith(reason)
    monkeypatch.setenv("SPOTUNE_NUM_PROCESSES", "")
    assert guard.main(["none.yaml"]) == 2
    assert store.keys("runs") == [KEYS.failed]


def test_a_clock_that_is_not_set_is_this_machines_fault(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(time, "time", lambda: 5.0)
    assert guard.main(["none.yaml"]) == 75
    monkeypatch.setenv("SKYPILOT_MANAGED_JOB_ID", "7")
    assert guard.main(["none.yaml"]) == 1
    assert capsys.readouterr().err == "this machine: its clock is set before the year 2000\n" * 2
    assert store.keys("runs") == []


def test_a_bucket_that_was_never_reached_is_an_error_that_is_counted(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """75 would be repeated without end: SkyPilot does not count it, and nobody can write that it was."""
    monkeypatch.setenv("SPOTUNE_BUCKET", "s3://nowhere/x")
    monkeypatch.setenv("SPOTUNE_BUCKET_PATIENCE", "2s")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    assert guard.main(["none.yaml"]) == 75
    monkeypatch.setenv("SKYPILOT_MANAGED_JOB_ID", "7")
    capsys.readouterr()
    assert guard.main(["none.yaml"]) == 1
    assert capsys.readouterr().err.startswith("s3://nowhere/x/runs/a-run/")


@pytest.mark.parametrize("key", [KEYS.failed, KEYS.cancelled, KEYS.paused])
def test_a_run_that_was_ended_does_not_start_again(store: Store, capsys: pytest.CaptureFixture[str], key: str) -> None:
    """A machine may come up after ``cancel``: it leaves at once, with the mark's exit code, and claims nothing."""
    mark = replace(MARK, exit_code=76 if key == KEYS.paused else 1)
    store.write(key, mark.to_bytes())
    assert guard.main(["none.yaml"]) == mark.exit_code
    assert store.keys("runs") == [key]
    assert "a-run stands still since attempt 3: cancelled by u (spotune resume a-run)" in capsys.readouterr().err


def test_a_disk_that_fails_before_anything_is_recorded_is_the_machines(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "run.yaml").write_text("model_name_or_path: a/b\ndata: [{source: data.jsonl}]\n")
    with file_system(tmp_path / "home") as home:
        assert remounted(home, "ro")
        assert guard.main(["run.yaml"]) == 75
        assert capsys.readouterr().err.splitlines()[-1].startswith("this machine: OSError: [Errno 30] Read-only file")
        assert store.read(KEYS.failed) is None
        monkeypatch.setenv("SKYPILOT_MANAGED_JOB_ID", "7")
        assert guard.main(["run.yaml"]) == 1
