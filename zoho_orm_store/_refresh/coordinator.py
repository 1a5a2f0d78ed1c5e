"""Lets one caller at a time refresh a token, and the others wait for what it saves.

Before the SDK refreshes a token it asks the store for it, and afterwards it saves it. In between a
lease says whose turn it is. Nobody holds a connection meanwhile.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, Protocol
from uuid import uuid4

from zoho_orm_store._database.forks import notice_fork, tell_forked_children
from zoho_orm_store._refresh.rules import (
    Holder,
    Step,
    counted_failures,
    key_to_refresh,
    keys_to_release,
    may_refresh_ahead,
    next_step,
    wait_or_time_out,
)
from zoho_orm_store._refresh.sdk_behaviour import SDK_MARGIN, SLACK, ends_within, shown_as_expired
from zoho_orm_store.errors import DatabaseError, RefreshFailedError, ZohoOrmStoreError
from zoho_orm_store.records import TokenRecord
from zoho_orm_store.refresh import RefreshPolicy, RefreshStats

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

__all__ = ["Clock", "Held", "Leases", "RefreshCoordinator", "Settled", "Wait"]

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

    def fail(self, key: str, owner: str, *, refused: bool = False) -> None:
        """Free a lease and count one failure more, if ``owner`` still has it.

        If Zoho has refused the refresh for good, remember this for longer.
        """

    def sweep(self) -> int:
        """Remove leases that ended long ago, and return how many."""


class Settled(NamedTuple):
    """What a caller gets.

    Attributes:
        record: The token, live or not, if there is one.
        on_failure: What to call if the refresh fails, if the caller is the one that refreshes; with
            ``refused=True`` if Zoho has refused it for good. It returns the token to go on with all
            the same, if any.
        fallback_id: The stored token to go on with if the SDK cannot exchange a new grant token.
    """

    record: TokenRecord | None
    on_failure: Callable[..., TokenRecord | None] | None = None
    fallback_id: str | None = None


class _Request(NamedTuple):
    """What a caller needs: the same in each round of its wait."""

    key: str
    asked: TokenRecord | None
    look_again: Callable[[], TokenRecord | None]
    margin: float  # Seconds before its end from which the token is to be refreshed.


class Held(NamedTuple):
    """A lease that a caller took in order to refresh a token."""

    owner: str  # A random name, new for each lease.
    thread: int
    until: float  # When it ends, by the monotonic clock.
    seen: TokenRecord  # The token as it was stored when the lease was taken.
    shown_expiry: int | None  # The expiry that the caller was shown, if it is not the real one.

    def without_shown_expiry(self, saved: TokenRecord) -> TokenRecord:
        """Return what to save: a token that was not refreshed keeps the expiry that is stored.

        An application may look a token up and save it without a refresh in between.
        """
        shown = (self.seen.access_token, self.shown_expiry)
        if self.shown_expiry is None or shown != (saved.access_token, saved.expiry_time):
            return saved
        return replace(saved, expiry_time=None)


# A caller is a context: a thread, a task or a greenlet, whatever was patched when. A context can
# be a copy of another one, as asyncio.to_thread() makes it, and as new threads get it in Python
# without the global interpreter lock. A copied entry would let two threads refresh at once, so it
# counts only in the thread that made it. Of the tasks of one thread that were copied from a context
# with a lease, only the first renews it, because it then gets another owner.
_held_in_context: ContextVar[Mapping[tuple[object, str], Held]] = ContextVar(
    "zoho_orm_store_refresh_leases", default=MappingProxyType({})
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
        self.observe_wait: Callable[[Wait], AbstractContextManager[object]] | None = None
        """Opened around each caller's pauses, such as for a span."""
        self._leases = leases
        self._policy = policy
        self._clock = clock
        self._swept_at = float("-inf")
        self._forked()
        tell_forked_children(self)

    def _forked(self) -> None:
        """Start, also in a forked child, which has none of its parent's leases."""
        self._identity = object()
        """Marks our entries in the contexts. A forked child gets a new mark."""
        self._lock = threading.Lock()
        self.stats = RefreshStats()
        self._being_taken: set[str] = set()
        self._tried_ahead: dict[str, tuple[int | None, float]] = {}
        # Processes that try one after another do not compete for the lease.
        ahead = self._policy.ahead * self._clock.uniform(0.9, 1)
        self._margin = max(_USABLE, ahead)

    def is_settled(self, found: TokenRecord | None) -> bool:
        """Whether there is nothing to decide: the token is live, and the caller has no lease."""
        is_live = found is not None and self._is_live(found, self._margin)
        return is_live and not _held_in_context.get()

    def is_usable(self, found: TokenRecord, scope_parts: tuple[str, ...]) -> bool:
        """Whether a token may be used from memory: it is live, and the caller has no lease on it.

        A lease on another token, which the caller may have left, does not matter.
        """
        if not self._is_live(found, self._margin):
            return False
        if not _held_in_context.get():
            return True
        key = key_to_refresh(found, scope_parts)
        return key is None or self.held(key) is None

    def settle(
        self,
        found: TokenRecord | None,
        asked: TokenRecord | None,
        look_again: Callable[[], TokenRecord | None],
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
        key = None if record is None else key_to_refresh(record, scope_parts)
        if record is None or key is None:
            return Settled(found)
        if self._is_live(record, self._margin if found else SDK_MARGIN):
            self.forget(key)
            return Settled(found)
        if found is None or not self._is_live(found, _USABLE):
            return self._refresh_or_wait(_Request(key, asked, look_again, _USABLE), found)
        return self._refresh_ahead(_Request(key, None, look_again, self._margin), found)

    def lease_for(self, record: TokenRecord, scope_parts: tuple[str, ...]) -> str | None:
        """Return the key of the caller's lease that a save of a token ends, if there is one."""
        if not _held_in_context.get():
            return None
        keys = keys_to_release(record, scope_parts)
        leases = [(held.until, key) for key in keys if (held := self.held(key))]
        return max(leases)[1] if leases else None

    def held(self, key: str) -> Held | None:
        """Return the caller's own lease, also after it has ended."""
        notice_fork()
        held = _held_in_context.get().get((self._identity, key))
        return held if held and held.thread == threading.get_ident() else None

    def forget(self, key: str) -> None:
        """Note that the caller has released a lease, or does not need it."""
        leases = _held_in_context.get()
        mine = (self._identity, key)
        if mine in leases:
            _held_in_context.set({each: leases[each] for each in leases if each != mine})

    def remember_seen(self, record: TokenRecord, scope_parts: tuple[str, ...]) -> None:
        """Keep the caller's next save of a token from undoing what others save meanwhile."""
        key = key_to_refresh(record, scope_parts)
        if key is not None and self.held(key) is None:
            until = self._clock.monotonic()
            self._remember(key, Held("", threading.get_ident(), until, record, None))

    def failed(self, key: str, *, refused: bool = False) -> TokenRecord | None:
        """Give up the caller's lease, because its refresh has failed.

        Args:
            key: The lease.
            refused: Whether Zoho has refused the refresh for good.

        Returns:
            The token to go on with, if it was refreshed ahead of its end.
        """
        held = self.held(key)
        if held is None:
            return None
        self.forget(key)
        self._count(failed=1)
        logger.info("A refresh has failed (%.8s)", key)
        self._try_to_write(partial(self._leases.fail, refused=refused), key, held.owner)
        if not self._is_live(held.seen, SDK_MARGIN):
            return None
        # The SDK saves the live token once more. That must not undo what others do meanwhile.
        self._remember(key, held)
        return held.seen

    def _refresh_or_wait(self, request: _Request, found: TokenRecord | None) -> Settled:
        with ExitStack() as observing:
            wait = Wait(self._clock, self._policy, self.observe_wait, observing)
            return self._take_turns(request, found, wait)

    def _take_turns(self, request: _Request, found: TokenRecord | None, wait: Wait) -> Settled:
        key = request.key
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
                    wait.outcome = "waited" if settled.on_failure is None else "acquired"
                    return settled
                step = wait_or_time_out(wait.seconds, self._policy)
            if step is not Step.WAIT:
                return self._end_wait(step, key, found, wait)
            wait.pause()
            # In this order: a lease is released in the transaction that saves the token.
            holder, found = self._leases.holder(key), request.look_again()

    def _refresh_ahead(self, request: _Request, live: TokenRecord) -> Settled:
        """Hand the live token to everyone, but to one caller as if it had expired."""
        key, settled, is_mine = request.key, None, False
        try:
            # The SDK may ask twice before one refresh, as it does inside acting_as().
            if self._has_lease(key) or self._is_first_to_try_ahead(key, live):
                holder = self._leases.holder(key)
                is_mine = self._is_mine(key, holder)
                if may_refresh_ahead(holder, self._policy, is_mine=is_mine):
                    settled = self._try_to_refresh(request, holder)
        except ZohoOrmStoreError as error:
            logger.info("A token could not be refreshed ahead (%.8s): %s", key, error)
        if settled is None:
            return Settled(live)
        self._count(ahead=settled.on_failure is not None and not is_mine)
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
        with ExitStack() as unless_needed:
            unless_needed.callback(self._give_back, key, owner)
            found = request.look_again()
            if self._is_enough(found, request):
                return Settled(found)
            unless_needed.pop_all()
        # The SDK may ask twice before one refresh: the second time, the lease is only renewed.
        is_renewed = self._is_mine(key, before)
        is_taken_over = before is not None and not before.is_free and not is_renewed
        self._count(acquired=not is_renewed, taken_over=is_taken_over)
        if is_taken_over:
            logger.info("The lease %.8s is taken over; its last owner did not release it", key)
        else:
            logger.debug("The lease %.8s is acquired", key)
        shown = found and shown_as_expired(found, self._clock.time())
        shown_expiry = shown.expiry_time if shown and shown is not found else None
        seen = found or request.asked or TokenRecord()
        until = self._clock.monotonic() + self._policy.lease
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

    def _end_wait(self, step: Step, key: str, found: TokenRecord | None, wait: Wait) -> Settled:
        counter, outcome = _OUTCOMES[step]
        waited, wait.outcome = wait.seconds, counter
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

    def _has_lease(self, key: str) -> bool:
        """Whether the caller took a lease that has not ended, as far as it knows."""
        held = self.held(key)
        return held is not None and self._clock.monotonic() < held.until

    def _is_mine(self, key: str, holder: Holder | None) -> bool:
        held = self.held(key)
        return bool(held and holder and holder.owner == held.owner)

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
            counted = {name: getattr(self.stats, name) + number for name, number in by.items()}
            self.stats = self.stats._replace(**counted)

    def _is_live(self, record: TokenRecord, margin: float) -> bool:
        return not ends_within(record, margin, self._clock.time())

    def _is_enough(self, found: TokenRecord | None, request: _Request) -> bool:
        """Whether the stored token needs no refresh, or else the one that the caller asked with."""
        if found is not None:
            return self._is_live(found, request.margin)
        return request.asked is None or self._is_live(request.asked, SDK_MARGIN)


class Wait:
    """One caller's wait: how long it has lasted, and since when the lease has had its owner.

    Args:
        clock: The time.
        policy: How long waits last.
        observe: Opened at the first pause.
        observing: Closes at the end of the wait what was opened.

    Attributes:
        outcome: How the wait has ended: the name of a counter in the stats; ``None`` after an
            error.
    """

    def __init__(
        self,
        clock: Clock,
        policy: RefreshPolicy,
        observe: Callable[[Wait], AbstractContextManager[object]] | None,
        observing: ExitStack,
    ) -> None:
        self.outcome: str | None = None
        self._observe = observe
        self._observing = observing
        self._clock = clock
        self._longest = policy.wait
        self._started = self._owner_since = clock.monotonic()
        self._owner: object = None
        self._next_pause = _FIRST_PAUSE
        self._paused = 0.0

    @property
    def seconds(self) -> float:
        """Seconds since the beginning; 0 before the first pause."""
        if not self._paused:
            return 0.0
        # A test may have stopped the clock.
        return max(self._clock.monotonic() - self._started, self._paused)

    def watched(self, holder: Holder | None) -> float:
        """Seconds since the lease was first seen with the owner that it has now."""
        owner, now = holder and holder.owner, self._clock.monotonic()
        if owner != self._owner:
            self._owner, self._owner_since = owner, now
        return now - self._owner_since

    def pause(self) -> None:
        """Sleep for a time that grows, and that differs between callers."""
        if self._observe is not None:
            self._observing.enter_context(self._observe(self))
            self._observe = None
        left = self._longest - self.seconds
        shortest = self._next_pause / 2
        pause = max(0.0, min(self._clock.uniform(shortest, self._next_pause), left))
        self._clock.sleep(pause)
        self._paused += pause
        self._next_pause = min(self._next_pause * 1.5, _LONGEST_PAUSE)
