"""Tenants in one table, and a project's own columns: rules I1 to I3."""

from __future__ import annotations

import asyncio
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar

import pytest
import sdk_process
from databases import DATABASES
from sdk_tokens import make_token, save
from sqlalchemy import ForeignKey, Integer, String, Uuid, create_engine, select, text
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from zohocrmsdk.src.com.zoho.api.authenticator.oauth_token import OAuthToken
from zohocrmsdk.src.com.zoho.crm.api.exception import SDKException
from zohocrmsdk.src.com.zoho.crm.api.initializer import Initializer

from zoho_orm_store import (
    AsyncTokenRepository,
    ConfigurationError,
    FernetCipher,
    RefreshLease,
    SQLAlchemyTokenStore,
    StoredTokenMixin,
    TokenRecord,
    TokenRepository,
    generate_key,
)
from zoho_orm_store._sdk.conversion import record_from
from zoho_orm_store.testing import LoopbackZoho


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "tenants_account"

    id: Mapped[int] = mapped_column(primary_key=True)


class ByNumber(StoredTokenMixin, Base):
    __tablename__ = "tenants_by_number"

    tenant_id: Mapped[int] = mapped_column(Integer)


class ByName(StoredTokenMixin, Base):
    """The column's collation is the database's: MariaDB's ignores case, accents and blanks."""

    __tablename__ = "tenants_by_name"

    tenant: Mapped[str] = mapped_column(String(50, collation=None))


NOCASE = (
    String(50)
    .with_variant(String(50, collation="NOCASE"), "sqlite")
    .with_variant(mysql.VARCHAR(50, collation="utf8mb4_general_ci"), "mysql", "mariadb")
    .with_variant(postgresql.CHAR(50), "postgresql")
)


class ByLooseName(StoredTokenMixin, Base):
    __tablename__ = "tenants_by_loose_name"

    tenant: Mapped[str] = mapped_column(NOCASE)


class ByUuid(StoredTokenMixin, Base):
    __tablename__ = "tenants_by_uuid"

    tenant: Mapped[uuid.UUID] = mapped_column(Uuid)


class Owned(StoredTokenMixin, Base):
    __tablename__ = "tenants_owned"

    account_id: Mapped[int] = mapped_column(ForeignKey("tenants_account.id"))
    note: Mapped[str | None] = mapped_column(String(50))


@pytest.fixture(scope="module")
def engines(provisioned):
    made = {}

    def engine_of(name):
        if name not in made:
            made[name] = create_engine(provisioned(name))
            Base.metadata.drop_all(made[name])
            Base.metadata.create_all(made[name])
        return made[name]

    yield engine_of
    for engine in made.values():
        Base.metadata.drop_all(engine)
        engine.dispose()


@pytest.fixture(params=DATABASES)
def engine(request, engines):
    engine = engines(request.param)
    with engine.begin() as connection:
        for table in reversed(Base.metadata.sorted_tables):
            connection.execute(table.delete())
    return engine


on_sqlite = pytest.mark.parametrize("engine", ["sqlite"], indirect=True)


def store_of(engine, model, scope, **options):
    return SQLAlchemyTokenStore(
        engine, model=model, lease_model=RefreshLease, scope=scope, **options
    )


