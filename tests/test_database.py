"""Threads, event loops, forks, restarts, engines of the application's: rules H1 to H3 and G2."""

from __future__ import annotations

import asyncio
import logging
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from threading import Timer

import pytest
from asyncpg import InternalClientError
from conftest import (
    BY_DATABASE,
    BY_DRIVER,
    ENGINES,
    MEMORY,
    SHARED,
    empty,
    on_each_pool,
    on_routes,
    open_store,
)
from databases import SERVERS, kill_connections
from reliability import record
from sdk_tokens import FULL, known, make_token, save
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool, Pool, QueuePool, StaticPool

from zoho_orm_store import (
    ConfigurationError,
    MemoryTokenStore,
    MissingDependencyError,
    SQLAlchemyTokenStore,
    TokenRecord,
    TokenRepository,
    provision,
)
from zoho_orm_store._sdk.conversion import SDKException
from zoho_orm_store._sql.dialects import is_in_autocommit
from zoho_orm_store._sql.leases import LeaseStatements
from zoho_orm_store._sql.tokens import TokenStatements
from zoho_orm_store._tokens import TokenOperations

ON_SERVERS = [route for route in BY_DRIVER if route.database in SERVERS]
ENGINES_ON_SERVERS = [route for route in ENGINES if route.database in SERVERS]

ASYNC_DRIVERS = {
    "sqlite": "sqlite+aiosqlite",
    "postgresql": "postgresql+asyncpg",
    "mysql": "mysql+asyncmy",
}


def async_url(url):
    return url.set(drivername=ASYNC_DRIVERS[url.get_backend_name()])


class TestThreads:
    @on_each_pool
    def test_32_threads_on_one_store_H1(self, store):
        saved = save(store, **FULL)

        def work(number):
            for n in range(3):
                assert store.find_token_by_id(saved.get_id()) is not None
                save(store, user=f"u{number}", access_token=f"a{n}")
                assert store.find_token(make_token(user=f"u{number}")) is not None

        with ThreadPoolExecutor(32) as pool:
            for done in [pool.submit(work, number) for number in range(32)]:
                done.result()
        assert len(store.get_tokens()) == 33

    def test_many_threads_share_few_connections(self, database):
        opened, most = set(), 0

        def opens(connection, record):
            nonlocal most
            opened.add(record)
            most = max(most, len(opened))

        def closes(connection, record):
            opened.discard(record)

        def work(number):
            for n in range(5):
                token = save(store, user=f"u{number}", access_token=f"a{n}")
                assert store.find_token_by_id(token.get_id()) is not None

        with SQLAlchemyTokenStore(database, create_schema=False) as store:
            event.listen(Pool, "connect", opens)
            event.listen(Pool, "close", closes)
            try:
                with ThreadPoolExecutor(32) as pool:
                    for done in [pool.submit(work, number) for number in range(32)]:
                        done.result()
                idle = len(opened)
            finally:
                event.remove(Pool, "connect", opens)
                event.remove(Pool, "close", closes)
        assert 1 < most <= 6
        assert 1 < idle <= 4

    @on_each_pool
    async def test_inside_a_running_event_loop_H1(self, store):
        saved = save(store, **FULL)
        assert known(store.find_token_by_id(saved.get_id())) == known(saved)
        found = await asyncio.to_thread(store.find_token_by_id, saved.get_id())
        assert known(found) == known(saved)

    @on_each_pool
    def test_in_several_event_loops_of_one_process_H1(self, store):
        async def work():
            return save(store, **FULL).get_id()

        assert len({asyncio.run(work()) for _ in range(3)}) == 1

    @on_routes(MEMORY, *SHARED, *BY_DATABASE)
    def test_two_stores_on_one_database_H1(self, route, route_url, store):
        store.get_tokens()
        with open_store(route, route_url) as second:
            saved = save(second, **FULL)
            is_shared = route.database not in ("memory", "sqlite-memory")
            assert (store.find_token_by_id(saved.get_id()) is not None) == is_shared

    def test_making_a_store_connects_to_nothing_and_starts_nothing(self):
        threads = threading.active_count()
        for url in (
            "sqlite:////no/such/folder/tokens.db",
            "postgresql+psycopg://u:p@127.0.0.1:1/x",
            "postgresql+asyncpg://u:p@127.0.0.1:1/x",
        ):
            SQLAlchemyTokenStore(url).close()
        assert threading.active_count() == threads

    @on_each_pool
    def test_a_closed_store_says_so_H2(self, store):
        save(store, **FULL)
        store.close()
        store.close()
        if isinstance(store, MemoryTokenStore):
            return
        with pytest.raises(SDKException, match="store is closed"):
            store.get_tokens()


