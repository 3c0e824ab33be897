"""This machine's job queue with its supervisor in the test's own process: it makes a round whenever the test waits.

Jobs are real processes. The clock is the test's: it is hours behind all deadlines until the test moves it.
"""

import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import pytest

from spotune.launch import engine
from spotune.launch.local import engine as local_engine
from spotune.launch.local.engine import LocalInfra
from spotune.launch.local.layout import LocalFolders
from spotune.launch.local.queue import Queue
from spotune.launch.local.supervisor import Supervisor
from tests.processes import end_processes_of
from tests.waiting import LIMIT_S, POLL_S


class LocalMachine:
    """One SPOTUNE_HOME, whose supervisor the test drives.

    Attributes:
        made_at: epoch seconds.
        moved_s: how far the supervisor's clock is ahead of the time of day.
        moves_s: how far each wait moves it.
    """

    opened: ClassVar["LocalMachine"]

    def __init__(self, home: Path) -> None:
        self.home, self.layout = home, LocalFolders(home)
        self.made_at, self.moved_s, self.moves_s = time.time(), 0.0, 0.0
        self.layout.make()
        self.queue = Queue(self.layout.database)
        self.queue.create()
        self._held = ExitStack()
        assert self._held.enter_context(local_engine.only_one(self.layout))  # so that no verb starts a supervisor
        self._lock = threading.Lock()  # `spotune train` waits in a thread
        self._given_up_at = time.monotonic() + 2 * LIMIT_S
        self._supervisors: list[Supervisor] = []
        self.lose_supervisor()

    def clock(self) -> float:
        return time.time() + self.moved_s

    def move(self, seconds: float) -> None:
        self.moved_s += seconds

    def infra(self, environ: Mapping[str, str], slots: int | None = None) -> LocalInfra:
        """What verbs call. Their clock stands still, so none of them runs out of patience."""
        return LocalInfra(self.home, environ, slots, clock=lambda: self.made_at, sleep=self.wait)

    def tick(self) -> None:
        """One round of the supervisor."""
        with self._lock:
            self._supervisors[-1].tick()

    def wait(self, _: float = 0.0) -> None:
        """What happens between two looks of anybody who waits."""
        assert time.monotonic() < self._given_up_at, self.queue.jobs()
        self.move(self.moves_s)
        self.tick()
        time.sleep(POLL_S)

    def lose_supervisor(self) -> None:
        """The next round is made by a supervisor that knows no more than what is on disk."""
        with self._lock:
            self._supervisors.append(Supervisor(self.layout, self.clock, log=lambda line: None))
            self._supervisors[-1].forget_old_secrets()

    def close(self) -> None:
        """Ends all jobs' processes, and whoever still waits."""
        self._given_up_at = 0.0
        end_processes_of(self.home)
        for supervisor in self._supervisors:
            for child in supervisor._children:
                child.wait(LIMIT_S)
        self._held.close()

    def serve_verbs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Verbs that run in this process use this machine."""
        monkeypatch.setitem(engine.BACKENDS, "local", f"{__name__}:open_infra")
        monkeypatch.setattr(LocalMachine, "opened", self, raising=False)


def open_infra(home: Path, environ: Mapping[str, str], slots: int | None = None) -> Any:
    """Opens the infrastructure ``local`` for a verb."""
    assert home == LocalMachine.opened.home
    return LocalMachine.opened.infra(environ, slots)
