"""Zoho Accounts in memory: its clients and tokens, its limits, and the ways it can fail."""

from __future__ import annotations

import json
import math
import threading
import time
from dataclasses import dataclass, field
from secrets import token_hex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "ACCESS_DENIED",
    "ANSWER_LOST",
    "CONNECTION_DROPPED",
    "DEFAULT_USER",
    "SERVER_ERROR",
    "Accounts",
    "Client",
    "Failure",
    "RefusedError",
]

DEFAULT_USER = "patricia.boyle@example.com"
"""The email address of the user who gets the tokens when no user is named."""

_TOO_MANY_REQUESTS = {
    "error": "Access Denied",
    "error_description": (
        "You have made too many requests continuously. Please try again after some time."
    ),
    "status": "failure",
}


@dataclass(frozen=True)
class Client:
    """An OAuth client that is registered at Zoho.

    Attributes:
        client_id: The client's id.
        client_secret: The client's secret. The ``repr`` leaves it out.
        redirect_url: The only ``redirect_uri`` that Zoho accepts from this client.
    """

    client_id: str
    client_secret: str = field(repr=False)
    redirect_url: str


@dataclass(frozen=True)
class Failure:
    """A way in which a request to Zoho Accounts can fail; see `LoopbackZoho.fail`.

    Attributes:
        status: The HTTP status of the answer. ``None`` closes the connection without an answer.
        body: The body of the answer.
        content_type: The content type of the answer.
        handled: Whether Zoho carries out the request before it fails. If so, an exchange uses up
            its grant token and a revoked token stays revoked, although the caller gets no answer.
    """

    status: int | None
    body: str = ""
    content_type: str = "text/html;charset=UTF-8"
    handled: bool = False


SERVER_ERROR = Failure(500, "<html><body><h1>Internal Server Error</h1></body></html>")
"""Zoho is down: it answers with status 500 and an HTML page."""
ACCESS_DENIED = Failure(400, json.dumps(_TOO_MANY_REQUESTS), "application/json;charset=UTF-8")
"""Zoho answers as if there had been too many token requests."""
CONNECTION_DROPPED = Failure(None)
"""The connection closes before Zoho carries out the request."""
ANSWER_LOST = Failure(None, handled=True)
"""The connection closes after Zoho has carried out the request."""


class RefusedError(Exception):
    """Zoho Accounts refuses a request, most often with status 200."""

    def __init__(
        self, error: str, status: int = 200, payload: Mapping[str, object] | None = None
    ) -> None:
        super().__init__(error)
        self.error, self.status, self.payload = error, status, payload or {"error": error}


class HasClient:
    """What a Zoho and whoever is connected to it know of the default client.

    Attributes:
        client: The default client.
        zgid: The id of the organization.
    """

    client: Client
    zgid: str

    @property
    def client_id(self) -> str:
        """The id of the default client."""
        return self.client.client_id

    @property
    def client_secret(self) -> str:
        """The secret of the default client."""
        return self.client.client_secret

    @property
    def redirect_url(self) -> str:
        """The redirect URL of the default client."""
        return self.client.redirect_url

    def user_name(self, user: str = DEFAULT_USER) -> str:
        """Return the name that the SDK gives this user's ``UserSignature``: ``email:zgid``."""
        return f"{user}:{self.zgid}"


