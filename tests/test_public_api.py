"""What users import, pass and catch: the names, the errors, repositories and transactions of a store."""

from __future__ import annotations

import asyncio
import pickle
import shutil
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from inspect import isclass
from pathlib import Path

import pytest
from conftest import BY_DATABASE, BY_DRIVER, ENGINES, on_routes, open_store, statements_counted
from databases import SERVERS, kill_connections
from sdk_tokens import FULL, known, make_token
from sqlalchemy import MetaData, create_engine, text
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    scoped_session,
    sessionmaker,
)

import zoho_orm_store
from zoho_orm_store import (
    AsyncTokenRepository,
    CipherError,
    ConfigurationError,
    DatabaseError,
    DatabaseTimeoutError,
    DatabaseUnreachableError,
    FernetCipher,
    InvalidTokenError,
    MissingDependencyError,
    RefreshFailedError,
    SchemaError,
    SQLAlchemyTokenStore,
    StoreClosedError,
    StoredTokenMixin,
    TokenRecord,
    TokenRepository,
    UndecryptableTokenError,
    UnreadableTokenError,
    UserMismatchError,
    ZohoOrmStoreError,
    errors,
    generate_key,
    provision,
)

NAMES = """
    SQLAlchemyTokenStore MemoryTokenStore
    TokenRepository AsyncTokenRepository TokenRecord
    StoredToken RefreshLease StoredTokenMixin RefreshLeaseMixin metadata
    RefreshPolicy RefreshStats
    TokenCipher FernetCipher generate_key rotate_keys
    import_tokens export_tokens FileStoreFile TokenTable
    provision include_name
"""
ERRORS = {
    name
    for name, value in vars(errors).items()
    if isclass(value) and issubclass(value, ZohoOrmStoreError)
}


class TestNames:
    def test_the_package_has_what_users_need_and_nothing_else(self):
        assert set(zoho_orm_store.__all__) == {*NAMES.split(), *ERRORS}
        assert zoho_orm_store.__all__ == sorted(zoho_orm_store.__all__)

    def test_each_name_is_there(self):
        for name in zoho_orm_store.__all__:
            value = getattr(zoho_orm_store, name)
            assert getattr(value, "__name__", name).rpartition(".")[2] == name
        assert set(zoho_orm_store.__all__) <= set(dir(zoho_orm_store))
        with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
            zoho_orm_store.nonesuch  # noqa: B018

    def test_each_is_imported_by_a_star(self):
        code = "from zoho_orm_store import *; print(*dir())"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert set(zoho_orm_store.__all__) <= set(done.stdout.split()), done.stderr


MADE = {
    ZohoOrmStoreError: ZohoOrmStoreError("why"),
    ConfigurationError: ConfigurationError("why"),
    MissingDependencyError: MissingDependencyError(
        "psycopg2", "postgresql", instead="postgresql+x"
    ),
    StoreClosedError: StoreClosedError(),
    InvalidTokenError: InvalidTokenError("why"),
    UserMismatchError: UserMismatchError("why"),
    RefreshFailedError: RefreshFailedError("why"),
    CipherError: CipherError("why"),
    UnreadableTokenError: UnreadableTokenError("why", "7"),
    UndecryptableTokenError: UndecryptableTokenError("why", "7"),
    DatabaseError: DatabaseError("why", retryable=True),
    DatabaseUnreachableError: DatabaseUnreachableError("why", retryable=True),
    DatabaseTimeoutError: DatabaseTimeoutError("why"),
    SchemaError: SchemaError("why"),
}
MESSAGES = {
    MissingDependencyError: (
        "The package 'psycopg2' is not installed. Install another driver with: "
        "pip install 'zoho-orm-store[postgresql]' and begin the URL with postgresql+x://"
    ),
    StoreClosedError: "This token store is closed. Make a new one, or close it later.",
}


