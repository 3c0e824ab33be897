"""The calls of a store that are under way, for who watches that they come on."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Call:
    """A verb that has not returned yet; ``moved_bytes``: what it has moved so far."""

    verb: str
    key: str
    moved_bytes: int = 0


class Calls:
    """Thread-safe.

    Attributes:
        moved_bytes: what uploads and downloads have moved so far, those that have returned among them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: dict[int, Call] = {}
        self._began = 0
        self._own = threading.local()
        self.moved_bytes = 0

    @contextmanager
    def call(self, verb: str, key: str) -> Iterator[None]:
        """While this lasts, the calling thread's call is under way."""
        with self._lock:
            self._began += 1
            number = self._own.number = self._began
            self._under_way[number] = Call(verb, key)
        try:
            yield
        finally:
            with self._lock:
                del self._under_way[number]

    def move(self, count: int) -> None:
        """Notes that the calling thread's call has moved so many bytes."""
        with self._lock:
            self.moved_bytes += count
            number = getattr(self._own, "number", 0)
            if call := self._under_way.get(number):
                self._under_way[number] = replace(call, moved_bytes=call.moved_bytes + count)

    def under_way(self) -> dict[int, Call]:
        """The calls under way, by a number that each has for itself."""
        with self._lock:
            return dict(self._under_way)
