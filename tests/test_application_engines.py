"""The application's engine and session are used exactly as they are: rule H9."""

from __future__ import annotations

import os
from contextlib import contextmanager

import pytest
from conftest import in_child as in_child
from databases import fresh_database
from reliability import record
from sdk_tokens import FULL, save
from sqlalchemy import Delete, Engine, Update, create_engine, event, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from zoho_orm_store import (
    AsyncTokenRepository,
    SQLAlchemyTokenStore,
    TokenRecord,
    TokenRepository,
    provision,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")

on_postgresql = pytest.mark.parametrize("database", ["postgresql"], indirect=True)

ENGINES = {
    "Engine": ("postgresql+psycopg", create_engine),
    "AsyncEngine": ("postgresql+asyncpg", create_async_engine),
}
each_engine = pytest.mark.parametrize("kind", ENGINES)

SEPARATE = "the child used no connection of its parent"


def sync(engine):
    return engine if isinstance(engine, Engine) else engine.sync_engine


@pytest.fixture
def make_engine():
    engines = []

    def make(kind, url, **options):
        driver, create = ENGINES[kind]
        engines.append(create(url.set(drivername=driver), **options))
        return engines[-1]

    yield make
    for engine in engines:
        sync(engine).dispose(close=isinstance(engine, Engine))


class TestRowLevelSecurity:
    @pytest.fixture
    def tenants_url(self, tmp_path):
        """A database whose role sees the rows that its session's tenant has saved."""
        with fresh_database("postgresql", tmp_path) as url:
            provision.upgrade(url)
            role = f"tenants_{url.database}"
            administrator = create_engine(url)
            with administrator.begin() as connection:
                for statement in (
                    f"CREATE ROLE {role} LOGIN",
                    f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}",
                    "ALTER TABLE oauthtoken ADD COLUMN tenant text NOT NULL "
                    "DEFAULT current_setting('app.tenant', true)",
                    "ALTER TABLE oauthtoken ENABLE ROW LEVEL SECURITY",
                    "CREATE POLICY own_rows ON oauthtoken "
                    "USING (tenant = current_setting('app.tenant', true))",
                ):
                    connection.execute(text(statement))
            yield url.set(username=role)
            with administrator.begin() as connection:
                connection.execute(text(f"DROP OWNED BY {role}"))
                connection.execute(text(f"DROP ROLE {role}"))
            administrator.dispose()

    @each_engine
    @pytest.mark.parametrize("database", ["postgresql"])
    def test_a_begin_listener_decides_what_is_seen_H9(
        self, kind, database, tenants_url, make_engine, in_child
    ):
        engine, tenant = make_engine(kind, tenants_url), "acme"

        @event.listens_for(sync(engine), "begin")
        def set_tenant(connection):
            connection.exec_driver_sql(f"SET LOCAL app.tenant = '{tenant}'")

        with SQLAlchemyTokenStore(engine, create_schema=False) as store:
            saved = save(store, **FULL)
            assert store.find_token_by_id(saved.get_id()) is not None

            def work():
                nonlocal tenant
                assert store.find_token_by_id(saved.get_id()) is not None
                tenant = "globex"
                assert store.find_token_by_id(saved.get_id()) is None
                save(store, user="globex's", refresh_token="r", access_token="a")
                assert len(store.get_tokens()) == 1

            in_child(work)
            assert len(store.get_tokens()) == 1
            tenant = "globex"
            assert [t.get_user_signature().get_name() for t in store.get_tokens()] == ["globex's"]


