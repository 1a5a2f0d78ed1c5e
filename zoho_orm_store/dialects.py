"""What databases and drivers do differently, apart from their SQL: errors, timeouts, defaults."""

from __future__ import annotations

import re
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

from sqlalchemy import exc

from zoho_orm_store.errors import (
    DatabaseError,
    DatabaseTimeoutError,
    DatabaseUnreachableError,
    SchemaError,
    without_frames,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import URL, Connection

__all__ = [
    "AUTOCOMMIT_IS_FREE",
    "AUTOCOMMIT_READS",
    "BROUGHT_INSTEAD",
    "EXTRAS",
    "connect_args",
    "connect_failure_of",
    "failure_of",
    "is_database_error",
    "is_in_autocommit",
    "is_memory",
    "shown",
    "sqlite_file",
    "with_our_errors",
]

P = ParamSpec("P")
T = TypeVar("T")

AUTOCOMMIT_READS = frozenset({"postgresql", "mysql", "mariadb"})
"""Where a read outside a transaction saves round trips."""

AUTOCOMMIT_IS_FREE = frozenset({"postgresql"})
"""Where a connection changes to AUTOCOMMIT and back without a round trip."""

EXTRAS = {
    "psycopg": "postgresql",
    "psycopg2": "postgresql",
    "asyncpg": "postgresql",
    "pymysql": "mysql",
    "asyncmy": "mysql",
    "aiomysql": "mysql",
    "MySQLdb": "mysql",
}
"""The extra of this package that brings a driver for the same database."""

BROUGHT_INSTEAD = {"psycopg2": "postgresql+psycopg", "MySQLdb": "mysql+pymysql"}
"""What a URL names in place of a driver that SQLAlchemy defaults to and no extra brings."""

_CONNECT_ARGS = {
    "pysqlite": ("timeout",),
    "aiosqlite": ("timeout",),
    "psycopg": ("connect_timeout",),
    "psycopg_async": ("connect_timeout",),
    "psycopg2": ("connect_timeout",),
    "asyncpg": ("timeout",),
    "pymysql": ("connect_timeout", "read_timeout", "write_timeout"),
    "aiomysql": ("connect_timeout",),
    "asyncmy": ("connect_timeout",),
}

_POSTGRESQL_TRANSIENT = frozenset(
    {
        "40001",  # serialization failure
        "40P01",  # deadlock
        "53300",  # too many connections
        "55P03",  # lock not available
        "57P01",  # the server shuts down
        "57P02",  # the server crashed
        "57P03",  # the server starts up
        "23505",  # a row of the same identity was saved meanwhile
    }
)
_POSTGRESQL_NOT_NOW = (
    "too many clients already",
    "too many connections for",
    "remaining connection slots are reserved",
    "the database system is",  # starting up, or shutting down
)
"""What libpq, when it connects, tells by its text alone."""

_MYSQL_TRANSIENT = frozenset(
    {
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
_SQLITE_TRANSIENT = ("database is locked", "database table is locked", "UNIQUE constraint failed")

_SCHEMA_SQLSTATES = frozenset({"42P01", "42703", "3F000"})
_SCHEMA_MYSQL = frozenset({1054, 1146})
_SCHEMA_SQLITE = ("no such table", "no such column", "has no column named")

_QUERY_CANCELED = "57014"

_SAID_BY_TRIGGERS = frozenset({"P0001", 1644})
"""PostgreSQL's RAISE and MySQL's SIGNAL, whose texts are the application's and may hold values."""


def is_in_autocommit(connection: Connection) -> bool:
    """Whether each statement on a connection is a transaction of its own."""
    dbapi_connection = connection.connection.dbapi_connection
    return (
        connection.dialect.name != "sqlite"
        and dbapi_connection is not None
        and connection.dialect.detect_autocommit_setting(dbapi_connection)
    )


def is_memory(url: URL) -> bool:
    """Whether a URL names a SQLite database in memory, which lives as long as its connection."""
    return url.get_backend_name() == "sqlite" and (
        not url.database or ":memory:" in url.database or url.query.get("mode") == "memory"
    )


def sqlite_file(database: str) -> str | None:
    """The file that SQLite would make for a database, if there is none.

    Args:
        database: A path, ``":memory:"``, or a URI such as ``"file:tokens.db?mode=rwc"``.
    """
    if not database.startswith("file:"):
        return None if database in ("", ":memory:") else database
    parts = urlsplit(database)
    mode = parse_qs(parts.query).get("mode", ["rwc"])[0]
    return unquote(parts.path) if mode == "rwc" and parts.path != ":memory:" else None


def connect_args(url: URL, driver: str, timeout: float) -> dict[str, object]:
    """The driver's arguments that keep a connection from waiting longer than a store may.

    Args:
        url: The database; what its query says already is left alone.
        driver: SQLAlchemy's name of the driver.
        timeout: The store's timeout in seconds.
    """
    whole_seconds = driver not in ("pysqlite", "aiosqlite", "asyncpg")
    value = max(1, round(timeout)) if whole_seconds else timeout
    return {name: value for name in _CONNECT_ARGS.get(driver, ()) if name not in url.query}


def is_database_error(error: Exception) -> bool:
    """Whether SQLAlchemy or a driver raised an error.

    On a broken connection some drivers raise errors that SQLAlchemy does not wrap.
    """
    package = type(error).__module__.partition(".")[0]
    return isinstance(error, (exc.SQLAlchemyError, ConnectionError)) or package in EXTRAS


def failure_of(error: Exception) -> DatabaseError:
    """What a failed statement means to whoever ran it.

    The driver's text is cut down to what cannot hold a value of the row, and the original error
    is not chained, because its text may (PostgreSQL's ``DETAIL`` shows whole rows; rule G3).

    Args:
        error: What SQLAlchemy or the driver raised (`is_database_error`).
    """
    if not isinstance(error, exc.SQLAlchemyError):
        reason = _without_values(str(error))
        return DatabaseError(
            f"The driver reported {type(error).__name__}: {reason}", retryable=True
        )
    if isinstance(error, exc.TimeoutError):
        return DatabaseTimeoutError(
            "No connection became free in the engine's pool in time. "
            "Raise pool_size or max_overflow, or use fewer threads."
        )
    if not isinstance(error, exc.DBAPIError):
        return DatabaseError(f"{type(error).__name__}: {_without_values(str(error))}")
    code, text = _code_of(error), str(error.orig)
    reported = f"The database reported {_driver_error_name(error)}"
    if code in _SCHEMA_SQLSTATES or code in _SCHEMA_MYSQL or _says(text, _SCHEMA_SQLITE):
        reported = f"{reported}: {_first_line(text)}"  # It quotes names, and no values.
        return SchemaError(reported, reported=reported)
    message = reported if code in _SAID_BY_TRIGGERS else f"{reported}: {_without_values(text)}"
    if code == _QUERY_CANCELED:
        return DatabaseTimeoutError(message)
    retryable = (
        error.connection_invalidated
        or code in _POSTGRESQL_TRANSIENT
        or code in _MYSQL_TRANSIENT
        or _says(text, _SQLITE_TRANSIENT)
    )
    return DatabaseError(message, retryable=retryable)


def with_our_errors(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function raise our errors in place of a database's, with no secret behind them (G3).

    SQLAlchemy's show the parameters of a statement, on an engine of the application's.
    """

    @without_frames
    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if not is_database_error(error):
                raise
            failure = failure_of(error)
        raise failure

    return call


def connect_failure_of(error: Exception, url: URL) -> DatabaseError:
    """What a failed attempt to get a connection means to whoever made it.

    Args:
        error: What the driver, or SQLAlchemy around it, raised.
        url: The database, which is named with its password hidden (rule G2).
    """
    if isinstance(error, exc.SQLAlchemyError) and not isinstance(error, exc.DBAPIError):
        return failure_of(error)
    cause = error.orig if isinstance(error, exc.DBAPIError) and error.orig else error
    reason = _hide(_first_line(str(cause)) or type(cause).__name__, url.password)
    code = _code_of(error) if isinstance(error, exc.DBAPIError) else None
    return DatabaseUnreachableError(
        f"Cannot connect to {shown(url)} ({reason}). {_how_to_connect(url)}",
        retryable=code in _POSTGRESQL_TRANSIENT
        or code in _MYSQL_TRANSIENT
        or _says(str(cause), _POSTGRESQL_NOT_NOW),
    )


def shown(url: URL) -> str:
    """A URL as it may be shown: without its password, and without a query that may hold one."""
    return url.set(query={}).render_as_string(hide_password=True)


def _how_to_connect(url: URL) -> str:
    if url.get_backend_name() == "sqlite":
        return "Check that the folder exists and that the file is readable and writable."
    return "Check that the server runs and that host, port, database, user and password are right."


def _code_of(error: exc.DBAPIError) -> str | int | None:
    """MySQL's error number, PostgreSQL's SQLSTATE, or nothing."""
    original = error.orig
    first = original.args[0] if original is not None and original.args else None
    if isinstance(first, int):
        return first  # MySQL's drivers have a coarser SQLSTATE besides.
    sqlstate = getattr(original, "sqlstate", None) or getattr(original, "pgcode", None)
    return str(sqlstate) if sqlstate else None


def _driver_error_name(error: exc.DBAPIError) -> str:
    name, code = type(error.orig).__name__, _code_of(error)
    return name if code is None else f"{name} {code}"


def _says(text: str, phrases: tuple[str, ...]) -> bool:
    return any(phrase in text for phrase in phrases)


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0]


def _without_values(text: str) -> str:
    """The first line of a driver's message, from the first quotation mark to the last left out.

    An apostrophe within a word ("doesn't") quotes nothing.
    """
    line = re.sub(r"(?<!\w)'.*'|(?<!\w)'.*", "'…'", _first_line(text))
    return re.sub(r': ".*', ': "…"', line)


def _hide(text: str, password: object) -> str:
    """Leave a password out of a text, where it stands as a word of its own."""
    return re.sub(rf"(?<!\w){re.escape(str(password))}(?!\w)", "***", text) if password else text
