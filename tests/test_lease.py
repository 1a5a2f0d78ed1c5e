"""The SQL of the leases, on every database."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from threading import Barrier

import pytest
from conftest import statements_counted
from databases import SERVERS
from sqlalchemy import create_engine, select, text

from zoho_orm_store import RefreshLease
from zoho_orm_store._refresh.leases import DatabaseLeases
from zoho_orm_store._refresh.rules import REFUSED, Holder, lease_key
from zoho_orm_store._sql.dialects import server_clock

KEY = lease_key("refresh_token", "1000.refresh", "ada")
OTHER_KEY = lease_key("refresh_token", "1000.refresh", "bob")
TABLE = RefreshLease.__table__


class EachInItsTransaction:
    def __init__(self, engine):
        self.engine = engine
        self.dialect_name = engine.dialect.name

    def write(self, work, *args, retry_for=None):
        with self.engine.begin() as connection:
            return work(connection, *args)

    read = write


@pytest.fixture
def engine(database):
    engine = create_engine(database)
    yield engine
    engine.dispose()


@pytest.fixture
def leases(engine):
    return DatabaseLeases(EachInItsTransaction(engine), TABLE)


@pytest.fixture
def plant(engine):
    """Writes a row as somebody else might."""

    def plant(**values):
        with engine.begin() as connection:
            connection.execute(TABLE.insert().values({"key": KEY, "failures": 0, **values}))

    return plant


def test_the_first_gets_it_and_another_does_not(leases):
    assert leases.take(KEY, None, "ada's", 1, 10)
    holder = leases.holder(KEY)
    assert holder[:2] == ("ada's", 1)
    assert 9 < holder.left <= 10
    assert not leases.take(KEY, None, "bob's", 0, 99)
    assert leases.holder(KEY).owner == "ada's"
    assert leases.take(OTHER_KEY, None, "bob's", 0, 10)


def test_a_lease_is_taken_as_it_was_seen_and_not_otherwise(leases):
    leases.take(KEY, None, "ada's", 0, 10)
    seen = leases.holder(KEY)
    assert leases.take(KEY, seen, "bob's", 1, 30)
    assert leases.holder(KEY)[:2] == ("bob's", 1)
    assert leases.holder(KEY).left > 29
    assert not leases.take(KEY, seen, "eve's", 0, 10)
    assert not leases.take(KEY, seen._replace(owner="bob's"), "eve's", 0, 10)


def test_taking_it_again_after_a_commit_whose_answer_was_lost_succeeds(leases):
    for seen in (None, leases.holder(KEY)):
        assert leases.take(KEY, seen, "ada's", 0, 10)
    seen = leases.holder(KEY)
    for _ in range(2):
        assert leases.take(KEY, seen, "bob's", 0, 10)


def test_a_lease_that_was_released_meanwhile_is_not_taken_as_seen(leases):
    leases.take(KEY, None, "ada's", 0, 10)
    seen = leases.holder(KEY)
    leases.release(KEY, "ada's")
    assert not leases.take(KEY, seen, "bob's", 0, 10)


def test_only_its_owner_releases_it(leases):
    leases.take(KEY, None, "ada's", 0, 10)
    assert not leases.release(KEY, "bob's")
    assert leases.release(KEY, "ada's")
    assert leases.holder(KEY) is None
    assert not leases.release(KEY, "ada's")


def test_a_failed_refresh_frees_it_and_is_counted(leases):
    leases.take(KEY, None, "ada's", 1, 10)
    leases.fail(KEY, "bob's")
    assert leases.holder(KEY).owner == "ada's"
    leases.fail(KEY, "ada's")
    holder = leases.holder(KEY)
    assert (holder.is_free, holder.failures) == (True, 2)
    assert holder.has_failed_within(5)
    assert leases.take(KEY, holder, "bob's", 2, 10)


def test_a_refusal_for_good_is_remembered_until_another_refresh(engine, leases):
    for key, refused in ((KEY, True), (OTHER_KEY, False)):
        leases.take(key, None, "ada's", 1, 10)
        leases.fail(key, "ada's", refused=refused)
    assert leases.refused() == {KEY}
    holder = leases.holder(KEY)
    assert (holder.is_free, holder.failures, holder.has_failed_within(5)) == (True, 2, True)
    for days, swept in ((89, 0), (91, 1)):
        with engine.begin() as connection:
            ended = int((time.time() - days * 86_400) * 1000)
            refused = TABLE.c.key == KEY
            connection.execute(TABLE.update().where(refused).values(expires_at=ended))
        assert leases.refused() == {KEY}
        assert leases.sweep() == swept
    assert leases.refused() == set()
    leases.take(KEY, None, "ada's", 0, 10)
    leases.fail(KEY, "ada's", refused=True)
    assert leases.take(KEY, leases.holder(KEY), "bob's", 0, 10)
    assert leases.refused() == set()


def test_of_many_at_once_one_gets_it(leases):
    for attempt in range(6):
        key, barrier = f"{attempt}{KEY[1:]}", Barrier(16)
        if attempt % 2:
            leases.take(key, None, "killed", 0, -1)
        seen = leases.holder(key)

        def take(number, key=key, barrier=barrier, seen=seen):
            barrier.wait()
            return leases.take(key, seen, f"owner {number}", 0, 10)

        with ThreadPoolExecutor(16) as pool:
            assert sum(pool.map(take, range(16))) == 1


def test_a_planted_lease_is_read_and_taken_J4(engine, leases, plant):
    owners = ("", REFUSED, "garbage", "\N{PILE OF POO}" * 64, "failed 99")
    limits = ((-(2**31), -(2**63)), (-(2**31), 2**63 - 1), (2**31 - 1, -(2**63)))
    for owner, (failures, expires_at) in product(owners, (*limits, (2**31 - 1, 2**63 - 1))):
        plant(owner=owner, failures=failures, expires_at=expires_at)
        seen = leases.holder(KEY)
        assert seen[:2] == (owner, failures)
        assert (seen.left > 0) == (expires_at > 0)
        leases.sweep()
        if expires_at > 0:
            assert leases.take(KEY, seen, "ada's", 0, 10)
            assert leases.holder(KEY).left <= 10
        with engine.begin() as connection:
            connection.execute(TABLE.delete())


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
@pytest.mark.parametrize("garbage", ["garbage", b"\xff", 1e300, -0.5, ""])
def test_a_planted_lease_of_other_types_is_read_and_taken_in_sqlite_J4(leases, query, garbage):
    query(
        "INSERT INTO oauthtoken_refresh_lease (key, owner, failures, expires_at) "
        "VALUES (:key, :garbage, :garbage, :garbage)",
        key=KEY,
        garbage=garbage,
    )
    assert leases.take(KEY, leases.holder(KEY), "ada's", 0, 10)
    leases.fail(KEY, "ada's")
    assert leases.holder(KEY)[:2] == ("", 1)


def test_what_ended_a_minute_ago_is_swept_and_nothing_else(engine, leases):
    expired = [
        {"key": f"{number:064d}", "owner": "killed", "failures": 0, "expires_at": 1}
        for number in range(130)
    ]
    with engine.begin() as connection:
        connection.execute(TABLE.insert(), expired)
    leases.take(KEY, None, "ada's", 0, 10)
    leases.take(OTHER_KEY, None, "just ended", 0, -50)
    assert [leases.sweep(), leases.sweep(), leases.sweep()] == [100, 30, 0]
    assert leases.holder(KEY).owner == "ada's"
    assert leases.holder(OTHER_KEY).owner == "just ended"


def test_it_costs_one_statement_to_look_and_at_most_two_to_take(leases):
    costs = []
    for work in (
        partial(leases.holder, KEY),
        partial(leases.take, KEY, None, "ada's", 0, 10),
        lambda: leases.take(KEY, Holder("ada's", 0, 1), "bob's", 0, 10),
        partial(leases.release, KEY, "bob's"),
    ):
        with statements_counted() as statements:
            work()
        costs.append(len(statements))
    assert costs == [1, 2, 1, 1]


def test_a_server_goes_by_its_own_clock(engine, leases, monkeypatch):
    """The clocks of two machines may differ by as much as they like."""
    leases.take(KEY, None, "ada's", 0, 10)
    hours_apart = time.time() + 7200
    monkeypatch.setattr(time, "time", lambda: hours_apart)
    is_a_file = engine.dialect.name == "sqlite"
    assert (leases.holder(KEY).left < 0) == is_a_file


@pytest.mark.parametrize("database", SERVERS, indirect=True)
def test_a_servers_clock_is_that_of_the_world_whatever_its_time_zone(engine):
    clock = server_clock(engine.dialect.name)
    with engine.connect() as connection:
        zone = "SET TIME ZONE 'Europe/Berlin'"
        if engine.dialect.name == "mysql":
            zone = "SET time_zone = '+02:00'"
            sql = str(select(clock).compile(engine))
            assert "utc_timestamp(" in sql, "NOW() has an hour twice where summer time ends"
        connection.execute(text(zone))
        assert abs(float(connection.scalar(select(clock))) - time.time()) < 2
