"""Requests that fail: what each fault is taken for, and who gets a new client, a retry, or bad news."""

import asyncio
import json
import math
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import suppress
from itertools import pairwise
from random import Random
from threading import Event
from typing import Any

import aiohttp
import botocore.exceptions
import google.auth.exceptions
import pytest
from gcsfs.retry import HttpError, NonRetryableError, validate_response
from s3fs.errors import translate_boto_error

from spotune.core.store import objects
from spotune.core.store.faults import Denied, Fault, GaveUp, Patience, judge, words_of
from spotune.core.store.objects import Connection
from tests.clocks import Loops
from tests.waiting import LIMIT_S

PATIENCE = Patience()
LARGE = 12 << 20


def s3(code: str, status: int) -> Exception:
    """What s3fs raises for an answer of S3."""
    response = {"Error": {"Code": code, "Message": "why"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error: Exception = translate_boto_error(botocore.exceptions.ClientError(response, "GetObject"))
    return error


def gcs(status: int, words: str = "why") -> Exception:
    """What gcsfs raises for an answer of GCS."""
    try:
        validate_response(status, json.dumps({"error": {"code": status, "message": words}}), "b/x/o/y")
    except Exception as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (s3("NoSuchKey", 404), Fault.MISSING),
        (s3("NoSuchUpload", 404), Fault.MISSING),
        (s3("PreconditionFailed", 412), Fault.TAKEN),
        (s3("ConditionalRequestConflict", 409), Fault.PASSING),
        (s3("ExpiredToken", 400), Fault.STALE),
        (s3("InvalidAccessKeyId", 403), Fault.STALE),
        (s3("400", 400), Fault.STALE),
        (s3("AccessDenied", 403), Fault.DENIED),
        (s3("403", 403), Fault.DENIED),
        (s3("SlowDown", 503), Fault.PASSING),
        (s3("RequestTimeout", 400), Fault.PASSING),
        (s3("SomethingNew", 502), Fault.PASSING),
        (s3("NotImplemented", 501), Fault.LASTING),
        (s3("InvalidBucketName", 400), Fault.LASTING),
        (gcs(404), Fault.MISSING),
        (gcs(410), Fault.MISSING),
        (gcs(412), Fault.TAKEN),
        (gcs(401, "Invalid Credentials"), Fault.STALE),
        (gcs(401, "Request had invalid authentication credentials."), Fault.STALE),
        (gcs(403), Fault.DENIED),
        (gcs(429), Fault.PASSING),
        (gcs(502), Fault.PASSING),
        (gcs(503), Fault.PASSING),
        (gcs(400, "invalid name"), Fault.LASTING),
        (HttpError({"message": "no code at all"}), Fault.PASSING),
        (botocore.exceptions.NoCredentialsError(), Fault.STALE),
        (botocore.exceptions.CredentialRetrievalError(provider="role", error_msg="why"), Fault.UNREADY),
        (google.auth.exceptions.TransportError("why"), Fault.UNREADY),
        (NonRetryableError("why"), Fault.UNREADY),
        (botocore.exceptions.EndpointConnectionError(endpoint_url="http://x"), Fault.PASSING),
        (botocore.exceptions.FlexibleChecksumError(error_msg="flipped on the way"), Fault.PASSING),
        (botocore.exceptions.ParamValidationError(report="why"), Fault.LASTING),
        (aiohttp.ClientPayloadError("half"), Fault.PASSING),
        (ConnectionResetError(), Fault.PASSING),
        (TimeoutError(), Fault.PASSING),
        (json.JSONDecodeError("half", "{", 1), Fault.PASSING),
        (ImportError("no s3fs"), Fault.LASTING),
        (RuntimeError("cannot schedule new futures after interpreter shutdown"), Fault.LASTING),
        (RuntimeError("a bug"), None),
        (ValueError("a bug"), None),
        (KeyError("a bug"), None),
    ],
    ids=lambda value: words_of(value)[:40] if isinstance(value, Exception) else "",
)
def test_each_fault_is_known(error: Exception, fault: Fault | None) -> None:
    assert judge(error) is fault


def test_waits_grow_and_have_an_end() -> None:
    patience, rng = Patience(first_wait_s=1.0, longest_wait_s=8.0), Random(0)
    for tries, longest in enumerate([1.0, 2.0, 4.0, 8.0, 8.0], 1):
        waits = [patience.wait_s(tries, rng) for _ in range(50)]
        assert longest / 2 <= min(waits) < max(waits) <= longest
    assert patience.wait_s(10_000, rng) <= 8.0


def test_the_first_tries_of_a_long_request_are_shorter() -> None:
    patience = Patience(request_s=10.0, deadline_s=60.0, floor_bytes_per_s=100.0)
    assert [patience.try_s(4000, tries) for tries in (1, 2, 3, 4)] == [20.0, 30.0, 50.0, 50.0]
    assert patience.limit_s(4000) == 140.0
    with pytest.raises(ValueError, match="deadline_s must be positive"):
        Patience(deadline_s=0.0)


