"""Refresh leases: who of many workers may refresh a token now.

Each operation is a short piece of work on a connection, in the caller's transaction. Nothing is
held in the database while a lease lasts but its row.
"""

from __future__ import annotations

from contextlib import suppress
from time import time
from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import exc

from zoho_orm_store.hashing import hash_of
from zoho_orm_store.statements import FAILED, lease_statements_for

if TYPE_CHECKING:
    from sqlalchemy import Connection, Table

    from zoho_orm_store.scopes import Scope
    from zoho_orm_store.statements import LeaseStatements

__all__ = ["Holder", "Leases", "lease_key"]

_SWEPT_AFTER = 60.0


class Holder(NamedTuple):
    """Who has a lease, or what became of it.

    Attributes:
        owner: Whom it was given to last, or the mark that it has left (`failures`).
        left: Seconds until it ends; negative, where it has ended.
    """

    owner: str
    left: float

    @property
    def is_over(self) -> bool:
        """Whether anyone may take the lease."""
        return self.failures > 0 or self.left <= 0

    @property
    def failures(self) -> int:
        """How many refreshes in a row have failed; 0, if the last one did not."""
        return int(self.owner[len(FAILED) :]) if self.owner.startswith(FAILED) else 0


def lease_key(field: str, value: str, user_name: str | None, scope: Scope) -> str:
    """The key of the lease on one token's refresh or exchange.

    Args:
        field: ``"refresh_token"`` or ``"grant_token"``.
        value: What is refreshed or exchanged.
        user_name: For whom: one refresh token under two users is two stored tokens (rule B10).
        scope: What fences off a tenant: another tenant's refresh is another one.
    """
    return hash_of("lease", field, value, user_name or "", *scope.parts).hex()


class Leases:
    """The leases in a table, through a connection.

    Args:
        connection: What to work on; the caller owns its transaction.
        table: The table of a model made with `RefreshLeaseMixin`.
    """

    def __init__(self, connection: Connection, table: Table) -> None:
        self._connection = connection
        self._statements: LeaseStatements = lease_statements_for(table, connection.dialect.name)

    def holder(self, key: str) -> Holder | None:
        """Return who has a lease, or had it last; ``None``, if it was given back."""
        row = self._connection.execute(
            self._statements.holder, self._clock() | {"key": key}
        ).first()
        return None if row is None else Holder(row.owner, row.left / 1000)

    def take(
        self, key: str, owner: str, seconds: float, before: Holder | None = None
    ) -> Holder | None:
        """Take a lease that is over, or renew one's own.

        Args:
            key: The lease.
            owner: Who wants it.
            seconds: For how long.
            before: What `holder` has returned. If somebody else was there since, it is not taken.

        Returns:
            Who has it now.
        """
        parameters = self._clock() | {"key": key, "owner": owner}
        parameters |= {"before": "" if before is None else before.owner}
        taking = parameters | {"milliseconds": int(seconds * 1000)}
        if not self._statements.take_may_raise:
            self._connection.execute(self._statements.take, taking)
        else:
            self._connection.execute(self._statements.drop_ended, parameters)
            with suppress(exc.IntegrityError), self._connection.begin_nested():
                self._connection.execute(self._statements.take, taking)
        return self.holder(key)

    def release(self, key: str, owner: str) -> bool:
        """Give a lease back.

        Returns:
            Whether the owner still had it.
        """
        released = self._connection.execute(self._statements.release, {"key": key, "owner": owner})
        return released.rowcount > 0

    def fail(self, key: str, owner: str, failures: int) -> None:
        """Give a lease back whose refresh has failed, and leave a mark for those who wait.

        Args:
            key: The lease.
            owner: Who has it; nothing happens, if that is another one by now.
            failures: How many refreshes in a row have failed with this one.
        """
        mark = {"lease_key": key, "failed_owner": owner, "mark": f"{FAILED}{failures}"}
        self._connection.execute(self._statements.fail, self._clock() | mark)

    def sweep(self) -> int:
        """Remove leases that ended a minute ago or longer: failures, and owners that were killed.

        Returns:
            How many there were.
        """
        ended = self._clock() | {"milliseconds": int(_SWEPT_AFTER * 1000)}
        keys = self._connection.scalars(self._statements.long_ended, ended).all()
        if not keys:
            return 0
        return self._connection.execute(self._statements.sweep, ended | {"keys": keys}).rowcount

    def _clock(self) -> dict[str, object]:
        return {} if self._statements.has_clock else {"now": int(time() * 1000)}
