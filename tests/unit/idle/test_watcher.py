"""When the idle watcher holds on and when it lets go."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import spotune
from spotune.idle import NEWEST, Settings, Sign, keep
from tests.clocks import Clock
from tests.waiting import LIMIT_S

SOURCE = Path(spotune.__file__).parent


def settings(home: Path, **more: str) -> Settings:
    told = {"SPOTUNE_IDLE_MINUTES": "10", "SPOTUNE_AUTOSTOP_MINUTES": "2", "SPOTUNE_WATCHER_LOOK_S": "30", **more}
    return Settings.read(told, home)


def state(home: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((home / ".spotune" / "watcher.json").read_text())
    return found


def test_it_lets_go_when_nothing_has_worked_for_the_idle_time(tmp_path: Path) -> None:
    clock = Clock(1000.0)

    def look(now: float) -> list[Sign]:
        return [Sign("job 2 (demo)", now)] if now < 2000 else []

    assert keep(settings(tmp_path), look, clock, clock.sleep) == 0
    assert 2000 + 600 - 30 <= clock.now <= 2000 + 600
    assert state(tmp_path)["verdict"] == "over"
    assert state(tmp_path)["why"] == "idle for 10 min, the last: job 2 (demo)"


def test_what_was_active_lately_counts_from_then(tmp_path: Path) -> None:
    clock = Clock(1000.0)
    keep(settings(tmp_path), lambda now: [Sign("Jupyter kernel python3", 1300.0)], clock, clock.sleep)
    assert clock.now == pytest.approx(1900, abs=30)


def test_it_says_what_holds_and_until_when(tmp_path: Path) -> None:
    seen = []
    clock = Clock(1000.0)

    def sleep(seconds: float) -> None:
        seen.append(state(tmp_path))
        clock.sleep(seconds)

    keep(settings(tmp_path), lambda now: [Sign("GPU 0 at 97 %", now)] if now < 1030 else [], clock, sleep)
    assert seen[0]["verdict"] == "busy"
    assert seen[0]["busy"] == ["GPU 0 at 97 %"]
    assert seen[0]["stops_at"] is None
    assert seen[1]["verdict"] == "idle"
    assert seen[1]["stops_at"] == 1000 + 600 + 120


def test_the_newest_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock(1000.0)

    def sleep(seconds: float) -> None:
        (tmp_path / ".spotune" / NEWEST).write_text("another")
        clock.sleep(seconds)

    assert keep(settings(tmp_path), lambda now: [Sign("work", now)], clock, sleep) == 0
    assert clock.now == 1030
    assert "a newer one" in capsys.readouterr().out


def test_a_mark_that_is_gone_or_cannot_be_read_or_written_is_no_newer_one(tmp_path: Path) -> None:
    clock = Clock(1000.0)
    newest = tmp_path / ".spotune" / NEWEST
    spoil = [newest.unlink, newest.mkdir, newest.rmdir, lambda: newest.write_text("")]

    def sleep(seconds: float) -> None:
        if spoil:
            spoil.pop(0)()
        clock.sleep(seconds)

    assert keep(settings(tmp_path), lambda now: [Sign("VS Code", now)] if now < 2000 else [], clock, sleep) == 0
    assert clock.now >= 2000 + 600 - 30
    clock.now = 1000.0
    newest.unlink()
    newest.mkdir()  # nothing can be written there
    assert keep(settings(tmp_path), lambda now: [], clock, clock.sleep) == 0
    assert clock.now == 1000 + 600


def test_on_slurm_it_can_take_the_allocation_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("scancel", "scontrol"):
        stand_in = tmp_path / name
        stand_in.write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/asked\n')
        stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    clock = Clock(1000.0)
    keep(settings(tmp_path, SLURM_JOB_ID="77", SPOTUNE_WATCHER_ENDS="scancel"), lambda now: [], clock, clock.sleep)
    limit, signal = (tmp_path / "asked").read_text().splitlines()
    assert limit == "scontrol update JobId=77 EndTime=now+3minutes"
    assert signal == "scancel --signal=TERM --full 77"


def pythons() -> list[str]:
    """Other Pythons that are here; at least this one."""
    found = [*Path.home().glob(".pyenv/versions/3.9*/bin/python3.9"), Path("/usr/bin/python3")]
    return [sys.executable, *(str(path) for path in found if path.exists())]


@pytest.mark.parametrize("python", pythons())
def test_it_runs_with_a_plain_python(python: str, tmp_path: Path) -> None:
    environ = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "PYTHONPATH": str(SOURCE.parent),
        "SPOTUNE_IDLE_MINUTES": "0",  # this machine works: it runs tests
    }
    command = [python, "-m", "spotune.idle"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr
    assert "lets this cluster go" in done.stdout


@pytest.mark.parametrize("streams", [">&- 2>&-", "> /dev/full 2> /dev/full", "2>&1 | true"])
@pytest.mark.parametrize(("minutes", "code"), [("0", 0), ("soon", 2)])
def test_it_ends_as_it_must_without_a_log(tmp_path: Path, streams: str, minutes: str, code: int) -> None:
    environ = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(SOURCE.parent)}
    environ |= {"SPOTUNE_IDLE_MINUTES": minutes, "PYTHONIOENCODING": "ascii"}
    line = f"set -o pipefail; {sys.executable} -m spotune.idle {streams}"
    done = subprocess.run(["bash", "-c", line], env=environ, timeout=LIMIT_S, check=False)
    assert done.returncode == code


def test_a_setting_that_cannot_be_is_not_tried_again(tmp_path: Path) -> None:
    environ = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(SOURCE.parent), "SPOTUNE_IDLE_MINUTES": "soon"}
    command = [sys.executable, "-m", "spotune.idle"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert (done.returncode, done.stderr) == (2, "watcher: SPOTUNE_IDLE_MINUTES: 'soon' is not a number, 0 or more\n")


def test_it_is_python_3_9() -> None:
    for path in [SOURCE / "__init__.py", SOURCE / "idle.py"]:
        ast.parse(path.read_text(), feature_version=(3, 9))
