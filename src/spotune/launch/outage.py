"""An engine that does not answer for a while: what it runs goes on without it."""

import time
from collections.abc import Callable

from spotune.contracts.errors import InfraError

PATIENCE_S = 300.0


class Outage:
    """Counts from the first error since the engine last answered."""

    def __init__(self, patience_s: float = PATIENCE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._patience_s, self._clock = patience_s, clock
        self._since: float | None = None

    def bear(self, error: InfraError) -> bool:
        """Whether this is the first error of the outage; raises it once patience is over."""
        if self._since is None:
            self._since = self._clock()
            return True
        if self._clock() - self._since > self._patience_s:
            raise error
        return False

    def end(self) -> None:
        """It has answered."""
        self._since = None
