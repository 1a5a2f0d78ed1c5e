"""SHA-256 digests by which stored tokens are looked up and kept unique.

A digest is exact whatever a column's collation, small whatever the token's length, and the same
whether or not the token is encrypted (rule A2). What is hashed is part of the stored format: a
change needs a migration.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoho_orm_store.hashing import hash_of
from zoho_orm_store.matching import identities_met, identity_of
from zoho_orm_store.scopes import EVERYTHING

if TYPE_CHECKING:
    from zoho_orm_store.matching import Identity
    from zoho_orm_store.record import TokenRecord
    from zoho_orm_store.scopes import Scope

__all__ = ["DIGEST_COLUMNS", "digest", "digests_met", "digests_of", "identity_digest"]

DIGEST_COLUMNS = {
    "user_name": "user_digest",
    "client_id": "client_digest",
    "access_token": "access_digest",
    "refresh_token": "refresh_digest",
    "grant_token": "grant_digest",
}
"""The column that holds the digest of each field by which tokens are compared."""


def digest(field: str, value: str, scope: Scope = EVERYTHING) -> str:
    """The digest of one field's value, as 64 hexadecimal characters.

    Args:
        field: The field's name, part of what is hashed.
        value: A known value.
        scope: What fences off a tenant, part of what is hashed.
    """
    return hash_of(field, value, *scope.parts).hex()


def identity_digest(identity: Identity, scope: Scope = EVERYTHING) -> str:
    """The digest that the unique column ``identity`` holds (rule E4)."""
    client_id = identity.client_id or ""
    parts = ("identity", identity.kind, identity.value, client_id)
    return hash_of(*parts, *scope.parts).hex()


def digests_of(record: TokenRecord, scope: Scope = EVERYTHING) -> dict[str, str | None]:
    """The digest columns of a record's row, the identity among them."""
    digests: dict[str, str | None] = {"identity": identity_digest(identity_of(record), scope)}
    for field, column in DIGEST_COLUMNS.items():
        value = getattr(record, field)
        digests[column] = None if value is None else digest(field, value, scope)
    return digests


def digests_met(asked: TokenRecord, scope: Scope = EVERYTHING) -> list[str]:
    """The digests of the identities that a record may update, its own first."""
    return [identity_digest(identity, scope) for identity in identities_met(asked)]
