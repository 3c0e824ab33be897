"""SPOTUNE_HOME on a disk that is full or read-only, for real: one line, nothing half done, and on it goes with room."""

import json
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from click.testing import Result

from spotune.cli import main
from spotune.core.errors import SpotuneError
from spotune.core.keys import Keys
from spotune.core.records import TerminalMarker
from spotune.launch.local.engine import LocalInfra
from spotune.launch.local.supervisor import serve
from tests.commands import cli_runner
from tests.filesystems import file_system, fill, remounted
from tests.unit.cost.cases import run
from tests.unit.launch.test_damage import RUNS, Home
from tests.unit.project import CONFIG

STATES = {"run-a": "CANCELLED", "run-b": "STARTING", "run-c": "PENDING", "run-e": "CANCELLED"}
TRAIN = ("train", "run.yaml", "--name", "run-d", "-y", "-d")
CANCEL, RESUME = ("cancel", "run-c", "-y"), ("resume", "run-e", "-y")
WRITES = (TRAIN, CANCEL, RESUME)
READS = (("queue",), ("queue", "-a"), ("cost", "--since", "9999d"), ("cost", "run-b"), ("logs", "run-a"))

LEFT = {"full": 0, "40 KiB left": 40 << 10, "56 KiB left": 56 << 10, "80 KiB left": 80 << 10}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """Three jobs with their records in the bucket, which is below SPOTUNE_HOME; and a config to train."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPOTUNE_USER", "ada")
    monkeypatch.setenv("SPOTUNE_PYTHON", sys.executable)
    monkeypatch.setattr(LocalInfra, "_wake", lambda self: None)  # the test is the supervisor
    monkeypatch.setattr("spotune.launch.local.engine.TAKE_UP_S", 1.0)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "run.yaml").write_text(CONFIG)
    with file_system(tmp_path / "home", "1m"):
        home = Home(tmp_path)
        for run_id in RUNS:
            home.store.create(Keys(run_id).run, run(run_id=run_id, infra="local").to_bytes())
        submit_and_end(home, "run-e")
        monkeypatch.setattr(LocalInfra, "_wake", lambda self: tick(home))
        yield home
        home.end()


def submit_and_end(home: Home, run_id: str) -> None:
    """A run that can be resumed."""
    assert spotune("train", "run.yaml", "--name", run_id, "-y", "-d").exit_code == 0
    with closing(sqlite3.connect(home.layout.database)) as connection, connection:
        connection.execute("UPDATE jobs SET state = 'CANCELLED', ended_at = 1 WHERE run_id = ?", (run_id,))
    mark = TerminalMarker(run_id=run_id, attempt=0, at=1.7e9, reason="cancelled by ada", exit_code=1)
    home.store.create(Keys(run_id).cancelled, mark.to_bytes())


def tick(home: Home) -> None:
    """The supervisor, which a full disk does not end."""
    with suppress(SpotuneError, OSError):
        home.supervisor.tick()


def take_room(home: Home, how: str) -> None:
    folder = home.layout.home
    if how == "read-only":
        assert remounted(folder, "ro")
    else:
        fill(folder, LEFT[how])


def make_room(home: Home) -> None:
    assert remounted(home.layout.home, "rw")
    (home.layout.home / "ballast").unlink(missing_ok=True)


def spotune(*words: str) -> Result:
    """A verb that does what it is to do, or refuses in one line, after the plan where there is one."""
    done = cli_runner().invoke(main, words, prog_name="spotune")
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
    assert "Traceback" not in done.output + done.stderr
    if done.exit_code:
        assert done.exit_code in (2, 3), done.output + done.stderr
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1 or words == TRAIN, done.stderr
        assert "full" in done.stderr or "No space" in done.stderr or "Read-only" in done.stderr
    return done


def states() -> dict[str, str]:
    rows = json.loads(spotune("queue", "-a", "--format", "json").stdout)
    return {row["run_id"]: row["state"] for row in rows}


@pytest.mark.parametrize("how", [*LEFT, "read-only"])
@pytest.mark.parametrize("words", [*WRITES, *READS], ids=lambda words: " ".join(words[:2]))
def test_a_verb_refuses_in_one_line_and_leaves_nothing_half_done(home: Home, how: str, words: tuple[str, ...]) -> None:
    before = home.store.keys("")
    take_room(home, how)
    done = spotune(*words)
    make_room(home)
    if done.exit_code or words in READS:
        assert states() == STATES
        assert set(home.store.keys("")) - {Keys("run-c").cancelled} == set(
            before
        )  # that wish stands, and is done first
        assert not home.layout.environment("run-d").exists()
        if words in WRITES:
            assert spotune(*words).exit_code == 0
    after = {TRAIN: {"run-d": "PENDING"}, CANCEL: {"run-c": "CANCELLED"}, RESUME: {"run-e": "PENDING"}}
    assert states() == STATES | after.get(words, {})
    assert spotune(*TRAIN).exit_code == 0
    assert states()["run-d"] == "PENDING"


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_a_supervisor_goes_on_once_there_is_room(home: Home, how: str) -> None:
    home.end()  # run-b's machine is gone: there is something to do
    home.now += 60.0
    take_room(home, how)
    home.lines.clear()
    rounds = iter(range(6))

    def sleep(seconds: float) -> None:
        home.now += seconds
        if next(rounds, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        serve(home.layout, 1.0, lambda: home.now, sleep, home.lines.append)
    assert all("\n" not in line for line in home.lines)
    make_room(home)
    for _ in range(3):
        home.now += 60.0
        home.supervisor.tick()
    assert states()["run-b"] in ("STARTING", "RECOVERING")
    assert states().keys() == STATES.keys()
