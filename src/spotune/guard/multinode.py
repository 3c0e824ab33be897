"""Several machines as one attempt: the guard of node 0 leads, the others follow, over one TCP connection each."""

import hashlib
import json
import queue
import selectors
import socket
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any

from spotune.core.errors import StoreError
from spotune.core.keys import RECORD_MOST_BYTES, Amount, Count, Files, Ranks, Step, build, checked
from spotune.core.protocol import Job, Outcome
from spotune.guard.journal import Machine, say
from spotune.guard.leaving import Notices
from spotune.guard.stalls import Work

# New connections to the leader, until each has proved that it is a guard of this job.
#
# Anybody may connect: a port scanner, another job's guard, a process that sends nothing or never stops. A connection
# gets HELLO_S seconds and HELLO_MOST_BYTES for its first line. Up to MOST_WAITING wait at once, and none holds up
# others.

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


# Several machines as one attempt: the guard of node 0 leads, the others follow, over one TCP connection each.
#
#     follower -> leader   {"hello": node, "token"}  {"part": step, "files"}  {"notice": source, "left_s"}  {"ended": …}
#                          {"work": {cpu_s, moved_bytes, stopped}}  {"stacks": [rank]}
#     leader -> follower   {"welcome": {...}}   {"fetch": key or null}   {"resume": true}   {"upload": step}
#                          {"end": exit code}  {"stacks": true}
#
# A message that the other side does not know is ignored. One that it knows and whose fields are not what they should
# be breaks the connection, with a line that says why.
#
# A connection that breaks is a machine that is gone: the whole attempt ends with it.

GATHER_S = 600.0  # machines of one job may start minutes apart
PART_S = 600.0
STACKS_S = 60.0
MOST_UNREAD = 100  # messages: a side that sends more has to wait until these are read


@dataclass(frozen=True)
class FromFollower:
    """What the messages of a follower hold; a message has the fields of one line above."""

    part: Step = 0
    files: Files = field(default_factory=dict)
    notice: str = ""
    left_s: Amount = 0.0
    work: dict[str, Any] = field(default_factory=dict)
    stacks: list[int] = field(default_factory=list)
    ended: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FromLeader:
    """What the messages of the leader hold."""

    welcome: dict[str, Any] = field(default_factory=dict)
    fetch: str | None = None
    resume: bool = False
    best: str | None = None
    tokens: Count = 0
    other_versions_allowed: bool = False
    upload: Step = 0
    end: Count = 0
    stacks: bool = False


@dataclass(frozen=True)
class Welcome:
    """What a follower needs to start its ranks; ``sample_s`` 0: the watchdog is off."""

    job: dict[str, Any]
    master_port: Count
    environ: dict[str, str]
    sample_s: Amount = 0.0


_TOGETHER = {"part": "files", "notice": "left_s", "fetch": "tokens"}


def gang_port(run_id: str) -> int:
    """Where the leader listens: the same on all nodes without having spoken."""
    return 21000 + zlib.crc32(run_id.encode()) % 8000


def gang_token(run_id: str, task_id: str) -> str:
    """What tells this job's guards from another's."""
    return hashlib.sha256(f"{run_id}/{task_id}".encode()).hexdigest()


class Line:
    """One connection, as a sender and a queue of what came in; None in the queue: it is gone.

    Args:
        kind: the messages of the other side: ``FromFollower`` or ``FromLeader``.
    """

    def __init__(self, connection: socket.socket, kind: type) -> None:
        self._socket, self._kind = connection, kind
        self._lock = threading.Lock()
        self.inbox: queue.Queue[dict[str, Any] | None] = queue.Queue(MOST_UNREAD)
        self.gone = False
        threading.Thread(target=self._read, name="gang", daemon=True).start()

    def _read(self) -> None:
        try:
            with self._socket.makefile("rb") as lines:
                while line := lines.readline(RECORD_MOST_BYTES):
                    self.inbox.put(read_message(line, self._kind))
        except OSError:
            pass  # a broken connection means the same as one that is closed
        except (ValueError, RecursionError) as error:
            say(f"a connection to another machine of this job is ended: {str(error)[:200]}")
        self.gone = True
        self.inbox.put(None)

    def next(self, seconds: float) -> dict[str, Any] | None:
        """The next message, None when none came in time or the connection is gone."""
        try:
            return self.inbox.get(timeout=seconds)
        except queue.Empty:
            return None

    def send(self, **message: Any) -> None:
        """Sends one message; to a machine that is gone it is lost, as the reader will say."""
        try:
            with self._lock:
                self._socket.sendall((json.dumps(message) + "\n").encode())
        except OSError:
            self.gone = True

    def close(self) -> None:
        """Ends the connection at once: the reader's file would hold it open until the process ends."""
        with suppress(OSError):  # the other side has gone already
            self._socket.shutdown(socket.SHUT_WR)
        self._socket.close()


def read_message(line: bytes, kind: Any) -> dict[str, Any]:
    """Returns the fields of a message that are known. Raises ValueError or RecursionError for no such message."""
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError("not a JSON object")
    names = message.keys() & {one.name for one in fields(kind)}
    for name, other in _TOGETHER.items():
        if name in names and other not in names:
            raise ValueError(f"{other}: missing")
    found = checked(kind, message)
    for name, inner in (("work", Work), ("ended", Outcome)):
        if name in found:
            found[name] = build(inner, found[name])
    return found


