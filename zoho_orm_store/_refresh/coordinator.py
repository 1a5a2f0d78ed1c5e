"""Lets one caller at a time refresh a token, and the others wait for what it saves.

Before the SDK refreshes a token it asks the store for it, and afterwards it saves it. In between a
lease says whose turn it is. Nobody holds a connection meanwhile.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias
from uuid import uuid4

from zoho_orm_store._database.forks import tell_forked_children
from zoho_orm_store._refresh.keys import key_to_refresh, keys_to_release
from zoho_orm_store._refresh.rules import (
    Holder,
    Step,
    counted_failures,
    may_refresh_ahead,
    next_step,
    wait_or_time_out,
)
from zoho_orm_store._refresh.sdk_behaviour import (
    SDK_MARGIN,
    SLACK,
    ends_within,
    shown_as_expired,
    with_real_expiry,
)
from zoho_orm_store.errors import DatabaseError, RefreshFailedError, ZohoOrmStoreError
from zoho_orm_store.records import TokenRecord
from zoho_orm_store.refresh import RefreshPolicy, RefreshStats

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = [
    "Clock",
    "Held",
    "Leases",
    "LookAgain",
    "OnFailure",
    "RefreshCoordinator",
    "Settled",
]

_USABLE = SDK_MARGIN + SLACK
"""Seconds before its end up to which a token is handed out without a refresh."""

_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 0.2
_SWEEP_EVERY = 60.0
_REMEMBERED_FOR = 3600.0
"""Seconds after a lease's end in which a save still finds out that it has lost the lease."""

_OUTCOMES = {
    Step.USE: ("waited", "got its token"),
    Step.TIME_OUT: ("timed_out", "gave up"),
    Step.SKIP: ("skipped", "gave up, because refreshes failed"),
}
"""How a wait ends: the counter in the stats, and the words in the log."""

logger = logging.getLogger("zoho_orm_store")

LookAgain: TypeAlias = "Callable[[], TokenRecord | None]"
"""Finds the token again."""

OnFailure: TypeAlias = "Callable[[], TokenRecord | None]"
"""Is called when the refresh has failed. Returns the token to go on with all the same, if any."""


