"""A file that is hashed while it is written, and that does not go through the page cache where that can be.

Gigabytes in the page cache cost a copy, push out what training reads, and come back as a burst of writing in the
middle of some later step. A file system that does not do direct I/O gets an ordinary file.
"""

import errno
import fcntl
import hashlib
import mmap
import os
from pathlib import Path
from types import TracebackType
from typing import Any

BLOCK = 4 << 20  # bytes; a multiple of any device's sector


class HashedFile:
    """A new file for ``write``; ``facts`` has its size in bytes and its sha256 once it is closed."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor, self._is_direct = _open(path)
        self._block = mmap.mmap(-1, BLOCK)
        self._filled = 0
        self._size = 0
        self._digest = hashlib.sha256()

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is None:
                self._finish()
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
        """Part of the interface of files; what is buffered is written when the file is closed."""

    @property
    def facts(self) -> dict[str, Any]:
        """``{size, sha256}``, as commits name it."""
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
                    self._is_direct = False  # some file systems take the flag and refuse the writes
                    flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
                    fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self._filled = 0

    def _finish(self) -> None:
        if self._filled:
            # Direct writes come in whole sectors: the rest of the block goes along and is cut off again.
            self._flush_block(-(-self._filled // mmap.PAGESIZE) * mmap.PAGESIZE)
        os.ftruncate(self._descriptor, self._size)
        os.fsync(self._descriptor)


def _open(path: Path) -> tuple[int, bool]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    direct = getattr(os, "O_DIRECT", 0)
    try:
        return os.open(path, flags | direct, 0o666), bool(direct)
    except OSError:
        return os.open(path, flags, 0o666), False
