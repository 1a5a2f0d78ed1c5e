"""A proxy before a server, whose network fails in the ways that networks do."""

from __future__ import annotations

import ctypes
import os
import selectors
import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Self

_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_ushort),
        ("jump_if_true", ctypes.c_ubyte),
        ("jump_if_false", ctypes.c_ubyte),
        ("operand", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("first", ctypes.POINTER(_Instruction)))


_RETURN_NOTHING = (_Instruction * 1)(_Instruction(code=6))
_DROP_EVERYTHING = bytes(_Program(1, _RETURN_NOTHING))


def _drop_packets(receiver: socket.socket) -> None:
    """Let the kernel drop what arrives at a socket before it acknowledges or even looks at it."""
    receiver.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, _DROP_EVERYTHING)


class _Pair:
    """A client's connection, and the one to the server."""

    def __init__(self, client: socket.socket, server: socket.socket | None) -> None:
        self.client = client
        self.server = server
        self.is_silent = server is None

    def close(self) -> None:
        self.client.close()
        if self.server is not None:
            self.server.close()


class Relay:
    """Passes on what clients and a server send to each other, until it is told not to.

    Args:
        host: The server's host.
        port: The server's port.
    """

    def __init__(self, host: str, port: int) -> None:
        self._server = (host, port)
        self._selector = selectors.DefaultSelector()
        self._pairs: list[_Pair] = []
        self._lock = threading.Lock()
        self._silent = self._loses_packets = self._closing = False
        self._silent_after: int | None = None
        self._woken, self._waking = os.pipe()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self.port = 0
        self.listen()
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self._thread.start()

    def listen(self) -> None:
        """Take new connections, on the same port as before."""
        self._listening = socket.create_server(("127.0.0.1", self.port), backlog=128)
        self.port = self._listening.getsockname()[1]
        self._selector.register(self._listening, selectors.EVENT_READ)

    def fall_silent(self, *, lose_packets: bool = False, after: int = 0) -> None:
        """Answer nothing any more, on old and new connections, which stay open.

        Args:
            lose_packets: Whether a client's packets get lost. If not, they arrive and are
                acknowledged, but nobody reads them.
            after: How many more messages of clients are passed on before.
        """
        with self._lock:
            self._loses_packets = lose_packets
            self._silent_after = after
            if not after:
                self._be_silent()

    def recover(self) -> None:
        """Serve new connections again.

        The old ones stay silent for the clients. The server finds out that they are dead.
        """
        with self._lock:
            for pair in self._pairs:
                if pair.is_silent and pair.server is not None:
                    pair.server.close()
            self._silent = False
            self._silent_after = None
            if self._loses_packets:
                self._listening.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
            self._loses_packets = False

    def refuse(self) -> None:
        """Cut all connections and refuse new ones, as when the server has crashed."""
        with self._lock:
            if self._listening.fileno() >= 0:
                self._selector.unregister(self._listening)
                self._listening.close()
            for pair in self._pairs:
                self._forget(pair)
                pair.close()
            self._pairs.clear()

    def lead_to(self, host: str, port: int) -> None:
        """Connect new clients to another server."""
        with self._lock:
            self._server = (host, port)

    def close(self) -> None:
        with self._lock:
            self._closing = True
        os.write(self._waking, b"x")
        self._thread.join()
        for pair in self._pairs:
            pair.close()
        self._listening.close()
        self._selector.close()
        os.close(self._woken)
        os.close(self._waking)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # -- In the relay's thread; each step with the lock ------------------------------------------

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select(0.05):
                with self._lock:
                    if self._closing:
                        return
                    if key.fileobj not in (self._woken, *self._forwarded()):
                        continue  # It was closed, or fell silent, since select() returned it.
                    if key.data is None:
                        self._accept()
                    else:
                        self._pass_on(*key.data)

    def _forwarded(self) -> Iterator[socket.socket]:
        if self._listening.fileno() >= 0:
            yield self._listening
        for pair in self._pairs:
            if not pair.is_silent:
                yield from (pair.client, pair.server)

    def _accept(self) -> None:
        client, _ = self._listening.accept()
        if self._silent:
            self._pairs.append(_Pair(client, None))
            return
        try:
            server = socket.create_connection(self._server, timeout=5)
        except OSError:
            client.close()
            return
        pair = _Pair(client, server)
        self._pairs.append(pair)
        for each in (client, server):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._selector.register(client, selectors.EVENT_READ, (pair, client, server))
        self._selector.register(server, selectors.EVENT_READ, (pair, server, client))

    def _pass_on(self, pair: _Pair, source: socket.socket, target: socket.socket) -> None:
        if source is pair.client and self._silent_after is not None:
            if not self._silent_after:
                self._be_silent()
                return
            self._silent_after -= 1
        data = b""
        with suppress(OSError):
            data = source.recv(65536)
        if data:
            with suppress(OSError):
                target.sendall(data)
                return
        self._forget(pair)
        self._pairs.remove(pair)
        pair.close()

    def _be_silent(self) -> None:
        self._silent = True
        for pair in self._pairs:
            if not pair.is_silent:
                self._forget(pair)
                pair.is_silent = True
                if self._loses_packets:
                    _drop_packets(pair.client)
        if self._loses_packets:
            _drop_packets(self._listening)

    def _forget(self, pair: _Pair) -> None:
        if not pair.is_silent:
            self._selector.unregister(pair.client)
            self._selector.unregister(pair.server)
