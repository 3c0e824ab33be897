"""Copies checkpoints in memory at a step's end, and writes them to disk in threads behind training."""

import copy
import errno
import fcntl
import hashlib
import io
import json
import mmap
import os
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest import mock

import numpy as np
import peft.peft_model
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
import transformers.modeling_utils
from torch.distributed._functional_collectives import AsyncCollectiveTensor

ALIGNMENT = 64  # bytes; what torch and numpy align to


class Arena:
    """The memory of a snapshot: one block of the host's, allocated from start to end; ``reset`` frees all of it.

    The first touch of memory costs several times the copy itself, so the block is kept, and made before the first save.
    Copies that do not fit get memory of their own.
    """

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None
        self._used = self._needed = 0
        self._warming: threading.Thread | None = None

    def warm(self, size: int) -> None:
        """Makes the block of ``size`` bytes in the background; ``reset`` waits for it."""
        size += 1 << 20  # small things are saved too
        self._warming = threading.Thread(target=self._make, args=(size,), name="arena", daemon=True)
        self._warming.start()

    def reset(self) -> None:
        """Frees the last snapshot. A block that was much too small grows."""
        if self._warming is not None:
            self._warming.join()
            self._warming = None
        if self._memory is None or self._needed > self._memory.numel() * 1.1:  # a new block takes time
            self._memory = None
            self._make(self._needed)
        self._used = self._needed = 0

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns a copy on the host with its own storage; complete when ``capturing`` ends."""
        size = size_of([tensor])
        begin, self._used = self._used, self._used + size
        self._needed += size
        if size == 0 or self._memory is None or self._used > self._memory.numel():
            self._used = begin
            place = torch.empty(tensor.shape, dtype=tensor.dtype)
        else:
            block = self._memory.numpy()
            place = torch.frombuffer(block, dtype=tensor.dtype, count=tensor.numel(), offset=begin).view(tensor.shape)
        place.copy_(tensor.detach(), non_blocking=True)  # a plain tensor, whatever the other's subclass is
        return place

    def _make(self, size: int) -> None:
        if size == 0:
            return
        if torch.cuda.is_available():
            self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            return
        block = mmap.mmap(-1, size)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            block.madvise(mmap.MADV_HUGEPAGE)
        self._memory = torch.frombuffer(block, dtype=torch.uint8).zero_()


def size_of(tensors: Iterable[torch.Tensor]) -> int:
    """Returns the bytes that copies of these tensors take in an arena."""
    return sum(-(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT for tensor in tensors)


# The safetensors format: https://github.com/huggingface/safetensors#format (8 bytes of length, a JSON header, the
# tensors' bytes). The library's own writer can neither hash while it writes nor write past the page cache.

_NAMES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
    **{torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"},
}


def write_safetensors(file: Any, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None) -> None:
    """Writes contiguous host tensors in the library's order: by an element's size, then by name."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in names:
        if tensors[name].numel():
            file.write(memoryview(tensors[name].reshape(-1).view(torch.uint8).numpy()))


BLOCK = 4 << 20  # bytes; a multiple of any device's sector


class HashedFile:
    """A new file that is hashed while it is written, and that skips the page cache if the file system allows it.

    Gigabytes in the page cache cost a copy, evict what training reads, and are written in a burst during a later step.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        flags, direct = os.O_WRONLY | os.O_CREAT | os.O_TRUNC, getattr(os, "O_DIRECT", 0)
        try:
            self._descriptor, self._is_direct = os.open(path, flags | direct, 0o666), bool(direct)
        except OSError:
            self._descriptor, self._is_direct = os.open(path, flags, 0o666), False
        self._block = mmap.mmap(-1, BLOCK)
        self._filled = self._size = 0
        self._digest = hashlib.sha256()

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is None:
                if self._filled:
                    # Direct writes need whole sectors: the rest of the block is written too and cut off again.
                    self._flush_block(-(-self._filled // mmap.PAGESIZE) * mmap.PAGESIZE)
                os.ftruncate(self._descriptor, self._size)
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)
            self._block.close()

    def write(self, data: Any) -> int:
        """Appends anything that has a buffer; returns its size in bytes."""
        with memoryview(data) as given, given.cast("B") as view:
            self._digest.update(view)
            begin = 0
            while begin < len(view):
                count = min(len(view) - begin, BLOCK - self._filled)
                self._block[self._filled : self._filled + count] = view[begin : begin + count]
                self._filled += count
                begin += count
                if self._filled == BLOCK:
                    self._flush_block(BLOCK)
            self._size += len(view)
            return len(view)

    def flush(self) -> None:
        """Does nothing, like a file's method of this name: closing writes the buffer."""

    @property
    def facts(self) -> dict[str, Any]:
        """``{size, sha256}`` as commits have it, once the file is closed."""
        return {"size": self._size, "sha256": self._digest.hexdigest()}

    def _flush_block(self, size: int) -> None:
        with memoryview(self._block) as block:
            written = 0
            while written < size:
                try:
                    written += os.write(self._descriptor, block[written:size])
                except OSError as error:
                    if not self._is_direct or error.errno != errno.EINVAL:
                        raise
                    self._is_direct = False  # some file systems accept the flag and refuse the writes
                    flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
                    fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self._filled = 0


