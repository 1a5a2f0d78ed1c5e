"""The repositories inside the application's own transaction."""

from __future__ import annotations

import asyncio
import threading
import traceback
from dataclasses import replace

import pytest
from conftest import empty, statements_counted
from databases import DATABASES
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Session

import zoho_orm_store.repository as repository_module
from zoho_orm_store import (
    AsyncTokenRepository,
    ConfigurationError,
    DatabaseError,
    DatabaseUnreachableError,
    InvalidTokenError,
    SchemaError,
    StoredToken,
    StoredTokenMixin,
    TokenRecord,
    TokenRepository,
    UserMismatchError,
    metadata,
)
from zoho_orm_store._tokens import TokenOperations

DRIVERS = {
    "sqlite": ("sqlite+pysqlite", "sqlite+aiosqlite"),
    "postgresql": ("postgresql+psycopg", "postgresql+psycopg_async", "postgresql+asyncpg"),
    "mariadb": ("mysql+pymysql", "mysql+asyncmy", "mysql+aiomysql"),
}
SYNCHRONOUS = ("sqlite+pysqlite", "postgresql+psycopg", "mysql+pymysql")

ASKED = TokenRecord(
    user_name="o'brien@example.com:1",
    client_id="1000.C",
    client_secret="S3CR3T-0123456789",
    refresh_token="1000.refresh-0123456789",
    access_token="1000.access-0123456789",
    expiry_time=1_900_000_000_000,
)
SECRETS = (ASKED.client_secret, ASKED.refresh_token, ASKED.access_token)


class Transaction:
    """An application's session or connection, synchronous or not, and our repository in it."""

    def __init__(self, url, driver, kind, **options):
        self.kind = kind
        self.is_async = driver not in SYNCHRONOUS
        self.loop = asyncio.new_event_loop() if self.is_async else None
        make_engine = create_async_engine if self.is_async else create_engine
        self.engine = make_engine(url.set(drivername=driver))
        if kind == "session":
            self.session = (AsyncSession if self.is_async else Session)(self.engine)
        else:
            self.session = self.do(self.engine.connect())
        make_repository = AsyncTokenRepository if self.is_async else TokenRepository
        self.repository = make_repository(self.session, **options)

    def do(self, result):
        return self.loop.run_until_complete(result) if self.is_async else result

    def __getattr__(self, name):
        method = getattr(self.repository, name)
        if name == "stream":
            return lambda **filters: self.streamed(method(**filters))
        return lambda *args, **kwargs: self.do(method(*args, **kwargs))

    def streamed(self, records):
        async def collected():
            return [record async for record in records]

        return self.do(collected()) if self.is_async else list(records)

    def execute(self, sql, **parameters):
        return self.do(self.session.execute(text(sql), parameters))

    def commit(self):
        self.do(self.session.commit())

    def rollback(self):
        self.do(self.session.rollback())

    def close(self):
        self.do(self.session.close())
        self.do(self.engine.dispose())
        if self.loop is not None:
            self.loop.close()


def ways(*drivers_and_kinds):
    """Run a test with these pairs of a driver and of what the repository is given."""
    databases = {driver: name for name, drivers in DRIVERS.items() for driver in drivers}
    return pytest.mark.parametrize(
        "way",
        [
            pytest.param((databases[driver], driver, kind), id=f"{driver}-{kind}")
            for driver, kind in drivers_and_kinds
        ],
    )


# Sessions and connections alternate among the drivers; both repositories get both.
on_each_driver = ways(
    ("sqlite+pysqlite", "session"),
    ("sqlite+pysqlite", "connection"),
    ("sqlite+aiosqlite", "session"),
    ("sqlite+aiosqlite", "connection"),
    ("postgresql+psycopg", "session"),
    ("postgresql+psycopg_async", "connection"),
    ("postgresql+asyncpg", "session"),
    ("mysql+pymysql", "connection"),
    ("mysql+asyncmy", "session"),
    ("mysql+aiomysql", "connection"),
)
on_each_database = ways(
    *((driver, "session") for driver in SYNCHRONOUS), ("postgresql+asyncpg", "session")
)
in_both_repositories = ways(("sqlite+pysqlite", "session"), ("sqlite+aiosqlite", "connection"))


@pytest.fixture
def url(way, provisioned):
    url = provisioned(way[0])
    empty(url)
    return url


@pytest.fixture
def begin(url, way):
    """Begin transactions of the application's, which are closed in the end."""
    begun = []

    def begin(**options):
        begun.append(Transaction(url, *way[1:], **options))
        return begun[-1]

    yield begin
    for transaction in begun:
        transaction.close()


