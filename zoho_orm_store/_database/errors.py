"""Turning what a database, a driver, SQLAlchemy or Alembic raised into this package's errors.

A driver's text is cut down to what cannot hold a value of a row. The original error is never
chained, because its text may: PostgreSQL's ``DETAIL`` shows whole rows.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sqlalchemy import exc

from zoho_orm_store._database.drivers import redacted_url
from zoho_orm_store._database.origin import (
    DATABASE_SIDE,
    interruption_in,
    is_driver_error,
    is_raised_elsewhere,
)
from zoho_orm_store._schema import missing_privilege, missing_tables
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

__all__ = ["connect_error", "leaves_connection_unusable", "our_errors", "translate"]

_CONNECTION_LOST = frozenset({2006, 2013, 2055, -1})
"""MySQL's codes. The last one is mysql-connector's, which SQLAlchemy does not always recognize."""

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
        *_CONNECTION_LOST,
    }
)
_RETRYABLE_IN_SQLITE = (
    "database is locked",
    "database table is locked",
    "UNIQUE constraint failed",
)

_READ_ONLY = frozenset({"25006", 1290, 1792, 1836})
"""A connection to a read-only server fails for ever, also when another one has taken over."""

_PREVENTED_BY_AN_OPTION = 1290
"""Stands for several options of a MySQL server. The text names ``--read-only``."""

_SAID_BY_POOLERS = (
    "no more connections allowed",
    "query_wait_timeout",
    "cannot connect to server",
    "server login has been failing",
    "server_login_retry",
)
"""PgBouncer says it with SQLSTATE 08P01, which also stands for other things."""

_RETRYABLE_AT_CONNECT = (
    "too many clients already",
    "too many connections for",
    "remaining connection slots are reserved",
    "the database system is",  # starting up, or shutting down
    *_SAID_BY_POOLERS,
)
"""What libpq says in its text alone when it connects."""

_REFUSED = (
    "Connection refused",
    "Connection reset by peer",
    "server closed the connection unexpectedly",
    "connection was closed in the middle of operation",
    "Lost connection to MySQL server",
    "Connect call failed",
)
"""What drivers say when they connect to a server that restarts, apart from `ConnectionError`."""

_CANNOT_CONNECT = frozenset({2002, 2003})
"""What MySQL's drivers say then; mysqlclient says 2002."""

_MIXED_UP = frozenset({"26000", "42P05", "08P01"})
"""A prepared statement is missing, or is another client's, behind a pooler."""

_SCHEMA = frozenset({"42P01", "42703", "3F000", 1054, 1146})
_SCHEMA_IN_SQLITE = ("no such table", "no such column", "has no column named")
_PRIVILEGE = frozenset({"42501", 1142, 1143, 1044})
_QUERY_CANCELED = "57014"
_RAISED_BY_TRIGGERS = frozenset({"P0001", 1644})
"""PostgreSQL's RAISE and MySQL's SIGNAL, whose texts are the application's and may hold values."""


def translate(error: BaseException, url: URL | None = None) -> BaseException | None:
    """The exception to raise for one that came out of work on a database.

    Args:
        error: Any exception. One of this package's is returned as it is.
        url: The database, for the advice in the message.

    Returns:
        This package's error. ``None`` if the application raised the exception, which is to be
        raised unchanged; or the application's exception, if a driver turned it into this one.
    """
    if isinstance(error, ZohoOrmStoreError):
        return error
    if interruption := interruption_in(error):
        return interruption
    if isinstance(error, exc.DBAPIError):
        return _translate_dbapi(error, url)
    if isinstance(error, exc.TimeoutError):
        return DatabaseTimeoutError(
            "No connection became free in the engine's pool in time. "
            "Raise pool_size or max_overflow, or use fewer threads."
        )
    if isinstance(error, exc.StatementError) and error.orig is not None:
        return translate(error.orig, url) or error.orig
    if isinstance(error, exc.SQLAlchemyError):
        return DatabaseError(f"{type(error).__name__}: {_without_values(str(error))}")
    if is_driver_error(error):
        reason = _without_values(_text_of(error))
        return DatabaseError(
            f"The driver reported {type(error).__name__}: {reason}", retryable=True
        )
    if not isinstance(error, Exception) or is_raised_elsewhere(error):
        return None
    return _translate_any(error)


our_errors = boundary(translate, DATABASE_SIDE)
"""The boundary of a public function that works on a database."""


def leaves_connection_unusable(error: BaseException) -> bool:
    """Whether the connection on which an exception was raised must not be used again.

    Its state is unknown after an exception that no database reported: the driver may have been
    interrupted while it was reading an answer. One to a read-only server is of no use.
    """
    if isinstance(error, exc.DBAPIError):
        return _code_of(error.orig) in _READ_ONLY | _CONNECTION_LOST
    return not isinstance(error, (ZohoOrmStoreError, exc.SQLAlchemyError))


