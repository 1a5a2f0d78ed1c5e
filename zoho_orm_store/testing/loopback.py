"""Zoho Accounts and a little of Zoho CRM behind one loopback port."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlsplit

from zoho_orm_store.errors import MissingDependencyError
from zoho_orm_store.testing.accounts import DEFAULT_USER, Accounts
from zoho_orm_store.testing.answers import (
    CONNECTION_DROPPED,
    SERVER_ERROR,
    RefusedError,
    failed_answer,
    json_answer,
)
from zoho_orm_store.testing.consent import consent_answer
from zoho_orm_store.testing.crm import crm_answer
from zoho_orm_store.testing.recording import Counts, RecordedRequest, counted
from zoho_orm_store.testing.server import Server

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Self
    from zohocrmsdk.src.com.zoho.crm.api.dc.data_center import DataCenter

    from zoho_orm_store.testing.answers import Answer, Failure
    from zoho_orm_store.testing.recording import Kind
    from zoho_orm_store.testing.server import Request

__all__ = ["LoopbackZoho"]


class LoopbackZoho(Accounts):
    """Zoho Accounts and a little of Zoho CRM, on a free port of 127.0.0.1.

    Use it as a context manager, or call `start` and `close`. Users need no registration: any email
    address is one, and all belong to one organization. Every argument but ``port`` is also an
    attribute that may be changed while it runs, for the requests that follow. Limits default to
    Zoho's own; ``None`` lifts one.

    Args:
        port: The port to listen on; 0 takes a free one.
        access_token_lifetime: Seconds an access token lives. The SDK refreshes a token in its last
            5 seconds: with less than that, before every request.
        grant_token_lifetime: Seconds a grant token may be exchanged, once.
        max_refreshes: Access tokens that one refresh token may make within ``refresh_window``; the
            next request gets "Access Denied".
        refresh_window: Seconds over which ``max_refreshes`` counts.
        max_access_tokens: Live access tokens of one refresh token; the next ends the oldest.
        max_refresh_tokens: Live refresh tokens of one user and client; the next ends the oldest.
        delay: Seconds by which every answer of Zoho Accounts is held back.

    Attributes:
        client: The client that is used where no other is named.
        zgid: The id of the organization.
    """

    def __init__(
        self,
        *,
        port: int = 0,
        access_token_lifetime: float = 3600.0,
        grant_token_lifetime: float | None = 60.0,
        max_refreshes: int | None = 10,
        refresh_window: float = 600.0,
        max_access_tokens: int | None = 15,
        max_refresh_tokens: int | None = 20,
        delay: float = 0.0,
    ) -> None:
        super().__init__(
            access_token_lifetime=access_token_lifetime,
            grant_token_lifetime=grant_token_lifetime,
            max_refreshes=max_refreshes,
            refresh_window=refresh_window,
            max_access_tokens=max_access_tokens,
            max_refresh_tokens=max_refresh_tokens,
        )
        self.delay = delay
        self._port = port
        self._server: Server | None = None
        self._closing = threading.Event()
        self._failure = SERVER_ERROR
        self._failures_left: int | None = 0
        self._requests: list[RecordedRequest] = []

    # -- Coming and going ------------------------------------------------------------------------

    def start(self) -> Self:
        """Listen and answer, in daemon threads; started again after `close`, on the same port.

        Returns:
            This object.
        """
        if self._server is None:
            self._closing.clear()
            self._server = Server(self._port, self._answer)
            self._port = self._server.server_address[1]
            self._server.start()
        return self

    def close(self) -> None:
        """Cut all connections and give port and threads back. What Zoho knows is kept."""
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
        if not self._port:
            raise RuntimeError("LoopbackZoho has no port yet. Call start(), or use it in a with.")
        return f"http://127.0.0.1:{self._port}"

    @property
    def accounts_url(self) -> str:
        """The URL for token requests."""
        return f"{self.url}/oauth/v2/token"

    @property
    def consent_url(self) -> str:
        """The URL of the page on which a user lets a client in, for a login in a browser.

        It takes the parameters of Zoho's own: ``client_id``, ``redirect_uri`` (the client's),
        ``response_type``, ``scope``, ``access_type`` and ``state``.
        """
        return f"{self.url}/oauth/v2/auth"

    def environment(self) -> DataCenter.Environment:
        """The environment to give to the SDK's ``Initializer``.

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
        except TypeError:  # SDK 5.0 wants a name as well, and never reads it
            return DataCenter.Environment(*urls, "loopback")

    # -- Misbehaving -----------------------------------------------------------------------------

    def fail(self, failure: Failure = SERVER_ERROR, *, times: int | None = 1) -> None:
        """Let the next requests to Zoho Accounts fail; replaces what was ordered before.

        Args:
            failure: How they fail: `SERVER_ERROR`, `ACCESS_DENIED`, `CONNECTION_DROPPED`,
                `ANSWER_LOST`, or another `Failure`.
            times: How many requests fail; ``None`` means all, until `recover`.
        """
        with self._lock:
            self._failure, self._failures_left = failure, times

    def recover(self) -> None:
        """Stop failing."""
        self.fail(times=0)

    # -- Looking back ----------------------------------------------------------------------------

    @property
    def requests(self) -> list[RecordedRequest]:
        """Every request since the start or the last `reset_counts`, in the order of the answers."""
        with self._lock:
            return list(self._requests)

    @property
    def counts(self) -> Counts:
        """How many requests there were since the start or the last `reset_counts`."""
        return counted(self.requests)

    def reset_counts(self) -> None:
        """Forget the requests recorded so far; tokens and limits stay as they are."""
        with self._lock:
            self._requests.clear()

    # -- Answering: called by the server's threads -----------------------------------------------

    def _answer(self, request: Request) -> Answer:
        at = time.time()
        url = urlsplit(request.target)
        params = dict(parse_qsl(url.query)) | dict(parse_qsl(request.body))
        if not url.path.startswith("/oauth/"):
            with self._lock:
                user = self._caller(request.authorization)
                answer = crm_answer(request.method, url.path, params, user, self.zgid)
                self._record("api", request.target, at, answer, user)
            return answer
        if (request.method, url.path) == ("GET", "/oauth/v2/auth"):
            return self._consent(params, at)
        if self.delay and self._closing.wait(self.delay):
            return failed_answer(CONNECTION_DROPPED)
        kind = _kind(request.method, url.path, params)
        with self._lock:
            answer, user = self._accounts_answer(kind, params)
            self._record(kind, url.path, at, answer, user)
        return answer

    def _consent(self, params: Mapping[str, str], at: float) -> Answer:
        answer = consent_answer(
            params,
            self._clients.get(params.get("client_id", "")),
            DEFAULT_USER,
            lambda user, client: self.issue_grant_token(user, client=client),
        )
        with self._lock:
            self._record("consent", "/oauth/v2/auth", at, answer, params.get("user"))
        return answer

    def _record(self, kind: Kind, path: str, at: float, answer: Answer, user: str | None) -> None:
        self._requests.append(RecordedRequest(kind, path, at, answer.status, answer.error, user))

    def _accounts_answer(self, kind: Kind, params: Mapping[str, str]) -> tuple[Answer, str | None]:
        failure = self._next_failure()
        if failure is not None and not failure.handled:
            return failed_answer(failure), None
        try:
            payload, user = self._handle(kind, params, self.url)
            answer = json_answer(200, payload)
        except RefusedError as refused:
            answer, user = refused.answer, None
        if failure is not None:
            answer = failed_answer(failure, answer.error)
        return answer, user

    def _next_failure(self) -> Failure | None:
        if self._failures_left == 0:
            return None
        if self._failures_left is not None:
            self._failures_left -= 1
        return self._failure


def _kind(method: str, path: str, params: Mapping[str, str]) -> Kind:
    if method != "POST":
        return "unknown"
    if path == "/oauth/v2/token/revoke":
        return "revoke"
    grant_type = params.get("grant_type") if path == "/oauth/v2/token" else None
    kinds: dict[str | None, Kind] = {"authorization_code": "exchange", "refresh_token": "refresh"}
    return kinds.get(grant_type, "unknown")