@pytest.fixture
def stored(url):
    """The ids that another connection sees."""
    engine = create_engine(url)

    def ids():
        with engine.connect() as connection:
            return sorted(connection.scalars(text("SELECT id FROM oauthtoken")))

    yield ids
    engine.dispose()


@on_each_driver
class TestTheApplicationOwnsTheTransaction:
    def test_nothing_is_stored_before_its_commit(self, begin, way, stored):
        transaction = begin()
        saved = transaction.save(ASKED)
        if way[0] != "sqlite":  # where another connection's read would wait for this one
            assert stored() == []
        transaction.commit()
        assert stored() == [saved.id]

    def test_its_rollback_undoes_a_save_and_a_deletion(self, begin, stored):
        transaction = begin()
        saved = transaction.save(ASKED)
        transaction.commit()
        assert transaction.delete(saved.id) is True
        transaction.save(replace(ASKED, user_name="another"))
        transaction.rollback()
        assert stored() == [saved.id]

    def test_its_own_rows_and_a_token_go_together(self, begin, stored):
        transaction = begin()
        transaction.execute(
            "INSERT INTO oauthtoken (id, identity, created_at, updated_at) "
            "VALUES ('application', 'row', '2026-01-01', '2026-01-01')"
        )
        transaction.save(ASKED)
        transaction.rollback()
        assert stored() == []


class TestOperations:
    @on_each_driver
    def test_a_record_comes_back_as_it_was_saved_A2(self, begin):
        transaction = begin()
        saved = transaction.save(ASKED)
        assert replace(saved, id=None, created_at=None, updated_at=None) == ASKED
        assert transaction.get(saved.id) == saved
        assert transaction.find(TokenRecord(user_name=ASKED.user_name)) == saved

    @on_each_driver
    def test_what_is_not_there_is_none_D2_F1(self, begin):
        transaction = begin()
        transaction.save(ASKED)
        assert transaction.get("1 or 1=1") is None
        assert transaction.find(TokenRecord(user_name="x' or '1'='1")) is None
        assert transaction.delete("1 or 1=1") is False
        assert transaction.delete("x" * 300) is False
        assert transaction.count() == 1

    @on_each_driver
    def test_every_token_is_deleted_and_counted_F2(self, begin):
        transaction = begin()
        for number in range(3):
            transaction.save(replace(ASKED, user_name=f"u{number}", refresh_token=f"r{number}"))
        assert transaction.delete_all() == 3
        assert transaction.list() == []

    @on_each_database
    def test_listings_are_filtered(self, begin):
        transaction = begin()
        tokens = {
            name: transaction.save(
                TokenRecord(user_name=user, client_id=client, access_token=name, expiry_time=expiry)
            )
            for name, user, client, expiry in (
                ("ended", "José", "c", 1),
                ("live", "jose", "c", 2**60),
                ("unknown", "jose", "C", None),
            )
        }
        for filters, names in (
            ({}, ["ended", "live", "unknown"]),
            ({"user_name": "jose"}, ["live", "unknown"]),
            ({"client_id": "c"}, ["ended", "live"]),
            ({"user_name": "jose", "client_id": "c"}, ["live"]),
            ({"expired": True}, ["ended"]),
            ({"expired": False}, ["live", "unknown"]),
            ({"user_name": ""}, []),
        ):
            expected = [tokens[name] for name in names]
            assert transaction.list(**filters) == expected
            assert transaction.count(**filters) == len(expected)
            by_id = sorted(expected, key=lambda record: record.id)
            assert transaction.stream(**filters) == by_id

    @on_each_driver
    def test_a_stream_of_more_than_a_page(self, begin, monkeypatch):
        monkeypatch.setattr(repository_module, "_PAGE", 3)
        transaction = begin()
        for number in range(10):
            transaction.save(TokenRecord(user_name=f"u{number}", access_token="a"))
        users = {record.user_name for record in transaction.stream()}
        assert users == {f"u{number}" for number in range(10)}
        assert len(transaction.stream()) == 10