def connect_error(error: Exception, url: URL, *, wait_for_server: bool = False) -> BaseException:
    """The exception to raise for a failed attempt to connect.

    Args:
        error: Whatever the driver, or SQLAlchemy around it, raised.
        url: The database, which the message names without its password.
        wait_for_server: Whether to connect again if nothing listens at present.
    """
    is_wrapped = isinstance(error, exc.DBAPIError)
    if isinstance(error, exc.SQLAlchemyError | ZohoOrmStoreError) and not is_wrapped:
        return translate(error, url) or error
    if interruption := interruption_in(error):
        return interruption
    if is_raised_elsewhere(error):
        return error
    cause = error.orig if isinstance(error, exc.DBAPIError) and error.orig else error
    code, text = _code_of(cause), _text_of(cause)
    reason = _hide(_first_line(text) or type(cause).__name__, url.password)
    advice = "Check that the server runs and that host, port, database, user and password are right"
    if url.get_backend_name() == "sqlite":
        advice = "Check that the folder exists and that the file is readable and writable"
    is_refused = (
        isinstance(cause, ConnectionError) or code in _CANNOT_CONNECT or _says(text, _REFUSED)
    )
    return DatabaseUnreachableError(
        f"Cannot connect to {redacted_url(url)} ({reason}). {advice}.",
        retryable=code in _RETRYABLE
        or code in _MIXED_UP
        or _says(text, _RETRYABLE_AT_CONNECT)
        or (wait_for_server and is_refused),
    )


def _translate_dbapi(error: exc.DBAPIError, url: URL | None) -> DatabaseError:
    code, text = _code_of(error.orig), _text_of(error.orig)
    name = type(error.orig).__name__
    reported = f"The database reported {name if code is None else f'{name} {code}'}"
    if code in _SCHEMA or _says(text, _SCHEMA_IN_SQLITE):
        reported = f"{reported}: {_first_line(text)}"  # It quotes names, and no values.
        return SchemaError(missing_tables(_shown(url), reported) if url else reported)
    if code in _PRIVILEGE:
        reported = f"{reported}: {_first_line(text)}"  # As above.
        return DatabaseError(missing_privilege(_shown(url), reported))
    if code not in _RAISED_BY_TRIGGERS:
        reported = f"{reported}: {_without_values(text)}"
    if code == _QUERY_CANCELED:
        return DatabaseTimeoutError(reported)
    is_the_poolers = _says(text, _SAID_BY_POOLERS)
    if code in _MIXED_UP and not is_the_poolers:
        reported = (
            f"{reported}. If a pooler such as PgBouncer stands between the store and the server, "
            "pass pooler=True. An engine of your own must be set up for the pooler."
        )
    return DatabaseError(
        reported,
        retryable=error.connection_invalidated
        or code in _RETRYABLE
        or (code in _READ_ONLY and (code != _PREVENTED_BY_AN_OPTION or "read-only" in text))
        or is_the_poolers
        or _says(text, _RETRYABLE_IN_SQLITE),
    )


def _translate_any(error: Exception) -> DatabaseError:
    """The error for an exception of any other class, whose text may hold whole statements."""
    if isinstance(error, UnicodeError):
        return DatabaseError(
            "The connection's character set cannot hold a value. Connect with UTF-8; on MySQL and "
            "MariaDB with '?charset=utf8mb4' at the end of the URL."
        )
    return DatabaseError(
        f"{type(error).__name__} was raised while the database was used.",
        retryable=isinstance(error, OSError | EOFError),
    )


def _shown(url: URL | None) -> str:
    return "the database" if url is None else redacted_url(url)


def _code_of(error: BaseException | None) -> str | int | None:
    """MySQL's error number, PostgreSQL's SQLSTATE, or ``None``."""
    first = error.args[0] if error is not None and error.args else None
    if isinstance(first, int):
        return first  # MySQL's drivers also have a coarser SQLSTATE.
    sqlstate = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    return str(sqlstate) if sqlstate else None


def _text_of(error: BaseException | None) -> str:
    """A driver's message: MySQL's drivers have it behind the error number."""
    args = error.args if error is not None else ()
    is_numbered = len(args) > 1 and isinstance(args[0], int) and isinstance(args[1], str)
    return args[1] if is_numbered else str(error)


def _says(text: str, phrases: tuple[str, ...]) -> bool:
    return any(phrase in text for phrase in phrases)


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0]


_NAME = re.compile(
    r"(?:\b(?:column|key|table|database|schema|user|role|index|constraint|engine|option) |@)"
    r"('[\w.$%-]+')(?!\w)",
    re.IGNORECASE,
)
"""A name in quotation marks. What stands before a value is another word."""


def _without_values(text: str) -> str:
    """The first line of a driver's message, without what stands between quotation marks.

    Names of columns, tables and keys stay if they stand before the first value: a value may
    contain quotation marks. An apostrophe within a word ("doesn't") quotes nothing.
    """
    line = _first_line(text)
    names = {found.start(1): found.end(1) for found in _NAME.finditer(line)}
    kept = 0
    while quote := re.compile(r"(?<!\w)'").search(line, kept):
        if quote.start() not in names:
            closed = line.rpartition("'")
            rest = closed[2] if len(closed[0]) > quote.start() else ""
            line = f"{line[: quote.start()]}'…'{rest}"
            break
        kept = names[quote.start()]
    return re.sub(r': ".*', ': "…"', line)


def _hide(text: str, password: object) -> str:
    """Remove a password from a text where it stands as a word of its own."""
    return re.sub(rf"(?<!\w){re.escape(str(password))}(?!\w)", "***", text) if password else text
