"""Every exception of this package, and the boundary that public functions put around themselves.

None of them knows the Zoho SDK: a token store wraps them in the SDK's ``SDKException``. None of
them ever carries a secret.
"""

from __future__ import annotations

from functools import partial, wraps
from types import TracebackType
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from zoho_orm_store.records import TokenRecord

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
    "UnreadableTokenError",
    "UserMismatchError",
    "ZohoOrmStoreError",
    "boundary",
    "errors_behind",
    "without_frames",
    "without_frames_of",
]

P = ParamSpec("P")
T = TypeVar("T")
E = TypeVar("E", bound=BaseException)


class ZohoOrmStoreError(Exception):
    """The base of every error of this package."""


class ConfigurationError(ZohoOrmStoreError, ValueError):
    """An argument, a URL or an engine cannot be used as it was given."""


class MissingDependencyError(ConfigurationError, ImportError):
    """An optional package is not installed. The message names the extra that installs it.

    Attributes:
        package: The missing package.
        extra: The extra of zoho-orm-store that installs it.
    """

    def __init__(self, package: str, extra: str, *, instead: str = "") -> None:
        super().__init__(
            f"The package {package!r} is not installed. Install "
            f"{'another driver' if instead else 'it'} with: pip install 'zoho-orm-store[{extra}]'"
            f"{f' and begin the URL with {instead}://' if instead else ''}"
        )
        self.package = package
        self.extra = extra
        self._instead = instead

    def __reduce__(self) -> tuple[Callable[[str, str], MissingDependencyError], tuple[str, str]]:
        return partial(type(self), instead=self._instead), (self.package, self.extra)


class StoreClosedError(ZohoOrmStoreError, RuntimeError):
    """The store was used after ``close()``, or while the interpreter exits."""

    def __init__(
        self, message: str = "This token store is closed. Make a new one, or close it later."
    ) -> None:
        super().__init__(message)


class InvalidTokenError(ZohoOrmStoreError, ValueError):
    """The token cannot be stored as it is. Nothing was written."""


class UserMismatchError(ZohoOrmStoreError, ValueError):
    """The token has the id of another user's row. Nothing was written."""


class RefreshFailedError(ZohoOrmStoreError):
    """Other workers' refreshes failed while this caller waited, so it did not try again."""


class CipherError(ZohoOrmStoreError):
    """A secret could not be encrypted or decrypted."""


class UnreadableTokenError(ZohoOrmStoreError):
    """A stored token cannot be read: another program wrote a value that no token has.

    Attributes:
        id: The token's id.
        record: The token without its secrets, and without the values that cannot be read.
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

    def __reduce__(self) -> tuple[type[UnreadableTokenError], tuple[str, str]]:
        return type(self), (str(self), self.id)


class UndecryptableTokenError(UnreadableTokenError, CipherError):
    """A stored token cannot be decrypted: its key is missing, or the row was changed."""


class DatabaseError(ZohoOrmStoreError):
    """The database refused or lost an operation.

    Attributes:
        retryable: Whether running the whole transaction again may succeed: after a deadlock, a
            serialization failure, a busy SQLite file or a lost connection. A store has already
            tried again until its timeout. If your code owns the transaction, roll it back and run
            it again.
    """

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


class DatabaseUnreachableError(DatabaseError, ConnectionError):
    """No connection to the database could be made."""


class DatabaseTimeoutError(DatabaseError, TimeoutError):
    """An operation did not finish within the store's timeout."""


class SchemaError(DatabaseError):
    """The tables are missing, or belong to another version of this package."""


def without_frames(error: E) -> E:
    """Remove what a traceback may show of an error: its frames and the errors behind it.

    Tools that print local variables would otherwise show secrets from our frames, and the text of
    a driver's error may hold a whole row.
    """
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def without_frames_of(error: E, packages: Collection[str]) -> E:
    """Remove the frames of some packages from an error that is the application's.

    It keeps the frames of the application's own code, and of the standard library. Errors of the
    packages that stand behind it are removed, because their texts may hold a row.

    Args:
        error: The error, such as what a signal handler or a cancellation has raised.
        packages: The names of top-level packages.
    """

    def is_inside(module: str) -> bool:
        # Alembic loads our revisions as modules with names of their own.
        return module.partition(".")[0] in packages or module.startswith("zoho_orm_store")

    for each in errors_behind(error):
        each.__traceback__ = _filtered(each.__traceback__, is_inside)
        if each.__cause__ is not None and is_inside(type(each.__cause__).__module__):
            each.__cause__ = None
        if each.__context__ is not None and is_inside(type(each.__context__).__module__):
            each.__context__ = None
    return error


def errors_behind(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, its cause and context, and theirs, each once."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        each = waiting.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            yield each
            waiting += [each.__cause__, each.__context__]


def _filtered(
    traceback: TracebackType | None, is_inside: Callable[[str], bool]
) -> TracebackType | None:
    kept = []
    while traceback is not None:
        if not is_inside(traceback.tb_frame.f_globals.get("__name__", "")):
            kept.append(traceback)
        traceback = traceback.tb_next
    result = None
    for each in reversed(kept):
        result = TracebackType(result, each.tb_frame, each.tb_lasti, each.tb_lineno)
    return result


def boundary(
    translate: Callable[[Exception], BaseException | None],
    inside: Collection[str] = frozenset({"zoho_orm_store"}),
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Make a decorator for the functions that users call.

    The function raises as usual. The decorator removes frames, cause and context.

    Args:
        translate: Turns an error into the one to raise. It returns ``None`` for an error that is
            not this package's concern, which goes on, without the frames inside.
        inside: The packages whose frames may show secrets.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return function(*args, **kwargs)
            except BaseException as error:  # noqa: BLE001 - it goes on
                failure = translate(error) if isinstance(error, Exception) else None
                if failure is None:
                    failure = without_frames_of(error, inside)
                else:
                    without_frames(failure)
            del args, kwargs
            raise failure

        return call

    return decorate
