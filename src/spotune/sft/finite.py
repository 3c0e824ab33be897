"""Watches for weights that are not finite: they end the training, and no checkpoint or result holds them.

The loss and the gradient's norm of every step leave a flag on the device, without a wait. The weights themselves are
read where it counts: before training, after the first step, when a loss is logged as NaN or infinite, before each
snapshot, and before the result. That is one pass over the tensors and one wait (benchmarks/finite.py).

Only what is trained decides. A mask of -inf in a buffer and the integers of a quantized base are nobody's fault.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor

_NEVER = 2**62  # a step that does not come


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Returns whether no element is NaN or infinite. Ignores integers; waits once for each dtype.

    The smallest and the largest element say it: NaN wins both. Unlike a sum or a norm they cannot overflow.
    """
    ends: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in _measurable(tensors):
        ends.setdefault((tensor.device, tensor.dtype), []).extend(_ends(tensor))
    return all(bool(torch.stack(found).isfinite().all()) for found in ends.values())


def _measurable(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """This rank's part of each tensor, as far as it has elements that can be NaN."""
    for tensor in tensors:
        local = getattr(tensor, "ds_tensor", tensor)  # DeepSpeed's own word for a rank's part
        local = local.to_local() if isinstance(local, DTensor) else local
        if local.layout != torch.strided or not local.numel():
            continue
        local = torch.view_as_real(local) if local.is_complex() else local
        if local.is_floating_point():
            yield local.detach().float() if local.element_size() == 1 else local.detach()


def _ends(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        return torch.aminmax(tensor)
    except NotImplementedError:  # a quantized state that looks like a tensor of floats
        return torch.aminmax(tensor.dequantize())


class Finite:
    """Knows up to which step one rank's weights were finite."""

    def __init__(self) -> None:
        self._checked: int | None = None  # the weights were finite after this step
        self._is_bad: torch.Tensor | None = None  # within the step under way
        self._since: torch.Tensor | None = None  # the first step with a flag since ``_checked``

    def note(self, value: Any) -> None:
        """Takes a loss or a norm of the step under way. Does not wait for the device."""
        if isinstance(value, torch.Tensor) and not isinstance(value, DTensor):
            bad = torch.isfinite(value.detach()).all().logical_not()
            self._is_bad = bad if self._is_bad is None else self._is_bad.to(bad.device) | bad
        elif isinstance(value, float) and not math.isfinite(value):
            self._is_bad = torch.tensor(True)

    def end_step(self, step: int, was_skipped: bool) -> None:
        """Keeps the step's flag. A step that a gradient scaler left out changed no weights."""
        bad, self._is_bad = self._is_bad, None
        if bad is None or was_skipped:
            return
        since = torch.full((), _NEVER, device=bad.device) if self._since is None else self._since.to(bad.device)
        self._since = torch.where(bad & (since == _NEVER), step, since)

    def fault(self, trainer: Any, with_optimizer: bool = False) -> str:
        """Returns what is not finite and since when, empty where all is well. All ranks call it and get the same."""
        step = int(trainer.state.global_step)
        tensors = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        is_finite = all_finite(tensors)
        since = _NEVER if self._since is None else int(self._since)
        # A state can only have gone bad in a step whose gradient was: so mostly it need not be read.
        is_suspect = with_optimizer and is_finite and since != _NEVER
        is_state_finite = not is_suspect or all_finite(_optimizer_state(trainer))
        is_finite, is_state_finite, since = _common(trainer, is_finite, is_state_finite, since)
        if is_finite and is_state_finite:
            self._checked, self._since = step, None
            return ""
        return f"{'the optimizer state is' if is_finite else 'the weights are'} not finite {self._when(step, since)}"

    def _when(self, step: int, since: int) -> str:
        if self._checked is None:
            return f"in the checkpoint of step {step}" if step else "in the model, before the first step"
        if since <= step:
            return f"since step {since}"
        if self._checked >= step - 1:
            return f"since step {step}"
        return f"since step {step} or one before it (after step {self._checked} they were)"


def _optimizer_state(trainer: Any) -> Iterator[torch.Tensor]:
    for state in getattr(trainer.optimizer, "state", {}).values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _common(trainer: Any, is_finite: bool, is_state_finite: bool, since: int) -> tuple[bool, bool, int]:
    """What all ranks agree on: a fault of one is a fault of all, and the earliest step counts."""
    if trainer.args.world_size <= 1:
        return is_finite, is_state_finite, since
    found = torch.tensor([int(is_finite), int(is_state_finite), since], device=trainer.args.device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MIN)
    weights, state, first = found.tolist()
    return bool(weights), bool(state), int(first)
