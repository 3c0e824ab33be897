"""New connections to the leader, until each has proved that it is a guard of this job.

Anybody may connect: a port scanner, another job's guard, a process that sends nothing or never stops. A connection
gets HELLO_S seconds and HELLO_MOST_BYTES for its first line. Up to MOST_WAITING wait at once, and none holds up others.
"""

import json
import selectors
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from spotune.contracts.shapes import Ranks, build

HELLO_S = 10.0
HELLO_MOST_BYTES = 4096
MOST_WAITING = 256


@dataclass(frozen=True)
class Hello:
    """The first line of a follower: ``hello`` is its node."""

    hello: Ranks
    token: str


@dataclass
class _Visitor:
    connection: socket.socket
    deadline: float
    said: bytearray = field(default_factory=bytearray)


class Handshake:
    """Accepts connections on a listener.

    Args:
        followers: nodes from 1 to this number may come.
    """

    def __init__(
        self, listener: socket.socket, token: str, followers: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._listener, self._token, self._followers, self._clock = listener, token, followers, clock
        self._visitors: dict[int, _Visitor] = {}
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)

    def wait(self, seconds: float) -> list[tuple[int, socket.socket]]:
        """Returns the followers (node, connection) that have said hello meanwhile; waits for them, but not longer."""
        arrived = []
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._listener:
                self._accept()
            elif found := self._read(self._visitors[key.fd]):
                arrived.append(found)
        for visitor in [one for one in self._visitors.values() if self._clock() > one.deadline]:
            self._drop(visitor)
        return arrived

    def close(self) -> None:
        """Ends all connections that have not said hello. The listener stays."""
        for visitor in list(self._visitors.values()):
            self._drop(visitor)
        self._selector.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it has gone again, or no file is left to open
            return
        if len(self._visitors) >= MOST_WAITING:  # a follower comes again
            connection.close()
            return
        connection.setblocking(False)
        self._visitors[connection.fileno()] = _Visitor(connection, self._clock() + HELLO_S)
        self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, visitor: _Visitor) -> tuple[int, socket.socket] | None:
        """Takes what has come; returns the follower once its line is whole. Ends any other connection."""
        try:
            data = visitor.connection.recv(HELLO_MOST_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        visitor.said += data
        is_whole = b"\n" in visitor.said
        if data and not is_whole and len(visitor.said) < HELLO_MOST_BYTES:
            return None
        node = self._node(bytes(visitor.said)) if is_whole else None
        if node is None:
            self._drop(visitor)
            return None
        self._forget(visitor)
        visitor.connection.setblocking(True)
        return node, visitor.connection

    def _node(self, line: bytes) -> int | None:
        """The node of a follower of this job, None for anything else. A follower says no more before it is greeted."""
        try:
            hello = build(Hello, json.loads(line))
        except (ValueError, RecursionError):
            return None
        return hello.hello if hello.token == self._token and hello.hello <= self._followers else None

    def _forget(self, visitor: _Visitor) -> None:
        self._selector.unregister(visitor.connection)
        del self._visitors[visitor.connection.fileno()]

    def _drop(self, visitor: _Visitor) -> None:
        self._forget(visitor)
        with suppress(OSError):
            visitor.connection.close()
