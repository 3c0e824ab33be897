"""How long the bucket's verbs hold out."""

from dataclasses import dataclass, fields
from random import Random


@dataclass(frozen=True)
class Patience:
    """The limits of every verb. The defaults suit somebody who waits at a terminal.

    A verb is one request or many (the parts of a large file). Each is tried again, with growing waits, until it has
    failed for ``deadline_s``; so a large transfer that makes progress never runs into a limit.

    Args:
        request_s: a request may take so long, and a download stay silent so long; then it is given up and tried again.
        deadline_s: a request is tried again for so long; then the verb fails.
        floor_bytes_per_s: what is slower on one connection is hung. A request with a body gets that much more time.
        first_wait_s: the wait before the second try; it doubles from try to try, up to ``longest_wait_s``.
        longest_wait_s: no wait is longer.
        outage_s: once a request has failed for ``deadline_s``, others of the same store fail at once for so long. So
            a verb of many requests, one after the other, waits for a store that is away only once. 0 asks each time.
    """

    request_s: float = 15.0
    deadline_s: float = 60.0
    floor_bytes_per_s: float = 64 * 1024
    first_wait_s: float = 0.2
    longest_wait_s: float = 10.0
    outage_s: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0 and field.name != "outage_s":
                raise ValueError(f"{field.name} must be positive, not {getattr(self, field.name)}")

    def try_s(self, size: int = 0, tries: int = 3) -> float:
        """How long one try may take that moves ``size`` bytes: few links are slow, so the first ones get less."""
        return self.request_s + size / self.floor_bytes_per_s * min(1.0, 2.0 ** (tries - 3))

    def limit_s(self, size: int = 0) -> float:
        """How long all tries of it may take: with time for the first two, and a third at the slowest."""
        return self.deadline_s + 2 * size / self.floor_bytes_per_s

    def wait_s(self, tries: int, rng: Random) -> float:
        """The wait after ``tries`` failed tries; random, so that many machines do not come back at once."""
        longest = min(self.longest_wait_s, self.first_wait_s * 2.0 ** min(tries - 1, 30))
        return longest * rng.uniform(0.5, 1.0)


# Somebody waits at a terminal: a verb answers within 30 s where the store is away, transfers aside.
FOR_VERBS = Patience(request_s=8.0, deadline_s=20.0, outage_s=30.0)
