"""Reads sharded checkpoints (FSDP) without running code that somebody else may have put into them.

torch unpickles ``.metadata``, and each value that is not a tensor, with a reader that calls whatever the file names.
Here ``.metadata`` may name that file's own classes only, and values are read as torch reads weights.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from spotune.contracts.errors import SpotuneError
from spotune.contracts.names import is_key

_CLASSES = {
    **{
        (metadata.__name__, name): getattr(metadata, name)
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata", "TensorStorageMetadata"),
            *("TensorProperties", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
        )
    },
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("pathlib", "PosixPath"): Path,
}


class _Unpickler(pickle.Unpickler):
    """Knows the classes of ``.metadata``, and torch's dtypes."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES:
            return _CLASSES[module, name]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise SpotuneError(f"names {module}.{name}, which no checkpoint needs")


def refuse_code() -> None:
    """Makes torch read sharded checkpoints so, in this process."""
    FileSystemReader.read_metadata = _read_metadata  # type: ignore[method-assign]
    DefaultLoadPlanner.load_bytes = _load_bytes  # type: ignore[method-assign]


def _read_metadata(reader: FileSystemReader, *args: Any, **options: Any) -> Metadata:
    """Stands in for the reader's own method, and returns the same. Raises SpotuneError, naming the file."""
    path = Path(reader._get_metadata_path(options.get("rank")))
    try:
        with open(path, "rb") as file:
            found = _Unpickler(file).load()
        _check(found)
    except OSError:
        raise
    except Exception as error:  # a pickle that is damaged raises nearly anything
        what = str(error) or type(error).__name__
        raise SpotuneError(f"{path.parent.name}/{path.name}: not a sharded checkpoint's metadata: {what}") from error
    found.storage_meta = found.storage_meta or metadata.StorageMeta()
    found.storage_meta.load_id = reader.load_id
    return found


def _check(found: Any) -> None:
    """Raises ValueError for metadata that torch would follow to other files."""
    if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
        raise ValueError("no storage_data")
    for entry in found.storage_data.values():
        if not isinstance(entry, filesystem._StorageInfo) or not is_key(entry.relative_path):
            raise ValueError("names a file outside the checkpoint")


_load_bytes_of_torch = DefaultLoadPlanner.load_bytes


def _load_bytes(planner: DefaultLoadPlanner, read_item: Any, value: io.BytesIO) -> None:
    """Stands in for the planner's own method, which loads the value with any class that it names."""
    try:
        plain = torch.load(value, weights_only=True)
    except pickle.UnpicklingError as error:
        raise SpotuneError(f"{read_item.dest_index.fqn}: not a plain value of a checkpoint") from error
    again = io.BytesIO()
    torch.save(plain, again)
    again.seek(0)
    _load_bytes_of_torch(planner, read_item, again)
