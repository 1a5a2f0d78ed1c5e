"""The schema from Python: upgrade, downgrade, current and check, without an ini file.

Each function takes a URL, an engine, or a connection. On a connection it works inside the
caller's transaction and leaves committing to the caller; otherwise it commits by itself.
Two processes that upgrade at once wait for each other. Threads may upgrade several databases at
once, and a project's own Alembic migration may call these functions.
"""

from __future__ import annotations

from contextlib import closing, contextmanager
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, inspect
from sqlalchemy.engine.mock import MockConnection
from sqlalchemy.ext.asyncio import AsyncConnection

from zoho_orm_store import migrations
from zoho_orm_store._database.database import Database, open_database
from zoho_orm_store._database.drivers import redacted_url
from zoho_orm_store._database.errors import our_errors
from zoho_orm_store._schema import (
    NEWEST_REVISION,
    VERSION_TABLE,
    describe_found,
    fixed_schema,
    stored_revision,
    table_schema,
)
from zoho_orm_store._sql.dialects import commit_schema_change, schema_locked
from zoho_orm_store.errors import ConfigurationError, SchemaError
from zoho_orm_store.migrations.support import report, running
from zoho_orm_store.models import metadata

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from alembic.autogenerate.api import AutogenContext
    from alembic.runtime.migration import RevisionStep
    from sqlalchemy.engine.interfaces import ReflectedColumn, ReflectedIndex
    from sqlalchemy.schema import SchemaItem

    from zoho_orm_store._database.engines import Bind
    from zoho_orm_store.migrations.support import Report

__all__ = [
    "check",
    "current",
    "downgrade",
    "head",
    "include_name",
    "include_object",
    "is_current",
    "render_item",
    "revisions",
    "sql",
    "upgrade",
]

T = TypeVar("T")

Target: TypeAlias = "Bind | Connection | Database"

_Steps: TypeAlias = "Callable[[ScriptDirectory, str, Any], list[RevisionStep]]"

_TABLES = frozenset({*metadata.tables, VERSION_TABLE})

_TYPES = tuple(column.type for table in metadata.tables.values() for column in table.columns)
"""The types of our columns. A model made with the mixins has the same objects."""

_PATIENCE = 30.0
"""Seconds to wait for a database that is busy."""


def _say_nothing(step: str) -> None:
    pass


@our_errors
def upgrade(
    bind: Target,
    revision: str = "head",
    *,
    on_step: Callable[[str], object] = _say_nothing,
) -> int:
    """Make or upgrade the tables. A table of the SDK's own stores is adopted with its tokens.

    Back such a table up first.

    Args:
        bind: The database.
        revision: The revision to upgrade to; by default the newest.
        on_step: Called with what comes next, before each step that may take long: those of the
            adoption of more than 5,000 tokens.

    Returns:
        How many tokens of the SDK's table were adopted; the log, at the level INFO, says it too.

    Raises:
        SchemaError: A table ``oauthtoken`` exists that is not the Zoho SDK's, or that cannot be
            changed; the message says why.
        ConfigurationError: There is no such revision.
        DatabaseError: The database refused or lost the operation.
    """
    return _migrate(bind, ScriptDirectory._upgrade_revs, revision, on_step).adopted


@our_errors
def downgrade(bind: Target, revision: str = "base") -> tuple[tuple[str, str], ...]:
    """Take the schema back. A table that holds tokens is never dropped.

    The SDK's own stores can then go on with the table. They need whole numbers as ids, so every
    other id is changed.

    Args:
        bind: The database.
        revision: The revision to go back to; by default ``base``, before the first.

    Returns:
        Each id that was changed, and the new one; the log, at the level WARNING, names them too.

    Raises:
        ConfigurationError: There is no such revision.
        DatabaseError: The database refused or lost the operation.
    """
    report = _migrate(bind, ScriptDirectory._downgrade_revs, revision, _say_nothing)
    return tuple(report.renumbered.items())


@our_errors
def current(bind: Target) -> str | None:
    """Return the schema's revision, or ``None`` if it has none.

    Raises:
        DatabaseError: The database refused or lost the operation.
    """
    return _read(bind, lambda connection: stored_revision(connection, table_schema(connection)))


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


def include_object(
    object: SchemaItem,  # noqa: A002 - Alembic's names
    name: str | None,
    type_: str,
    reflected: bool,
    compare_to: SchemaItem | None,
) -> bool:
    """Keep autogenerate from proposing to drop the tables of this package, like `include_name`.

    For ``context.configure(include_object=...)``. Unlike `include_name`, it also suits a project
    whose ``target_metadata`` holds this package's ``metadata``.

    Args:
        object: What Alembic found.
        name: Its name.
        type_: Its kind, such as ``"table"``.
        reflected: Whether it was found in the database.
        compare_to: The same in the metadata.

    Returns:
        Whether the project's own migrations manage it.
    """
    is_only_there = reflected and compare_to is None
    return not (is_only_there and type_ == "table" and name in _TABLES)


