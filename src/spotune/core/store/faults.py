"""How long the bucket's verbs hold out, which calls are under way, and which faults pass."""

import errno
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from enum import Enum, auto
from io import BufferedReader
from pathlib import Path
from random import Random

from spotune.core.errors import SpotuneError, StoreError


@dataclass(frozen=True)
class RetryPolicy:
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
        for limit in fields(self):
            if not getattr(self, limit.name) > 0 and limit.name != "outage_s":
                raise ValueError(f"{limit.name} must be positive, not {getattr(self, limit.name)}")

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
FOR_VERBS = RetryPolicy(request_s=6.0, deadline_s=15.0, outage_s=30.0)


# The calls of a store that are under way, for who watches that they come on.


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


# What the stores' clients raise, sorted by what can be done about it.

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


class FaultKind(Enum):
    """What can be done about a failed request."""

    MISSING = auto()  # no such object, upload or bucket
    TAKEN = auto()  # a create-only write came second
    STALE = auto()  # the credentials are not (or no longer) good
    UNREADY = auto()  # no credentials can be had just now: a metadata server, or a token's issuer, does not answer
    DENIED = auto()  # the credentials are good, but not for this
    PASSING = auto()  # try again
    LASTING = auto()  # trying again does not help


CREDENTIALS = (
    (FaultKind.STALE, "google.auth.exceptions", ("DefaultCredentialsError",)),
    (FaultKind.STALE, "botocore.exceptions", ("NoCredentialsError", "PartialCredentialsError")),
    (FaultKind.UNREADY, "google.auth.exceptions", ("GoogleAuthError",)),
    (FaultKind.UNREADY, "gcsfs.retry", ("NonRetryableError",)),
    (FaultKind.UNREADY, "botocore.exceptions", ("CredentialRetrievalError", "TokenRetrievalError")),
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


def judge(error: Exception) -> FaultKind | None:
    """What can be done about a client's exception; None when it is none of theirs, but a bug."""
    if isinstance(error, FileNotFoundError):
        return FaultKind.MISSING
    if isinstance(error, FileExistsError):
        return FaultKind.TAKEN
    if isinstance(error, ImportError) or (isinstance(error, RuntimeError) and "shutdown" in str(error)):
        return FaultKind.LASTING  # the latter: the process ends, and a thread goes on
    status, code = answer_of(error)
    if status or code:
        return _judge_answer(status, code)
    for fault, module, names in CREDENTIALS:
        if isinstance(error, _kinds(module, *names)):
            return fault
    if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
        return _judge_words(str(error))
    if isinstance(error, PermissionError) or (isinstance(error, OSError) and str(error).startswith("Forbidden")):
        return FaultKind.DENIED
    passing = (
        *(OSError, json.JSONDecodeError),
        *_kinds("botocore.exceptions", "HTTPClientError", "ConnectionError", "IncompleteReadError"),
        *_kinds("botocore.exceptions", "ResponseStreamingError", "FlexibleChecksumError"),
        *_kinds("botocore.parsers", "ResponseParserError"),
        *_kinds("aiohttp", "ClientError"),
        *_kinds("gcsfs.retry", "HttpError", "ChecksumError"),
    )
    if isinstance(error, passing):
        return FaultKind.PASSING
    return (
        FaultKind.LASTING if isinstance(error, _kinds("botocore.exceptions", "BotoCoreError", "ClientError")) else None
    )


def _judge_answer(status: int, code: str) -> FaultKind:
    if code in STALE_CODES or status == 401:
        return FaultKind.STALE
    if code in PASSING_CODES or status in (408, 409, 425, 429) or (status >= 500 and status != 501):
        return FaultKind.PASSING
    if status in (404, 410):  # 410: a resumable upload that is no more
        return FaultKind.MISSING
    if status == 412:
        return FaultKind.TAKEN
    return FaultKind.DENIED if status == 403 else FaultKind.LASTING


def _judge_words(text: str) -> FaultKind | None:
    """gcsfs makes a ValueError of every answer with "invalid" in it, and drops its status."""
    if "credential" in text.lower():
        return FaultKind.STALE
    return FaultKind.LASTING if text.startswith("Bad Request") else None


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


# Which errors are the machine's: its disk, memory or network failed, or a process was killed there.
#
# Another machine may do better, so such an error never counts as bad input, whatever was being read.

# Faults of a machine or of the way to the hub: another machine may do better.
_MACHINE_ERRNOS = (
    *(errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    *(errno.ESTALE, errno.ENOTCONN, errno.EAGAIN, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN),
    *(errno.EHOSTDOWN, errno.ENETRESET),
)
# The same faults where a library keeps no number: Arrow, safetensors, tokenizers, torch, a DataLoader's worker.
_MACHINE_TEXTS = (
    *("No space left on device", "Input/output error", "Read-only file system", "Disk quota exceeded"),
    *("File too large", "Too many open files", "Cannot allocate memory", "Stale file handle", "Bus error"),
    *("Transport endpoint is not connected", "Resource temporarily unavailable", "can't allocate memory"),
    *("not enough memory: you tried to allocate", "unable to mmap", "Temporary failure in name resolution"),
    *("PytorchStreamWriter failed writing", "] . unexpected pos "),  # torch.save on a full disk
    *("can't start new thread", "received 0 items of ancdata"),
)
_MACHINE_WORDS = (
    *("CUDA error", "ECC error", "NCCL", "CUDNN_STATUS", "cuDNN error", "CUBLAS_STATUS", "device-side"),
    *("Connection closed by peer", "Connection reset by peer", "uncorrectable", "No CUDA GPUs are available"),
    "DataLoader worker (pid",  # one was killed: out of memory. What a data set raises in one says "worker process"
    "subprocesses has abruptly died",  # the same of a worker that tokenizes
)
_MACHINE_NAMES = (
    *("ConnectionError", "ConnectTimeout", "ReadTimeout", "ConnectError", "ReadError", "RemoteProtocolError"),
    *("NetworkError", "TimeoutException", "ProxyError", "IncompleteRead", "ChunkedEncodingError"),
    *("OfflineModeIsEnabled", "LocalEntryNotFoundError", "ClientConnectionError", "ClientPayloadError"),
    *("EndpointConnectionError", "HTTPClientError", "ResponseStreamingError", "FlexibleChecksumError"),
    *("FSTimeoutError", "gaierror", "SSLError", "MaxRetryError", "NewConnectionError"),
    *("DistNetworkError", "DistBackendError", "DistStoreError", "AcceleratorError", "BrokenProcessPool"),
)
_PASSING_STATUS = (408, 425, 429)  # an HTTP status that a later try may not get; from 500 on all are
# Errors whose text may quote the data, and so say anything.
_QUOTING = (ValueError, TypeError, LookupError, FileNotFoundError, PermissionError, NotADirectoryError)
_QUOTING_NAMES = ("TemplateError", "RemoteTraceback")


def is_machine_fault(error: BaseException) -> bool:
    """Whether an error, or what caused it, is the machine's: its disk, memory or network, or a process killed there.

    Whoever turns errors into an InputError asks this first, and lets such an error pass as it is.
    """
    return any(_is_machine_fault(link) for link in chain(error))


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what caused it, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _is_machine_fault(error: BaseException) -> bool:
    if isinstance(error, (StoreError, ConnectionError, TimeoutError, MemoryError)):
        return True
    if isinstance(error, OSError) and error.errno in _MACHINE_ERRNOS:
        return True
    if any(kind.__name__ in _MACHINE_NAMES for kind in type(error).__mro__) or _is_passing_answer(error):
        return True
    if isinstance(error, SpotuneError) or _is_quoting(error):
        return False
    text = str(error)
    if any(found in text for found in _MACHINE_TEXTS):
        return True
    return isinstance(error, RuntimeError) and any(word in text for word in _MACHINE_WORDS)


def _is_quoting(error: BaseException) -> bool:
    """Whether the error's text may quote what a user wrote; an error with a number is known by that."""
    if isinstance(error, _QUOTING) or (isinstance(error, OSError) and error.errno is not None):
        return True
    return any(kind.__name__ in _QUOTING_NAMES for kind in type(error).__mro__)


def _is_passing_answer(error: BaseException) -> bool:
    """Whether a server answered that it cannot just now."""
    status, code = answer_of(error)
    seen = status or getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
    return code in PASSING_CODES or (isinstance(seen, int) and (500 <= seen < 600 or seen in _PASSING_STATUS))
