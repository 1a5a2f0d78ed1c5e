"""Zoho Accounts: clients, grant, refresh and access tokens, and Zoho's limits on them."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from secrets import token_hex
from typing import TYPE_CHECKING

from zoho_orm_store.testing.answers import TOO_MANY_REQUESTS, RefusedError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from zoho_orm_store.testing.recording import Kind

__all__ = ["DEFAULT_USER", "Accounts", "Client"]

DEFAULT_USER = "patricia.boyle@example.com"
"""The email address of the user that tokens are issued to when no other is named."""


@dataclass(frozen=True)
class Client:
    """An OAuth client registered at Zoho.

    Attributes:
        client_id: The client's id.
        client_secret: The client's secret; not in the ``repr``.
        redirect_url: The URL that an exchange may name as ``redirect_uri``.
    """

    client_id: str
    client_secret: str = field(repr=False)
    redirect_url: str


class Accounts:
    """What Zoho Accounts knows and allows, in memory.

    Arguments and attributes are those of `LoopbackZoho`, which gives them to the world.
    """

    def __init__(
        self,
        *,
        access_token_lifetime: float = 3600.0,
        grant_token_lifetime: float | None = 60.0,
        max_refreshes: int | None = 10,
        refresh_window: float = 600.0,
        max_access_tokens: int | None = 15,
        max_refresh_tokens: int | None = 20,
    ) -> None:
        self.access_token_lifetime = access_token_lifetime
        self.grant_token_lifetime = grant_token_lifetime
        self.max_refreshes = max_refreshes
        self.refresh_window = refresh_window
        self.max_access_tokens = max_access_tokens
        self.max_refresh_tokens = max_refresh_tokens
        self.zgid = "60012345678"
        self._lock = threading.Lock()
        self._skew = 0.0
        self._clients: dict[str, Client] = {}
        self._grants: dict[str, _Grant] = {}
        self._access: dict[str, _Authorization] = {}
        self._refresh: dict[str, _Authorization] = {}
        self._by_user: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
        self.client = self.add_client()

    # -- Setting the stage -----------------------------------------------------------------------

    @property
    def client_id(self) -> str:
        """The default client's id."""
        return self.client.client_id

    @property
    def client_secret(self) -> str:
        """The default client's secret."""
        return self.client.client_secret

    @property
    def redirect_url(self) -> str:
        """The default client's redirect URL."""
        return self.client.redirect_url

    def add_client(self, redirect_url: str = "https://example.com/oauth/callback") -> Client:
        """Register one more OAuth client.

        Args:
            redirect_url: The only ``redirect_uri`` that an exchange may name.
        """
        client = Client(f"1000.{token_hex(16).upper()}", token_hex(21), redirect_url)
        with self._lock:
            self._clients[client.client_id] = client
        return client

    def user_name(self, user: str = DEFAULT_USER) -> str:
        """The name that the SDK gives to a user's signature, ``email:zgid``."""
        return f"{user}:{self.zgid}"

    def issue_grant_token(self, user: str = DEFAULT_USER, *, client: Client | None = None) -> str:
        """Let a user consent to a client's access.

        Args:
            user: The user's email address.
            client: The client; the default one if not given.

        Returns:
            A grant token, to be exchanged within `grant_token_lifetime` seconds.
        """
        code = _new_token()
        with self._lock:
            lifetime = self.grant_token_lifetime
            ends = float("inf") if lifetime is None else self._now() + lifetime
            self._grants[code] = _Grant(user, (client or self.client).client_id, ends)
        return code

    def issue_refresh_token(self, user: str = DEFAULT_USER, *, client: Client | None = None) -> str:
        """Make a refresh token, as if a grant token had been exchanged before.

        Args:
            user: The user's email address.
            client: The client; the default one if not given.
        """
        with self._lock:
            return self._new_authorization(user, (client or self.client).client_id).refresh_token

    def issue_access_token(self, refresh_token: str) -> str:
        """Make an access token without a request; `max_refreshes` does not count it.

        Args:
            refresh_token: A live refresh token.

        Raises:
            ValueError: The refresh token is not live.
        """
        with self._lock:
            authorization = self._refresh.get(refresh_token)
            if authorization is None:
                raise ValueError("An access token can only be issued for a live refresh token.")
            return self._new_access_token(authorization)

    def is_live(self, token: str) -> bool:
        """Whether Zoho would accept this access token, or refresh with this refresh token."""
        with self._lock:
            return token in self._refresh or self._live_access(token) is not None

    def expire_tokens(self, user: str | None = None) -> None:
        """End access tokens early, unknown to those who hold them.

        Args:
            user: Whose tokens end; ``None`` ends everybody's.
        """
        with self._lock:
            for authorization in self._refresh.values():
                if user in (None, authorization.user):
                    self._forget_access(authorization)

    def revoke(self, token: str) -> None:
        """End a refresh token and its access tokens, or one access token; unknown is no error."""
        with self._lock:
            self._revoke(token)

    def advance(self, seconds: float) -> None:
        """Let time pass at Zoho, and only there: tokens grow old, windows move on.

        Args:
            seconds: By how much Zoho's clock goes ahead.
        """
        with self._lock:
            self._skew += seconds

    # -- Answering: called with the lock held ----------------------------------------------------

    def _handle(
        self, kind: Kind, params: Mapping[str, str], api_domain: str
    ) -> tuple[Mapping[str, object], str | None]:
        """Do what was asked; return the answer's content and the user whose token it was."""
        if kind == "unknown":
            raise RefusedError("unsupported_grant_type", status=400)
        if kind == "revoke":
            revoked = self._revoke(params.get("token", ""))
            if revoked is None:
                raise RefusedError("invalid_token", status=400)
            return {"status": "success"}, revoked.user
        client = self._clients.get(params.get("client_id", ""))
        if client is None:
            raise RefusedError("invalid_client")
        if params.get("client_secret") != client.client_secret:
            raise RefusedError("invalid_client_secret")
        payload: dict[str, object] = {}
        if kind == "exchange":
            authorization = self._exchange(client, params)
            payload["refresh_token"] = authorization.refresh_token
        else:
            authorization = self._refreshable(client, params)
        payload |= {
            "access_token": self._new_access_token(authorization),
            "api_domain": api_domain,
            "token_type": "Bearer",
            "expires_in": int(self.access_token_lifetime),
        }
        return payload, authorization.user

    def _exchange(self, client: Client, params: Mapping[str, str]) -> _Authorization:
        code = params.get("code", "")
        grant = self._grants.get(code)
        if grant is None or grant.client_id != client.client_id or grant.ends <= self._now():
            raise RefusedError("invalid_code")
        # A self client has no redirect URL, so that the SDK may leave it out.
        if params.get("redirect_uri", client.redirect_url) != client.redirect_url:
            raise RefusedError("invalid_redirect_uri")
        del self._grants[code]
        return self._new_authorization(grant.user, client.client_id)

    def _refreshable(self, client: Client, params: Mapping[str, str]) -> _Authorization:
        authorization = self._refresh.get(params.get("refresh_token", ""))
        if authorization is None or authorization.client_id != client.client_id:
            raise RefusedError("invalid_code")
        now = self._now()
        recent = [at for at in authorization.refreshed if at > now - self.refresh_window]
        if self.max_refreshes is not None and len(recent) >= self.max_refreshes:
            raise RefusedError("Access Denied", status=400, payload=TOO_MANY_REQUESTS)
        authorization.refreshed = [*recent, now]
        return authorization

    # -- Tokens: called with the lock held -------------------------------------------------------

    def _now(self) -> float:
        return time.monotonic() + self._skew

    def _new_authorization(self, user: str, client_id: str) -> _Authorization:
        authorization = _Authorization(user, client_id, _new_token())
        refresh_tokens = self._by_user[user, client_id]
        refresh_tokens.append(authorization.refresh_token)
        self._refresh[authorization.refresh_token] = authorization
        while self.max_refresh_tokens is not None and len(refresh_tokens) > self.max_refresh_tokens:
            self._revoke(refresh_tokens[0])
        return authorization

    def _new_access_token(self, authorization: _Authorization) -> str:
        now, token = self._now(), _new_token()
        authorization.access[token] = now + self.access_token_lifetime
        self._access[token] = authorization
        live = [each for each, ends in authorization.access.items() if ends > now]
        keep = live if self.max_access_tokens is None else live[-self.max_access_tokens :]
        self._forget_access(authorization, keep)
        return token

    def _forget_access(self, authorization: _Authorization, keep: Collection[str] = ()) -> None:
        for token in authorization.access.keys() - keep:
            del authorization.access[token], self._access[token]

    def _revoke(self, token: str) -> _Authorization | None:
        if authorization := self._refresh.pop(token, None):
            self._by_user[authorization.user, authorization.client_id].remove(token)
            self._forget_access(authorization)
        elif authorization := self._live_access(token):
            del authorization.access[token], self._access[token]
        return authorization

    def _live_access(self, token: str) -> _Authorization | None:
        authorization = self._access.get(token)
        if authorization is None or authorization.access[token] <= self._now():
            return None
        return authorization

    def _caller(self, header: str) -> str | None:
        """The user whose live access token an Authorization header holds."""
        scheme, _, token = header.partition(" ")
        authorization = self._live_access(token) if scheme == "Zoho-oauthtoken" else None
        return authorization.user if authorization else None


@dataclass(frozen=True)
class _Grant:
    user: str
    client_id: str
    ends: float


@dataclass
class _Authorization:
    """A user's consent to a client: one refresh token and the access tokens made from it."""

    user: str
    client_id: str
    refresh_token: str
    refreshed: list[float] = field(default_factory=list)
    access: dict[str, float] = field(default_factory=dict)  # when each one ends, oldest first


def _new_token() -> str:
    return f"1000.{token_hex(16)}.{token_hex(16)}"
