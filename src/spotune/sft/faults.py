"""What an exception means for the run: bad input, worth another machine, or failed for good."""

import errno
import traceback
from collections.abc import Iterator

from spotune.contracts.errors import InputError, OtherVersions, SpotuneError, StoreError
from spotune.contracts.exchange import Outcome

# Faults of a machine or of the way to the hub: another machine may do better.
_MACHINE_ERRNOS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.ENETUNREACH, errno.EHOSTUNREACH)
_MACHINE_WORDS = (
    *("CUDA error", "ECC error", "NCCL", "CUDNN_STATUS", "cuDNN error", "CUBLAS_STATUS", "device-side"),
    *("Connection closed by peer", "Connection reset by peer", "uncorrectable", "No CUDA GPUs are available"),
    "DataLoader worker (pid",  # one was killed: out of memory. What a data set raises in one says "worker process"
)
_NETWORK_NAMES = (
    *("ConnectionError", "ConnectTimeout", "ReadTimeout", "ConnectError", "ReadError", "RemoteProtocolError"),
    *("OfflineModeIsEnabled", "LocalEntryNotFoundError", "ClientConnectorError", "EndpointConnectionError"),
    *("DistNetworkError", "DistBackendError", "DistStoreError", "AcceleratorError"),
)
_MEMORY_REMEDY = "lower per_device_train_batch_size or max_length, or set activation_checkpointing: true"


class Stopped(Exception):
    """The guard asked the ranks to leave; everything up to ``step`` is staged."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step


class NotFinite(SpotuneError):
    """Training cannot be used from some step on; the message names the step."""


def outcome_of(error: BaseException, step: int) -> Outcome:
    """The outcome that an exception amounts to; its message is one line for people."""
    if isinstance(error, Stopped):
        return Outcome("stopped", error.step)
    if isinstance(error, InputError):
        changed = error.changed if isinstance(error, OtherVersions) else []
        return Outcome("bad_input", step, str(error), changed)
    if isinstance(error, SpotuneError):
        return Outcome("retry" if isinstance(error, StoreError) else "failed", step, str(error))
    if _is_out_of_memory(error):  # it would come again on the same kind of machine
        return Outcome("failed", step, f"the GPU ran out of memory ({_MEMORY_REMEDY})")
    if type(error).__name__ == "SafetensorError":  # named, not imported: this module comes before the libraries
        return Outcome("bad_input", step, f"model_name_or_path: its weights are damaged: {one_line(error)}")
    if any(_is_machine_fault(link) for link in chain(error)):
        return Outcome("retry", step, one_line(error))
    return Outcome("failed", step, one_line(error))


def one_line(error: BaseException) -> str:
    """``Type: message`` on one line; where it came from is in the traceback."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text}"[:500]


def print_traceback(error: BaseException) -> None:
    traceback.print_exception(error)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what caused it, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _is_out_of_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or "CUDA out of memory" in str(error)


def _is_machine_fault(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in _MACHINE_ERRNOS:
        return True
    if isinstance(error, (ConnectionError, TimeoutError)) or type(error).__name__ in _NETWORK_NAMES:
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _MACHINE_WORDS)
