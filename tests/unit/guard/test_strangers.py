"""The line between the machines of a job, and who else comes by: nobody crashes, hangs or fills the leader."""

import json
import queue
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spotune.core.errors import StoreError
from spotune.guard import multinode
from spotune.guard.leaving import Notices
from spotune.guard.multinode import FromFollower, FromLeader, Leader, Line, join, leader_port, read_message
from tests.hostile import changed, values
from tests.unit.guard.test_gang import FACTS, WELCOME, leave, machine
from tests.waiting import LIMIT_S, until

HELLO = {"hello": 1, "token": "token"}
FOLLOWERS = [
    {"part": 5, "files": {"a": FACTS}},
    {"notice": "SIGTERM", "left_s": 20.0},
    {"work": {"cpu_s": 1.5, "moved_bytes": 20, "stopped": True}},
    {"stacks": [1]},
    {"ended": {"how": "stopped", "step": 5, "message": ""}},
]
LEADERS = [
    {"welcome": WELCOME},
    {"fetch": "key", "best": None, "tokens": 5, "other_versions_allowed": False},
    {"resume": True},
    {"upload": 5},
    {"end": 75},
    {"end": 0},
    {"fetch": None, "best": None, "tokens": 0},
    {"stacks": True},
]
SETTINGS = settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


class Gathering:
    """A leader that waits for one follower, in a thread."""

    def __init__(self) -> None:
        self.run_id = f"pair-{uuid4().hex[:8]}"
        self.leader = Leader(self.run_id, machine(0), "token")
        self.errors: list[BaseException] = []
        self.is_over = False
        self._thread = threading.Thread(target=self._gather)
        self._thread.start()

    def _gather(self) -> None:
        try:
            self.leader.gather(Notices(), **WELCOME)
        except BaseException as error:
            self.errors.append(error)

    def connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", leader_port(self.run_id)), timeout=LIMIT_S)
        connection.settimeout(LIMIT_S)
        return connection

    def end(self) -> list[BaseException]:
        """A true follower comes, and the leader starts: however many others are there."""
        line, job, _ = join(self.run_id, machine(1), "token")
        assert job.attempt == 1
        leave(line)
        return self.close()

    def close(self) -> list[BaseException]:
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive()
        self.leader.close(0)
        self.is_over = True
        return self.errors


@pytest.fixture
def gathering() -> Iterator[Gathering]:
    made = Gathering()
    yield made
    assert made.is_over or made.end() == []


def is_turned_away(connection: socket.socket) -> bool:
    with suppress(ConnectionError):
        return connection.recv(1) == b""
    return True


@pytest.mark.parametrize(
    "line",
    [
        b"[]\n", b"null\n", b"7\n", b"\n", b"GET / HTTP/1.1\r\n\r\n", b"\xff\xfe\n", b"{}\n", b'{"hello": 1}\n',
        b"[" * 4000 + b"\n", b'{"hello": "x", "token": "token"}\n', b'{"hello": 0, "token": "token"}\n',
        b'{"hello": 2, "token": "token"}\n', b'{"hello": null, "token": "token"}\n', b'{"hello": 1, "token": [1]}\n',
        b'{"hello": 1, "token": "another"}\n', b'{"hello": 1e999, "token": "token"}\n', b"x" * 5000,
    ],
)  # fmt: skip
def test_a_stranger_is_turned_away(gathering: Gathering, line: bytes) -> None:
    with closing(gathering.connect()) as stranger:
        stranger.sendall(line)
        assert is_turned_away(stranger)


def test_strangers_that_say_nothing_hold_up_nobody(gathering: Gathering) -> None:
    silent = [gathering.connect() for _ in range(20)]
    silent[0].sendall(b'{"hello": 1')
    began = time.monotonic()
    assert gathering.end() == []  # the true follower is not kept waiting
    assert time.monotonic() - began < multinode.HELLO_S / 2
    for connection in silent:
        assert is_turned_away(connection)
        connection.close()


def test_a_stranger_that_drips_is_turned_away_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multinode, "HELLO_S", 0.5)
    made = Gathering()
    with closing(made.connect()) as stranger:
        with suppress(OSError):
            for _ in range(int(LIMIT_S / 0.1)):
                stranger.sendall(b"x")
                time.sleep(0.1)
            raise AssertionError("it is still listened to")
        assert is_turned_away(stranger)
    assert made.end() == []


def test_a_stranger_without_end_fills_no_memory(gathering: Gathering) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for piece in (b"x" * (1 << 20), b'{"hello": 2, "token": ""}\n' * 40_000):
        with closing(gathering.connect()) as stranger, suppress(OSError):
            for _ in range(64):
                stranger.sendall(piece)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10  # KiB


def test_more_strangers_than_may_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multinode, "MOST_WAITING", 2)
    monkeypatch.setattr(multinode, "HELLO_S", 1.0)
    made = Gathering()
    strangers = [made.connect() for _ in range(4)]
    assert is_turned_away(strangers[2])
    assert made.end() == []  # the follower comes again once the first ones have had their time
    for connection in strangers:
        connection.close()


