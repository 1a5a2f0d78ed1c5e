"""Alembic's environment of a checkout, on the database that ZOHO_ORM_STORE_URL names."""

from __future__ import annotations

import os
from contextlib import closing
from typing import TYPE_CHECKING

from alembic import context
from alembic.util import CommandError

from zoho_orm_store._database.database import open_database
from zoho_orm_store._schema import VERSION_TABLE, fixed_schema
from zoho_orm_store._sql.dialects import commit_schema_change, schema_locked
from zoho_orm_store.errors import ConfigurationError, ZohoOrmStoreError
from zoho_orm_store.models import metadata

if TYPE_CHECKING:
    from sqlalchemy import Connection

URL_VARIABLE = "ZOHO_ORM_STORE_URL"


def url() -> str:
    """The database that the environment names."""
    named = os.environ.get(URL_VARIABLE)
    if not named:
        raise ConfigurationError(
            f"Set {URL_VARIABLE} to the URL of the database, "
            "for example sqlite:///zohooauth.db, and run the command again."
        )
    return named


def is_ours(name: str | None, kind: str, parents: object) -> bool:
    """Whether autogenerate compares a table: it leaves those of applications alone."""
    return kind != "table" or name in metadata.tables


def run_online(connection: Connection) -> None:
    """Run the command on a connection, while no other process changes the schema."""
    with schema_locked(connection):
        with fixed_schema(connection) as schema:
            context.configure(
                connection=connection,
                target_metadata=metadata,
                version_table=VERSION_TABLE,
                version_table_schema=schema,
                include_name=is_ours,
            )
            try:
                with context.begin_transaction():
                    context.run_migrations()
            except CommandError as error:
                # Any other error would be taken for one of the database.
                raise ConfigurationError(str(error)) from None
        commit_schema_change(connection)


def run_offline() -> None:
    """Write the command's SQL."""
    context.configure(
        url=url(),
        target_metadata=metadata,
        version_table=VERSION_TABLE,
        literal_binds=True,
        dialect_opts={"paramstyle": "named"},
    )
    with context.begin_transaction():
        context.run_migrations()


try:
    if context.is_offline_mode():
        run_offline()
    else:
        with closing(open_database(url(), retry_for=30.0)) as database:
            database.write(run_online)
except ZohoOrmStoreError as error:
    # Alembic prints it on one line, and no traceback.
    raise CommandError(str(error)) from None
