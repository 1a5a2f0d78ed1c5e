"""Behind a connection pooler, and the options of a store's own engines: rule H6."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from uuid import uuid4

import pytest
from conftest import comes_true, empty
from databases import fresh_database
from pgbouncer import pgbouncer
from reliability import record
from sdk_tokens import FULL, known, make_token
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool, Pool

from zoho_orm_store import ConfigurationError, SQLAlchemyTokenStore, provision
from zoho_orm_store._sdk.conversion import SDKException

NEEDS = {"postgresql", "pgbouncer"}

REFUSED = "PgBouncer refuses a client"


@pytest.fixture(scope="module")
def database(provisioned):
    url = provisioned("postgresql")
    empty(url)
    return url


@pytest.fixture(scope="module")
def pooler(database):
    """The URL of a pooler with four connections to the server."""
    with pgbouncer(database) as url:
        yield url


@pytest.fixture(scope="module")
def small_pooler(database):
    """Three clients may connect, and one at a time gets the only connection to the server."""
    settings = {"max_client_conn": 3, "default_pool_size": 1, "query_wait_timeout": 0.3}
    with pgbouncer(database, **settings) as url:
        yield url


def store_of_psycopg(url, **options):
    return SQLAlchemyTokenStore(url.set(drivername="postgresql+psycopg"), **options)


def store_of_psycopg_async(url, **options):
    return SQLAlchemyTokenStore(url.set(drivername="postgresql+psycopg_async"), **options)


def store_of_asyncpg(url, **options):
    url = url.set(drivername="postgresql+asyncpg")
    return SQLAlchemyTokenStore(url, pooler=True, **options)


@contextmanager
def store_of_an_engine(url):
    """As the documentation of psycopg says."""
    url = url.set(drivername="postgresql+psycopg")
    engine = create_engine(url, connect_args={"prepare_threshold": None})
    with SQLAlchemyTokenStore(engine) as store:
        yield store
    engine.dispose()


def store_of_an_async_engine(url):
    """As the documentation of SQLAlchemy's dialect for asyncpg says."""
    engine = create_async_engine(
        url.set(drivername="postgresql+asyncpg", query={"prepared_statement_cache_size": "0"}),
        poolclass=NullPool,
        connect_args={
            "statement_cache_size": 0,
            "prepared_statement_name_func": lambda: f"__asyncpg_{uuid4()}__",
        },
    )
    return SQLAlchemyTokenStore(engine)


def store_of_an_async_engine_without_names(url):
    """As docs/poolers.md says."""
    engine = create_async_engine(
        url.set(drivername="postgresql+asyncpg"),
        connect_args={
            "statement_cache_size": 0,
            "prepared_statement_cache_size": 0,
            "prepared_statement_name_func": lambda: "",
        },
    )
    return SQLAlchemyTokenStore(engine)


soak = pytest.mark.soak

on_each_way = pytest.mark.parametrize(
    "store_of",
    [
        store_of_psycopg,
        store_of_psycopg_async,
        store_of_asyncpg,
        store_of_an_engine,
        store_of_an_async_engine,
        store_of_an_async_engine_without_names,
    ],
    ids=lambda function: function.__name__,
)
by_each_url = pytest.mark.parametrize(
    "store_of",
    [
        store_of_psycopg,
        store_of_asyncpg,
        # What PgBouncer says reaches it by the same library as psycopg.
        pytest.param(store_of_psycopg_async, marks=soak),
    ],
    ids=lambda function: function.__name__,
)


def driver_of(store_of):
    name = store_of.__name__.removeprefix("store_of_")
    if name.startswith("an_"):
        return "asyncpg" if "async" in name else "psycopg"
    return name


def crowd(stores, threads, rounds):
    """Find and save in threads, each with a token of its own; return the messages of the errors."""
    barrier = threading.Barrier(threads)
    errors = []

    def work(number):
        store = stores[number % len(stores)]
        name = f"{number}-{uuid4().hex}"
        barrier.wait()
        for n in range(rounds):
            try:
                token = make_token(id=name, user=name, access_token=f"{name} {n}")
                store.save_token(token)
                for found in (
                    store.find_token_by_id(name),
                    store.find_token(make_token(user=name)),
                ):
                    assert found.get_access_token() == f"{name} {n}"
            except SDKException as error:
                errors.append(str(error))

    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, number) for number in range(threads)]:
            done.result()
    return errors


