"""The lease on a token's refresh: one owner at a time, on every database."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from databases import SERVERS
from sqlalchemy import create_engine, event, text

from zoho_orm_store import RefreshLease
from zoho_orm_store.lease import Leases, lease_key
from zoho_orm_store.scopes import EVERYTHING, Scope
from zoho_orm_store.statements import LeaseStatements, server_time

KEY = lease_key("refresh_token", "1000.refresh", "ada", EVERYTHING)
OTHER_KEY = lease_key("refresh_token", "1000.refresh", "bob", EVERYTHING)
TABLE = RefreshLease.__table__


@pytest.fixture
def engine(database):
    engine = create_engine(database)
    with engine.begin() as connection:
        connection.execute(TABLE.delete())
    yield engine
    engine.dispose()


@pytest.fixture
def leases(engine):
    """Each operation in a transaction of its own, as the store runs them."""

    class EachInItsTransaction:
        def __getattr__(self, name):
            def run(*args):
                with engine.begin() as connection:
                    return getattr(Leases(connection, TABLE), name)(*args)

            return run

    return EachInItsTransaction()


def test_the_first_gets_it_and_another_does_not(leases):
    taken = leases.take(KEY, "ada's", 10)
    assert taken.owner == "ada's"
    assert 9 < taken.left <= 10
    assert leases.take(KEY, "bob's", 99).owner == "ada's"
    assert leases.holder(KEY).owner == "ada's"
    assert leases.holder(KEY).left <= 10
    assert leases.take(OTHER_KEY, "bob's", 10).owner == "bob's"


def test_its_owner_renews_it(leases):
    leases.take(KEY, "ada's", 1)
    assert leases.take(KEY, "ada's", 30).left > 29


def test_only_its_owner_releases_it(leases):
    leases.take(KEY, "ada's", 10)
    assert not leases.release(KEY, "bob's")
    assert leases.holder(KEY).owner == "ada's"
    assert leases.release(KEY, "ada's")
    assert leases.holder(KEY) is None
    assert not leases.release(KEY, "ada's")


def test_one_that_has_ended_is_taken_over_and_its_former_owner_cannot_release_it(leases):
    leases.take(KEY, "ada's", 0.05)
    time.sleep(0.1)
    ended = leases.holder(KEY)
    assert ended.is_over
    assert leases.take(KEY, "bob's", 10, ended).owner == "bob's"
    assert leases.holder(KEY).left > 9
    assert not leases.release(KEY, "ada's")
    leases.fail(KEY, "ada's", 1)
    assert leases.holder(KEY).owner == "bob's"


def test_a_failed_refresh_leaves_a_mark_and_the_lease_is_free(leases):
    leases.take(KEY, "ada's", 10)
    leases.fail(KEY, "ada's", 1)
    marked = leases.holder(KEY)
    assert (marked.failures, marked.is_over) == (1, True)
    taken = leases.take(KEY, "bob's", 10, marked)
    assert (taken.owner, taken.failures) == ("bob's", 0)
    leases.fail(KEY, "bob's", 2)
    assert leases.holder(KEY).failures == 2


@pytest.mark.parametrize("dialect", ["its own", "another"])
def test_who_has_seen_something_else_before_does_not_get_it(engine, dialect):
    with engine.begin() as connection:
        leases = Leases(connection, TABLE)
        if dialect == "another":
            leases._statements = LeaseStatements(TABLE, "another")
        leases.take(KEY, "ada's", 10)
        leases.fail(KEY, "ada's", 1)
        seen = leases.holder(KEY)
        leases.take(KEY, "bob's", 10, seen)
        leases.fail(KEY, "bob's", 2)
        assert leases.take(KEY, "eve's", 10, seen).failures == 2
        assert leases.take(KEY, "eve's", 10).failures == 2
        assert leases.take(KEY, "eve's", 10, leases.holder(KEY)).owner == "eve's"


def test_of_many_at_once_one_gets_it(engine, leases):
    for attempt in range(5):
        barrier = Barrier(16)

        def take(number, barrier=barrier, key=f"{attempt}{KEY[1:]}"):
            barrier.wait()
            return leases.take(key, f"owner {number}", 10)

        with ThreadPoolExecutor(16) as pool:
            owners = {holder.owner for holder in pool.map(take, range(16)) if holder is not None}
        assert len(owners) == 1


def test_what_has_long_ended_is_swept_and_nothing_else(engine, leases):
    for number in range(130):
        leases.take(f"{number:064d}", "killed", 0.001)
    leases.take(KEY, "ada's", 10)
    leases.take(OTHER_KEY, "just ended", 0.001)
    with engine.begin() as connection:
        connection.execute(
            text("UPDATE oauthtoken_refresh_lease SET expires_at = expires_at - 61000 "
                 "WHERE owner = 'killed'")
        )  # fmt: skip
    assert [leases.sweep(), leases.sweep(), leases.sweep()] == [100, 30, 0]
    assert leases.holder(KEY).owner == "ada's"
    assert leases.holder(OTHER_KEY).owner == "just ended"


def test_a_database_without_an_upsert_of_ours_keeps_one_owner(engine):
    statements = LeaseStatements(TABLE, "another")
    assert statements.take_may_raise
    with engine.begin() as connection:
        leases = Leases(connection, TABLE)
        leases._statements = statements
        assert leases.take(KEY, "ada's", 10).owner == "ada's"
        assert leases.take(KEY, "bob's", 10).owner == "ada's"
        assert leases.take(KEY, "ada's", 30).left > 29
        assert leases.release(KEY, "ada's")
        ended = leases.take(KEY, "bob's", -1)
        assert leases.take(KEY, "ada's", 10, ended).owner == "ada's"


def test_it_costs_one_round_trip_to_look_and_two_to_take(engine, leases):
    statements = []
    event.listen(engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    leases.holder(KEY)
    assert len(statements) == 1
    statements.clear()
    leases.take(KEY, "ada's", 10)
    assert len(statements) == 2


def test_a_server_goes_by_its_own_clock(engine, leases, monkeypatch):
    """The clocks of two machines may differ by as much as they like."""
    leases.take(KEY, "ada's", 10)
    hours_apart = time.time() + 7200
    monkeypatch.setattr("zoho_orm_store.lease.time", lambda: hours_apart)
    is_a_file = engine.dialect.name == "sqlite"
    seen = leases.holder(KEY)
    assert seen.is_over == is_a_file
    assert leases.take(KEY, "bob's", 10, seen).owner == ("bob's" if is_a_file else "ada's")


def test_a_failure_is_over_even_if_the_clock_is_set_back_after_it(engine, leases):
    leases.take(KEY, "ada's", 10)
    leases.fail(KEY, "ada's", 2)
    with engine.begin() as connection:
        connection.execute(TABLE.update().values(expires_at=TABLE.c.expires_at + 3_600_000))
    mark = leases.holder(KEY)
    assert mark.left > 3000
    assert mark.is_over
    assert leases.take(KEY, "bob's", 10, mark).owner == "bob's"


@pytest.mark.parametrize("database", SERVERS, indirect=True)
def test_a_servers_clock_is_that_of_the_world_whatever_its_time_zone(database):
    statement = server_time(database.get_backend_name())
    engine = create_engine(database)
    with engine.connect() as connection:
        zone = "SET TIME ZONE 'Europe/Berlin'"
        if database.get_backend_name() == "mysql":
            zone = "SET time_zone = '+02:00'"
            sql = str(statement.compile(engine))
            assert "utc_timestamp(" in sql, "NOW() has an hour twice where summer time ends"
        connection.execute(text(zone))
        assert abs(float(connection.scalar(statement)) - time.time()) < 2
    engine.dispose()


def test_the_key_tells_tokens_users_and_tenants_apart():
    keys = {
        lease_key(field, value, user, scope)
        for field in ("refresh_token", "grant_token")
        for value in ("a", "b")
        for user in (None, "ada", "bob")
        for scope in (EVERYTHING, Scope((("tenant_id", 7),)), Scope((("tenant_id", 8),)))
    }
    assert len(keys) == 36
    assert {len(key) for key in keys} == {64}
