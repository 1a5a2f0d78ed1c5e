"""One refresh for many callers: every rule, with leases in memory and a clock that does not wait.

A caller is a context of its own. What others do while a caller waits is an event of the clock.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
from dataclasses import replace
from functools import partial
from itertools import count

import pytest
from greenlet import greenlet

from zoho_orm_store import ConfigurationError, RefreshFailedError, RefreshPolicy, TokenRecord
from zoho_orm_store._refresh.coordinator import Clock, RefreshCoordinator, Settled
from zoho_orm_store._refresh.rules import REFUSED, Holder, Step, lease_key, next_step
from zoho_orm_store._refresh.sdk_behaviour import watch_request
from zoho_orm_store._sdk.conversion import SDKException
from zoho_orm_store.errors import DatabaseError, DatabaseUnreachableError
from zoho_orm_store.refresh import RefreshStats

FOREVER = 10.0**12
TOKEN = TokenRecord(id="1", user_name="ada", refresh_token="1000.r", access_token="1000.a")
EXPIRED = replace(TOKEN, expiry_time=1)
KEY = lease_key("refresh_token", "1000.r", "ada")


class FakeClock(Clock):
    """Sleeping lets the time pass at once, and does what was to happen meanwhile."""

    def __init__(self):
        self.now = 0.0
        self._numbers = count()
        self._events = []

    def time(self):
        return 1_700_000_000 + self.now

    def monotonic(self):
        return self.now

    def uniform(self, least, most):
        return most

    def sleep(self, seconds):
        until = self.now + seconds
        while self._events and min(self._events)[0] <= until:
            event = min(self._events)
            self._events.remove(event)
            self.now = max(self.now, event[0])
            event[2]()
        self.now = max(self.now, until)

    def after(self, seconds, action):
        self._events.append((self.now + seconds, next(self._numbers), action))


class MemoryLeases:
    """What the lease table does, in a dictionary of `[owner, failures, end]`."""

    def __init__(self, clock):
        self._clock = clock
        self.rows = {}
        self.calls = []
        self.refuse = {}

    def _call(self, name):
        self.calls.append(name)
        if name in self.refuse:
            raise self.refuse[name]

    def holder(self, key):
        self._call("holder")
        if key not in self.rows:
            return None
        owner, failures, end = self.rows[key]
        return Holder(owner, failures, end - self._clock.now)

    def take(self, key, seen, owner, failures, seconds):
        self._call("take")
        row = self.rows.get(key)
        if (row is None) != (seen is None) or (row and tuple(row[:2]) != tuple(seen[:2])):
            return False
        self.rows[key] = [owner, failures, self._clock.now + seconds]
        return True

    def release(self, key, owner):
        self._call("release")
        is_owned = key in self.rows and self.rows[key][0] == owner
        if is_owned:
            del self.rows[key]
        return is_owned

    def fail(self, key, owner, *, refused=False):
        self._call("fail")
        if key in self.rows and self.rows[key][0] == owner:
            new_owner = REFUSED if refused else ""
            self.rows[key] = [new_owner, self.rows[key][1] + 1, self._clock.now]

    def sweep(self):
        self._call("sweep")
        return 0


class World:
    """A store's one token, its leases, and the time."""

    def __init__(self):
        self.clock = FakeClock()
        self.leases = MemoryLeases(self.clock)
        self.stored = EXPIRED

    def process(self, **policy):
        return RefreshCoordinator(self.leases, RefreshPolicy(**policy), self.clock)

    def caller(self, process=None, **policy):
        return Caller(self, process or self.process(**policy))

    def live(self, access_token="1000.new", seconds=3600.0):
        expiry_time = int((self.clock.time() + seconds) * 1000)
        return replace(TOKEN, access_token=access_token, expiry_time=expiry_time)


