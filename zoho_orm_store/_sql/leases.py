"""The SQL of the refresh leases. Each function acts on a connection, in its caller's transaction.

Times are epoch milliseconds by the server's clock, so that the clocks of its clients may differ.
SQLite goes by the clock of its one machine, in the parameter ``now``.
"""

from __future__ import annotations

import time
from functools import cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    BigInteger,
    Integer,
    and_,
    bindparam,
    cast,
    delete,
    func,
    literal,
    or_,
    select,
    update,
)

from zoho_orm_store._sql.dialects import insert_unless_present, limit_lock_wait, server_clock

if TYPE_CHECKING:
    from typing import TypeAlias

    from sqlalchemy import ColumnElement, Connection, Table

    HolderRow: TypeAlias = tuple[str, int, float]
    """A lease's owner, its failures in a row, and the seconds until it ends."""

__all__ = ["LeaseStatements", "fail", "holder", "lease_statements_for", "release", "sweep", "take"]

_SWEPT_AFTER = 60_000
"""Milliseconds after its end from which a lease is removed."""

_SWEPT_AT_ONCE = 100
_NOBODY = ""
"""The owner of a lease whose refresh has failed."""


class LeaseStatements:
    """The statements for one table of leases.

    Args:
        table: The table of a model made with `RefreshLeaseMixin`.
        dialect_name: SQLAlchemy's name of the dialect.
    """

    def __init__(self, table: Table, dialect_name: str) -> None:
        columns = table.c
        key = bindparam("lease_key", type_=columns.key.type)
        owner = bindparam("lease_owner", type_=columns.owner.type)
        clock = server_clock(dialect_name)
        self.has_server_clock = clock is not None
        now: ColumnElement[Any] = (
            bindparam("now", type_=BigInteger())
            if clock is None
            else cast(func.floor(clock * 1000), BigInteger)
        )
        taken: dict[str, ColumnElement[Any]] = {
            "owner": owner,
            "failures": bindparam("new_failures", type_=Integer()),
            "expires_at": now + bindparam("milliseconds", type_=BigInteger()),
        }
        # SQLite keeps any text in an integer column. A cast makes a number of it.
        failures = cast(columns.failures, Integer)
        is_owned = and_(columns.key == key, columns.owner == owner)
        is_as_seen = and_(
            columns.owner == bindparam("seen_owner"), failures == bindparam("seen_failures")
        )
        has_long_ended = columns.expires_at < now - _SWEPT_AFTER

        self.owner = select(columns.owner).where(columns.key == key)
        # The time left is computed in Python, which knows no overflow.
        self.holder = self.owner.add_columns(
            failures.label("failures"),
            cast(columns.expires_at, BigInteger).label("expires_at"),
            now.label("now"),
        )
        self.new_lease: dict[str, ColumnElement[Any]] = {"key": key, **taken}
        # The lease is also ours if an earlier attempt committed and lost its connection then.
        self.take_seen = (
            update(table)
            .where(columns.key == key, or_(is_as_seen, columns.owner == owner))
            .values(taken)
        )
        self.release = delete(table).where(is_owned)
        self.fail = (
            update(table)
            .where(is_owned)
            .values(owner=literal(_NOBODY), failures=columns.failures + 1, expires_at=now)
        )
        self.long_ended = select(columns.key).where(has_long_ended).limit(_SWEPT_AT_ONCE)
        is_among = columns.key.in_(bindparam("keys", expanding=True))
        self.sweep = delete(table).where(is_among, has_long_ended)

    def clock(self) -> dict[str, int]:
        """The parameter ``now``, if the statements need it."""
        return {} if self.has_server_clock else {"now": int(time.time() * 1000)}


# A cache and not a cached_property: before Python 3.12 that takes a lock, which a fork copies.
@cache
def lease_statements_for(table: Table, dialect_name: str) -> LeaseStatements:
    """Return the statements for a table and a dialect, made once."""
    return LeaseStatements(table, dialect_name)


def holder(connection: Connection, table: Table, key: str) -> HolderRow | None:
    """Return who has a lease, or that its last refresh failed; ``None`` if it was released."""
    statements = _statements(connection, table)
    row = connection.execute(statements.holder, {"lease_key": key, **statements.clock()}).first()
    if row is None:
        return None
    return row.owner, row.failures, (row.expires_at - row.now) / 1000


def take(
    connection: Connection,
    table: Table,
    key: str,
    seen: HolderRow | None,
    owner: str,
    failures: int,
    seconds: float,
) -> bool:
    """Take a lease if its row is still as `holder` has shown it.

    Args:
        connection: Its transaction is the caller's.
        table: The table of leases.
        key: The lease.
        seen: What `holder` returned.
        owner: The new owner, a name that was never used before.
        failures: How many refreshes in a row have failed before this one.
        seconds: How long the lease lasts.

    Returns:
        Whether ``owner`` has the lease now.
    """
    statements = _statements(connection, table)
    parameters: dict[str, object] = {
        "lease_key": key,
        "lease_owner": owner,
        "new_failures": failures,
        "milliseconds": int(seconds * 1000),
        **statements.clock(),
    }
    limit_lock_wait(connection)
    if seen is None:
        insert_unless_present(connection, table, parameters, statements.new_lease)
        return bool(connection.scalar(statements.owner, {"lease_key": key}) == owner)
    parameters["seen_owner"], parameters["seen_failures"], _ = seen
    return connection.execute(statements.take_seen, parameters).rowcount > 0


def release(connection: Connection, table: Table, key: str, owner: str) -> bool:
    """Remove a lease, and return whether ``owner`` still had it."""
    statement = _statements(connection, table).release
    return connection.execute(statement, {"lease_key": key, "lease_owner": owner}).rowcount > 0


def fail(connection: Connection, table: Table, key: str, owner: str) -> None:
    """Free a lease whose refresh has failed, and count the failure, if ``owner`` still has it."""
    statements = _statements(connection, table)
    parameters = {"lease_key": key, "lease_owner": owner, **statements.clock()}
    connection.execute(statements.fail, parameters)


def sweep(connection: Connection, table: Table) -> int:
    """Remove at most a hundred leases that ended a minute ago or earlier, and return how many."""
    statements = _statements(connection, table)
    now = statements.clock()
    keys = connection.scalars(statements.long_ended, now).all()
    if not keys:
        return 0
    return connection.execute(statements.sweep, {"keys": keys, **now}).rowcount


def _statements(connection: Connection, table: Table) -> LeaseStatements:
    return lease_statements_for(table, connection.dialect.name)
