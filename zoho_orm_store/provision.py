"""The schema from Python: upgrade, downgrade, current and check, with no ini file.

Each function takes a URL, an engine, or a connection. On a connection it works inside the
caller's transaction and leaves committing to the caller; otherwise it commits by itself.
Two processes that upgrade at once wait for each other.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from zoho_orm_store.binding import bind_to
from zoho_orm_store.errors import SchemaError
from zoho_orm_store.migrations.environment import VERSION_TABLE
from zoho_orm_store.statements import lock_schema, unlock_schema

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zoho_orm_store.binding import Bind

__all__ = ["check", "current", "describe", "downgrade", "head", "upgrade"]

T = TypeVar("T")


def upgrade(bind: Bind | Connection, revision: str = "head") -> None:
    """Make or upgrade the tables; a table of the SDK's own stores is adopted with its tokens.

    Args:
        bind: The database.
        revision: Where to; the newest revision, if not given.

    Raises:
        SchemaError: A table ``oauthtoken`` exists that is not the Zoho SDK's.
        DatabaseError: The database refused or lost the operation.
    """
    _run(bind, lambda connection: _migrate(connection, command.upgrade, revision))


def downgrade(bind: Bind | Connection, revision: str = "base") -> None:
    """Take the schema back; a table that holds tokens is never dropped.

    Args:
        bind: The database.
        revision: Where to; back to the beginning, if not given.

    Raises:
        DatabaseError: The database refused or lost the operation.
    """
    _run(bind, lambda connection: _migrate(connection, command.downgrade, revision))


def current(bind: Bind | Connection) -> str | None:
    """Return the schema's revision, or ``None`` where there is none.

    Raises:
        DatabaseError: The database refused or lost the operation.
    """
    return _run(bind, _current)


def check(bind: Bind | Connection) -> None:
    """Check that the schema is this package's newest.

    Raises:
        SchemaError: It is missing or of another revision; the message names both and the
            command that mends it.
        DatabaseError: The database refused or lost the operation.
    """
    _run(bind, _check)


def head() -> str | None:
    """Return the newest revision."""
    return ScriptDirectory.from_config(_config()).get_current_head()


def _run(bind: Bind | Connection, work: Callable[[Connection], T]) -> T:
    if isinstance(bind, Connection):
        return work(bind)
    binding = bind_to(bind)
    try:
        return binding.write(work)
    finally:
        binding.close()


def _migrate(connection: Connection, migrate: Callable[[Config, str], None], to: str) -> None:
    config = _config()
    config.attributes["connection"] = connection
    with _schema_locked(connection):
        migrate(config, to)


@contextmanager
def _schema_locked(connection: Connection) -> Iterator[None]:
    lock, unlock = (make(connection.dialect.name) for make in (lock_schema, unlock_schema))
    if lock is not None:
        connection.execute(lock)
    try:
        yield
    finally:
        if unlock is not None:
            connection.execute(unlock)


def _current(connection: Connection) -> str | None:
    options = {"version_table": VERSION_TABLE}
    return MigrationContext.configure(connection, opts=options).get_current_revision()


def _check(connection: Connection) -> None:
    if _current(connection) != head():
        raise SchemaError(describe(connection))


def describe(connection: Connection) -> str:
    """Say at which revision a schema is, which one is needed, and the command that mends it."""
    url = connection.engine.url.render_as_string(hide_password=True)
    found, needed = _current(connection), head()
    if found is None:
        state = f"No tables of this package have been made in {url} (revision {needed} is needed)."
    else:
        state = f"The tables in {url} are at revision {found}, but {needed} is needed."
    return (
        f"{state} Run: zoho-orm-store upgrade --url '{url}', "
        "or in Python: zoho_orm_store.provision.upgrade(engine)."
    )


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", "zoho_orm_store:migrations")
    return config
