"""`LoopbackZoho`: an HTTP server that answers as Zoho does and records every request."""

from __future__ import annotations

import json
import socket
import socketserver
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat
from typing import TYPE_CHECKING, Literal, TypeAlias
from urllib.parse import parse_qsl, urlsplit
from urllib.request import ProxyHandler, build_opener

from zoho_orm_store.errors import MissingDependencyError
from zoho_orm_store.testing.accounts import (
    SERVER_ERROR,
    Accounts,
    Client,
    Failure,
    HasClient,
    RefusedError,
)
from zoho_orm_store.testing.crm import Answer, consent_answer, crm_answer, json_answer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from typing_extensions import Self
    from zohocrmsdk.src.com.zoho.crm.api.dc.data_center import DataCenter

__all__ = ["Counts", "Kind", "LoopbackZoho", "RecordedRequest", "RemoteZoho"]

Kind: TypeAlias = Literal["consent", "exchange", "refresh", "revoke", "api", "unknown"]
"""The kind of a request; see `RecordedRequest`."""

_CONSENT_PATH = "/oauth/v2/auth"
_TOKEN_PATH = "/oauth/v2/token"  # noqa: S105 - a path
_DESCRIPTION_PATH = "/.well-known/loopback-zoho"
_CONNECT_TIMEOUT = 10.0
_Socket: TypeAlias = "socket.socket | tuple[bytes, socket.socket]"


@dataclass(frozen=True)
class RecordedRequest:
    """A request that `LoopbackZoho` received. It holds no secret.

    Attributes:
        kind: ``"consent"`` (the page in a browser), ``"exchange"`` (of a grant token),
            ``"refresh"``, ``"revoke"``, ``"api"`` (Zoho CRM), or ``"unknown"`` for any other
            request to Zoho Accounts.
        path: The path. Only requests to Zoho CRM keep their query string: others hold tokens there.
        at: When the request arrived, in epoch seconds.
        status: The HTTP status of the answer, ``None`` if there was no answer. Zoho refuses most
            token requests with status 200, so look at ``error``.
        error: Zoho's error code, such as ``"invalid_code"`` or ``"INVALID_TOKEN"``; ``"failed"``
            for a failure set by `LoopbackZoho.fail`; ``None`` if Zoho carried out the request.
        user: The email address of the user whose token it was, if Zoho found one.
    """

    kind: Kind
    path: str
    at: float
    status: int | None
    error: str | None
    user: str | None


@dataclass(frozen=True)
class Counts:
    """How many requests `LoopbackZoho` received.

    Attributes:
        exchanges: Grant tokens that were exchanged.
        refreshes: Access tokens that were made from a refresh token.
        revokes: Tokens that were revoked over HTTP.
        refused: Exchanges and refreshes that failed for any reason.
        api_calls: Requests to Zoho CRM, including unauthorized ones.
    """

    exchanges: int
    refreshes: int
    revokes: int
    refused: int
    api_calls: int


class _Addresses:
    """Where a loopback Zoho answers."""

    @property
    def url(self) -> str:
        """The API domain, ``http://127.0.0.1:<port>``."""
        raise NotImplementedError

    @property
    def accounts_url(self) -> str:
        """The URL for token requests."""
        return self.url + _TOKEN_PATH

    @property
    def consent_url(self) -> str:
        """The URL of the page on which a user gives consent in a browser.

        The page takes the same parameters as Zoho's own: ``client_id``, ``redirect_uri`` (the
        client's), ``response_type``, ``scope``, ``access_type`` and ``state``.
        """
        return self.url + _CONSENT_PATH

    def environment(self) -> DataCenter.Environment:
        """Return the environment for the SDK's ``Initializer``.

        Raises:
            MissingDependencyError: The Zoho CRM SDK is not installed.
        """
        try:
            from zohocrmsdk.src.com.zoho.crm.api.dc.data_center import DataCenter
        except ImportError:
            raise MissingDependencyError("zohocrmsdk8-0", "sdk") from None
        urls = (self.url, self.accounts_url, self.url)
        try:
            return DataCenter.Environment(*urls)
        except TypeError:  # zohocrmsdk5-0 requires a name as well, but never reads it.
            return DataCenter.Environment(*urls, "loopback")