# A capture runs Trainer's own ``_save_checkpoint`` with replacements for ``torch.save``, safetensors' ``save_file``,
# ``torch.distributed.checkpoint.save`` (FSDP) and the tokenizer's method. So the libraries still decide names, layout,
# sharding and contents. Small JSON files are written at once.

# Writes something into the checkpoint's folder; returns the facts of files that it hashed. The pieces of one snapshot
# may run beside each other, in any order.
Piece = Callable[[], dict[Path, dict[str, Any]]]

_PLAIN = (torch.Tensor, torch.nn.Parameter, AsyncCollectiveTensor)  # the last is gathered from all ranks
_SCALARS = (int, float, str, bool, bytes, complex, type(None), torch.dtype, torch.device)
_torch_save, _save_file, _dcp_save = torch.save, safetensors.torch.save_file, dcp.save  # the originals


class _Opaque(Exception):
    """An object may change during training, and there is no known way to copy it."""


class Capture:
    """Collects the pieces of one snapshot. ``group`` is a CPU process group for sharded checkpoints, else None."""

    def __init__(self, arena: Arena, group: Any = None) -> None:
        self.pieces: list[Piece] = []
        self._sharded: list[Callable[[], Any]] = []
        self._arena, self._group = arena, group

    def torch_save(self, obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
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
        copies = {name: self._arena.copy(tensor) for name, tensor in tensors.items()}
        path, facts = Path(filename), dict(metadata or {})
        if all(tensor.dtype in _NAMES for tensor in copies.values()):  # the library knows more dtypes
            self.pieces.append(lambda: _write(path, lambda file: write_safetensors(file, copies, facts)))
        else:
            self.pieces.append(lambda: _save_file(copies, path, facts) or {})

    def dcp_save(self, state_dict: Any, *, storage_writer: Any, planner: Any = None, **_: Any) -> None:
        """Replaces ``torch.distributed.checkpoint.save``. All ranks' writers call it in the same order."""
        held = dcp.staging.BlockingAsyncStager().stage(state_dict)
        if not self._sharded:  # one piece for all of them: ranks wait for each other in each, so their order counts
            self.pieces.append(self._write_sharded)
        options = {"storage_writer": storage_writer, "planner": planner, "process_group": self._group}
        self._sharded.append(partial(_dcp_save, held, **options))

    def _write_sharded(self) -> dict[Path, dict[str, Any]]:
        while self._sharded:
            self._sharded.pop(0)()  # which frees its memory
        return {}

    def later(self, method: Callable[..., Any]) -> Callable[..., None]:
        """Replaces a method that writes what does not change in training."""

        def record(*args: Any, **kwargs: Any) -> None:
            def write() -> dict[Path, dict[str, Any]]:
                method(*args, **kwargs)
                return {}

            self.pieces.append(write)

        return record

    def _copy(self, value: Any, copies: dict[int, torch.Tensor]) -> Any:
        """Returns a copy that training cannot change; aliases within one object stay aliases."""
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
    """Sends what is saved to ``capture``, while this lasts."""
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
        for owner, name, replacement in places:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # until all copies from a GPU are complete


def _write(path: Path, fill: Callable[[HashedFile], Any]) -> dict[Path, dict[str, Any]]:
    with HashedFile(path) as file:
        fill(file)
    return {path: file.facts}


class Writer:
    """Writes one snapshot at a time, a few files of it at once. Call ``settle``, or check ``busy``, before the next."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "snapshot")
        # Two files at a time: on a fast disk, hashing takes a core. Training's threads wait for the slowest one at
        # every operator: time taken from all cores at once costs it less than the same time taken from one.
        self._files = ThreadPoolExecutor(2, "snapshot-file", _lower_priority)
        self._job: Future[None] | None = None

    @property
    def busy(self) -> bool:
        return self._job is not None and not self._job.done()

    def submit(self, pieces: list[Piece], then: Callable[[dict[Path, dict[str, Any]], float], None]) -> None:
        """Writes the pieces, one or more files each, and frees them; then calls ``then`` with facts and seconds."""

        def write() -> None:
            began = time.monotonic()
            facts: dict[Path, dict[str, Any]] = {}
            under_way = [self._files.submit(piece) for piece in pieces]
            wait(under_way)  # for all, also if one fails: nothing may write into a removed checkpoint
            for piece in under_way:
                facts |= piece.result()
            pieces.clear()  # frees their memory
            then(facts, time.monotonic() - began)

        self._job = self._pool.submit(write)

    def settle(self) -> OSError | None:
        """Waits for the snapshot and returns, once, the disk's fault that stopped it. Raises other errors."""
        job, self._job = self._job, None
        error = job.exception() if job else None
        cause = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if error is not None and cause is None:
            raise error
        return cause


def _lower_priority() -> None:
    # Training's own threads go first if cores are scarce; while a run stops there are none.
    with suppress(OSError):  # not every system allows it for a thread
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)
