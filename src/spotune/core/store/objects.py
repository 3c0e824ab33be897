"""Requests to an object store, on an event loop and a thread of their own, and tried again until they hold."""

import asyncio
import os
import threading
import weakref
from asyncio import AbstractEventLoop, new_event_loop
from collections import deque
from collections.abc import Awaitable, Callable, Generator
from concurrent.futures import CancelledError, Future
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, BinaryIO, Generic, Protocol, TypeVar
from uuid import uuid4

from spotune.core.keys import RECORD_MOST_BYTES, is_key
from spotune.core.store.faults import Denied, Fault, GaveUp, Patience, judge, local_side, opened, words_of
from spotune.core.store.local import Download

T = TypeVar("T")
Step = Callable[[Any], Awaitable[T]]
SMALL_BYTES = 1 << 20  # of a record
SILENT_S = 5.0  # after that, who waits for an answer is told so
CLOSING_S = 2.0  # what the end of a process may wait for open connections


class Connector(Protocol):
    """How to get a client of a store, and how to let go of it."""

    async def connect(self) -> Any: ...

    async def close(self, client: Any) -> None: ...


@dataclass
class _Client:
    client: Any
    users: int = 0


@dataclass
class _Engine:
    """A running loop and the client that lives on it."""

    loop: asyncio.AbstractEventLoop
    client: _Client | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run, name="bucket", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        self.loop.run_forever()
        self.loop.run_until_complete(self._drop_tasks())
        self.loop.close()

    async def _drop_tasks(self) -> None:
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


@dataclass(frozen=True)
class Pending(Generic[T]):
    """A request under way that moves ``size`` bytes."""

    future: "Future[T]"
    engine: _Engine
    size: int = 0