class TestExactScopes:
    @pytest.mark.parametrize("model", [ByName, ByLooseName])
    def test_names_that_a_collation_takes_for_equal_are_different_tenants_I1(self, engine, model):
        names = ["acme", "ACME", "Acme", "acmé", "ac me", "acme!"]
        if (engine.dialect.name, model) != ("postgresql", ByLooseName):
            names.append("acme ")
        stores = {name: store_of(engine, model, {"tenant": name}) for name in names}
        ids = {}
        for name, store in stores.items():
            ids[name] = save(store, user="u", client_id="c", access_token=f"of {name}").get_id()
        assert len({*ids.values()}) == len(names)
        for name, store in stores.items():
            assert [t.get_access_token() for t in store.get_tokens()] == [f"of {name}"]
            for other, id_ in ids.items():
                assert (store.find_token_by_id(id_) is None) == (other != name)
                with engine.connect() as connection:
                    assert store.repository(connection).count() == 1
        stores["ACME"].delete_token(ids["acme"])
        assert len(stores["acme"].get_tokens()) == 1
        stores["ACME"].delete_tokens()
        assert stores["ACME"].get_tokens() == []
        for name in set(names) - {"ACME"}:
            assert len(stores[name].get_tokens()) == 1

    @pytest.mark.parametrize(
        "value", ["7", "7abc", "7 OR 1=1", " 7", "07", "+7", 7.0, True, [7], b"7"]
    )
    @on_sqlite
    def test_a_value_of_another_type_is_refused_I1(self, engine, value):
        with pytest.raises(ConfigurationError, match="'tenant_id' needs a value of the type int"):
            store_of(engine, ByNumber, {"tenant_id": value})

    @on_sqlite
    def test_a_number_for_a_name_is_refused_I1(self, engine):
        with pytest.raises(ConfigurationError, match="'tenant' needs a value of the type str"):
            store_of(engine, ByName, {"tenant": 7})

    def test_zero_and_uuids_are_tenants_like_others_I1(self, engine):
        zero, one = (store_of(engine, ByNumber, {"tenant_id": n}) for n in (0, 1))
        save(zero, user="u", access_token="a")
        assert (len(zero.get_tokens()), len(one.get_tokens())) == (1, 0)
        ids = [uuid.UUID(int=n) for n in (1, 2)]
        first, second = (store_of(engine, ByUuid, {"tenant": each}) for each in ids)
        saved = save(first, user="u", access_token="a")
        assert second.find_token_by_id(saved.get_id()) is None
        assert first.find_token_by_id(saved.get_id()) is not None

    @on_sqlite
    def test_a_misspelt_column_is_named(self, engine):
        with pytest.raises(ConfigurationError, match="Did you mean 'tenant_id'"):
            store_of(engine, ByNumber, {"tennant_id": 7})


tenant: ContextVar[int] = ContextVar("tenant")


def present_tenant():
    return {"tenant_id": tenant.get()}


