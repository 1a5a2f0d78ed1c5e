"""Everything in which the SQL of SQLite, PostgreSQL, MariaDB and MySQL differs.

Functions here act on a connection. Those that need no action on a dialect do nothing there.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    BINARY,
    and_,
    cast,
    delete,
    exc,
    false,
    func,
    literal_column,
    select,
    text,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from zoho_orm_store.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sqlalchemy import ColumnElement, Connection, Insert, Result, Select, Table
    from sqlalchemy.sql.compiler import SQLCompiler

__all__ = [
    "MYSQL_FAMILY",
    "check_dialect",
    "commit_schema_change",
    "empty_write_ahead_log",
    "equals_exactly",
    "has_row_locks",
    "insert_unless_present",
    "is_in_autocommit",
    "leave_autocommit",
    "limit_lock_wait",
    "lock_rows",
    "overwriting_deleted_values",
    "prepare_to_write",
    "schema_locked",
    "server_clock",
    "server_time",
    "take_write_lock",
]

MYSQL_FAMILY = ("mysql", "mariadb")
_SUPPORTED = ("sqlite", "postgresql", *MYSQL_FAMILY)
_SCHEMA_LOCK = 0x5A6F686F
_MYSQL_SCHEMA_LOCK = f"zoho_orm_store_{_SCHEMA_LOCK}"
_LOCK_WAIT = "zoho_orm_store_lock_wait"


def check_dialect(name: str) -> None:
    """Refuse a database that this package does not support.

    Raises:
        ConfigurationError: The message names the supported ones.
    """
    if name not in _SUPPORTED:
        raise ConfigurationError(
            f"The database {name!r} is not supported. Use SQLite, PostgreSQL, MariaDB or MySQL."
        )


# -- Values ---------------------------------------------------------------------------------------


class equals_exactly(FunctionElement[bool]):  # noqa: N801 - it is used like a function
    """That a text column equals a value, byte for byte.

    On MySQL and MariaDB, a column whose collation ignores case or trailing blanks, such as one
    that a project's own migration made, also matches other values.
    """

    # It has no type: SQLite and MySQL have no booleans, so SQLAlchemy would compare a Boolean
    # function with 1, and the database would read every row instead of using the index.
    inherit_cache = True


@compiles(equals_exactly)
def _compile_equality(element: equals_exactly, compiler: SQLCompiler, **options: Any) -> str:  # noqa: ANN401
    column, value = element.clauses
    return f"({compiler.process(column == value, **options)})"


@compiles(equals_exactly, *MYSQL_FAMILY)
def _compile_equality_on_mysql(
    element: equals_exactly,
    compiler: SQLCompiler,
    **options: Any,  # noqa: ANN401
) -> str:
    column, value = element.clauses
    exact = and_(column == value, cast(column, BINARY) == cast(value, BINARY))
    return f"({compiler.process(exact, **options)})"


# -- Writing --------------------------------------------------------------------------------------


def insert_unless_present(
    connection: Connection,
    table: Table,
    parameters: Mapping[str, Any],
    values: Mapping[str, ColumnElement[Any]] | None = None,
) -> None:
    """Insert a row, or do nothing if its primary key or a unique value exists.

    It waits for a concurrent transaction that inserts the same.

    Args:
        connection: The connection.
        table: The table.
        parameters: The row's values by column, or the parameters of ``values``.
        values: Expressions for the row's values.
    """
    statement = _insert_statement(table, connection.dialect.name)
    connection.execute(statement if values is None else statement.values(values), parameters)


@cache
def _insert_statement(table: Table, dialect: str) -> Insert:
    if dialect == "postgresql":
        return postgresql.insert(table).on_conflict_do_nothing()
    if dialect == "sqlite":
        return sqlite.insert(table).on_conflict_do_nothing()
    # Not IGNORE, which would also turn errors into truncated values.
    key = next(iter(table.primary_key))
    return mysql.insert(table).on_duplicate_key_update({key.name: key})


def has_row_locks(connection: Connection) -> bool:
    """Whether ``SELECT ... FOR UPDATE`` locks rows. SQLite locks the whole file."""
    return connection.dialect.name != "sqlite"


def take_write_lock(connection: Connection, table: Table) -> None:
    """Take SQLite's write lock before anything is read.

    A transaction that reads first and writes later fails at once, however long the busy timeout,
    if another one has written in between. Deleting nothing takes the lock in every transaction
    mode of the driver.
    """
    if connection.dialect.name == "sqlite":
        connection.execute(delete(table).where(false()))


def prepare_to_write(connection: Connection, longest_wait: float | None) -> None:
    """Make a new transaction ready to write.

    On SQLite it takes the write lock, so that schema changes are part of the transaction too.

    Args:
        connection: A connection in the new transaction.
        longest_wait: How long `limit_lock_wait` lets statements wait, in seconds.
    """
    if connection.dialect.name == "sqlite":
        if not getattr(connection.connection.driver_connection, "in_transaction", False):
            connection.execute(text("BEGIN IMMEDIATE"))
    elif longest_wait is not None and connection.dialect.name == "postgresql":
        milliseconds = f"{max(1, round(longest_wait * 1000))}ms"
        connection.execution_options(**{_LOCK_WAIT: milliseconds})


def limit_lock_wait(connection: Connection) -> None:
    """On PostgreSQL, limit the wait for other transactions' locks until the transaction ends."""
    limit = connection.get_execution_options().get(_LOCK_WAIT)
    if limit is not None:
        connection.execute(select(func.set_config("lock_timeout", limit, True)))


