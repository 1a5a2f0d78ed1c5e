"""Servers that become read-only, and another server that takes over: rule H7."""

from __future__ import annotations

import fcntl
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import gettempdir

import pytest
import sdk_process
from conftest import BY_DRIVER, Route, comes_true, on_routes
from databases import SERVERS
from relay import Relay
from reliability import record
from sdk_process import OAuthToken, whoami
from sdk_processes import store_expired
from sdk_tokens import FULL, known, make_token
from sqlalchemy import create_engine, event, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool
from standby import primary_and_standby
from zohocrmsdk.src.com.zoho.crm.api.initializer import Initializer

from zoho_orm_store import SQLAlchemyTokenStore, provision
from zoho_orm_store._sdk.conversion import SDKException
from zoho_orm_store.testing import LoopbackZoho

BY_URL = [route for route in BY_DRIVER if route.database in SERVERS]
POSTGRESQL_ENGINES = (
    Route("postgresql", "postgresql+psycopg", "engine"),
    Route("postgresql", "postgresql+asyncpg", "async_engine"),
)
MARIADB_ENGINES = (
    Route("mariadb", "mysql+pymysql", "engine"),
    Route("mariadb", "mysql+asyncmy", "async_engine"),
)
ONE_EACH = [route for route in BY_URL if route.driver.endswith(("+psycopg", "+pymysql"))]


STAY_READ_ONLY = "pooled connections still lead to the server that was the primary"


@contextmanager
def administrator(url):
    """Execute statements on a server, each in a transaction of its own."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        yield lambda statement, **values: connection.execute(text(statement), values)


class PostgreSQL:
    """A database in which new sessions can only read while `read_only` is on."""

    def __init__(self, url):
        self.url = url

    @contextmanager
    def read_only(self, *, cut_connections=True):
        with administrator(self.url.set(database="postgres")) as execute:
            setting = f"ALTER DATABASE {self.url.database}"
            execute(f"{setting} SET default_transaction_read_only = on")
            try:
                if cut_connections:
                    execute(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                        "WHERE datname = :name",
                        name=self.url.database,
                    )
                yield
            finally:
                execute(f"{setting} RESET default_transaction_read_only")


class MariaDB:
    """A server that lets its users only read while `read_only` is on."""

    def __init__(self, url):
        self._administrator = url
        self._user = f"user_{url.database}"
        self.url = url.set(username=self._user, password=None)

    def __enter__(self):
        with administrator(self._administrator) as execute:
            execute(f"CREATE USER '{self._user}'@'127.0.0.1'")
            execute(f"GRANT ALL ON {self.url.database}.* TO '{self._user}'@'127.0.0.1'")
        return self

    def __exit__(self, *_):
        with administrator(self._administrator) as execute:
            execute(f"DROP USER '{self._user}'@'127.0.0.1'")

    @contextmanager
    def read_only(self):
        """It is a setting of the whole server; root may go on writing."""
        lock = Path(gettempdir(), "zoho_orm_store_read_only.lock")
        with administrator(self._administrator) as execute, lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            execute("SET GLOBAL read_only = 1")
            try:
                yield
            finally:
                execute("SET GLOBAL read_only = 0")


@pytest.fixture
def server(route, route_url):
    """The route's server, with what makes it read-only."""
    if route.database == "postgresql":
        yield PostgreSQL(route_url)
    else:
        with MariaDB(route_url) as server:
            yield server


@contextmanager
def store_on(route, url, **options):
    url = url.set(drivername=route.driver)
    bind, dispose = url, None
    if route.kind == "engine":
        bind = create_engine(url)
        dispose = bind.dispose
    elif route.kind == "async_engine":
        bind = create_async_engine(url)
    with SQLAlchemyTokenStore(bind, create_schema=False, **options) as store:
        yield store
    if dispose:
        dispose()


