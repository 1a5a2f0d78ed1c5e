"""The SDK's six ``TokenStore`` methods, over any collection of stored tokens."""

from __future__ import annotations

import logging
from abc import abstractmethod
from functools import wraps
from operator import methodcaller
from typing import TYPE_CHECKING, Concatenate, Literal, ParamSpec, Protocol, TypeVar

from zoho_orm_store.errors import ConfigurationError, ZohoOrmStoreError
from zoho_orm_store.matching import filled
from zoho_orm_store.record import check_text
from zoho_orm_store.sdk import (
    OAuthToken,
    TokenStore,
    fill,
    missing_id,
    record_of,
    store_exception,
    token_of,
    watch_request,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType
    from typing import NoReturn

    from typing_extensions import Self

    from zoho_orm_store.record import TokenRecord
    from zoho_orm_store.refresh import Settled

__all__ = ["MissingId", "StoredTokens", "TokenStoreAdapter"]

P = ParamSpec("P")
T = TypeVar("T")

MissingId = Literal["none", "raise"]

logger = logging.getLogger("zoho_orm_store")


class StoredTokens(Protocol):
    """The operations on stored tokens that a store needs. The repositories have them."""

    def get(self, id: str) -> TokenRecord | None:  # noqa: A002, D102
        ...

    def find(self, asked: TokenRecord) -> TokenRecord | None:  # noqa: D102
        ...

    def save(self, asked: TokenRecord) -> TokenRecord:  # noqa: D102
        ...

    def delete(self, id: str) -> bool:  # noqa: A002, D102
        ...

    def delete_all(self) -> int:  # noqa: D102
        ...

    def _oldest_first(self) -> Iterator[TokenRecord]: ...


def _for_the_sdk(
    method: Callable[Concatenate[TokenStoreAdapter, P], T],
) -> Callable[Concatenate[TokenStoreAdapter, P], T]:
    """Make a method raise nothing but the SDK's exception (rule G1).

    The cause keeps no frame whose local variables a traceback might show (rule G3).
    """

    @wraps(method)
    def operation(self: TokenStoreAdapter, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(self, *args, **kwargs)
        except ZohoOrmStoreError as error:
            cause = error.with_traceback(None)
        del args, kwargs
        raise store_exception(type(self).__name__, method.__name__, cause) from cause

    return operation


class TokenStoreAdapter(TokenStore):
    """A `TokenStore` that converts, calls, and converts back.

    Args:
        missing_id: What `find_token_by_id` does about an unknown id (rule D2): ``"none"`` returns
            ``None``, ``"raise"`` raises as the SDK's own stores do and its releases for the API
            versions 5 to 7 need.
    """

    def __init__(self, missing_id: MissingId = "none") -> None:
        if missing_id not in ("none", "raise"):
            raise ConfigurationError(f"missing_id must be 'none' or 'raise', not {missing_id!r}.")
        self._missing_id = missing_id

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"A {type(self).__name__} is not pickled. Make one in each process.")

    @abstractmethod
    def _read(self, operation: Callable[[StoredTokens], T]) -> T:
        """Run an operation that only reads."""

    @abstractmethod
    def _write(self, operation: Callable[[StoredTokens], T]) -> T:
        """Run an operation that happens completely or not at all (rule E6)."""

    def _find(self, asked: TokenRecord) -> TokenRecord | None:
        """What a token is to know that was asked for (rules C1, C2)."""
        stored = self._read(lambda stored: stored.find(asked))
        return None if stored is None else filled(asked, stored)

    def _get(self, id_: str) -> TokenRecord | None:
        return self._read(lambda stored: stored.get(id_))

    def _find_to_use(self, asked: TokenRecord) -> Settled:
        return self._find(asked), None

    def _get_to_use(self, id_: str) -> Settled:
        return self._get(id_), None

    def _save(self, asked: TokenRecord) -> TokenRecord:
        return self._write(lambda stored: stored.save(asked))

    def close(self) -> None:
        """Give back what the store holds; it cannot be used any more."""

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
        """Fill in the unknown fields of a token from the stored one that it means (rules B, C).

        Args:
            token: An SDK token. With an id, the id alone decides.

        Returns:
            The same object, or ``None``, and the token unchanged, where nothing matches.

        Raises:
            SDKException: The argument is no ``OAuthToken``, or the database failed.
        """
        asked = record_of(token)
        found, on_failure = self._find_to_use(asked)
        if found is not None:
            fill(token, asked, found)
        if on_failure is not None:
            watch_request(token, on_failure)
        return None if found is None else token

    @_for_the_sdk
    def find_token_by_id(self, id: str) -> OAuthToken | None:  # noqa: A002 - the SDK's name
        """Return the stored token with an id, as a new and complete SDK token (rules D1, D2).

        Args:
            id: The token's id.

        Returns:
            The token; ``None`` for an unknown id, with ``missing_id="none"``.

        Raises:
            SDKException: The id is unknown, with ``missing_id="raise"``; or the database failed.
        """
        found, on_failure = self._get_to_use(id) if _is_known_id(id) else (None, None)
        if found is not None:
            token = token_of(found)
            if on_failure is not None:
                watch_request(token, on_failure)
            return token
        if self._missing_id == "raise":
            raise missing_id()
        return None

    @_for_the_sdk
    def save_token(self, token: OAuthToken) -> None:
        """Save a token: into the row that it means, or into a new one (rules E1 to E8).

        Known fields overwrite, unknown ones leave what is stored. The token gets the row's id.

        Args:
            token: An SDK token with at least one credential.

        Raises:
            SDKException: The token cannot be stored, its id is that of another user's row, or the
                database failed. Since the SDK only logs what is raised here, the failure is also
                logged at ERROR on the logger ``zoho_orm_store``.
        """
        try:
            saved = self._save(record_of(token))
        except ZohoOrmStoreError as error:
            logger.error("A token was not saved: %s", error)
            raise
        token.set_id(saved.id)

    @_for_the_sdk
    def delete_token(self, id: str) -> None:  # noqa: A002 - the SDK's name
        """Remove exactly the token with an id; an unknown id is no error (rule F1).

        Args:
            id: The token's id, whatever characters it holds.

        Raises:
            SDKException: The database failed.
        """
        if _is_known_id(id):
            self._write(methodcaller("delete", id))

    @_for_the_sdk
    def delete_tokens(self) -> None:
        """Remove every stored token, in one statement (rule F2).

        Raises:
            SDKException: The database failed.
        """
        self._write(methodcaller("delete_all"))

    @_for_the_sdk
    def get_tokens(self) -> list[OAuthToken]:
        """Return every stored token, oldest first, as new and complete SDK tokens (rule F3).

        Raises:
            SDKException: The database failed.
        """
        return self._read(lambda stored: [*map(token_of, stored._oldest_first())])


def _is_known_id(id_: object) -> bool:
    if id_ is None or id_ == "":
        return False
    check_text("id", id_)
    return True
