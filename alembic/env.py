"""Alembic's environment of a checkout, on the database that ZOHO_ORM_STORE_URL names."""

from zoho_orm_store.migrations.environment import run

run()