class TestForks:
    @pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
    @on_each_pool
    def test_a_child_uses_a_store_that_was_used_H1(self, route, store, in_child):
        saved = save(store, **FULL)
        keeps_rows = route.database != "sqlite-memory"

        def work():
            for _ in range(3):
                found = store.find_token_by_id(saved.get_id())
                assert (found is not None) == keeps_rows
            save(store, user="child", access_token="a")
            assert len(store.get_tokens()) == 1 + keeps_rows
            store.close()

        for _ in range(2):
            in_child(work)
            store.delete_tokens()
            saved = save(store, **FULL)
        in_child(work)
        for _ in range(3):
            assert known(store.find_token_by_id(saved.get_id())) == known(saved)

    @pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
    @on_each_pool
    def test_a_child_forked_while_threads_are_at_work_H1(self, route, store, in_child):
        saved = save(store, **FULL)
        stop = threading.Event()

        def keep_busy():
            while not stop.is_set():
                store.find_token_by_id(saved.get_id())

        threads = [threading.Thread(target=keep_busy) for _ in range(4)]
        for thread in threads:
            thread.start()
        if route.database in SERVERS:
            # Drivers connect with OpenSSL, whose locks no fork may copy: let them all connect first.
            time.sleep(0.5)
        try:
            for _ in range(6):
                in_child(lambda: save(store, user="child", access_token="a"))
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        record("a fork while threads are at work", route.driver, 6, "every child worked")

    @pytest.mark.parametrize(
        "used_by_every_call",
        [TokenStatements, LeaseStatements, TokenOperations, TokenRepository, SQLAlchemyTokenStore],
    )
    def test_no_call_takes_the_lock_of_a_cached_property_H1(self, used_by_every_call):
        """Before Python 3.12 all instances share it, and a fork copies it as it is: locked."""
        attributes = vars(used_by_every_call).items()
        assert [name for name, value in attributes if isinstance(value, cached_property)] == []

    @pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
    @on_routes(*(each for each in BY_DRIVER if each.database == "sqlite"))
    def test_a_fork_waits_for_a_transaction_on_sqlite_H1(self, route, store, in_child):
        """Otherwise the child would hold the lock on the file for ever."""
        save(store, **FULL)
        began, forked = threading.Event(), threading.Event()

        def keep_the_lock():
            with store.transaction() as tokens:
                tokens.save(TokenRecord(user_name="parent", access_token="a"))
                began.set()
                assert not forked.wait(0.4), "the fork did not wait"

        thread = threading.Thread(target=keep_the_lock)
        thread.start()
        began.wait()
        in_child(lambda: save(store, user="child", access_token="a"))
        forked.set()
        thread.join()
        assert len(store.get_tokens()) == 3
        record("a fork during a transaction", route.driver, 1, "the child can save")

    @pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
    @on_each_pool
    def test_a_child_makes_the_first_call_H1(self, route, route_url, in_child):
        with open_store(route, route_url) as store:

            def work():
                save(store, **FULL)
                assert len(store.get_tokens()) == 1
                store.close()

            in_child(work)


