"""Which tokens are of no more use until their user logs in again."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import zoho_orm_store

if TYPE_CHECKING:
    from zoho_orm_store import TokenRecord
    from zoho_orm_store._database.database import Database
    from zoho_orm_store.cli.target import Target

__all__ = ["NO_REFRESH_TOKEN", "REFUSED_BY_ZOHO", "Logins"]

NO_REFRESH_TOKEN = "the access token has ended, and there is no refresh token"  # noqa: S105
REFUSED_BY_ZOHO = "Zoho has refused to refresh the token"


class Logins:
    """Knows which tokens need a new login, from what workers have noted in the refresh leases.

    Args:
        target: The tokens. Without the model of their leases, or the tenants' scope, it is not
            known what Zoho has refused.
        database: Their database, whose table of leases is read now.

    Raises:
        SchemaError: The project's own table of leases does not exist.
    """

    def __init__(self, target: Target, database: Database) -> None:
        self._scope_parts = target.scope_parts
        self._refused: frozenset[str] = frozenset()
        if target.lease_model is not None:
            from zoho_orm_store._refresh.leases import DatabaseLeases

            if target.lease_model is not zoho_orm_store.RefreshLease:
                target.check_lease_table(database)
            self._refused = DatabaseLeases(database, target.lease_table).refused()

    def reason_for_new(self, record: TokenRecord) -> str | None:
        """Say why a token needs a new login; ``None`` if it does not, as far as is known."""
        from zoho_orm_store._refresh.rules import key_to_refresh

        if record.refresh_token is not None:
            refused = self._refused
            is_refused = refused and key_to_refresh(record, self._scope_parts) in refused
            return REFUSED_BY_ZOHO if is_refused else None
        if record.access_token is None:
            return None if record.grant_token is not None else NO_REFRESH_TOKEN
        has_ended = record.expiry_time is not None and record.expiry_time <= time.time() * 1000
        return NO_REFRESH_TOKEN if has_ended else None
