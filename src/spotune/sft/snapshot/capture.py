"""What Trainer would write, copied instead: its own ``_save_checkpoint`` runs, with stand-ins for a few functions.

So names, layout, sharding and what belongs into a checkpoint stay the libraries' business. What is not caught here
(small JSON files) is written at once, as ever; what is caught is a list of ``Piece``s for the writer.

Caught: ``torch.save``, safetensors' ``save_file``, ``torch.distributed.checkpoint.save`` (FSDP), the tokenizer.
"""

import copy
import io
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import peft.peft_model
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
import transformers.modeling_utils
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from spotune.sft.snapshot.arena import Arena
from spotune.sft.snapshot.direct import HashedFile
from spotune.sft.snapshot.tensors import can_write, write_safetensors

# A job for the writer: writes something into the checkpoint's folder; returns the facts of files that it hashed. Those
# of one snapshot may run beside each other, in any order.
Piece = Callable[[], dict[Path, dict[str, Any]]]

_PLAIN = (torch.Tensor, torch.nn.Parameter, AsyncCollectiveTensor)  # the last is one that was gathered from all ranks
_SCALARS = (int, float, str, bool, bytes, complex, type(None), torch.dtype, torch.device)
_torch_save, _save_file, _dcp_save = torch.save, safetensors.torch.save_file, dcp.save  # the real ones


class _Opaque(Exception):
    """An object that may change behind our back and that we do not know how to copy."""


class Capture:
    """Collects the pieces of one snapshot.

    Args:
        arena: where tensors are copied to.
        group: a CPU process group for sharded checkpoints, None where there are none.
    """

    def __init__(self, arena: Arena, group: Any = None) -> None:
        self.pieces: list[Piece] = []
        self._sharded: list[Callable[[], Any]] = []
        self._arena, self._group = arena, group

    def torch_save(self, obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        """Stands in for ``torch.save``."""
        if not isinstance(f, (str, Path)) or args or kwargs:
            _torch_save(obj, f, *args, **kwargs)
            return
        path = Path(f)
        try:
            state = self._copy(obj, {})
        except _Opaque:
            held = io.BytesIO()
            _torch_save(obj, held)
            self.pieces.append(lambda: _write(path, lambda file: file.write(held.getbuffer())))
            return
        self.pieces.append(lambda: _write(path, lambda file: _torch_save(state, file)))

    def save_file(
        self, tensors: Mapping[str, torch.Tensor], filename: Any, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Stands in for safetensors' ``save_file``."""
        copies = {name: self._arena.copy(tensor) for name, tensor in tensors.items()}
        path, facts = Path(filename), dict(metadata or {})
        if can_write(copies):
            self.pieces.append(lambda: _write(path, lambda file: write_safetensors(file, copies, facts)))
        else:
            self.pieces.append(lambda: _save_file(copies, path, facts) or {})

    def dcp_save(self, state_dict: Any, *, storage_writer: Any, planner: Any = None, **_: Any) -> None:
        """Stands in for ``torch.distributed.checkpoint.save``; all ranks' writers come by here in the same order."""
        held = dcp.staging.BlockingAsyncStager().stage(state_dict)
        if not self._sharded:  # one piece for all of them: ranks meet in each, so that their order counts
            self.pieces.append(self._write_sharded)
        self._sharded.append(
            lambda: _dcp_save(held, storage_writer=storage_writer, planner=planner, process_group=self._group)
        )

    def _write_sharded(self) -> dict[Path, dict[str, Any]]:
        while self._sharded:
            self._sharded.pop(0)()  # with it goes what it holds in memory
        return {}

    def later(self, method: Callable[..., Any]) -> Callable[..., None]:
        """Stands in for a method that writes files of what does not change in training."""

        def record(*args: Any, **kwargs: Any) -> None:
            def write() -> dict[Path, dict[str, Any]]:
                method(*args, **kwargs)
                return {}

            self.pieces.append(write)

        return record

    def _copy(self, value: Any, copies: dict[int, torch.Tensor]) -> Any:
        """A copy that training cannot change any more; aliases within one object stay aliases."""
        if isinstance(value, torch.Tensor):
            if type(value) not in _PLAIN or value.layout != torch.strided:
                raise _Opaque
            if id(value) not in copies:
                copies[id(value)] = self._arena.copy(value)
            return copies[id(value)]
        if type(value) in (dict, OrderedDict):
            return type(value)((key, self._copy(entry, copies)) for key, entry in value.items())
        if type(value) in (list, tuple):
            return type(value)(self._copy(entry, copies) for entry in value)
        if type(value) is np.ndarray:
            return value.copy()
        if isinstance(value, _SCALARS):
            return copy.copy(value)
        raise _Opaque


@contextmanager
def capturing(capture: Capture, tokenizer: Any) -> Iterator[None]:
    """While this lasts, what is saved goes to ``capture``."""
    places = [
        (torch, "save", capture.torch_save),
        (safetensors.torch, "save_file", capture.save_file),
        (transformers.modeling_utils, "safe_save_file", capture.save_file),
        (peft.peft_model, "safe_save_file", capture.save_file),
        (dcp, "save", capture.dcp_save),
    ]
    if tokenizer is not None:
        places.append((tokenizer, "save_pretrained", capture.later(tokenizer.save_pretrained)))
    with ExitStack() as stack:
        for owner, name, stand_in in places:
            stack.enter_context(_replaced(owner, name, stand_in))
        yield
        Arena.settle()


@contextmanager
def _replaced(owner: Any, name: str, stand_in: Any) -> Iterator[None]:
    is_own, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)  # the class has it


def _write(path: Path, fill: Callable[[HashedFile], Any]) -> dict[Path, dict[str, Any]]:
    with HashedFile(path) as file:
        fill(file)
    return {path: file.facts}
