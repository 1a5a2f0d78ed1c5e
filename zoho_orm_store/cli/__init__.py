"""The command line, ``zoho-orm-store``.

Commands use the package's public names as ``zoho_orm_store.name``, which imports SQLAlchemy,
Alembic or the Zoho SDK when a command needs it. So ``--help`` answers at once.
"""

from zoho_orm_store.cli.app import app, main

# Each module registers its commands, which --help lists in this order.
from zoho_orm_store.cli import schema, tokens, keys, doctor, loopback, demo  # noqa: F401 isort:skip

__all__ = ["app", "main"]
