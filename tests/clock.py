"""A clock that stands until a test moves it, and notices that wait by that clock."""

from spotune.guard.notices import Notices


class Clock:
    """Give it where the code takes ``time.time`` or ``time.monotonic``, and ``sleep`` where it takes that.

    Attributes:
        slept: the seconds of every ``sleep``.
    """

    def __init__(self, now: float = 1000.0) -> None:
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
