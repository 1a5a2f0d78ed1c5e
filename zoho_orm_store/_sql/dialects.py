"""Everything in which the SQL of SQLite, PostgreSQL, MariaDB and MySQL differs.

Functions here act on a connection. Those that need no action on a dialect do nothing there.
"""

from __future__ import annotations

import re
from contextlib import contextmanager, suppress
from functools import cache
from itertools import count
from time import monotonic
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    BINARY,
    LargeBinary,
    Text,
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
from sqlalchemy import table as table_clause
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from zoho_orm_store.errors import ConfigurationError, DatabaseTimeoutError, SchemaError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from sqlalchemy import ColumnElement, Connection, Insert, Result, Select, Table
    from sqlalchemy.sql.compiler import SQLCompiler

__all__ = [
    "MYSQL_FAMILY",
    "check_dialect",
    "check_text_is_kept",
    "commit_schema_change",
    "convert_old_storage",
    "creation_schema",
    "dependent_objects",
    "equals_exactly",
    "equals_in_any_collation",
    "erase_deleted_values",
    "has_row_locks",
    "insert_unless_present",
    "is_in_autocommit",
    "leave_autocommit",
    "limit_lock_wait",
    "lock_rows",
    "lock_rows_by_index",
    "lockable_by",
    "overwriting_deleted_values",
    "prepare_to_write",
    "schema_locked",
    "schema_of_visible",
    "server_clock",
    "server_time",
    "set_busy_timeout",
    "take_write_lock",
    "views_ignored",
]

MYSQL_FAMILY = ("mysql", "mariadb")
_SUPPORTED = ("sqlite", "postgresql", *MYSQL_FAMILY)
_SCHEMA_LOCK = 0x5A6F686F
_MYSQL_SCHEMA_LOCK = f"zoho_orm_store_{_SCHEMA_LOCK}"
_LOCK_WAIT = "zoho_orm_store_lock_wait"

_LONGEST_WAIT = 30.0
_POLL = 0.005
"""Seconds of one attempt to take SQLite's write lock, in which SQLite asks for it four times."""
_NO_SUCH_INDEX = 1176


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


class equals_in_any_collation(FunctionElement[bool]):  # noqa: N801 - it is used like a function
    """That a column of any text type equals a value, byte for byte, whatever its collation.

    A project's own column may ignore case: ``NOCASE`` on SQLite, ``citext`` on PostgreSQL.
    """

    inherit_cache = True


@compiles(equals_in_any_collation)
def _compile_equality_in_any_collation(
    element: equals_in_any_collation,
    compiler: SQLCompiler,
    **options: Any,  # noqa: ANN401
) -> str:
    column, value = element.clauses
    if compiler.dialect.name == "postgresql":
        exact = cast(column, Text).collate("C") == cast(value, Text).collate("C")
    else:
        exact = cast(column, LargeBinary) == cast(value, LargeBinary)
    return f"({compiler.process(and_(column == value, exact), **options)})"


@compiles(equals_exactly, *MYSQL_FAMILY)
@compiles(equals_in_any_collation, *MYSQL_FAMILY)
def _compile_equality_on_mysql(
    element: equals_exactly | equals_in_any_collation,
    compiler: SQLCompiler,
    **options: Any,  # noqa: ANN401
) -> str:
    column, value = element.clauses
    exact = and_(column == value, cast(column, BINARY) == cast(value, BINARY))
    return f"({compiler.process(exact, **options)})"