class TestScopeThatIsAsked:
    def test_each_call_is_for_the_callers_tenant_I2(self, engine):
        with store_of(engine, ByNumber, present_tenant) as store:

            def work(number):
                tenant.set(number)
                for n in range(5):
                    save(store, user="u", client_id="c", access_token=f"{number}.{n}")
                    [found] = store.get_tokens()
                    assert found.get_access_token() == f"{number}.{n}"
                    asked = store.find_token(make_token(user="u"))
                    assert asked.get_access_token() == f"{number}.{n}"
                return found.get_id()

            with ThreadPoolExecutor(8) as pool:
                ids = [*pool.map(work, range(8))]
            assert len({*ids}) == 8
            tenant.set(3)
            assert store.find_token_by_id(ids[3]) is not None
            assert store.find_token_by_id(ids[4]) is None
            store.delete_tokens()
            tenant.set(4)
            assert len(store.get_tokens()) == 1
            with engine.connect() as connection:
                assert store.repository(connection).count() == 1
            with store.transaction() as tokens:
                assert tokens.count() == 1
            assert store.expire(ids[4])
            assert not store.expire(ids[5])

    async def test_tasks_of_one_loop_have_tenants_of_their_own_I2(self, engine):
        with store_of(engine, ByNumber, present_tenant) as store:

            async def work(number):
                tenant.set(number)
                for _ in range(3):
                    await asyncio.to_thread(save, store, user="u", access_token=f"{number}")
                    await asyncio.sleep(0)
                    [found] = await asyncio.to_thread(store.get_tokens)
                    assert found.get_access_token() == str(number)

            await asyncio.gather(*map(work, range(6)))

    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            (None, "returned None"),
            ({}, "returned {}"),
            ({"tenant_id": None}, "needs a value"),
            ({"tenant_id": "7"}, "of the type int"),
            ({"tenant": 7}, "Did you mean 'tenant_id'"),
            (7, "is a mapping"),
            (LookupError("nobody"), "raised LookupError"),
        ],
    )
    @on_sqlite
    def test_an_unusable_answer_is_an_error_and_never_all_tenants_I2(self, engine, answer, message):
        def scope():
            if isinstance(answer, Exception):
                raise answer
            return answer

        save(store_of(engine, ByNumber, {"tenant_id": 7}), user="u", access_token="a")
        with store_of(engine, ByNumber, scope) as store:
            for call in (
                store.get_tokens,
                store.delete_tokens,
                lambda: store.delete_token("1"),
                lambda: store.find_token_by_id("1"),
                lambda: store.find_token(make_token(user="u")),
                lambda: save(store, user="u", access_token="b"),
            ):
                with pytest.raises(SDKException, match=message):
                    call()
            with pytest.raises(ConfigurationError, match=message), store.transaction():
                pass
        with engine.connect() as connection:
            assert connection.execute(select(ByNumber.access_token)).scalars().all() == ["a"]

    @on_sqlite
    def test_with_a_cipher_each_tenants_secrets_stay_its_own_J1(self, engine):
        cipher = FernetCipher(generate_key())
        with store_of(engine, ByNumber, present_tenant, cipher=cipher) as store:
            ids = {}
            for number in (1, 2):
                tenant.set(number)
                ids[number] = save(store, user="u", access_token=f"a{number}").get_id()
            for number in (1, 2):
                tenant.set(number)
                found = store.find_token_by_id(ids[number])
                assert found.get_access_token() == f"a{number}"

    def test_one_refresh_for_each_tenant_through_the_sdk_I2(self, engine, tmp_path, monkeypatch):
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(Initializer, "initializer", None)
        with LoopbackZoho() as zoho, store_of(engine, ByNumber, present_tenant) as store:
            client = {"client_id": zoho.client_id, "client_secret": zoho.client_secret}
            refresh_token = zoho.issue_refresh_token("ada@example.com")
            ids = {}
            for number in (1, 2):
                tenant.set(number)
                token = OAuthToken(**client, refresh_token=refresh_token, find_user=False)
                sdk_process.start(zoho, token, store, tmp_path)
                ids[number] = token.get_id()
                store.expire(token.get_id())
            assert ids[1] != ids[2]
            zoho.reset_counts()
            zoho.delay = 0.1
            barrier = threading.Barrier(12)

            def call(number):
                tenant.set(number % 2 + 1)
                asked = OAuthToken(id=ids[number % 2 + 1])
                Initializer.switch_user(environment=zoho.environment(), token=asked)
                barrier.wait()
                return number % 2 + 1, sdk_process.whoami()

            with ThreadPoolExecutor(12) as pool:
                answers = [*pool.map(call, range(12))]
            assert {user for _, user in answers} == {"ada@example.com"}
            assert zoho.counts.refreshes == 2
            for number in (1, 2):
                tenant.set(number)
                (stored,) = map(record_from, store.get_tokens())
                assert zoho.is_live(stored.access_token)
        Initializer.LOCAL.init = None


class TestAdministration:
    def test_without_a_scope_all_tenants_are_listed_and_none_is_changed_I3(self, engine):
        for number in (7, 8, 9):
            store = store_of(engine, ByNumber, {"tenant_id": number})
            save(store, id=f"{number}", user="u", access_token="a", expires_in="4102444800000")
        with engine.begin() as connection:
            everyone = TokenRepository(connection, model=ByNumber)
            assert [record.id for record in everyone.list()] == ["7", "8", "9"]
            assert everyone.count() == 3
            assert everyone.get("8").access_token == "a"
            assert everyone.expire("9")
            with pytest.raises(ConfigurationError, match="value for the column 'tenant_id'"):
                everyone.save(TokenRecord(user_name="new", access_token="a"))
            with pytest.raises(ConfigurationError, match="'8' is a tenant's"):
                everyone.save(TokenRecord(id="8", access_token="b"))
            assert everyone.delete("7")
            assert everyone.count() == 2
        assert store.find_token_by_id("9").get_expires_in() < "4102444800000"
        eight = store_of(engine, ByNumber, {"tenant_id": 8})
        assert eight.find_token(make_token(user="u")).get_access_token() == "a"
        with engine.begin() as connection:
            assert TokenRepository(connection, model=ByNumber).delete_all() == 2


