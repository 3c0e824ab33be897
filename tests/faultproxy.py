"""A store that fails: an HTTP proxy on loopback in front of the S3 server or the GCS emulator.

    with FaultProxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)       # STORAGE_EMULATOR_HOST for GCS
        proxy.plan = Plan(error=0.2, reset=0.1)                 # from now on, for every request; seeded
        proxy.plan = Plan(hang=1.0, times=1, method="PUT")      # the next PUT hangs, everything after it is well
        proxy.plan = Plan(hold=1.0, method="PUT")               # PUTs wait here until the next plan is set
        proxy.until("hold")                                     # waits until one is here
        proxy.plan = Plan(error=1.0, skip=2, times=1)           # the third request from now on fails, and no other
        proxy.away = True                                       # nobody there, until it is False again
        assert proxy.count("PUT", "optimizer.pt") == 2          # what was asked for, faults included
        assert proxy.dealt["hang"] == 1

It runs on a thread of the process that made it, so that other processes can use it while a test switches it.
Requests keep their Host header, so that the emulator's upload locations lead back here. Signatures are not checked by
the S3 server, and the GCS emulator knows none.
"""

import asyncio
import random
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from urllib.parse import unquote

import aiohttp
from aiohttp import web

from tests.waiting import LIMIT_S, until

HOP = {"transfer-encoding", "content-length", "connection", "keep-alive", "expect"}
PIECE_BYTES = 16 << 10


@dataclass(frozen=True)
class Plan:
    """What happens to requests. The chances are tried in this order; at most one fault a request.

    Args:
        error: 503 or 500 instead of an answer; the store does not see the request.
        expired: "your credentials have expired", as S3 (400 ExpiredToken) or GCS (401) say it.
        reset: the connection is cut before the store sees the request.
        lost: the store does what was asked, and the connection is cut instead of its answer.
        hang: the request is never answered.
        truncate: the body of a GET's answer ends half-way, though more was announced.
        short: the body of a GET's answer ends half-way, and no more is announced.
        flip: one bit of the body of a GET's answer is wrong, and nothing says so.
        stall: the body of a GET's answer stops after each quarter, and goes on when another plan is set; ``dealt``
            counts these pauses too. The next quarter is followed by one if that plan stalls as well.
        hold: the store does not see the request before another plan is set.
        delay: the answer comes ``delay_s`` late.
        delay_s: see ``delay``.
        bandwidth_bytes_per_s: every body passes no faster than this, in both directions; 0 for no limit.
        skip: so many requests that fit are well before the first that can meet a fault.
        times: after so many faults the rest is well; None for no end.
        method: only requests with this method, e.g. ``GET``.
        match: only requests with this text in their path and query.
        min_bytes: only answers at least so long are truncated or flipped: data, say, but no listing, which on a real
            store is protected by its encryption.
    """

    error: float = 0.0
    expired: float = 0.0
    reset: float = 0.0
    lost: float = 0.0
    hang: float = 0.0
    truncate: float = 0.0
    short: float = 0.0
    flip: float = 0.0
    stall: float = 0.0
    hold: float = 0.0
    delay: float = 0.0
    delay_s: float = 1.0
    bandwidth_bytes_per_s: float = 0.0
    skip: int = 0
    times: int | None = None
    method: str = ""
    match: str = ""
    min_bytes: int = 1

    def draw(self, rng: random.Random) -> str:
        """The name of the fault that the next request meets, "" for none."""
        chance = rng.random()
        for name in CHANCES:
            chance -= getattr(self, name)
            if chance < 0:
                return name
        return ""


CHANCES = ("error", "expired", "reset", "lost", "hang", "truncate", "short", "flip", "stall", "hold", "delay")
IN_BODIES = ("truncate", "short", "flip", "stall")


@dataclass(frozen=True)
class Seen:
    """One request: ``path`` with its query, unquoted; ``fault`` that it met, "" for none."""

    method: str
    path: str
    fault: str
    headers: dict[str, str] = field(default_factory=dict, repr=False)


