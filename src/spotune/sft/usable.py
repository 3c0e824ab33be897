"""Checks that a restored checkpoint can be loaded, before Trainer loads it.

The check runs no code from the checkpoint and reads no tensor's data. It goes by torch's own readers, so that it
refuses what loading would refuse, and nothing else.
"""

import io
import json
import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer_pt_utils import safe_globals

from spotune.contracts.errors import SpotuneError

STATE = "trainer_state.json"
NOT_LOADED = "training_args.bin"  # Trainer writes it and never reads it
_GLOBAL = re.compile(r"GLOBAL (\S+)")
_REASON = re.compile(r"WeightsUnpickler error: ([^\n]+)")
_MOST = 200  # characters of a library's message


class Unusable(SpotuneError):
    """A checkpoint that nothing can be loaded from, as ``FILE: WHAT``."""


def fault_of(checkpoint: Path, best: Path | None) -> str:
    """Returns in one line why a checkpoint, or the best one beside it, cannot be loaded; empty where it can.

    Raises OSError and MemoryError: these are the machine's.
    """
    try:
        _check_state(checkpoint)
        _check_files(checkpoint, ("*.safetensors", "*.bin", "*.pt", "*.pth"))
        for metadata in sorted(checkpoint.glob("*/.metadata")):
            _check_sharded(metadata.parent)
    except SpotuneError as error:
        return error.lines[0]
    if best is None:
        return ""
    try:
        _check_files(best, ("*.safetensors", "*.bin"))
    except SpotuneError as error:
        return f"its best checkpoint, {best.name}: {error.lines[0]}"
    return ""


def _check_state(checkpoint: Path) -> None:
    try:
        state = json.loads((checkpoint / STATE).read_bytes())
    except (FileNotFoundError, ValueError, RecursionError) as error:
        raise Unusable(f"{STATE}: not JSON, or missing") from error
    step = state.get("global_step") if isinstance(state, dict) else None
    if type(step) is not int or checkpoint.name != f"checkpoint-{step}":
        raise Unusable(f"{STATE}: not the state of {checkpoint.name}")


def _check_files(folder: Path, patterns: tuple[str, ...]) -> None:
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        if path.name == NOT_LOADED:
            continue
        if path.suffix == ".safetensors":
            _check_safetensors(path)
        else:
            with open(path, "rb") as file:
                _check_pickle(path.name, file)


def _check_safetensors(path: Path) -> None:
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise Unusable(f"{path.name}: its weights are damaged: {error}") from error


def _check_pickle(name: str, file: io.BufferedIOBase) -> None:
    try:
        with safe_globals():
            torch.load(file, map_location="meta", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a file that is damaged raises nearly anything
        raise Unusable(f"{name}: cannot be read as weights: {reason_of(error)}") from error


def _check_sharded(folder: Path) -> None:
    """Checks what FSDP loads: the metadata, and each tensor and value that the metadata names."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader  # here: slow, and only FSDP needs it

    from spotune.sft.shards import refuse_code

    refuse_code()
    metadata = FileSystemReader(folder).read_metadata()
    for index, place in (metadata.storage_data or {}).items():
        name = f"{folder.name}/{place.relative_path}"
        path = folder / place.relative_path
        if not path.is_file() or place.offset < 0 or place.offset + place.length > path.stat().st_size:
            raise Unusable(f"{name}: does not hold all that {folder.name}/.metadata names")
        with open(path, "rb") as file:
            file.seek(place.offset)
            part = _Part(file, place.offset, place.length)
            _check_pickle(f"{name}: {getattr(index, 'fqn', index)}", part)


class _Part(io.BufferedIOBase):
    """A part of an open file, as a file of its own."""

    def __init__(self, file: io.BufferedIOBase, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(self._length - self._at, 0)
        count = left if size is None or size < 0 else min(size, left)
        self._file.seek(self._start + self._at)
        data = self._file.read(count)
        self._at += len(data)
        return data

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def reason_of(error: Exception) -> str:
    """What is wrong, in a few words of torch's page."""
    text = str(error)
    if isinstance(error, pickle.UnpicklingError):
        if named := _GLOBAL.search(text):
            return f"names {named[1][:_MOST]}, which no checkpoint needs"
        if found := _REASON.search(text):
            text = found[1]
    return " ".join(text.split())[:_MOST] or type(error).__name__