class TestTransactionMode:
    @on_each_way
    @pytest.mark.parametrize("rounds", [12, pytest.param(100, marks=soak)])
    def test_many_threads_find_and_save_without_an_error_H6(self, pooler, store_of, rounds):
        with ExitStack() as stack:
            stores = [stack.enter_context(store_of(pooler)) for _ in range(2)]
            assert crowd(stores, 8, rounds) == []
        calls = 8 * rounds * 3
        record("PgBouncer in transaction mode", driver_of(store_of), calls, "0 failed, 0 mixed up")

    def test_asyncpg_without_the_option_fails_with_an_error_that_names_it_H6(self, pooler):
        url = pooler.set(drivername="postgresql+asyncpg")
        with (
            SQLAlchemyTokenStore(url, timeout=5) as one,
            SQLAlchemyTokenStore(url, timeout=5) as another,
        ):
            errors = crowd([one, another], 8, 12)
        assert errors, "the tests above would not notice a missing option"
        assert [error for error in errors if "pooler=True" not in error] == []

    @pytest.mark.parametrize(
        "store_of",
        [store_of_psycopg, store_of_an_engine, store_of_an_async_engine_without_names],
        ids=lambda function: function.__name__,
    )
    def test_no_prepared_statement_is_left_on_a_server_connection_H6(self, database, store_of):
        with pgbouncer(database, default_pool_size=1) as url:
            with store_of(url) as store:
                assert crowd([store], 4, 8) == []
            engine = create_engine(url, poolclass=NullPool)
            with engine.connect() as connection:
                statement = text("SELECT count(*) FROM pg_prepared_statements")
                assert connection.scalar(statement) == 0

    def test_threads_migrate_through_it_at_once_H6(self, tmp_path):
        with fresh_database("postgresql", tmp_path) as direct, pgbouncer(direct) as url:
            with ThreadPoolExecutor(4) as pool:
                for done in [pool.submit(provision.upgrade, url) for _ in range(4)]:
                    done.result()
            provision.check(direct)
        record("4 threads migrate through PgBouncer at once", "psycopg", 4, "migrated once")


class TestRefusalsOfThePooler:
    @contextmanager
    def held(self, url, number, *, in_transaction=False, seconds=None):
        """Hold so many connections, for some seconds or to the end of the block.

        Yields:
            An event that is set when they are given back.
        """
        engine = create_engine(url, poolclass=NullPool)
        released = threading.Event()
        connections = [engine.connect() for _ in range(number)]
        for connection in connections:
            connection.execute(text("SELECT 1"))
            if not in_transaction:
                connection.rollback()

        def release():
            for connection in connections:
                connection.close()
            released.set()

        if seconds is None:
            yield released
            release()
        else:
            releasing = threading.Timer(seconds, release)
            releasing.start()
            yield released
            releasing.join()

    @by_each_url
    def test_no_more_connections_allowed_is_tried_again_H6(self, small_pooler, store_of):
        with store_of(small_pooler) as store, self.held(small_pooler, 3, seconds=0.7) as released:
            store.get_tokens()
            assert released.is_set(), "the pooler did not refuse the store"
        record(REFUSED, driver_of(store_of), 1, "tried again until it succeeded")

    @by_each_url
    @pytest.mark.parametrize("connected", [True, False], ids=["connected", "connecting"])
    def test_a_query_that_waited_too_long_is_tried_again_H6(
        self, small_pooler, store_of, connected
    ):
        token = make_token(**FULL)
        with store_of(small_pooler) as store:
            if connected:
                store.save_token(token)
            with self.held(small_pooler, 1, in_transaction=True, seconds=1.2) as released:
                store.save_token(token)
                assert released.is_set(), "the pooler did not refuse the store"
            assert known(store.find_token_by_id(token.get_id())) == known(token)
        record(REFUSED, driver_of(store_of), 1, "tried again until it succeeded")

    @by_each_url
    def test_a_refusal_is_given_up_when_the_timeout_is_over_H6(self, small_pooler, store_of):
        with self.held(small_pooler, 3), store_of(small_pooler, timeout=1) as store:
            started = time.monotonic()
            with pytest.raises(SDKException, match="no more connections allowed"):
                store.get_tokens()
            assert 0.8 < time.monotonic() - started < 2


