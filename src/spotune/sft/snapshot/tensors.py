"""The safetensors format, written from memory without another copy.

The library's own writer is neither interruptible by a hash nor able to write past the page cache. The format:
https://github.com/huggingface/safetensors#format (8 bytes of length, a JSON header, the tensors' bytes).
"""

import json
import struct
from collections.abc import Mapping
from typing import Protocol

import torch

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


class Writable(Protocol):
    def write(self, data: bytes | memoryview, /) -> int: ...


def can_write(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether all dtypes are ones that this writer knows; the library knows more."""
    return all(tensor.dtype in _NAMES for tensor in tensors.values())


def write_safetensors(file: Writable, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None) -> None:
    """Writes contiguous host tensors, in the library's order: by size of an element, then by name."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in names:
        if tensors[name].numel():
            file.write(memoryview(tensors[name].reshape(-1).view(torch.uint8).numpy()))
