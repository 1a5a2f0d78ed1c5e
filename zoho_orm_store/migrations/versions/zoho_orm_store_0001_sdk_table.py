"""The ten-column table that the SDK documents, made new or adopted as it stands.

Revision: zoho_orm_store_0001
Revises: nothing
"""

import sqlalchemy as sa
from alembic import context, op

from zoho_orm_store.errors import SchemaError

revision = "zoho_orm_store_0001"
down_revision = None
branch_labels = ("zoho_orm_store",)
depends_on = None

TABLE = "oauthtoken"

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


def upgrade() -> None:
    if not context.is_offline_mode() and sa.inspect(op.get_bind()).has_table(TABLE):
        adopt()
    else:
        op.create_table(
            TABLE,
            *(sa.Column(name, type_, primary_key=name == "id") for name, type_ in COLUMNS.items()),
        )


def adopt() -> None:
    """Take over a table of the SDK's; its older releases had no ``api_domain``."""
    present = {column["name"] for column in sa.inspect(op.get_bind()).get_columns(TABLE)}
    missing = set(COLUMNS) - present
    if missing - {"api_domain"}:
        raise SchemaError(
            f"There is a table {TABLE!r} which is not the Zoho SDK's: it lacks the columns "
            f"{', '.join(sorted(missing))}. Rename it, or keep the tokens in another schema."
        )
    for name in missing:
        op.add_column(TABLE, sa.Column(name, COLUMNS[name]))


def downgrade() -> None:
    """Drop the table, unless it holds tokens: it may have been there before us."""
    if context.is_offline_mode():
        return
    holds_tokens = sa.select(sa.exists().select_from(sa.table(TABLE)))
    if not op.get_bind().scalar(holds_tokens):
        op.drop_table(TABLE)