class TestRestarts:
    @on_routes(*ON_SERVERS, *ENGINES_ON_SERVERS)
    def test_after_the_server_dropped_every_connection_H1(self, route, route_url, store):
        saved = save(store, **FULL)
        kill_connections(route_url)
        assert known(store.find_token_by_id(saved.get_id())) == known(saved)
        kill_connections(route_url)
        save(store, user="u", access_token="a")
        assert len(store.get_tokens()) == 2
        record("the server closes every connection", route.driver, 2, "the next call succeeded")

    @pytest.mark.parametrize(
        ("name", "driver"),
        [
            ("postgresql", "postgresql+psycopg"),
            ("postgresql", "postgresql+asyncpg"),
            ("mariadb", "mysql+pymysql"),
            ("mariadb", "mysql+asyncmy"),
        ],
    )
    def test_a_server_without_a_free_connection_is_asked_again_H1(self, name, driver, provisioned):
        url = provisioned(name)
        empty(url)
        with fewer_connections(url) as address:
            engine = create_engine(address)
            blocker = engine.connect()
            Timer(0.5, blocker.invalidate).start()
            started = time.monotonic()
            with SQLAlchemyTokenStore(address.set(drivername=driver), create_schema=False) as store:
                assert store.get_tokens() == []
            assert time.monotonic() - started > 0.4
            engine.dispose()
        record("the server has no free connection", driver, 1, "tried again until it succeeded")

    @pytest.mark.parametrize("error", [InternalClientError("state 11"), ConnectionResetError()])
    def test_an_error_of_the_driver_that_sqlalchemy_lets_through_H1(self, tmp_path, error):
        engine = create_engine(f"sqlite:///{tmp_path / 'tokens.db'}")
        provision.upgrade(engine)
        due = [error]

        @event.listens_for(engine, "before_cursor_execute")
        def fail_once(*_):
            if due:
                raise due.pop()

        with SQLAlchemyTokenStore(engine) as store:
            saved = save(store, **FULL)
            due.append(error)
            assert known(store.find_token_by_id(saved.get_id())) == known(saved)
        engine.dispose()


