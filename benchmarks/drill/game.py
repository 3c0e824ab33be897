"""A game day: an undisturbed run for the measure, then the runs of a schedule, several at a time."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from threading import Event

from drill.contender import Contender
from drill.draw import once_more
from drill.machine import DrillError
from drill.play import Play
from drill.played import Played
from drill.schedule import After, Run
from drill.show import Board
from drill.timeline import Measure, pace_of

ROUNDS = 4  # kills that come too late are played in further runs, so often

Make = Callable[[str], Contender]


class Game:
    """Plays runs of one contender. ``make`` gives the contender of a run's name."""

    def __init__(self, make: Make, folder: Path, board: Board, lanes: int = 2) -> None:
        self._make, self._folder, self._board, self._lanes = make, folder, board, lanes
        self._stopped = Event()

    def undisturbed(self) -> Measure:
        """Runs once with nothing taken away. Raises DrillError when that alone does not work."""
        played = self._play("undisturbed", (), None)
        weights = played.account.weights
        if not played.finished or weights is None or len(played.lives) != 1:
            codes = [life.code for life in played.lives]
            raise DrillError(f"the undisturbed run ended with {codes}: {last_line(Path(played.log))} ({played.log})")
        (told,) = played.account.attempts.values() or [[]]
        return Measure(pace_of(played.lives[0], told), weights)

    def play(self, runs: Sequence[Run], measure: Measure) -> list[Played]:
        """All runs of a schedule; random instants that came too late are played in further runs."""
        self._board.expect(sum(not isinstance(kill.when, After) for run in runs for kill in run))
        played: list[Played] = []
        todo = list(runs)
        for number in range(ROUNDS):
            names = [f"r{number}-{index}" for index in range(len(todo))]
            played += self._side_by_side(list(zip(names, todo, strict=True)), measure)
            missed = [kill for one in played[-len(todo) :] for kill in one.missed]
            todo = once_more(missed, max(map(len, runs), default=0) or 1)
            if not todo:
                break
        self._board.close()
        return played

    def _side_by_side(self, named: Sequence[tuple[str, Run]], measure: Measure) -> list[Played]:
        with ThreadPoolExecutor(self._lanes) as lanes:
            futures = [lanes.submit(self._play, name, run, measure) for name, run in named]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:  # Ctrl-C, too
                self._stopped.set()
                lanes.shutdown(cancel_futures=True)
                raise
            return [future.result() for future in futures]

    def _play(self, name: str, run: Run, measure: Measure | None) -> Played:
        self._board.begin(name, len(run))
        pace, weights = (measure.pace, measure.weights) if measure else (None, None)
        tell = partial(self._board.lost, name)
        played = Play(self._make(name), run, pace, self._folder / name, tell, self._stopped).run()
        self._board.end(played, weights)
        return played


def last_line(log: Path) -> str:
    """The last thing that a run said."""
    lines = log.read_text(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "nothing was said")
