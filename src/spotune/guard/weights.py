"""The fingerprint of trained weights, from safetensors files alone: no torch.

Whoever takes it also reads every element, so this is where weights that are not finite are found last.
"""

import hashlib
import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spotune.contracts.errors import SpotuneError, StoreError

_MOST_HEADER = 100_000_000  # as safetensors has it
# dtype -> bytes of an element, and the bits of its exponent. All of them are set in NaN and infinity, in nothing else.
_FLOATS = {
    "F64": (8, 0x7FF0 << 48),
    "F32": (4, 0x7F80 << 16),
    "BF16": (2, 0x7F80),
    "F16": (2, 0x7C00),
    "F8_E5M2": (1, 0x7C),
    "F8_E4M3": (1, 0x7F),
}


def weights_sha256(files: Iterable[Path]) -> str:
    """sha256 (hex) over all tensors sorted by name: ``name\\n dtype\\n shape\\n`` then the raw bytes of each.

    dtype is safetensors' word (``F32``, ``BF16``), shape is comma-separated; two results with the same
    weights have the same fingerprint however they are sharded. Raises StoreError for a damaged file, SpotuneError for a
    tensor that holds NaN or infinity; -inf may stand in a mask.
    """
    tensors: dict[str, tuple[Path, str, list[int], int, int]] = {}
    for path in files:
        with open(path, "rb") as file:
            try:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(min(length, _MOST_HEADER)))
                for name in header.keys() - {"__metadata__"}:
                    tensors[name] = (path, *_place_of(header[name], 8 + length))
            except (struct.error, AttributeError, ValueError, RecursionError) as error:
                raise StoreError(f"{path.name}: not a safetensors file: {error}") from error
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
                if has_not_finite(block, dtype):
                    raise SpotuneError(f"{path.name}: tensor {name} holds NaN or infinity: not a result to certify")
                size -= len(block)
    return digest.hexdigest()


def _place_of(facts: Any, start: int) -> tuple[str, list[int], int, int]:
    """A tensor's dtype, shape, offset in the file and size in bytes; raises ValueError."""
    match facts:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            if all(type(size) is int for size in shape) and 0 <= begin <= end:
                return dtype, shape, start + begin, end - begin
    raise ValueError("a tensor without dtype, shape and data_offsets")


def has_not_finite(block: bytes, dtype: str) -> bool:
    """Returns whether any element of a block is NaN or +inf; ``dtype`` is safetensors' word. Integers never are."""
    size, exponent = _FLOATS.get(dtype, (0, 0))
    if not size:
        return False
    # Fast, and enough for nearly all blocks: the highest byte has the exponent's highest bits.
    top = exponent >> 8 * (size - 1)
    highest = block[size - 1 :: size]
    if not any(byte in highest for byte in range(256) if byte & top == top):
        return False
    # Each element is a lane of one great integer: an addition carries into the sign's place where it is large enough.
    count = len(block) // size
    lanes = (1 << 8 * size * count) // ((1 << 8 * size) - 1)  # 1 in each lane
    sign = 1 << 8 * size - 1
    value = int.from_bytes(block, "little")
    magnitude, signs = value & lanes * (sign - 1), value & lanes * sign
    beyond = (magnitude + lanes * (sign - exponent)) & lanes * sign  # NaN or infinite
    is_nan = (magnitude + lanes * (sign - exponent - 1)) & lanes * sign if dtype != "F8_E4M3" else beyond
    return bool(is_nan) or beyond & ~signs != 0
