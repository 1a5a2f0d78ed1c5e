"""One refresh for many callers of one process: who refreshes, who waits, and what goes wrong."""

from __future__ import annotations

import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import (
    BY_DRIVER,
    ENGINES,
    SHARED,
    on_routes,
    on_sqlite,
    open_store,
    statements_counted,
)
from databases import DATABASES, SERVERS, fresh_database
from leaks import found_in, logs_kept, texts_of
from sdk_tokens import make_token
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.orm import DeclarativeBase, Mapped

from zoho_orm_store import (
    ConfigurationError,
    DatabaseError,
    FernetCipher,
    RefreshFailedError,
    RefreshLeaseMixin,
    RefreshPolicy,
    SQLAlchemyTokenStore,
    StoredTokenMixin,
    SyncTokenRepository,
    TokenRecord,
    provision,
)
from zoho_orm_store.cipher import generate_key
from zoho_orm_store.refresh import RefreshStats
from zoho_orm_store.sdk import SDKException

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


def fail_to_refresh(token):
    """What the SDK does when Zoho does not answer: nothing listens on that port."""
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unheard.getsockname()[1]}"
        with pytest.raises(SDKException):
            token.refresh_access_token(token, url)


def elsewhere(work, *args):
    """Run something in another thread, as another caller, and return its future."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(work, *args)
    pool.shutdown(wait=False)
    return future


def leases(url):
    engine = create_engine(url)
    with engine.connect() as connection:
        rows = connection.exec_driver_sql("SELECT owner FROM oauthtoken_refresh_lease").all()
    engine.dispose()
    return [owner for (owner,) in rows]


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


class TestOneRefreshes:
    @on_routes(*SHARED, *BY_DRIVER, *ENGINES)
    def test_the_others_get_what_the_first_has_saved_on_every_route(self, route, route_url):
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
            assert (stats.acquired, stats.gave_up, stats.spared) == (1, 0, 0)
            # Some may have been so slow to start that there was no need to wait any more.
            assert 0 < stats.waited <= 16
            assert 0 < stats.seconds_waited < 16 * 5

    def test_the_lease_ends_with_the_save(self, database, store, expired):
        mine = store.find_token_by_id(expired)
        assert len(leases(database)) == 1
        refresh(store, mine)
        assert leases(database) == []

    @on_sqlite
    def test_the_thread_that_has_the_lease_passes_at_once(self, store, expired):
        for _ in range(3):
            started = time.monotonic()
            assert not is_live(store.find_token_by_id(expired))
            assert time.monotonic() - started < 1.4
        assert store.refresh_stats.waited == 0

    @pytest.mark.parametrize("database", SERVERS, indirect=True)  # SQLite has one writer anyway.
    def test_one_thread_of_a_process_at_a_time_tries_to_take_the_lease(self, store, expired):
        taking, at_once = set(), []

        def take_time(connection, cursor, statement, *_):
            if statement.startswith("INSERT INTO oauthtoken_refresh_lease"):
                taking.add(connection)
                at_once.append(len(taking))
                time.sleep(0.3)
                taking.discard(connection)

        event.listen(Engine, "before_cursor_execute", take_time)
        try:
            callers = [elsewhere(store.find_token_by_id, expired) for _ in range(16)]
            until = time.monotonic() + 5
            while store.refresh_stats.acquired == 0:
                assert time.monotonic() < until
                time.sleep(0.01)
            new = make_token(id=expired, access_token="1000.new", expires_in=in_an_hour())
            store.save_token(new)
            assert sum(is_live(caller.result(5)) for caller in callers) == 15
        finally:
            event.remove(Engine, "before_cursor_execute", take_time)
        assert set(at_once) == {1}

    @on_sqlite
    def test_a_missing_pair_is_waited_for_like_an_expired_one(self, store):
        asked = {key: value for key, value in FIELDS.items() if key != "user"}
        mine = make_token(**asked)
        assert store.find_token(mine) is None
        other = elsewhere(store.find_token, make_token(**asked))
        time.sleep(0.2)
        assert not other.done()
        refresh(store, mine)
        assert other.result(5).get_access_token() == "1000.new"
        assert other.result(5).get_id() == mine.get_id()

    @on_sqlite
    def test_a_grant_code_is_exchanged_once(self, store):
        asked = {"client_id": "c", "client_secret": "s", "grant_token": "1000.code"}
        mine = make_token(**asked)
        assert store.find_token(mine) is None
        other = elsewhere(store.find_token, make_token(**asked))
        time.sleep(0.2)
        assert store.get_tokens() == [], "a row that stands for nothing"
        mine.set_refresh_token("1000.r")
        refresh(store, mine)
        assert other.result(5).get_refresh_token() == "1000.r"
        assert store.refresh_stats.acquired == 1

    @on_sqlite
    def test_the_user_may_become_known_by_the_refresh(self, database, store):
        mine = make_token(client_id="c", client_secret="s", refresh_token="1000.r")
        store.find_token(mine)
        mine.set_user_signature(make_token(user="ada").get_user_signature())
        refresh(store, mine)
        assert leases(database) == []

    @on_sqlite
    def test_two_users_with_one_refresh_token_do_not_wait_for_each_other_B10(self, store):
        for user in ("ada", "bob"):
            store.save_token(make_token(**EXPIRED | {"user": user}))
        for user in ("ada", "bob"):
            asked = make_token(**FIELDS | {"user": user})
            assert not is_live(elsewhere(store.find_token, asked).result(1))
        assert store.refresh_stats.acquired == 2

    @on_sqlite
    def test_encrypted_tokens_are_refreshed_in_the_same_way(self, make):
        store = make(cipher=FernetCipher(generate_key()))
        token = make_token(**EXPIRED)
        store.save_token(token)
        mine = store.find_token_by_id(token.get_id())
        other = elsewhere(store.find_token_by_id, token.get_id())
        time.sleep(0.1)
        refresh(store, mine)
        assert other.result(5).get_access_token() == "1000.new"


class TestNobodyElseTakesPart:
    @pytest.fixture
    def taken(self, store, expired):
        """A store on which another thread has the lease."""
        elsewhere(store.find_token_by_id, expired).result(5)
        return store

    def at_once(self, work):
        started = time.monotonic()
        result = work()
        assert time.monotonic() - started < 1.4
        return result

    @on_sqlite
    def test_get_tokens(self, taken):
        assert not is_live(self.at_once(taken.get_tokens)[0])

    @on_sqlite
    def test_the_repositories(self, database, taken, expired):
        engine = create_engine(database)
        with engine.connect() as connection:
            repository = SyncTokenRepository(connection)
            assert self.at_once(lambda: repository.get(expired)).expiry_time == 1
            assert self.at_once(lambda: repository.find(TokenRecord(user_name="ada"))) is not None
        engine.dispose()

    @on_sqlite
    def test_the_sdks_revoke_which_asks_with_an_id_C3(self, taken, expired):
        assert self.at_once(lambda: taken.find_token(make_token(id=expired))) is not None

    @on_sqlite
    def test_a_token_that_nothing_can_refresh(self, taken):
        for number in range(2):
            asked = make_token(user=f"u{number}", access_token="1000.x", expires_in="1")
            taken.save_token(asked)
            assert not is_live(self.at_once(lambda asked=asked: taken.find_token(asked)))
            assert self.at_once(lambda: taken.find_token(make_token(user="nobody"))) is None
        assert taken.refresh_stats.acquired == 1

    @on_sqlite
    def test_a_store_that_does_not_coordinate(self, make, taken, expired):
        alone = make(refresh=None)
        assert not is_live(self.at_once(lambda: alone.find_token_by_id(expired)))
        assert alone.refresh_stats == RefreshStats()

    def test_a_live_token_costs_no_statement_more(self, make):
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


class TestAProjectsOwnModel:
    def test_with_scopes_and_a_lease_table_of_its_own(self, database):
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

    def test_a_lease_table_of_its_own_that_is_missing_beside_our_tokens(self, database):
        store = SQLAlchemyTokenStore(database, lease_model=Lease)
        with store, pytest.raises(SDKException, match=r"'project_lease', is missing"):
            store.get_tokens()

    def test_a_lease_table_that_is_missing_is_told_before_it_is_needed(self, database):
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


class TestWhatGoesWrong:
    def test_an_owner_that_never_comes_back_is_replaced_by_one_of_those_who_wait(
        self, store, expired
    ):
        elsewhere(store.find_token_by_id, expired).result(5)
        started = time.monotonic()

        def call():
            token = store.find_token_by_id(expired)
            if not is_live(token):
                time.sleep(0.1)
                refresh(store, token)
            return token

        callers = [elsewhere(call) for _ in range(8)]
        assert all(is_live(caller.result(5)) for caller in callers)
        assert 1.5 < time.monotonic() - started < 5
        stats = store.refresh_stats
        assert (stats.acquired, stats.taken_over, stats.gave_up) == (2, 1, 0)

    @on_sqlite
    def test_nobody_waits_longer_than_the_policy_says(self, make, expired):
        store = make(RefreshPolicy(lease=30, wait=0.4))
        elsewhere(store.find_token_by_id, expired).result(5)
        started = time.monotonic()
        token = store.find_token_by_id(expired)
        assert 0.4 <= time.monotonic() - started < 5
        assert token.get_access_token() == "1000.expired"
        assert store.refresh_stats.gave_up == 1

    @on_sqlite
    def test_without_a_wait_everybody_gets_what_is_stored(self, make, expired):
        store = make(RefreshPolicy(wait=0))
        elsewhere(store.find_token_by_id, expired).result(5)
        started = time.monotonic()
        assert not is_live(store.find_token_by_id(expired))
        assert time.monotonic() - started < 3

    def test_a_refresh_that_fails_is_tried_once_more_and_then_not_multiplied(
        self, database, make, expired
    ):
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
        spared = [error for error in errors if error is not None]
        assert (len(tries), len(spared)) == (1, 14)
        assert {type(error.__cause__) for error in spared} == {RefreshFailedError}
        assert "last 2 refreshes of this token" in str(spared[0])
        assert leases(database) == ["failed 2"]
        stats = store.refresh_stats
        assert (stats.acquired, stats.failed, stats.spared, stats.gave_up) == (2, 2, 14, 0)

        token = store.find_token_by_id(expired)
        assert not is_live(token), "whoever comes later tries for itself"
        refresh(store, token)
        assert is_live(store.find_token_by_id(expired))
        assert leases(database) == []

    def test_a_token_that_cannot_be_saved_is_a_failed_refresh(self, database, store, expired):
        mine = store.find_token_by_id(expired)
        mine.set_redirect_url("x" * 5000)
        with pytest.raises(SDKException, match="redirect_url has 5000 characters"):
            refresh(store, mine)
        assert leases(database) == ["failed 1"]

    def test_a_save_that_the_database_refuses_is_a_failed_refresh(self, database, store, expired):
        mine = store.find_token_by_id(expired)
        engine = create_engine(database)
        with engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE oauthtoken RENAME COLUMN api_domain TO other")
        try:
            with pytest.raises(SDKException):
                refresh(store, mine)
        finally:
            with engine.begin() as connection:
                connection.exec_driver_sql(
                    "ALTER TABLE oauthtoken RENAME COLUMN other TO api_domain"
                )
            engine.dispose()
        assert leases(database) == ["failed 1"]

    @on_sqlite
    def test_failures_of_long_ago_do_not_count(self, database, make, expired):
        store = make(RefreshPolicy(lease=30, wait=20))
        fail_to_refresh(store.find_token_by_id(expired))
        engine = create_engine(database)
        with engine.begin() as connection:
            connection.exec_driver_sql(
                "UPDATE oauthtoken_refresh_lease SET expires_at = expires_at - 70000"
            )
        engine.dispose()
        fail_to_refresh(store.find_token_by_id(expired))
        assert leases(database) == ["failed 1"]

    @on_sqlite
    def test_a_lookup_that_fails_under_the_lease_gives_it_back(
        self, database, store, expired, monkeypatch
    ):
        found = store._get(expired)
        monkeypatch.setattr(store, "_get", lambda _: found if not leases(database) else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            store.find_token_by_id(expired)
        assert leases(database) == []

    @pytest.mark.parametrize("missing_id", ["none", "raise"])
    @on_sqlite
    def test_a_token_that_is_deleted_meanwhile_is_waited_for_no_longer(
        self, make, expired, missing_id
    ):
        store = make(RefreshPolicy(lease=30, wait=20), missing_id=missing_id)
        store.find_token_by_id(expired)
        other = elsewhere(store.find_token_by_id, expired)
        time.sleep(0.3)
        store.delete_token(expired)
        if missing_id == "none":
            assert other.result(10) is None
        else:
            assert isinstance(other.exception(10), SDKException)

    def test_a_save_of_ones_own_after_anothers_refresh_is_kept_E1(self, make, expired):
        store = make(RefreshPolicy(lease=0.1, wait=5))
        store.find_token_by_id(expired)
        time.sleep(0.2)

        def take_over():
            refresh(store, store.find_token_by_id(expired), "1000.theirs")

        elsewhere(take_over).result(5)
        token = store.find_token_by_id(expired)
        refresh(store, token, "1000.mine")
        assert store.find_token_by_id(expired).get_access_token() == "1000.mine"

    def test_a_save_that_comes_too_late_does_not_undo_a_newer_one(self, make, expired):
        store = make(RefreshPolicy(lease=0.1, wait=5))
        mine = store.find_token_by_id(expired)
        time.sleep(0.2)

        def take_over():
            refresh(store, store.find_token_by_id(expired), "1000.newer")

        elsewhere(take_over).result(5)
        # A process that was suspended has counted the hour from when it woke up.
        refresh(store, mine, "1000.older")
        assert store.find_token_by_id(expired).get_access_token() == "1000.newer"

    @on_sqlite
    def test_a_save_that_comes_too_late_is_kept_where_nobody_was_faster(self, make, expired):
        store = make(RefreshPolicy(lease=0.1, wait=5))
        mine = store.find_token_by_id(expired)
        time.sleep(0.2)
        refresh(store, mine)
        assert store.find_token_by_id(expired).get_access_token() == "1000.new"

    @on_sqlite
    def test_a_save_that_comes_too_late_replaces_a_pair_that_has_ended(self, make, expired):
        store = make(RefreshPolicy(lease=0.1, wait=5))
        mine = store.find_token_by_id(expired)
        time.sleep(0.2)
        ended = make_token(id=expired, access_token="1000.ended", expires_in="2")
        elsewhere(store.save_token, ended).result(5)
        refresh(store, mine)
        assert store.find_token_by_id(expired).get_access_token() == "1000.new"

    @pytest.mark.parametrize("name", DATABASES)
    def test_a_database_that_goes_away_meanwhile_is_told_at_once(self, name, tmp_path):
        with fresh_database(name, tmp_path) as url:
            provision.upgrade(url)
            with reachable_until(url) as (address, go_away):
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

    def test_ended_leases_are_removed_as_a_matter_of_course(self, database, make, expired):
        engine = create_engine(database)
        with engine.begin() as connection:
            connection.exec_driver_sql(
                "INSERT INTO oauthtoken_refresh_lease VALUES ('killed', 'somebody', 1)"
            )
        engine.dispose()
        make().find_token_by_id(expired)
        assert "somebody" not in leases(database)

    @pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
    def test_a_forked_child_is_another_caller_H1(self, make, expired, in_child):
        store = make(RefreshPolicy(lease=30, wait=0.3))
        mine = store.find_token_by_id(expired)

        def work():
            assert not is_live(store.find_token_by_id(expired))
            assert store.refresh_stats.gave_up == 1
            assert store.refresh_stats.acquired == 0

        in_child(work)
        refresh(store, mine)
        assert store.refresh_stats == RefreshStats(acquired=1)


class TestAhead:
    AHEAD = RefreshPolicy(lease=2, wait=8, ahead=100)

    @pytest.fixture
    def store(self, make):
        return make(self.AHEAD)

    @pytest.fixture
    def ending(self, store):
        """The id of a token that ends in a minute."""
        token = make_token(**FIELDS, access_token="1000.ending", expires_in=in_seconds(60))
        store.save_token(token)
        return token.get_id()

    def test_one_caller_refreshes_early_while_the_others_go_on(self, store, ending):
        mine = store.find_token_by_id(ending)
        assert not is_live(mine)
        assert mine.get_access_token() == "1000.ending"
        started = time.monotonic()
        for other in [elsewhere(store.find_token_by_id, ending) for _ in range(8)]:
            assert is_live(other.result(5))
        assert time.monotonic() - started < 1.4
        refresh(store, mine)
        assert store.find_token_by_id(ending).get_access_token() == "1000.new"
        assert store.refresh_stats == RefreshStats(acquired=1, ahead=1)

    @on_sqlite
    def test_another_process_goes_on_too(self, make, store, ending):
        assert not is_live(store.find_token_by_id(ending))
        other = make(self.AHEAD)
        other.find_token_by_id("unknown")
        with statements_counted() as statements:
            assert is_live(other.find_token_by_id(ending))
            assert is_live(other.find_token_by_id(ending))
        assert len(statements) == 3, "one look at the lease, and no other"

    @on_sqlite
    def test_by_user_as_well(self, store, ending):
        assert not is_live(store.find_token(make_token(**FIELDS)))
        assert is_live(elsewhere(store.find_token, make_token(**FIELDS)).result(5))

    @on_sqlite
    def test_a_token_that_is_not_stored_is_no_match_C1(self, store):
        asked = make_token(**FIELDS, access_token="1000.a", expires_in=in_seconds(60))
        assert store.find_token(asked) is None
        assert store.refresh_stats.acquired == 0

    @on_sqlite
    def test_an_early_refresh_that_fails_goes_on_with_the_live_token(
        self, database, store, ending, caplog
    ):
        caplog.set_level(logging.INFO, "zoho_orm_store")
        mine = store.find_token_by_id(ending)
        with socket.socket() as unheard:
            unheard.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{unheard.getsockname()[1]}"
            mine.refresh_access_token(mine, url)
        assert is_live(mine)
        assert mine.get_access_token() == "1000.ending"
        store.save_token(mine)
        assert "A refresh has failed" in caplog.text
        assert leases(database) == ["failed 1"]
        assert is_live(store.find_token_by_id(ending)), "it is left alone for the time of a lease"
        time.sleep(2.1)
        assert not is_live(store.find_token_by_id(ending))
        assert store.refresh_stats == RefreshStats(acquired=2, ahead=2, failed=1)

    @on_sqlite
    def test_a_token_that_is_saved_and_was_not_refreshed_keeps_its_end(self, store, ending):
        before = store.get_tokens()[0].get_expires_in()
        looked_at = store.find_token_by_id(ending)
        looked_at.set_redirect_url("https://example.com/new")
        store.save_token(looked_at)
        (stored,) = store.get_tokens()
        assert stored.get_redirect_url() == "https://example.com/new"
        assert stored.get_expires_in() == before

    @on_sqlite
    def test_an_end_of_ones_own_is_saved_all_the_same_E1(self, store, ending):
        store.find_token_by_id(ending)
        store.save_token(make_token(id=ending, access_token="1000.ending", expires_in="7"))
        assert store.get_tokens()[0].get_expires_in() == "7"

    def test_where_a_lease_cannot_be_had_the_live_token_goes_on(self, database, store, ending):
        engine = create_engine(database)
        with engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE oauthtoken_refresh_lease RENAME TO away")
        try:
            assert is_live(store.find_token_by_id(ending))
        finally:
            with engine.begin() as connection:
                connection.exec_driver_sql("ALTER TABLE away RENAME TO oauthtoken_refresh_lease")
            engine.dispose()

    @on_sqlite
    def test_an_early_refresh_that_fails_does_not_undo_a_newer_token(self, store, ending):
        mine = store.find_token_by_id(ending)
        newer = make_token(id=ending, access_token="1000.newer", expires_in=in_an_hour())
        elsewhere(store.save_token, newer).result(5)
        with socket.socket() as unheard:
            unheard.bind(("127.0.0.1", 0))
            mine.refresh_access_token(mine, f"http://127.0.0.1:{unheard.getsockname()[1]}")
        store.save_token(mine)
        assert store.find_token_by_id(ending).get_access_token() == "1000.newer"

    @on_sqlite
    def test_a_later_token_is_refreshed_ahead_again(self, store, ending):
        for number in range(3):
            mine = store.find_token_by_id(ending)
            assert not is_live(mine)
            mine.set_access_token(f"1000.{number}")
            mine.set_expires_in(in_seconds(60 + number))
            store.save_token(mine)
        assert store.refresh_stats.ahead == 3


class TestPolicy:
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
    def test_what_cannot_be_used_is_refused(self, options, message):
        with pytest.raises(ConfigurationError, match=f"^{message}"):
            RefreshPolicy(**options)

    def test_the_store_takes_a_policy_or_none(self):
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


@on_sqlite
def test_what_happens_is_logged_and_no_token_is_G3(make, expired, caplog):
    caplog.set_level(logging.DEBUG, "zoho_orm_store")
    elsewhere(make(RefreshPolicy(lease=0.1)).find_token_by_id, expired).result(5)
    store = make(RefreshPolicy(lease=30, wait=20))
    token = store.find_token_by_id(expired)
    other = elsewhere(store.find_token_by_id, expired)
    make(RefreshPolicy(wait=0.1)).find_token_by_id(expired)
    time.sleep(0.5)
    refresh(store, token)
    other.result(5)
    for part in ("is acquired", "is taken over", "Waited ", "Gave up after "):
        assert part in caplog.text
    assert "1000." not in caplog.text