class Clock:
    """The system's clock, sleep and random source. Tests pass another one.

    Each function is looked up at the call, because gevent may replace it after this import.
    """

    def time(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def uniform(self, least: float, most: float) -> float:
        return random.uniform(least, most)  # noqa: S311


class Leases(Protocol):
    """The leases that all workers share. Each operation is atomic."""

    def holder(self, key: str) -> Holder | None:
        """Return who has a lease, or that its last refresh failed; ``None`` if it was released."""

    def take(
        self, key: str, seen: Holder | None, owner: str, failures: int, seconds: float
    ) -> bool:
        """Take a lease if its owner and failures are still those that `holder` has shown."""

    def release(self, key: str, owner: str) -> bool:
        """Remove a lease, and return whether ``owner`` still had it."""

    def fail(self, key: str, owner: str) -> None:
        """Free a lease and count one failure more, if ``owner`` still has it."""

    def sweep(self) -> int:
        """Remove leases that ended long ago, and return how many."""


class Settled(NamedTuple):
    """What a caller gets.

    Attributes:
        record: The token, live or not, if there is one.
        on_failure: What to call if the refresh fails, if the caller is the one that refreshes.
    """

    record: TokenRecord | None
    on_failure: OnFailure | None = None


class _Request(NamedTuple):
    """What a caller needs.

    Attributes:
        key: The lease on the token's refresh.
        asked: What the caller uses if no token is stored.
        look_again: Finds the stored token again.
        margin: Seconds before its end from which the token is to be refreshed.
    """

    key: str
    asked: TokenRecord | None
    look_again: LookAgain
    margin: float


class Held(NamedTuple):
    """A lease that a caller took in order to refresh a token.

    Attributes:
        owner: The name under which it was taken, which was never used before.
        thread: The thread that took it.
        until: When it ends, by the monotonic clock.
        seen: The token as it was stored then.
        shown_expiry: The expiry that the caller was shown, if it is not the real one.
    """

    owner: str
    thread: int
    until: float
    seen: TokenRecord
    shown_expiry: int | None

    def without_shown_expiry(self, saved: TokenRecord) -> TokenRecord:
        """Return what to save: a token that was not refreshed keeps its real expiry."""
        return with_real_expiry(saved, self.seen, self.shown_expiry)


# A caller is a context: a thread, a task or a greenlet, whatever was patched when. A context can
# be a copy of another one, as asyncio.to_thread() makes it, and as new threads get it in Python
# without the global interpreter lock. A copied entry would let two threads refresh at once, so it
# counts only in the thread that made it. Of the tasks of one thread that were copied from a context
# with a lease, only the first renews it, because it then gets another owner.
_held_in_context: ContextVar[Mapping[tuple[object, str], Held]] = ContextVar(
    "zoho_orm_store_refresh_leases",
    default={},  # noqa: B039 - replaced at each change, never changed in place
)

_SYSTEM_CLOCK = Clock()


class RefreshCoordinator:
    """Decides for each caller whether it refreshes a token or waits.

    Args:
        leases: The leases that all workers share.
        policy: How long leases and waits last.
        clock: The time, for tests.
    """

    def __init__(self, leases: Leases, policy: RefreshPolicy, clock: Clock = _SYSTEM_CLOCK) -> None:
        self._leases = leases
        self._policy = policy
        self._clock = clock
        self._swept_at = float("-inf")
        self._start()
        tell_forked_children(self)

    def _start(self) -> None:
        self._identity = object()
        """Whose entries in the contexts are ours. A forked child copies them, and gets another."""
        self._lock = threading.Lock()
        self._stats = RefreshStats()
        self._being_taken: set[str] = set()
        self._tried_ahead: dict[str, tuple[int | None, float]] = {}
        # Processes that try one after another do not compete for the lease.
        ahead = self._policy.ahead * self._clock.uniform(0.9, 1)
        self._margin = max(_USABLE, ahead)

    def _forked(self) -> None:
        """Start again in a forked child, which has none of its parent's leases."""
        self._start()

    @property
    def stats(self) -> RefreshStats:
        """What has happened so far."""
        return self._stats

    def is_settled(self, found: TokenRecord | None) -> bool:
        """Whether there is nothing to decide: the token is live, and the caller has no lease."""
        return (
            found is not None and not _held_in_context.get() and self._is_live(found, self._margin)
        )

    def settle(
        self,
        found: TokenRecord | None,
        asked: TokenRecord | None,
        look_again: LookAgain,
        scope_parts: tuple[str, ...],
    ) -> Settled:
        """Decide what a caller gets that is about to use a token, after a wait if need be.

        Args:
            found: The token as it is stored, if it is.
            asked: What the caller uses if no token is stored.
            look_again: Finds the stored token again.
            scope_parts: What the scope adds to a digest.

        Raises:
            RefreshFailedError: Others' refreshes failed while the caller waited.
            DatabaseError: The database refused or lost an operation.
        """
        record = found or asked
        if record is None:
            return Settled(None)
        key = key_to_refresh(record, scope_parts)
        if self._is_live(record, self._margin if found else SDK_MARGIN):
            self.forget(key)
            return Settled(found)
        if key is None:
            return Settled(found)
        if found is None or not self._is_live(found, _USABLE):
            return self._refresh_or_wait(_Request(key, asked, look_again, _USABLE), found)
        try:
            return self._refresh_ahead(_Request(key, None, look_again, self._margin), found)
        except ZohoOrmStoreError as error:
            logger.info("A token could not be refreshed ahead (%.8s): %s", key, error)
            return Settled(found)

    def lease_for(self, record: TokenRecord, scope_parts: tuple[str, ...]) -> str | None:
        """Return the key of the caller's lease that a save of a token ends, if there is one."""
        if not _held_in_context.get():
            return None
        leases = [
            (held.until, key)
            for key in keys_to_release(record, scope_parts)
            if (held := self.held(key)) is not None
        ]
        return max(leases)[1] if leases else None

    def held(self, key: str) -> Held | None:
        """Return the caller's own lease, also after it has ended."""
        held = _held_in_context.get().get((self._identity, key))
        return held if held is not None and held.thread == threading.get_ident() else None

    def forget(self, key: str | None) -> None:
        """Note that the caller has released a lease, or does not need it."""
        leases = _held_in_context.get()
        if key is not None and (self._identity, key) in leases:
            others = {each: held for each, held in leases.items() if each != (self._identity, key)}
            _held_in_context.set(others)

    def failed(self, key: str) -> TokenRecord | None:
        """Give up the caller's lease, because its refresh has failed.

        Returns:
            The token to go on with, if it was refreshed ahead of its end.
        """
        held = self.held(key)
        if held is None:
            return None
        self.forget(key)
        self._count(failed=1)
        logger.info("A refresh has failed (%.8s)", key)
        self._try_to_write(self._leases.fail, key, held.owner)
        if not self._is_live(held.seen, SDK_MARGIN):
            return None
        # The SDK saves the live token once more. That must not undo what others do meanwhile.
        self._remember(key, held)
        return held.seen

    def _refresh_or_wait(self, request: _Request, found: TokenRecord | None) -> Settled:
        key = request.key
        wait = _Wait(self._clock, self._policy)
        holder = self._leases.holder(key)
        while True:
            step = next_step(
                holder,
                self._policy,
                is_live=self._is_enough(found, request),
                is_mine=self._is_mine(key, holder),
                waited=wait.seconds,
                watched=wait.watched(holder),
            )
            if step is Step.TAKE:
                try:
                    settled = self._try_to_refresh(request, holder)
                except DatabaseError as error:
                    # Read-only after a failover, perhaps. Without leases we would refresh as well.
                    logger.info("A token is refreshed without a lease (%.8s): %s", key, error)
                    return Settled(found)
                if settled is not None:
                    return settled
                step = wait_or_time_out(wait.seconds, self._policy)
            if step is not Step.WAIT:
                return self._end_wait(step, key, found, wait.seconds)
            wait.pause()
            # In this order: a lease is released in the transaction that saves the token.
            holder, found = self._leases.holder(key), request.look_again()

    def _refresh_ahead(self, request: _Request, live: TokenRecord) -> Settled:
        """Hand the live token to everyone, but to one caller as if it had expired."""
        if not self._is_first_to_try_ahead(request.key, live):
            return Settled(live)
        holder = self._leases.holder(request.key)
        is_mine = self._is_mine(request.key, holder)
        if not may_refresh_ahead(holder, self._policy, is_mine=is_mine):
            return Settled(live)
        settled = self._try_to_refresh(request, holder)
        if settled is None:
            return Settled(live)
        self._count(ahead=int(settled.on_failure is not None))
        return settled

    def _try_to_refresh(self, request: _Request, before: Holder | None) -> Settled | None:
        """Take the lease, and hand the token to the caller so that the SDK refreshes it.

        Returns:
            What the caller gets: also a live token, if another caller has saved one meanwhile.
            ``None`` if another caller was faster to take the lease.
        """
        key = request.key
        owner = self._take(key, before)
        if owner is None:
            return None
        try:
            found = request.look_again()
        except BaseException:
            self._give_back(key, owner)
            raise
        if self._is_enough(found, request):
            self._give_back(key, owner)
            return Settled(found)
        shown = None if found is None else shown_as_expired(found, self._clock.time())
        shown_expiry = None if shown is None or shown is found else shown.expiry_time
        seen = found or request.asked or TokenRecord()
        until = self._clock.monotonic() + self._policy.lease
        self._note_acquired(key, before)
        self._remember(key, Held(owner, threading.get_ident(), until, seen, shown_expiry))
        return Settled(shown, partial(self.failed, key))

    def _take(self, key: str, seen: Holder | None) -> str | None:
        """Take a lease, and return its owner's new name; ``None`` if another caller was faster.

        One thread of a process tries at a time. The others would only compete with it.
        """
        with self._lock:
            if key in self._being_taken:
                return None
            self._being_taken.add(key)
        owner = uuid4().hex
        try:
            taken = self._leases.take(key, seen, owner, counted_failures(seen), self._policy.lease)
        finally:
            with self._lock:
                self._being_taken.discard(key)
        if taken:
            self._sweep()
        return owner if taken else None

    def _note_acquired(self, key: str, before: Holder | None) -> None:
        is_taken_over = not (before is None or before.is_free or self._is_mine(key, before))
        self._count(acquired=1, taken_over=int(is_taken_over))
        if is_taken_over:
            logger.info("The lease %.8s is taken over; its last owner did not release it", key)
        else:
            logger.debug("The lease %.8s is acquired", key)

    def _end_wait(self, step: Step, key: str, found: TokenRecord | None, waited: float) -> Settled:
        counter, outcome = _OUTCOMES[step]
        self._count(**{counter: 1, "seconds_waited": waited})
        logger.info("Waited %.3f s for another caller, and %s (%.8s)", waited, outcome, key)
        if step is Step.SKIP:
            raise RefreshFailedError(
                "The refreshes of this token by other callers have failed, so this caller did not "
                "try as well. What the others raised says why: Zoho cannot be reached, "
                "has revoked the token, or has made 10 access tokens of it in 10 minutes. "
                "Try again later, or log in again."
            )
        if step is Step.USE:
            self.forget(key)
        return Settled(found)

    def _is_first_to_try_ahead(self, key: str, live: TokenRecord) -> bool:
        """Whether nobody in this process has tried to refresh this token ahead just now."""
        now = self._clock.monotonic()
        with self._lock:
            expiry_time, until = self._tried_ahead.get(key, (None, 0.0))
            if expiry_time == live.expiry_time and now < until:
                return False
            current = {each: entry for each, entry in self._tried_ahead.items() if entry[1] > now}
            self._tried_ahead = current | {key: (live.expiry_time, now + self._policy.lease)}
            return True

    def _is_mine(self, key: str, holder: Holder | None) -> bool:
        held = self.held(key)
        return held is not None and holder is not None and holder.owner == held.owner

    def _remember(self, key: str, held: Held) -> None:
        since = self._clock.monotonic() - _REMEMBERED_FOR
        leases = _held_in_context.get()
        current = {each: other for each, other in leases.items() if other.until > since}
        _held_in_context.set(current | {(self._identity, key): held})

    def _give_back(self, key: str, owner: str) -> None:
        self.forget(key)
        self._try_to_write(self._leases.release, key, owner)

    def _sweep(self) -> None:
        now = self._clock.monotonic()
        if now - self._swept_at >= _SWEEP_EVERY:
            self._swept_at = now
            self._try_to_write(self._leases.sweep)

    def _try_to_write(self, write: Callable[..., object], *args: str) -> None:
        """Write something that is not essential, since a lease ends anyway; log a failure."""
        try:
            write(*args)
        except ZohoOrmStoreError as error:
            logger.info("The table of refresh leases could not be written: %s", error)

    def _count(self, **by: float) -> None:
        with self._lock:
            counted = {name: getattr(self._stats, name) + number for name, number in by.items()}
            self._stats = self._stats._replace(**counted)

    def _is_live(self, record: TokenRecord, margin: float) -> bool:
        return not ends_within(record, margin, self._clock.time())

    def _is_enough(self, found: TokenRecord | None, request: _Request) -> bool:
        """Whether the stored token needs no refresh, or else the one that the caller asked with."""
        if found is not None:
            return self._is_live(found, request.margin)
        return request.asked is None or self._is_live(request.asked, SDK_MARGIN)


class _Wait:
    """One caller's wait: how long it has lasted, and since when the lease has had its owner."""

    def __init__(self, clock: Clock, policy: RefreshPolicy) -> None:
        self._clock = clock
        self._longest = policy.wait
        self._started = self._owner_since = clock.monotonic()
        self._owner: object = None
        self._next_pause = 0.0

    @property
    def seconds(self) -> float:
        """Seconds since the beginning; 0 before the first pause."""
        return self._clock.monotonic() - self._started if self._next_pause else 0.0

    def watched(self, holder: Holder | None) -> float:
        """Seconds since the lease was first seen with the owner that it has now."""
        owner, now = holder and holder.owner, self._clock.monotonic()
        if owner != self._owner:
            self._owner, self._owner_since = owner, now
        return now - self._owner_since

    def pause(self) -> None:
        """Sleep for a time that grows, and that differs between callers."""
        pause = self._next_pause or _FIRST_PAUSE
        left = self._longest - self.seconds
        self._clock.sleep(max(0.0, min(self._clock.uniform(pause / 2, pause), left)))
        self._next_pause = min(pause * 1.5, _LONGEST_PAUSE)
