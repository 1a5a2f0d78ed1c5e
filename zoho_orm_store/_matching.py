"""Which stored token is meant, and what becomes of it.

Pure functions over `TokenRecord`: the SQL operations and the store in memory both follow them.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from enum import Enum
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

from zoho_orm_store.errors import InvalidTokenError, UserMismatchError
from zoho_orm_store.records import TEXTS, is_storable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from zoho_orm_store.records import TokenRecord

__all__ = [
    "Identity",
    "Lookup",
    "check_credentials",
    "check_owner",
    "filled",
    "identity_of",
    "is_absorbed",
    "lookups_to_find",
    "lookups_to_save",
    "matches",
    "merged",
    "plan_update",
    "updatable_identities",
    "without_earlier_pair",
    "without_overtaken_pair",
]

_CREDENTIALS = ("access_token", "refresh_token", "grant_token")
_TEXTS_OUTSIDE_THE_PAIR = tuple(name for name in TEXTS if name != "access_token")


class Lookup(Enum):
    """A way to tell which stored token is meant; its value is the field that must be equal."""

    ID = "id"
    USER = "user_name"
    ACCESS = "access_token"
    GRANT = "grant_token"
    REFRESH = "refresh_token"
    IDENTITY = "identity"


class Identity(NamedTuple):
    """What makes a stored token unique.

    Attributes:
        kind: The field that identifies the token.
        value: That field's value.
        client_id: The client, part of every identity, since a match never crosses clients.
    """

    kind: str
    value: str
    client_id: str | None


def lookups_to_find(asked: TokenRecord) -> tuple[Lookup, ...]:
    """The lookups by which a token is found, in order. A known id decides alone."""
    return (Lookup.ID,) if asked.id else _lookups_besides_id(asked)


def lookups_to_save(asked: TokenRecord) -> tuple[Lookup, ...]:
    """The lookups for the row that a save updates, in order.

    The last one is the token's own identity: an access token asked for together with its client
    has no lookup of its own, yet saving it twice must not make two rows.
    """
    lookups = _lookups_besides_id(asked)
    if asked.id:
        lookups = (Lookup.ID, *lookups)
    if identity_of(asked).kind == Lookup.ACCESS.value and Lookup.ACCESS not in lookups:
        lookups = (*lookups, Lookup.IDENTITY)
    return lookups


def _lookups_besides_id(asked: TokenRecord) -> tuple[Lookup, ...]:
    applicable = [Lookup.USER, Lookup.GRANT, Lookup.REFRESH]
    if not asked.client_id and not asked.client_secret:
        applicable.insert(1, Lookup.ACCESS)
    return tuple(lookup for lookup in applicable if _knows(asked, lookup))


def _knows(asked: TokenRecord, lookup: Lookup) -> bool:
    value: str | None = getattr(asked, lookup.value)
    return value is not None and is_storable(lookup.value, value)


def matches(lookup: Lookup, asked: TokenRecord, stored: TokenRecord) -> bool:
    """Whether a lookup finds a stored token.

    Except by id, it never finds one whose user or client is known to differ.
    """
    if lookup is Lookup.ID:
        return asked.id == stored.id
    if lookup is Lookup.IDENTITY:
        return identity_of(stored) in updatable_identities(asked)
    return (
        getattr(asked, lookup.value) == getattr(stored, lookup.value)
        and _agree(asked.user_name, stored.user_name)
        and _agree(asked.client_id, stored.client_id)
    )


def _agree(one: str | None, other: str | None) -> bool:
    return one is None or other is None or one == other


def identity_of(record: TokenRecord) -> Identity:
    """What identifies a record's row.

    User and client; without a known user the refresh token; without that the grant token, then
    the access token. A row of another tool that has none of these is identified by its id.
    """
    for lookup in (Lookup.USER, Lookup.REFRESH, Lookup.GRANT, Lookup.ACCESS):
        value = getattr(record, lookup.value)
        if value:
            return Identity(lookup.value, value, record.client_id)
    return Identity(Lookup.ID.value, record.id or "", None)


def updatable_identities(asked: TokenRecord) -> tuple[Identity, ...]:
    """The identities that saving a record may update: its own, then the one without a client."""
    own = identity_of(asked)
    return (own,) if own.client_id is None else (own, own._replace(client_id=None))


def check_credentials(asked: TokenRecord) -> None:
    """Refuse to insert a token without any credential.

    Raises:
        InvalidTokenError: No access token, refresh token or grant token is known.
    """
    if not any(getattr(asked, name) for name in _CREDENTIALS):
        raise InvalidTokenError(
            "The token has no access token, refresh token or grant token, "
            "so there is nothing to store. Log in first, or set one of them."
        )


def check_owner(asked: TokenRecord, stored: TokenRecord) -> None:
    """Refuse to put one user's credentials into another user's row.

    Raises:
        UserMismatchError: Both users are known and differ.
    """
    if not _agree(asked.user_name, stored.user_name):
        raise UserMismatchError(
            f"The stored token with id {stored.id!r} belongs to user {stored.user_name!r}, "
            f"not to {asked.user_name!r}; nothing was saved. "
            "Clear the token's id to save it as this user's own."
        )


def filled(asked: TokenRecord, stored: TokenRecord) -> TokenRecord:
    """The asked token with its unknown values taken from the stored one.

    The access token and its expiry are one pair: never one token's expiry with another's access
    token.
    """
    values = {
        name: getattr(asked, name) or getattr(stored, name) for name in _TEXTS_OUTSIDE_THE_PAIR
    }
    same_access_token = asked.access_token == stored.access_token
    takes_expiry = same_access_token and asked.expiry_time is None
    pair = stored if takes_expiry or _stored_pair_wins(asked, stored) else asked
    return replace(asked, **values, access_token=pair.access_token, expiry_time=pair.expiry_time)


def _stored_pair_wins(asked: TokenRecord, stored: TokenRecord) -> bool:
    if asked.access_token is None:
        return stored.access_token is not None
    return (
        asked.access_token != stored.access_token
        and asked.expiry_time is not None
        and stored.expiry_time is not None
        and stored.expiry_time > asked.expiry_time
    )


def merged(stored: TokenRecord, asked: TokenRecord) -> TokenRecord:
    """The stored token after a save: known values overwrite, unknown ones leave what is stored.

    A new access token of unknown expiry clears the stored expiry, which belonged to the old one.
    The row keeps its id.
    """
    is_new_access_token = asked.access_token not in (None, stored.access_token)
    expiry_time = asked.expiry_time
    if expiry_time is None and not is_new_access_token:
        expiry_time = stored.expiry_time
    values = {name: getattr(asked, name) or getattr(stored, name) for name in TEXTS}
    values["id"] = stored.id
    return replace(stored, **values, expiry_time=expiry_time)


def without_earlier_pair(asked: TokenRecord, stored: TokenRecord) -> TokenRecord:
    """The asked token, without its access token and expiry if the stored one expires later."""
    if (stored.expiry_time or 0) > (asked.expiry_time or 0):
        return replace(asked, access_token=None, expiry_time=None)
    return asked


def without_overtaken_pair(
    asked: TokenRecord, stored: TokenRecord, seen: TokenRecord, now: int
) -> TokenRecord:
    """The asked token, without its access token and expiry if another caller was faster.

    The expiries do not tell: a process that was suspended computed its own when it woke up.

    Args:
        asked: The token that a caller saves after a refresh.
        stored: The token as it is now.
        seen: The token as it was when the refresh began.
        now: The current time in epoch milliseconds.
    """
    is_live = stored.expiry_time is None or stored.expiry_time > now
    if is_live and stored.access_token not in (None, seen.access_token):
        return replace(asked, access_token=None, expiry_time=None)
    return asked


def plan_update(
    stored: TokenRecord,
    asked: TokenRecord,
    find_absorbed: Callable[[TokenRecord], Iterable[TokenRecord]],
) -> tuple[TokenRecord, list[str | None]]:
    """What a save makes of the row it updates, and of rows that turn out to be the same token.

    When several rows become one, the row that already has the identity keeps its id, because
    that is the id which other workers know.

    Args:
        stored: The row that the asked token means.
        asked: What is known of the token.
        find_absorbed: Finds the other rows for which `is_absorbed` holds. It is called only if
            the save learns something that may tie its row to another one.

    Returns:
        The row to write, and the ids of the rows to delete first.

    Raises:
        UserMismatchError: The row is another user's.
    """
    check_owner(asked, stored)
    saved = merged(stored, asked)
    if identity_of(saved) == identity_of(stored) and saved.refresh_token == stored.refresh_token:
        return saved, []
    others = list(find_absorbed(saved))
    if not others:
        return saved, []
    rows = sorted((stored, *others), key=lambda row: row.updated_at or datetime.min)
    kept = next((row for row in others if identity_of(row) == identity_of(saved)), stored)
    newest = merged(reduce(merged, rows), asked)
    newest = replace(newest, id=kept.id, created_at=kept.created_at)
    return newest, [row.id for row in rows if row.id != kept.id]


def is_absorbed(other: TokenRecord, saved: TokenRecord) -> bool:
    """Whether another row turns out to be the token that is being saved.

    It is if it has the same identity, or if it has no user and the same refresh token.
    """
    if identity_of(other) == identity_of(saved):
        return True
    return (
        other.user_name is None
        and other.client_id in (None, saved.client_id)
        and other.refresh_token is not None
        and other.refresh_token == saved.refresh_token
    )
