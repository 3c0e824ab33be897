"""Jupyter servers of this user: their kernels through the REST API, and their end."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import ProxyHandler, Request, build_opener

from spotune.keeper.files import MOST_BYTES, one_line, read_file
from spotune.keeper.signs import Sign

TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Server:
    """As its file in Jupyter's runtime folder says."""

    url: str
    token: str
    pid: int


def servers(runtime: Path) -> Iterator[Server]:
    """Servers that run; Jupyter leaves the files of killed ones behind."""
    for path in _files(runtime):
        try:
            said = json.loads(read_file(path))
            server = Server(str(said["url"]), str(said.get("token", "")), int(said["pid"]))
            os.kill(server.pid, 0)
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue
        yield server


def _files(runtime: Path) -> list[Path]:
    try:
        return sorted(runtime.glob("jpserver-*.json"))
    except OSError:
        return []


def jupyter_look(runtime: Path, now: float) -> list[Sign]:
    """A busy kernel works now; an idle one worked when it was active last. What answers otherwise is no Jupyter."""
    signs = []
    for server in servers(runtime):
        answer = ask(server, "api/kernels")
        for kernel in answer if isinstance(answer, list) else []:
            if not isinstance(kernel, dict):
                continue
            name = one_line(kernel.get("name", "kernel"))
            if kernel.get("execution_state") == "busy":
                signs.append(Sign(f"Jupyter kernel {name} is busy", now))
            elif at := _time(kernel.get("last_activity")):
                signs.append(Sign(f"Jupyter kernel {name}", min(at, now)))
    return signs


def shut_down(runtime: Path) -> int:
    """Asks every server to end, so that the job it is leaves the queue; returns how many were asked."""
    return sum(ask(server, "api/shutdown", method="POST") is not None for server in servers(runtime))


def ask(server: Server, path: str, method: str = "GET") -> Any | None:
    """The server's answer, an empty list for an empty one, None for none."""
    try:
        request = Request(server.url + path, method=method, headers={"Authorization": f"token {server.token}"})
        with build_opener(ProxyHandler({})).open(request, timeout=TIMEOUT_S) as answer:  # never by way of a proxy
            body = read_answer(answer)
        return json.loads(body) if body.strip() else []
    except (URLError, OSError, ValueError, HTTPException, RecursionError):  # another program may have the port now
        return None


def read_answer(answer: HTTPResponse) -> bytes:
    """The body. Raises ValueError for one without an end: too long, or a few bytes now and then."""
    body, deadline = b"", time.monotonic() + TIMEOUT_S
    while piece := answer.read1(MOST_BYTES):
        body += piece
        if len(body) > MOST_BYTES or time.monotonic() > deadline:
            raise ValueError("an answer without an end")
    return body


def _time(text: Any) -> float | None:
    """Epoch seconds of ``2026-11-25T01:30:00.123456Z``."""
    try:
        return datetime.fromisoformat(str(text).replace("Z", "+00:00")).timestamp()
    except (ValueError, OverflowError, OSError):  # of the year 1, say, in a time zone before Greenwich
        return None
