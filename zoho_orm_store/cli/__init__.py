"""The command line, ``zoho-orm-store``.

SQLAlchemy, Alembic and the Zoho SDK are imported by the commands that use them, so that ``--help``
answers at once.
"""

from zoho_orm_store.cli.app import app, main

# Each registers its commands, which --help lists in this order.
from zoho_orm_store.cli import schema, tokens, keys, doctor, demo  # noqa: F401 isort:skip

__all__ = ["app", "main"]