class Caller:
    """A context that does what a store does, on behalf of the SDK."""

    def __init__(self, world, process):
        self._world = world
        self._context = contextvars.Context()
        self.process = process

    def run(self, work, *args):
        return self._context.run(work, *args)

    def find(self, asked=None, scope=()):
        return self.run(self._find, asked, scope)

    def _find(self, asked, scope):
        look = lambda: self._world.stored  # noqa: E731
        if self.process.is_settled(look()):
            return Settled(look())
        return self.process.settle(look(), asked, look, scope)

    def save(self, record):
        return self.run(self._save, record)

    def _save(self, record):
        """Save a token, and return whether the caller still had a lease for it."""
        key = self.process.lease_for(record, ())
        held = None if key is None else self.process.held(key)
        if held is None:
            self._world.stored = record
            return False
        record = held.without_shown_expiry(record)
        is_ours = self._world.leases.release(key, held.owner)
        if record.expiry_time is None:
            record = replace(record, expiry_time=held.seen.expiry_time)
        if is_ours or self._world.stored == held.seen:
            self._world.stored = record
        self.process.forget(key)
        return is_ours

    def refresh(self):
        return self.save(self._world.live())

    def fail(self, *, refused=False):
        return self.run(partial(self.process.failed, refused=refused), KEY)


@pytest.fixture
def world():
    return World()


@pytest.fixture
def owner(world):
    """A caller of another process that has the lease."""
    owner = world.caller()
    assert owner.find().on_failure is not None
    return owner


def is_to_refresh(settled):
    return settled.on_failure is not None


# One refreshes, and the others wait


def test_the_first_caller_is_handed_the_expired_token_at_once(world):
    settled = world.caller().find()
    assert settled.record == EXPIRED
    assert is_to_refresh(settled)
    assert world.clock.now == 0


def test_the_others_get_what_the_first_has_saved(world, owner):
    world.clock.after(1, owner.refresh)
    other = world.caller()
    settled = other.find()
    assert (settled.record.access_token, settled.on_failure) == ("1000.new", None)
    assert 1 <= world.clock.now < 1.3
    seconds = other.process.stats.seconds_waited
    assert other.process.stats == RefreshStats(waited=1, seconds_waited=seconds)
    assert seconds == world.clock.now


def test_a_save_ends_the_lease(world, owner):
    assert owner.refresh()
    assert world.leases.rows == {}
    assert owner.process.stats == RefreshStats(acquired=1)


def test_the_owner_passes_at_once_when_it_asks_again(world, owner):
    for _ in range(3):
        assert is_to_refresh(owner.find())
    assert world.clock.now == 0
    assert owner.process.stats == RefreshStats(acquired=1), "all of it is one refresh"
    assert owner.refresh()


def test_one_caller_of_a_process_at_a_time_tries_to_take_the_lease(world):
    process = world.process(wait=1)
    slow, second = world.caller(process), world.caller(process)
    take = world.leases.take
    results = []

    def take_meanwhile(*args):
        world.leases.take = take
        world.clock.after(0.5, partial(setattr, world, "stored", world.live()))
        results.append(second.find())
        return take(*args)

    world.leases.take = take_meanwhile
    assert slow.find().record.access_token == "1000.new"
    assert results[0].record.access_token == "1000.new"
    assert world.leases.calls.count("take") == 1
    assert world.leases.rows == {}, "a live token was found under the lease, which is given back"


def test_a_missing_token_is_waited_for_like_an_expired_one(world):
    world.stored, asked = None, replace(TOKEN, id=None, access_token=None)
    first = world.caller()
    settled = first.find(asked)
    assert settled.record is None
    assert is_to_refresh(settled)
    world.clock.after(1, first.refresh)
    assert world.caller().find(asked).record.access_token == "1000.new"


def test_a_grant_code_is_exchanged_once(world):
    world.stored, asked = None, TokenRecord(client_id="c", grant_token="1000.code")
    first = world.caller()
    assert is_to_refresh(first.find(asked))
    world.clock.after(1, lambda: first.save(replace(world.live(), grant_token="1000.code")))
    assert world.caller().find(asked).record.refresh_token == "1000.r"
    assert world.leases.rows == {}


def test_the_user_may_become_known_by_the_refresh(world):
    world.stored = None
    first = world.caller()
    first.find(TokenRecord(refresh_token="1000.r"))
    assert first.refresh()
    assert world.leases.rows == {}