def render_item(type_: str, item: object, autogen_context: AutogenContext) -> str | Literal[False]:
    """Leave the types of MariaDB and MySQL out of the revisions for another database.

    For ``context.configure(render_item=...)``. Without it, autogenerate writes down the types of
    both, so that a revision made on one database also runs on the other. Do not use it in a project
    whose revisions run on MariaDB or MySQL as well.

    Args:
        type_: What is written, such as ``"type"``.
        item: The type itself.
        autogen_context: The database at hand, and the options of ``context.configure``.

    Returns:
        The type of a column of this package's models in Python; ``False`` for anything else, which
        Alembic then writes itself.
    """
    dialect = autogen_context.dialect
    knows_no_other = dialect is None or dialect.name in ("mysql", "mariadb")
    if type_ != "type" or knows_no_other or not any(item is each for each in _TYPES):
        return False
    return f"{autogen_context.opts['sqlalchemy_module_prefix'] or ''}{item!r}"


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
    script = StringIO()
    options = {"as_sql": True, "literal_binds": True, "output_buffer": script}
    context = MigrationContext.configure(
        dialect_name=dialect,
        dialect_opts={"paramstyle": "named"},
        opts=_options(None, ScriptDirectory._upgrade_revs, "head") | options,
    )
    _run(context, _say_nothing)
    return script.getvalue()


def head() -> str:
    """Return the newest revision."""
    return NEWEST_REVISION


def revisions() -> list[str]:
    """Return every revision, the oldest first."""
    return [script.revision for script in _scripts().walk_revisions()][::-1]


def _read(target: Target, work: Callable[[Connection], T]) -> T:
    if isinstance(target, Connection):
        return work(target)
    with _opened(target, timeout=_PATIENCE) as database:
        return database.read(work)


def _migrate(
    target: Target,
    steps: _Steps,
    to: str,
    on_step: Callable[[str], object],
) -> Report:
    if not isinstance(to, str):
        raise ConfigurationError(f"The revision must be a string, not {type(to).__name__}.")

    def work(connection: Connection) -> Report:
        with schema_locked(connection):
            with fixed_schema(connection) as schema:
                found = stored_revision(connection, schema)
                if found is not None and found not in revisions():
                    raise SchemaError(_describe(connection, found))
                options = _options(schema, steps, to)
                report = _run(MigrationContext.configure(connection, opts=options), on_step)
            if connection is not target:
                commit_schema_change(connection)
        return report

    if isinstance(target, Connection):
        return work(target)
    # A large table takes its time, but another process's lock is not waited for forever.
    with _opened(target, timeout=None) as database:
        return database.write(work)


def _options(schema: str | None, steps: _Steps, to: str) -> dict[str, Any]:
    """What a migration context needs to run the revisions on the way to one of them."""
    scripts = _scripts()

    def steps_from(heads: Any, context: object) -> list[RevisionStep]:  # noqa: ANN401
        try:
            found = steps(scripts, to, heads)
        except Exception as error:  # noqa: BLE001 - also what Alembic does not expect
            reason = f"{error} " if isinstance(error, CommandError) else ""
        else:
            report().planned = frozenset(str(step.revision.revision) for step in found)
            return found
        raise ConfigurationError(
            f"There is no way to the revision {to!r}. {reason}"
            f"The revisions are {', '.join(revisions())}."
        )

    return {
        "script": scripts,
        "fn": steps_from,
        "version_table": VERSION_TABLE,
        "version_table_schema": schema,
    }


def _run(context: MigrationContext, on_step: Callable[[str], object] = lambda step: None) -> Report:
    """Run a context's revisions without an environment of Alembic's, of which a process has one."""
    try:
        with running(Operations(context), on_step) as report, context.begin_transaction():
            context.run_migrations()
        return report
    except CommandError as error:
        raise SchemaError(f"{error}") from None


def _scripts() -> ScriptDirectory:
    return ScriptDirectory(str(Path(migrations.__file__).parent))


@contextmanager
def _opened(target: Bind | Database, timeout: float | None) -> Iterator[Database]:
    if isinstance(target, Database):
        yield target
        return
    if isinstance(target, MockConnection):
        raise ConfigurationError(
            "A script (alembic upgrade --sql) is written without a database, but this has to look "
            "at the tables. Run the migration without --sql, or leave this out of the script and "
            "add what 'zoho-orm-store sql' prints for an empty database."
        )
    if isinstance(target, AsyncConnection):
        raise ConfigurationError(
            "An AsyncConnection cannot be used here. Pass this function to its run_sync: "
            "await connection.run_sync(provision.upgrade)."
        )
    with closing(open_database(target, timeout=timeout, retry_for=_PATIENCE)) as database:
        yield database


def _is_current(connection: Connection) -> bool:
    inspector, schema = inspect(connection), table_schema(connection)
    return stored_revision(connection, schema) in (None, NEWEST_REVISION) and all(
        inspector.has_table(table.name, schema=schema)
        and {*table.columns.keys()} <= _names(inspector.get_columns(table.name, schema=schema))
        and {each.name for each in table.indexes}
        <= _names(inspector.get_indexes(table.name, schema=schema))
        for table in metadata.tables.values()
    )


def _names(reflected: Iterable[ReflectedColumn | ReflectedIndex]) -> set[str | None]:
    return {part["name"] for part in reflected}


def _check(connection: Connection) -> None:
    if not _is_current(connection):
        found = stored_revision(connection, table_schema(connection))
        raise SchemaError(_describe(connection, found))


def _describe(connection: Connection, found: str | None) -> str:
    return describe_found(connection, redacted_url(connection.engine.url), found)