class TestErrors:
    def test_it_is_caught_as_the_built_in_one_that_a_python_user_expects(self):
        for ours, built_in in (
            (ConfigurationError, ValueError),
            (InvalidTokenError, ValueError),
            (UserMismatchError, ValueError),
            (MissingDependencyError, ImportError),
            (MissingDependencyError, ValueError),
            (StoreClosedError, RuntimeError),
            (DatabaseTimeoutError, TimeoutError),
            (DatabaseUnreachableError, ConnectionError),
        ):
            with pytest.raises(built_in):
                raise MADE[ours]

    def test_these_are_all(self):
        assert {kind.__name__ for kind in MADE} == ERRORS

    def test_its_text_is_its_message(self):
        for kind, error in MADE.items():
            assert isinstance(error, ZohoOrmStoreError)
            assert str(error) == MESSAGES.get(kind, "why")
            assert error.args == (str(error),)

    def test_it_comes_back_from_another_process(self):
        """What a pool of processes or a task queue cannot unpickle, it never reports."""
        for kind, error in MADE.items():
            again = pickle.loads(pickle.dumps(error))
            assert type(again) is kind
            assert str(again) == str(error)
            assert vars(again) == vars(error)


class Base(DeclarativeBase):
    metadata = MetaData()


class TenantsToken(StoredTokenMixin, Base):
    __tablename__ = "tenants_token"

    tenant_id: Mapped[int | None] = mapped_column()


ASKED = TokenRecord(
    user_name="ada@example.com:1",
    client_id="1000.C",
    client_secret="S3CR3T-0123456789",
    refresh_token="1000.refresh-0123456789",
    access_token="1000.access-0123456789",
    expiry_time=1_900_000_000_000,
)
SECRETS = (ASKED.client_secret, ASKED.refresh_token, ASKED.access_token)


