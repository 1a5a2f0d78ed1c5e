"""One refresh for many workers: who meets an expired token either refreshes it or waits.

Before the SDK refreshes a token it asks the store for it, and afterwards it saves it. Between the
two, a row in the lease table says whose turn it is. Nobody holds a connection meanwhile.
"""

from __future__ import annotations

import logging
import random
import threading
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from time import monotonic, sleep, time
from typing import TYPE_CHECKING, NamedTuple, TypeAlias
from uuid import uuid4

from zoho_orm_store.errors import (
    ConfigurationError,
    RefreshFailedError,
    SchemaError,
    ZohoOrmStoreError,
)
from zoho_orm_store.forks import tell_forked_children
from zoho_orm_store.lease import Leases, lease_key
from zoho_orm_store.record import TokenRecord

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Connection, Table

    from zoho_orm_store.binding import Binding
    from zoho_orm_store.lease import Holder
    from zoho_orm_store.scopes import Scope

__all__ = ["RefreshCoordinator", "RefreshPolicy", "RefreshStats"]

SDK_MARGIN = 5.0
"""Seconds before its end in which the SDK takes an access token for expired."""

_SLACK = 0.25
"""Seconds that may pass between the store's look at the clock and the SDK's. A token that the store
took for live, and the SDK does not, would be refreshed without a lease."""

_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 0.2
_MOST_FAILURES = 2
_RECENT = 60.0
"""Seconds in which a failure counts as one of the same trouble."""

_SWEEP_EVERY = 60.0
_REMEMBERED_FOR = 3600.0
"""Seconds after a lease's end in which a save still finds out that it has lost it."""

logger = logging.getLogger("zoho_orm_store")

Look: TypeAlias = "Callable[[], TokenRecord | None]"
"""Finds a token again."""

OnFailure: TypeAlias = "Callable[[], TokenRecord | None]"
"""Is told that a refresh has failed, and returns the token to go on with all the same, if any."""

Settled: TypeAlias = "tuple[TokenRecord | None, OnFailure | None]"
"""The token that a caller gets; and, if it is to refresh it, whom to tell of a failure."""


