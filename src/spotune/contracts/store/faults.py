"""What the stores' clients raise, sorted by what can be done about it."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, auto
from io import BufferedReader
from pathlib import Path

# The stores' own codes, where they say more than the HTTP status.
STALE_CODES = {
    *("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired", "InvalidToken"),
    *("InvalidAccessKeyId", "SignatureDoesNotMatch", "RequestTimeTooSkewed", "InvalidSecurity"),
    "400",  # a HEAD's answer has no body: on S3 an expired token looks like this
}
PASSING_CODES = {
    *("SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "InternalError", "ServiceUnavailable"),
    *("IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "OperationAborted", "ConditionalRequestConflict"),
}


class Fault(Enum):
    """What can be done about a failed request."""

    MISSING = auto()  # no such object, upload or bucket
    TAKEN = auto()  # a create-only write came second
    STALE = auto()  # the credentials are not (or no longer) good
    UNREADY = auto()  # no credentials can be had just now: a metadata server, or a token's issuer, does not answer
    DENIED = auto()  # the credentials are good, but not for this
    PASSING = auto()  # try again
    LASTING = auto()  # trying again does not help


CREDENTIALS = (
    (Fault.STALE, "google.auth.exceptions", ("DefaultCredentialsError",)),
    (Fault.STALE, "botocore.exceptions", ("NoCredentialsError", "PartialCredentialsError")),
    (Fault.UNREADY, "google.auth.exceptions", ("GoogleAuthError",)),
    (Fault.UNREADY, "gcsfs.retry", ("NonRetryableError",)),
    (Fault.UNREADY, "botocore.exceptions", ("CredentialRetrievalError", "TokenRetrievalError")),
)


class Denied(Exception):
    """Access was refused, and has never been granted in this process."""


class GaveUp(Exception):
    """The bucket did not do it; the text says why and after how many tries."""


class LocalFault(Exception):
    """The local file of a transfer failed, not the bucket: ``error`` is for the caller as it is."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


@contextmanager
def local_side() -> Iterator[None]:
    """Marks what happens to the local file of a transfer."""
    try:
        yield
    except OSError as error:
        raise LocalFault(error) from error


def opened(local: Path) -> BufferedReader:
    """The local file of an upload, to be read."""
    with local_side():
        return open(local, "rb")


def judge(error: Exception) -> Fault | None:
    """What can be done about a client's exception; None when it is none of theirs, but a bug."""
    if isinstance(error, FileNotFoundError):
        return Fault.MISSING
    if isinstance(error, FileExistsError):
        return Fault.TAKEN
    if isinstance(error, ImportError) or (isinstance(error, RuntimeError) and "shutdown" in str(error)):
        return Fault.LASTING  # the latter: the process ends, and a thread goes on
    status, code = answer_of(error)
    if status or code:
        return _judge_answer(status, code)
    for fault, module, names in CREDENTIALS:
        if isinstance(error, _kinds(module, *names)):
            return fault
    if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
        return _judge_words(str(error))
    if isinstance(error, PermissionError) or (isinstance(error, OSError) and str(error).startswith("Forbidden")):
        return Fault.DENIED
    passing = (
        *(OSError, json.JSONDecodeError),
        *_kinds("botocore.exceptions", "HTTPClientError", "ConnectionError", "IncompleteReadError"),
        *_kinds("botocore.exceptions", "ResponseStreamingError", "FlexibleChecksumError"),
        *_kinds("botocore.parsers", "ResponseParserError"),
        *_kinds("aiohttp", "ClientError"),
        *_kinds("gcsfs.retry", "HttpError", "ChecksumError"),
    )
    if isinstance(error, passing):
        return Fault.PASSING
    return Fault.LASTING if isinstance(error, _kinds("botocore.exceptions", "BotoCoreError", "ClientError")) else None


def _judge_answer(status: int, code: str) -> Fault:
    if code in STALE_CODES or status == 401:
        return Fault.STALE
    if code in PASSING_CODES or status in (408, 409, 425, 429) or (status >= 500 and status != 501):
        return Fault.PASSING
    if status in (404, 410):  # 410: a resumable upload that is no more
        return Fault.MISSING
    if status == 412:
        return Fault.TAKEN
    return Fault.DENIED if status == 403 else Fault.LASTING


def _judge_words(text: str) -> Fault | None:
    """gcsfs makes a ValueError of every answer with "invalid" in it, and drops its status."""
    if "credential" in text.lower():
        return Fault.STALE
    return Fault.LASTING if text.startswith("Bad Request") else None


def answer_of(error: BaseException | None) -> tuple[int, str]:
    """The HTTP status and the store's own code in an exception or its causes; (0, "") when there was no answer."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            code = str(response.get("Error", {}).get("Code", ""))
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode") or code
            return (int(status) if str(status).isdigit() else 0), code
        if isinstance(error, _kinds("gcsfs.retry", "HttpError")) and str(getattr(error, "code", "")).isdigit():
            return int(getattr(error, "code", 0)), ""
        error = error.__cause__
    return 0, ""


def words_of(error: BaseException) -> str:
    """One line that says what an exception is."""
    text = " ".join(str(error).split())[:300]
    return text or {"TimeoutError": "no answer in time"}.get(type(error).__name__, type(error).__name__)


def _kinds(module: str, *names: str) -> tuple[type[Exception], ...]:
    """Exceptions of a client's module; none when it is not loaded, since then nothing can have raised them."""
    loaded = sys.modules.get(module)
    return tuple(getattr(loaded, name) for name in names if hasattr(loaded, name))
