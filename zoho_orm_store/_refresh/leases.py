"""The leases in a database, each operation in a transaction of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoho_orm_store._refresh.rules import Holder
from zoho_orm_store._schema import missing_leases
from zoho_orm_store._sql import leases as sql
from zoho_orm_store.errors import SchemaError

if TYPE_CHECKING:
    from sqlalchemy import Connection, Table

    from zoho_orm_store._database.database import Database

__all__ = ["DatabaseLeases"]


class DatabaseLeases:
    """Leases in a table; `zoho_orm_store._refresh.coordinator.Leases` explains the operations.

    Args:
        database: Runs the work.
        table: The table of a model made with `RefreshLeaseMixin`.
    """

    def __init__(self, database: Database, table: Table) -> None:
        self._database = database
        self._table = table

    def holder(self, key: str) -> Holder | None:
        row = self._database.read(sql.holder, self._table, key)
        return None if row is None else Holder(*row)

    def take(
        self, key: str, seen: Holder | None, owner: str, failures: int, seconds: float
    ) -> bool:
        return self._database.write(sql.take, self._table, key, seen, owner, failures, seconds)

    def release(self, key: str, owner: str) -> bool:
        return self._database.write(self.release_in, key, owner)

    def release_in(self, connection: Connection, key: str, owner: str) -> bool:
        """Give a lease back, as part of the caller's transaction."""
        return sql.release(connection, self._table, key, owner)

    def fail(self, key: str, owner: str) -> None:
        self._database.write(sql.fail, self._table, key, owner)

    def sweep(self) -> int:
        return self._database.write(sql.sweep, self._table)

    def check(self) -> None:
        """See that the table exists, before it is needed.

        Raises:
            SchemaError: It does not; the message says what to do.
            DatabaseError: The database refused or lost the operation.
        """
        try:
            self.holder("")
        except SchemaError:
            raise SchemaError(missing_leases(self._table.name)) from None