class TestEvents:
    @each_engine
    @pytest.mark.parametrize("registered", ["before", "after"])
    @on_postgresql
    def test_listeners_are_called_in_the_parent_and_in_a_child_H9(
        self, kind, registered, database, make_engine, in_child
    ):
        engine, seen = make_engine(kind, database), []

        def listen():
            for name in ("begin", "commit", "rollback"):
                event.listen(sync(engine), name, lambda connection, name=name: seen.append(name))

            @event.listens_for(sync(engine), "before_cursor_execute", retval=True)
            def comment(connection, cursor, statement, parameters, context, executemany):
                seen.append(statement.split()[0])
                return f"{statement} -- by the application", parameters

        def find_and_save(store):
            seen.clear()
            token = save(store, **FULL)
            store.find_token_by_id(token.get_id())
            assert seen[0] == "begin"
            assert "commit" in seen
            assert seen[-2:] == ["SELECT", "rollback"]

        if registered == "before":
            listen()
        with SQLAlchemyTokenStore(engine, create_schema=False) as store:
            store.get_tokens()
            if registered == "after":
                listen()
            find_and_save(store)
            in_child(lambda: find_and_save(store))
            find_and_save(store)

    @each_engine
    @on_postgresql
    def test_a_schema_translate_map_holds_everywhere_H9(
        self, kind, database, query, make_engine, in_child
    ):
        query("DROP SCHEMA IF EXISTS tenant CASCADE")
        query("CREATE SCHEMA tenant")
        engine = make_engine(kind, database).execution_options(
            schema_translate_map={None: "tenant"}
        )
        provision.upgrade(engine)
        with SQLAlchemyTokenStore(engine) as store:
            saved = save(store, **FULL)
            in_child(lambda: save(store, **FULL | {"access_token": "the child's"}))
            found = store.find_token_by_id(saved.get_id())
            assert found.get_access_token() == "the child's"
            assert len(store.get_tokens()) == 1
        assert query("SELECT count(*) FROM tenant.oauthtoken") == [(1,)]
        assert query("SELECT count(*) FROM public.oauthtoken") == [(0,)]
        query("DROP SCHEMA tenant CASCADE")

    @each_engine
    @on_postgresql
    def test_a_child_has_connections_of_its_own_H4(self, kind, database, make_engine, in_child):
        engine = make_engine(kind, database)
        backends = []

        @event.listens_for(sync(engine), "before_cursor_execute")
        def note(connection, cursor, *_):
            driver = connection.connection.driver_connection
            info = getattr(driver, "info", None)
            backends.append(driver.get_server_pid() if info is None else info.backend_pid)

        with SQLAlchemyTokenStore(engine, create_schema=False) as store:
            store.get_tokens()

            def work():
                parents = {*backends}
                backends.clear()
                store.get_tokens()
                assert backends
                assert not parents & {*backends}

            in_child(work)
            store.get_tokens()
            assert len({*backends}) == 1
        record("a fork after an engine of the application was used", ENGINES[kind][0], 1, SEPARATE)


@contextmanager
def primary_and_replica(tmp_path, drivername="sqlite"):
    """Two databases, of which the application takes the second one for a replica."""
    urls = [f"{drivername}:///{tmp_path / name}.db" for name in ("primary", "replica")]
    for url in urls:
        provision.upgrade(url.replace("+aiosqlite", ""))
    yield urls


class TestRouting:
    """A session as SQLAlchemy's documentation shows it: writes go to the primary."""

    def session_class(self, primary, replica):
        class RoutingSession(Session):
            def get_bind(self, mapper=None, clause=None, **arguments):
                assert mapper is not None
                if self._flushing or isinstance(clause, Update | Delete):
                    return primary
                return replica

        return RoutingSession

    def test_a_session_that_routes_H9(self, tmp_path):
        with primary_and_replica(tmp_path) as urls:
            engines = [create_engine(url) for url in urls]
            with self.session_class(*engines)() as session:
                repository = TokenRepository(session)
                saved = repository.save(TokenRecord(user_name="u", access_token="a"))
                session.commit()
                assert repository.get(saved.id) is None
            for engine, count in zip(engines, (1, 0), strict=True):
                with engine.connect() as connection:
                    assert TokenRepository(connection).count() == count
                engine.dispose()

    async def test_an_async_session_that_routes_H9(self, tmp_path):
        with primary_and_replica(tmp_path, "sqlite+aiosqlite") as urls:
            engines = [create_async_engine(url) for url in urls]
            routing = self.session_class(*(engine.sync_engine for engine in engines))
            async with AsyncSession(sync_session_class=routing) as session:
                repository = AsyncTokenRepository(session)
                saved = await repository.save(TokenRecord(user_name="u", access_token="a"))
                await session.commit()
                assert await repository.get(saved.id) is None
                await session.rollback()
                await repository.delete(saved.id)
                await session.commit()
            async with engines[0].connect() as connection:
                assert await AsyncTokenRepository(connection).count() == 0
            for engine in engines:
                await engine.dispose()


def test_the_store_is_used_after_the_application_has_disposed_of_its_engine_H3(tmp_path, in_child):
    engine = create_engine(f"sqlite:///{tmp_path / 'tokens.db'}")
    with SQLAlchemyTokenStore(engine, create_schema=True) as store:
        saved = save(store, **FULL)
        engine.dispose()
        assert store.find_token_by_id(saved.get_id()) is not None

        def work():
            engine.dispose(close=False)
            assert store.find_token_by_id(saved.get_id()) is not None
            assert os.getpid() > 0

        in_child(work)
    engine.dispose()
