"""Several machines as one attempt: node 0's guard leads, the others follow, over one TCP connection each.

    follower -> leader   {"hello": node, "token"}  {"part": step, "files"}  {"notice": source, "left_s"}  {"ended": …}
                         {"work": {cpu_s, moved_bytes, stopped}}  {"stacks": [rank]}
    leader -> follower   {"welcome": {...}}   {"fetch": key or null}   {"resume": true}   {"upload": step}
                         {"end": exit code}  {"stacks": true}

A side ignores unknown messages. A known message with wrong fields breaks the connection, and a line says why. A broken
connection is a machine that is gone: the whole attempt ends.
"""

import hashlib
import json
import queue
import selectors
import socket
import threading
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any

from spotune.core.errors import StoreError
from spotune.core.keys import RECORD_MOST_BYTES, Amount, Count, Files, Ranks, Step, build, checked
from spotune.core.protocol import Outcome, WorkerJob
from spotune.guard.journal import Node, log
from spotune.guard.leaving import Notices
from spotune.guard.ranks import Work

HELLO_S = 10.0
HELLO_MOST_BYTES = 4096
MOST_WAITING = 256
GATHER_S = 600.0  # machines of one job may start minutes apart
PART_S = 600.0
MOST_UNREAD = 100  # messages: then the sender has to wait


@dataclass(frozen=True)
class Hello:
    """The first line of a follower: ``hello`` is its node."""

    hello: Ranks
    token: str


@dataclass
class _Visitor:
    connection: socket.socket
    deadline: float
    received: bytearray = field(default_factory=bytearray)


