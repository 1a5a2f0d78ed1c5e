"""The HTTP server: it reads requests, sends answers, and knows nothing of what they mean."""

from __future__ import annotations

import socket
import socketserver
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

    from zoho_orm_store.testing.answers import Answer

__all__ = ["Request", "Server"]

_Socket: TypeAlias = "socket.socket | tuple[bytes, socket.socket]"


class Request(NamedTuple):
    """One request over HTTP.

    Attributes:
        method: The HTTP method.
        target: The path and the query string.
        body: The body as text.
        authorization: The Authorization header, or an empty string.
    """

    method: str
    target: str
    body: str
    authorization: str


class Server(ThreadingHTTPServer):
    """A server on 127.0.0.1, with a daemon thread per connection.

    Args:
        port: The port to listen on; 0 takes a free one.
        answer: Called with each request, on the connection's thread.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, port: int, answer: Callable[[Request], Answer]) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.answer = answer
        self.connections: dict[threading.Thread, socket.socket] = {}
        self._acceptor = threading.Thread(
            target=self.serve_forever, args=(0.02,), name="loopback-zoho", daemon=True
        )

    def server_bind(self) -> None:  # noqa: D102 - TCPServer's
        # HTTPServer's own looks its name up in DNS, which may take seconds.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def start(self) -> None:
        """Answer, on a thread of its own."""
        self._acceptor.start()

    def close(self) -> None:
        """Cut all connections and give port and threads back."""
        if not self._acceptor.is_alive():
            # A forked child: shutdown() would wait forever, and the connections are the parent's.
            self.server_close()
            return
        self.shutdown()
        self._acceptor.join()
        self.server_close()
        for thread, connection in list(self.connections.items()):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            thread.join(timeout=5)

    def handle_error(self, request: _Socket, client_address: object) -> None:  # noqa: D102
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that went away
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body leave in one packet: two would wait for a delayed ACK

    def setup(self) -> None:
        super().setup()
        self.server.connections[threading.current_thread()] = self.connection
        if self.server.fileno() < 0:  # closed since this connection was accepted
            self.connection.shutdown(socket.SHUT_RDWR)

    def finish(self) -> None:
        del self.server.connections[threading.current_thread()]
        super().finish()

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length).decode(errors="replace")
        authorization = self.headers.get("Authorization", "")
        answer = self.server.answer(Request(self.command, self.path, body, authorization))
        if answer.status is None:
            self.close_connection = True
            return
        content = answer.body.encode()
        self.send_response(answer.status)
        if content:
            self.send_header("Content-Type", answer.content_type)
        if answer.location is not None:
            self.send_header("Location", answer.location)
        if answer.status != 204:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass
