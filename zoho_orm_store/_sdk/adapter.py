"""The SDK's six ``TokenStore`` methods, which convert, call a store, and convert back."""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from contextlib import contextmanager
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar

from zoho_orm_store._database.origin import DATABASE_SIDE
from zoho_orm_store._matching import fallen_back
from zoho_orm_store._refresh.coordinator import Settled
from zoho_orm_store._refresh.sdk_behaviour import needs_refresh, watch_request
from zoho_orm_store._sdk import acting
from zoho_orm_store._sdk.conversion import (
    OAuthToken,
    TokenStore,
    fill,
    missing_id_exception,
    record_from,
    store_exception,
    token_from,
)
from zoho_orm_store.errors import (
    ConfigurationError,
    ZohoOrmStoreError,
    without_frames,
    without_frames_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType
    from typing import NoReturn

    from typing_extensions import Self

    from zoho_orm_store.records import TokenRecord

__all__ = ["MissingId", "TokenStoreAdapter", "UsedGrants"]

P = ParamSpec("P")
T = TypeVar("T")

MissingId = Literal["none", "raise"]
UsedGrants = Literal["find", "forget"]

logger = logging.getLogger("zoho_orm_store")


def _for_the_sdk(
    method: Callable[Concatenate[TokenStoreAdapter, P], T],
) -> Callable[Concatenate[TokenStoreAdapter, P], T]:
    """Make a method raise only the SDK's exception, with this package's error as its cause."""

    @wraps(method)
    def operation(self: TokenStoreAdapter, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(self, *args, **kwargs)
        except ZohoOrmStoreError as error:
            cause = without_frames(error)
        except BaseException as error:  # noqa: BLE001 - it goes on
            del args, kwargs
            raise without_frames_of(error, DATABASE_SIDE)  # noqa: B904 - it is the same one
        del args, kwargs
        raise store_exception(type(self).__name__, method.__name__, cause) from cause

    return operation


class TokenStoreAdapter(TokenStore):
    """A ``TokenStore`` on six operations over `TokenRecord`.

    Args:
        missing_id: What `find_token_by_id` does for an unknown id: ``"none"`` returns ``None``,
            ``"raise"`` raises, as the SDK's own stores do and its releases for the API versions
            5 to 7 need.
        used_grants: What becomes of a grant token that was exchanged: with ``"find"`` it goes on
            finding its token, with ``"forget"`` it is removed and finds nothing.
    """

    def __init__(self, missing_id: MissingId = "none", used_grants: UsedGrants = "find") -> None:
        if missing_id not in ("none", "raise"):
            raise ConfigurationError(f"missing_id must be 'none' or 'raise', not {missing_id!r}.")
        if used_grants not in ("find", "forget"):
            raise ConfigurationError(
                f"used_grants must be 'find' or 'forget', not {used_grants!r}."
            )
        self._missing_id = missing_id
        self._forget_grants = used_grants == "forget"

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"A {type(self).__name__} cannot be pickled. Make one in each process.")

    @abstractmethod
    def _get(self, id_: str) -> Settled:
        """The token with an id."""

    @abstractmethod
    def _find(self, asked: TokenRecord) -> Settled:
        """The asked token with its unknown values filled in, or ``None``.

        For a new login of a stored user: ``None``, and the stored token's id to fall back on.
        """

    def _seen(self, stored: TokenRecord) -> None:
        """Note that the SDK is about to save a stored token as the caller has seen it."""

    @abstractmethod
    def _save(self, asked: TokenRecord) -> TokenRecord:
        """Save a token completely or not at all; return the row."""

    @abstractmethod
    def _delete(self, id_: str) -> None:
        """Delete the token with an id, if there is one."""

    @abstractmethod
    def _delete_all(self) -> None:
        """Delete every token."""

    @abstractmethod
    def _expire(self, id_: str) -> bool:
        """End the access token with an id, and return whether there was such a token."""

    @abstractmethod
    def _tokens(self) -> list[OAuthToken]:
        """Every token, oldest first."""

    def initialize_sdk(self, environment: Any, **options: Any) -> None:  # noqa: ANN401
        """Initialize the SDK with this store, before anybody has logged in.

        The SDK has one store per process, so call this once in each process. Then call Zoho
        inside `acting_as`.

        Args:
            environment: The data centre of logins, such as ``USDataCenter.PRODUCTION()``. A stored
                token is used at the data centre that its ``api_domain`` names.
            options: More arguments of ``Initializer.initialize``, such as ``resource_path``.

        Raises:
            SDKException: The SDK refuses an argument.
        """
        acting.initialize(self, environment, options)

    @contextmanager
    def acting_as(self, who: str | OAuthToken) -> Iterator[OAuthToken]:
        """Let this thread call Zoho as one user, until the end of the ``with`` block.

        Other threads are not affected. In asynchronous code, run the whole block in a thread.

        Args:
            who: The id of a stored token; or a token of the SDK's with a grant token or a refresh
                token, which logs in and is saved.

        Yields:
            The SDK's token.

        Raises:
            SDKException: No token with this id is stored, or Zoho refused the login.
            ConfigurationError: `initialize_sdk` was not called in this process.
        """
        token = self.find_token_by_id(who) if isinstance(who, str) else who
        if token is None:
            raise missing_id_exception()
        with acting.switched_to(self, token) as switched:
            yield switched

    def expire(self, id: str) -> bool:  # noqa: A002 - the SDK's name for it
        """End an access token before its hour is over: the next caller refreshes it.

        Args:
            id: The token's id.

        Returns:
            Whether there was such a token.

        Raises:
            InvalidTokenError: The id is not text.
            DatabaseError: The database failed.
        """
        return self._expire(id)

    def close(self) -> None:
        """Give back connections and threads, if the store has any."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @_for_the_sdk
    def find_token(self, token: OAuthToken) -> OAuthToken | None:
        """Fill in the unknown fields of a token from the stored one that it means.

        Args:
            token: An SDK token. A known id decides alone; otherwise user, access token, grant
                token and refresh token are tried in this order.

        Returns:
            The same object; or ``None`` if nothing matches, and the token is unchanged. Also
            ``None`` if a stored user comes with another grant token than the stored one: that is a
            new login, which the SDK exchanges. If it cannot, it goes on with the stored token,
            unless the store forgets used grants.

        Raises:
            SDKException: The argument is not an ``OAuthToken``, or the database failed.
        """
        asked = record_from(token)
        found, on_failure, fallback_id = self._find(asked)
        if found is not None:
            fill(token, asked, found)
        if fallback_id is not None:
            watch_request(token, on_failure, partial(self._fall_back, fallback_id))
        elif on_failure is not None:
            watch_request(token, on_failure)
        return None if found is None else token

    def _fall_back(self, stored_id: str, token: OAuthToken, *args: object) -> bool:
        """Go on with the stored token after the SDK could not exchange a new grant token."""
        try:
            stored, on_failure, _ = self._get(stored_id)
        except ZohoOrmStoreError as error:
            logger.warning("The stored token could not be read again: %s", error)
            return False
        if stored is None:
            return False
        logger.info("A grant token could not be exchanged; the stored token is used instead")
        asked = record_from(token)
        fill(token, asked, fallen_back(asked, stored))
        self._seen(stored)
        if needs_refresh(stored, time.time()):
            watch_request(token, on_failure)
            token.refresh_access_token(*args)
        return True

    @_for_the_sdk
    def find_token_by_id(self, id: str) -> OAuthToken | None:  # noqa: A002 - the SDK's name
        """Return the stored token with an id, as a new and complete SDK token.

        Args:
            id: The token's id.

        Returns:
            The token; ``None`` for an unknown id, with ``missing_id="none"``.

        Raises:
            SDKException: The id is unknown, with ``missing_id="raise"``; or the database failed.
        """
        found, on_failure, _ = Settled(None) if id in (None, "") else self._get(id)
        if found is None:
            if self._missing_id == "raise":
                raise missing_id_exception()
            return None
        token = token_from(found)
        if on_failure is not None:
            watch_request(token, on_failure)
        return token

    @_for_the_sdk
    def save_token(self, token: OAuthToken) -> None:
        """Save a token: into the row that it means, or into a new one.

        Known fields overwrite, unknown ones leave what is stored. The token gets the row's id.

        Args:
            token: An SDK token. If it is not stored yet, it needs at least one credential.

        Raises:
            SDKException: The token cannot be stored, its id is that of another user's row, or the
                database failed. Since the SDK only logs what is raised here, the failure is also
                logged at ERROR on the logger ``zoho_orm_store``.
        """
        try:
            saved = self._save(record_from(token))
        except ZohoOrmStoreError as error:
            logger.error("A token was not saved: %s", error)
            raise
        token.set_id(saved.id)

    @_for_the_sdk
    def delete_token(self, id: str) -> None:  # noqa: A002 - the SDK's name
        """Delete exactly the token with an id. An unknown id is not an error.

        Args:
            id: The token's id, whatever characters it holds.

        Raises:
            SDKException: The database failed.
        """
        if id not in (None, ""):
            self._delete(id)

    @_for_the_sdk
    def delete_tokens(self) -> None:
        """Delete every stored token, in one statement.

        Raises:
            SDKException: The database failed.
        """
        self._delete_all()

    @_for_the_sdk
    def get_tokens(self) -> list[OAuthToken]:
        """Return every stored token, oldest first, as new and complete SDK tokens.

        Raises:
            SDKException: The database failed.
        """
        return self._tokens()
