"""The fingerprint of trained weights, from safetensors files alone: no torch."""

import hashlib
import json
import struct
from collections.abc import Iterable
from pathlib import Path

from spotune.contracts.errors import StoreError


def weights_sha256(files: Iterable[Path]) -> str:
    """sha256 (hex) over all tensors sorted by name: ``name\\n dtype\\n shape\\n`` then the raw bytes of each.

    dtype is safetensors' word (``F32``, ``BF16``), shape is comma-separated; two results with the same
    weights have the same fingerprint however they are sharded. Raises StoreError for a damaged file.
    """
    tensors: dict[str, tuple[Path, str, list[int], int, int]] = {}
    for path in files:
        with open(path, "rb") as file:
            try:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
            except (struct.error, ValueError, MemoryError, OverflowError) as error:
                raise StoreError(f"{path.name}: not a safetensors file: {error}") from error
        for name, facts in header.items():
            if name != "__metadata__":
                begin, end = facts["data_offsets"]
                tensors[name] = (path, facts["dtype"], facts["shape"], 8 + length + begin, end - begin)
    digest = hashlib.sha256()
    for name in sorted(tensors):
        path, dtype, shape, offset, size = tensors[name]
        digest.update(f"{name}\n{dtype}\n{','.join(map(str, shape))}\n".encode())
        with open(path, "rb") as file:
            file.seek(offset)
            while size > 0:
                block = file.read(min(size, 1 << 20))
                if not block:
                    raise StoreError(f"{path.name}: tensor {name} is cut off")
                digest.update(block)
                size -= len(block)
    return digest.hexdigest()