class TestARepositoryOfTheStores:
    @pytest.fixture
    def url(self, tmp_path):
        return f"sqlite:///{tmp_path / 'app.db'}"

    @pytest.fixture
    def engine(self, url):
        engine = create_engine(url)
        Base.metadata.create_all(engine)
        yield engine
        engine.dispose()

    @pytest.fixture
    def async_engine(self, engine, url):
        return create_async_engine(url.replace("sqlite:", "sqlite+aiosqlite:"))

    @pytest.fixture
    def store(self, engine):
        with SQLAlchemyTokenStore(
            engine,
            model=TenantsToken,
            scope={"tenant_id": 7},
            cipher=FernetCipher(generate_key()),
            refresh=None,
        ) as store:
            yield store

    def assert_it_is_the_stores(self, store, engine, saved):
        """It has saved into the store's table, in its scope, and under its key."""
        assert known(store.find_token_by_id(saved.id))["access_token"] == ASKED.access_token
        assert store.scoped(tenant_id=8).get_tokens() == []
        with engine.connect() as connection:
            [row] = connection.execute(text("SELECT * FROM tenants_token"))
        assert row.tenant_id == 7
        assert row.access_token.startswith("$zos1$")

    @pytest.mark.parametrize(
        "open_session",
        [Session, lambda engine: scoped_session(sessionmaker(engine))],
        ids=["Session", "scoped_session"],
    )
    def test_in_a_session(self, store, engine, open_session):
        session = open_session(engine)
        tokens = store.repository(session)
        assert type(tokens) is TokenRepository
        saved = tokens.save(ASKED)
        session.commit()
        assert tokens.get(saved.id) == saved
        session.close()
        self.assert_it_is_the_stores(store, engine, saved)

    def test_on_a_connection(self, store, engine):
        with engine.begin() as connection:
            tokens = store.repository(connection)
            assert type(tokens) is TokenRepository
            saved = tokens.save(ASKED)
        self.assert_it_is_the_stores(store, engine, saved)

    @pytest.mark.parametrize(
        "open_session",
        [
            AsyncSession,
            lambda engine: async_scoped_session(async_sessionmaker(engine), asyncio.current_task),
            AsyncConnection,
        ],
        ids=["AsyncSession", "async_scoped_session", "AsyncConnection"],
    )
    async def test_in_an_asynchronous_one(self, store, engine, async_engine, open_session):
        session = open_session(async_engine)
        if isinstance(session, AsyncConnection):
            await session.start()
        tokens = store.repository(session)
        assert type(tokens) is AsyncTokenRepository
        saved = await tokens.save(ASKED)
        await session.commit()
        assert await tokens.get(saved.id) == saved
        await session.close()
        await async_engine.dispose()
        self.assert_it_is_the_stores(store, engine, saved)

    def test_made_once_it_uses_each_threads_own_session(self, store, engine):
        """As a web application does, at module level, with ``db.session``."""
        registry = scoped_session(sessionmaker(engine))
        tokens = store.repository(registry)

        def save_and_roll_back():
            tokens.save(ASKED)
            in_transaction = registry().in_transaction()
            registry.remove()
            return in_transaction

        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(save_and_roll_back).result()
        assert not registry.registry.has()
        assert tokens.count() == 0
        registry.remove()

    def test_making_it_asks_a_registry_for_nothing(self, store):
        """Flask-SQLAlchemy's raises outside of a request."""

        def outside_of_a_request():
            raise AssertionError

        registry = scoped_session(sessionmaker(), outside_of_a_request)
        assert type(store.repository(registry)) is TokenRepository
        registry = async_scoped_session(async_sessionmaker(), outside_of_a_request)
        assert type(store.repository(registry)) is AsyncTokenRepository

    async def test_made_once_it_uses_each_tasks_own_session(self, store, async_engine):
        registry = async_scoped_session(async_sessionmaker(async_engine), asyncio.current_task)
        tokens = store.repository(registry)

        async def save_and_roll_back():
            await tokens.save(ASKED)
            in_transaction = registry().in_transaction()
            await registry.remove()
            return in_transaction

        assert await asyncio.create_task(save_and_roll_back())
        assert not registry.registry.has()
        assert await tokens.count() == 0
        await registry.remove()
        await async_engine.dispose()

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (lambda engine, _: sessionmaker(engine), r"not sessionmaker\. .* such as Session\("),
            (lambda engine, _: engine, r"a Session, .*not Engine\. .* such as Session\("),
            (lambda *_: None, "a Session, a Connection or a scoped_session, not NoneType"),
            (lambda *_: "sqlite://", "a Session, a Connection or a scoped_session, not str"),
            (lambda *_: Session, r"not the class Session\. .* such as Session\("),
            (
                lambda _, engine: engine,
                r"an AsyncSession, an AsyncConnection or an async_scoped_session, not AsyncEngine\. "
                r".* such as AsyncSession\(",
            ),
            (
                lambda _, engine: async_sessionmaker(engine),
                r"not async_sessionmaker\. .* such as AsyncSession\(",
            ),
            (lambda *_: AsyncSession, r"not the class AsyncSession\. .* such as AsyncSession\("),
        ],
        ids=[
            "factory",
            "engine",
            "none",
            "url",
            "class",
            "async engine",
            "async factory",
            "async class",
        ],
    )
    def test_everything_else_is_refused_with_what_to_pass(
        self, store, engine, async_engine, given, message
    ):
        session = given(engine, async_engine)
        with pytest.raises(ConfigurationError, match=message) as raised:
            store.repository(session)
        assert raised.value.__cause__ is raised.value.__context__ is None

    def test_each_kind_of_repository_names_the_other(self, engine, async_engine):
        for session in (AsyncSession(async_engine), async_scoped_session(AsyncSession, object)):
            message = "TokenRepository works on a synchronous session.* to AsyncTokenRepository"
            with pytest.raises(ConfigurationError, match=message):
                TokenRepository(session)
        for session in (Session(engine), scoped_session(Session)):
            message = "AsyncTokenRepository works on an asynchronous session.* to TokenRepository"
            with pytest.raises(ConfigurationError, match=message):
                AsyncTokenRepository(session)
        with (
            engine.connect() as connection,
            pytest.raises(ConfigurationError, match="Connection to"),
        ):
            AsyncTokenRepository(connection)
        with pytest.raises(ConfigurationError, match="AsyncConnection to AsyncTokenRepository"):
            TokenRepository(async_engine.connect())


class ApplicationError(Exception):
    """Of the code inside a transaction."""


def assert_it_is_clean(error):
    """Neither an error behind it nor a local variable of our frames shows anything."""
    assert error.__cause__ is error.__context__ is None
    ours = Path(zoho_orm_store.__file__).parent
    described = traceback.TracebackException.from_exception(error, capture_locals=True)
    shown = [
        str(error),
        *(str(each.locals) for each in described.stack if str(ours) in each.filename),
    ]
    assert not [secret for secret in SECRETS if secret in "".join(shown)]


