"""The harness itself: what it says was lost was lost, and what went wrong it says."""

import time
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import psutil
import pytest

from drill.game import Game
from drill.machine import DrillError, Machine
from drill.play import Play
from drill.played import Played
from drill.schedule import STAGES, After, Boundary, Instant, Kill, Run
from drill.scorecard import passed, score
from drill.show import Board
from drill.timeline import replayed
from spotune.core.environment import HOME
from spotune.launch.local.layout import MARKER
from spotune.launch.local.machine import is_live
from tests.unit.drill.stand import PACE, STEPS, Stand
from tests.waiting import LIMIT_S, until

VANISH = Kill("vanish", Instant("train", 0.3))


def play(tmp_path: Path, *kills: Kill, fault: str = "", lingers: Sequence[str] = ()) -> Played:
    stand = Stand(tmp_path / "stand", fault, lingers)
    return Play(stand, kills, PACE, tmp_path / "run", lambda life: None).run()


def living(tmp_path: Path) -> list[psutil.Process]:
    """What is left of this test's machines."""
    found = []
    for process in psutil.process_iter():
        try:
            environ = process.environ()
            is_ours = MARKER in environ and environ.get(HOME, "").startswith(str(tmp_path))
            if is_ours and is_live(process):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_several_kills_and_it_goes_on_to_the_end(tmp_path: Path) -> None:
    played = play(tmp_path, *[Kill("vanish", Instant(stage, 0.5)) for stage in STAGES], lingers=STAGES)
    assert played.finished
    assert [life.code for life in played.lives[:4]] == [-9] * 4
    assert [life.landed for life in played.lives[:4]] == [True] * 4
    assert played.missed == []
    assert played.first_try
    assert living(tmp_path) == []
    assert replayed(played.lives) <= 2 * 4  # it saves on every other step


def test_a_machine_vanishes_with_everything_on_it(tmp_path: Path) -> None:
    stand = Stand(tmp_path / "stand", lingers=["train"])
    launch = stand.launch(tmp_path, None)
    machine = Machine(tmp_path / "disk", launch.command, launch.environ, tmp_path / "log")
    until(lambda: len(machine.members()) > 1, machine.members)
    child = next(process for process in machine.members() if process.pid != machine.process.pid)
    assert child.pid != machine.process.pid
    machine.vanish()
    assert machine.code == -9
    assert not is_live(child)


def test_what_outlives_its_guard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drill.machine.LIFELINE_S", 0.2)
    played = play(tmp_path, Kill("guard", Instant("train", 0.1)), lingers=["train"])
    assert "time.sleep(600)" in played.lives[0].survivors[0]  # the program's child has no lifeline
    assert not played.first_try
    assert living(tmp_path) == []


def test_a_notice_is_waited_for(tmp_path: Path) -> None:
    played = play(tmp_path, Kill("notice", Instant("train", 0.2), notice_s=LIMIT_S), lingers=["train"])
    assert [life.code for life in played.lives] == [75, 0]
    assert played.first_try


def test_a_notice_ends(tmp_path: Path) -> None:
    played = play(tmp_path, Kill("notice", Instant("train", 0.3), notice_s=0.0), fault="deaf", lingers=["train"])
    assert [life.code for life in played.lives] == [-9, 0]


def test_a_notice_before_the_program_can_heed_it(tmp_path: Path) -> None:
    played = play(tmp_path, Kill("notice", Instant("start", 0.0), notice_s=LIMIT_S), lingers=["python"])
    assert [life.code for life in played.lives] == [-15, 0]
    assert played.first_try


def test_a_boundary_is_where_it_dies(tmp_path: Path) -> None:
    played = play(tmp_path, Kill("vanish", Boundary("committed", 2)))
    assert [event["step"] for event in played.lives[0].events if event["event"] == "step"] == [1, 2, 3, 4]
    assert played.first_try


def test_a_boundary_that_is_never_reached_is_said_and_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(DrillError, match="boundary uploading:1 was never reached"):
        play(tmp_path, Kill("vanish", Boundary("uploading")))
    assert living(tmp_path) == []