class Handshake:
    """Accepts connections on a listener and finds the guards of this job among them: nodes 1 to ``followers``.

    Anybody may connect: a port scanner, another job's guard, a process that sends nothing or never stops. A connection
    gets HELLO_S seconds and HELLO_MOST_BYTES for its first line. Up to MOST_WAITING wait at once; none delays others.
    """

    def __init__(self, listener: socket.socket, token: str, followers: int) -> None:
        self._listener, self._token, self._followers = listener, token, followers
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)

    def wait(self, seconds: float) -> list[tuple[int, socket.socket]]:
        """Returns the followers (node, connection) that say hello within ``seconds``, as soon as one does."""
        arrived = []
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._listener:
                self._accept()
            elif found := self._read(key.data):
                arrived.append(found)
        for visitor in self._visitors():
            if time.monotonic() > visitor.deadline:
                self._drop(visitor)
        return arrived

    def close(self) -> None:
        """Closes all connections that have not said hello. Leaves the listener open."""
        for visitor in self._visitors():
            self._drop(visitor)
        self._selector.close()

    def _visitors(self) -> list[_Visitor]:
        return [key.data for key in self._selector.get_map().values() if key.fileobj is not self._listener]

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # the visitor is gone, or no file is left to open
            return
        if len(self._visitors()) >= MOST_WAITING:  # a follower comes again
            connection.close()
            return
        connection.setblocking(False)
        self._selector.register(connection, selectors.EVENT_READ, _Visitor(connection, time.monotonic() + HELLO_S))

    def _read(self, visitor: _Visitor) -> tuple[int, socket.socket] | None:
        """Reads what has arrived; returns the follower once its line is whole. Closes any other connection."""
        try:
            data = visitor.connection.recv(HELLO_MOST_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        visitor.received += data
        is_whole = b"\n" in visitor.received
        if data and not is_whole and len(visitor.received) < HELLO_MOST_BYTES:
            return None
        with suppress(ValueError, RecursionError):  # a follower sends no more than a line until it is welcomed
            hello = build(Hello, json.loads(visitor.received) if is_whole else None)
            if hello.token == self._token and hello.hello <= self._followers:
                self._selector.unregister(visitor.connection)
                visitor.connection.setblocking(True)
                return hello.hello, visitor.connection
        self._drop(visitor)
        return None

    def _drop(self, visitor: _Visitor) -> None:
        self._selector.unregister(visitor.connection)
        with suppress(OSError):
            visitor.connection.close()


@dataclass(frozen=True)
class FromFollower:
    """The fields of a follower's messages; a message has those of one pair of braces above."""

    part: Step = 0
    files: Files = field(default_factory=dict)
    notice: str = ""
    left_s: Amount = 0.0
    work: dict[str, Any] = field(default_factory=dict)
    stacks: list[int] = field(default_factory=list)
    ended: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FromLeader:
    """The fields of the leader's messages."""

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


def leader_port(run_id: str) -> int:
    """Returns the leader's port, which all nodes know without talking."""
    return 21000 + zlib.crc32(run_id.encode()) % 8000


def job_token(run_id: str, environ: Mapping[str, str]) -> str:
    """Returns the token by which the guards of one job know each other."""
    return hashlib.sha256(f"{run_id}/{environ.get('SKYPILOT_TASK_ID', '')}".encode()).hexdigest()


class Line:
    """One connection: a sender, and a queue of the other side's messages (``kind``), None once the connection ends."""

    def __init__(self, connection: socket.socket, kind: type) -> None:
        self._socket, self._kind = connection, kind
        self._lock = threading.Lock()
        self.inbox: queue.Queue[dict[str, Any] | None] = queue.Queue(MOST_UNREAD)
        self.gone = False
        threading.Thread(target=self._read, name="multinode", daemon=True).start()

    def _read(self) -> None:
        try:
            with self._socket.makefile("rb") as lines:
                while line := lines.readline(RECORD_MOST_BYTES):
                    self.inbox.put(read_message(line, self._kind))
        except OSError:
            pass  # broken means the same as closed
        except (ValueError, RecursionError) as error:
            log(f"a connection to another machine of this job is ended: {str(error)[:200]}")
        self.gone = True
        self.inbox.put(None)

    def next(self, seconds: float) -> dict[str, Any] | None:
        """Returns the next message, None if none comes in time or the connection is gone."""
        try:
            return self.inbox.get(timeout=seconds)
        except queue.Empty:
            return None

    def send(self, **message: Any) -> None:
        """Sends one message. If the machine is gone the message is lost; the reader notices."""
        try:
            with self._lock:
                self._socket.sendall((json.dumps(message) + "\n").encode())
        except OSError:
            self.gone = True

    def close(self) -> None:
        """Closes the connection at once: the reader's file would hold it open until the process ends."""
        with suppress(OSError):  # the other side is gone already
            self._socket.shutdown(socket.SHUT_WR)
        self._socket.close()


def read_message(line: bytes, kind: Any) -> dict[str, Any]:
    """Returns the known fields of a message. Raises ValueError or RecursionError for a malformed one."""
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError("not a JSON object")
    names = message.keys() & {one.name for one in fields(kind)}
    for name, other in (("part", "files"), ("notice", "left_s"), ("fetch", "tokens")):
        if name in names and other not in names:
            raise ValueError(f"{other}: missing")
    found = checked(kind, message)
    for name, inner in (("work", Work), ("ended", Outcome)):
        if name in found:
            found[name] = build(inner, found[name])
    return found


class Leader:
    """Node 0's side. Thread-safe: the committer waits for parts while the attempt reads the rest."""

    def __init__(self, run_id: str, machine: Node, token: str) -> None:
        self._followers, self._token = machine.num_nodes - 1, token
        self._lines: dict[int, Line] = {}
        self._changed = threading.Condition()
        self._parts: dict[tuple[int, int], dict[str, Any]] = {}
        self.outcomes: dict[int, Outcome] = {}
        self._works: dict[int, Work] = {}
        self._has_stacks: set[int] = set()
        self.notice: tuple[str, float] | None = None
        self._listener = socket.create_server(("", leader_port(run_id)), reuse_port=False) if self._followers else None

    @property
    def lost(self) -> bool:
        """Whether a follower is gone that had not reported its ranks' outcome."""
        return any(line.gone and node not in self.outcomes for node, line in self._lines.items())

    def gather(self, notices: Notices, **welcome: Any) -> None:
        """Waits for all followers and welcomes them; raises StoreError (worth another machine) if one stays away."""
        if self._listener:
            handshake = Handshake(self._listener, self._token, self._followers)
            deadline = time.monotonic() + GATHER_S
            try:
                while len(self._lines) < self._followers:
                    for node, connection in handshake.wait(1.0):
                        if node in self._lines:  # it connected again: its first connection is broken
                            self._lines[node].close()
                        self._lines[node] = Line(connection, FromFollower)
                    missing = self._followers - len(self._lines)
                    if missing and (time.monotonic() >= deadline or notices.given):
                        raise StoreError(f"{missing} of {self._followers + 1} machines have not come")
            finally:
                handshake.close()
                self._listener.close()  # later connections are refused
        for node, line in self._lines.items():
            line.send(welcome=welcome)
            threading.Thread(target=self._listen, args=(node, line), name=f"node {node}", daemon=True).start()

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
        """Has all followers upload their files of a checkpoint; returns the facts. Raises StoreError if one is gone."""
        self.broadcast(upload=step)
        with self._changed:
            nodes = list(self._lines)
            wanted = {(node, step) for node in nodes}
            self._changed.wait_for(lambda: wanted <= self._parts.keys() or self.lost, timeout=PART_S)
            if not wanted <= self._parts.keys():
                raise StoreError(f"step {step}: not all machines have uploaded their part")
            return {name: facts for node in nodes for name, facts in self._parts[node, step].items()}

    @property
    def works(self) -> list[Work]:
        """The work of each follower's ranks, as last reported."""
        with self._changed:
            return list(self._works.values())

    def wait_for_stacks(self, seconds: float = 60.0) -> None:
        """Waits until all followers that are still there have uploaded their ranks' stacks, or the time is over."""
        lines = self._lines.items()
        with self._changed:
            self._changed.wait_for(lambda: all(line.gone or node in self._has_stacks for node, line in lines), seconds)

    def wait_for_outcomes(self, seconds: float) -> list[Outcome]:
        """Returns the outcomes of the followers' ranks that arrive in time."""
        with self._changed:
            self._changed.wait_for(lambda: len(self.outcomes) == len(self._lines) or self.lost, timeout=seconds)
            return list(self.outcomes.values())

    def close(self, exit_code: int) -> None:
        """Sends all followers the attempt's exit code and closes the connections."""
        self.broadcast(end=exit_code)
        for line in self._lines.values():
            line.close()
        if self._listener:
            self._listener.close()


def join(run_id: str, machine: Node, token: str) -> tuple[Line, WorkerJob, Welcome]:
    """Returns a follower's connection, its job and the leader's welcome. Raises StoreError if no leader comes."""
    deadline = time.monotonic() + GATHER_S
    while time.monotonic() < deadline:
        try:
            connection = socket.create_connection((machine.node_ips[0], leader_port(run_id)), timeout=5)
        except OSError:
            time.sleep(0.5)
            continue
        connection.settimeout(None)
        line = Line(connection, FromLeader)
        line.send(hello=machine.node_rank, token=token)
        message = line.next(GATHER_S) or {}  # the leader waits for all others first
        with suppress(ValueError):
            welcome = build(Welcome, message.get("welcome"))
            return line, build(WorkerJob, welcome.job), welcome
        line.close()
        time.sleep(0.5)
    raise StoreError(f"the leader on {machine.node_ips[0]} did not answer within {GATHER_S:.0f} s")