def test_two_users_with_one_refresh_token_do_not_wait_for_each_other_B10(world, owner):
    world.stored = replace(EXPIRED, user_name="bob")
    assert is_to_refresh(world.caller().find())


def test_two_tenants_do_not_wait_for_each_other(world, owner):
    assert is_to_refresh(world.caller().find(scope=("tenant_id", "7")))
    assert len(world.leases.rows) == 2


def test_a_token_that_nothing_can_refresh_is_handed_out_as_it_is(world):
    world.stored = replace(EXPIRED, refresh_token=None)
    assert world.caller().find() == Settled(world.stored)
    world.stored = None
    assert world.caller().find(TokenRecord(user_name="nobody")) == Settled(None)
    assert world.caller().find() == Settled(None)
    assert world.leases.calls == []


def test_a_live_token_costs_nothing(world):
    for stored in (world.live(), replace(TOKEN, expiry_time=None)):
        world.stored = stored
        caller = world.caller()
        assert caller.run(caller.process.is_settled, world.stored)
        assert caller.run(caller.process.lease_for, world.stored, ()) is None
        assert caller.find() == Settled(world.stored)
    assert world.leases.calls == []


def test_a_token_counts_as_expired_a_little_before_the_sdk_refreshes_it(world):
    world.stored = world.live(seconds=5.3)
    assert not is_to_refresh(world.caller().find())
    world.stored = world.live(seconds=5.2)
    settled = world.caller().find()
    assert is_to_refresh(settled)
    assert settled.record.expiry_time <= world.clock.time() * 1000, "so that the SDK refreshes it"


# A caller is a context


def test_a_copied_context_in_another_thread_does_not_own_the_lease(world, owner):
    copy = owner.run(contextvars.copy_context)
    found = []
    work = partial(copy.run, owner.process.held, KEY)
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    assert found == [None]
    assert work() is not None


def test_a_task_is_a_caller_of_its_own(world):
    process = world.process(wait=0)

    async def call():
        return is_to_refresh(process.settle(EXPIRED, None, lambda: EXPIRED, ()))

    async def calls():
        return await asyncio.gather(*(call() for _ in range(4)))

    assert asyncio.run(calls()) == [True, False, False, False]


def test_a_greenlet_is_a_caller_of_its_own_without_any_patch_H5(world):
    process = world.process(wait=0)

    def call():
        return is_to_refresh(process.settle(EXPIRED, None, lambda: EXPIRED, ()))

    assert [greenlet(call).switch() for _ in range(4)] == [True, False, False, False]


def test_of_the_tasks_that_inherit_a_lease_one_goes_on_with_it(world):
    process = world.process(wait=0)

    async def call():
        return is_to_refresh(process.settle(EXPIRED, None, lambda: EXPIRED, ()))

    async def calls():
        assert await call()
        return await asyncio.gather(*(call() for _ in range(4)))

    assert asyncio.run(calls()) == [True, False, False, False]


def test_a_forked_child_has_no_lease_of_its_parents_H4(world, owner):
    owner.process._forked()
    assert owner.run(owner.process.held, KEY) is None
    assert owner.process.stats == RefreshStats()


def test_a_lease_of_another_store_is_not_this_ones(world, owner):
    assert owner.run(world.process().held, KEY) is None


# An owner that does not come back


def test_an_owner_that_never_comes_back_is_replaced_when_its_lease_ends(world, owner):
    other = world.caller(lease=10, wait=15)
    assert is_to_refresh(other.find())
    assert 10 <= world.clock.now < 10.3
    stats = other.process.stats
    assert (stats.acquired, stats.taken_over, stats.timed_out) == (1, 1, 0)


def test_nobody_waits_longer_than_the_policy_says(world, owner):
    other = world.caller(lease=30, wait=0.4)
    assert other.find() == Settled(EXPIRED)
    assert world.clock.now == pytest.approx(0.4)
    assert other.process.stats.timed_out == 1