def lock_rows(
    connection: Connection, statement: Select[Any], parameters: Mapping[str, Any]
) -> Result[Any]:
    """Run a ``SELECT ... FOR UPDATE``, with `limit_lock_wait` in the same round trip."""
    limit = connection.get_execution_options().get(_LOCK_WAIT)
    if limit is not None:
        # PostgreSQL evaluates this for each row that it finds, before it locks the row.
        statement = statement.where(func.set_config("lock_timeout", limit, True).is_not(None))
    return connection.execute(statement, parameters)


def is_in_autocommit(connection: Connection) -> bool:
    """Whether each statement on a connection is a transaction of its own."""
    dbapi_connection = connection.connection.dbapi_connection
    return (
        connection.dialect.name != "sqlite"
        and dbapi_connection is not None
        and connection.dialect.detect_autocommit_setting(dbapi_connection)
    )


def leave_autocommit(connection: Connection) -> None:
    """Make transactions possible on a connection of an engine that is set to AUTOCOMMIT."""
    if is_in_autocommit(connection):
        connection.execution_options(isolation_level=connection.default_isolation_level)


# -- The schema -----------------------------------------------------------------------------------


@contextmanager
def schema_locked(connection: Connection) -> Iterator[None]:
    """Wait until no other process changes the schema, and keep others waiting.

    PostgreSQL's lock ends with the transaction; a SQLite transaction has locked the file.
    """
    is_mysql = connection.dialect.name in MYSQL_FAMILY
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(_SCHEMA_LOCK)))
    elif is_mysql:
        connection.execute(select(func.get_lock(_MYSQL_SCHEMA_LOCK, 600)))
    try:
        yield
    finally:
        if is_mysql:
            connection.execute(select(func.release_lock(_MYSQL_SCHEMA_LOCK)))


def commit_schema_change(connection: Connection) -> None:
    """On MySQL, commit the revision, as the schema change before it has committed itself.

    Otherwise a process that waits in `schema_locked` would read the revision before.
    """
    if connection.dialect.name in MYSQL_FAMILY:
        connection.execute(text("COMMIT"))


# -- Old values in a SQLite file ------------------------------------------------------------------


@contextmanager
def overwriting_deleted_values(connection: Connection) -> Iterator[None]:
    """Leave no old value in the free space of a SQLite file."""
    if connection.dialect.name != "sqlite":
        yield
        return
    before = connection.scalar(text("PRAGMA secure_delete"))
    connection.execute(text("PRAGMA secure_delete = ON"))
    try:
        yield
    finally:
        connection.execute(text(f"PRAGMA secure_delete = {('OFF', 'ON', 'FAST')[before or 0]}"))


def empty_write_ahead_log(connection: Connection) -> None:
    """Write SQLite's write-ahead log into the file, and empty it.

    A reader prevents that; then the log is emptied when the last connection is closed.
    """
    if connection.dialect.name == "sqlite":
        with suppress(exc.DBAPIError):
            connection.execute(text("PRAGMA wal_checkpoint(TRUNCATE)"))


# -- Clocks and leases ----------------------------------------------------------------------------


def server_time(connection: Connection) -> float | None:
    """The server's time in epoch seconds; ``None`` on SQLite, which has no server."""
    clock = server_clock(connection.dialect.name)
    return None if clock is None else float(connection.execute(select(clock)).scalar_one())


def server_clock(dialect: str) -> ColumnElement[Any] | None:
    """The server's time in epoch seconds, as an expression; ``None`` on SQLite."""
    if dialect == "postgresql":
        return func.date_part("epoch", func.clock_timestamp())
    if dialect in MYSQL_FAMILY:
        # Not NOW(): where summer time ends, the server's zone has an hour twice.
        epoch: ColumnElement[Any] = literal_column("'1970-01-01 00:00:00'")
        return func.timestampdiff(text("MICROSECOND"), epoch, func.utc_timestamp(6)) / 1_000_000
    return None
