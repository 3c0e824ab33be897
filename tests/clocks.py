"""Clocks that tests move: nothing in a test that uses one depends on the speed of the machine."""

import asyncio
import selectors
from collections.abc import Callable, Mapping
from threading import Event
from typing import Any

from spotune.guard.leaving import Notices
from tests.waiting import LIMIT_S

HORIZON_S = 1e6  # a loop that gets so far goes round for ever


class Clock:
    """Give it where the code takes ``time.time`` or ``time.monotonic``, and ``sleep`` where it takes that.

    Attributes:
        slept: the seconds of every ``sleep``.
    """

    def __init__(self, now: float = 0.0) -> None:
        self.now = now
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.advance(seconds)


class QuickNotices(Notices):
    """Its ``wait`` takes no time but the clock's."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self._sleep = clock.sleep

    def wait(self, seconds: float) -> bool:
        self._sleep(seconds)
        return self.given


class ClockLoop(asyncio.SelectorEventLoop):
    """An event loop with a clock that stands still until ``advance``; real connections work on it."""

    jumps = False

    def __init__(self) -> None:
        super().__init__(_Selector(self))
        self.now = 0.0

    def time(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Moves the clock, from any thread; returns when the loop has seen it."""
        seen = Event()

        def move() -> None:
            self.now += seconds
            self.call_soon(seen.set)

        self.call_soon_threadsafe(move)
        assert seen.wait(LIMIT_S)


class JumpingLoop(ClockLoop):
    """Its clock jumps to the next timer when the loop has nothing else to do. For coroutines without connections."""

    jumps = True


class _Selector(selectors.BaseSelector):
    """Waits for connections, never for time."""

    def __init__(self, loop: ClockLoop) -> None:
        self._loop, self._real = loop, selectors.DefaultSelector()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout <= 0:
            return self._real.select(timeout)
        if not self._loop.jumps:
            return self._real.select(None)  # ``advance`` wakes it
        found = self._real.select(0)
        if not found:
            self._loop.now += timeout
            if self._loop.now > HORIZON_S:
                raise AssertionError("nothing ends this loop")
        return found

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.modify(fileobj, events, data)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._real.get_map()

    def close(self) -> None:
        self._real.close()


class Loops:
    """Makes event loops and keeps them: ``Connection(…, new_loop=loops)``, then ``loops.now``."""

    def __init__(self, kind: Callable[[], ClockLoop] = JumpingLoop) -> None:
        self._kind = kind
        self.made: list[ClockLoop] = []

    def __call__(self) -> asyncio.AbstractEventLoop:
        self.made.append(self._kind())
        return self.made[-1]

    @property
    def now(self) -> float:
        """The time of the newest loop; 0 before there is one."""
        return self.made[-1].now if self.made else 0.0

    def advance(self, seconds: float) -> None:
        self.made[-1].advance(seconds)
