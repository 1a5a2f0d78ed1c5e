"""Digests, by which stored tokens are looked up and kept unique; and the scope mixed into them.

A digest is exact whatever a column's collation, and small whatever the token's length. Without a
cipher it is a SHA-256 hash. With one it is keyed, so that a list of likely user names does not
tell whose digests they are. What is hashed is part of the stored format: changing it needs a
migration.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING, NamedTuple

from zoho_orm_store._matching import claim_of, identity_of, updatable_identities
from zoho_orm_store.records import DIGESTS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zoho_orm_store._matching import Identity
    from zoho_orm_store.records import TokenRecord

__all__ = [
    "KEYED",
    "PREFIX_LENGTH",
    "UNSCOPED",
    "DigestKey",
    "Digests",
    "KnownKeys",
    "Scope",
    "digests_of",
    "framed",
    "hash_of",
]

KEYED = "k"
"""What a keyed digest begins with, and no other: they are hexadecimal."""

_LENGTH = 64
PREFIX_LENGTH = 8
"""How many characters of a keyed digest tell its key."""


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


class DigestKey(NamedTuple):
    """A key for digests.

    Attributes:
        prefix: What the digests under it begin with; a fingerprint of the key's id.
        key: The key.
    """

    prefix: str
    key: bytes

    @classmethod
    def named(cls, key_id: str, key: bytes) -> DigestKey:
        """The key of a cipher that has an id."""
        return cls(_prefix_of(key_id), key)


class KnownKeys(NamedTuple):
    """The keys for digests at one time.

    Attributes:
        current: The key of the digests that are stored now; ``None`` for digests without a key.
        others: Other keys, under which tokens may have been stored.
    """

    current: DigestKey | None = None
    others: tuple[DigestKey, ...] = ()


def _no_keys() -> KnownKeys:
    return KnownKeys()


class Digests:
    """Makes the digests of the tokens in one scope.

    Args:
        scope: Mixed into every digest.
        keys: Returns the keys that are known, for a cipher that has keys for digests.
    """

    def __init__(
        self, scope: Scope = UNSCOPED, keys: Callable[[], KnownKeys] | None = None
    ) -> None:
        self._parts = scope.parts
        self._keys = keys or _no_keys
        self.are_keyed = keys is not None

    @property
    def prefix(self) -> str | None:
        """What the digests that are stored now begin with; ``None`` if they have no key."""
        current = self._keys().current
        return None if current is None else current.prefix

    @property
    def prefixes(self) -> set[str]:
        """What the digests under each known key begin with."""
        return {key.prefix for key in self._all_keys() if key is not None}

    def of(self, record: TokenRecord) -> dict[str, str | None]:
        """The digest columns of a record's row, the identity among them."""
        key = self._keys().current
        digests: dict[str, str | None] = {"identity": self._identity(key, identity_of(record))}
        for field, column in DIGESTS.items():
            value = getattr(record, field)
            digests[column] = None if value is None else self._digest(key, field, value)
        return digests

    def parameters(self, asked: TokenRecord) -> dict[str, object]:
        """The parameters of the lookups for what is known of a token, by digest column."""
        keys = self._all_keys()
        return {
            column: self._under(keys, field, value)
            for field, column in DIGESTS.items()
            if (value := getattr(asked, field)) is not None
        }

    def parameter(self, field: str, value: str) -> object:
        """The parameter by which a value is looked up: a list if there may be several keys."""
        return self._under(self._all_keys(), field, value)

    def _under(self, keys: Sequence[DigestKey | None], field: str, value: str) -> object:
        if not self.are_keyed:
            return self._digest(None, field, value)
        return [self._digest(key, field, value) for key in keys]

    def identity(self, record: TokenRecord) -> object:
        """The parameter by which a record's identity is looked up, as `parameter` returns it."""
        if not self.are_keyed:
            return self._identity(None, identity_of(record))
        return self.identities([identity_of(record)])

    def updatable(self, asked: TokenRecord) -> list[str]:
        """The digests of the identities that saving a record may update."""
        return self.identities(updatable_identities(asked))

    def identities(self, identities: Sequence[Identity]) -> list[str]:
        """The digests that identities may have, under every key."""
        keys = self._all_keys()
        return [self._identity(key, each) for each in identities for key in keys]

    def is_identity(self, record: TokenRecord, stored: str) -> bool:
        """Whether a stored identity is that of a record, in this scope."""
        return stored in self.identities([identity_of(record)])

    def claim(self, asked: TokenRecord) -> str:
        """The identity by which saves of one refresh token wait for each other."""
        return self._shared(claim_of(asked))

    def turn(self, saved: TokenRecord) -> str:
        """The identity by which first saves under different keys wait for each other."""
        return self._shared(identity_of(saved)._replace(kind="turn"))

    def _shared(self, identity: Identity) -> str:
        """A digest that is the same for all who know the same keys, whichever encrypts."""
        keys = sorted(key.key for key in self._all_keys() if key is not None)
        if not keys:
            return self._identity(None, identity)
        return self._identity(DigestKey(KEYED, sha256(b"".join(keys)).digest()), identity)

    def _all_keys(self) -> tuple[DigestKey | None, ...]:
        """The present key, the others, and none: tokens may have been stored without a cipher."""
        current, others = self._keys()
        return (*others, None) if current is None else (current, *others, None)

    def _digest(self, key: DigestKey | None, field: str, value: str) -> str:
        return _hash(key, field, value, *self._parts)

    def _identity(self, key: DigestKey | None, identity: Identity) -> str:
        kind, value, client_id = identity
        return _hash(key, "identity", kind, value, client_id or "", *self._parts)


def digests_of(record: TokenRecord, scope: Scope = UNSCOPED) -> dict[str, str | None]:
    """The digest columns of a record's row without a cipher, the identity among them."""
    return Digests(scope).of(record)


def _hash(key: DigestKey | None, *parts: str) -> str:
    if key is None:
        return hash_of(*parts)
    digest = hmac.digest(key.key, framed(*parts), "sha256").hex()
    return key.prefix + digest[: _LENGTH - len(key.prefix)]


@lru_cache(64)
def _prefix_of(key_id: str) -> str:
    return KEYED + hash_of("digest key", key_id)[: PREFIX_LENGTH - len(KEYED)]