def test_without_a_wait_everybody_gets_what_is_stored_at_once(world, owner):
    assert world.caller(wait=0).find() == Settled(EXPIRED)
    assert world.clock.now == 0


def test_pauses_grow_and_have_a_limit(world, owner):
    pauses = []
    world.clock.sleep = lambda seconds: (
        pauses.append(seconds) or FakeClock.sleep(world.clock, seconds)
    )
    world.caller(wait=2).find()
    assert pauses[0] == 0.05
    assert pauses[:-1] == sorted(pauses[:-1])
    assert max(pauses) == 0.2


def test_a_save_that_comes_too_late_knows_that_the_lease_was_lost(world, owner):
    other = world.caller()
    other.find()
    other.save(world.live("1000.newer"))
    assert not owner.save(world.live("1000.older"))
    assert world.stored.access_token == "1000.newer"


def test_a_lost_lease_is_forgotten_once_a_live_token_was_found_E1(world, owner):
    world.stored = world.live("1000.theirs")
    owner.find()
    owner.save(world.live("1000.mine"))
    assert world.stored.access_token == "1000.mine"


def test_a_lease_is_remembered_for_an_hour_after_its_end(world, owner):
    world.clock.now = 3000
    world.stored = replace(EXPIRED, refresh_token="1000.other")
    owner.find()
    assert owner.run(owner.process.held, KEY) is not None
    world.clock.now = 4000
    world.stored = replace(EXPIRED, refresh_token="1000.third")
    owner.find()
    assert owner.run(owner.process.held, KEY) is None


# Failures


def test_one_more_caller_tries_after_a_refresh_that_failed(world, owner):
    world.clock.after(1, owner.fail)
    assert is_to_refresh(world.caller().find())
    assert 1 <= world.clock.now < 1.3
    assert owner.process.stats == RefreshStats(acquired=1, failed=1)


@pytest.mark.parametrize("refused", [False, True])
def test_after_two_failures_those_who_wait_do_not_try(world, owner, refused):
    second, waiting = world.caller(), world.caller()

    def fail_and_try_again():
        owner.fail(refused=refused)
        assert is_to_refresh(second.find())

    world.clock.after(1, fail_and_try_again)
    world.clock.after(2, partial(second.fail, refused=refused))
    with pytest.raises(RefreshFailedError, match="did not try"):
        waiting.find()
    assert 2 <= world.clock.now < 2.3
    assert (waiting.process.stats.skipped, waiting.process.stats.acquired) == (1, 0)
    assert world.leases.rows[KEY][:2] == [REFUSED if refused else "", 2]


def test_whoever_comes_after_the_failures_tries_for_itself(world, owner):
    owner.fail()
    second = world.caller()
    second.find()
    second.fail()
    later = world.caller()
    assert is_to_refresh(later.find())
    assert world.clock.now == 0
    later.refresh()
    assert world.leases.rows == {}


def test_failures_of_long_ago_do_not_count(world, owner):
    owner.fail()
    world.clock.now = 61
    second = world.caller()
    second.find()
    second.fail()
    assert world.leases.rows[KEY][:2] == ["", 1]


def test_a_failure_keeps_nobody_out_even_if_the_clock_is_set_back_after_it(world, owner):
    owner.fail()
    world.leases.rows[KEY][2] += 3600
    assert is_to_refresh(world.caller().find())
    assert world.clock.now == 0


def test_a_failure_without_a_lease_is_nothing(world):
    caller = world.caller()
    assert caller.fail() is None
    assert caller.process.stats == RefreshStats()


def test_a_lookup_that_fails_under_the_lease_gives_it_back(world):
    process, looks = world.process(), []

    def look():
        looks.append(1)
        return 1 / 0

    with pytest.raises(ZeroDivisionError):
        process.settle(EXPIRED, None, look, ())
    assert looks == [1]
    assert world.leases.rows == {}


def test_a_token_that_is_deleted_meanwhile_is_waited_for_no_longer(world, owner):
    world.clock.after(1, partial(setattr, world, "stored", None))
    assert world.caller().find() == Settled(None)
    assert 1 <= world.clock.now < 1.3


