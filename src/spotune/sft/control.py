"""What the guard asks for while training runs: ``control.json``, looked at on every step's end."""

from dataclasses import dataclass
from pathlib import Path

from spotune.core.protocol import CONTROL, read_json


@dataclass(frozen=True)
class Wish:
    """What is asked for at a step's end; ``busy``: a checkpoint is still being written."""

    stop: bool = False
    save: bool = False
    busy: bool = False


class Control:
    """Reads ``control.json`` when it has changed: one ``stat`` a step otherwise."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / CONTROL
        self._seen = (0, 0)
        self._stop = False
        self._asked = 0  # the guard's counter: a save is owed for every increase
        self._answered = 0

    def look(self) -> Wish:
        """What is asked for now; ``save`` stays true until ``answered`` is called."""
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            return Wish()
        stamp = (stat.st_mtime_ns, stat.st_ino)
        if stamp != self._seen:
            self._seen = stamp
            asked = read_json(self._path) or {}
            self._stop = bool(asked.get("stop"))
            self._asked = int(asked.get("save") or 0)
        return Wish(stop=self._stop, save=self._asked > self._answered)

    def answered(self) -> None:
        """A checkpoint was made after all that has been asked for so far."""
        self._answered = self._asked
