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
    from collections.abc import Collection, Iterable, Sequence

    from zoho_orm_store.records import TokenRecord

__all__ = [
    "Identity",
    "Lookup",
    "check_credentials",
    "check_owner",
    "claim_of",
    "filled",
    "find_match",
    "identity_of",
    "is_absorbed",
    "learns_refresh_token",
    "lookups_to_find",
    "lookups_to_save",
    "matches",
    "merged",
    "plan_update",
    "updatable_identities",
    "without_earlier_pair",
    "without_overtaken_pair",
    "without_used_grant",
    "without_used_grants",
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


def find_match(
    lookups: Sequence[Lookup], asked: TokenRecord, records: Collection[TokenRecord]
) -> TokenRecord | None:
    """The stored token that the first lookup with a result finds among these, or ``None``.

    If a lookup finds several, the asked client's own comes first, then the one saved last.
    """
    for lookup in lookups:
        found = [record for record in records if matches(lookup, asked, record)]
        if found:
            return max(found, key=lambda record: _preference(lookup, asked, record))
    return None


def _preference(lookup: Lookup, asked: TokenRecord, stored: TokenRecord) -> tuple[bool, datetime]:
    by_client = lookup in (Lookup.USER, Lookup.IDENTITY) and asked.client_id is not None
    is_own = not by_client or asked.client_id == stored.client_id
    return (is_own, _saved_at(stored))


def _saved_at(stored: TokenRecord) -> datetime:
    return stored.updated_at or datetime.min


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


def claim_of(asked: TokenRecord) -> Identity:
    """The identity, which no row keeps, by which saves of one refresh token wait for each other.

    The client is no part of it: a token without a client may turn out to be one with a client.
    """
    return Identity("claim", asked.refresh_token or "", None)


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


def is_new_login(asked: TokenRecord, stored: TokenRecord) -> bool:
    """Whether a stored user has logged in anew: the grant token is not the stored one.

    The SDK must exchange it, since the stored tokens may be dead.
    """
    is_the_users = asked.user_name is not None and asked.user_name == stored.user_name
    is_another_grant = asked.grant_token not in (None, stored.grant_token)
    return asked.id is None and is_the_users and is_another_grant


def fallen_back(asked: TokenRecord, stored: TokenRecord) -> TokenRecord:
    """The token to go on with when a new grant token could not be exchanged: the stored one."""
    values = {name: getattr(stored, name) for name in ("id", *_CREDENTIALS)}
    return replace(filled(asked, stored), **values, expiry_time=stored.expiry_time)


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


def without_used_grant(record: TokenRecord) -> TokenRecord:
    """The record without its grant token, if that was exchanged for a token that it holds."""
    if record.grant_token and (record.access_token or record.refresh_token):
        return replace(record, grant_token=None)
    return record


def without_used_grants(stored: TokenRecord, asked: TokenRecord) -> tuple[TokenRecord, TokenRecord]:
    """A stored token and what a save brings, without grant tokens that were exchanged by then."""
    both = merged(stored, asked)
    if without_used_grant(both) is both:
        return stored, asked
    return replace(stored, grant_token=None), replace(asked, grant_token=None)


def learns_refresh_token(stored: TokenRecord, asked: TokenRecord) -> bool:
    """Whether a save brings a refresh token that its row does not hold yet."""
    return asked.refresh_token not in (None, stored.refresh_token)


def plan_update(
    stored: TokenRecord, asked: TokenRecord, others: Iterable[TokenRecord]
) -> tuple[TokenRecord, list[str | None]]:
    """What a save makes of the row it updates, and of rows that turn out to be the same token.

    When several rows become one, the row that already has the identity keeps its id, because
    that is the id which other workers know.

    Args:
        stored: The row that the asked token means.
        asked: What is known of the token.
        others: Other rows, among them all that may be the same token.

    Returns:
        The row to write, and the ids of the rows to delete first.

    Raises:
        UserMismatchError: The row is another user's.
    """
    check_owner(asked, stored)
    saved, others = merged(stored, asked), [*others]
    users_own = _users_own(saved, others)
    target = users_own or saved
    same = [other for other in others if other is users_own or is_absorbed(other, target)]
    if not same:
        return saved, []
    rows = sorted((stored, *same), key=_saved_at)
    newest = merged(reduce(merged, rows), asked)
    kept = users_own or next((each for each in same if _have_same_identity(each, saved)), stored)
    newest = replace(newest, id=kept.id, created_at=kept.created_at)
    return newest, [row.id for row in rows if row.id != kept.id]


def _users_own(saved: TokenRecord, others: Sequence[TokenRecord]) -> TokenRecord | None:
    """The user's own row, if the saved token has no user: of several, the one saved last."""
    if saved.user_name is not None:
        return None
    owned = [row for row in others if row.user_name is not None and is_absorbed(saved, row)]
    return max(owned, key=_saved_at, default=None)


def is_absorbed(other: TokenRecord, saved: TokenRecord) -> bool:
    """Whether another row turns out to be the token that is being saved.

    It is if it has the same identity, or if it has no user and the same refresh token.
    """
    if _have_same_identity(other, saved):
        return True
    return (
        other.user_name is None
        and other.client_id in (None, saved.client_id)
        and other.refresh_token is not None
        and other.refresh_token == saved.refresh_token
    )


def _have_same_identity(one: TokenRecord, other: TokenRecord) -> bool:
    return identity_of(one) == identity_of(other)