def check_text_is_kept(connection: Connection, table: Table) -> None:
    """Refuse a MySQL session that stores ``????`` for what a character set cannot hold.

    In strict mode the server itself refuses such a value.

    Raises:
        ConfigurationError: The message says what to change.
    """
    if connection.dialect.name not in MYSQL_FAMILY:
        return
    mode, client = connection.execute(
        text("SELECT @@SESSION.sql_mode, @@SESSION.character_set_client")
    ).one()
    if "STRICT_" in mode:
        return
    columns = connection.execute(
        text(
            "SELECT column_name FROM information_schema.columns WHERE table_name = :name "
            "AND table_schema = COALESCE(:schema, DATABASE()) "
            "AND character_set_name NOT IN ('utf8mb4', 'ascii')"
        ),
        {"name": table.name, "schema": table.schema},
    )
    narrow = [f"the column {table.name}.{name}" for (name,) in columns]
    if client != "utf8mb4":
        narrow.append("the connection")
    if narrow:
        raise ConfigurationError(
            f"The SQL mode is not strict, so the server would store '????' for what the character "
            f"set of {', '.join(narrow)} cannot hold. Use utf8mb4, or set the SQL mode "
            "STRICT_ALL_TABLES."
        )


# -- Writing --------------------------------------------------------------------------------------


def insert_unless_present(
    connection: Connection,
    table: Table,
    parameters: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    values: Mapping[str, ColumnElement[Any]] | None = None,
) -> None:
    """Insert a row or several, or do nothing if a primary key or a unique value exists.

    It waits for a concurrent transaction that inserts the same.

    Args:
        connection: The connection.
        table: The table.
        parameters: The row's values by column, or the parameters of ``values``; of each row, if
            there are several.
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


def prepare_to_write(
    connection: Connection, longest_wait: float | None, *, polls: bool = False
) -> None:
    """Make a new transaction ready to write.

    On SQLite it takes the write lock, so that schema changes are part of the transaction too.

    Args:
        connection: A connection in the new transaction.
        longest_wait: How long statements wait for locks, in seconds. On PostgreSQL it takes effect
            with `limit_lock_wait`.
        polls: Whether to ask for SQLite's write lock again and again. This sets the busy timeout
            of the connection.
    """
    if connection.dialect.name == "sqlite":
        if getattr(connection.connection.driver_connection, "in_transaction", False):
            return
        if polls:
            _poll_for_write_lock(connection, longest_wait or _LONGEST_WAIT)
        else:
            connection.execute(text("BEGIN IMMEDIATE"))
    elif longest_wait is not None and connection.dialect.name == "postgresql":
        milliseconds = f"{max(1, round(longest_wait * 1000))}ms"
        connection.execution_options(**{_LOCK_WAIT: milliseconds})


def _poll_for_write_lock(connection: Connection, longest_wait: float) -> None:
    """Take SQLite's write lock, at the first of many short attempts that succeeds.

    SQLite itself pauses for up to 100 milliseconds between two attempts. Among several busy
    processes, one that pauses would wait until its timeout, while the others take turns.
    """
    started, waited = monotonic(), 0.0
    set_busy_timeout(connection, _POLL)
    for attempt in count(1):
        try:
            connection.execute(text("BEGIN IMMEDIATE"))
            break
        except exc.OperationalError as error:
            # A test may have stopped the clock.
            waited = max(monotonic() - started, attempt * _POLL)
            if waited >= longest_wait or "locked" not in str(error.orig):
                raise
    set_busy_timeout(connection, longest_wait - waited)


def set_busy_timeout(connection: Connection, seconds: float) -> None:
    """Set how long statements on SQLite wait for other connections' locks."""
    milliseconds = max(1, round(seconds * 1000))
    connection.exec_driver_sql(f"PRAGMA busy_timeout = {milliseconds}")


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


def lock_rows_by_index(
    connection: Connection,
    statement: Select[Any],
    parameters: Mapping[str, Any],
    table: Table,
    column: str,
) -> Result[Any]:
    """Run a ``SELECT ... FOR UPDATE`` through the index on a column.

    Without being told, MySQL and MariaDB read, and therefore lock, every row of a small table.
    """
    if connection.dialect.name in MYSQL_FAMILY:
        hint = _index_hint(table, column)
        hinted = statement.with_hint(table, hint, "mysql").with_hint(table, hint, "mariadb")
        try:
            return connection.execute(hinted, parameters)
        except exc.DBAPIError as error:
            # A project's own migration may have named the index otherwise than its model does.
            if error.orig is None or error.orig.args[:1] != (_NO_SUCH_INDEX,):
                raise
    return connection.execute(statement, parameters)