class Leader:
    """Node 0's side. Thread-safe: the committer waits for parts while the attempt looks at the rest."""

    def __init__(self, run_id: str, machine: Machine, token: str) -> None:
        self._followers = machine.num_nodes - 1
        self._token = token
        self._lines: dict[int, Line] = {}
        self._changed = threading.Condition()
        self._parts: dict[tuple[int, int], dict[str, Any]] = {}
        self.outcomes: dict[int, Outcome] = {}
        self._works: dict[int, Work] = {}
        self._has_stacks: set[int] = set()
        self.notice: tuple[str, float] | None = None
        self._listener = socket.create_server(("", gang_port(run_id)), reuse_port=False) if self._followers else None

    @property
    def lost(self) -> bool:
        """Whether a follower is gone that had not said how its ranks ended."""
        return any(line.gone and node not in self.outcomes for node, line in self._lines.items())

    def gather(self, notices: Notices, **welcome: Any) -> None:
        """Waits for all followers and greets them; raises StoreError (worth another machine) when one stays away."""
        if self._listener:
            handshake = Handshake(self._listener, self._token, self._followers)
            try:
                self._wait_for_followers(handshake, notices)
            finally:
                handshake.close()
                self._listener.close()  # who comes from now on is turned away
        for node, line in self._lines.items():
            line.send(welcome=welcome)
            threading.Thread(target=self._listen, args=(node, line), name=f"node {node}", daemon=True).start()

    def _wait_for_followers(self, handshake: Handshake, notices: Notices) -> None:
        deadline = time.monotonic() + GATHER_S
        while len(self._lines) < self._followers:
            for node, connection in handshake.wait(1.0):
                if node in self._lines:  # it has come again: its first connection is broken
                    self._lines[node].close()
                self._lines[node] = Line(connection, FromFollower)
            missing = self._followers - len(self._lines)
            if missing and (time.monotonic() >= deadline or notices.given):
                raise StoreError(f"{missing} of {self._followers + 1} machines have not come")

    def _listen(self, node: int, line: Line) -> None:
        while (message := line.inbox.get()) is not None:
            with self._changed:
                if "part" in message:
                    self._parts[node, message["part"]] = message["files"]
                if "notice" in message:
                    self.notice = self.notice or (f"{message['notice']} on node {node}", message["left_s"])
                if "work" in message:
                    self._works[node] = message["work"]
                if "stacks" in message:
                    self._has_stacks.add(node)
                if "ended" in message:
                    self.outcomes[node] = message["ended"]
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def broadcast(self, **message: Any) -> None:
        for line in self._lines.values():
            line.send(**message)

    def parts(self, step: int) -> dict[str, Any]:
        """Has all followers upload their files of a checkpoint; returns them. Raises StoreError if one is gone."""
        self.broadcast(upload=step)
        with self._changed:
            nodes = list(self._lines)
            done = self._changed.wait_for(
                lambda: all((node, step) in self._parts for node in nodes) or self.lost, timeout=PART_S
            )
            if not done or not all((node, step) in self._parts for node in nodes):
                raise StoreError(f"step {step}: not all machines have uploaded their part")
            return {name: facts for node in nodes for name, facts in self._parts[node, step].items()}

    @property
    def works(self) -> list[Work]:
        """What the followers' ranks have done, as each said last."""
        with self._changed:
            return list(self._works.values())

    def ask_for_stacks(self) -> None:
        """Has all followers upload the stacks of their ranks."""
        self.broadcast(stacks=True)

    def wait_for_stacks(self, seconds: float = STACKS_S) -> None:
        """Waits until the followers have done so, those that are still there, or the time is over."""
        with self._changed:
            self._changed.wait_for(
                lambda: all(line.gone or node in self._has_stacks for node, line in self._lines.items()),
                timeout=seconds,
            )

    def wait_for_outcomes(self, seconds: float) -> list[Outcome]:
        """How the followers' ranks ended, of those that say so in time."""
        with self._changed:
            self._changed.wait_for(lambda: len(self.outcomes) == len(self._lines) or self.lost, timeout=seconds)
            return list(self.outcomes.values())

    def close(self, exit_code: int) -> None:
        """Tells all followers how the attempt ended."""
        self.broadcast(end=exit_code)
        for line in self._lines.values():
            line.close()
        if self._listener:
            self._listener.close()


def join(run_id: str, machine: Machine, token: str) -> tuple[Line, Job, Welcome]:
    """A follower's connection, its job and the leader's welcome; raises StoreError when there is no leader in time.

    What answers with anything else is not the leader, and is asked again.
    """
    deadline = time.monotonic() + GATHER_S
    while time.monotonic() < deadline:
        try:
            connection = socket.create_connection((machine.node_ips[0], gang_port(run_id)), timeout=5)
        except OSError:
            time.sleep(0.5)
            continue
        connection.settimeout(None)
        line = Line(connection, FromLeader)
        line.send(hello=machine.node_rank, token=token)
        message = line.next(GATHER_S) or {}  # the leader waits for all others first
        with suppress(ValueError):
            welcome = build(Welcome, message.get("welcome"))
            return line, build(Job, welcome.job), welcome
        line.close()
        time.sleep(0.5)
    raise StoreError(f"the leader on {machine.node_ips[0]} did not answer within {GATHER_S:.0f} s")