class Clients:
    """Makes clients that are numbers, and keeps a list of those that were closed."""

    def __init__(self) -> None:
        self.made = 0
        self.closed: list[int] = []

    async def connect(self) -> int:
        self.made += 1
        return self.made

    async def close(self, client: int) -> None:
        self.closed.append(client)


def failing(*errors: Exception) -> Callable[[int], Any]:
    """A step that fails in these ways, then returns its client."""
    left = list(errors)

    async def step(client: int) -> int:
        if left:
            raise left.pop(0)
        return client

    return step


def test_refused_credentials_mean_a_new_client() -> None:
    clients = Clients()
    line = Connection(clients, PATIENCE, new_loop=Loops())
    assert line.ask("read", failing(ConnectionResetError())) == 1
    assert line.ask("write", failing(s3("ExpiredToken", 400), s3("InvalidAccessKeyId", 403))) == 3
    assert line.ask("write", failing(s3("AccessDenied", 403))) == 4
    assert clients.closed == [1, 2, 3]


def test_a_client_is_closed_when_its_last_request_is_over() -> None:
    clients = Clients()
    line = Connection(clients, Patience(request_s=300.0))
    go_on = asyncio.Event()

    async def slow(client: int) -> int:
        await go_on.wait()
        return client

    async def release(client: int) -> None:
        go_on.set()

    pending = line.submit("read", slow)
    assert line.ask("read", failing()) == 1
    assert line.ask("read", failing(gcs(401, "Invalid Credentials"))) == 2
    assert clients.closed == []
    line.ask("read", release)
    assert line.wait(pending) == 1
    assert clients.closed == [1]


def test_access_that_was_never_granted_is_denied_at_once() -> None:
    clients = Clients()
    line = Connection(clients, PATIENCE, new_loop=Loops())
    with pytest.raises(Denied):
        line.ask("read", failing(s3("ExpiredToken", 400)))
    line.ask("read", failing())
    with pytest.raises(Denied):
        line.ask("write", failing(s3("AccessDenied", 403)))
    with pytest.raises(GaveUp, match=r"why \(\d+ tries in [56]\d s\)"):
        line.ask("read", failing(*[s3("AccessDenied", 403)] * 1000))


def test_credentials_that_cannot_be_had_yet_are_waited_for() -> None:
    line = Connection(Clients(), PATIENCE, new_loop=Loops())
    assert line.ask("read", failing(google.auth.exceptions.TransportError("why"))) == 2


def test_what_lasts_is_not_tried_again_and_bugs_are_seen() -> None:
    line = Connection(Clients(), PATIENCE, new_loop=Loops())
    with pytest.raises(GaveUp, match="why$"):
        line.ask("read", failing(s3("InvalidBucketName", 400)))
    with pytest.raises(KeyError):
        line.ask("read", failing(KeyError("a bug")))


async def hang(client: int) -> None:
    await asyncio.sleep(math.inf)


def test_the_last_try_does_not_hide_the_reason() -> None:
    """The deadline cuts the last try short; what is told is what went wrong before."""
    steps = [failing(s3("SlowDown", 503)), hang]
    loops = Loops()
    line = Connection(Clients(), Patience(request_s=45.0, deadline_s=30.0), new_loop=loops)
    with pytest.raises(GaveUp, match=r"why \(2 tries in 3[01] s"):
        line.ask("read", lambda client: steps.pop(0)(client))


def times_of(loops: Loops, patience: Patience, fault: Callable[[], Any], size: int = 0) -> list[float]:
    """When each try began of a request that always fails; the end comes last."""
    began: list[float] = []

    async def step(client: int) -> None:
        began.append(loops.now)
        await fault()

    with pytest.raises(GaveUp, match=r" \(\d+ tries in \d+ s\)$") as error:
        Connection(Clients(), patience, new_loop=loops).ask("read", step, size)
    assert f"({len(began)} tries" in str(error.value)
    return [*began, loops.now]


async def never() -> None:
    await asyncio.sleep(math.inf)


async def reset() -> None:
    raise ConnectionResetError


def test_a_request_without_an_answer_is_cut_and_tried_again() -> None:
    times = times_of(Loops(), Patience(request_s=15.0, deadline_s=60.0, first_wait_s=1.0, longest_wait_s=4.0), never)
    gaps = [after - before for before, after in pairwise(times)]
    assert 3 <= len(gaps) <= 4
    for longest_wait, gap in zip([1.0, 2.0, 4.0], gaps[:-1], strict=False):
        assert 15.0 + longest_wait / 2 <= gap <= 15.0 + longest_wait
    assert times[-1] <= 60.0


def test_waits_between_tries_grow_until_the_deadline() -> None:
    times = times_of(Loops(), Patience(deadline_s=60.0, first_wait_s=1.0, longest_wait_s=8.0), reset)
    gaps = [after - before for before, after in pairwise(times[:-1])]
    for longest, gap in zip([1.0, 2.0, 4.0, 8.0, 8.0, 8.0], gaps, strict=False):
        assert longest / 2 <= gap <= longest
    assert 60.0 - 8.0 <= times[-1] <= 60.0


