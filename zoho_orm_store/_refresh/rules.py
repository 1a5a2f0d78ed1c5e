"""Which lease a refresh needs, and what a caller does next: pure decisions over what it sees."""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple

from zoho_orm_store._digests import hash_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zoho_orm_store.records import TokenRecord
    from zoho_orm_store.refresh import RefreshPolicy

__all__ = [
    "REFUSED",
    "Holder",
    "Step",
    "counted_failures",
    "key_to_refresh",
    "keys_to_release",
    "lease_key",
    "may_refresh_ahead",
    "next_step",
    "wait_or_time_out",
]

REFUSED = "refused"
"""The owner of a lease that is free because Zoho has refused its last refresh for good."""

_MOST_FAILURES = 2
"""Refreshes in a row that may fail while others wait. Then they stop waiting."""

_RECENT = 60.0
"""Seconds for which a failure counts together with the next one."""


def lease_key(
    field: str, value: str, user_name: str | None, scope_parts: tuple[str, ...] = ()
) -> str:
    """Return the key of the lease on one user's refresh token or grant token in a scope."""
    return hash_of("lease", field, value, user_name or "", *scope_parts)


def key_to_refresh(record: TokenRecord, scope_parts: tuple[str, ...]) -> str | None:
    """Return the lease for what the SDK is about to do; ``None`` if it can do nothing."""
    if record.refresh_token is not None:
        return lease_key("refresh_token", record.refresh_token, record.user_name, scope_parts)
    if record.access_token is None and record.grant_token is not None:
        return lease_key("grant_token", record.grant_token, record.user_name, scope_parts)
    return None


def keys_to_release(record: TokenRecord, scope_parts: tuple[str, ...]) -> Iterator[str]:
    """The leases under which a token that is being saved may have been refreshed."""
    for field in ("refresh_token", "grant_token"):
        value = getattr(record, field)
        if value is not None:
            for user_name in {record.user_name, None}:  # It may be known only since the refresh.
                yield lease_key(field, value, user_name, scope_parts)


class Holder(NamedTuple):
    """The row of a lease. Anybody may have written it, so no value of it is taken on trust.

    Attributes:
        owner: Who has the lease; empty or `REFUSED` if it is free because its last refresh failed.
        failures: Refreshes in a row that failed.
        left: Seconds until it ends; negative if it has ended.
    """

    owner: str
    failures: int
    left: float

    @property
    def is_free(self) -> bool:
        """Whether the lease has no owner, whenever it ends."""
        return self.owner in ("", REFUSED)

    def has_failed_within(self, seconds: float, *, times: int = 1) -> bool:
        """Whether the last refreshes failed, and the last one at most so many seconds ago."""
        return self.is_free and self.failures >= times and abs(self.left) <= seconds


class Step(Enum):
    """What a caller does next."""

    USE = auto()  # Use the token that another caller has saved.
    SKIP = auto()  # Raise, because others' refreshes failed while this caller waited.
    TAKE = auto()  # Try to take the lease.
    TIME_OUT = auto()  # Use what is stored, and refresh it without a lease.
    WAIT = auto()  # Pause, and look again.


def next_step(
    holder: Holder | None,
    policy: RefreshPolicy,
    *,
    is_live: bool,
    is_mine: bool,
    waited: float,
    watched: float,
) -> Step:
    """Decide what a caller does next that needs a live token.

    Args:
        holder: Who has the lease, if anybody.
        policy: How long leases and waits last.
        is_live: Whether the token is live by now.
        is_mine: Whether the lease is the caller's own.
        waited: Seconds since the caller came; 0 before its first pause.
        watched: Seconds since the caller first saw this owner of the lease.
    """
    if is_live:
        return Step.USE
    if waited > 0 and holder and holder.has_failed_within(waited, times=_MOST_FAILURES):
        return Step.SKIP
    if _may_take(holder, policy, is_mine=is_mine, watched=watched):
        return Step.TAKE
    return wait_or_time_out(waited, policy)


def wait_or_time_out(waited: float, policy: RefreshPolicy) -> Step:
    """Decide what a caller does that cannot take the lease."""
    return Step.WAIT if waited < policy.wait else Step.TIME_OUT


def may_refresh_ahead(holder: Holder | None, policy: RefreshPolicy, *, is_mine: bool) -> bool:
    """Decide whether a caller with a live token may try to refresh it before its end."""
    has_just_failed = holder is not None and holder.has_failed_within(policy.lease)
    return not has_just_failed and _may_take(holder, policy, is_mine=is_mine, watched=0)


def counted_failures(before: Holder | None) -> int:
    """How many failures the next one adds to. Counting beyond the limit would change nothing."""
    if before is None or not before.has_failed_within(_RECENT):
        return 0
    return min(before.failures, _MOST_FAILURES)


def _may_take(
    holder: Holder | None, policy: RefreshPolicy, *, is_mine: bool, watched: float
) -> bool:
    # No lease lasts longer than the policy says, whatever its row claims.
    return (
        holder is None or holder.is_free or is_mine or holder.left <= 0 or watched >= policy.lease
    )
