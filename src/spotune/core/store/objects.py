"""s3:// and gs://: whole objects, moved in ranges and parts that are tried again one by one."""

import os
from asyncio import AbstractEventLoop, new_event_loop
from collections import deque
from collections.abc import Awaitable, Callable, Generator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from uuid import uuid4

from spotune.core.fields import RECORD_MOST_BYTES, is_key
from spotune.core.store.faults import GaveUp, Patience, local_side, opened
from spotune.core.store.local import Download
from spotune.core.store.requests import Connection, Pending

RANGE_BYTES = 12 << 20
RECORD_BYTES = 256 << 10  # of what is read whole, most is smaller: one request
RANGES_AHEAD = 3  # with the one in hand, and the one before it that is being hashed: 60 MiB a file
UPLOAD_TRIES = 3  # of a whole multipart upload, when somebody removes it under way


@dataclass(frozen=True)
class Head:
    """What a store says of an object; ``token`` is what its writer called itself."""

    size: int
    token: str


@dataclass(frozen=True)
class Piece:
    """A range of an object that has ``size`` bytes in all; ``version`` changes when it is overwritten."""

    data: bytes | bytearray
    size: int
    version: str


@dataclass(frozen=True)
class Page:
    """A part of a listing; ``marker`` leads to the next one, None when this is the last."""

    entries: list[Any]
    marker: Any = None


class Api(Protocol):
    """The single requests of one kind of store. Each is one try, and raises what its client raises."""

    parts_in_flight: int

    async def connect(self) -> Any: ...
    async def close(self, client: Any) -> None: ...

    def part_bytes(self, size: int) -> int:
        """How long the parts of an upload of ``size`` bytes are; what has one part only is put at once."""

    async def head(self, client: Any, path: str) -> Head: ...
    async def get(self, client: Any, path: str, start: int, length: int) -> Piece: ...
    async def put(self, client: Any, path: str, data: bytes, token: str, new: bool) -> None: ...

    async def begin(self, client: Any, path: str, token: str, new: bool) -> Any:
        """Opens an upload in parts."""

    async def part(self, client: Any, upload: Any, start: int, data: bytes, size: int) -> Any: ...
    async def finish(self, client: Any, upload: Any, receipts: list[Any], new: bool) -> None: ...
    async def abort(self, client: Any, upload: Any) -> None: ...

    async def page(self, client: Any, path: str, flat: bool, marker: Any) -> Page:
        """What is below a folder: all objects (``flat``), or those directly in it, and folders with a slash."""

    async def unfinished(self, client: Any, path: str, older_than_s: float, marker: Any) -> Page:
        """The uploads below a folder that were begun so long ago and not finished, as (path, upload)."""

    async def delete(self, client: Any, path: str) -> None: ...


