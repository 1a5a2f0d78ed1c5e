"""A column for user names that holds encrypted ones.

This file is frozen.

Revision: zoho_orm_store_0003
Revises: zoho_orm_store_0002
"""

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql

from zoho_orm_store.errors import SchemaError
from zoho_orm_store.migrations.support import (
    altered,
    is_offline,
    op,
    refuse_dependent_objects,
    revision_step,
    table_schema,
)

revision = "zoho_orm_store_0003"
down_revision = "zoho_orm_store_0002"
branch_labels = None
depends_on = None

TABLE = "oauthtoken"
COLUMN = "user_name"
MARK = "$zos1$"  # what an encrypted value begins with
LITERAL = "$zos1$$"  # what plain text gets in front that begins like an encrypted value
SECRETS = ("client_secret", "refresh_token", "access_token", "grant_token")
KEYED = "k"  # what a digest under a key begins with, and no other
MYSQL_FAMILY = ("mysql", "mariadb")
EXACT: dict[str, Any] = {"charset": "utf8mb4", "collation": "utf8mb4_bin"}

SHORT: Any = sa.String(512).with_variant(mysql.VARCHAR(512, **EXACT), *MYSQL_FAMILY)
LONG: Any = sa.Text().with_variant(mysql.TEXT(**EXACT), *MYSQL_FAMILY)

rows = sa.Table(
    TABLE,
    sa.MetaData(),
    *(sa.Column(name, sa.String) for name in (COLUMN, "identity", *SECRETS)),
)


@revision_step
def upgrade() -> None:
    refuse_dependent_objects(TABLE, [COLUMN])
    if not is_long_already():
        with altered(TABLE) as table:
            table.alter_column(COLUMN, existing_type=SHORT, type_=LONG, existing_nullable=True)
    # The rows of a table that was restored without its revision may be encrypted already.
    is_plain = [~sa.func.coalesce(is_encrypted(name), sa.false()) for name in SECRETS]
    lookalikes = sa.update(rows).where(is_encrypted(COLUMN), *is_plain)
    op.execute(lookalikes.values({COLUMN: sa.literal(LITERAL, sa.String) + rows.c[COLUMN]}))


@revision_step
def downgrade() -> None:
    refuse_dependent_objects(TABLE, [COLUMN])
    if not is_offline():
        refuse_encrypted_tokens()
    plain = sa.func.substr(rows.c[COLUMN], len(LITERAL) + 1)
    op.execute(sa.update(rows).where(begins_with(COLUMN, LITERAL)).values({COLUMN: plain}))
    with altered(TABLE) as table:
        table.alter_column(COLUMN, existing_type=LONG, type_=SHORT, existing_nullable=True)


def is_long_already() -> bool:
    """Whether the revision before has known of this one, and given the column its type."""
    if is_offline():
        return False
    columns = sa.inspect(op.get_bind()).get_columns(TABLE, schema=table_schema())
    return any(isinstance(c["type"], sa.Text) for c in columns if c["name"] == COLUMN)


def begins_with(name: str, beginning: str) -> sa.ColumnElement[bool]:
    return sa.func.substr(rows.c[name], 1, len(beginning)) == beginning


def is_encrypted(name: str) -> sa.ColumnElement[bool]:
    return sa.and_(begins_with(name, MARK), ~begins_with(name, LITERAL))


def refuse_encrypted_tokens() -> None:
    """The revision before knows neither encrypted user names nor keyed digests."""
    encrypted = (is_encrypted(name) for name in (COLUMN, *SECRETS))
    condition = sa.or_(begins_with("identity", KEYED), *encrypted)
    number = op.get_bind().scalar(sa.select(sa.func.count()).select_from(rows).where(condition))
    if number:
        raise SchemaError(
            f"{number} tokens in the table {TABLE} are encrypted, in a way that the revision "
            "before zoho_orm_store_0003 does not know. Nothing was changed. Run first, with the "
            "keys in ZOHO_ORM_STORE_KEYS, at zoho_orm_store_0003: zoho-orm-store decrypt"
        )
