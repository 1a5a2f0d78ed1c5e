"""Turning what a database, a driver, SQLAlchemy or Alembic raised into this package's errors.

A driver's text is cut down to what cannot hold a value of a row. The original error is never
chained, because its text may: PostgreSQL's ``DETAIL`` shows whole rows.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sqlalchemy import exc

from zoho_orm_store._database.drivers import EXTRAS, redacted_url
from zoho_orm_store._schema import missing_tables
from zoho_orm_store.errors import (
    DatabaseError,
    DatabaseTimeoutError,
    DatabaseUnreachableError,
    SchemaError,
    ZohoOrmStoreError,
    boundary,
)

if TYPE_CHECKING:
    from sqlalchemy import URL

__all__ = ["connect_error", "is_driver_error", "our_errors", "translate"]

_RETRYABLE = frozenset(
    {
        # PostgreSQL
        "40001",  # serialization failure
        "40P01",  # deadlock
        "53300",  # too many connections
        "55P03",  # lock not available
        "57P01",  # the server shuts down
        "57P02",  # the server crashed
        "57P03",  # the server starts up
        "23505",  # a row of the same identity was saved meanwhile
        # MySQL and MariaDB
        1020,  # the row has changed since it was read
        1040,  # too many connections
        1047,  # a Galera node is not ready
        1053,  # the server shuts down
        1062,  # a row of the same identity was saved meanwhile
        1203,  # too many connections of this user
        1205,  # lock wait timeout
        1213,  # deadlock, also a Galera write conflict
        1226,  # too many connections of this user, by a limit of its own
        2006,  # the server has gone away
        2013,  # the connection was lost
    }
)
_RETRYABLE_IN_SQLITE = (
    "database is locked",
    "database table is locked",
    "UNIQUE constraint failed",
)
_RETRYABLE_AT_CONNECT = (
    "too many clients already",
    "too many connections for",
    "remaining connection slots are reserved",
    "the database system is",  # starting up, or shutting down
)
"""What libpq says in its text alone when it connects."""

_SCHEMA = frozenset({"42P01", "42703", "3F000", 1054, 1146})
_SCHEMA_IN_SQLITE = ("no such table", "no such column", "has no column named")
_QUERY_CANCELED = "57014"
_RAISED_BY_TRIGGERS = frozenset({"P0001", 1644})
"""PostgreSQL's RAISE and MySQL's SIGNAL, whose texts are the application's and may hold values."""


def translate(error: Exception, url: URL | None = None) -> ZohoOrmStoreError | None:
    """The error of this package for a foreign one.

    Args:
        error: Any exception. One of this package's is returned as it is.
        url: The database, for the advice in the message.

    Returns:
        The error to raise, or ``None`` if neither SQLAlchemy nor a driver raised it.
    """
    if isinstance(error, ZohoOrmStoreError):
        return error
    if isinstance(error, exc.DBAPIError):
        return _translate_dbapi(error, url)
    if isinstance(error, exc.TimeoutError):
        return DatabaseTimeoutError(
            "No connection became free in the engine's pool in time. "
            "Raise pool_size or max_overflow, or use fewer threads."
        )
    if isinstance(error, exc.SQLAlchemyError):
        return DatabaseError(f"{type(error).__name__}: {_without_values(str(error))}")
    if is_driver_error(error):
        reason = _without_values(str(error))
        return DatabaseError(
            f"The driver reported {type(error).__name__}: {reason}", retryable=True
        )
    return None


our_errors = boundary(translate)
"""The boundary of a public function that works on a database."""


def is_driver_error(error: BaseException) -> bool:
    """Whether a driver raised an error that SQLAlchemy did not wrap.

    Some drivers do on a broken connection.
    """
    if isinstance(error, ZohoOrmStoreError):
        return False
    return isinstance(error, ConnectionError) or type(error).__module__.split(".")[0] in EXTRAS


def connect_error(error: Exception, url: URL) -> ZohoOrmStoreError:
    """The error for a failed attempt to connect.

    Args:
        error: Whatever the driver, or SQLAlchemy around it, raised.
        url: The database, which the message names without its password.
    """
    if isinstance(error, exc.SQLAlchemyError) and not isinstance(error, exc.DBAPIError):
        return translate(error, url) or DatabaseError(type(error).__name__)
    cause = error.orig if isinstance(error, exc.DBAPIError) and error.orig else error
    reason = _hide(_first_line(str(cause)) or type(cause).__name__, url.password)
    advice = "Check that the server runs and that host, port, database, user and password are right"
    if url.get_backend_name() == "sqlite":
        advice = "Check that the folder exists and that the file is readable and writable"
    return DatabaseUnreachableError(
        f"Cannot connect to {redacted_url(url)} ({reason}). {advice}.",
        retryable=_code_of(cause) in _RETRYABLE or _says(str(cause), _RETRYABLE_AT_CONNECT),
    )


def _translate_dbapi(error: exc.DBAPIError, url: URL | None) -> DatabaseError:
    code, text = _code_of(error.orig), str(error.orig)
    name = type(error.orig).__name__
    reported = f"The database reported {name if code is None else f'{name} {code}'}"
    if code in _SCHEMA or _says(text, _SCHEMA_IN_SQLITE):
        reported = f"{reported}: {_first_line(text)}"  # It quotes names, and no values.
        return SchemaError(missing_tables(redacted_url(url), reported) if url else reported)
    if code not in _RAISED_BY_TRIGGERS:
        reported = f"{reported}: {_without_values(text)}"
    if code == _QUERY_CANCELED:
        return DatabaseTimeoutError(reported)
    return DatabaseError(
        reported,
        retryable=error.connection_invalidated
        or code in _RETRYABLE
        or _says(text, _RETRYABLE_IN_SQLITE),
    )


def _code_of(error: BaseException | None) -> str | int | None:
    """MySQL's error number, PostgreSQL's SQLSTATE, or ``None``."""
    first = error.args[0] if error is not None and error.args else None
    if isinstance(first, int):
        return first  # MySQL's drivers also have a coarser SQLSTATE.
    sqlstate = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    return str(sqlstate) if sqlstate else None


def _says(text: str, phrases: tuple[str, ...]) -> bool:
    return any(phrase in text for phrase in phrases)


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0]


def _without_values(text: str) -> str:
    """The first line of a driver's message, without what stands between quotation marks.

    An apostrophe within a word ("doesn't") quotes nothing.
    """
    line = re.sub(r"(?<!\w)'.*'|(?<!\w)'.*", "'…'", _first_line(text))
    return re.sub(r': ".*', ': "…"', line)


def _hide(text: str, password: object) -> str:
    """Remove a password from a text where it stands as a word of its own."""
    return re.sub(rf"(?<!\w){re.escape(str(password))}(?!\w)", "***", text) if password else text
