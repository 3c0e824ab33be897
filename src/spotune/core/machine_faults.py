"""Which errors are the machine's: its disk, memory or network failed, or a process was killed there.

Another machine may do better, so such an error never counts as bad input, whatever was being read.
"""

import errno
from collections.abc import Iterator

from spotune.core.errors import SpotuneError, StoreError
from spotune.core.store.faults import PASSING_CODES, answer_of

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
