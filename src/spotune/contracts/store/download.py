"""The local file of a download: hashed while it is written, and under another name until it is whole."""

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

from spotune.contracts.store.faults import local_side


class Download:
    """Replaces ``local`` by what is written, when it is finished; else nothing is left. Raises LocalFault."""

    def __init__(self, local: Path) -> None:
        self._local = local
        self._part = local.with_name(f".part-{uuid4().hex}")
        self._digest = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1, "hash")
        self._hashing: Future[None] | None = None
        self._size = 0

    def __enter__(self) -> "Download":
        with local_side():
            self._local.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._part, "xb", buffering=0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._hasher.shutdown()
        with suppress(OSError):
            self._file.close()
        self._part.unlink(missing_ok=True)

    def link(self, folder: int, name: str, opened: int) -> bool:
        """Makes the file a hard link to ``name`` in an open folder if it can be one, and only if it still is the file
        that is open as ``opened``; its bytes are then to be hashed only."""
        link = self._part.with_name(f"{self._part.name}-link")
        try:
            os.link(name, link, src_dir_fd=folder, follow_symlinks=False)
            if not os.path.samestat(os.lstat(link), os.fstat(opened)):
                link.unlink()
                return False
            link.replace(self._part)
        except OSError:
            return False
        return True

    def hash(self, data: bytes | bytearray | memoryview) -> None:
        """Hashes on a thread: ``data`` must stay as it is until the next call is over."""
        if self._hashing is not None:
            self._hashing.result()
        self._hashing = self._hasher.submit(self._digest.update, data)
        self._size += len(data)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.hash(data)
        left = memoryview(data)
        with local_side():
            while left:
                left = left[self._file.write(left) :]

    def finish(self) -> dict[str, Any]:
        """Puts the file in its place; returns its ``{size: bytes, sha256: hex}``."""
        with local_side():
            self._file.close()
            self._part.replace(self._local)
        if self._hashing is not None:
            self._hashing.result()
        return {"size": self._size, "sha256": self._digest.hexdigest()}
