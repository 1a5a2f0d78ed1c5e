"""How many workers share one refresh: the policy, and the counters for a monitor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from zoho_orm_store.errors import ConfigurationError

__all__ = ["RefreshPolicy", "RefreshStats"]


@dataclass(frozen=True)
class RefreshPolicy:
    """How many workers share one refresh.

    Args:
        lease: Seconds that one worker may take for a refresh before another takes over. Choose it
            longer than Zoho ever takes to answer, or tokens are refreshed twice. The others wait
            this long for a worker that was killed, so do not choose it much longer.
        wait: Seconds that a caller waits for another caller's refresh. Choose it longer than
            ``lease``, or nobody waits long enough to take over. Afterwards the caller gets what
            is stored and refreshes by itself; with 0 it does so at once.
        ahead: Seconds before a token's end from which one caller refreshes it early, while the
            others go on with it and nobody waits. Each process shortens this by a random amount,
            at most a tenth. At most 1800, half an access token's life; 0 refreshes when the SDK
            does, 5 seconds before the end.

    Raises:
        ConfigurationError: A value is not a number or out of range.
    """

    lease: float = 10.0
    wait: float = 15.0
    ahead: float = 0.0

    def __post_init__(self) -> None:
        for name, least, most in (("lease", 0.001, 3600), ("wait", 0, 3600), ("ahead", 0, 1800)):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not least <= value <= most:
                raise ConfigurationError(
                    f"{name} must be a number of seconds, from {least} to {most}, not {value!r}."
                )


class RefreshStats(NamedTuple):
    """What a store's callers have done about expired tokens, in this process.

    Attributes:
        acquired: Leases taken, which is the number of refreshes that this process began.
        taken_over: Those among them whose former owner had not released it in time.
        ahead: Those among them for tokens that had not expired yet.
        failed: Refreshes that failed: Zoho refused, or the token could not be saved.
        waited: Callers that waited, and got a live token.
        seconds_waited: How long all callers have waited, together.
        timed_out: Callers that waited in vain, and got what was stored.
        skipped: Callers that did not try, because others' refreshes failed while they waited.
    """

    acquired: int = 0
    taken_over: int = 0
    ahead: int = 0
    failed: int = 0
    waited: int = 0
    seconds_waited: float = 0.0
    timed_out: int = 0
    skipped: int = 0