class RemoteZoho(_Addresses, HasClient):
    """A `LoopbackZoho` that runs in another process; `LoopbackZoho.connect` makes it.

    Only the process that runs the `LoopbackZoho` can issue tokens, count requests and so on.

    Attributes:
        client: The default client.
        zgid: The id of the organization.
    """

    def __init__(self, url: str, client: Client, zgid: str) -> None:
        self._url = url
        self.client = client
        self.zgid = zgid

    @property
    def url(self) -> str:
        """The API domain, ``http://127.0.0.1:<port>``."""
        return self._url


@dataclass(kw_only=True, repr=False, eq=False)
class LoopbackZoho(_Addresses, Accounts):
    """Zoho Accounts and a small part of Zoho CRM on a port of 127.0.0.1.

    Use it as a context manager, or call `start` and `close`. Any email address is a user, and all
    users belong to one organization. The limits default to Zoho's, and ``None`` lifts a limit.
    Every argument is also an attribute, and a change applies to the requests that follow. Only
    ``port`` must stay as it is after `start`.

    Args:
        access_token_lifetime: Lifetime of an access token in seconds. The SDK refreshes a token in
            its last 5 seconds, so a shorter lifetime makes it refresh before every request.
        grant_token_lifetime: Lifetime of a grant token in seconds. It can be exchanged once.
        max_refreshes: Refreshes per refresh token within ``refresh_window``. Zoho answers the next
            one with "Access Denied".
        refresh_window: Length of the window for ``max_refreshes`` in seconds.
        max_access_tokens: Live access tokens per refresh token. A new one ends the oldest.
        max_refresh_tokens: Live refresh tokens per user and client. A new one ends the oldest.
        port: The port to listen on. If it is 0, `start` chooses a free port.
        delay: Seconds that Zoho Accounts waits before it answers.

    Attributes:
        client: The default client, for calls that name no client.
        zgid: The id of the organization.
    """

    port: int = 0
    delay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._server: _Server | None = None
        self._closing = threading.Event()
        self._failures: Iterator[Failure] = iter(())
        self._requests: list[RecordedRequest] = []

    @classmethod
    def connect(cls, url: str) -> RemoteZoho:
        """Return what another process needs to know about a running `LoopbackZoho`.

        Args:
            url: The `url` of the one that runs.

        Raises:
            ConnectionError: None answers there.
        """
        base = url.rstrip("/")
        # A proxy of the environment cannot reach this machine's own address.
        opener = build_opener(ProxyHandler({}))
        try:
            with opener.open(f"{base}{_DESCRIPTION_PATH}", timeout=_CONNECT_TIMEOUT) as answer:
                described = json.load(answer)
            return RemoteZoho(base, Client(**described["client"]), described["zgid"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise ConnectionError(
            f"No LoopbackZoho answers at {base}. Start one in another process, or run: "
            "zoho-orm-store loopback"
        )

    def start(self) -> Self:
        """Start the server, and return this object. After `close`, it keeps its port."""
        if self._server is None:
            self._closing.clear()
            self._server = _Server(self.port, self._answer)
            self.port = self._server.server_port
        return self

    def close(self) -> None:
        """Stop the server and close its connections. Tokens and recorded requests stay."""
        server, self._server = self._server, None
        if server is not None:
            self._closing.set()
            server.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """The API domain, ``http://127.0.0.1:<port>``."""
        if not self.port:
            raise RuntimeError("LoopbackZoho has no port yet. Call start(), or use a with block.")
        return f"http://127.0.0.1:{self.port}"

    def fail(self, failure: Failure = SERVER_ERROR, *, times: int | None = 1) -> None:
        """Make the next requests to Zoho Accounts fail. This replaces an earlier `fail`.

        Args:
            failure: How they fail: `SERVER_ERROR`, `ACCESS_DENIED`, `CONNECTION_DROPPED`,
                `ANSWER_LOST`, or a `Failure` of your own.
            times: How many requests fail. ``None`` means all until `recover`.
        """
        with self._lock:
            self._failures = repeat(failure) if times is None else repeat(failure, times)

    def recover(self) -> None:
        """Stop failing."""
        self.fail(times=0)

    @property
    def requests(self) -> list[RecordedRequest]:
        """All requests since the last `reset_counts`, in the order in which they were answered."""
        with self._lock:
            return list(self._requests)

    @property
    def counts(self) -> Counts:
        """How many requests there were since the last `reset_counts`."""
        requests = self.requests
        total = Counter(request.kind for request in requests)
        done = Counter(request.kind for request in requests if request.error is None)
        return Counts(
            exchanges=done["exchange"],
            refreshes=done["refresh"],
            revokes=done["revoke"],
            refused=sum(total[kind] - done[kind] for kind in ("exchange", "refresh")),
            api_calls=total["api"],
        )

    def reset_counts(self) -> None:
        """Forget the requests recorded so far. Tokens and limits stay as they are."""
        with self._lock:
            self._requests.clear()

    # -- Called by the server's threads ----------------------------------------------------------

    def _answer(self, method: str, target: str, body: str, authorization: str) -> Answer:
        at = time.time()
        url = urlsplit(target)
        params = dict(parse_qsl(url.query)) | dict(parse_qsl(body))
        if url.path == _DESCRIPTION_PATH:
            # It is no request of the SDK's, so it is neither delayed nor recorded.
            return json_answer(200, {"client": asdict(self.client), "zgid": self.zgid})
        kind = _kind(method, url.path, params)
        if kind not in ("api", "consent") and self.delay and self._closing.wait(self.delay):
            return Answer(None)
        with self._lock:
            if kind == "api":
                user = self._bearer(authorization)
                answer = crm_answer(method, url.path, params, user, self.zgid)
            elif kind == "consent":
                client = self._clients.get(params.get("client_id", ""))
                user = params.get("user")
                answer = consent_answer(params, client, self.issue_grant_token)
            else:
                answer, user = self._token_answer(kind, params)
            # Zoho Accounts takes tokens in the query string, so it is recorded for the API alone.
            path = target if kind == "api" else url.path
            self._requests.append(
                RecordedRequest(kind, path, at, answer.status, answer.error, user)
            )
        return answer

    def _bearer(self, authorization: str) -> str | None:
        """Return the user whose live access token is in an Authorization header."""
        scheme, _, token = authorization.partition(" ")
        found = self._find_authorization(token) if scheme == "Zoho-oauthtoken" else None
        return found.user if found and token in found.access_tokens else None

    def _token_answer(self, kind: Kind, params: Mapping[str, str]) -> tuple[Answer, str | None]:
        failure = next(self._failures, None)
        answer, user = Answer(None, error="failed"), None
        if failure is None or failure.handled:
            try:
                payload, user = self._handle(kind, params, self.url)
                answer = json_answer(200, payload)
            except RefusedError as refused:
                answer = json_answer(refused.status, refused.payload, refused.error)
        if failure:
            answer = Answer(failure.status, failure.body, failure.content_type, answer.error)
        return answer, user


def _kind(method: str, path: str, params: Mapping[str, str]) -> Kind:
    if not path.startswith("/oauth/"):
        return "api"
    if (method, path) == ("GET", _CONSENT_PATH):
        return "consent"
    if (method, path) == ("POST", f"{_TOKEN_PATH}/revoke"):
        return "revoke"
    if (method, path) == ("POST", _TOKEN_PATH):
        if params.get("grant_type") == "authorization_code":
            return "exchange"
        if params.get("grant_type") == "refresh_token":
            return "refresh"
    return "unknown"


class _Server(ThreadingHTTPServer):
    """A server on 127.0.0.1 with a daemon thread per connection. It starts when it is made."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, port: int, answer: Callable[[str, str, str, str], Answer]) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.answer = answer
        self.connections: dict[threading.Thread, socket.socket] = {}
        self._acceptor = threading.Thread(
            target=self.serve_forever, args=(0.02,), name="loopback-zoho", daemon=True
        )
        self._acceptor.start()

    def server_bind(self) -> None:
        # HTTPServer.server_bind looks up its host name in DNS, which can take seconds.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def close(self) -> None:
        if not self._acceptor.is_alive():
            # In a forked child, shutdown() would wait forever. The parent owns the connections.
            self.server_close()
            return
        self.shutdown()
        self._acceptor.join()
        self.server_close()
        for thread, connection in list(self.connections.items()):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            thread.join(timeout=5)

    def handle_error(self, request: _Socket, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # The client closed the connection.
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # Send head and body in one packet: a second one waits for a delayed ACK.

    def setup(self) -> None:
        super().setup()
        self.server.connections[threading.current_thread()] = self.connection
        if self.server.fileno() < 0:  # The server closed after it accepted this connection.
            self.connection.shutdown(socket.SHUT_RDWR)

    def finish(self) -> None:
        del self.server.connections[threading.current_thread()]
        super().finish()

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length).decode(errors="replace")
        authorization = self.headers.get("Authorization", "")
        answer = self.server.answer(self.command, self.path, body, authorization)
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