@dataclass(kw_only=True, repr=False, eq=False)
class Accounts(HasClient):
    """The part of `LoopbackZoho` that issues, checks and revokes tokens.

    `LoopbackZoho` documents the arguments.
    """

    access_token_lifetime: float = 3600.0
    grant_token_lifetime: float | None = 60.0
    max_refreshes: int | None = 10
    refresh_window: float = 600.0
    max_access_tokens: int | None = 15
    max_refresh_tokens: int | None = 20

    def __post_init__(self) -> None:
        self.zgid = "60012345678"
        self._lock = threading.RLock()
        self._skew = 0.0
        self._clients: dict[str, Client] = {}
        self._grants: dict[str, _Grant] = {}
        self._authorizations: dict[str, _Authorization] = {}  # by refresh token, oldest first
        self.client = self.add_client()

    def add_client(self, redirect_url: str = "https://example.com/oauth/callback") -> Client:
        """Register another OAuth client, which can redirect only to ``redirect_url``."""
        client = Client(f"1000.{token_hex(16).upper()}", token_hex(21), redirect_url)
        with self._lock:
            self._clients[client.client_id] = client
        return client

    def issue_grant_token(self, user: str = DEFAULT_USER, *, client: Client | None = None) -> str:
        """Issue a grant token, as if the user had given consent.

        Args:
            user: The user's email address.
            client: The client that the user gives access to. The default client if omitted.

        Returns:
            A grant token, which can be exchanged once within `grant_token_lifetime` seconds.
        """
        lifetime = math.inf if self.grant_token_lifetime is None else self.grant_token_lifetime
        code = _new_token()
        with self._lock:
            self._grants[code] = _Grant(user, client or self.client, self._now() + lifetime)
        return code

    def issue_refresh_token(self, user: str = DEFAULT_USER, *, client: Client | None = None) -> str:
        """Issue a refresh token, as if a grant token had been exchanged.

        Args:
            user: The user's email address.
            client: The client that the user gives access to. The default client if omitted.
        """
        new = _Authorization(user, client or self.client, _new_token())
        with self._lock:
            self._authorizations[new.refresh_token] = new
            if self.max_refresh_tokens is not None:
                authorizations = self._authorizations.values()
                same = [a for a in authorizations if (a.user, a.client) == (new.user, new.client)]
                for oldest in same[: -self.max_refresh_tokens]:
                    del self._authorizations[oldest.refresh_token]
        return new.refresh_token

    def issue_access_token(self, refresh_token: str) -> str:
        """Issue an access token without a request. It does not count towards `max_refreshes`.

        Args:
            refresh_token: A live refresh token.

        Raises:
            ValueError: The refresh token is unknown or revoked.
        """
        with self._lock:
            authorization = self._authorizations.get(refresh_token)
            if authorization is None:
                raise ValueError("issue_access_token() needs a live refresh token.")
            now, token = self._now(), _new_token()
            authorization.access_tokens[token] = now + self.access_token_lifetime
            live = [item for item in authorization.access_tokens.items() if item[1] > now]
            if self.max_access_tokens is not None:
                live = live[-self.max_access_tokens :]
            authorization.access_tokens = dict(live)
            return token

    def is_live(self, token: str) -> bool:
        """Return whether Zoho accepts this access token or refresh token."""
        with self._lock:
            return self._find_authorization(token) is not None

    def expire_tokens(self, user: str | None = None) -> None:
        """Expire access tokens now. Their holders are not told.

        Args:
            user: The user whose access tokens expire. ``None`` means all users.
        """
        with self._lock:
            for authorization in self._authorizations.values():
                if user in (None, authorization.user):
                    authorization.access_tokens.clear()

    def revoke(self, token: str) -> None:
        """Revoke a refresh token and its access tokens, or one access token, if it is live."""
        with self._lock:
            authorization = self._find_authorization(token)
            if authorization and not self._authorizations.pop(token, None):
                del authorization.access_tokens[token]

    def advance(self, seconds: float) -> None:
        """Move Zoho's clock forward by ``seconds``. This machine's clock stays as it is."""
        with self._lock:
            self._skew += seconds

    # -- Private methods: the caller holds the lock ----------------------------------------------

    def _handle(
        self, kind: str, params: Mapping[str, str], api_domain: str
    ) -> tuple[Mapping[str, object], str]:
        """Return the answer to a token request, and the user whose token it is."""
        if kind == "revoke":
            token = params.get("token", "")
            revoked = self._find_authorization(token)
            if revoked is None:
                raise RefusedError("invalid_token", 400)
            self.revoke(token)
            return {"status": "success"}, revoked.user
        if kind not in ("exchange", "refresh"):
            raise RefusedError("unsupported_grant_type", 400)
        client = self._clients.get(params.get("client_id", ""))
        if client is None:
            raise RefusedError("invalid_client")
        if params.get("client_secret") != client.client_secret:
            raise RefusedError("invalid_client_secret")
        authorize = self._exchange if kind == "exchange" else self._refresh
        authorization = authorize(client, params)
        payload: dict[str, object] = {
            "access_token": self.issue_access_token(authorization.refresh_token),
            "api_domain": api_domain,
            "token_type": "Bearer",
            "expires_in": int(self.access_token_lifetime),
        }
        if kind == "exchange":
            payload["refresh_token"] = authorization.refresh_token
        return payload, authorization.user

    def _exchange(self, client: Client, params: Mapping[str, str]) -> _Authorization:
        code = params.get("code", "")
        grant = self._grants.get(code)
        if grant is None or grant.client != client or grant.expires_at <= self._now():
            raise RefusedError("invalid_code")
        # The SDK omits redirect_uri for a self client, which has no redirect URL.
        if params.get("redirect_uri", client.redirect_url) != client.redirect_url:
            raise RefusedError("invalid_redirect_uri")
        del self._grants[code]
        return self._authorizations[self.issue_refresh_token(grant.user, client=client)]

    def _refresh(self, client: Client, params: Mapping[str, str]) -> _Authorization:
        authorization = self._authorizations.get(params.get("refresh_token", ""))
        if authorization is None or authorization.client != client:
            raise RefusedError("invalid_code")
        now = self._now()
        recent = [at for at in authorization.refreshed_at if at > now - self.refresh_window]
        if self.max_refreshes is not None and len(recent) >= self.max_refreshes:
            raise RefusedError("Access Denied", 400, _TOO_MANY_REQUESTS)
        authorization.refreshed_at = [*recent, now]
        return authorization

    def _now(self) -> float:
        return time.monotonic() + self._skew

    def _find_authorization(self, token: str) -> _Authorization | None:
        """Return what a live refresh token or access token belongs to."""
        now = self._now()
        for authorization in self._authorizations.values():
            if authorization.access_tokens.get(token, now) > now:
                return authorization
        return self._authorizations.get(token)


@dataclass(frozen=True)
class _Grant:
    user: str
    client: Client
    expires_at: float


@dataclass
class _Authorization:
    """A user's consent to a client: one refresh token and the access tokens made from it."""

    user: str
    client: Client
    refresh_token: str
    refreshed_at: list[float] = field(default_factory=list)
    access_tokens: dict[str, float] = field(default_factory=dict)  # expiry times, oldest first


def _new_token() -> str:
    return f"1000.{token_hex(16)}.{token_hex(16)}"
