"""Requests to an object store, on an event loop and a thread of their own, and tried again until they hold."""

import asyncio
import threading
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any, Generic, Protocol, TypeVar

from spotune.core.store.faults import Denied, Fault, GaveUp, Patience, judge, words_of

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
