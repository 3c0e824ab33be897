"""Requests that fail: what each fault is taken for, and who gets a new client, a retry, or bad news."""

import asyncio
import json
from collections.abc import Callable
from random import Random
from typing import Any

import aiohttp
import botocore.exceptions
import google.auth.exceptions
import pytest
from gcsfs.retry import HttpError, NonRetryableError, validate_response
from s3fs.errors import translate_boto_error

from spotune.contracts.store.connection import Connection
from spotune.contracts.store.faults import Denied, Fault, GaveUp, judge, words_of
from spotune.contracts.store.patience import Patience

QUICK = Patience(request_s=0.5, deadline_s=1.0, first_wait_s=0.01, longest_wait_s=0.05)


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
    line = Connection(clients, QUICK)
    assert line.ask("read", failing(ConnectionResetError())) == 1
    assert line.ask("write", failing(s3("ExpiredToken", 400), s3("InvalidAccessKeyId", 403))) == 3
    assert line.ask("write", failing(s3("AccessDenied", 403))) == 4
    assert clients.closed == [1, 2, 3]


def test_a_client_is_closed_when_its_last_request_is_over() -> None:
    clients = Clients()
    line = Connection(clients, QUICK)
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
    line = Connection(clients, QUICK)
    with pytest.raises(Denied):
        line.ask("read", failing(s3("ExpiredToken", 400)))
    line.ask("read", failing())
    with pytest.raises(Denied):
        line.ask("write", failing(s3("AccessDenied", 403)))
    with pytest.raises(GaveUp, match="why .* tries in 1 s"):
        line.ask("read", failing(*[s3("AccessDenied", 403)] * 1000))


def test_credentials_that_cannot_be_had_yet_are_waited_for() -> None:
    line = Connection(Clients(), QUICK)
    assert line.ask("read", failing(google.auth.exceptions.TransportError("why"))) == 2


def test_what_lasts_is_not_tried_again_and_bugs_are_seen() -> None:
    line = Connection(Clients(), QUICK)
    with pytest.raises(GaveUp, match="why$"):
        line.ask("read", failing(s3("InvalidBucketName", 400)))
    with pytest.raises(KeyError):
        line.ask("read", failing(KeyError("a bug")))


def test_the_last_try_does_not_hide_the_reason() -> None:
    """The deadline cuts the last try short; what is told is what went wrong before."""

    async def hang(client: int) -> None:
        await asyncio.sleep(30)

    steps = [failing(s3("SlowDown", 503)), *[hang] * 9]
    line = Connection(Clients(), Patience(request_s=30.0, deadline_s=0.5, first_wait_s=0.01))
    with pytest.raises(GaveUp, match=r"why \(2 tries in"):
        line.ask("read", lambda client: steps.pop(0)(client))
