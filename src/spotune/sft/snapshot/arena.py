"""The memory of a snapshot: one block of the host's, whose pages are there before the first save needs them.

Memory that is touched for the first time costs several times what the copy itself costs, so the block is kept.
"""

import mmap
import threading
from collections.abc import Iterable

import torch

ALIGNMENT = 64  # bytes; what torch and numpy align to
SPARE = 1 << 20  # bytes beyond what was asked for: small things are saved too
TOLERATED = 1.1  # beyond this a block that is too small is made anew, which takes time


class Arena:
    """A bump allocator; ``reset`` gives everything back at once. Copies that do not fit get memory of their own."""

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None
        self._used = 0
        self._needed = 0
        self._warming: threading.Thread | None = None

    def warm(self, size: int) -> None:
        """Makes the block in the background, ``size`` bytes; ready when ``reset`` is called next."""
        self._warming = threading.Thread(target=self._make, args=(size + SPARE,), name="arena", daemon=True)
        self._warming.start()

    def reset(self) -> None:
        """Nothing of the last snapshot is needed any more. A block that was much too small grows."""
        if self._warming is not None:
            self._warming.join()
            self._warming = None
        if self._memory is None or self._needed > self._memory.numel() * TOLERATED:
            self._memory = None
            self._make(self._needed)
        self._used = self._needed = 0

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the host with a storage of its own; complete after ``settle``."""
        size = tensor.numel() * tensor.element_size()
        begin, self._used = self._used, self._used + -(-size // ALIGNMENT) * ALIGNMENT
        self._needed += -(-size // ALIGNMENT) * ALIGNMENT
        if size == 0 or self._memory is None or self._used > self._memory.numel():
            self._used = begin
            place = torch.empty(tensor.shape, dtype=tensor.dtype)
        else:
            block = self._memory.numpy()
            place = torch.frombuffer(block, dtype=tensor.dtype, count=tensor.numel(), offset=begin).view(tensor.shape)
        place.copy_(tensor.detach(), non_blocking=True)  # a plain tensor, whatever the subclass of the other
        return place

    @staticmethod
    def settle() -> None:
        """Waits until all copies from a GPU have arrived."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()

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
    """Bytes that copies of these tensors take in an arena."""
    return sum(-(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT for tensor in tensors)
