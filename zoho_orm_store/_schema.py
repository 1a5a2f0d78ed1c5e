"""Which revision the tables are at, and what to do about any other."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sqlalchemy import column, func, inspect, select, table

from zoho_orm_store._sql.dialects import creation_schema, schema_of_visible
from zoho_orm_store.errors import SchemaError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sqlalchemy import Connection

__all__ = [
    "NEWEST_REVISION",
    "VERSION_TABLE",
    "check_revision",
    "describe",
    "describe_found",
    "fixed_schema",
    "missing_leases",
    "missing_privilege",
    "missing_tables",
    "stored_revision",
    "table_schema",
]

VERSION_TABLE = "zoho_orm_store_version"
"""The table that holds the revision, separate from a project's own ``alembic_version``."""

NEWEST_REVISION = "zoho_orm_store_0003"
"""The revision that this package works with. Later ones sort after it."""

_TOKENS, _LEASES = "oauthtoken", "oauthtoken_refresh_lease"

_COLUMNS_OF_EVERY_SDK = frozenset(
    {"id", "client_id", "refresh_token", "access_token", "grant_token", "expiry_time"}
)
"""Later releases of the SDK have more."""

_START_AGAIN = (
    f"Drop the table {VERSION_TABLE}, which holds nothing but the revision, and run the upgrade "
    "again; it adds what is missing."
)


def table_schema(connection: Connection) -> str | None:
    """The schema of the package's tables: they are made there, and looked for nowhere else.

    Returns:
        The schema that ``schema_translate_map`` gives to tables without one; or else PostgreSQL's
        current schema; ``None`` on a database that has no other place for them.

    Raises:
        SchemaError: The first schema of PostgreSQL's search path does not exist.
    """
    return _translated_schema(connection) or creation_schema(connection)


@contextmanager
def fixed_schema(connection: Connection) -> Iterator[str | None]:
    """Make tables without a schema mean those in the schema of the package's tables.

    Yields:
        That schema; see `table_schema`.
    """
    before = connection.get_execution_options().get("schema_translate_map")
    schema = table_schema(connection)
    fixed = None if schema is None else {None: schema}
    connection.execution_options(schema_translate_map=fixed)
    try:
        yield schema
    finally:
        connection.execution_options(schema_translate_map=before)


def _translated_schema(connection: Connection) -> str | None:
    options = connection.get_execution_options()
    translated: Mapping[str | None, str | None] = options.get("schema_translate_map") or {}
    return translated.get(None)


def check_revision(connection: Connection, database: str) -> None:
    """Refuse tables of another revision, the SDK's own, or those of another schema.

    Tables that a project's own migrations made have no revision of ours, and are accepted.

    Args:
        connection: A connection, in whose transaction the revision is read.
        database: The URL without its password.

    Raises:
        SchemaError: The message names both revisions and the command to run.
    """
    schema = table_schema(connection)
    found = stored_revision(connection, schema)
    if found not in (None, NEWEST_REVISION):
        raise SchemaError(describe(database, found))
    if found is None and (number := _tokens_to_adopt(connection, schema)) is not None:
        raise SchemaError(_adoption(database, number))
    if found is None and _translated_schema(connection) is None:
        elsewhere = schema_of_visible(connection, _TOKENS)
        if elsewhere not in (None, schema):
            raise SchemaError(
                f"The table {_TOKENS!r} is missing in the schema {schema!r}, the first in the "
                f"search_path of {database}. The one in {elsewhere!r} is not used: it may be "
                f"another tenant's. Make the tables in {schema!r}, or put {elsewhere!r} first in "
                f"the search_path. {_upgrade(database)}"
            )


def stored_revision(connection: Connection, schema: str | None) -> str | None:
    """The revision that the database records, or ``None``.

    Args:
        connection: A connection, in whose transaction the revision is read.
        schema: The schema of the tables.

    Raises:
        SchemaError: The database records several.
    """
    if not inspect(connection).has_table(VERSION_TABLE, schema=schema):
        return None
    # Unlike a `Table`, this is not subject to schema_translate_map.
    version = table(VERSION_TABLE, column("version_num"), schema=schema)
    found = connection.scalars(select(version.c.version_num)).all()
    if len(found) > 1:
        raise SchemaError(
            f"The table {VERSION_TABLE} has {len(found)} rows instead of one. {_START_AGAIN}"
        )
    return found[0] if found else None