def test_a_store_that_is_away_is_waited_for_once() -> None:
    """A verb with many requests fails at the first one's deadline, and asks anew when the outage may be over."""
    loops, tries = Loops(), []
    line = Connection(Clients(), Patience(deadline_s=20.0, outage_s=30.0), new_loop=loops)

    async def refused(client: int) -> None:
        tries.append(loops.now)
        raise ConnectionResetError("why")

    def ask() -> int:
        with pytest.raises(GaveUp, match=r"why \(\d+ tries in \d+ s\)"):
            line.ask("read", refused)
        return len(tries)

    first = ask()
    assert first > 1
    assert [ask(), ask()] == [first, first]
    assert loops.now <= 20
    loops.advance(31)
    assert ask() > first


@pytest.mark.parametrize("fault", [never, reset])
@pytest.mark.parametrize("size", [0, LARGE])
def test_the_deadline_fits_the_size(size: int, fault: Callable[[], Any]) -> None:
    """A record is not waited for like a large file."""
    end = times_of(Loops(), PATIENCE, fault, size)[-1]
    assert PATIENCE.limit_s(size) - PATIENCE.longest_wait_s - PATIENCE.try_s(size) <= end <= PATIENCE.limit_s(size)
    assert PATIENCE.limit_s(0) == PATIENCE.deadline_s < PATIENCE.limit_s(LARGE) / 5


def test_whoever_stood_still_asks_a_second_time() -> None:
    """The process was suspended in its first try, and the deadline has passed."""
    loops = Loops()
    tries: list[float] = []

    async def step(client: int) -> int:
        tries.append(loops.now)
        if len(tries) == 1:
            loops.made[-1].now += 1000.0
            raise ConnectionResetError
        await asyncio.sleep(PATIENCE.request_s - 0.1)
        return client

    assert Connection(Clients(), PATIENCE, new_loop=loops).ask("read", step) == 1
    assert len(tries) == 2


def test_a_client_that_is_slow_to_make_leaves_time_for_a_second_try() -> None:
    loops = Loops()

    class Slow(Clients):
        async def connect(self) -> int:
            await asyncio.sleep(PATIENCE.deadline_s - 0.1)
            return await super().connect()

    assert Connection(Slow(), PATIENCE, new_loop=loops).ask("read", failing(ConnectionResetError())) == 1


@pytest.mark.parametrize("expired", [s3("ExpiredToken", 400), gcs(401, "Invalid Credentials")], ids=["s3", "gs"])
def test_expired_credentials_are_read_again_until_the_deadline(expired: Exception) -> None:
    clients, loops = Clients(), Loops()
    line = Connection(clients, PATIENCE, new_loop=loops)
    line.ask("read", failing())

    async def step(client: int) -> int:
        if loops.now < 40.0:
            raise expired
        return client

    assert line.ask("read", step) == clients.made > 3
    assert 40.0 <= loops.now <= 40.0 + PATIENCE.longest_wait_s
    with pytest.raises(GaveUp, match=r"(why|Invalid Credentials).* \(\d+ tries in [56]\d s\)"):
        line.ask("write", failing(*[expired] * 1000))
    assert line.ask("read", failing()) == clients.made
    assert clients.closed == list(range(1, clients.made))


def test_a_loop_that_hangs_is_replaced() -> None:
    blocked, released = Event(), Event()

    async def block(client: int) -> None:
        blocked.set()
        released.wait(LIMIT_S)

    line = Connection(Clients(), PATIENCE)
    stuck = line.submit("read", block)
    assert blocked.wait(LIMIT_S)
    line.patience = Patience(request_s=0.05, deadline_s=0.1)  # of real time: it is a thread that hangs
    with pytest.raises(GaveUp, match="the client has hung for 0 s"):
        line.ask("read", failing())
    line.patience = PATIENCE
    assert line.ask("read", failing()) == 2
    assert not stuck.future.done()
    released.set()
    with suppress(CancelledError, GaveUp):
        stuck.future.result(LIMIT_S)


def test_whoever_waits_is_told_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "SILENT_S", 0.01)
    told: list[str] = []
    silent = Event()

    async def step(client: int) -> int:
        await asyncio.to_thread(silent.wait, LIMIT_S)
        return client

    def hear(what: str) -> None:
        told.append(what)
        silent.set()

    line = Connection(Clients(), PATIENCE, hear)
    assert line.ask("read", step) == 1
    silent.clear()
    pending = line.submit("read", step)
    line.ask("read", failing())
    silent.set()
    assert line.wait(pending) == 1
    assert told == ["no answer for 0.01 s; asked again for up to 60 s"]


def test_a_large_body_takes_its_time_untold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "SILENT_S", 0.01)
    told: list[str] = []

    async def step(client: int) -> int:
        await asyncio.sleep(0.1)
        return client

    assert Connection(Clients(), PATIENCE, told.append).ask("read", step, LARGE) == 1
    assert told == []


def test_what_nobody_depends_on_is_tried_once() -> None:
    loops, tries = Loops(), []

    async def step(client: int) -> None:
        tries.append(client)
        await asyncio.sleep(math.inf)

    Connection(Clients(), PATIENCE, new_loop=loops).tidy(step)
    assert tries == [1]
    assert loops.now == PATIENCE.request_s
