"""Which stored token is meant, and what becomes of it: rules B, C and E of the contract.

Pure functions over `TokenRecord`. The repositories turn a `Rung` into SQL, the in-memory store
uses `hits`; both hand what they found to `filled`, `merged` and `identity_of`.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from enum import Enum
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

from zoho_orm_store.errors import InvalidTokenError, UserMismatchError
from zoho_orm_store.record import storable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from zoho_orm_store.record import TokenRecord

__all__ = [
    "Identity",
    "Rung",
    "check_credentials",
    "check_owner",
    "filled",
    "hits",
    "identities_met",
    "identity_of",
    "is_absorbed",
    "is_same_holder",
    "merged",
    "merged_rows",
    "rungs_to_find",
    "rungs_to_save",
    "update_of",
    "without_earlier_pair",
    "without_overtaken_pair",
]

CREDENTIALS = ("access_token", "refresh_token", "grant_token")
_TEXT_OUTSIDE_THE_PAIR = (
    "id",
    "user_name",
    "client_id",
    "client_secret",
    "refresh_token",
    "grant_token",
    "redirect_url",
    "api_domain",
)


class Identity(NamedTuple):
    """What makes a stored token one of its kind (rule E4).

    Attributes:
        kind: The field that identifies the token.
        value: That field's value.
        client_id: The client, part of every identity, since a match never crosses clients (B6).
    """

    kind: str
    value: str
    client_id: str | None


class Rung(Enum):
    """A way to tell which stored token is meant; its value is the field that must be equal."""

    ID = "id"
    USER = "user_name"
    ACCESS = "access_token"
    GRANT = "grant_token"
    REFRESH = "refresh_token"
    IDENTITY = "identity"


def rungs_to_find(asked: TokenRecord) -> tuple[Rung, ...]:
    """The rungs by which `find_token` looks for a token, in order (rules B1 to B5, B9)."""
    return (Rung.ID,) if asked.id else _rungs_below_id(asked)


def rungs_to_save(asked: TokenRecord) -> tuple[Rung, ...]:
    """The rungs by which `save_token` looks for the row to update, in order (rules B1 to B5, B9).

    The last resort is the token's own identity (E4): an access token asked for together with its
    client has no rung of its own, yet saving it twice must not make two rows.
    """
    rungs = (Rung.ID, *_rungs_below_id(asked)) if asked.id else _rungs_below_id(asked)
    if identity_of(asked).kind == Rung.ACCESS.value and Rung.ACCESS not in rungs:
        return (*rungs, Rung.IDENTITY)
    return rungs


def _rungs_below_id(asked: TokenRecord) -> tuple[Rung, ...]:
    applies = {
        Rung.USER: True,
        Rung.ACCESS: not asked.client_id and not asked.client_secret,
        Rung.GRANT: True,
        Rung.REFRESH: True,
    }
    return tuple(rung for rung, applicable in applies.items() if applicable and _knows(asked, rung))


def _knows(asked: TokenRecord, rung: Rung) -> bool:
    value: str | None = getattr(asked, rung.value)
    return value is not None and storable(rung.value, value)


def hits(rung: Rung, asked: TokenRecord, stored: TokenRecord) -> bool:
    """Whether a rung's lookup hits a stored token (rules B1 to B6)."""
    if rung is Rung.ID:
        return asked.id == stored.id
    if rung is Rung.IDENTITY:
        return identity_of(stored) in identities_met(asked)
    same_value = getattr(asked, rung.value) == getattr(stored, rung.value)
    return same_value and is_same_holder(asked, stored)


def is_same_holder(asked: TokenRecord, stored: TokenRecord) -> bool:
    """Whether neither the user nor the client of two tokens is known to differ (rule B6)."""
    return _agree(asked.user_name, stored.user_name) and _agree(asked.client_id, stored.client_id)


def _agree(one: str | None, other: str | None) -> bool:
    return one is None or other is None or one == other


def identity_of(record: TokenRecord) -> Identity:
    """What the stored token of a record is identified by (rule E4).

    User and client; without a known user the refresh token; without that the grant, then the
    access token. The client is part of each, because a match never crosses clients (B6). A row
    of some other tool that holds none of these is identified by its id.
    """
    for kind in (Rung.USER, Rung.REFRESH, Rung.GRANT, Rung.ACCESS):
        value = getattr(record, kind.value)
        if value:
            return Identity(kind.value, value, record.client_id)
    return Identity(Rung.ID.value, record.id or "", None)


