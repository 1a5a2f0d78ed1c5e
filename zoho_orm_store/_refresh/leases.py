"""The leases in a database, each operation in a transaction of its own."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from zoho_orm_store._refresh.rules import REFUSED, Holder
from zoho_orm_store._schema import missing_leases
from zoho_orm_store._sql.dialects import insert_unless_present, limit_lock_wait
from zoho_orm_store._sql.leases import LeaseStatements
from zoho_orm_store.errors import SchemaError

if TYPE_CHECKING:
    from sqlalchemy import Connection, Table

    from zoho_orm_store._database.database import Database

__all__ = ["DatabaseLeases"]

_RETRY_FOR = 3.0
"""Seconds in which a lease is tried to be written: without one, a caller refreshes all the same."""


class DatabaseLeases:
    """Leases in a table; `zoho_orm_store._refresh.coordinator.Leases` explains the operations.

    Args:
        database: Runs the work.
        table: The table of a model made with `RefreshLeaseMixin`.
    """

    def __init__(self, database: Database, table: Table) -> None:
        self._database = database
        self._table = table
        self._statements = LeaseStatements(table, database.dialect_name, REFUSED)

    def holder(self, key: str) -> Holder | None:
        def read(connection: Connection) -> Holder | None:
            parameters = {"lease_key": key, "now": _now()}
            row = connection.execute(self._statements.holder, parameters).first()
            if row is None:
                return None
            return Holder(row.owner, row.failures, left=(row.expires_at - row.now) / 1000)

        return self._database.read(read)

    def take(
        self, key: str, seen: Holder | None, owner: str, failures: int, seconds: float
    ) -> bool:
        def write(connection: Connection) -> bool:
            limit_lock_wait(connection)
            lease: dict[str, object] = {
                "lease_key": key,
                "lease_owner": owner,
                "new_failures": failures,
                "milliseconds": int(seconds * 1000),
                "now": _now(),
            }
            if seen is not None:
                lease |= {"seen_owner": seen.owner, "seen_failures": seen.failures}
                return connection.execute(self._statements.take_seen, lease).rowcount > 0
            insert_unless_present(connection, self._table, lease, self._statements.new_lease)
            return bool(connection.scalar(self._statements.owner, {"lease_key": key}) == owner)

        return self._database.write(write, retry_for=_RETRY_FOR)

    def release(self, key: str, owner: str) -> bool:
        return self._database.write(self.release_in, key, owner, retry_for=_RETRY_FOR)

    def release_in(self, connection: Connection, key: str, owner: str) -> bool:
        """Give a lease back, as part of the caller's transaction."""
        parameters = {"lease_key": key, "lease_owner": owner}
        return connection.execute(self._statements.release, parameters).rowcount > 0

    def fail(self, key: str, owner: str, *, refused: bool = False) -> None:
        def write(connection: Connection) -> None:
            parameters = {"lease_key": key, "lease_owner": owner, "now": _now()}
            parameters["new_owner"] = REFUSED if refused else ""
            connection.execute(self._statements.fail, parameters)

        self._database.write(write, retry_for=_RETRY_FOR)

    def sweep(self) -> int:
        def write(connection: Connection) -> int:
            now = {"now": _now()}
            keys = connection.scalars(self._statements.long_ended, now).all()
            if not keys:
                return 0
            return connection.execute(self._statements.sweep, {"keys": keys, **now}).rowcount

        return self._database.write(write, retry_for=_RETRY_FOR)

    def refused(self) -> frozenset[str]:
        """Return the keys of the leases whose last refresh Zoho has refused for good."""
        return self._database.read(
            lambda connection: frozenset(connection.scalars(self._statements.refused))
        )

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


def _now() -> int:
    """The parameter ``now``, which the statements for a server leave out."""
    return int(time.time() * 1000)