class TestOwnColumns:
    def test_values_fill_a_foreign_key_in_one_step(self, engine):
        with Session(engine) as session, session.begin():
            account = Account()
            session.add(account)
            session.flush()
            repository = TokenRepository(session, model=Owned)
            saved = repository.save(
                TokenRecord(user_name="u", refresh_token="r"), {"account_id": account.id}
            )
            assert session.get(Owned, saved.id).account_id == account.id
            repository.save(TokenRecord(id=saved.id, access_token="a"), {"note": "moved"})
            stored = session.get(Owned, saved.id)
            assert (stored.account_id, stored.note) == (account.id, "moved")
            repository.save(TokenRecord(id=saved.id, access_token="b"))
            assert (stored.access_token, stored.note) == ("b", "moved")
        with SQLAlchemyTokenStore(engine, model=Owned, lease_model=RefreshLease) as store:
            save(store, id=saved.id, access_token="c")
            with pytest.raises(SDKException, match="needs a value for the column 'account_id'"):
                save(store, user="another", access_token="d")

    @pytest.mark.parametrize("name", ["nothing", "access_token", "identity"])
    @on_sqlite
    def test_values_name_only_columns_that_the_model_adds(self, engine, name):
        with Session(engine) as session:
            repository = TokenRepository(session, model=Owned)
            with pytest.raises(ConfigurationError, match=f"values names '{name}'"):
                repository.save(TokenRecord(refresh_token="r"), {name: 1})

    @on_sqlite
    def test_values_cannot_change_the_tenant(self, engine):
        with Session(engine) as session:
            repository = TokenRepository(session, model=ByNumber, scope={"tenant_id": 7})
            with pytest.raises(ConfigurationError, match="The scope gives the column 'tenant_id'"):
                repository.save(TokenRecord(refresh_token="r"), {"tenant_id": 8})

    def test_a_loaded_object_stays_usable_in_asynchronous_code(self, engine):
        drivers = {"sqlite": "aiosqlite", "postgresql": "asyncpg", "mysql": "asyncmy"}
        name = engine.dialect.name
        url = engine.url.set(drivername=f"{name}+{drivers[name]}")

        async def work():
            asynchronous = create_async_engine(url)
            async with AsyncSession(asynchronous) as session:
                repository = AsyncTokenRepository(session, model=ByNumber, scope={"tenant_id": 7})
                first = await repository.save(TokenRecord(user_name="u", access_token="a"))
                second = await repository.save(TokenRecord(user_name="v", access_token="a"))
                loaded = await session.get(ByNumber, first.id)
                other = await session.get(ByNumber, second.id)
                await repository.save(TokenRecord(id=first.id, access_token="b"))
                assert (loaded.access_token, loaded.user_name) == ("b", "u")
                assert await repository.expire(first.id)
                assert loaded.expiry_time > 0
                await repository.delete(second.id)
                assert other.user_name == "v"
                assert loaded.user_name == "u"
                assert other not in session
                await session.commit()
            await asynchronous.dispose()

        asyncio.run(work())


class TestLeases:
    @on_sqlite
    def test_an_own_model_needs_an_own_lease_model(self, engine):
        with pytest.raises(ConfigurationError, match="ByNumber needs a lease model"):
            SQLAlchemyTokenStore(engine, model=ByNumber, scope={"tenant_id": 7})
        SQLAlchemyTokenStore(engine, model=ByNumber, scope={"tenant_id": 7}, refresh=None).close()


def test_the_scope_is_part_of_each_statement(engine):
    """The database sees the tenant in everything that a scoped store does, bulk deletes too."""
    save(store_of(engine, ByName, {"tenant": "other"}), user="u", access_token="a")
    with store_of(engine, ByName, {"tenant": "x' OR '1'='1"}) as store:
        assert store.get_tokens() == []
        store.delete_tokens()
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM tenants_by_name")).scalar() == 1