def lockable_by(values: Sequence[str], connection: Connection) -> Iterator[Sequence[str]]:
    """Yield values in portions by which one statement locks only the rows that have them.

    By more than one value, MySQL and MariaDB may read, and therefore lock, every row of a table.
    """
    if connection.dialect.name in MYSQL_FAMILY:
        yield from ([value] for value in values)
    elif values:
        yield values


def _index_hint(table: Table, column: str) -> str:
    names = [index.name for index in table.indexes if index.columns.keys() == [column]]
    return f"FORCE INDEX (`{names[0]}`)" if names else ""


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

    Raises:
        DatabaseTimeoutError: Another process has been changing the schema for ten minutes.
    """
    is_mysql = connection.dialect.name in MYSQL_FAMILY
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(_SCHEMA_LOCK)))
    elif is_mysql and not connection.scalar(select(func.get_lock(_MYSQL_SCHEMA_LOCK, 600))):
        raise DatabaseTimeoutError("Another process has been changing the tables for ten minutes.")
    try:
        yield
    except BaseException:
        if is_mysql:
            with suppress(Exception):  # A lost connection has released the lock.
                connection.execute(select(func.release_lock(_MYSQL_SCHEMA_LOCK)))
        raise
    if is_mysql:
        connection.execute(select(func.release_lock(_MYSQL_SCHEMA_LOCK)))


def commit_schema_change(connection: Connection) -> None:
    """On MySQL, commit the revision, as the schema change before it has committed itself.

    Otherwise a process that waits in `schema_locked` would read the revision before.
    """
    if connection.dialect.name in MYSQL_FAMILY:
        connection.execute(text("COMMIT"))


def creation_schema(connection: Connection) -> str | None:
    """The schema in which PostgreSQL makes a table that is named without one.

    PostgreSQL looks for tables in every schema of the search path, and so finds another tenant's.

    Returns:
        The schema; ``None`` on a database that does not search in several.

    Raises:
        SchemaError: The first schema of the search path does not exist. PostgreSQL would use the
            next one, which may be another tenant's.
    """
    if connection.dialect.name != "postgresql":
        return None
    row = connection.execute(_SEARCH_PATH).one()
    listed = [
        quoted.replace('""', '"') or plain.lower() for quoted, plain in _NAMES.findall(row.path)
    ]
    expected = [name for name in listed if name != "$user"][:1]
    schema: str | None = row.current
    if [schema] == expected or ("$user" in listed[:1] and schema == row.user):
        return schema
    missing = repr(expected[0]) if expected else "its first schema"
    raise SchemaError(
        f"The search_path of this connection is {row.path!r}, but {missing} does not exist, or "
        "this database user has no right to use it. Create it with CREATE SCHEMA, or allow its "
        "use with GRANT USAGE ON SCHEMA."
    )


_SEARCH_PATH = text(
    "SELECT current_schema() AS current, current_setting('search_path') AS path, "
    "current_user AS user"
)
_NAMES = re.compile(r'"((?:[^"]|"")*)"|([^\s,"]+)')


def schema_of_visible(connection: Connection, table: str) -> str | None:
    """The schema of the table that PostgreSQL's search path finds for a name."""
    if connection.dialect.name != "postgresql":
        return None
    found: str | None = connection.scalar(_VISIBLE, {"table": table})
    return found


_VISIBLE = text(
    "SELECT nspname FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace "
    "WHERE pg_class.oid = to_regclass(:table)"
)