def describe_found(connection: Connection, database: str, found: str | None) -> str:
    """Like `describe`, and recognize the SDK's own table.

    Args:
        connection: A connection, in whose transaction the table is read.
        database: The URL without its password.
        found: The revision that was found; ``None`` if there is none.
    """
    if found is None:
        number = _tokens_to_adopt(connection, table_schema(connection))
        if number is not None:
            return _adoption(database, number)
    return describe(database, found)


def _tokens_to_adopt(connection: Connection, schema: str | None) -> int | None:
    """How many tokens the SDK's own table holds; ``None`` if there is no such table."""
    inspector = inspect(connection)
    if not inspector.has_table(_TOKENS, schema=schema):
        return None
    present = {each["name"] for each in inspector.get_columns(_TOKENS, schema=schema)}
    has_user = not present.isdisjoint({"user_name", "user_mail"})
    if "identity" in present or not has_user or not present >= _COLUMNS_OF_EVERY_SDK:
        return None
    return connection.scalar(select(func.count()).select_from(table(_TOKENS, schema=schema)))


def _adoption(database: str, number: int) -> str:
    return (
        f"The table {_TOKENS!r} in {database} is the Zoho SDK's own, with "
        f"{number} {'token' if number == 1 else 'tokens'}. The upgrade adopts it: it keeps the "
        "tokens, and adds the columns that are missing. Stop the programs that write the table "
        f"with the SDK's store, and back it up. {_upgrade(database)}"
    )


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


def missing_privilege(database: str, reported: str) -> str:
    """The message for a statement that the database user has no right to run.

    Args:
        database: The URL without its password.
        reported: What the database said. It names tables and users, and holds no value of a row.
    """
    if "row-level security" in reported:
        return f"A row-level security policy in {database} does not allow this row. {reported}"
    denied = _denied_table(reported)
    if denied is None or re.search(r"must be owner|\b(CREATE|ALTER|DROP|INDEX) command", reported):
        advice = (
            "To create or upgrade the tables takes more rights than to use them. Run the upgrade "
            "as a user who may change the tables, or give this one those rights"
        )
        if schema := re.search(r"for schema (\S+)", reported):
            advice += f". If they exist already, run: GRANT USAGE ON SCHEMA {schema[1]} TO <user>"
    else:
        ours = (VERSION_TABLE, _LEASES, _TOKENS)
        version = f", and SELECT on {VERSION_TABLE}" if denied in ours else ""
        needed = "SELECT" if denied == VERSION_TABLE else "SELECT, INSERT, UPDATE, DELETE"
        advice = (
            "An application needs SELECT, INSERT, UPDATE and DELETE on the tables of tokens and "
            f"leases{version}. Run as an administrator: GRANT {needed} ON {denied} TO <user>"
        )
    return (
        f"The database user lacks a right in {database}. {reported}. {advice}. "
        "The page on databases in the documentation lists all rights."
    )


def _denied_table(reported: str) -> str | None:
    """The table that a database user has no right on, as PostgreSQL, MariaDB and MySQL name it."""
    found = re.search(
        r"permission denied for (?:table|view|relation) \"?([^\"\n]+)"
        r"|command denied to user .* table [`'](?:[^`']+`\.`)?([^`']+)[`']",
        reported,
    )
    if found is not None:
        return found[1] or found[2]
    # A server may be set to another language. Only the names are the same in each.
    return next((name for name in (VERSION_TABLE, _LEASES, _TOKENS) if name in reported), None)


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
    if not found.startswith("zoho_orm_store_"):
        return (
            f"The table {VERSION_TABLE} in {database} holds something that is not a revision of "
            f"this package. {_START_AGAIN}"
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
