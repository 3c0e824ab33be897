"""One upload at a time, in the background; of those waiting the newest wins.

A fault of the store is tried again with growing pauses for as long as nothing newer waits; training goes on.
"""

import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from spotune.contracts.errors import Fenced, Misplaced, SpotuneError, StoreError
from spotune.contracts.exchange import Staged
from spotune.guard.say import say

PAUSES_S = (1.0, 4.0, 15.0, 60.0)


class Uploader:
    """The thread behind ``submit``.

    Args:
        work: uploads a local checkpoint, once; raises Fenced, another SpotuneError or OSError.
        pauses_s: how long to wait after the first, second, … failure in a row; the last one from then on.

    Attributes:
        fenced: set for good when a later attempt owns the run.
        error: the last failure, None once an upload has succeeded.
    """

    def __init__(
        self,
        work: Callable[[Staged], None],
        clock: Callable[[], float] = time.monotonic,
        pauses_s: Sequence[float] = PAUSES_S,
    ) -> None:
        self._work, self._clock, self._pauses_s = work, clock, pauses_s
        self._waiting: list[Staged] = []
        self._current: Staged | None = None
        self._began_at = 0.0
        self._closed = False
        self._is_blocked = False
        self._changed = threading.Condition()
        self._failing_since: float | None = None
        self.fenced: Fenced | None = None
        self.error: SpotuneError | None = None
        self._thread = threading.Thread(target=self._run, name="uploader", daemon=True)
        self._thread.start()

    @property
    def away_s(self) -> float:
        """For how long the store has not taken anything, seconds; 0 when all is well."""
        since = self._failing_since
        return 0.0 if since is None else self._clock() - since

    @property
    def under_way(self) -> tuple[int, float] | None:
        """(step, seconds so far) of the upload that runs, None when there is none."""
        current = self._current
        return None if current is None else (current.step, self._clock() - self._began_at)

    def submit(self, staged: Staged) -> None:
        """Hands over a complete local checkpoint. One that still waits is dropped for it, but for the best one."""
        with self._changed:
            dropped = [other for other in self._waiting if other.step != staged.best_step]
            self._waiting = [*(other for other in self._waiting if other not in dropped), staged]
            self._is_blocked = False
            self._changed.notify_all()
        for other in dropped:
            shutil.rmtree(Path(other.checkpoint), ignore_errors=True)

    def drain(self, timeout_s: float | None = None) -> bool:
        """Waits until nothing is waiting or under way; returns whether the last upload succeeded.

        Nor for one that is tried again in vain: what is in its way only people remove.
        """
        with self._changed:
            done = self._changed.wait_for(lambda: self._is_blocked or not (self._waiting or self._current), timeout_s)
            return done and self.error is None and self.fenced is None

    def close(self, timeout_s: float | None = None) -> None:
        """Ends the thread once the upload under way has ended, well or not; what waits is left as it is.

        ``timeout_s``: for how long to wait for that.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                self._current, self._began_at = self._waiting.pop(0), self._clock()
            try:
                self._try_until_newer(self._current)
            finally:
                with self._changed:
                    self._current = None
                    self._changed.notify_all()

    def _try_until_newer(self, staged: Staged) -> None:
        failures = 0
        while not self.fenced:
            began_at, self._is_blocked = self._clock(), False
            try:
                self._work(staged)
                self.error = self._failing_since = None
                return
            except Fenced as fenced:
                self.fenced = fenced
                return
            except (SpotuneError, OSError) as error:
                self.error = error if isinstance(error, SpotuneError) else StoreError(str(error))
                self._failing_since = self._failing_since or began_at
                say(f"step {staged.step} is not committed yet: {self.error}")
            pause_s = self._pauses_s[min(failures, len(self._pauses_s) - 1)]
            failures += 1
            with self._changed:
                self._is_blocked = isinstance(self.error, Misplaced) and not self._is_superseded(staged)
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._is_superseded(staged) or self._closed, pause_s)
                if self._is_superseded(staged) or self._closed:
                    return

    def _is_superseded(self, staged: Staged) -> bool:
        return any(other.best_step != staged.step for other in self._waiting)
