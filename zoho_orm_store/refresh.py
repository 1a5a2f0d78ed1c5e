"""One refresh for many workers: who meets an expired token either refreshes it or waits.

Before the SDK refreshes a token it asks the store for it, and afterwards it saves it. Between the
two, a row in the lease table says whose turn it is. Nobody holds a connection meanwhile.
"""

from __future__ import annotations

import logging
import random
import threading
from dataclasses import dataclass, field, replace
from math import isfinite
from time import monotonic, sleep, time
from typing import TYPE_CHECKING, NamedTuple
from uuid import uuid4

from zoho_orm_store.errors import (
    ConfigurationError,
    RefreshFailedError,
    SchemaError,
    ZohoOrmStoreError,
)
from zoho_orm_store.forks import tell_forked_children
from zoho_orm_store.lease import Holder, Leases, lease_key

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from sqlalchemy import Connection, Table

    from zoho_orm_store.binding import Binding
    from zoho_orm_store.record import TokenRecord
    from zoho_orm_store.scopes import Scope

__all__ = ["RefreshCoordinator", "RefreshPolicy", "RefreshStats"]

SDK_MARGIN = 5.0
"""Seconds before its end in which the SDK takes an access token for expired."""

_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 0.2
_MOST_FAILURES = 2
_SWEEP_EVERY = 60.0
_REMEMBERED_FOR = 3600.0
"""Seconds after a lease's end in which a save still finds out that it has lost it."""

logger = logging.getLogger("zoho_orm_store")


@dataclass(frozen=True)
class RefreshPolicy:
    """How many workers share one refresh.

    Args:
        lease: Seconds that one worker may take for a refresh before another takes over. Longer
            than Zoho ever takes to answer, or tokens are refreshed twice; as short as that allows,
            since the others wait so long for one that was killed.
        wait: Seconds that a caller waits for another one's refresh. Longer than ``lease``, or
            nobody is there to take over. Afterwards it gets what is stored, and refreshes by
            itself.
        ahead: Seconds before its end from which one caller refreshes a token early, while the
            others go on with it and nobody waits; 0 refreshes when the SDK does, 5 seconds before
            the end.

    Raises:
        ConfigurationError: A number cannot be used.
    """

    lease: float = 10.0
    wait: float = 15.0
    ahead: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("lease", 0.001), ("wait", 0), ("ahead", 0)):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not isfinite(value) or value < least:
                raise ConfigurationError(
                    f"{name} must be a number of seconds{' above 0' if least else ', or 0'}, "
                    f"not {value!r}."
                )


class RefreshStats(NamedTuple):
    """What a store's callers have done about expired tokens, in this process.

    Attributes:
        acquired: Leases taken: refreshes that this process began.
        taken_over: Those among them whose former owner had not released it in time.
        ahead: Those among them of tokens that had not expired yet.
        failed: Refreshes of this process that the SDK reported as failed.
        waited: Callers that waited, and got a live token.
        seconds_waited: How long all callers have waited, together.
        gave_up: Callers that waited in vain, and got what was stored.
        spared: Callers that were told that the refreshes they waited for had failed.
    """

    acquired: int = 0
    taken_over: int = 0
    ahead: int = 0
    failed: int = 0
    waited: int = 0
    seconds_waited: float = 0.0
    gave_up: int = 0
    spared: int = 0


@dataclass
class _Caller(threading.local):
    """What a thread has taken: its name, and when each of its leases ends."""

    name: str = field(default_factory=lambda: uuid4().hex)
    leases: dict[str, float] = field(default_factory=dict)
    handed_out: str | None = None