def pool_connections(store, number=3):
    """Let a store have so many connections for writing in its pool, and one at least to read."""
    barrier = threading.Barrier(number)

    def hold():
        with store.transaction() as tokens:
            tokens.get("x")
            barrier.wait(10)

    with ThreadPoolExecutor(number) as pool:
        for done in [pool.submit(hold) for _ in range(number)]:
            done.result()
    store.find_token_by_id("x")


class TestConnectionsThatStayReadOnly:
    """As those that lead to the server that was the primary one."""

    @on_routes(*(each for each in BY_URL if each.database == "postgresql"), *POSTGRESQL_ENGINES)
    def test_a_save_drops_them_and_succeeds_on_a_new_one_H7(self, route, server):
        with store_on(route, server.url) as store:
            with server.read_only():
                pool_connections(store)
            started = time.monotonic()
            store.save_token(make_token(id="u", **FULL))
            assert time.monotonic() - started < 2
            assert known(store.find_token_by_id("u")) == known(make_token(**FULL))
        record(STAY_READ_ONLY, route.driver, 1, "replaced, and the save succeeded")

    @on_routes(*MARIADB_ENGINES)
    def test_the_same_on_an_engine_of_the_applications_H7(self, route, route_url):
        url = route_url.set(drivername=route.driver)
        is_async = route.kind == "async_engine"
        engine = create_async_engine(url) if is_async else create_engine(url)
        old_primary = True

        @event.listens_for(engine.sync_engine if is_async else engine, "connect")
        def connects(connection, _):
            if old_primary:
                with connection.cursor() as cursor:
                    cursor.execute("SET SESSION TRANSACTION READ ONLY")

        with SQLAlchemyTokenStore(engine, create_schema=False) as store:
            pool_connections(store)
            old_primary = False
            started = time.monotonic()
            store.save_token(make_token(id="u", **FULL))
            assert time.monotonic() - started < 2
            assert known(store.find_token_by_id("u")) == known(make_token(**FULL))
        if not is_async:
            engine.dispose()
        record(STAY_READ_ONLY, route.driver, 1, "replaced, and the save succeeded")


