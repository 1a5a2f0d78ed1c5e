"""What can go wrong, in words that tell the reader what to do next.

These errors know nothing of the Zoho SDK: the repositories raise them as they are, and a token
store wraps them in the SDK's ``SDKException`` (rule G1). None ever carries a secret (rule G3).
"""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from zoho_orm_store.record import TokenRecord

__all__ = [
    "CipherError",
    "ConfigurationError",
    "DatabaseError",
    "DatabaseTimeoutError",
    "DatabaseUnreachableError",
    "InvalidTokenError",
    "MissingDependencyError",
    "RefreshFailedError",
    "SchemaError",
    "StoreClosedError",
    "UndecryptableTokenError",
    "UserMismatchError",
    "ZohoOrmStoreError",
    "without_frames",
]

P = ParamSpec("P")
T = TypeVar("T")


class ZohoOrmStoreError(Exception):
    """The base of every error of this package."""


class ConfigurationError(ZohoOrmStoreError):
    """An argument, a URL or an engine cannot be used as it was given."""


class MissingDependencyError(ConfigurationError):
    """An optional package is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str, *, instead: str = "") -> None:
        super().__init__(
            f"The package {package!r} is not installed. Install "
            f"{'another driver' if instead else 'it'} with: pip install 'zoho-orm-store[{extra}]'"
            f"{f' and begin the URL with {instead}://' if instead else ''}"
        )
        self.package = package
        self.extra = extra


class StoreClosedError(ZohoOrmStoreError):
    """The store was used after ``close()``."""

    def __init__(self) -> None:
        super().__init__("This token store is closed. Make a new one, or close it later.")


class InvalidTokenError(ZohoOrmStoreError):
    """A token that cannot be stored; nothing was written (rules A3, A4, C4, E3)."""


class UserMismatchError(ZohoOrmStoreError):
    """A token carries the id of another user's row; nothing was written (rule E5)."""


class RefreshFailedError(ZohoOrmStoreError):
    """The refreshes for which a caller waited have failed, and it was spared one of its own."""


class CipherError(ZohoOrmStoreError):
    """A secret could not be encrypted or decrypted."""


class UndecryptableTokenError(CipherError):
    """A stored token that no key opens: the key is missing, or the row was tampered with.

    Attributes:
        id: The token's id.
        record: What is known of the token, without its secrets.
    """

    def __init__(
        self,
        message: str,
        id: str,  # noqa: A002 - the SDK's name for it
        record: TokenRecord | None = None,
    ) -> None:
        super().__init__(message)
        self.id = id
        self.record = record

    def __reduce__(self) -> tuple[type[UndecryptableTokenError], tuple[str, str]]:
        return type(self), (str(self), self.id)


class DatabaseError(ZohoOrmStoreError):
    """The database refused or lost an operation.

    Attributes:
        retryable: Whether running the whole transaction again may succeed (a deadlock, a
            serialization failure, a busy SQLite file, a dropped connection). A store has then
            already tried again until its timeout; whoever owns the transaction of a repository
            rolls it back and runs it again.
    """

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


class DatabaseUnreachableError(DatabaseError):
    """No connection to the database could be made."""


class DatabaseTimeoutError(DatabaseError):
    """An operation did not finish within the store's timeout."""


class SchemaError(DatabaseError):
    """The tables are missing, or of another version than this package.

    Attributes:
        reported: What the database said, where that is how it came out.
    """

    def __init__(self, message: str, *, reported: str = "") -> None:
        super().__init__(message)
        self.reported = reported


def without_frames(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function raise our errors with no frame that holds a secret (rule G3).

    Tools that show a traceback's local variables would otherwise show a URL with its password.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except ZohoOrmStoreError as error:
            failure = error.with_traceback(None)
        del args, kwargs
        raise failure

    return call