class RefreshCoordinator:
    """Lets one caller at a time refresh a token, and the others wait for what it saves.

    Args:
        binding: The database.
        table: The table of the leases.
        policy: For how long.
    """

    def __init__(self, binding: Binding, table: Table, policy: RefreshPolicy) -> None:
        self._binding = binding
        self._table = table
        self._policy = policy
        self._margin = max(SDK_MARGIN, policy.ahead) * 1000
        self._stats = RefreshStats()
        self._swept_at = -_SWEEP_EVERY
        self._start()
        tell_forked_children(self)

    def _start(self) -> None:
        self._caller = _Caller()
        self._stats_lock = threading.Lock()
        self._others_until: dict[str, float] = {}

    def _forked(self) -> None:
        """Start anew in a forked child, whose threads have no leases."""
        self._start()
        self._stats = RefreshStats()

    @property
    def stats(self) -> RefreshStats:
        """What has happened so far."""
        return self._stats

    def settle(
        self,
        found: TokenRecord | None,
        asked: TokenRecord | None,
        look: Callable[[], TokenRecord | None],
        scope: Scope,
    ) -> TokenRecord | None:
        """What a caller gets that is about to use a token.

        Args:
            found: The token as it was found, if it was.
            asked: What the caller would use if it was not found.
            look: Finds it again.
            scope: What fences off a tenant.

        Returns:
            The token as it is to be used: live; or expired, if the caller is to refresh it.

        Raises:
            RefreshFailedError: The refreshes that the caller waited for have failed.
            DatabaseError: The database refused or lost an operation.
        """
        record = found or asked
        if record is None or not _ends_within(record, self._margin):
            return found
        key = _key(record, scope)
        if key is None:
            return found
        if _ends_within(record, SDK_MARGIN * 1000):
            return self._refresh_or_wait(key, found, asked, look)
        return self._refresh_ahead(key, found, look)

    def take_handed_out(self) -> str | None:
        """The key of the lease that the calling thread has just taken, once."""
        key, self._caller.handed_out = self._caller.handed_out, None
        return key

    def failed(self, key: str) -> None:
        """Give up a lease of the calling thread, whose refresh has failed."""
        self._count(failed=1)
        logger.info("A refresh has failed; its lease %.8s is released", key)
        try:
            self._release(key)
        except ZohoOrmStoreError as error:
            # Why the refresh failed is the news. The lease ends by itself.
            logger.info("The lease %.8s could not be released: %s", key, error)

    def held_for(self, record: TokenRecord, scope: Scope) -> list[str]:
        """The leases of the calling thread that a save of a token ends."""
        if not self._caller.leases:
            return []
        keys = (
            lease_key(field, value, user, scope)
            for field in ("refresh_token", "grant_token")
            if (value := getattr(record, field)) is not None
            # The user may have become known only after the refresh.
            for user in {record.user_name, None}
        )
        return [key for key in keys if key in self._caller.leases]

    def check(self) -> None:
        """See that the table is there, before it is needed.

        Raises:
            SchemaError: It is not; the message says what to do.
            DatabaseError: The database refused or lost the operation.
        """
        try:
            self._holder("")
        except SchemaError as error:
            failure = error
        else:
            return
        raise SchemaError(
            f"The table of refresh leases, {self._table.name!r}, is missing. Make it with your "
            "project's migrations, from a model with RefreshLeaseMixin that you pass as "
            "lease_model=. Or pass refresh=None, and each worker refreshes for itself. "
            f"{failure.reported}"
        )

    def releasing(self, keys: Collection[str]) -> Callable[[Connection], bool]:
        """What gives the calling thread's leases back, in the transaction that saves a token.

        It returns whether the thread still had all of them.
        """
        name = self._caller.name

        def release(connection: Connection) -> bool:
            leases = self._leases(connection)
            return {leases.release(key, name) for key in keys} == {True}

        return release

    def forget(self, keys: Collection[str]) -> None:
        """Know that the calling thread has leases no more."""
        for key in keys:
            self._caller.leases.pop(key, None)

    def _refresh_or_wait(
        self,
        key: str,
        found: TokenRecord | None,
        asked: TokenRecord | None,
        look: Callable[[], TokenRecord | None],
    ) -> TokenRecord | None:
        started, pause = monotonic(), _FIRST_PAUSE
        waited_for, failures = "", 0
        while True:
            holder = self._take(key)
            if holder.owner == self._caller.name:
                return self._settled_now(key, asked, look)
            if waited_for not in ("", holder.owner):
                failures += 1
            waited_for = holder.owner
            waited = monotonic() - started
            if failures >= _MOST_FAILURES:
                raise self._spared(key, waited, failures)
            if waited >= self._policy.wait:
                return self._given_up(key, waited, found)
            sleep(min(random.uniform(pause / 2, pause), self._policy.wait - waited))  # noqa: S311
            pause = min(pause * 1.5, _LONGEST_PAUSE)
            found = look()
            record = found or asked
            if record is None or not _ends_within(record, SDK_MARGIN * 1000):
                waited = monotonic() - started
                self._count(waited=1, seconds_waited=waited)
                logger.info("Waited %.3f s for another caller's refresh (%.8s)", waited, key)
                return found

    def _settled_now(
        self,
        key: str,
        asked: TokenRecord | None,
        look: Callable[[], TokenRecord | None],
    ) -> TokenRecord | None:
        """Look once more with the lease in hand: its last owner may have saved a live token."""
        found = look()
        record = found or asked
        if record is None or not _ends_within(record, SDK_MARGIN * 1000):
            self._release(key)
        else:
            self._caller.handed_out = key
        return found

    def _refresh_ahead(
        self, key: str, found: TokenRecord | None, look: Callable[[], TokenRecord | None]
    ) -> TokenRecord | None:
        """Hand the live token to everyone, but to one caller as if it had expired."""
        now = monotonic()
        if max(self._caller.leases.get(key, 0), self._others_until.get(key, 0)) > now:
            return found
        holder = self._take(key)
        if holder.owner != self._caller.name:
            self._others_until = _not_ended(self._others_until, now) | {key: now + holder.left}
            return found
        found = look()
        if found is None or not _ends_within(found, self._margin):
            self._release(key)
            return found
        self._count(ahead=1)
        self._caller.handed_out = key
        return replace(found, expiry_time=int(time() * 1000))

    def _holder(self, key: str) -> Holder | None:
        return self._binding.read(lambda connection: self._leases(connection).holder(key))

    def _take(self, key: str) -> Holder:
        """Who has a lease, the calling thread if it was free."""
        before = self._holder(key)
        caller, seconds = self._caller, self._policy.lease
        if before is not None and before.owner != caller.name and before.left > 0:
            return before
        taken = None
        while taken is None:
            taken = self._binding.write(
                lambda connection: self._leases(connection).take(key, caller.name, seconds)
            )
        if taken.owner == caller.name:
            is_taken_over = before is not None and before.owner != caller.name
            self._count(acquired=1, taken_over=int(is_taken_over))
            logger.debug("The lease %.8s is %s", key, "taken over" if is_taken_over else "acquired")
            kept = _not_ended(caller.leases, monotonic() - _REMEMBERED_FOR)
            caller.leases = kept | {key: monotonic() + seconds}
            self._sweep()
        return taken

    def _release(self, key: str) -> None:
        name = self._caller.name
        self._binding.write(lambda connection: self._leases(connection).release(key, name))
        self.forget([key])

    def _sweep(self) -> None:
        if monotonic() - self._swept_at < _SWEEP_EVERY:
            return
        self._swept_at = monotonic()
        try:
            number = self._binding.write(lambda connection: self._leases(connection).sweep())
        except ZohoOrmStoreError as error:
            # The caller has its lease, and somebody else will sweep.
            logger.debug("Ended leases could not be removed: %s", error)
        else:
            logger.debug("%d ended leases were removed", number)

    def _leases(self, connection: Connection) -> Leases:
        return Leases(connection, self._table)

    def _given_up(self, key: str, waited: float, found: TokenRecord | None) -> TokenRecord | None:
        self._count(gave_up=1, seconds_waited=waited)
        logger.info("Gave up after %.3f s to wait for another caller's refresh (%.8s)", waited, key)
        return found

    def _spared(self, key: str, waited: float, failures: int) -> RefreshFailedError:
        self._count(spared=1, seconds_waited=waited)
        logger.info("Gave up after %.3f s and %d failed refreshes (%.8s)", waited, failures, key)
        return RefreshFailedError(
            f"{failures} refreshes of this token by other callers have failed in "
            f"{waited:.1f} seconds, so this caller did not try as well. What they raised says why: "
            "Zoho cannot be reached, has revoked the token, or has made 10 access tokens of it in "
            "10 minutes. Try again later, or log in again."
        )

    def _count(self, **by: float) -> None:
        with self._stats_lock:
            counted = {name: getattr(self._stats, name) + number for name, number in by.items()}
            self._stats = self._stats._replace(**counted)


def _ends_within(record: TokenRecord, milliseconds: float) -> bool:
    """Whether a token's access token is missing, or ends within a time."""
    if record.access_token is None:
        return True
    return record.expiry_time is not None and record.expiry_time - time() * 1000 < milliseconds


def _key(record: TokenRecord, scope: Scope) -> str | None:
    """The lease of what the SDK is about to do with a token, if it can do anything."""
    if record.refresh_token is not None:
        return lease_key("refresh_token", record.refresh_token, record.user_name, scope)
    if record.access_token is None and record.grant_token is not None:
        return lease_key("grant_token", record.grant_token, record.user_name, scope)
    return None


def _not_ended(ends: dict[str, float], now: float) -> dict[str, float]:
    return {key: end for key, end in ends.items() if end > now}
