"""What an exception means for the run: bad input, worth another machine, or failed for good."""

import traceback

from spotune.contracts.errors import InputError, OtherVersions, SpotuneError, StoreError
from spotune.contracts.exchange import Outcome
from spotune.contracts.machinefaults import is_machine_fault

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
    if is_machine_fault(error):
        return Outcome("retry", step, one_line(error))
    if type(error).__name__ == "SafetensorError":  # named, not imported: this module comes before the libraries
        return Outcome("bad_input", step, f"model_name_or_path: its weights are damaged: {one_line(error)}")
    return Outcome("failed", step, one_line(error))


def one_line(error: BaseException) -> str:
    """``Type: message`` on one line; where it came from is in the traceback."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text}"[:500]


def print_traceback(error: BaseException) -> None:
    traceback.print_exception(error)


def _is_out_of_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or "CUDA out of memory" in str(error)
