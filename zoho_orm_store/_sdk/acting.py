"""Starting the SDK before anybody has logged in, and acting as one stored user after another."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from zoho_orm_store._sdk.conversion import Initializer, SDKException, Token
from zoho_orm_store.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zoho_orm_store._sdk.conversion import OAuthToken, TokenStore

__all__ = ["initialize", "switched_to"]


class Nobody(Token):
    """What the SDK is started with: a token that logs nobody in."""

    def authenticate(self, url_connection: object) -> None:
        raise SDKException(
            "NOBODY_IS_LOGGED_IN",
            "Nobody is logged in in this thread. Call Zoho inside 'with store.acting_as(id):'.",
        )

    def generate_token(self) -> None:
        """The SDK calls this at the start, in order to log in."""

    def remove(self) -> bool:
        return False

    def get_id(self) -> None:
        """No token has this one's id."""


def initialize(store: TokenStore, environment: object, options: dict[str, Any]) -> None:
    """Start the SDK in this process, without a login."""
    _use_locals_of_greenlets()
    Initializer.initialize(environment=environment, token=Nobody(), store=store, **options)


@contextmanager
def switched_to(store: TokenStore, token: OAuthToken) -> Iterator[OAuthToken]:
    """Let this thread call Zoho for a token, and afterwards for whom it did before."""
    if Initializer.initializer is None or Initializer.initializer.store is not store:
        raise ConfigurationError(
            "The SDK of this process does not use this store. Call initialize_sdk() of the store "
            "first, once in each process."
        )
    _use_locals_of_greenlets()
    before = getattr(Initializer.LOCAL, "init", None)
    try:
        Initializer.switch_user(token=token)
        _learn_user(store, token)
        yield token
    finally:
        Initializer.LOCAL.init = before


def _learn_user(store: TokenStore, token: OAuthToken) -> None:
    """Tell a token its user, whom the SDK has perhaps found out only now, for the stored one.

    The SDK names files after the user, and must find them again in the same call.
    """
    if token.get_user_signature() is None and token.get_id() is not None:
        stored = store.find_token_by_id(token.get_id())
        if stored is not None:
            token.set_user_signature(stored.get_user_signature())


def _use_locals_of_greenlets() -> None:
    """Let the SDK keep a user for each greenlet if it was imported before gevent's patch.

    Otherwise all greenlets of a thread would act as the user that was switched to last.
    """
    if not isinstance(Initializer.LOCAL, threading.local):
        Initializer.LOCAL = threading.local()