def identities_met(asked: TokenRecord) -> tuple[Identity, ...]:
    """The identities that a record may update: its own, then the same of an unknown client."""
    own = identity_of(asked)
    return (own,) if own.client_id is None else (own, own._replace(client_id=None))


def check_credentials(asked: TokenRecord) -> None:
    """Refuse to make a row for a token without any credential (rule E3).

    Raises:
        InvalidTokenError: No access token, refresh token or grant token is known.
    """
    if not any(getattr(asked, name) for name in CREDENTIALS):
        raise InvalidTokenError(
            "The token has no access token, refresh token or grant token, "
            "so there is nothing to store. Log in first, or set one of them."
        )


def check_owner(asked: TokenRecord, stored: TokenRecord) -> None:
    """Refuse to put one user's credentials into another user's row (rule E5).

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
    """What a find makes of the asked token: its unknown values, filled in (rules C1, C2)."""
    values = {
        name: getattr(asked, name) or getattr(stored, name) for name in _TEXT_OUTSIDE_THE_PAIR
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
    """What a save makes of a stored token: known values overwrite, unknown ones stay (rule E1).

    A new access token of unknown expiry clears the stored expiry, which was the old one's.
    The row keeps its id.
    """
    is_new_access_token = asked.access_token not in (None, stored.access_token)
    expiry_time = asked.expiry_time
    if expiry_time is None and not is_new_access_token:
        expiry_time = stored.expiry_time
    values = {
        name: getattr(asked, name) or getattr(stored, name)
        for name in (*_TEXT_OUTSIDE_THE_PAIR, "access_token")
    }
    values["id"] = stored.id
    return replace(stored, **values, expiry_time=expiry_time)


def without_earlier_pair(asked: TokenRecord, stored: TokenRecord) -> TokenRecord:
    """The asked token without its access token and expiry, if the stored one's ends later."""
    if (stored.expiry_time or 0) > (asked.expiry_time or 0):
        return replace(asked, access_token=None, expiry_time=None)
    return asked


def without_overtaken_pair(
    asked: TokenRecord, stored: TokenRecord, seen: TokenRecord, now: int
) -> TokenRecord:
    """The asked token without its access token and expiry, if another caller was faster.

    Their own expiries do not tell: a process that was suspended has counted from when it woke up.

    Args:
        asked: What a caller saves that has refreshed a token.
        stored: The token as it is.
        seen: The token as it was when the caller began.
        now: The time in epoch milliseconds.
    """
    is_live = stored.expiry_time is None or stored.expiry_time > now
    if is_live and stored.access_token not in (None, seen.access_token):
        return replace(asked, access_token=None, expiry_time=None)
    return asked


def merged_rows(rows: Iterable[TokenRecord]) -> TokenRecord:
    """One record with the newest values of several rows that turned out to be one (rule E4).

    Args:
        rows: At least one stored row, in the order in which they were saved.
    """
    return reduce(merged, rows)


def update_of(
    stored: TokenRecord,
    asked: TokenRecord,
    find_absorbed: Callable[[TokenRecord], Iterable[TokenRecord]],
) -> tuple[TokenRecord, list[str | None]]:
    """What a save makes of the row it means, and of those that turn out to be the same (E1, E4).

    When several rows become one, the one that has the identity already keeps its id: it is the
    one that other workers hold.

    Args:
        stored: The row that the asked token means.
        asked: What is known of the token.
        find_absorbed: Finds the other rows for which `is_absorbed` holds. It is called only when
            the save learns something that may tie its row to another one.

    Returns:
        The row to write, and the ids of the rows to remove first.

    Raises:
        UserMismatchError: The row is another user's (rule E5).
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
    newest = replace(merged(merged_rows(rows), asked), id=kept.id, created_at=kept.created_at)
    return newest, [row.id for row in rows if row.id != kept.id]


def is_absorbed(other: TokenRecord, saved: TokenRecord) -> bool:
    """Whether another row turns out to be the token that is being saved (rule E4).

    It does when it has the same identity, or when it has no user and the same refresh token.
    """
    if identity_of(other) == identity_of(saved):
        return True
    return (
        other.user_name is None
        and other.client_id in (None, saved.client_id)
        and other.refresh_token is not None
        and other.refresh_token == saved.refresh_token
    )
