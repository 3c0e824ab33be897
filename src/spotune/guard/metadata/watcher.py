"""The one thread that asks for notices. A service that fails is named once, and asked on ever more slowly."""

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from spotune.guard.metadata.source import NoAnswer, Source
from spotune.guard.notices import Notices
from spotune.guard.say import say

# No longer: a service that comes back may have a notice of 30 s by then.
SLOWEST_S = 15.0


class Watcher:
    """Asks all sources, as a context manager; without sources there is no thread."""

    def __init__(self, sources: Sequence[Source], notices: Notices, clock: Callable[[], float] = time.time) -> None:
        self._notices, self._clock = notices, clock
        self._due = dict.fromkeys(sources, 0.0)  # monotonic
        self._failures = dict.fromkeys(sources, 0)
        self._named: set[Source] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="notices", daemon=True)

    def __enter__(self) -> "Watcher":
        if self._due:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Does not wait for a request that is under way."""
        self._stop.set()

    def _work(self) -> None:
        while self._due:
            source = min(self._due, key=self._due.__getitem__)
            if self._stop.wait(max(self._due[source] - time.monotonic(), 0.0)):
                return
            pause_s = self.ask(source)
            if pause_s is None:
                del self._due[source]
            else:
                self._due[source] = time.monotonic() + pause_s

    def ask(self, source: Source) -> float | None:
        """Asks once; returns seconds until it is to be asked again, None when it has given its notice."""
        try:
            warned = source.look(self._clock())
        except NoAnswer as fault:
            if source not in self._named:
                self._named.add(source)
                say(f"{source.name}: {fault}; asked again until it answers")
            self._failures[source] += 1
            return min(source.every_s * (1 << min(self._failures[source], 8)), SLOWEST_S)
        self._failures[source] = 0
        if warned is None:
            return source.every_s
        self._notices.give(source.name, warned.grace_s)
        return None