class TestEngineOptions:
    def connections_named(self, url, name):
        engine = create_engine(url, poolclass=NullPool)
        with engine.connect() as connection:
            return connection.scalar(
                text("SELECT count(*) FROM pg_stat_activity WHERE application_name = :name"),
                {"name": name},
            )

    @pytest.mark.parametrize("driver", ["postgresql+psycopg", "postgresql+psycopg_async"])
    def test_a_pool_size_and_arguments_of_the_driver_reach_the_engine_H6(self, database, driver):
        options = {
            "pool_size": 1,
            "max_overflow": 0,
            "connect_args": {"application_name": f"pool of {driver}"},
        }
        url = database.set(drivername=driver)
        with SQLAlchemyTokenStore(url, engine_options=options) as store:
            assert crowd([store], 8, 3) == []
            assert 1 <= self.connections_named(database, f"pool of {driver}") <= 2

    def test_connect_args_leave_the_limits_of_the_store_in_force_H6(self, database):
        options = {"connect_args": {"application_name": "limited"}}
        url = database.set(host="192.0.2.1")  # A network for documentation: nobody answers.
        with SQLAlchemyTokenStore(url, engine_options=options, timeout=2) as store:
            started = time.monotonic()
            with pytest.raises(SDKException):
                store.get_tokens()
            assert time.monotonic() - started < 4

    @pytest.mark.parametrize("driver", ["postgresql+psycopg", "postgresql+asyncpg"])
    def test_a_pool_that_keeps_nothing_reaches_the_engine_H6(self, database, driver):
        opened, closed = [], []

        def opens(connection, record):
            opened.append(record)

        def closes(connection, record):
            closed.append(record)

        url = database.set(drivername=driver)
        with SQLAlchemyTokenStore(url, engine_options={"poolclass": NullPool}) as store:
            event.listen(Pool, "connect", opens)
            event.listen(Pool, "close", closes)
            try:
                assert crowd([store], 4, 2) == []
                assert comes_true(lambda: len(closed) == len(opened))
            finally:
                event.remove(Pool, "connect", opens)
                event.remove(Pool, "close", closes)
        assert len(opened) >= 4 * 2 * 3, "connections were kept"

    def test_echo_reaches_the_engine_and_shows_no_secret_H6(self, database, caplog):
        with SQLAlchemyTokenStore(database, engine_options={"echo": True}) as store:
            store.save_token(make_token(**FULL | {"access_token": "1000.SECRET"}))
        logged = [each for each in caplog.records if each.name.startswith("sqlalchemy.engine")]
        assert any("oauthtoken" in each.getMessage() for each in logged)
        assert not any("1000.SECRET" in each.getMessage() for each in logged)

    def test_execution_options_reach_the_engine_H6(self, database):
        seen = []

        def executes(connection, *_):
            seen.append(connection.get_execution_options().get("mine"))

        options = {"execution_options": {"mine": "here"}}
        with SQLAlchemyTokenStore(database, engine_options=options) as store:
            event.listen(Engine, "before_cursor_execute", executes)
            try:
                store.save_token(make_token(**FULL))
                store.get_tokens()
            finally:
                event.remove(Engine, "before_cursor_execute", executes)
        assert set(seen) == {"here"}

    @pytest.mark.parametrize(
        "drivername",
        ["sqlite+pysqlite", "postgresql+psycopg", "postgresql+asyncpg", "mysql+asyncmy"],
    )
    def test_an_option_that_does_not_exist_is_named_H6(self, drivername):
        with pytest.raises(ConfigurationError, match="pool_sizes"):
            SQLAlchemyTokenStore(f"{drivername}:///x", engine_options={"pool_sizes": 3})

    @pytest.mark.parametrize("make", [create_engine, create_async_engine])
    @pytest.mark.parametrize(
        "option",
        [{"pooler": True}, {"engine_options": {"echo": True}}],
        ids=lambda option: next(iter(option)),
    )
    def test_with_an_engine_they_are_refused_H6(self, make, option):
        engine = make("postgresql+psycopg://u@127.0.0.1:1/x")
        with pytest.raises(ConfigurationError, match=next(iter(option))):
            SQLAlchemyTokenStore(engine, **option)