@dataclass(frozen=True)
class RefreshPolicy:
    """How many workers share one refresh.

    Args:
        lease: Seconds that one worker may take for a refresh before another takes over. Longer
            than Zoho ever takes to answer, or tokens are refreshed twice; as short as that allows,
            since the others wait so long for one that was killed.
        wait: Seconds that a caller waits for another one's refresh. Longer than ``lease``, or
            nobody is there to take over. Afterwards it gets what is stored, and refreshes by
            itself; with 0, at once.
        ahead: Seconds before its end, or up to a tenth less, from which one caller refreshes a
            token early, while the others go on with it and nobody waits. At most 1800, half an
            access token's life; 0 refreshes when the SDK does, 5 seconds before the end.

    Raises:
        ConfigurationError: A number cannot be used.
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
        acquired: Leases acquired: refreshes that this process began.
        taken_over: Those among them whose former owner had not released it in time.
        ahead: Those among them of tokens that had not expired yet.
        failed: Refreshes that came to nothing: Zoho refused, or the token could not be saved.
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


class Held(NamedTuple):
    """A lease that a thread has.

    Attributes:
        failures: How many refreshes in a row had failed before.
        until: When it ends, by the monotonic clock.
        seen: The token that is to be refreshed.
        shown_end: When the caller was told that it ends, if that is not so.
    """

    failures: int
    until: float
    seen: TokenRecord = TokenRecord()
    shown_end: int | None = None


@dataclass
class _Caller(threading.local):
    """A thread: its name, and its leases by their keys."""

    name: str = field(default_factory=lambda: uuid4().hex)
    held: dict[str, Held] = field(default_factory=dict)


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
        self._swept_at = -_SWEEP_EVERY
        self._start()
        tell_forked_children(self)

    def _start(self) -> None:
        self._caller = _Caller()
        self._lock = threading.Lock()
        self._stats = RefreshStats()
        self._being_taken: set[str] = set()
        self._left_alone: dict[str, tuple[int | None, float]] = {}
        # Processes that come to it one after another need not contend for the lease.
        ahead = self._policy.ahead * random.uniform(0.9, 1)  # noqa: S311
        self._margin = max(SDK_MARGIN + _SLACK, ahead)

    def _forked(self) -> None:
        """Start anew in a forked child, whose threads have no leases."""
        self._start()

    @property
    def stats(self) -> RefreshStats:
        """What has happened so far."""
        return self._stats

    def settle(
        self, found: TokenRecord | None, asked: TokenRecord | None, look: Look, scope: Scope
    ) -> Settled:
        """Decide what a caller gets that is about to use a token, after a wait if need be.

        Args:
            found: The token as it was found, if it was.
            asked: What the caller would use if it was not found.
            look: Finds it again.
            scope: What fences off a tenant.

        Returns:
            The token as it is to be used, live or not; and if the caller has the lease under which
            to refresh it, what to call if that fails (`failed`).

        Raises:
            RefreshFailedError: The refreshes that the caller waited for have failed.
            DatabaseError: The database refused or lost an operation.
        """
        record = found or asked
        if record is None:
            return None, None
        if not _ends_within(record, self._margin if found else SDK_MARGIN):
            if self._caller.held:
                self.forget(_key(record, scope))
            return found, None
        key = _key(record, scope)
        if key is None:
            return found, None
        if found is None or not _is_usable(found, asked):
            return self._refresh_or_wait(key, found, asked, look)
        try:
            return self._refresh_ahead(key, found, look)
        except ZohoOrmStoreError as error:
            logger.info("A token could not be refreshed ahead (%.8s): %s", key, error)
            return found, None

    def held_for(self, record: TokenRecord, scope: Scope) -> str | None:
        """The lease of the calling thread that a save of a token ends."""
        held = self._caller.held
        if not held:
            return None
        keys = (
            lease_key(field, value, user, scope)
            for field in ("refresh_token", "grant_token")
            if (value := getattr(record, field)) is not None
            # The user may have become known only after the refresh.
            for user in {record.user_name, None}
        )
        mine = [key for key in keys if key in held]
        return max(mine, key=lambda key: held[key].until, default=None)

    def releasing(self, key: str) -> Callable[[Connection], TokenRecord | None]:
        """What gives the calling thread's lease back, in the transaction that saves a token.

        Where the thread has lost it, it returns the token as it was when the refresh began:
        another caller may have refreshed it since.
        """
        name, held = self._caller.name, self._caller.held[key]

        def release(connection: Connection) -> TokenRecord | None:
            return None if self._leases(connection).release(key, name) else held.seen

        return release

    def forget(self, key: str | None) -> None:
        """Know that the calling thread has a lease no more, or does not need it."""
        if key is not None:
            self._caller.held.pop(key, None)

    def refreshed(self, key: str, asked: TokenRecord) -> TokenRecord:
        """What is to be saved under a lease: a token that was not refreshed keeps its real end."""
        held = self._caller.held[key]
        shown = (held.seen.access_token, held.shown_end)
        if held.shown_end is not None and (asked.access_token, asked.expiry_time) == shown:
            return replace(asked, expiry_time=None)
        return asked

    def failed(self, key: str) -> TokenRecord | None:
        """Give up a lease of the calling thread, whose refresh has come to nothing.

        Returns:
            The token to go on with, where it was refreshed ahead of time.
        """
        name, held = self._caller.name, self._caller.held.pop(key, None)
        if held is None:
            return None
        self._count(failed=1)
        logger.info("A refresh has failed (%.8s)", key)
        try:
            self._binding.write(
                lambda connection: self._leases(connection).fail(key, name, held.failures + 1)
            )
        except ZohoOrmStoreError as error:
            # Why the refresh failed is the news. The lease ends by itself.
            logger.info("The lease %.8s could not be given back: %s", key, error)
        if _ends_within(held.seen, SDK_MARGIN):
            return None
        # The SDK will save the token once more. It must not undo what others do meanwhile.
        self._caller.held[key] = held
        return held.seen

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

    def _refresh_or_wait(
        self, key: str, found: TokenRecord | None, asked: TokenRecord | None, look: Look
    ) -> Settled:
        started, pause, waited = monotonic(), _FIRST_PAUSE, 0.0
        holder = self._holder(key)
        while True:
            if waited and holder is not None and holder.failures >= _MOST_FAILURES:
                raise self._spared(key, waited, holder.failures)
            if self._may_take(holder) and self._take(key, holder):
                found = self._look(key, look)
                if not _is_usable(found, asked):
                    return self._begun(key, found, asked, holder)
                self._release(key)
                return found, None
            if waited >= self._policy.wait:
                return self._given_up(key, waited, found)
            sleep(min(random.uniform(pause / 2, pause), self._policy.wait - waited))  # noqa: S311
            pause = min(pause * 1.5, _LONGEST_PAUSE)
            waited = monotonic() - started
            # In this order: a lease is given back in the transaction that saves the token.
            holder, found = self._holder(key), look()
            if _is_usable(found, asked):
                self.forget(key)
                self._count(waited=1, seconds_waited=waited)
                logger.info("Waited %.3f s for another caller's refresh (%.8s)", waited, key)
                return found, None

    def _refresh_ahead(self, key: str, live: TokenRecord, look: Look) -> Settled:
        """Hand the live token to everyone, but to one caller as if it had expired."""
        if not self._is_first_to_try(key, live):
            return live, None
        holder = self._holder(key)
        just_failed = holder is not None and holder.failures and -holder.left < self._policy.lease
        if just_failed or not self._may_take(holder) or not self._take(key, holder):
            return live, None
        found = self._look(key, look)
        if found is None or not _ends_within(found, self._margin):
            self._release(key)
            return found, None
        self._count(ahead=1)
        return self._begun(key, found, None, holder)

    def _look(self, key: str, look: Look) -> TokenRecord | None:
        """Look once more with the lease in hand: another caller may have saved a live token."""
        try:
            return look()
        except BaseException:
            with suppress(ZohoOrmStoreError):
                self._release(key)
            raise

    def _begun(
        self, key: str, found: TokenRecord | None, asked: TokenRecord | None, before: Holder | None
    ) -> Settled:
        """Hand a token to the caller that is to refresh it, under a lease that it has."""
        seen = found or asked or TokenRecord()
        shown = found and _as_expired(found)
        shown_end = shown.expiry_time if shown is not None and shown is not found else None
        held = self._caller.held[key]
        self._caller.held[key] = held._replace(seen=seen, shown_end=shown_end)
        if before is not None and not before.failures and before.owner != self._caller.name:
            self._count(acquired=1, taken_over=1)
            logger.info("The lease %.8s is taken over; its last owner did not come back", key)
        else:
            self._count(acquired=1)
            logger.debug("The lease %.8s is acquired", key)
        return shown, partial(self.failed, key)

    def _is_first_to_try(self, key: str, live: TokenRecord) -> bool:
        """Whether no thread of this process has tried to refresh a token ahead just now."""
        now = monotonic()
        with self._lock:
            expiry_time, until = self._left_alone.get(key, (None, 0.0))
            if expiry_time == live.expiry_time and now < until:
                return False
            current = {k: entry for k, entry in self._left_alone.items() if entry[1] > now}
            self._left_alone = current | {key: (live.expiry_time, now + self._policy.lease)}
            return True

    def _may_take(self, holder: Holder | None) -> bool:
        return holder is None or holder.is_over or holder.owner == self._caller.name

    def _holder(self, key: str) -> Holder | None:
        return self._binding.read(lambda connection: self._leases(connection).holder(key))

    def _take(self, key: str, before: Holder | None) -> bool:
        """Take a lease, unless another caller was faster.

        One thread of a process tries at a time. The others would only contend for what it gets.
        """
        # Read here: with an async driver the work runs on another thread, with another name.
        name, seconds = self._caller.name, self._policy.lease
        with self._lock:
            if key in self._being_taken:
                return False
            self._being_taken.add(key)
        try:
            holder = self._binding.write(
                lambda connection: self._leases(connection).take(key, name, seconds, before)
            )
        finally:
            with self._lock:
                self._being_taken.discard(key)
        if holder is None or holder.owner != name:
            return False
        is_recent = before is not None and -before.left < _RECENT
        failures = before.failures if before is not None and is_recent else 0
        held = Held(failures, monotonic() + seconds)
        self._caller.held = _current(self._caller.held) | {key: held}
        self._sweep()
        return True

    def _release(self, key: str) -> None:
        name = self._caller.name
        self._binding.write(lambda connection: self._leases(connection).release(key, name))
        self.forget(key)

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

    def _given_up(self, key: str, waited: float, found: TokenRecord | None) -> Settled:
        self._count(gave_up=1, seconds_waited=waited)
        logger.info("Gave up after %.3f s to wait for another caller's refresh (%.8s)", waited, key)
        return found, None

    def _spared(self, key: str, waited: float, failures: int) -> RefreshFailedError:
        self._count(spared=1, seconds_waited=waited)
        logger.info("Gave up after %.3f s and %d failed refreshes (%.8s)", waited, failures, key)
        return RefreshFailedError(
            f"The last {failures} refreshes of this token have failed, so this caller did not try "
            "as well. What the others raised says why: Zoho cannot be reached, has revoked the "
            "token, or has made 10 access tokens of it in 10 minutes. "
            "Try again later, or log in again."
        )

    def _count(self, **by: float) -> None:
        with self._lock:
            counted = {name: getattr(self._stats, name) + number for name, number in by.items()}
            self._stats = self._stats._replace(**counted)


def _ends_within(record: TokenRecord, seconds: float) -> bool:
    """Whether a token's access token is missing, or ends within a time."""
    if record.access_token is None:
        return True
    return record.expiry_time is not None and record.expiry_time - time() * 1000 < seconds * 1000


def _is_usable(found: TokenRecord | None, asked: TokenRecord | None) -> bool:
    """Whether the SDK will use what a caller gets as it is: what is stored, or its own token."""
    if found is not None:
        return not _ends_within(found, SDK_MARGIN + _SLACK)
    return asked is None or not _ends_within(asked, SDK_MARGIN)


def _as_expired(record: TokenRecord) -> TokenRecord:
    """The token as the SDK has to see it to refresh it."""
    if _ends_within(record, SDK_MARGIN):
        return record
    return replace(record, expiry_time=int(time() * 1000))


def _key(record: TokenRecord, scope: Scope) -> str | None:
    """The lease of what the SDK is about to do with a token, if it can do anything."""
    if record.refresh_token is not None:
        return lease_key("refresh_token", record.refresh_token, record.user_name, scope)
    if record.access_token is None and record.grant_token is not None:
        return lease_key("grant_token", record.grant_token, record.user_name, scope)
    return None


def _current(held: dict[str, Held]) -> dict[str, Held]:
    """Those leases whose owner may still come and save."""
    since = monotonic() - _REMEMBERED_FOR
    return {key: each for key, each in held.items() if each.until > since}