class TestAReadOnlyServer:
    @pytest.fixture
    def errors(self):
        """The names of the loggers, and the messages, of what is logged as an error."""
        collected = []

        def collect(record):
            """Take it before any handler: the SDK's message has no place for its argument."""
            collected.append((record.name, record.msg))
            return False

        loggers = [logging.getLogger(name) for name in ("SDKLogger", "zoho_orm_store")]
        for logger in loggers:
            logger.addFilter(collect)
        yield collected
        for logger in loggers:
            logger.removeFilter(collect)

    @on_routes(*BY_URL, *POSTGRESQL_ENGINES)
    def test_a_save_waits_until_it_can_be_written_again_H7(self, route, server):
        with store_on(route, server.url) as store:
            store.save_token(make_token(id="u", user="u", access_token="before"))
            with ThreadPoolExecutor(1) as pool:
                with server.read_only():
                    saving = pool.submit(
                        store.save_token, make_token(id="u", user="u", access_token="after")
                    )
                    time.sleep(0.4)
                    assert not saving.done()
                saving.result(timeout=3)
            assert store.find_token_by_id("u").get_access_token() == "after"
        record("the server is read-only for a while", route.driver, 1, "the save waited for it")

    @on_routes(*(each for each in BY_URL if each.driver.endswith(("+asyncpg", "+pymysql"))))
    def test_a_live_token_is_served_and_an_expired_one_found_soon_H7(self, route, server):
        with store_on(route, server.url, timeout=30) as store:
            store.save_token(make_token(id="live", **FULL))
            expired = FULL | {"user": "expired", "refresh_token": "r", "expires_in": "1"}
            store.save_token(make_token(id="expired", **expired))
            with server.read_only():
                assert known(store.find_token_by_id("live")) == known(make_token(**FULL))
                asked = make_token(user=FULL["user"])
                assert known(store.find_token(asked)) == known(make_token(**FULL))
                started = time.monotonic()
                found = store.find_token_by_id("expired")
                assert time.monotonic() - started < 6
                assert known(found) == known(make_token(**expired))
        record("the server stays read-only", route.driver, 1, "live tokens are served")

    @on_routes(*ONE_EACH)
    def test_the_sdk_refreshes_for_its_caller_and_the_failed_save_is_logged_H7(
        self, route, server, route_url, tmp_path, monkeypatch, errors
    ):
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(Initializer, "initializer", None)
        monkeypatch.setattr(Initializer.LOCAL, "init", None)
        with LoopbackZoho() as zoho, store_on(route, server.url, timeout=1) as store:
            expired = store_expired(route_url, zoho)
            live = {"client_id": "c", "client_secret": "s", "access_token": "a"}
            store.save_token(make_token(id="live", **live, expires_in=FULL["expires_in"]))
            sdk_process.start(zoho, OAuthToken(id="live"), store, tmp_path)
            with server.read_only():
                started = time.monotonic()
                Initializer.switch_user(token=OAuthToken(id=expired))
                assert time.monotonic() - started < 5
                assert whoami() == zoho.user_name().partition(":")[0]
            # Each call of the SDK asks for the token, and none of them could be stored.
            assert 1 <= zoho.counts.refreshes <= 2
        assert ("zoho_orm_store", "A token was not saved: %s") in errors
        record(
            "a token expires while the server stays read-only",
            route.driver,
            1,
            "refreshed for its caller, the failed save is logged",
        )


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("needs", ["pg_ctl"])
def test_nothing_acknowledged_is_lost_when_a_standby_takes_over_H7(needs):
    drivers = ("psycopg", "psycopg_async", "asyncpg")
    with ExitStack() as stack:
        pair = stack.enter_context(primary_and_standby())
        relay = stack.enter_context(Relay("127.0.0.1", pair.primary_port))
        url = make_url(f"postgresql+psycopg://postgres@127.0.0.1:{relay.port}/postgres")
        provision.upgrade(url)
        stores = {
            f"{driver} {number}": stack.enter_context(
                SQLAlchemyTokenStore(
                    url.set(drivername=f"postgresql+{driver}"), create_schema=False, timeout=30
                )
            )
            for driver in drivers
            for number in range(2)
        }
        stopped = threading.Event()
        acknowledged = dict.fromkeys(stores, 0)
        errors, slowest = [], dict.fromkeys(stores, 0.0)

        def keep_saving(name, store):
            while not stopped.is_set():
                number = acknowledged[name] + 1
                started = time.monotonic()
                try:
                    store.save_token(make_token(id=name, user=name, access_token=f"a{number}"))
                    acknowledged[name] = number
                except SDKException as error:
                    errors.append(f"{name}: {error}")
                    time.sleep(0.1)
                slowest[name] = max(slowest[name], time.monotonic() - started)

        with ThreadPoolExecutor(len(stores)) as pool:
            saving = [pool.submit(keep_saving, *each) for each in stores.items()]
            time.sleep(3)
            pair.kill_primary()
            relay.refuse()
            before = dict(acknowledged)
            relay.lead_to("127.0.0.1", pair.standby_port)
            time.sleep(1)
            relay.listen()  # The standby does not take writes yet.
            time.sleep(2)
            pair.promote_standby()
            everyone_goes_on = comes_true(
                lambda: all(acknowledged[name] > before[name] + 3 for name in stores)
            )
            stopped.set()
            for each in saving:
                each.result()
        assert errors == []
        assert everyone_goes_on
        assert max(slowest.values()) < 15
        with SQLAlchemyTokenStore(url.set(port=pair.standby_port), create_schema=False) as direct:
            stored = {name: direct.find_token_by_id(name).get_access_token() for name in stores}
        assert stored == {name: f"a{number}" for name, number in acknowledged.items()}
    for name, number in acknowledged.items():
        record(
            "the primary crashes and its synchronous standby takes over, during saves",
            name.partition(" ")[0],
            number,
            "0 saves lost, 0 failed",
        )
