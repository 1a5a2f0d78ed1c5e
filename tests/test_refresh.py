"""One refresh for many callers, with real databases, threads and requests.

The rules themselves are tested in `test_refresh_rules.py`, without waiting.
"""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import ROUTES, open_store, statements_counted
from leaks import found_in, logs_kept, texts_of
from sdk_tokens import make_token
from sqlalchemy import create_engine, event
from sqlalchemy.orm import DeclarativeBase, Mapped

from zoho_orm_store import (
    ConfigurationError,
    DatabaseError,
    RefreshFailedError,
    RefreshLeaseMixin,
    RefreshPolicy,
    SQLAlchemyTokenStore,
    StoredTokenMixin,
    TokenRecord,
    TokenRepository,
    provision,
)
from zoho_orm_store._sdk.conversion import SDKException
from zoho_orm_store.refresh import RefreshStats

QUICK = RefreshPolicy(lease=2, wait=6)
FIELDS = {"user": "ada", "client_id": "c", "client_secret": "s", "refresh_token": "1000.r"}
EXPIRED = {**FIELDS, "access_token": "1000.expired", "expires_in": "1"}


def in_an_hour():
    return str(int(time.time() * 1000) + 3_600_000)


def in_seconds(seconds):
    return str(int((time.time() + seconds) * 1000))


def is_live(token):
    return token.get_expires_in() is not None and int(token.get_expires_in()) > time.time() * 1000


def refresh(store, token, access_token="1000.new"):
    """What the SDK does with a token that it was handed expired."""
    token.set_access_token(access_token)
    token.set_expires_in(in_an_hour())
    store.save_token(token)


@contextmanager
def nobody_listening():
    """An address that refuses every request."""
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{unheard.getsockname()[1]}"


def fail_to_refresh(token):
    """What the SDK does when Zoho cannot be reached."""
    with nobody_listening() as url, pytest.raises(SDKException):
        token.refresh_access_token(token, url)