class TestATransaction:
    @on_routes(*BY_DRIVER, *ENGINES)
    def test_it_reads_its_own_writes_and_is_committed(self, store):
        with store.transaction() as tokens:
            saved = tokens.save(ASKED)
            assert tokens.get(saved.id) == saved
            assert tokens.find(TokenRecord(user_name=ASKED.user_name)) == saved
            assert tokens.list() == [*tokens.stream()] == [saved]
            tokens.save(replace(ASKED, user_name="another", refresh_token="r"))
            assert tokens.count() == 2
            assert tokens.delete(saved.id)
        [token] = store.get_tokens()
        assert known(token)["user_name"] == "another"

    @on_routes(*BY_DRIVER)
    def test_an_exception_of_the_caller_rolls_it_back_and_comes_out_as_it_is(self, store):
        before = make_token(**FULL)
        store.save_token(before)

        def work(error):
            with store.transaction() as tokens:
                tokens.save(ASKED)
                tokens.delete(before.get_id())
                raise error

        for error in (ApplicationError("mine"), KeyboardInterrupt(), KeyError(1)):
            with pytest.raises(type(error)) as raised:
                work(error)
            assert raised.value is error
            assert error.__cause__ is error.__context__ is None
        assert [known(token) for token in store.get_tokens()] == [known(before)]
        with store.transaction() as tokens:
            assert tokens.count() == 1

    @on_routes(*BY_DATABASE)
    def test_an_error_of_ours_rolls_it_back_and_shows_no_secret(self, store):
        def work():
            with store.transaction() as tokens:
                id_ = tokens.save(ASKED).id
                tokens.save(replace(ASKED, id=id_, user_name="another"))

        with pytest.raises(UserMismatchError) as raised:
            work()
        assert_it_is_clean(raised.value)
        assert store.get_tokens() == []

    @on_routes(*BY_DATABASE)
    def test_an_error_that_the_caller_handles_inside_does_not_end_it(self, store):
        with store.transaction() as tokens:
            with pytest.raises(InvalidTokenError):
                tokens.save(TokenRecord(user_name="u"))
            tokens.save(ASKED)
        assert len(store.get_tokens()) == 1

    @on_routes(*BY_DATABASE)
    def test_it_never_takes_a_lease(self, store, route_url):
        store.get_tokens()
        with statements_counted() as statements, store.transaction() as tokens:
            saved = tokens.save(replace(ASKED, expiry_time=1))
            assert tokens.get(saved.id).expiry_time == 1
        assert not [each for each in statements if "oauthtoken_refresh_lease" in each]

    @on_routes(*BY_DRIVER[:2])
    def test_of_a_closed_store(self, store):
        store.get_tokens()
        store.close()
        with pytest.raises(StoreClosedError), store.transaction():
            pass


ON_SERVERS = [each for each in (*BY_DRIVER, *ENGINES) if each.database in SERVERS]


@on_routes(*ON_SERVERS)
class TestATransactionOnAServer:
    def test_an_operation_says_that_the_connection_is_lost(self, store, route_url):
        def work():
            with store.transaction() as tokens:
                tokens.save(ASKED)
                kill_connections(route_url)
                tokens.count()

        with pytest.raises(DatabaseError) as raised:
            work()
        assert raised.value.retryable
        assert_it_is_clean(raised.value)
        assert store.get_tokens() == []

    def test_its_commit_says_that_the_connection_is_lost(self, store, route_url):
        def work():
            with store.transaction() as tokens:
                tokens.save(ASKED)
                kill_connections(route_url)

        with pytest.raises(DatabaseError) as raised:
            work()
        assert raised.value.retryable
        assert_it_is_clean(raised.value)
        assert store.get_tokens() == []

    def test_an_exception_of_the_caller_comes_out_although_the_connection_is_lost(
        self, store, route_url
    ):
        error = ApplicationError("mine")

        def work():
            with store.transaction() as tokens:
                tokens.save(ASKED)
                kill_connections(route_url)
                raise error

        with pytest.raises(ApplicationError) as raised:
            work()
        assert raised.value is error
        assert error.__cause__ is error.__context__ is None
        assert store.get_tokens() == []


# A synchronous engine of the application's waits for as long as the server is set to.
@on_routes(
    *(each for each in ON_SERVERS if (each.driver, each.kind) != ("mysql+pymysql", "engine"))
)
def test_a_transaction_gives_up_a_row_that_another_one_holds(route, route_url, caplog):
    with open_store(route, route_url, gives_up=True, timeout=1.5) as store:
        with store.transaction() as tokens:
            saved = tokens.save(ASKED)

        def work():
            with store.transaction() as tokens:
                tokens.save(replace(ASKED, user_name="another", refresh_token="r"))
                tokens.save(replace(ASKED, access_token="new"))

        engine = create_engine(route_url)
        with engine.begin() as connection:
            held = text("SELECT id FROM oauthtoken WHERE id = :id FOR UPDATE")
            connection.execute(held, {"id": saved.id})
            started = time.monotonic()
            with pytest.raises(DatabaseError) as raised:
                work()
            assert time.monotonic() - started < 8
        engine.dispose()
        assert_it_is_clean(raised.value)
        with store.transaction() as tokens:
            assert tokens.list() == [saved]
            tokens.save(replace(ASKED, access_token="newer"))
    assert [each for each in caplog.records if each.name == "asyncio"] == []


