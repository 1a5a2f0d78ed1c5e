"""The schema from Python: upgrade, downgrade, current and check, without an ini file.

Each function takes a URL, an engine, or a connection. On a connection it works inside the
caller's transaction and leaves committing to the caller; otherwise it commits by itself.
Two processes that upgrade at once wait for each other.
"""

from __future__ import annotations

from contextlib import closing, contextmanager
from io import StringIO
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, inspect

from zoho_orm_store._database.database import Database, open_database
from zoho_orm_store._database.drivers import redacted_url
from zoho_orm_store._database.errors import our_errors
from zoho_orm_store._schema import NEWEST_REVISION, VERSION_TABLE, describe
from zoho_orm_store._sql.dialects import commit_schema_change, schema_locked
from zoho_orm_store.errors import ConfigurationError, SchemaError
from zoho_orm_store.models import metadata

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from sqlalchemy.engine.interfaces import ReflectedColumn, ReflectedIndex

    from zoho_orm_store._database.engines import Bind

__all__ = [
    "check",
    "current",
    "downgrade",
    "head",
    "include_name",
    "is_current",
    "revisions",
    "sql",
    "upgrade",
]

T = TypeVar("T")

Target: TypeAlias = "Bind | Connection | Database"

_TABLES = frozenset({*metadata.tables, VERSION_TABLE})

_PATIENCE = 30.0
"""Seconds to wait for a database that is busy."""


@our_errors
def upgrade(bind: Target, revision: str = "head") -> None:
    """Make or upgrade the tables. A table of the SDK's own stores is adopted with its tokens.

    Args:
        bind: The database.
        revision: The revision to upgrade to; by default the newest.

    Raises:
        SchemaError: A table ``oauthtoken`` exists that is not the Zoho SDK's.
        ConfigurationError: There is no such revision.
        DatabaseError: The database refused or lost the operation.
    """
    _migrate(bind, command.upgrade, revision)


@our_errors
def downgrade(bind: Target, revision: str = "base") -> None:
    """Take the schema back. A table that holds tokens is never dropped.

    Args:
        bind: The database.
        revision: The revision to go back to; by default ``base``, before the first.

    Raises:
        ConfigurationError: There is no such revision.
        DatabaseError: The database refused or lost the operation.
    """
    _migrate(bind, command.downgrade, revision)


@our_errors
def current(bind: Target) -> str | None:
    """Return the schema's revision, or ``None`` if it has none.

    Raises:
        DatabaseError: The database refused or lost the operation.
    """
    return _read(bind, _current)


@our_errors
def is_current(bind: Target) -> bool:
    """Return whether the tables are up to date, whoever made them.

    Every table, column and index exists, at the newest revision. Tables that a project's own
    migrations made need no revision of this package.

    Raises:
        DatabaseError: The database refused or lost the operation.
    """
    return _read(bind, _is_current)


@our_errors
def check(bind: Target) -> None:
    """Check that the tables are up to date (see `is_current`).

    Raises:
        SchemaError: They are missing or of another revision. The message names the command to
            run, and both revisions if the tables have one.
        DatabaseError: The database refused or lost the operation.
    """
    _read(bind, _check)


def include_name(name: str | None, type_: str, parent_names: object) -> bool:
    """Keep autogenerate from proposing to drop the tables of this package.

    For ``context.configure(include_name=...)`` in the environment of a project whose
    ``target_metadata`` does not hold this package's ``metadata``.

    Args:
        name: The name of what Alembic found in the database.
        type_: Its kind, such as ``"table"``.
        parent_names: The names of the schema and table that it belongs to.

    Returns:
        Whether the project's own migrations manage it.
    """
    return type_ != "table" or name not in _TABLES


@our_errors
def sql(dialect: str) -> str:
    """Return the upgrade of an empty database as an SQL script.

    For databases whose schema only an administrator may change. A table that already holds
    tokens needs `upgrade` itself, which converts its rows.

    Args:
        dialect: ``"postgresql"``, ``"mysql"`` or ``"mariadb"``.

    Raises:
        ConfigurationError: There is no script for another dialect.
    """
    if dialect not in ("postgresql", "mysql", "mariadb"):
        raise ConfigurationError(
            f"There is no SQL script for {dialect!r}, only for 'postgresql', 'mysql' and "
            "'mariadb'. Run the upgrade on the database itself."
        )
    config = _config()
    config.attributes["dialect"] = dialect
    config.output_buffer = StringIO()
    command.upgrade(config, "head", sql=True)
    return config.output_buffer.getvalue()


def head() -> str | None:
    """Return the newest revision."""
    return ScriptDirectory.from_config(_config()).get_current_head()


def revisions() -> list[str]:
    """Return every revision, the oldest first."""
    walked = ScriptDirectory.from_config(_config()).walk_revisions()
    return [script.revision for script in walked][::-1]


def _read(target: Target, work: Callable[[Connection], T]) -> T:
    if isinstance(target, Connection):
        return work(target)
    with _opened(target, timeout=_PATIENCE) as database:
        return database.read(work)


def _migrate(target: Target, migrate: Callable[[Config, str], None], to: str) -> None:
    config = _config()

    def work(connection: Connection) -> None:
        config.attributes["connection"] = connection
        with schema_locked(connection):
            if (_current(connection) or "") > NEWEST_REVISION:
                raise SchemaError(_describe(connection))
            migrate(config, to)
            if connection is not target:
                commit_schema_change(connection)

    try:
        if isinstance(target, Connection):
            work(target)
        else:
            # A large table takes its time, but another process's lock is not waited for forever.
            with _opened(target, timeout=None) as database:
                database.write(work)
    except CommandError as error:
        raise ConfigurationError(f"{error} The revisions are {', '.join(revisions())}.") from None


@contextmanager
def _opened(target: Bind | Database, timeout: float | None) -> Iterator[Database]:
    if isinstance(target, Database):
        yield target
    else:
        with closing(open_database(target, timeout=timeout, retry_for=_PATIENCE)) as database:
            yield database


def _current(connection: Connection) -> str | None:
    options = {"version_table": VERSION_TABLE}
    return MigrationContext.configure(connection, opts=options).get_current_revision()


def _is_current(connection: Connection) -> bool:
    inspector = inspect(connection)
    has_no_revision = not inspector.has_table(VERSION_TABLE)
    return (has_no_revision or _current(connection) == head()) and all(
        inspector.has_table(table.name)
        and {*table.columns.keys()} <= _names(inspector.get_columns(table.name))
        and {index.name for index in table.indexes} <= _names(inspector.get_indexes(table.name))
        for table in metadata.tables.values()
    )


def _names(reflected: Iterable[ReflectedColumn | ReflectedIndex]) -> set[str | None]:
    return {part["name"] for part in reflected}


def _check(connection: Connection) -> None:
    if not _is_current(connection):
        raise SchemaError(_describe(connection))


def _describe(connection: Connection) -> str:
    return describe(redacted_url(connection.engine.url), _current(connection))


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", "zoho_orm_store:migrations")
    return config
