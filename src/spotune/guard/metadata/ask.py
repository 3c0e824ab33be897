"""One request to a service of this machine's own network: no proxy, no redirects, and never a long wait."""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from urllib.parse import urlsplit

from spotune.guard.metadata.source import NoAnswer

TIMEOUT_S = 2.0
MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Answer:
    status: int
    body: str


def ask(
    url: str,
    headers: Mapping[str, str],
    method: str = "GET",
    timeout_s: float = TIMEOUT_S,
    tls: ssl.SSLContext | None = None,
) -> Answer:
    """The service's answer, whatever its status; raises NoAnswer when there is none.

    ``http.client`` knows no proxies: a notice must not depend on HTTP_PROXY, nor a token go through it.
    """
    parts = urlsplit(url)
    try:
        connection = _connect(parts.scheme, parts.hostname or "", parts.port, timeout_s, tls)
    except ValueError as error:  # a port that is none
        raise NoAnswer(f"{url} is no address: {error}") from error
    try:
        connection.request(method, f"{parts.path}?{parts.query}" if parts.query else parts.path, headers=dict(headers))
        response = connection.getresponse()
        return Answer(response.status, response.read(MOST_BYTES).decode())
    except (OSError, HTTPException, ValueError) as error:
        raise NoAnswer(f"{parts.netloc} does not answer: {str(error) or type(error).__name__}") from error
    finally:
        connection.close()


def _connect(scheme: str, host: str, port: int | None, timeout_s: float, tls: ssl.SSLContext | None) -> HTTPConnection:
    if scheme == "https":
        return HTTPSConnection(host, port, timeout=timeout_s, context=tls)
    return HTTPConnection(host, port, timeout=timeout_s)