class Connection:
    """Runs single requests (``step(client)``) with time-outs, retries and back-off. Safe to use from many threads.

    ``waiting`` is told once, in words, that the store is silent. ``new_loop`` makes the event loop; its clock decides
    every limit of a request.

    Two things are left behind and replaced when they fail: a client whose credentials are refused (new ones may be in
    the credentials file, or come from the instance role), and a loop that does not answer any more.
    """

    def __init__(
        self,
        connector: Connector,
        patience: Patience,
        waiting: Callable[[str], None] | None = None,
        new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
    ) -> None:
        self.patience = patience
        self._new_loop = new_loop
        self._waiting = waiting
        self._connector = connector
        self._rng = Random()
        self._lock = threading.Lock()
        self._engine: _Engine | None = None
        self._worked: set[str] = set()
        self._away_until, self._away_why = 0.0, ""

    def ask(self, action: str, step: Step[T], size: int = 0) -> T:
        """The answer to one request; see ``submit`` and ``wait``."""
        return self.wait(self.submit(action, step, size))

    def submit(self, action: str, step: Step[T], size: int = 0) -> Pending[T]:
        """Starts a request.

        Args:
            action: read, write, list or delete; what was allowed once is not taken for forbidden at once later.
            step: one try of it; a coroutine function of the client.
            size: bytes of its body, which it is given more time for.
        """
        engine = self._running()
        future = asyncio.run_coroutine_threadsafe(self._persist(engine, action, step, size), engine.loop)
        return Pending(future, engine, size)

    def wait(self, pending: Pending[T]) -> T:
        """What became of a request. Raises FileNotFoundError, FileExistsError, Denied or GaveUp."""
        limit = self.patience.limit_s(pending.size) + self.patience.request_s
        try:
            if self._waiting and pending.size <= SMALL_BYTES:  # a large body takes its time
                with suppress(TimeoutError):
                    return pending.future.result(SILENT_S)
                self._tell()
            return pending.future.result(limit)
        except TimeoutError as error:  # the loop itself hangs: a client blocks it
            with self._lock:
                if self._engine is pending.engine:
                    self._engine = None
            raise GaveUp(f"the client has hung for {limit:.0f} s") from error
        except CancelledError as error:
            raise GaveUp("the process ends") from error
        finally:
            pending.future.cancel()

    def _tell(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, None
        if waiting:
            waiting(f"no answer for {SILENT_S:g} s; asked again for up to {self.patience.deadline_s:g} s")

    def tidy(self, step: Step[Any]) -> None:
        """One try of a request that nobody depends on; it may fail."""
        engine = self._running()

        async def attempt() -> None:
            with suppress(Exception):
                await self._try(engine, step, self.patience.request_s, self.patience.request_s)

        with suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(attempt(), engine.loop).result(2 * self.patience.request_s)

    async def _persist(self, engine: _Engine, action: str, step: Step[T], size: int) -> T:
        clock, started, tries = engine.loop.time, engine.loop.time(), 0
        if started < self._away_until:
            raise GaveUp(self._away_why)
        deadline = started + self.patience.limit_s(size)
        why: Exception | None = None
        while True:
            tries += 1
            enough = self.patience.try_s(size, tries)
            # Who stood still for a while, or was slow to make the client, has asked once: that is not enough.
            left = max(deadline - clock(), min(enough, self.patience.limit_s(size)) if tries == 2 else 0.0)
            try:
                answer = await self._try(engine, step, left, enough)
                self._worked.add(action)
                return answer
            except Exception as error:
                self._pass_on_if_lasting(action, error)
                if why is None or left >= enough or not isinstance(error, TimeoutError):
                    why = error  # a last try that was cut short says less than the one before
            wait = self.patience.wait_s(tries, self._rng)
            if tries > 1 and clock() + wait >= deadline:
                self._away_why = f"{words_of(why)} ({tries} tries in {clock() - started:.0f} s)"
                self._away_until = clock() + self.patience.outage_s
                raise GaveUp(self._away_why) from why
            await asyncio.sleep(wait)

    def _pass_on_if_lasting(self, action: str, error: Exception) -> None:
        fault = judge(error)
        if fault is None:
            raise error
        if fault in (Fault.MISSING, Fault.TAKEN):
            self._worked.add(action)
            raise (FileNotFoundError if fault is Fault.MISSING else FileExistsError)(words_of(error)) from error
        if (fault is Fault.STALE and not self._worked) or (fault is Fault.DENIED and action not in self._worked):
            raise Denied(words_of(error)) from error
        if fault is Fault.LASTING:
            raise GaveUp(words_of(error)) from error

    async def _try(self, engine: _Engine, step: Step[T], left_s: float, enough_s: float) -> T:
        client = await asyncio.wait_for(self._client(engine), left_s)
        try:
            return await asyncio.wait_for(step(client.client), min(left_s, enough_s))
        except Exception as error:
            if judge(error) in (Fault.STALE, Fault.UNREADY, Fault.DENIED) and engine.client is client:
                engine.client = None
            raise
        finally:
            client.users -= 1
            if not client.users and engine.client is not client:  # left behind, and this was its last request
                await self._connector.close(client.client)

    async def _client(self, engine: _Engine) -> _Client:
        async with engine.lock:
            if engine.client is None:
                engine.client = _Client(await self._connector.connect())
            engine.client.users += 1
            return engine.client

    def _running(self) -> _Engine:
        with self._lock:
            if self._engine is None:
                self._engine = _Engine(self._new_loop())
                weakref.finalize(self, _end, self._engine, self._connector)
            return self._engine


def _end(engine: _Engine, connector: Connector) -> None:
    """Closes the client and its loop; called when nobody has the connection any more, or the process ends."""

    async def close() -> None:
        try:
            if engine.client is not None:
                await connector.close(engine.client.client)
        finally:
            engine.loop.stop()

    asyncio.run_coroutine_threadsafe(close(), engine.loop)
    if threading.current_thread() is not engine.thread:
        engine.thread.join(CLOSING_S)


# s3:// and gs://: whole objects, moved in ranges and parts that are tried again one by one.

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
