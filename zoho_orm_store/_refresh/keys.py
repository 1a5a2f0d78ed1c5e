"""Which lease stands for a token's refresh."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoho_orm_store._digests import hash_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zoho_orm_store.records import TokenRecord

__all__ = ["key_to_refresh", "keys_to_release", "lease_key"]


def lease_key(
    field: str, value: str, user_name: str | None, scope_parts: tuple[str, ...] = ()
) -> str:
    """Return the key of the lease on one token's refresh or exchange.

    Args:
        field: ``"refresh_token"`` or ``"grant_token"``.
        value: The token that is refreshed or exchanged.
        user_name: The user: one refresh token under two users is two stored tokens.
        scope_parts: The scope: two tenants never wait for each other.
    """
    return hash_of("lease", field, value, user_name or "", *scope_parts)


def key_to_refresh(record: TokenRecord, scope_parts: tuple[str, ...]) -> str | None:
    """Return the lease for what the SDK is about to do; ``None`` if it can do nothing."""
    if record.refresh_token is not None:
        return lease_key("refresh_token", record.refresh_token, record.user_name, scope_parts)
    if record.access_token is None and record.grant_token is not None:
        return lease_key("grant_token", record.grant_token, record.user_name, scope_parts)
    return None


def keys_to_release(record: TokenRecord, scope_parts: tuple[str, ...]) -> Iterator[str]:
    """The leases under which a token that is being saved may have been refreshed.

    The user may have become known only after the refresh.
    """
    for field in ("refresh_token", "grant_token"):
        value = getattr(record, field)
        if value is not None:
            for user_name in {record.user_name, None}:
                yield lease_key(field, value, user_name, scope_parts)
