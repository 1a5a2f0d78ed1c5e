"""What Alembic's environment does here, in a checkout and in an installed package alike."""

from __future__ import annotations

import os
from contextlib import closing
from typing import TYPE_CHECKING, Any

from alembic import context

from zoho_orm_store._database.database import open_database
from zoho_orm_store._schema import VERSION_TABLE
from zoho_orm_store.errors import ConfigurationError
from zoho_orm_store.models import metadata

if TYPE_CHECKING:
    from alembic.migration import MigrationContext
    from sqlalchemy import Column, Connection
    from sqlalchemy.types import TypeEngine

__all__ = ["URL_VARIABLE", "run"]

URL_VARIABLE = "ZOHO_ORM_STORE_URL"
"""The environment variable that names the database for Alembic's own command line."""


def run() -> None:
    """Run the command that Alembic was asked for.

    On the connection that the caller put into the configuration's ``attributes``, which stays
    the caller's to commit; else on the database that `URL_VARIABLE` names.
    """
    connection: Connection | None = context.config.attributes.get("connection")
    if context.is_offline_mode():
        _run_offline()
    elif connection is not None:
        _run_online(connection)
    else:
        with closing(open_database(_url())) as database:
            database.write(_run_online)


def _run_online(connection: Connection) -> None:
    _configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()


def _run_offline() -> None:
    dialect: str | None = context.config.attributes.get("dialect")
    target = {"dialect_name": dialect} if dialect else {"url": _url()}
    _configure(**target, literal_binds=True, dialect_opts={"paramstyle": "named"})
    with context.begin_transaction():
        context.run_migrations()


def _configure(**options: object) -> None:
    context.configure(
        target_metadata=metadata,
        version_table=VERSION_TABLE,
        include_name=_is_ours,
        compare_type=_differs,
        **options,  # type: ignore[arg-type]
    )


def _is_ours(name: str | None, kind: str, parents: object) -> bool:
    return kind != "table" or name in metadata.tables


def _differs(
    context: MigrationContext,
    inspected_column: Column[Any],
    metadata_column: Column[Any],
    inspected_type: TypeEngine[Any],
    metadata_type: TypeEngine[Any],
) -> bool | None:
    """Whether a column's type has changed; ``None`` leaves that to Alembic.

    On MySQL and MariaDB the ids' collation depends on the server, which a model does not know:
    see ``id_type`` in the second revision.
    """
    has_collation = getattr(inspected_type, "collation", None) is not None
    return False if metadata_column.name == "id" and has_collation else None


def _url() -> str:
    url = os.environ.get(URL_VARIABLE)
    if not url:
        raise ConfigurationError(
            f"Set {URL_VARIABLE} to the URL of the database, "
            "for example sqlite:///zohooauth.db, and run the command again."
        )
    return url