class Objects:
    """A bucket in an object store; the verbs of ``Store``, faults not yet translated."""

    def __init__(
        self,
        api: Api,
        root: str,
        patience: Patience,
        waiting: Callable[[str], None] | None = None,
        new_loop: Callable[[], AbstractEventLoop] = new_event_loop,
    ) -> None:
        self._api = api
        self._root = root
        self._line = Connection(api, patience, waiting, new_loop)
        self.move: Callable[[int], object] = lambda count: None

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}".rstrip("/")

    def read(self, key: str) -> bytes:
        data = bytearray()
        with closing(self._ranges(key, RECORD_BYTES)) as ranges:
            for piece in ranges:
                data += piece
                if len(data) > RECORD_MOST_BYTES:
                    break
        return bytes(data)

    def exists(self, key: str) -> bool:
        try:
            self._head(key)
        except FileNotFoundError:
            return False
        return True

    def create(self, key: str, data: bytes) -> bool:
        return not self.exists(key) and self._put(key, data, new=True)

    def write(self, key: str, data: bytes) -> None:
        self._put(key, data, new=False)

    def upload(self, local: Path, key: str) -> None:
        self._upload(local, key, new=False)

    def upload_new(self, local: Path, key: str) -> bool:
        return not self.exists(key) and self._upload(local, key, new=True)

    def download(self, key: str, local: Path) -> dict[str, Any]:
        ranges = self._ranges(key, RANGE_BYTES)
        data = next(ranges)  # nothing is left on the disk when there is no such object
        with Download(local) as download, closing(ranges):
            while data:
                download.write(data)
                self.move(len(data))
                data = next(ranges, b"")
            return download.finish()

    def keys(self, prefix: str) -> list[str]:
        found = self._list(partial(self._api.page, path=self._path(prefix), flat=True))
        return sorted(filter(is_key, (name.removeprefix(f"{self._root}/") for name in found)))

    def names(self, prefix: str) -> list[str]:
        path = self._path(prefix)
        found = (name.removeprefix(f"{path}/") for name in self._list(partial(self._api.page, path=path, flat=False)))
        # A console may have made an object for the folder itself.
        return sorted(name for name in found if is_key(name.removesuffix("/")))

    def delete(self, key: str) -> None:
        with suppress(FileNotFoundError):
            self._line.ask("delete", partial(self._api.delete, path=self._path(key)))

    def abort_uploads(self, prefix: str, older_than_s: float) -> list[str]:
        gone = []
        for name, upload in self._list(
            partial(self._api.unfinished, path=self._path(prefix), older_than_s=older_than_s)
        ):
            with suppress(FileNotFoundError):  # finished just now
                self._line.ask("delete", partial(self._api.abort, upload=upload))
                gone.append(name.removeprefix(f"{self._root}/"))
        return gone

    def _list(self, step: Callable[..., Awaitable[Page]]) -> list[Any]:
        entries: list[Any] = []
        page = Page([], "")
        while page.marker is not None:
            page = self._line.ask("list", partial(step, marker=page.marker))
            entries += page.entries
        return entries

    def _head(self, key: str) -> Head:
        return self._line.ask("read", partial(self._api.head, path=self._path(key)))

    def _ranges(self, key: str, first: int) -> Generator[bytes | bytearray, None, None]:
        """The object's bytes in order; while one range is used the next ones are on their way.

        ``first``: length of the first range, which says how long a store may be waited for that does not answer.
        """
        path = self._path(key)

        def submit(start: int, length: int = RANGE_BYTES) -> Pending[Piece]:
            step = partial(self._api.get, path=path, start=start, length=length)
            return self._line.submit("read", step, length)

        piece = self._line.wait(submit(0, first))
        known = piece.version, piece.size
        starts = iter(range(first, piece.size, RANGE_BYTES))
        ahead = deque(submit(start) for start in islice(starts, RANGES_AHEAD))
        try:
            yield piece.data
            while ahead:
                piece = self._line.wait(ahead.popleft())
                if (piece.version, piece.size) != known:
                    raise GaveUp("it was overwritten while it was read")
                ahead.extend(submit(start) for start in islice(starts, 1))
                yield piece.data
        finally:
            for pending in ahead:
                pending.future.cancel()

    def _put(self, key: str, data: bytes, new: bool) -> bool:
        token = uuid4().hex
        step = partial(self._api.put, path=self._path(key), data=data, token=token, new=new)
        try:
            self._line.ask("write", step, len(data))
        except FileExistsError:
            return self._is_ours(key, token)
        return True

    def _is_ours(self, key: str, token: str) -> bool:
        """Whether it was us who came first: an earlier try may have got through, and only its answer was lost."""
        try:
            return self._head(key).token == token
        except FileNotFoundError:
            return False

    def _upload(self, local: Path, key: str, new: bool) -> bool:
        with opened(local) as file:
            size = os.fstat(file.fileno()).st_size
            if size <= self._api.part_bytes(size):
                with local_side():
                    data = file.read()
                done = self._put(key, data, new)
                self.move(size)
            else:
                done = self._upload_parts(file, size, key, new)
        if done:
            self._check_size(key, size)
        return done

    def _check_size(self, key: str, size: int) -> None:
        try:
            stored = self._head(key).size
        except FileNotFoundError as error:
            raise GaveUp("it is not there after it was uploaded") from error
        if stored != size:
            raise GaveUp(f"{stored} bytes are stored, {size} were uploaded")

    def _upload_parts(self, file: BinaryIO, size: int, key: str, new: bool) -> bool:
        for _ in range(UPLOAD_TRIES):
            token = uuid4().hex
            try:
                upload = self._line.ask("write", partial(self._api.begin, path=self._path(key), token=token, new=new))
            except FileExistsError:
                return False
            try:
                self._send_parts(file, size, upload, new)
                return True
            except FileExistsError:
                return self._is_ours(key, token)
            except FileNotFoundError:  # finished, and the answer was lost; or removed by somebody who tidied up
                if self._is_ours(key, token):
                    return True
        raise GaveUp("its unfinished upload was removed, again and again")

    def _send_parts(self, file: BinaryIO, size: int, upload: Any, new: bool) -> None:
        length = self._api.part_bytes(size)
        underway: deque[Pending[Any]] = deque()
        receipts: list[Any] = []
        try:
            for start in range(0, size, length):
                if len(underway) == self._api.parts_in_flight:
                    receipts.append(self._line.wait(underway.popleft()))
                    self.move(length)
                with local_side():
                    file.seek(start)
                    data = file.read(length)
                step = partial(self._api.part, upload=upload, start=start, data=data, size=size)
                underway.append(self._line.submit("write", step, len(data)))
            for pending in underway:
                receipts.append(self._line.wait(pending))
                self.move(pending.size)
            self._line.ask("write", partial(self._api.finish, upload=upload, receipts=receipts, new=new), length)
        except BaseException:
            for pending in underway:
                pending.future.cancel()
            self._line.tidy(partial(self._api.abort, upload=upload))
            raise