def dependent_objects(
    connection: Connection, table: str, schema: str | None, columns: Iterable[str]
) -> list[str]:
    """The views, policies and triggers that keep PostgreSQL from changing columns' types.

    Returns:
        Descriptions such as ``"view reports.tokens"``. Empty on other databases, which change the
        columns nevertheless.
    """
    if connection.dialect.name != "postgresql":
        return []
    parameters = {"table": table, "schema": schema, "columns": list(columns)}
    found = connection.scalars(_DEPENDENTS, parameters)
    return [description.removeprefix("rule _RETURN on ") for description in found]


_DEPENDENTS = text(
    "SELECT DISTINCT pg_describe_object(d.classid, d.objid, 0) AS description FROM pg_depend d "
    "JOIN pg_class c ON c.oid = d.refobjid JOIN pg_namespace n ON n.oid = c.relnamespace "
    "JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = d.refobjsubid "
    "WHERE d.refclassid = 'pg_class'::regclass AND d.classid IN ('pg_rewrite'::regclass, "
    "'pg_policy'::regclass, 'pg_trigger'::regclass) AND c.relname = :table "
    "AND n.nspname = :schema AND a.attname = ANY(:columns) ORDER BY description"
)


@contextmanager
def views_ignored(connection: Connection) -> Iterator[None]:
    """Let SQLite replace a table on which views depend.

    To change a column, Alembic drops the table and renames its copy, which SQLite otherwise
    refuses while a view names the table.
    """
    if connection.dialect.name != "sqlite":
        yield
        return
    before = connection.scalar(text("PRAGMA legacy_alter_table"))
    connection.execute(text("PRAGMA legacy_alter_table = ON"))
    try:
        yield
    finally:
        connection.execute(text(f"PRAGMA legacy_alter_table = {before or 0:d}"))


def convert_old_storage(connection: Connection, table: str, schema: str | None) -> None:
    """On MySQL and MariaDB, give a table InnoDB and a row format that allows our indexes.

    MyISAM has no transactions. It and the row formats of old InnoDB tables limit an index to 1000
    or 767 bytes, and an id may have 1020.
    """
    if connection.dialect.name not in MYSQL_FAMILY:
        return
    storage = connection.execute(_STORAGE, {"table": table, "schema": schema}).one()
    engine, row_format = storage.engine.lower(), (storage.row_format or "").lower()
    if engine != "innodb" or row_format not in ("dynamic", "compressed"):
        name = connection.dialect.identifier_preparer.format_table(
            table_clause(table, schema=schema)
        )
        connection.execute(text(f"ALTER TABLE {name} ENGINE=InnoDB, ROW_FORMAT=DYNAMIC"))


_STORAGE = text(
    "SELECT engine AS engine, row_format AS row_format FROM information_schema.tables "
    "WHERE table_schema = coalesce(:schema, database()) AND table_name = :table"
)


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


_PATIENCE_TO_ERASE = 1000
"""Milliseconds to wait for the readers of a SQLite file that is to be rewritten."""


def erase_deleted_values(connection: Connection) -> None:
    """Rewrite a SQLite file without its free space, and empty its logs.

    Whether SQLite overwrites what it deletes depends on how it was compiled. A reader keeps the
    write-ahead log from being emptied; that then happens when the last connection is closed.
    """
    if connection.dialect.name != "sqlite":
        return
    # Not through SQLAlchemy, whose transaction would not allow it.
    cursor = connection.connection.cursor()
    try:
        before: dict[str, int] = {}
        for name, value in (("journal_size_limit", 0), ("busy_timeout", _PATIENCE_TO_ERASE)):
            cursor.execute(f"PRAGMA {name}")
            (before[name],) = cursor.fetchone() or (0,)
            cursor.execute(f"PRAGMA {name} = {value}")
        try:
            cursor.execute("VACUUM")
            cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            for name, value in before.items():
                cursor.execute(f"PRAGMA {name} = {value}")
    finally:
        cursor.close()


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