class FaultProxy:
    """See the module. ``plan``, ``away`` and ``seen`` may be set at any time, from any thread."""

    def __init__(self, upstream: str, seed: int = 0) -> None:
        self.upstream = upstream
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()
        self.plan = Plan()
        self.away = False
        self.seen: list[Seen] = []
        self.dealt: Counter[str] = Counter()
        self.url = ""
        self._rng = random.Random(seed)
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)

    @property
    def plan(self) -> Plan:
        return self._plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        self._plan, self._left, self._skip = plan, plan.times, plan.skip
        with suppress(RuntimeError):  # a loop that is closed already holds nothing
            self._loop.call_soon_threadsafe(self._let_go)

    def _let_go(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def until(self, fault: str, times: int = 1) -> None:
        """Waits until a fault has been dealt so often, whatever else goes on."""
        until(lambda: self.dealt[fault] >= times, lambda: f"{fault}: {self.dealt}")

    def count(self, method: str = "", match: str = "") -> int:
        """How many requests came with this method, and this text in their path and query."""
        return sum(1 for seen in list(self.seen) if method in ("", seen.method) and match in seen.path)

    def __enter__(self) -> "FaultProxy":
        self._thread.start()
        assert self._ready.wait(LIMIT_S), "the proxy did not start"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(LIMIT_S)
        self._loop.close()

    async def _serve(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.5, access_log=None)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(
            auto_decompress=False, connector=connector, timeout=aiohttp.ClientTimeout()
        ) as self._session:
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            self._ready.set()
            await self._stop.wait()
            await runner.cleanup()

    def _fault(self, request: web.Request, plan: Plan) -> str:
        path = unquote(request.raw_path)
        fits = plan.method in ("", request.method) and plan.match in path and self._left != 0
        if fits and self._skip:
            self._skip, fits = self._skip - 1, False
        fault = "away" if self.away else plan.draw(self._rng) if fits else ""
        if fault in IN_BODIES and request.method != "GET":
            fault = ""
        self.seen.append(Seen(request.method, path, fault, dict(request.headers)))
        return fault

    def _deal(self, fault: str) -> None:
        self.dealt[fault] += 1
        if self._left and fault != "away":
            self._left -= 1

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        plan = self.plan
        fault = self._fault(request, plan)
        if fault not in ("", *IN_BODIES):
            self._deal(fault)
        if fault in ("away", "reset"):
            return self._cut(request)
        body = await self._receive(request, plan)
        if fault == "hang":
            await asyncio.sleep(3600)
        if fault == "hold":
            await self._until_another(plan)
        if fault == "delay":
            await asyncio.sleep(plan.delay_s)
        if fault in ("error", "expired"):
            return _refuse(request, fault, self._rng)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP}
        async with self._session.request(
            request.method, self.upstream + request.raw_path, headers=headers, data=body, allow_redirects=False
        ) as answer:
            data = await answer.read()
            if fault == "lost":
                return self._cut(request)
            return await self._send(request, plan, fault, answer, data)

    async def _until_another(self, plan: Plan) -> None:
        """Waits until another plan is set."""
        while self.plan is plan:
            await self._changed.wait()

    def _cut(self, request: web.Request) -> web.Response:
        if request.transport is not None:
            request.transport.abort()
        return web.Response(status=500)

    async def _receive(self, request: web.Request, plan: Plan) -> bytes:
        started, body = self._loop.time(), bytearray()
        async for piece in request.content.iter_chunked(PIECE_BYTES):
            body += piece
            await self._pace(plan, started, len(body))
        return bytes(body)

    async def _pace(self, plan: Plan, started: float, count: int) -> None:
        """Waits until ``count`` bytes may have passed."""
        if plan.bandwidth_bytes_per_s:
            await asyncio.sleep(started + count / plan.bandwidth_bytes_per_s - self._loop.time())

    async def _send(
        self, request: web.Request, plan: Plan, fault: str, answer: aiohttp.ClientResponse, data: bytes
    ) -> web.StreamResponse:
        headers = {name: value for name, value in answer.headers.items() if name.lower() not in HOP}
        response = web.StreamResponse(status=answer.status, headers=headers)
        stop = len(data)
        if fault in IN_BODIES and len(data) >= plan.min_bytes:
            self._deal(fault)
            if fault == "truncate":
                stop = len(data) // 2
            elif fault == "short":
                data = data[: len(data) // 2]
                stop = len(data)
            elif fault == "flip":
                place = self._rng.randrange(len(data))
                data = data[:place] + bytes([data[place] ^ 1 << self._rng.randrange(8)]) + data[place + 1 :]
        # The answer to HEAD announces a body that does not come.
        announced = answer.headers.get("Content-Length") if request.method == "HEAD" else str(len(data))
        if announced is not None:
            response.content_length = int(announced)
        await response.prepare(request)
        started = self._loop.time()
        size = PIECE_BYTES if plan.bandwidth_bytes_per_s else len(data) or 1
        if fault == "stall":
            size = (len(data) + 3) // 4
        for start in range(0, stop, size):
            if fault == "stall" and start and self.plan.stall:
                self.dealt["pause"] += 1
                await self._until_another(self.plan)
            await response.write(data[start : min(start + size, stop)])
            await self._pace(plan, started, start + size)
        if stop < len(data) and request.transport is not None:
            request.transport.close()
        return response


def _refuse(request: web.Request, fault: str, rng: random.Random) -> web.Response:
    """An error in the words of S3 or of GCS."""
    gcs = request.path.startswith(("/storage/v1", "/upload/storage/v1", "/download/storage/v1"))
    if fault == "expired":
        status, code, words = 400, "ExpiredToken", "The provided token has expired."
        if gcs:
            status, code, words = 401, "authError", "Invalid Credentials"
    else:
        status, code, words = rng.choice(
            [
                (503, "SlowDown", "Please reduce your request rate."),
                (500, "InternalError", "We encountered an internal error."),
            ]
        )
    if gcs:
        return web.json_response({"error": {"code": status, "message": words}}, status=status)
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{words}</Message></Error>"
    return web.Response(status=status, content_type="application/xml", text="" if request.method == "HEAD" else text)