def test_a_database_that_goes_away_during_a_wait_is_an_error_at_once(world, owner):
    gone = DatabaseUnreachableError("gone")
    world.clock.after(1, lambda: world.leases.refuse.update(holder=gone))
    with pytest.raises(DatabaseUnreachableError):
        world.caller().find()
    assert 1 <= world.clock.now < 1.3


def test_while_the_database_is_read_only_everybody_refreshes_by_itself_H7(world):
    world.leases.refuse = dict.fromkeys(("take", "release", "fail"), DatabaseError("read-only"))
    assert world.caller().find() == Settled(EXPIRED)
    world.stored = world.live(seconds=60)
    assert world.caller(ahead=100).find() == Settled(world.stored)


@pytest.mark.parametrize("operation", ["release", "fail", "sweep"])
def test_a_lease_that_cannot_be_given_back_ends_by_itself(world, operation):
    world.leases.refuse = {operation: DatabaseError("read-only")}
    owner = world.caller()
    process = owner.process
    live = world.live()
    assert process.settle(EXPIRED, None, lambda: live, ()) == Settled(live)
    world.leases.rows.clear()
    owner.find()
    owner.fail()
    assert process.stats.failed == 1


def test_ended_leases_are_swept_once_a_minute(world):
    process = world.process()
    for now in (0, 30, 61):
        world.clock.now = now
        world.stored = replace(EXPIRED, refresh_token=f"1000.{now}")
        world.caller(process).find()
    assert world.leases.calls.count("sweep") == 2


# A lease that somebody planted


@pytest.mark.parametrize("owner", ["", "garbage", "\N{PILE OF POO}" * 64, b"\xff"])
@pytest.mark.parametrize("failures", [0, -(2**31), 2**31 - 1])
@pytest.mark.parametrize("end", [-FOREVER, 0, FOREVER])
def test_a_planted_lease_costs_at_most_the_policys_lease_J4(world, owner, failures, end):
    world.leases.rows[KEY] = [owner, failures, end]
    caller = world.caller(lease=10, wait=15)
    assert is_to_refresh(caller.find())
    assert world.clock.now < 10.3
    caller.fail()
    assert 1 <= world.leases.rows[KEY][1] <= 3


@pytest.mark.parametrize("owner", ["", "garbage"])
def test_a_planted_lease_makes_no_waiting_caller_raise_J4(world, owner):
    world.caller().find()
    plant = partial(world.leases.rows.update, {KEY: [owner, 99, FOREVER]})
    world.clock.after(1, plant)
    assert is_to_refresh(world.caller(lease=10, wait=15).find())


def test_a_planted_lease_does_not_hide_a_live_token_J4(world):
    world.leases.rows[KEY] = ["garbage", 0, FOREVER]
    world.stored = world.live(seconds=60)
    assert world.caller(ahead=100).find() == Settled(world.stored)


# Refreshing ahead of the end


@pytest.fixture
def ending(world):
    """A token that ends in a minute."""
    world.stored = world.live("1000.ending", seconds=60)
    return world.stored


def test_one_caller_refreshes_early_while_the_others_go_on(world, ending):
    process = world.process(ahead=100)
    first = world.caller(process)
    settled = first.find()
    assert is_to_refresh(settled)
    assert settled.record.access_token == "1000.ending"
    assert settled.record.expiry_time <= world.clock.time() * 1000, "so that the SDK refreshes it"
    for _ in range(8):
        assert world.caller(process).find() == Settled(ending)
    assert first.refresh()
    assert process.stats == RefreshStats(acquired=1, ahead=1)
    assert world.clock.now == 0


def test_another_process_looks_at_the_lease_once_and_goes_on(world, ending):
    world.caller(ahead=100).find()
    other = world.process(ahead=100)
    del world.leases.calls[:]
    for _ in range(3):
        assert world.caller(other).find() == Settled(ending)
    assert world.leases.calls == ["holder"]