BAD_INPUT = [
    ("get", (7,), {}, "id must be a string, not int"),
    ("get", (None,), {}, "id must be a string"),
    ("delete", (b"1",), {}, "id must be a string, not bytes"),
    ("find", ("x",), {}, "must be a TokenRecord, not str"),
    ("save", (None,), {}, "must be a TokenRecord"),
    ("find", (TokenRecord(user_name=7),), {}, "user_name must be a string"),
    ("save", (TokenRecord(user_name=7, access_token="a"),), {}, "user_name must be"),
    ("save", (TokenRecord(user_name="u"),), {}, "nothing to store"),
    ("save", (TokenRecord(access_token="a", expiry_time=2**63),), {}, "expires_in"),
    ("list", (), {"user_name": 7}, "user_name must be a string"),
    ("count", (), {"client_id": 7}, "client_id must be a string"),
    ("stream", (), {"user_name": 7}, "user_name must be a string"),
]


class Base(DeclarativeBase):
    pass


class NeverMigrated(StoredTokenMixin, Base):
    __tablename__ = "never_migrated"


class TestRefusals:
    @in_both_repositories
    def test_bad_input_A3_C4_E3(self, begin, stored):
        transaction = begin()
        for method, arguments, filters, message in BAD_INPUT:
            with pytest.raises(InvalidTokenError, match=message):
                getattr(transaction, method)(*arguments, **filters)
        transaction.commit()
        assert stored() == []

    @in_both_repositories
    def test_another_users_id_E5(self, begin):
        transaction = begin()
        saved = transaction.save(ASKED)
        with pytest.raises(UserMismatchError, match="belongs to user"):
            transaction.save(replace(ASKED, id=saved.id, user_name="another"))
        assert transaction.get(saved.id) == saved

    @on_each_database
    def test_a_missing_table_G1_G3(self, begin):
        transaction = begin(model=NeverMigrated)
        message = (
            "A table or column is missing in .*"
            "If your project's own migrations make the tables, run those instead.*never_migrated"
        )
        with pytest.raises(SchemaError, match=message) as raised:
            transaction.save(ASKED)
        transaction.rollback()
        shown = "".join(traceback.format_exception(raised.value))
        assert not [secret for secret in SECRETS if secret in shown]


@pytest.mark.parametrize(
    "driver",
    [driver for drivers in DRIVERS.values() for driver in drivers if "sqlite" not in driver],
)
def test_a_server_that_is_not_there_G1_G2(driver):
    url = make_url("postgresql://me:s3cret-pw@127.0.0.1:1/name")
    transaction = Transaction(url, driver, "session")
    with pytest.raises(DatabaseUnreachableError, match=r"me:\*\*\*@127.0.0.1:1/name") as raised:
        transaction.save(ASKED)
    transaction.close()
    shown = "".join(traceback.format_exception(raised.value))
    assert "s3cret-pw" not in shown
    assert not [secret for secret in SECRETS if secret in shown]


class TestTheRevision:
    @on_each_database
    def test_tables_of_another_revision_are_refused_and_both_are_named_G2(self, begin):
        transaction = begin()
        transaction.execute("UPDATE zoho_orm_store_version SET version_num = 'zoho_orm_store_0001'")
        with pytest.raises(SchemaError, match=r"at revision zoho_orm_store_0001, but .*_0003 is"):
            transaction.list()
        transaction.execute("UPDATE zoho_orm_store_version SET version_num = 'zoho_orm_store_9999'")
        with pytest.raises(SchemaError, match=r"9999, which a newer release .* pip install"):
            transaction.save(ASKED)
        transaction.rollback()
        assert transaction.list() == []

    @in_both_repositories
    def test_it_is_read_once(self, begin):
        transaction = begin()
        with statements_counted() as first:
            transaction.get("1")
        assert sum("FROM zoho_orm_store_version" in statement for statement in first) == 1
        with statements_counted() as later:
            transaction.get("1")
            transaction.get("1")
        assert ["FROM oauthtoken" in statement for statement in later] == [True, True]

    def test_without_one_the_applications_transaction_goes_on(self, empty_database):
        engine = create_engine(empty_database)
        metadata.create_all(engine)
        with engine.begin() as connection:
            TokenRepository(connection).save(ASKED)
            TokenRepository(connection).save(replace(ASKED, user_name="another"))
        with engine.connect() as connection:
            assert TokenRepository(connection).count() == 2
        engine.dispose()


