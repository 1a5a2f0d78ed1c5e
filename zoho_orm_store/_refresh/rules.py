"""What a caller does next about a token that needs a refresh: pure decisions over what it sees."""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from zoho_orm_store.refresh import RefreshPolicy

__all__ = [
    "FREE",
    "MOST_FAILURES",
    "Holder",
    "Step",
    "counted_failures",
    "may_refresh_ahead",
    "next_step",
    "wait_or_time_out",
]

FREE = ""
"""The owner of a lease that is free because its last refresh failed."""

MOST_FAILURES = 2
"""Refreshes in a row that may fail while others wait. Then they stop waiting."""

_RECENT = 60.0
"""Seconds for which a failure counts together with the next one."""


class Holder(NamedTuple):
    """The row of a lease. Anybody may have written it, so no value of it is taken on trust.

    Attributes:
        owner: Who has the lease; `FREE` after a failed refresh.
        failures: Refreshes in a row that failed.
        left: Seconds until it ends; negative if it has ended.
    """

    owner: str
    failures: int
    left: float

    @property
    def is_free(self) -> bool:
        """Whether the lease has no owner, whenever it ends."""
        return self.owner == FREE

    def has_failed_within(self, seconds: float) -> bool:
        """Whether the last refresh failed, and at most so many seconds ago."""
        return self.is_free and self.failures > 0 and abs(self.left) <= seconds


class Step(Enum):
    """What a caller does next."""

    USE = auto()
    """Use the token that another caller has saved."""
    SKIP = auto()
    """Raise, because others' refreshes failed while this caller waited."""
    TAKE = auto()
    """Try to take the lease."""
    TIME_OUT = auto()
    """Use what is stored, and refresh it without a lease."""
    WAIT = auto()
    """Pause, and look again."""


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
        policy: The durations.
        is_live: Whether the token is live by now.
        is_mine: Whether the lease is the caller's own.
        waited: Seconds since the caller came; 0 before its first pause.
        watched: Seconds since the caller first saw this owner of the lease.
    """
    if is_live:
        return Step.USE
    if (
        holder is not None
        and holder.failures >= MOST_FAILURES
        and waited > 0
        and holder.has_failed_within(waited)
    ):
        return Step.SKIP
    if _may_take(holder, policy, is_mine=is_mine, watched=watched):
        return Step.TAKE
    return wait_or_time_out(waited, policy)


def wait_or_time_out(waited: float, policy: RefreshPolicy) -> Step:
    """Decide what a caller does that cannot take the lease."""
    return Step.WAIT if waited < policy.wait else Step.TIME_OUT


def may_refresh_ahead(holder: Holder | None, policy: RefreshPolicy, *, is_mine: bool) -> bool:
    """Decide whether a caller with a live token may try to refresh it before its end."""
    if holder is not None and holder.has_failed_within(policy.lease):
        return False
    return _may_take(holder, policy, is_mine=is_mine, watched=0)


def counted_failures(before: Holder | None) -> int:
    """How many failures the next one adds to. Counting beyond the limit would change nothing."""
    if before is None or not before.has_failed_within(_RECENT):
        return 0
    return min(before.failures, MOST_FAILURES)


def _may_take(
    holder: Holder | None, policy: RefreshPolicy, *, is_mine: bool, watched: float
) -> bool:
    # No lease lasts longer than the policy says, whatever its row claims.
    return (
        holder is None or holder.is_free or is_mine or holder.left <= 0 or watched >= policy.lease
    )