def test_processes_begin_at_different_times(world, ending, monkeypatch):
    monkeypatch.setattr(world.clock, "uniform", lambda least, most: least)
    assert not is_to_refresh(world.caller(ahead=66).find())
    assert is_to_refresh(world.caller(ahead=67).find())


def test_a_token_that_is_not_stored_is_no_match_C1(world, ending):
    asked, world.stored = world.stored, None
    assert world.caller(ahead=100).find(asked) == Settled(None)
    assert world.leases.calls == []


def test_an_early_refresh_that_fails_goes_on_with_the_live_token(world, ending):
    process = world.process(ahead=100, lease=10)
    first = world.caller(process)
    first.find()
    assert first.fail() == ending
    assert process.stats == RefreshStats(acquired=1, ahead=1, failed=1)


def test_after_an_early_failure_the_token_is_left_alone_for_the_time_of_a_lease(world, ending):
    first = world.caller(ahead=100, lease=10)
    first.find()
    first.fail()
    for now, tries in ((1, False), (9, False), (10.5, True)):
        world.clock.now = now
        assert is_to_refresh(world.caller(ahead=100, lease=10).find()) is tries


def test_the_save_after_an_early_failure_does_not_undo_a_newer_token(world, ending):
    first = world.caller(ahead=100)
    first.find()
    world.stored = world.live("1000.newer")
    first.save(first.fail())
    assert world.stored.access_token == "1000.newer"


def test_a_token_that_is_saved_and_was_not_refreshed_keeps_its_end(world, ending):
    caller = world.caller(ahead=100)
    shown = caller.find().record
    caller.save(replace(shown, redirect_url="https://example.com/new"))
    assert world.stored == replace(ending, redirect_url="https://example.com/new")


def test_an_end_of_ones_own_is_saved_all_the_same_E1(world, ending):
    caller = world.caller(ahead=100)
    caller.find()
    caller.save(replace(ending, expiry_time=7))
    assert world.stored.expiry_time == 7


@pytest.mark.parametrize("operation", ["holder", "take"])
def test_where_a_lease_cannot_be_had_the_live_token_goes_on(world, ending, operation):
    world.leases.refuse = {operation: DatabaseError("no such table")}
    assert world.caller(ahead=100).find() == Settled(ending)


def test_a_live_token_that_another_process_saved_meanwhile_is_handed_on(world, ending):
    process, newer = world.process(ahead=100), world.live("1000.newer")
    assert process.settle(ending, None, lambda: newer, ()) == Settled(newer)
    assert world.leases.rows == {}


def test_a_later_token_is_refreshed_ahead_again(world, ending):
    caller = world.caller(ahead=100)
    for number in range(3):
        assert is_to_refresh(caller.find())
        caller.save(world.live(f"1000.{number}", seconds=61 + number))
    assert caller.process.stats.ahead == 3


# What the SDK does with the token


class Request:
    """As much of an `OAuthToken` as its refresh needs."""

    def __init__(self, error=None):
        self.error, self.pair = error, None

    def refresh_access_token(self):
        if self.error is not None:
            raise self.error

    generate_access_token = refresh_access_token

    def set_access_token(self, access_token):
        self.pair = (access_token,)

    def set_expires_in(self, expires_in):
        self.pair += (expires_in,)


def test_a_request_that_succeeds_tells_nobody():
    request = Request()
    watch_request(request, lambda: 1 / 0)
    request.refresh_access_token()
    assert list(vars(request)) == ["error", "pair"], "the next request is not watched"


@pytest.mark.parametrize("error", [ValueError("refused"), KeyboardInterrupt()])
def test_a_request_that_fails_tells_so_and_raises(error):
    request, told = Request(error), []
    watch_request(request, lambda refused: told.append(refused))
    with pytest.raises(type(error)):
        request.generate_access_token()
    assert told == [False]


@pytest.mark.parametrize(
    ("method", "error", "refused"),
    [
        ("refresh_access_token", "invalid_code", True),
        ("refresh_access_token", "invalid_client", True),
        ("refresh_access_token", "invalid_client_secret", False),
        ("refresh_access_token", "Access Denied", False),
        ("generate_access_token", "invalid_code", False),
    ],
)
def test_what_zoho_refuses_for_good(method, error, refused):
    raised = SDKException("INVALID TOKEN ERROR", error)
    request, told = Request(raised), []
    watch_request(request, lambda refused: told.append(refused))
    with pytest.raises(SDKException):
        getattr(request, method)()
    assert told == [refused]


