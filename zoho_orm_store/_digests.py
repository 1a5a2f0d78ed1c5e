"""Digests, by which stored tokens are looked up and kept unique; and the scope mixed into them.

A digest is exact whatever a column's collation, small whatever the token's length, and the same
whether or not the token is encrypted. What is hashed is part of the stored format: changing it
needs a migration.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

from zoho_orm_store._matching import identity_of, updatable_identities
from zoho_orm_store.records import DIGESTS

if TYPE_CHECKING:
    from zoho_orm_store._matching import Identity
    from zoho_orm_store.records import TokenRecord

__all__ = [
    "UNSCOPED",
    "Scope",
    "digest",
    "digests_of",
    "framed",
    "hash_of",
    "identity_digest",
    "updatable_digests",
]


@dataclass(frozen=True)
class Scope:
    """The values that every row of one tenant has in certain columns.

    Attributes:
        values: The value of each column, in the order of the columns' names.
    """

    values: tuple[tuple[str, object], ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns."""
        return tuple(name for name, _ in self.values)

    @property
    def parts(self) -> tuple[str, ...]:
        """The texts mixed into a digest, so that the digests of two tenants always differ."""
        return tuple(part for name, value in self.values for part in (name, str(value)))


UNSCOPED = Scope()


def framed(*parts: str) -> bytes:
    """Join texts, each with its length in front, so that none can run into the next.

    Lone surrogates are kept as they are.
    """
    encoded = [part.encode("utf-8", "surrogatepass") for part in parts]
    return b"".join([b"%d:%b" % (len(data), data) for data in encoded])


def hash_of(*parts: str) -> str:
    """The SHA-256 hash of texts in their order, as 64 hexadecimal characters."""
    return sha256(framed(*parts)).hexdigest()


def digest(field: str, value: str, scope: Scope = UNSCOPED) -> str:
    """The digest of one field's known value. The field's name and the scope are part of it."""
    return hash_of(field, value, *scope.parts)


def identity_digest(identity: Identity, scope: Scope = UNSCOPED) -> str:
    """The value of the unique column ``identity``."""
    parts = ("identity", identity.kind, identity.value, identity.client_id or "")
    return hash_of(*parts, *scope.parts)


def digests_of(record: TokenRecord, scope: Scope = UNSCOPED) -> dict[str, str | None]:
    """The digest columns of a record's row, the identity among them."""
    digests: dict[str, str | None] = {"identity": identity_digest(identity_of(record), scope)}
    for field, column in DIGESTS.items():
        value = getattr(record, field)
        digests[column] = None if value is None else digest(field, value, scope)
    return digests


def updatable_digests(asked: TokenRecord, scope: Scope = UNSCOPED) -> list[str]:
    """The digests of the identities that saving a record may update, its own first."""
    return [identity_digest(identity, scope) for identity in updatable_identities(asked)]
