"""The statements on a table of refresh leases.

Times are epoch milliseconds by the server's clock, so that the clocks of its clients may differ.
SQLite goes by the clock of its one machine, in the parameter ``now``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    BigInteger,
    Integer,
    and_,
    bindparam,
    case,
    cast,
    delete,
    func,
    literal,
    or_,
    select,
    update,
)

from zoho_orm_store._sql.dialects import server_clock

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Table

__all__ = ["LeaseStatements"]

_SWEPT_AFTER = 60_000
"""Milliseconds after its end from which a lease is removed."""

_REFUSED_KEPT_FOR = 90 * 86_400_000
"""The same, if Zoho has refused its refresh: an administrator may look only after a while."""

_SWEPT_AT_ONCE = 100


class LeaseStatements:
    """The SQL for each operation on a table of leases.

    Args:
        table: The table of a model made with `RefreshLeaseMixin`.
        dialect_name: SQLAlchemy's name of the dialect.
        refused: The owner of a lease whose last refresh Zoho has refused for good.
    """

    def __init__(self, table: Table, dialect_name: str, refused: str) -> None:
        columns = table.c
        key = bindparam("lease_key", type_=columns.key.type)
        owner = bindparam("lease_owner", type_=columns.owner.type)
        clock = server_clock(dialect_name)
        now: ColumnElement[Any] = bindparam("now", type_=BigInteger())
        if clock is not None:
            now = cast(func.floor(clock * 1000), BigInteger)
        # SQLite keeps any text in an integer column. A cast makes a number of it.
        failures = cast(columns.failures, Integer)
        is_as_seen = and_(
            columns.owner == bindparam("seen_owner"), failures == bindparam("seen_failures")
        )
        is_refused = columns.owner == literal(refused, columns.owner.type)
        kept_for = case((is_refused, _REFUSED_KEPT_FOR), else_=_SWEPT_AFTER)
        has_long_ended = columns.expires_at < now - cast(kept_for, BigInteger)

        self.owner = select(columns.owner).where(columns.key == key)
        # The time left is computed in Python, which knows no overflow.
        self.holder = self.owner.add_columns(
            failures.label("failures"),
            cast(columns.expires_at, BigInteger).label("expires_at"),
            now.label("now"),
        )
        taken = {
            "owner": owner,
            "failures": bindparam("new_failures", type_=Integer()),
            "expires_at": now + bindparam("milliseconds", type_=BigInteger()),
        }
        self.new_lease = {"key": key, **taken}
        # The lease is also ours if an earlier attempt committed and lost its connection then.
        is_seen_or_ours = or_(is_as_seen, columns.owner == owner)
        self.take_seen = update(table).where(columns.key == key, is_seen_or_ours).values(taken)
        is_ours = and_(columns.key == key, columns.owner == owner)
        self.release = delete(table).where(is_ours)
        new_owner = bindparam("new_owner", type_=columns.owner.type)
        failed = {"owner": new_owner, "failures": columns.failures + 1, "expires_at": now}
        self.fail = update(table).where(is_ours).values(failed)
        self.refused = select(columns.key).where(is_refused)
        self.long_ended = select(columns.key).where(has_long_ended).limit(_SWEPT_AT_ONCE)
        is_among = columns.key.in_(bindparam("keys", expanding=True))
        self.sweep = delete(table).where(is_among, has_long_ended)
