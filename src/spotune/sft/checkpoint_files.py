"""Reads a checkpoint's files, and runs no code that somebody else may have put into them."""

import importlib
import io
import json
import pickle
import re
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from transformers.trainer_pt_utils import safe_globals

from spotune.core.errors import SpotuneError
from spotune.core.keys import is_key

# Sharded checkpoints (FSDP). torch unpickles ``.metadata``, and each value that is not a tensor, with a reader that
# calls whatever the file names. Here ``.metadata`` may name only the classes below, and values are read like weights.

_OF_METADATA = (
    "Metadata MetadataIndex StorageMeta BytesStorageMetadata TensorStorageMetadata TensorProperties"
    " ChunkStorageMetadata _MEM_FORMAT_ENCODING"
)
_CLASSES = {
    **{(metadata.__name__, name): getattr(metadata, name) for name in _OF_METADATA.split()},
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("pathlib", "PosixPath"): Path,
}


class _Unpickler(pickle.Unpickler):
    """Loads only the classes of ``.metadata``, and torch's dtypes."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES:
            return _CLASSES[module, name]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise SpotuneError(f"names {module}.{name}, which no checkpoint needs")


def refuse_code() -> None:
    """Makes torch read sharded checkpoints without running their code, in this process."""
    FileSystemReader.read_metadata = _read_metadata  # type: ignore[method-assign]
    DefaultLoadPlanner.load_bytes = _load_bytes  # type: ignore[method-assign]


def _read_metadata(reader: FileSystemReader, *args: Any, **options: Any) -> Metadata:
    """Replaces the reader's own method and returns the same. Raises SpotuneError, naming the file."""
    path = Path(reader._get_metadata_path(options.get("rank")))
    try:
        with open(path, "rb") as file:
            found = _Unpickler(file).load()
        if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
            raise ValueError("no storage_data")
        for entry in found.storage_data.values():
            if not isinstance(entry, filesystem._StorageInfo) or not is_key(entry.relative_path):
                raise ValueError("names a file outside the checkpoint")
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        what = str(error) or type(error).__name__
        raise SpotuneError(f"{path.parent.name}/{path.name}: not a sharded checkpoint's metadata: {what}") from error
    found.storage_meta = found.storage_meta or metadata.StorageMeta()
    found.storage_meta.load_id = reader.load_id
    return found


_load_bytes_of_torch = DefaultLoadPlanner.load_bytes


def _load_bytes(planner: DefaultLoadPlanner, read_item: Any, value: io.BytesIO) -> None:
    """Replaces the planner's own method, which loads the value with any class that it names."""
    try:
        plain = torch.load(value, weights_only=True)
    except pickle.UnpicklingError as error:
        raise SpotuneError(f"{read_item.dest_index.fqn}: not a plain value of a checkpoint") from error
    again = io.BytesIO()
    torch.save(plain, again)
    again.seek(0)
    _load_bytes_of_torch(planner, read_item, again)


# DeepSpeed's checkpoints. DeepSpeed calls ``torch.load`` with ``weights_only=False`` on files from the bucket. Here
# torch reads them as weights, and the few classes below: plain data, whose making runs no code of the file's choice.

_DEEPSPEED_CLASSES = (
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
)
_load_of_torch = torch.load


def refuse_deepspeed_code() -> None:
    """Makes every ``torch.load`` of this process, also DeepSpeed's, read files as weights."""
    torch.load = _load


def _load(f: Any, *args: Any, weights_only: bool | None = None, **options: Any) -> Any:
    """Replaces ``torch.load``. Raises SpotuneError, naming the file, if the file names another class."""
    known = []  # the classes that this version of DeepSpeed has
    for module, name in _DEEPSPEED_CLASSES:
        with suppress(ImportError, AttributeError):
            known.append(getattr(importlib.import_module(module), name))
    try:
        with safe_globals(), torch.serialization.safe_globals(known):
            return _load_of_torch(f, *args, weights_only=True, **options)
    except pickle.UnpicklingError as error:
        path = Path(f if isinstance(f, (str, Path)) else str(getattr(f, "name", "checkpoint")))
        what = f"cannot be read as weights: {_reason_of(error)}"
        raise SpotuneError(f"{path.parent.name}/{path.name}: {what}") from error


# Checks that a restored checkpoint can be loaded, before Trainer loads it. The check runs no code from the checkpoint
# and reads no tensor's data. It uses torch's own readers, so it refuses exactly what loading would refuse.

STATE = "trainer_state.json"
_MOST_CHARS = 200  # of a library's message


class Unusable(SpotuneError):
    """A checkpoint cannot be loaded; the message is ``FILE: WHAT``."""


def fault_of(checkpoint: Path, best: Path | None) -> str:
    """Returns why a checkpoint, or the best one beside it, cannot be loaded, else "". Raises faults of the machine."""
    try:
        try:
            state = json.loads((checkpoint / STATE).read_bytes())
        except (FileNotFoundError, ValueError, RecursionError) as error:
            raise Unusable(f"{STATE}: not JSON, or missing") from error
        step = state.get("global_step") if isinstance(state, dict) else None
        if type(step) is not int or checkpoint.name != f"checkpoint-{step}":
            raise Unusable(f"{STATE}: not the state of {checkpoint.name}")
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


def _check_files(folder: Path, patterns: tuple[str, ...]) -> None:
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        if path.name == "training_args.bin":  # Trainer writes it and never reads it
            continue
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt"):
                    pass
            except SafetensorError as error:
                raise Unusable(f"{path.name}: its weights are damaged: {error}") from error
        else:
            with open(path, "rb") as file:
                _check_pickle(path.name, file)


def _check_pickle(name: str, file: IO[bytes]) -> None:
    try:
        with safe_globals():
            torch.load(file, map_location="meta", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged file raises nearly anything
        raise Unusable(f"{name}: cannot be read as weights: {_reason_of(error)}") from error


def _check_sharded(folder: Path) -> None:
    """Checks what FSDP loads: the metadata, and each tensor and value that the metadata names."""
    refuse_code()
    reader = FileSystemReader(folder)
    metadata = reader.read_metadata()
    for index, place in (metadata.storage_data or {}).items():
        name = f"{folder.name}/{place.relative_path}"
        path = folder / place.relative_path
        if not path.is_file() or place.offset < 0 or place.offset + place.length > path.stat().st_size:
            raise Unusable(f"{name}: does not hold all that {folder.name}/.metadata names")
        with open(path, "rb") as file:
            _check_pickle(f"{name}: {getattr(index, 'fqn', index)}", reader._slice_file(file, place))


def _reason_of(error: Exception) -> str:
    """Returns what is wrong, in a few words of torch's long message."""
    text = str(error)
    if isinstance(error, pickle.UnpicklingError):
        if named := re.search(r"GLOBAL (\S+)", text):
            return f"names {named[1][:_MOST_CHARS]}, which no checkpoint needs"
        if found := re.search(r"WeightsUnpickler error: ([^\n]+)", text):
            text = found[1]
    return " ".join(text.split())[:_MOST_CHARS] or type(error).__name__
