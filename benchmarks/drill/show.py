"""How far a game day is: one live line on a terminal, a line for every event otherwise."""

import sys
import threading
import time
from typing import TextIO

from drill.played import Life, Played


class Board:
    """Thread-safe. ``title`` stands before every line."""

    def __init__(self, title: str, stream: TextIO = sys.stderr) -> None:
        self._title, self._stream = title, stream
        self._is_terminal = stream.isatty()
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._planned = self._attempts = self._landed = self._ended = self._identical = 0

    def expect(self, kills: int) -> None:
        """So many kills are to come in all; 0: nobody knows."""
        self._planned = kills

    def begin(self, run: str, kills: int) -> None:
        if not self._is_terminal:
            self._line(f"{run}: begins" + (f", {kills} kills at most" if kills else ""))

    def lost(self, run: str, life: Life) -> None:
        """An attempt is over."""
        with self._lock:
            self._attempts += 1
            self._landed += life.landed
        how = f"{life.kill.kind} at {life.kill.when}" if life.kill and life.landed else f"exit code {life.code}"
        if not life.ended_well:
            self._line(f"{run}: NOT WELL: {how}, exit code {life.code}, hung {life.hung}, survivors {life.survivors}")
        elif self._is_terminal:
            self._bar()
        else:
            self._line(f"{run}: {how} after {life.seconds:.1f} s")

    def end(self, played: Played, weights: str | None) -> None:
        """A run is over; ``weights``: what it should have ended with, None when that is to be found out."""
        identical = played.finished and weights in (played.account.weights, None)
        with self._lock:
            self._ended += 1
            self._identical += identical
        word = "finished" if weights is None and identical else "bit-identical" if identical else "NOT IDENTICAL"
        if self._is_terminal and identical:
            self._bar()
        else:
            self._line(f"{played.name}: {word if played.finished else 'NOT FINISHED'}, {len(played.lives)} attempts")

    def close(self) -> None:
        if self._is_terminal:
            self._stream.write("\n")

    def _bar(self) -> None:
        bar = f"{self._landed}"
        if self._planned:
            done = round(20 * min(1.0, self._landed / self._planned))
            bar = f"{'█' * done}{'░' * (20 - done)} {self._landed}/{self._planned}"
        with self._lock:
            self._stream.write(
                f"\r\x1b[K{self._title} {bar} kills · {self._attempts} attempts · "
                f"{self._identical}/{self._ended} runs as undisturbed · {time.monotonic() - self._began:.0f} s"
            )
            self._stream.flush()

    def _line(self, text: str) -> None:
        with self._lock:
            start = "\r\x1b[K" if self._is_terminal else ""
            self._stream.write(f"{start}{self._title} {text}\n")
            self._stream.flush()