@contextmanager
def fewer_connections(url):
    """The URL of a user who may have one connection."""
    administrator = create_engine(url, isolation_level="AUTOCOMMIT")
    user = f"few_{url.database}"
    with administrator.connect() as connection:
        if url.get_backend_name() == "postgresql":
            connection.execute(text(f"CREATE ROLE {user} LOGIN CONNECTION LIMIT 1"))
            connection.execute(text(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {user}"))
        else:
            host = f"'{user}'@'127.0.0.1'"
            connection.execute(text(f"CREATE USER {host} WITH MAX_USER_CONNECTIONS 1"))
            connection.execute(text(f"GRANT ALL ON {url.database}.* TO {host}"))
        try:
            yield url.set(username=user, password=None)
        finally:
            if url.get_backend_name() == "postgresql":
                connection.execute(text(f"DROP OWNED BY {user}"))
                connection.execute(text(f"DROP ROLE {user}"))
            else:
                connection.execute(text(f"DROP USER {host}"))
    administrator.dispose()


class TestEnginesOfTheApplication:
    def test_an_engine_is_left_as_it_was_H3(self, database):
        engine = create_engine(database, pool_size=3, max_overflow=2)
        pool = engine.pool
        with engine.connect() as connection:
            before = connection.get_isolation_level()
        with SQLAlchemyTokenStore(engine) as store:
            save(store, **FULL)
            store.get_tokens()
        assert engine.pool is pool
        assert pool.size() == 3
        assert pool.checkedin() >= 1, "the pool was disposed of"
        with engine.connect() as connection:
            assert connection.get_isolation_level() == before
        engine.dispose()

    @pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
    def test_its_reads_are_transactions_of_its_own_kind_H9(self, database, asynchronous):
        """Row-level security, for one, is set up by a listener to `begin`."""
        if asynchronous:
            engine = create_async_engine(async_url(database))
        else:
            engine = create_engine(database)
        seen = []
        with SQLAlchemyTokenStore(engine) as store:
            saved = save(store, **FULL)

            def begins(connection):
                seen.append("BEGIN")

            def executes(connection, cursor, statement, *_):
                # The store works on a copy of an asynchronous engine.
                options = connection.get_execution_options()
                assert "isolation_level" not in options
                assert not is_in_autocommit(connection)
                seen.append(statement.partition(" ")[0])

            def ends(connection):
                seen.append("ROLLBACK")

            listeners = {"begin": begins, "before_cursor_execute": executes, "rollback": ends}
            for name, listener in listeners.items():
                event.listen(Engine, name, listener)
            try:
                assert known(store.find_token_by_id(saved.get_id())) == known(saved)
                assert len(store.get_tokens()) == 1
            finally:
                for name, listener in listeners.items():
                    event.remove(Engine, name, listener)
        assert seen == ["BEGIN", "SELECT", "ROLLBACK"] * 2
        (engine.sync_engine if asynchronous else engine).dispose(close=not asynchronous)

    async def test_an_async_engine_goes_on_in_its_own_loop_H3(self, database):
        engine = create_async_engine(async_url(database))
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
        pool = engine.sync_engine.pool
        with SQLAlchemyTokenStore(engine) as store:
            saved = save(store, **FULL)
            async with engine.connect() as connection:
                rows = await connection.execute(text("SELECT id FROM oauthtoken"))
                assert rows.scalars().all() == [saved.get_id()]
        assert engine.sync_engine.pool is pool
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
        await engine.dispose()

    def test_an_engine_in_autocommit_still_saves_all_or_nothing_E6(self, database):
        engine = create_engine(database, isolation_level="AUTOCOMMIT")
        with SQLAlchemyTokenStore(engine) as store:
            save(store, user="u", client_id="c", refresh_token="r1", access_token="a1")
            save(store, client_id="c", refresh_token="r2", access_token="a2")

            @event.listens_for(engine, "before_cursor_execute")
            def fail_to_update(connection, cursor, statement, *_):
                if statement.startswith("UPDATE"):
                    raise OSError("the disk is full")

            with pytest.raises(OSError, match="disk is full"):
                save(store, user="u", client_id="c", refresh_token="r2", access_token="a3")
            event.remove(engine, "before_cursor_execute", fail_to_update)
            assert len(store.get_tokens()) == 2, "the absorbed row was deleted all the same"
        engine.dispose()

    def test_an_engine_with_one_shared_connection_H1(self):
        engine = create_engine(
            "sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False}
        )
        with SQLAlchemyTokenStore(engine, create_schema=True) as store:
            with ThreadPoolExecutor(8) as pool:
                jobs = [
                    pool.submit(save, store, user=f"u{n % 5}", access_token="a") for n in range(50)
                ]
                for job in jobs:
                    job.result()
            assert len(store.get_tokens()) == 5
        engine.dispose()

    def test_the_sqlite_transaction_recipe_of_sqlalchemy(self, tmp_path):
        engine = create_engine(f"sqlite:///{tmp_path / 'app.db'}")

        @event.listens_for(engine, "connect")
        def leave_transactions_to_us(connection, record):
            connection.isolation_level = None

        @event.listens_for(engine, "begin")
        def begin(connection):
            connection.exec_driver_sql("BEGIN")

        with SQLAlchemyTokenStore(engine, create_schema=True, timeout=20) as store:
            with ThreadPoolExecutor(8) as pool:
                jobs = [pool.submit(save, store, user="u", access_token=f"{n}") for n in range(40)]
                for job in jobs:
                    job.result()
            assert len(store.get_tokens()) == 1
        engine.dispose()

    def test_an_async_engine_in_memory_is_refused(self):
        with pytest.raises(ConfigurationError, match=r"sqlite\+aiosqlite:///:memory:"):
            SQLAlchemyTokenStore(create_async_engine("sqlite+aiosqlite://"))

    def test_the_default_pool_of_an_engine_is_waited_for(self, tmp_path):
        engine = create_engine(
            f"sqlite:///{tmp_path / 'a.db'}",
            poolclass=QueuePool,
            pool_size=1,
            max_overflow=0,
            pool_timeout=0.2,
        )
        with SQLAlchemyTokenStore(engine, create_schema=True) as store:
            store.get_tokens()
            with engine.connect(), pytest.raises(SDKException, match="Raise pool_size"):
                store.get_tokens()
        engine.dispose()


class TestErrors:
    @pytest.mark.parametrize(
        "url",
        [
            "postgresql+psycopg://u:hunter2pass@127.0.0.1:{port}/x",
            "postgresql+asyncpg://u:hunter2pass@127.0.0.1:{port}/x",
            "postgresql+psycopg_async://u:hunter2pass@127.0.0.1:{port}/x",
            "mysql+pymysql://u:hunter2pass@127.0.0.1:{port}/x",
            "mysql+asyncmy://u:hunter2pass@127.0.0.1:{port}/x",
            "mysql+aiomysql://u:hunter2pass@127.0.0.1:{port}/x",
        ],
    )
    def test_an_unreachable_server_is_named_without_its_password_G2(self, url):
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            url = url.format(port=unused.getsockname()[1])
            with SQLAlchemyTokenStore(url) as store, pytest.raises(SDKException) as raised:
                store.get_tokens()
        message = str(raised.value)
        assert url.replace("hunter2pass", "***") in message
        assert "Cannot connect" in message
        assert "hunter2pass" not in message

    @pytest.mark.parametrize("driver", ["psycopg", "asyncpg", "psycopg_async"])
    def test_a_server_that_does_not_answer_is_given_up_in_time_G2(self, driver):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"postgresql+{driver}://u:hunter2pass@127.0.0.1:{silent.getsockname()[1]}/x"
            with SQLAlchemyTokenStore(url, timeout=2) as store:
                started = time.monotonic()
                with pytest.raises(SDKException):
                    store.get_tokens()
                assert time.monotonic() - started < 5

    @pytest.mark.parametrize("driver", ["pymysql", "asyncmy", "aiomysql"])
    def test_a_mysql_server_that_does_not_answer_is_given_up_in_time_G2(self, driver):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"mysql+{driver}://u:hunter2pass@127.0.0.1:{silent.getsockname()[1]}/x"
            with SQLAlchemyTokenStore(url, timeout=2) as store:
                started = time.monotonic()
                with pytest.raises(SDKException):
                    store.get_tokens()
                assert time.monotonic() - started < 5

    def test_a_missing_schema_names_the_command_G2(self, empty_database):
        with SQLAlchemyTokenStore(empty_database, create_schema=False) as store:
            for call in (
                store.get_tokens,
                store.delete_tokens,
                lambda: store.find_token_by_id("x"),
                lambda: save(store, **FULL),
            ):
                with pytest.raises(SDKException, match="zoho-orm-store upgrade --url") as raised:
                    call()
                assert "A table or column is missing in" in str(raised.value)
                assert "own migrations make the tables, run those instead" in str(raised.value)
                assert type(raised.value.cause).__name__ == "SchemaError"

    def test_a_schema_that_is_behind_names_both_revisions_G2(self, empty_database):
        provision.upgrade(empty_database, "zoho_orm_store_0001")
        with SQLAlchemyTokenStore(empty_database, create_schema=False) as store:
            for call in (store.get_tokens, lambda: save(store, **FULL)):
                with pytest.raises(SDKException, match="zoho_orm_store_0001") as raised:
                    call()
                assert provision.head() in str(raised.value)

    def test_create_schema_makes_the_tables_on_first_use(self, empty_database):
        with SQLAlchemyTokenStore(empty_database, create_schema=True) as store:
            assert provision.current(empty_database) is None
            save(store, **FULL)
        provision.check(empty_database)

    def test_a_sqlite_url_makes_its_tables_and_a_server_url_does_not(self, empty_database):
        with SQLAlchemyTokenStore(empty_database) as store:
            if empty_database.get_backend_name() == "sqlite":
                assert store.get_tokens() == []
            else:
                with pytest.raises(SDKException, match="upgrade"):
                    store.get_tokens()

    def test_a_folder_that_is_not_there_G2(self, tmp_path):
        store = SQLAlchemyTokenStore(f"sqlite:///{tmp_path}/missing/tokens.db")
        with store, pytest.raises(SDKException, match=r"Cannot connect .* the folder exists"):
            store.get_tokens()

    def test_a_file_that_is_no_database_G2(self, tmp_path):
        path = tmp_path / "tokens.db"
        path.write_text("this is no database" * 100)
        store = SQLAlchemyTokenStore(f"sqlite:///{path}")
        with store, pytest.raises(SDKException, match="not a database"):
            store.get_tokens()
        assert path.read_text() == "this is no database" * 100

    def test_a_read_only_file_keeps_what_it_holds_E6(self, tmp_path):
        path = tmp_path / "tokens.db"
        with SQLAlchemyTokenStore(f"sqlite:///{path}") as store:
            saved = save(store, **FULL)
        with SQLAlchemyTokenStore(f"sqlite:///file:{path}?mode=ro&uri=true") as store:
            assert known(store.find_token_by_id(saved.get_id())) == known(saved)
            with pytest.raises(SDKException, match="readonly"):
                save(store, **FULL | {"access_token": "new"})
            assert known(store.find_token_by_id(saved.get_id())) == known(saved)

    def test_a_file_that_another_process_holds_is_given_up_in_time(self, tmp_path):
        path = tmp_path / "tokens.db"
        with SQLAlchemyTokenStore(f"sqlite:///{path}", timeout=0.5) as store:
            save(store, **FULL)
            holder = sqlite3.connect(path, isolation_level=None)
            holder.execute("BEGIN IMMEDIATE")
            started = time.monotonic()
            with pytest.raises(SDKException, match=r"within 0\.5 seconds.*database is locked"):
                save(store, user="u", access_token="a")
            assert time.monotonic() - started < 5
            holder.rollback()
            holder.close()
            save(store, user="u", access_token="a")

    @on_routes(*ON_SERVERS)
    def test_a_row_that_another_transaction_holds_is_given_up_in_time(self, route, route_url):
        with open_store(route, route_url, gives_up=True, timeout=1.5) as store:
            saved = save(store, **FULL)
            engine = create_engine(route_url)
            with engine.begin() as connection:
                connection.execute(
                    text("SELECT id FROM oauthtoken WHERE id = :id FOR UPDATE"),
                    {"id": saved.get_id()},
                )
                started = time.monotonic()
                with pytest.raises(SDKException):
                    save(store, **FULL | {"access_token": "new"})
                assert time.monotonic() - started < 8
            engine.dispose()
            save(store, **FULL | {"access_token": "newer"})

    @pytest.mark.parametrize(
        ("bind", "message"),
        [
            ("not a url", "database must be a URL"),
            ("", "database must be a URL"),
            ("mysql+pymysql://root:hunter2pass@127.0.0.1:port/x", "database must be a URL"),
            (None, "not NoneType"),
            (7, "not int"),
            ("oracle9://x", "'oracle9' is not supported. Use SQLite, PostgreSQL, MariaDB or MySQL"),
            ("sqlite+nodriver://", r"SQLAlchemy has no database driver 'sqlite\+nodriver'"),
            ("sqlite://user:hunter2pass@host/x", "cannot be used"),
        ],
    )
    def test_a_bind_that_cannot_be_used_G2(self, bind, message):
        with pytest.raises(ConfigurationError, match=message) as raised:
            SQLAlchemyTokenStore(bind)
        assert "hunter2pass" not in str(raised.value)

    def test_a_missing_driver_names_its_extra_G2(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "asyncpg", None)
        with pytest.raises(MissingDependencyError, match=r"zoho-orm-store\[postgresql\]"):
            SQLAlchemyTokenStore("postgresql+asyncpg://u@h/x")

    def test_a_missing_sdk_names_its_extra_G2(self):
        code = (
            "import sys; sys.modules['zohocrmsdk'] = None\n"
            "import zoho_orm_store as z\n"
            "try: z.SQLAlchemyTokenStore\n"
            "except z.MissingDependencyError as e: print(e)"
        )
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert "zoho-orm-store[sdk]" in result.stdout

    def test_an_older_sdk_without_its_mysql_driver_names_it_G2(self, tmp_path):
        token = tmp_path.joinpath("zohocrmsdk/src/com/zoho/api/authenticator/oauth_token.py")
        token.parent.mkdir(parents=True)
        token.write_text("import mysql.connector")
        tmp_path.joinpath("zohocrmsdk/__init__.py").touch()
        code = (
            f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.modules['mysql'] = None\n"
            "import zoho_orm_store as z\n"
            "try: z.MemoryTokenStore\n"
            "except z.ConfigurationError as e: print(e)"
        )
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert "pip install mysql-connector-python" in result.stdout

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"missing_id": "ignore"}, "missing_id must be"),
            ({"timeout": 0}, "timeout must be"),
            ({"timeout": -1}, "timeout must be"),
            ({"timeout": float("nan")}, "timeout must be"),
        ],
    )
    def test_an_option_that_makes_no_sense(self, options, message):
        with pytest.raises(ConfigurationError, match=message):
            SQLAlchemyTokenStore("sqlite://", **options)