def elsewhere(work, *args):
    """Run something in another thread, as another caller, and return its future."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(work, *args)
    pool.shutdown(wait=False)
    return future


def leases(url):
    """What is in the lease table: the owners, or how often a refresh has failed."""
    engine = create_engine(url)
    with engine.connect() as connection:
        rows = connection.exec_driver_sql(
            "SELECT owner, failures FROM oauthtoken_refresh_lease"
        ).all()
    engine.dispose()
    return [owner or f"failed {failures}" for owner, failures in rows]


@contextmanager
def reachable_until(url):
    """An address of a database, and what makes it go away."""
    if url.get_backend_name() == "sqlite":
        yield url, lambda: Path(url.database).write_bytes(b"no database " * 1000)
        return
    with Relay(url.host, url.port) as relay:
        yield url.set(host="127.0.0.1", port=relay.port), relay.cut


class Relay:
    """Passes bytes on between a client and a server, until it is cut."""

    def __init__(self, host, port):
        self._server = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._sockets = [self._listener]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._server)
            except OSError:
                return
            self._sockets += [client, server]
            for pair in ((client, server), (server, client)):
                self._threads.append(threading.Thread(target=self._pass_on, args=pair))
                self._threads[-1].start()

    def _pass_on(self, source, sink):
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    def cut(self):
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.cut()
        for thread in self._threads:
            thread.join(5)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def expired(database):
    """The id of an expired token."""
    with SQLAlchemyTokenStore(database, create_schema=False, refresh=None) as store:
        token = make_token(**EXPIRED)
        store.save_token(token)
    return token.get_id()


@pytest.fixture
def make(database):
    """What makes stores on the database, and closes them."""
    made = []

    def make(refresh=QUICK, **options):
        made.append(SQLAlchemyTokenStore(database, create_schema=False, refresh=refresh, **options))
        return made[-1]

    yield make
    for store in made:
        store.close()


@pytest.fixture
def store(make):
    return make()


@pytest.mark.parametrize(
    "route", [route for route in ROUTES if route.database != "memory"], ids=str
)
def test_the_others_get_what_the_first_has_saved_on_every_route(route, route_url):
    with open_store(route, route_url, create_schema=True) as store:
        token = make_token(**EXPIRED)
        store.save_token(token)
        mine = store.find_token_by_id(token.get_id())
        assert not is_live(mine)
        others = [elsewhere(store.find_token_by_id, token.get_id()) for _ in range(8)]
        by_user = [elsewhere(store.find_token, make_token(**FIELDS)) for _ in range(8)]
        time.sleep(0.2)
        assert not any(other.done() for other in others + by_user)
        refresh(store, mine)
        for other in others + by_user:
            assert other.result(5).get_access_token() == "1000.new"
        stats = store.refresh_stats
        assert (stats.acquired, stats.timed_out, stats.skipped) == (1, 0, 0)
        # Some may have been so slow to start that there was no need to wait any more.
        assert 0 < stats.waited <= 16
        assert 0 < stats.seconds_waited < 16 * 5


def test_who_does_not_ask_in_order_to_refresh_neither_waits_nor_takes_a_lease_C3(
    database, store, expired
):
    elsewhere(store.find_token_by_id, expired).result(5)
    engine = create_engine(database)
    started = time.monotonic()
    with engine.connect() as connection:
        repository = TokenRepository(connection)
        assert repository.get(expired).expiry_time == 1
        assert repository.find(TokenRecord(user_name="ada")) is not None
    engine.dispose()
    assert not is_live(store.get_tokens()[0])
    assert store.find_token(make_token(id=expired)) is not None, "as the SDK's revoke asks"
    with SQLAlchemyTokenStore(database, create_schema=False, refresh=None) as alone:
        assert not is_live(alone.find_token_by_id(expired))
        assert alone.refresh_stats == RefreshStats()
    assert time.monotonic() - started < 1.4


def test_a_live_token_costs_no_statement_more(make):
    store, alone = make(), make(refresh=None)
    token = make_token(**FIELDS, access_token="1000.a", expires_in=in_an_hour())
    store.save_token(token)
    for each in (store, alone):
        each.find_token_by_id(token.get_id())
        each.save_token(token)
        with statements_counted() as statements:
            each.find_token_by_id(token.get_id())
            each.find_token(make_token(**FIELDS))
            each.save_token(token)
        lookups = [sql for sql in statements if sql.startswith("SELECT") and "lease" in sql]
        assert lookups == []
        if each is store:
            with_it = len(statements)
    assert len(statements) == with_it


class Base(DeclarativeBase):
    pass


class Token(StoredTokenMixin, Base):
    __tablename__ = "project_token"
    tenant_id: Mapped[int]


class Lease(RefreshLeaseMixin, Base):
    __tablename__ = "project_lease"


def test_with_scopes_and_a_lease_table_of_its_own(database):
    engine = create_engine(database)
    Base.metadata.create_all(engine)
    try:
        first = SQLAlchemyTokenStore(
            engine, model=Token, lease_model=Lease, scope={"tenant_id": 7}, refresh=QUICK
        )
        second = first.scoped(tenant_id=8)
        for store in (first, second):
            store.save_token(make_token(**EXPIRED))
        mine = first.find_token(make_token(**FIELDS))
        assert not is_live(elsewhere(second.find_token, make_token(**FIELDS)).result(1))
        other = elsewhere(first.find_token, make_token(**FIELDS))
        time.sleep(0.1)
        assert not other.done()
        refresh(first, mine)
        assert other.result(5).get_access_token() == "1000.new"
        assert not is_live(second.get_tokens()[0])
        with engine.connect() as connection:
            sql = "SELECT count(*) FROM project_lease"
            assert connection.exec_driver_sql(sql).scalar() == 1
        first.close()
    finally:
        Base.metadata.drop_all(engine)
        engine.dispose()


def test_a_lease_table_of_its_own_that_is_missing_beside_our_tokens(database):
    store = SQLAlchemyTokenStore(database, lease_model=Lease)
    with store, pytest.raises(SDKException, match=r"'project_lease', is missing"):
        store.get_tokens()


def test_a_lease_table_that_is_missing_is_told_before_it_is_needed(database):
    engine = create_engine(database)
    Token.__table__.create(engine)
    scope = {"tenant_id": 7}
    try:
        store = SQLAlchemyTokenStore(engine, model=Token, lease_model=Lease, scope=scope)
        with pytest.raises(SDKException, match=r"'project_lease', is missing.*refresh=None"):
            store.save_token(make_token(**FIELDS))
        with SQLAlchemyTokenStore(engine, model=Token, scope=scope, refresh=None) as alone:
            alone.save_token(make_token(**FIELDS))
    finally:
        Base.metadata.drop_all(engine)
        engine.dispose()


def test_a_refresh_that_fails_is_tried_once_more_and_then_not_multiplied(database, make, expired):
    store = make(RefreshPolicy(lease=30, wait=20))
    started, tries = [], []

    def call():
        started.append(1)
        token = store.find_token_by_id(expired)
        tries.append(token)
        fail_to_refresh(token)

    mine = store.find_token_by_id(expired)
    others = [elsewhere(call) for _ in range(15)]
    while len(started) < 15:
        time.sleep(0.01)
    time.sleep(1)
    fail_to_refresh(mine)
    errors = [other.exception(5) for other in others]
    skipped = [error for error in errors if error is not None]
    assert (len(tries), len(skipped)) == (1, 14)
    assert {type(error.__cause__) for error in skipped} == {RefreshFailedError}
    assert "did not try" in str(skipped[0])
    assert leases(database) == ["failed 2"]
    stats = store.refresh_stats
    assert (stats.acquired, stats.failed, stats.skipped, stats.timed_out) == (2, 2, 14, 0)

    token = store.find_token_by_id(expired)
    assert not is_live(token), "whoever comes later tries for itself"
    refresh(store, token)
    assert is_live(store.find_token_by_id(expired))
    assert leases(database) == []


def test_a_token_that_cannot_be_saved_is_a_failed_refresh(database, store, expired):
    mine = store.find_token_by_id(expired)
    mine.set_redirect_url("x" * 5000)
    with pytest.raises(SDKException, match="redirect_url has 5000 characters"):
        refresh(store, mine)
    assert leases(database) == ["failed 1"]


def test_a_save_that_the_database_refuses_is_a_failed_refresh(database, store, expired):
    mine = store.find_token_by_id(expired)
    engine = create_engine(database)
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE oauthtoken RENAME COLUMN api_domain TO other")
    try:
        with pytest.raises(SDKException):
            refresh(store, mine)
    finally:
        with engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE oauthtoken RENAME COLUMN other TO api_domain")
        engine.dispose()
    assert leases(database) == ["failed 1"]


@pytest.mark.parametrize(
    ("meanwhile", "kept"),
    [("nothing", "1000.mine"), ("an expired token", "1000.mine"), ("a live token", "1000.theirs")],
)
def test_a_save_that_comes_too_late_does_not_undo_a_newer_one(make, expired, meanwhile, kept):
    store = make(RefreshPolicy(lease=0.1, wait=5))
    mine = store.find_token_by_id(expired)
    time.sleep(0.2)
    if meanwhile == "a live token":
        elsewhere(lambda: refresh(store, store.find_token_by_id(expired), "1000.theirs")).result(5)
    elif meanwhile == "an expired token":
        ended = make_token(id=expired, access_token="1000.ended", expires_in="2")
        elsewhere(store.save_token, ended).result(5)
    # A process that was suspended counts the hour from when it wakes up.
    refresh(store, mine, "1000.mine")
    assert store.find_token_by_id(expired).get_access_token() == kept


def test_a_database_that_goes_away_meanwhile_is_told_at_once(empty_database):
    provision.upgrade(empty_database)
    with reachable_until(empty_database) as (address, go_away):
        store = SQLAlchemyTokenStore(address, create_schema=False)
        token = make_token(**EXPIRED)
        store.save_token(token)
        elsewhere(store.find_token_by_id, token.get_id()).result(5)
        waiting = elsewhere(store.find_token_by_id, token.get_id())
        time.sleep(0.3)
        assert not waiting.done()
        go_away()
        started = time.monotonic()
        error = waiting.exception(10)
        assert isinstance(error.__cause__, DatabaseError)
        assert time.monotonic() - started < 8
        store.close()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_a_forked_child_is_another_caller_H1(make, expired, in_child):
    store = make(RefreshPolicy(lease=30, wait=0.3))
    mine = store.find_token_by_id(expired)

    def work():
        assert not is_live(store.find_token_by_id(expired))
        assert store.refresh_stats.timed_out == 1
        assert store.refresh_stats.acquired == 0

    in_child(work)
    refresh(store, mine)
    assert store.refresh_stats == RefreshStats(acquired=1)


@pytest.mark.parametrize("overtaken", [False, True])
def test_an_early_refresh_that_fails_goes_on_with_the_live_token(database, make, overtaken):
    store = make(RefreshPolicy(lease=2, wait=8, ahead=100))
    token = make_token(**FIELDS, access_token="1000.ending", expires_in=in_seconds(60))
    store.save_token(token)
    mine = store.find_token_by_id(token.get_id())
    assert not is_live(mine)
    assert is_live(elsewhere(store.find_token_by_id, token.get_id()).result(1))
    if overtaken:
        newer = make_token(id=token.get_id(), access_token="1000.newer", expires_in=in_seconds(99))
        elsewhere(store.save_token, newer).result(5)
    with nobody_listening() as url:
        mine.refresh_access_token(mine, url)
    assert is_live(mine)
    assert mine.get_access_token() == "1000.ending"
    store.save_token(mine)
    assert leases(database) == ["failed 1"]
    (stored,) = store.get_tokens()
    assert stored.get_access_token() == ("1000.newer" if overtaken else "1000.ending")
    assert is_live(stored)
    assert store.refresh_stats == RefreshStats(acquired=1, ahead=1, failed=1)


def test_while_the_database_is_read_only_tokens_are_handed_out_H7(database, expired):
    engine = create_engine(database)
    read_only = {
        "sqlite": "PRAGMA query_only = ON",
        "postgresql": "SET default_transaction_read_only = on",
        "mysql": "SET SESSION TRANSACTION READ ONLY",
    }

    @event.listens_for(engine, "connect")
    def make_read_only(connection, _):
        cursor = connection.cursor()
        cursor.execute(read_only[engine.dialect.name])
        cursor.close()
        connection.commit()

    with SQLAlchemyTokenStore(engine, refresh=QUICK, timeout=1) as store:
        token = store.find_token_by_id(expired)
        assert token.get_access_token() == "1000.expired"
        assert store.refresh_stats.acquired == 0
    engine.dispose()


@pytest.mark.parametrize("owner", ["", "somebody"])
def test_a_planted_lease_costs_at_most_the_policys_lease_J4(make, expired, query, owner):
    store = make(RefreshPolicy(lease=0.3, wait=2))
    elsewhere(store.find_token_by_id, expired).result(5)
    query(
        "UPDATE oauthtoken_refresh_lease SET owner = :owner, failures = 99, expires_at = :end",
        owner=owner,
        end=2**62,
    )
    started = time.monotonic()
    token = store.find_token_by_id(expired)
    assert time.monotonic() - started < 1.4
    refresh(store, token)
    assert query("SELECT owner FROM oauthtoken_refresh_lease") == []


def test_the_store_takes_a_policy_or_none():
    with pytest.raises(ConfigurationError, match="refresh must be a RefreshPolicy or None"):
        SQLAlchemyTokenStore("sqlite://", refresh=True)


def test_no_failure_of_a_refresh_shows_a_secret_G3(make):
    store = make(RefreshPolicy(lease=30, wait=20))
    secrets = ("SECRET-client-0123456789", "SECRET-refresh-0123456789", "SECRET-access-0123456789")
    fields = dict(zip(("client_secret", "refresh_token", "access_token"), secrets, strict=True))
    token = make_token(**EXPIRED | fields)
    store.save_token(token)

    def call():
        fail_to_refresh(store.find_token_by_id(token.get_id()))

    def save_what_cannot_be_saved():
        refreshed = store.find_token_by_id(token.get_id())
        refreshed.set_redirect_url("x" * 5000)
        store.save_token(refreshed)

    mine = store.find_token_by_id(token.get_id())
    with logs_kept() as logs, logs_kept("SDKLogger") as sdk_logs:
        others = [elsewhere(call) for _ in range(4)]
        time.sleep(0.5)
        fail_to_refresh(mine)
        errors = [other.exception(5) for other in others]
        errors.append(elsewhere(save_what_cannot_be_saved).exception(5))
    errors = [error for error in errors if error is not None]
    assert len(errors) == 4
    shown = [text for error in errors for text in texts_of(error)]
    assert found_in([*shown, *logs, *sdk_logs], secrets) == []