def test_who_comes_after_the_last_follower_is_turned_away(gathering: Gathering) -> None:
    assert gathering.end() == []
    with pytest.raises(OSError, match="refused"):
        gathering.connect()


def test_a_follower_that_comes_again_takes_its_own_place() -> None:
    made = Gathering()
    made.leader._followers = 2
    with closing(made.connect()) as first, closing(made.connect()) as second:
        for connection in (first, second):
            connection.sendall(json.dumps(HELLO).encode() + b"\n")
        assert is_turned_away(first)
        made.leader._followers = 1
        assert json.loads(second.makefile("rb").readline()) == {"welcome": WELCOME}
    assert made.close() == []


@SETTINGS
@given(data=st.data(), kind=st.sampled_from((FromFollower, FromLeader)))
def test_a_message_is_what_it_should_be_or_none(data: st.DataObject, kind: type) -> None:
    whole = data.draw(st.sampled_from(FOLLOWERS if kind is FromFollower else LEADERS))
    line = data.draw(st.one_of(changed(whole), values).map(json.dumps)).encode()
    with suppress(ValueError):
        read_message(line, kind)
    for message in FOLLOWERS if kind is FromFollower else LEADERS:
        assert read_message(json.dumps({**message, "new": {"deep": [1]}}).encode(), kind).keys() == message.keys()


@pytest.mark.parametrize(
    "rubbish",
    [
        b"[]", b"7", b"not JSON", b"[" * 100_000, b'{"work": 7}', b'{"work": {"cpu_s": "x"}}', b'{"part": 5}',
        b'{"part": [], "files": {}}', b'{"part": 5, "files": {"../x": {}}}', b'{"notice": "x"}', b'{"ended": {}}',
        b'{"notice": "x", "left_s": null}', b'{"ended": {"how": "well"}}', b'{"stacks": 1}', b'{"work": {"new": []}}x',
    ],
)  # fmt: skip
def test_a_follower_that_talks_rubbish_is_gone(
    gathering: Gathering, rubbish: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(gathering.connect()) as follower:
        follower.sendall(json.dumps(HELLO).encode() + b"\n")
        assert follower.makefile("rb").readline().startswith(b'{"welcome"')
        follower.sendall(b'{"new": 1}\n' + rubbish + b"\n")
        until(lambda: gathering.leader.lost)
        with pytest.raises(StoreError, match="not all machines have uploaded"):
            gathering.leader.parts(5)
        assert gathering.leader.wait_for_outcomes(0.0) == []
    line = capsys.readouterr().err
    assert line.startswith("[spotune] a connection to another machine of this job is ended: ")
    assert line.count("\n") == 1
    assert gathering.close() == []


def test_messages_that_nobody_reads_fill_no_memory() -> None:
    ours, theirs = socket.socketpair()
    line = Line(ours, FromFollower)
    theirs.settimeout(0.5)
    with closing(theirs), pytest.raises(TimeoutError):
        theirs.sendall(b'{"stacks": [1]}\n' * 1_000_000)
    assert line.inbox.qsize() <= multinode.MOST_UNREAD
    line.close()
    with suppress(queue.Empty):
        while line.inbox.get(timeout=LIMIT_S) is not None:
            pass


def answers(listener: socket.socket, *answers: bytes) -> Callable[[], None]:
    """Something that listens on the leader's port: it gives each who comes the next answer, and at last hangs up."""

    def serve() -> None:
        for answer in answers:
            connection, _ = listener.accept()
            with closing(connection), suppress(OSError):
                connection.sendall(answer)

    return serve


def test_a_follower_takes_nobody_else_for_the_leader(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks again, until the leader is there."""
    run_id = f"pair-{uuid4().hex[:8]}"
    monkeypatch.setattr(multinode.time, "sleep", lambda seconds: None)
    with socket.create_server(("127.0.0.1", leader_port(run_id))) as listener, ThreadPoolExecutor(1) as pool:
        wrong = [json.dumps({"welcome": welcome}).encode() + b"\n"
                 for welcome in ({}, 7, {**WELCOME, "job": {}}, {**WELCOME, "master_port": "x"},
                                 {**WELCOME, "environ": {"A": 1}})]  # fmt: skip
        right = json.dumps({"welcome": WELCOME}).encode() + b"\n"
        served = pool.submit(answers(listener, b"", b"HTTP/1.1 400\r\n\r\n", b"[]\n", b"[" * 100_000, *wrong, right))
        line, job, welcome = join(run_id, machine(1), "token")
        served.result(LIMIT_S)
        assert (job.attempt, welcome.master_port) == (1, 1)
        line.close()


def test_a_follower_does_not_wait_without_end_for_a_welcome(monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = f"pair-{uuid4().hex[:8]}"
    monkeypatch.setattr(multinode, "GATHER_S", 0.5)
    with socket.create_server(("127.0.0.1", leader_port(run_id))), pytest.raises(StoreError, match="did not answer"):
        join(run_id, machine(1), "token")
