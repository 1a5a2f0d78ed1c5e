"""The schema from Python: upgrade, downgrade, current and check, with no ini file.

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
from sqlalchemy import Connection, exc, inspect

from zoho_orm_store.binding import Binding, bind_to
from zoho_orm_store.dialects import shown, with_our_errors
from zoho_orm_store.errors import ConfigurationError, SchemaError
from zoho_orm_store.models import metadata
from zoho_orm_store.revisions import NEWEST_REVISION, VERSION_TABLE
from zoho_orm_store.revisions import describe as describe_revision
from zoho_orm_store.statements import commit_schema, lock_schema, unlock_schema

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from sqlalchemy import Executable
    from sqlalchemy.engine.interfaces import ReflectedColumn, ReflectedIndex

    from zoho_orm_store.engines import Bind

__all__ = [
    "check",
    "current",
    "describe",
    "downgrade",
    "head",
    "include_name",
    "is_current",
    "revisions",
    "sql",
    "upgrade",
]

T = TypeVar("T")

Target: TypeAlias = "Bind | Connection | Binding"

_TABLES = frozenset({*metadata.tables, VERSION_TABLE})

_PATIENCE = 30.0
"""Seconds to wait for a database that is busy."""


@with_our_errors
def upgrade(bind: Target, revision: str = "head") -> None:
    """Make or upgrade the tables; a table of the SDK's own stores is adopted with its tokens.

    Args:
        bind: The database.
        revision: Where to; the newest revision, if not given.

    Raises:
        SchemaError: A table ``oauthtoken`` exists that is not the Zoho SDK's.
        ConfigurationError: There is no such revision.
        DatabaseError: The database refused or lost the operation.
    """
    _migrate(bind, command.upgrade, revision)


@with_our_errors
def downgrade(bind: Target, revision: str = "base") -> None:
    """Take the schema back; a table that holds tokens is never dropped.

    Args:
        bind: The database.
        revision: Where to; back to the beginning, if not given.

    Raises:
        ConfigurationError: There is no such revision.
        DatabaseError: The database refused or lost the operation.
    """
    _migrate(bind, command.downgrade, revision)


@with_our_errors
def current(bind: Target) -> str | None:
    """Return the schema's revision, or ``None`` where there is none.

    Raises:
        DatabaseError: The database refused or lost the operation.
    """
    return _read(bind, _current)


@with_our_errors
def is_current(bind: Target) -> bool:
    """Return whether the tables are this package's newest, whoever has made them.

    Every table, column and index is there, and they are at the newest revision, unless a
    project's own migrations have made them and keep no revision of this package's.

    Raises:
        DatabaseError: The database refused or lost the operation.
    """
    return _read(bind, _is_current)


@with_our_errors
def check(bind: Target) -> None:
    """Check that the tables are this package's newest (see `is_current`).

    Raises:
        SchemaError: They are missing or of another revision; the message names both revisions
            and the command that mends it.
        DatabaseError: The database refused or lost the operation.
    """
    _read(bind, _check)


def include_name(name: str | None, type_: str, parent_names: object) -> bool:
    """Keep autogenerate from proposing to drop the tables of this package.

    For ``context.configure(include_name=...)`` in the environment of a project whose
    ``target_metadata`` does not hold this package's ``metadata``.

    Args:
        name: What Alembic asks about.
        type_: What kind of thing it is, such as ``"table"``.
        parent_names: What it belongs to.

    Returns:
        Whether the project's own migrations are concerned with it.
    """
    return type_ != "table" or name not in _TABLES


def sql(dialect: str) -> str:
    """Return the upgrade of an empty database as an SQL script.

    For databases whose schema only an administrator may change. A table that holds tokens
    already is taken over by `upgrade` alone, which converts its rows.

    Args:
        dialect: ``"postgresql"``, ``"mysql"`` or ``"mariadb"``.

    Raises:
        ConfigurationError: There is no script for another dialect.
    """
    config = _config()
    config.attributes["dialect"] = dialect
    config.output_buffer = StringIO()
    try:
        command.upgrade(config, "head", sql=True)
    except (CommandError, exc.NoSuchModuleError):
        problem = ConfigurationError(
            f"There is no SQL script for {dialect!r}, only for 'postgresql', 'mysql' and "
            "'mariadb'. Run the upgrade on the database itself."
        )
    else:
        return config.output_buffer.getvalue()
    raise problem


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
    with _binding(target, timeout=_PATIENCE) as binding:
        return binding.read(work)


def _migrate(target: Target, migrate: Callable[[Config, str], None], to: str) -> None:
    config = _config()

    def work(connection: Connection) -> None:
        config.attributes["connection"] = connection
        with _schema_locked(connection):
            if (_current(connection) or "") > NEWEST_REVISION:
                raise SchemaError(describe(connection))
            migrate(config, to)
            if connection is not target:
                _run(connection, commit_schema)

    try:
        if isinstance(target, Connection):
            work(target)
        else:
            # A large table takes its time, but another process's lock is not waited for forever.
            with _binding(target, timeout=None) as binding:
                binding.write(work)
    except CommandError as error:
        problem = ConfigurationError(f"{error} The revisions are {', '.join(revisions())}.")
    else:
        return
    raise problem


@contextmanager
def _binding(target: Bind | Binding, timeout: float | None) -> Iterator[Binding]:
    if isinstance(target, Binding):
        yield target
    else:
        with closing(bind_to(target, timeout=timeout, retry_for=_PATIENCE)) as binding:
            yield binding


@contextmanager
def _schema_locked(connection: Connection) -> Iterator[None]:
    _run(connection, lock_schema)
    try:
        yield
    finally:
        _run(connection, unlock_schema)


def _run(connection: Connection, statement_for: Callable[[str], Executable | None]) -> None:
    statement = statement_for(connection.dialect.name)
    if statement is not None:
        connection.execute(statement)


def _current(connection: Connection) -> str | None:
    options = {"version_table": VERSION_TABLE}
    return MigrationContext.configure(connection, opts=options).get_current_revision()


def _is_current(connection: Connection) -> bool:
    inspector = inspect(connection)
    made_by_others = not inspector.has_table(VERSION_TABLE)
    return (made_by_others or _current(connection) == head()) and all(
        inspector.has_table(table.name)
        and {*table.columns.keys()} <= _names(inspector.get_columns(table.name))
        and {index.name for index in table.indexes} <= _names(inspector.get_indexes(table.name))
        for table in metadata.tables.values()
    )


def _names(reflected: Iterable[ReflectedColumn | ReflectedIndex]) -> set[str | None]:
    return {part["name"] for part in reflected}


def _check(connection: Connection) -> None:
    if not _is_current(connection):
        raise SchemaError(describe(connection))


def describe(connection: Connection) -> str:
    """Say at which revision the tables are, which one is needed, and what mends it."""
    return describe_revision(shown(connection.engine.url), _current(connection))


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", "zoho_orm_store:migrations")
    return config
