"""Which revision the tables are at, and what to do about any other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import column, inspect, select, table

from zoho_orm_store.errors import SchemaError

if TYPE_CHECKING:
    from sqlalchemy import Connection, Select

__all__ = [
    "NEWEST_REVISION",
    "VERSION_TABLE",
    "check_revision",
    "describe",
    "missing_leases",
    "missing_tables",
]

VERSION_TABLE = "zoho_orm_store_version"
"""The table that holds the revision, separate from a project's own ``alembic_version``."""

NEWEST_REVISION = "zoho_orm_store_0002"
"""The revision that this package works with. Later ones sort after it."""

_REVISION: Select[Any] = select(column("version_num")).select_from(table(VERSION_TABLE))


def check_revision(connection: Connection, database: str) -> None:
    """Refuse tables of another revision.

    Tables that a project's own migrations made have no revision of ours, and are accepted.

    Args:
        connection: A connection, in whose transaction the revision is read.
        database: The URL without its password.

    Raises:
        SchemaError: The message names both revisions and the command to run.
    """
    if not inspect(connection).has_table(VERSION_TABLE):
        return
    found = connection.scalar(_REVISION)
    if found is not None and found != NEWEST_REVISION:
        raise SchemaError(describe(database, found))


def missing_tables(database: str, reported: str) -> str:
    """The message for a statement that failed because a table or column does not exist.

    Args:
        database: The URL without its password.
        reported: What the database said.
    """
    return (
        f"A table or column is missing in {database}. {_upgrade(database)} If your project's own "
        f"migrations make the tables, run those instead. If the upgrade finds nothing to do, the "
        f"tables were changed since: drop the table {VERSION_TABLE}, which holds nothing but the "
        f"revision, and run it again. {reported}"
    )


def missing_leases(table: str) -> str:
    """The message for a project's own table of refresh leases that does not exist."""
    return (
        f"The table of refresh leases, {table!r}, is missing or lacks a column. Make it with your "
        "project's migrations, from a model with RefreshLeaseMixin that you pass as lease_model=. "
        "Or pass refresh=None, and each worker refreshes for itself."
    )


def describe(database: str, found: str | None) -> str:
    """Say which revision the tables are at, which one is needed, and what to do.

    Args:
        database: The URL without its password.
        found: The revision that was found; ``None`` if there is none.
    """
    if found is None:
        return (
            f"{database} has no tables of this package, or they lack something; revision "
            f"{NEWEST_REVISION} is needed. "
            f"{_upgrade(database)} If your project's own migrations make the tables, run those "
            "instead."
        )
    if found == NEWEST_REVISION:
        return (
            f"The tables in {database} are at revision {found}, as they should be, but were "
            f"changed since. Restore them; or drop the table {VERSION_TABLE}, which holds nothing "
            f"but the revision, and let the upgrade add what is missing. {_upgrade(database)}"
        )
    if found > NEWEST_REVISION:
        return (
            f"The tables in {database} are at revision {found}, which a newer release of this "
            f"package made; this one needs {NEWEST_REVISION}. "
            "Run: pip install --upgrade zoho-orm-store"
        )
    return (
        f"The tables in {database} are at revision {found}, but {NEWEST_REVISION} is needed. "
        f"{_upgrade(database)}"
    )


def _upgrade(database: str) -> str:
    return (
        f"Run: zoho-orm-store upgrade --url '{database}', "
        "or in Python: zoho_orm_store.provision.upgrade(engine)."
    )