class TestSecrets:
    def test_no_repr_shows_a_secret_G3(self, database):
        url = database.set(username="u", password="hunter2pass") if database.host else database
        store = SQLAlchemyTokenStore(url)
        assert "hunter2pass" not in repr(store)

    @on_routes(*BY_DRIVER, *ENGINES)
    def test_no_failure_shows_a_secret_G3(self, route, route_url, caplog):
        secrets = {
            "client_secret": "CLIENTSECRET-0123456789",
            "refresh_token": "REFRESHTOKEN-0123456789",
            "access_token": "ACCESSTOKEN-0123456789",
            "grant_token": "GRANTTOKEN-0123456789",
        }
        texts = []

        def provoke(call):
            with pytest.raises(SDKException) as raised:
                call()
            texts.append("".join(traceback.format_exception(raised.value)))
            texts.append(repr(raised.value) + str(raised.value))

        caplog.set_level(logging.DEBUG, "zoho_orm_store")
        caplog.set_level(logging.WARNING, "sqlalchemy")
        with open_store(route, route_url) as store:
            saved = save(store, user="u", **secrets)
            texts.append(repr(store))
            provoke(lambda: save(store, id=saved.get_id(), user="v", **secrets))
            provoke(lambda: save(store, user="w", expires_in="no", **secrets))
            provoke(lambda: save(store, user="\0", **secrets))
            if route_url is not None:
                behind = create_engine(route_url, poolclass=NullPool)
                with behind.begin() as connection:
                    connection.execute(
                        text("ALTER TABLE oauthtoken RENAME COLUMN grant_token TO g")
                    )
                provoke(lambda: save(store, user="u", **secrets))
                provoke(lambda: store.find_token(make_token(**secrets)))
                with behind.begin() as connection:
                    connection.execute(
                        text("ALTER TABLE oauthtoken RENAME COLUMN g TO grant_token")
                    )
                    connection.execute(text("ALTER TABLE oauthtoken ADD COLUMN n integer"))
                    if route.database == "postgresql":
                        connection.execute(text("UPDATE oauthtoken SET n = 1"))
                        connection.execute(text("ALTER TABLE oauthtoken ALTER n SET NOT NULL"))
                if route.database == "postgresql":
                    provoke(lambda: save(store, user="x", **secrets))
                with behind.begin() as connection:
                    connection.execute(text("ALTER TABLE oauthtoken DROP COLUMN n"))
        everything = "\n".join([*texts, caplog.text])
        assert "Exception in save_token" in everything
        for secret in secrets.values():
            assert secret not in everything
