"""The ten-column table that the SDK documents, made new or adopted as it stands.

Revision: zoho_orm_store_0001
Revises: nothing
"""

import sqlalchemy as sa
from alembic.operations import BatchOperations
from sqlalchemy.engine.interfaces import ReflectedColumn

from zoho_orm_store.errors import SchemaError
from zoho_orm_store.migrations.support import (
    INNODB,
    altered,
    is_offline,
    op,
    refuse_dependent_objects,
    revision_step,
    table_schema,
    use_innodb,
)

revision = "zoho_orm_store_0001"
down_revision = None
branch_labels = ("zoho_orm_store",)
depends_on = None

TABLE = "oauthtoken"
MYSQL_FAMILY = ("mysql", "mariadb")

COLUMNS = {
    "id": sa.String(10),
    "user_name": sa.String(255),
    "client_id": sa.String(255),
    "client_secret": sa.String(255),
    "refresh_token": sa.String(255),
    "access_token": sa.String(255),
    "grant_token": sa.String(255),
    "expiry_time": sa.String(20),
    "redirect_url": sa.String(255),
    "api_domain": sa.String(255),
}
LATER = {"client_secret": "client_id", "redirect_url": "expiry_time", "api_domain": "redirect_url"}
"""The columns that older releases of the SDK lack, and the column that each comes after."""

OLD_NAMES = {"user_name": "user_mail"}
"""The names that older releases of the SDK have for columns."""


@revision_step
def upgrade() -> None:
    if not is_offline() and sa.inspect(op.get_bind()).has_table(TABLE, schema=table_schema()):
        adopt()
    else:
        op.create_table(
            TABLE,
            *(sa.Column(name, type_, primary_key=name == "id") for name, type_ in COLUMNS.items()),
            schema=table_schema(),
            **INNODB,
        )


def adopt() -> None:
    """Take over a table of the SDK's, of any release."""
    inspector = sa.inspect(op.get_bind())
    if TABLE in inspector.get_view_names(schema=table_schema()):
        raise SchemaError(
            f"{TABLE!r} is a view, whose table has another name. Rename the view, or the table."
        )
    columns = inspector.get_columns(TABLE, schema=table_schema())
    found = {column["name"]: column for column in columns}
    present = {}
    for name in COLUMNS:
        old_name = OLD_NAMES.get(name, name)
        if name in found or old_name in found:
            present[name] = found[name if name in found else old_name]
    if missing := COLUMNS.keys() - present.keys() - LATER.keys():
        raise SchemaError(
            f"There is a table {TABLE!r} which is not the Zoho SDK's: it lacks the columns "
            f"{', '.join(sorted(missing))}. Rename it, or keep the tokens in another schema."
        )
    refuse_dependent_objects(TABLE, [column["name"] for column in present.values()])
    use_innodb(TABLE)
    counts_ids = not isinstance(present["id"]["type"], sa.String)
    if counts_ids and op.get_context().dialect.name == "postgresql":
        stop_counting()
    with altered(TABLE) as table:
        for name, column in present.items():
            adopt_column(table, name, column)
    for name in LATER:
        if name not in present:
            add_column(name)


def adopt_column(table: BatchOperations, name: str, column: ReflectedColumn) -> None:
    """Give a column the name that it has now, let it be empty, and make a numeric id text."""
    is_mysql = op.get_context().dialect.name in MYSQL_FAMILY
    if name != "id" and (column["name"] != name or not column["nullable"]):
        table.alter_column(
            column["name"],
            existing_type=column["type"],
            nullable=True,
            new_column_name=None if column["name"] == name else name,
        )
    elif name == "id" and not isinstance(column["type"], sa.String):
        table.alter_column(
            "id",
            existing_type=column["type"],
            type_=sa.String(20),
            existing_nullable=False,
            nullable=False,
            autoincrement=False if is_mysql else None,
            postgresql_using="id::varchar(20)",
        )


def stop_counting() -> None:
    """Let PostgreSQL's id no longer be a serial number."""
    preparer = op.get_context().dialect.identifier_preparer
    name = preparer.format_table(sa.table(TABLE, schema=table_schema()))
    op.execute(f"ALTER TABLE {name} ALTER COLUMN id DROP IDENTITY IF EXISTS")
    op.execute(f"ALTER TABLE {name} ALTER COLUMN id DROP DEFAULT")


def add_column(name: str) -> None:
    """Add a column in the place where the SDK, which reads by position, expects it.

    PostgreSQL adds columns at the end. The SDK has no store for PostgreSQL.
    """
    dialect = op.get_context().dialect
    column = sa.Column(name, COLUMNS[name])
    if dialect.name in MYSQL_FAMILY:
        table = dialect.identifier_preparer.format_table(sa.table(TABLE, schema=table_schema()))
        op.execute(f"ALTER TABLE {table} ADD COLUMN {name} VARCHAR(255) AFTER {LATER[name]}")
    elif dialect.name == "sqlite" and name != "api_domain":
        with altered(TABLE, recreate="always") as batch:
            batch.add_column(column, insert_after=LATER[name])
    else:
        op.add_column(TABLE, column, schema=table_schema())


@revision_step
def downgrade() -> None:
    """Drop the table, unless it holds tokens: it may have been there before us."""
    if is_offline():
        return
    holds_tokens = sa.select(sa.exists().select_from(sa.Table(TABLE, sa.MetaData())))
    if not op.get_bind().scalar(holds_tokens):
        op.drop_table(TABLE, schema=table_schema())