def test_a_zombie_comes_back(tmp_path: Path) -> None:
    played = play(tmp_path, Kill("zombie", Instant("train", 0.2), wake=0.5), lingers=["train"])
    assert played.finished
    assert played.zombies == [0]  # this program knows no fence
    assert living(tmp_path) == []


def test_a_crash_is_repaired_and_counted(tmp_path: Path) -> None:
    played = play(tmp_path, VANISH, fault="crash")
    assert played.repairs == 1
    assert played.finished
    assert not played.first_try


def test_a_trace_goes_on_while_a_person_repairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It crashes, and hangs once it is repaired; then the time comes at which the machine goes."""

    class BadRepair(Stand):
        def repair(self) -> bool:
            super().repair()
            (self.folder / "fault").write_text("hang")
            return True

    stand = BadRepair(tmp_path / "stand", "crash")

    def now() -> float:
        hangs = stand.repairs and not (stand.folder / "fault").exists()
        return time.time() + (5000.0 if hangs else 0.0)

    monkeypatch.setattr("drill.moment.time", SimpleNamespace(time=now, monotonic=time.monotonic, sleep=time.sleep))
    played = Play(stand, (Kill("vanish", After(4000.0)),), PACE, tmp_path / "run", lambda life: None).run()
    crashed, hung, _ = played.lives
    assert [life.code for life in played.lives] == [1, -9, 0]
    assert hung.kill == Kill("vanish", After(4000.0 - crashed.seconds))


def test_a_kill_after_the_end_is_missed(tmp_path: Path) -> None:
    played = play(tmp_path, Kill("vanish", After(60.0), down_s=1.0))
    assert played.missed
    assert len(played.lives) == 1


def game(tmp_path: Path, fault: str = "") -> tuple[Game, StringIO]:
    said = StringIO()
    make = lambda name: Stand(tmp_path / "stands" / name, fault)  # noqa: E731
    return Game(make, tmp_path / "runs", Board("stand", said)), said


def test_a_game_day_from_measure_to_scorecard(tmp_path: Path) -> None:
    day, said = game(tmp_path)
    measure = day.undisturbed()
    assert measure.pace.steps == STEPS
    assert measure.pace.saves == STEPS // 2
    assert 0 < measure.pace.end_s < measure.pace.life_s
    late: Run = (Kill("vanish", Instant("end", 40.0)),)  # comes too late, in whatever run
    card = score("stand", day.play([(VANISH,), late], measure), measure)
    assert passed(card)
    assert card["kills"] >= 1
    assert card["runs"] >= 3
    assert "bit-identical" in said.getvalue()


class Given(Event):
    """Keeps why each wait for it has ended: True once it was set."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[bool] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.ends.append(super().wait(LIMIT_S if timeout else timeout))
        return self.ends[-1]


def test_one_run_that_cannot_go_on_ends_them_all(tmp_path: Path) -> None:
    day, _ = game(tmp_path)
    measure = day.undisturbed()
    day._stopped = stopped = Given()
    never, later = Kill("vanish", Boundary("uploading")), Kill("vanish", After(600.0), down_s=600.0)
    with pytest.raises(DrillError, match="never reached"):
        day.play([(never,), (Kill("vanish", After(0.1), down_s=600.0), later)], measure)
    assert all(stopped.ends)  # the run between two machines did not wait for the next
    assert living(tmp_path) == []


def test_a_trace_that_takes_nothing_away(tmp_path: Path) -> None:
    day, _ = game(tmp_path)
    measure = day.undisturbed()
    assert [played.finished for played in day.play([()], measure)] == [True]


def test_weights_that_are_not_the_same_fail_it(tmp_path: Path) -> None:
    day, said = game(tmp_path, "diverge")
    measure = day.undisturbed()
    card = score("stand", day.play([(Kill("vanish", Boundary("committed", 2)),)], measure), measure)
    assert (card["finished"], card["bit_identical"]) == (1, 0)
    assert not passed(card)
    assert "NOT IDENTICAL" in said.getvalue()


def test_an_undisturbed_run_that_fails_ends_the_day(tmp_path: Path) -> None:
    day, _ = game(tmp_path, "crash")
    with pytest.raises(DrillError, match="undisturbed run ended with"):
        day.undisturbed()
