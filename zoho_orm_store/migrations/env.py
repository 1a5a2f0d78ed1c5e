"""Alembic's environment of the installed package."""

from zoho_orm_store.migrations.environment import run

run()