class TestInASession:
    @pytest.fixture
    def session(self, database):
        engine = create_engine(database)
        with Session(engine) as session:
            yield session
        engine.dispose()

    def test_what_the_application_holds_back_is_seen(self, session):
        saved = TokenRepository(session).save(ASKED)
        session.get(StoredToken, saved.id).api_domain = "https://changed"
        assert TokenRepository(session).get(saved.id).api_domain == "https://changed"

    def test_unless_it_asked_for_no_autoflush(self, session):
        saved = TokenRepository(session).save(ASKED)
        with session.no_autoflush:
            session.get(StoredToken, saved.id).api_domain = "https://changed"
            assert TokenRepository(session).get(saved.id).api_domain is None

    def test_loaded_rows_show_what_a_save_has_changed(self, session):
        saved = TokenRepository(session).save(ASKED)
        loaded = session.get(StoredToken, saved.id)
        TokenRepository(session).save(replace(ASKED, access_token="new"))
        assert loaded.access_token == "new"

    def test_deleted_rows_are_gone_from_the_session(self, session):
        repository = TokenRepository(session)
        saved = repository.save(ASKED)
        session.get(StoredToken, saved.id)
        repository.delete(saved.id)
        assert session.get(StoredToken, saved.id) is None

    def test_a_session_without_an_engine_G1(self):
        with pytest.raises(DatabaseError, match="UnboundExecutionError"):
            TokenRepository(Session()).get("1")


class TestTwoTransactions:
    @pytest.mark.parametrize("name", [name for name in DATABASES if name != "sqlite"])
    def test_the_second_save_of_an_identity_waits_and_updates_E7(self, name, provisioned):
        url = provisioned(name)
        empty(url)
        engine = create_engine(url)
        with engine.connect() as first, engine.connect() as second:
            TokenRepository(first).save(ASKED)
            results = []

            def save_again():
                results.append(TokenRepository(second).save(replace(ASKED, access_token="second")))
                second.commit()

            waiting = threading.Thread(target=save_again)
            waiting.start()
            waiting.join(0.3)
            assert waiting.is_alive(), "the second save did not wait for the first"
            first.commit()
            waiting.join(10)
            (record,) = TokenRepository(first).list()
            assert record.access_token == "second"
            assert results == [record]
        engine.dispose()

    @pytest.mark.parametrize(
        ("name", "level"),
        [
            ("postgresql", "REPEATABLE READ"),
            ("postgresql", "SERIALIZABLE"),
            ("mariadb", "REPEATABLE READ"),  # SERIALIZABLE makes the other writer wait instead
        ],
    )
    def test_a_save_against_an_older_snapshot_succeeds_when_run_again_E7(
        self, name, level, provisioned
    ):
        url = provisioned(name)
        empty(url)
        engine, other = create_engine(url, isolation_level=level), create_engine(url)
        with engine.connect() as connection:
            repository = TokenRepository(connection)
            for attempt in range(3):
                try:
                    repository.get("a read begins the snapshot")
                    if attempt == 0:
                        with other.begin() as meanwhile:
                            TokenRepository(meanwhile).save(ASKED)
                    repository.save(replace(ASKED, access_token="second"))
                    connection.commit()
                    break
                except DatabaseError as error:
                    if not error.retryable:
                        raise
                    connection.rollback()
        with other.connect() as connection:
            (record,) = TokenRepository(connection).list()
            assert record.access_token == "second"
        engine.dispose()
        other.dispose()


class TestAnUpsert:
    def test_a_new_token_is_inserted_and_then_updated_E4(self, database):
        engine = create_engine(database)
        with engine.begin() as connection:
            saved = TokenRepository(connection).save(ASKED)
            again = TokenRepository(connection).save(replace(ASKED, access_token="new"))
            assert (again.id, again.access_token) == (saved.id, "new")
            assert TokenRepository(connection).count() == 1
        engine.dispose()

    def test_a_row_that_appears_meanwhile_is_updated_E7(self, database, monkeypatch):
        engine = create_engine(database)
        with engine.begin() as connection:
            repository = TokenRepository(connection)
            saved = repository.save(ASKED)
            monkeypatch.setattr(TokenOperations, "_lock_match", lambda *_: None)
            again = repository.save(replace(ASKED, access_token="new"))
            assert (again.id, again.access_token) == (saved.id, "new")
            assert repository.count() == 1
        engine.dispose()

    @pytest.mark.parametrize("make", [lambda connection: connection, Session])
    def test_a_dialect_without_one_that_we_know_is_refused(self, make, monkeypatch):
        engine = create_engine("sqlite://")
        monkeypatch.setattr(engine.dialect, "name", "oracle")
        message = "'oracle' is not supported. Use SQLite, PostgreSQL, MariaDB or MySQL"
        with engine.connect() as connection:
            repository = TokenRepository(make(connection))
            with statements_counted() as statements:
                for call in (lambda: repository.get("1"), lambda: repository.save(ASKED)):
                    with pytest.raises(ConfigurationError, match=message):
                        call()
            assert statements == []
        engine.dispose()