def test_a_request_that_fails_ahead_of_the_end_leaves_the_live_pair(world):
    request = Request(ValueError("refused"))
    watch_request(request, lambda refused: replace(TOKEN, expiry_time=7))
    assert request.refresh_access_token() is request
    assert request.pair == ("1000.a", "7")


# The pure decisions, and the policy


@pytest.mark.parametrize(
    ("holder", "waited", "watched", "step"),
    [
        (None, 0, 0, Step.TAKE),
        (Holder("x", 0, 9), 0, 0, Step.WAIT),
        (Holder("x", 0, 9), 15, 0, Step.TIME_OUT),
        (Holder("x", 0, -0.001), 15, 0, Step.TAKE),
        (Holder("x", 0, 99), 12, 10, Step.TAKE),
        (Holder("", 1, -1), 5, 0, Step.TAKE),
        (Holder("", 2, -1), 0, 0, Step.TAKE),
        (Holder("", 2, -1), 5, 0, Step.SKIP),
        (Holder("", 2, -6), 5, 0, Step.TAKE),
        (Holder("x", 2, 9), 5, 0, Step.WAIT),
    ],
)
def test_the_next_step(holder, waited, watched, step):
    state = {"waited": waited, "watched": watched}
    decide = partial(next_step, holder, RefreshPolicy(lease=10, wait=15), **state)
    assert decide(is_live=False, is_mine=False) is step
    assert decide(is_live=True, is_mine=False) is Step.USE


def test_ones_own_lease_is_taken_again():
    state = {"is_live": False, "is_mine": True, "waited": 0, "watched": 0}
    assert next_step(Holder("x", 0, 9), RefreshPolicy(), **state) is Step.TAKE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lease": 0}, "lease must be a number of seconds, from 0.001 to 3600, not 0."),
        ({"lease": 1e16}, "lease must be"),
        ({"lease": -1}, "lease must be"),
        ({"lease": float("inf")}, "lease must be"),
        ({"lease": "10"}, "lease must be"),
        ({"lease": True}, "lease must be"),
        ({"wait": -1}, "wait must be a number of seconds, from 0 to 3600, not -1."),
        ({"wait": None}, "wait must be"),
        ({"ahead": float("nan")}, "ahead must be"),
        ({"ahead": 3600}, "ahead must be a number of seconds, from 0 to 1800"),
    ],
)
def test_a_policy_that_cannot_be_used_is_refused(options, message):
    with pytest.raises(ConfigurationError, match=f"^{message}"):
        RefreshPolicy(**options)


def test_the_key_tells_tokens_users_and_tenants_apart():
    keys = {
        lease_key(field, value, user, scope)
        for field in ("refresh_token", "grant_token")
        for value in ("a", "b")
        for user in (None, "ada", "bob")
        for scope in ((), ("tenant_id", "7"), ("tenant_id", "8"))
    }
    assert len(keys) == 36
    assert {len(key) for key in keys} == {64}


def test_what_happens_is_logged_and_no_token_is_G3(world, caplog):
    caplog.set_level(logging.DEBUG, "zoho_orm_store")
    world.caller().find()
    world.caller(wait=0.1).find()
    second = world.caller()
    second.find()
    world.clock.after(1, second.refresh)
    world.caller().find()
    for part in ("is acquired", "and gave up", "is taken over", "and got its token"):
        assert part in caplog.text
    assert "1000." not in caplog.text


def test_the_systems_functions_are_looked_up_at_the_call_as_gevent_needs_it_H5(monkeypatch):
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    Clock().sleep(7)
    assert slept == [7]
    assert 0 <= Clock().uniform(0, 1) <= 1
    assert Clock().monotonic() <= Clock().monotonic()
    assert Clock().time() > 1_700_000_000
