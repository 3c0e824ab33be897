"""An object store in memory, behind the requests of ``objects.Api``: what is tested with it is the layer above."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from spotune.core.store import RetryPolicy, Store
from spotune.core.store.objects import Head, Objects, Page, Piece
from tests.clocks import Loops

PART_BYTES = 1 << 20


@dataclass
class Upload:
    """An upload in parts; ``new`` when it must find no object at its end."""

    path: str
    token: str
    parts: dict[int, bytes] = field(default_factory=dict)


class FakeApi:
    """The requests. ``before`` and ``after`` run on each, with its name, and may raise or wait.

    What ``before`` stops never reaches the store; what ``after`` stops has been done, and only its answer is lost.
    """

    def __init__(self, parts_in_flight: int = 3) -> None:
        self.parts_in_flight = parts_in_flight
        self.objects: dict[str, tuple[bytes, str]] = {}
        self.uploads: list[Upload] = []
        self.seen: list[str] = []
        self.before: Callable[[str], Awaitable[None]] = well
        self.after: Callable[[str], Awaitable[None]] = well

    async def connect(self) -> None:
        return None

    async def close(self, client: Any) -> None:
        return None

    def part_bytes(self, size: int) -> int:
        return PART_BYTES

    async def _do(self, name: str, effect: Callable[[], Any]) -> Any:
        self.seen.append(name)
        await self.before(name)
        answer = effect()
        await self.after(name)
        return answer

    def _set(self, path: str, data: bytes, token: str, new: bool) -> None:
        if new and path in self.objects:
            raise FileExistsError(path)
        self.objects[path] = data, token

    def _object(self, path: str) -> tuple[bytes, str]:
        if path not in self.objects:
            raise FileNotFoundError(path)
        return self.objects[path]

    async def head(self, client: Any, path: str) -> Head:
        def effect() -> Head:
            data, token = self._object(path)
            return Head(len(data), token)

        found: Head = await self._do("head", effect)
        return found

    async def get(self, client: Any, path: str, start: int, length: int) -> Piece:
        def effect() -> Piece:
            data, token = self._object(path)
            return Piece(data[start : start + length], len(data), token)

        found: Piece = await self._do("get", effect)
        return found

    async def put(self, client: Any, path: str, data: bytes, token: str, new: bool) -> None:
        await self._do("put", lambda: self._set(path, data, token, new))

    async def begin(self, client: Any, path: str, token: str, new: bool) -> Upload:
        upload = Upload(path, token)
        await self._do("begin", lambda: self.uploads.append(upload))
        return upload

    async def part(self, client: Any, upload: Upload, start: int, data: bytes, size: int) -> int:
        await self._do(f"part {start // PART_BYTES + 1}", lambda: upload.parts.update({start: data}))
        return start

    async def finish(self, client: Any, upload: Upload, receipts: list[Any], new: bool) -> None:
        def effect() -> None:
            if upload not in self.uploads:
                raise FileNotFoundError(upload.path)
            self._set(upload.path, b"".join(upload.parts[start] for start in receipts), upload.token, new)
            self.uploads.remove(upload)

        await self._do("finish", effect)

    async def abort(self, client: Any, upload: Upload) -> None:
        await self._do("abort", lambda: self.uploads.remove(upload))

    async def page(self, client: Any, path: str, flat: bool, marker: Any) -> Page:
        def effect() -> Page:
            below = sorted(name for name in self.objects if name.startswith(f"{path}/"))
            if flat:
                return Page(below)
            names = {name.removeprefix(f"{path}/").partition("/")[:2] for name in below}
            return Page([f"{path}/{first}{slash}" for first, slash in sorted(names)])

        found: Page = await self._do("page", effect)
        return found

    async def unfinished(self, client: Any, path: str, older_than_s: float, marker: Any) -> Page:
        return Page([(upload.path, upload) for upload in self.uploads if upload.path.startswith(f"{path}/")])

    async def delete(self, client: Any, path: str) -> None:
        await self._do("delete", lambda: self.objects.pop(path, None))


async def well(name: str) -> None:
    """What a request meets in a store without faults."""


async def hang(name: str) -> None:
    await asyncio.sleep(math.inf)


async def fail(name: str) -> None:
    raise ConnectionResetError("cut")


def at_random(
    fault: Callable[[str], Awaitable[None]], chance: float, seed: int = 0
) -> Callable[[str], Awaitable[None]]:
    """The fault, for so many of the requests."""
    rng = Random(seed)

    async def meet(name: str) -> None:
        if rng.random() < chance:
            await fault(name)

    return meet


def first(fault: Callable[[str], Awaitable[None]], name: str, times: int = 1) -> Callable[[str], Awaitable[None]]:
    """The fault, for the first requests of a name."""
    left = [times]

    async def meet(seen: str) -> None:
        if seen == name and left[0]:
            left[0] -= 1
            await fault(seen)

    return meet


def store_of(api: FakeApi, patience: RetryPolicy, loops: Loops) -> Store:
    """A store of these objects."""
    store = Store("s3://fake/x", patience)
    store._bucket = Objects(api, "fake/x", patience, None, loops)
    return store


def file_of(folder: Path, parts: int) -> Path:
    """A file of so many parts."""
    path = folder / f"{parts}-parts"
    path.write_bytes(Random(parts).randbytes(PART_BYTES * parts - 7))
    return path
