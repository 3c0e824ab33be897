"""The contender of the harness's own tests: ``program.py`` in a folder."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from drill.contender import Account, Hold, Launch
from drill.timeline import Pace

PROGRAM = Path(__file__).with_name("program.py")
STEPS = 12
# About as program.py takes it.
PACE = Pace(start_s=0.2, train_s=0.3, save_s=0.01, end_s=0.22, life_s=0.76, steps=STEPS, saves=6)


class Stand:
    """One run of the program below ``folder``; ``fault``: what it is to get wrong.

    ``lingers``: the stage in which each launch stays until it is lost; "python" for one that never gets to the program.
    """

    noticed: tuple[int, ...] = (75,)

    def __init__(self, folder: Path, fault: str = "", lingers: Sequence[str] = ()) -> None:
        self.folder = folder
        self._lingers = list(lingers)
        self.repairs = 0
        folder.mkdir(parents=True)
        if fault:
            (folder / "fault").write_text(fault)

    def launch(self, disk: Path, hold: Hold | None) -> Launch:
        held = hold.environ if hold else {}
        stage = self._lingers.pop(0) if self._lingers else ""
        command = [sys.executable, str(PROGRAM), str(self.folder / "home"), str(STEPS)]
        if stage == "python":
            command = ["sleep", "600"]
        return Launch(command, {**os.environ, **held, "LINGER": stage})

    def event_log(self, disk: Path, since: float) -> Path | None:
        logs = sorted((self.folder / "bucket").glob("events-*.jsonl"))
        return next((log for log in logs if int(log.stem.partition("-")[2]) / 1e9 >= since), None)

    def repair(self) -> bool:
        (self.folder / "fault").unlink()
        self.repairs += 1
        return True

    def account(self) -> Account:
        result = self.folder / "bucket" / "result"
        return Account(weights=result.read_text() if result.exists() else None, attempts={})
