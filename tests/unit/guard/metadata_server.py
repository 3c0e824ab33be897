"""A stand-in for a metadata service: a real HTTP server on loopback that does as the test says."""

import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Headers = dict[str, str]
Reply = tuple[int, str]


@dataclass
class Service:
    """``answer(method, path, headers)`` is what it says; ``asked`` is what it was asked.

    ``answers``: it hangs while this is not set.
    """

    answer: Callable[[str, str, Headers], Reply]
    asked: list[tuple[str, str, Headers]] = field(default_factory=list)
    answers: threading.Event = field(default_factory=threading.Event)
    port: int = 0
    tls: ssl.SSLContext | None = None
    _server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def up(self) -> None:
        service = self
        service.answers.set()

        class Handler(BaseHTTPRequestHandler):
            def reply(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                service.asked.append((self.command, self.path, headers))
                service.answers.wait()
                status, body = service.answer(self.command, self.path, headers)
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(body.encode())))
                    self.end_headers()
                    self.wfile.write(body.encode())
                except OSError:  # whoever asked has given up
                    return

            do_GET = do_PUT = do_POST = reply

            def log_message(self, *_: object) -> None:
                return

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                """Whoever connects may also break it off."""

        self._server = Server(("127.0.0.1", self.port), Handler)
        if self.tls:
            self._server.socket = self.tls.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def down(self) -> None:
        self.answers.set()
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


@contextmanager
def serve(answer: Callable[[str, str, Headers], Reply], tls: ssl.SSLContext | None = None) -> Iterator[Service]:
    service = Service(answer, tls=tls)
    service.up()
    try:
        yield service
    finally:
        service.down()