class TestATransactionThatCannotBegin:
    @pytest.mark.parametrize("driver", ["pysqlite", "aiosqlite"])
    def test_without_tables(self, tmp_path, driver):
        url = f"sqlite+{driver}:///{tmp_path / 'empty.db'}"
        with SQLAlchemyTokenStore(url, create_schema=False) as store:
            with pytest.raises(SchemaError, match="upgrade"), store.transaction() as tokens:
                tokens.get("1")
            with pytest.raises(SchemaError, match="upgrade"), store.transaction() as tokens:
                tokens.save(ASKED)

    @pytest.mark.parametrize("driver", ["psycopg", "asyncpg", "pymysql", "asyncmy"])
    def test_without_a_server(self, driver):
        family = "mysql" if "my" in driver else "postgresql"
        url = f"{family}+{driver}://u:s3cret-pw@127.0.0.1:1/x"
        with (
            SQLAlchemyTokenStore(url) as store,
            pytest.raises(DatabaseUnreachableError) as raised,
            store.transaction(),
        ):
            pass
        assert raised.value.__cause__ is raised.value.__context__ is None
        assert "s3cret-pw" not in "".join(traceback.format_exception(raised.value))

    @pytest.mark.parametrize("driver", ["pysqlite", "aiosqlite"])
    def test_while_another_process_writes(self, tmp_path, driver):
        path = tmp_path / "tokens.db"
        other = create_engine(f"sqlite:///{path}")
        provision.upgrade(other)
        with SQLAlchemyTokenStore(f"sqlite+{driver}:///{path}", timeout=1) as store:
            store.get_tokens()
            with other.connect() as connection:
                connection.execute(text("BEGIN IMMEDIATE"))
                # The driver gives up after as many seconds as we do.
                message = "database is locked|did not answer in time"
                with pytest.raises(DatabaseError, match=message) as raised, store.transaction():
                    pass
            assert raised.value.__cause__ is raised.value.__context__ is None
            with store.transaction() as tokens:
                tokens.save(ASKED)
        other.dispose()


class TestAnotherDialect:
    MESSAGE = "{!r} is not supported. Use SQLite, PostgreSQL, MariaDB or MySQL."

    @pytest.mark.parametrize("url", ["oracle://x", "mssql+pyodbc://u@h/d", "cockroachdb://u@h/d"])
    def test_of_a_url(self, url):
        with pytest.raises(ConfigurationError) as raised:
            SQLAlchemyTokenStore(url)
        name = url.partition(":")[0].partition("+")[0]
        assert str(raised.value) == f"The database {self.MESSAGE.format(name)}"

    @pytest.mark.parametrize("asynchronous", [False, True])
    def test_of_an_engine(self, asynchronous, monkeypatch):
        engine = (
            create_async_engine("sqlite+aiosqlite://")
            if asynchronous
            else create_engine("sqlite://")
        )
        monkeypatch.setattr(engine.dialect, "name", "mssql")
        with pytest.raises(ConfigurationError) as raised:
            SQLAlchemyTokenStore(engine)
        assert str(raised.value) == f"The database {self.MESSAGE.format('mssql')}"


class TestAProgramOfAUsers:
    PROGRAM = Path(__file__).parent / "user_program.py"

    @pytest.mark.timeout(240)
    def test_it_passes_mypy_in_strict_mode(self, tmp_path):
        """In a folder of its own, so that none of this project's settings apply."""
        shutil.copy(self.PROGRAM, tmp_path)
        cache = Path(zoho_orm_store.__file__).parent.parent / ".mypy_cache" / "user_program"
        command = ["mypy", "--strict", "--config-file=", f"--cache-dir={cache}", self.PROGRAM.name]
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=tmp_path, capture_output=True, text=True
        )
        assert (done.stdout, done.stderr) == ("Success: no issues found in 1 source file\n", "")

    def test_it_runs(self):
        done = subprocess.run([sys.executable, self.PROGRAM], capture_output=True, text=True)
        assert (done.stdout, done.stderr) == ("done\n", "")
