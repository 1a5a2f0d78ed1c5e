"""A project's own model, and tenants kept apart within its table."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
from databases import DATABASES
from hypothesis import given, settings
from hypothesis import strategies as st
from sdk_tokens import FULL, known, make_token
from sqlalchemy import ForeignKey, MetaData, String, UniqueConstraint, create_engine, inspect, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from zoho_orm_store import (
    AsyncTokenRepository,
    ConfigurationError,
    FernetCipher,
    RefreshLease,
    SQLAlchemyTokenStore,
    StoredToken,
    StoredTokenMixin,
    TokenRecord,
    TokenRepository,
    rotate_keys,
)
from zoho_orm_store._sdk.conversion import SDKException
from zoho_orm_store.encryption import generate_key


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention={"ix": "idx_%(table_name)s_%(column_0_name)s"})


class User(Base):
    __tablename__ = "app_user"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50))


class ZohoToken(StoredTokenMixin, Base):
    __tablename__ = "zoho_token"
    __table_args__ = (UniqueConstraint("tenant_id", "id", name="uq_zoho_token_tenant"),)

    tenant_id: Mapped[int | None] = mapped_column()
    user_id: Mapped[int | None] = mapped_column(ForeignKey("app_user.id"))
    note: Mapped[str] = mapped_column(String(20), server_default="none")


@pytest.fixture(scope="module")
def engines(provisioned):
    """An engine on a database with the project's own tables, of each kind."""
    made = {}

    def engine_of(name):
        if name not in made:
            made[name] = create_engine(provisioned(name))
            Base.metadata.create_all(made[name])
        return made[name]

    yield engine_of
    for engine in made.values():
        Base.metadata.drop_all(engine)
        engine.dispose()


on_sqlite = pytest.mark.parametrize("engine", ["sqlite"], indirect=True)


@pytest.fixture(params=DATABASES)
def engine(request, engines):
    engine = engines(request.param)
    with engine.begin() as connection:
        connection.execute(StoredToken.__table__.delete())
        connection.execute(ZohoToken.__table__.delete())
        connection.execute(User.__table__.delete())
    return engine


def tenant(engine, number):
    return SQLAlchemyTokenStore(
        engine, model=ZohoToken, lease_model=RefreshLease, scope={"tenant_id": number}
    )


def stored(store):
    return sorted((known(token) for token in store.get_tokens()), key=str)


class TestAModelOfTheProjects:
    def test_its_tokens_are_kept_in_its_table(self, engine):
        with SQLAlchemyTokenStore(engine, model=ZohoToken, lease_model=RefreshLease) as store:
            store.save_token(make_token(**FULL))
            assert stored(store) == [known(make_token(**FULL))]
        with engine.connect() as connection:
            assert TokenRepository(connection).count() == 0
            assert connection.scalar(text("SELECT note FROM zoho_token")) == "none"

    def test_its_indexes_are_named_by_its_convention_and_survive_its_table_arguments(self, engine):
        indexes = {index["name"]: index for index in inspect(engine).get_indexes("zoho_token")}
        assert indexes["idx_zoho_token_identity"]["unique"]
        assert "idx_zoho_token_refresh_digest" in indexes

    def test_a_user_and_a_token_are_saved_and_rolled_back_together(self, engine):
        with Session(engine) as session:
            user = User(name="u")
            session.add(user)
            session.flush()
            record = TokenRecord(user_name="u", refresh_token="r")
            saved = TokenRepository(session, model=ZohoToken).save(record)
            session.get(ZohoToken, saved.id).user_id = user.id
            session.flush()
            session.rollback()
        with Session(engine) as session:
            assert session.query(User).count() == 0
            assert session.query(ZohoToken).count() == 0

    @pytest.mark.parametrize("name", ["postgresql"])
    def test_a_schema_of_its_own(self, name, engines):
        class SchemaBase(DeclarativeBase):
            metadata = MetaData(schema="integrations")

        class Elsewhere(StoredTokenMixin, SchemaBase):
            __tablename__ = "zoho_token"

        engine = engines(name)
        with engine.begin() as connection:
            connection.execute(text("CREATE SCHEMA integrations"))
        SchemaBase.metadata.create_all(engine)
        with SQLAlchemyTokenStore(engine, model=Elsewhere, lease_model=RefreshLease) as store:
            store.save_token(make_token(**FULL))
            store.save_token(make_token(**FULL))
            assert stored(store) == [known(make_token(**FULL))]
        with engine.begin() as connection:
            connection.execute(text("DROP SCHEMA integrations CASCADE"))


class TestRefusedModels:
    def refused(self, model, message, **options):
        with pytest.raises(ConfigurationError, match=message):
            SQLAlchemyTokenStore(
                "sqlite://", model=model, **{"lease_model": RefreshLease, **options}
            )
        with pytest.raises(ConfigurationError, match=message):
            TokenRepository(None, model=model, **options)
        with pytest.raises(ConfigurationError, match=message):
            AsyncTokenRepository(None, model=model, **options)

    def test_no_model_at_all(self):
        self.refused(object, "must be a mapped class with a table")
        self.refused(StoredTokenMixin, "must be a mapped class with a table")

    def test_without_the_mixin(self):
        self.refused(User, "User lacks the columns user_name, client_id, .*StoredTokenMixin")

    def test_without_the_unique_identity(self):
        class OtherBase(DeclarativeBase):
            pass

        class Careless(StoredTokenMixin, OtherBase):
            __tablename__ = "careless"
            identity: Mapped[str] = mapped_column(String(64))

        self.refused(Careless, "Careless lacks the unique index on 'identity'")

    def test_with_another_primary_key(self):
        class OtherBase(DeclarativeBase):
            pass

        class TwoKeys(StoredTokenMixin, OtherBase):
            __tablename__ = "two_keys"
            tenant_id: Mapped[int] = mapped_column(primary_key=True)

        self.refused(TwoKeys, "must have 'id' alone as its primary key")

    def test_with_a_column_that_nothing_fills(self):
        class OtherBase(DeclarativeBase):
            pass

        class Demanding(StoredTokenMixin, OtherBase):
            __tablename__ = "demanding"
            tenant_id: Mapped[int]

        engine = create_engine("sqlite://")
        Demanding.metadata.create_all(engine)
        with Session(engine) as session:
            repository = TokenRepository(session, model=Demanding)
            with pytest.raises(ConfigurationError, match="a value for the column 'tenant_id'"):
                repository.save(TokenRecord(refresh_token="r"))
            scoped = TokenRepository(session, model=Demanding, scope={"tenant_id": 1})
            scoped.save(TokenRecord(refresh_token="r"))
        engine.dispose()

    @pytest.mark.parametrize(
        ("scope", "message"),
        [
            ({"organization_id": 1}, "has no column 'organization_id'"),
            ({"tenant_id": None}, "'tenant_id' needs a value"),
            ({"tenant_id": ""}, "'tenant_id' needs a value"),
            ({"client_id": "c"}, "'client_id' is the token's own"),
            ({}, "needs a column and its value"),
        ],
    )
    def test_a_scope_that_does_not_fit(self, scope, message):
        self.refused(ZohoToken, message, scope=scope)
        store = SQLAlchemyTokenStore("sqlite://", model=ZohoToken, lease_model=RefreshLease)
        with pytest.raises(ConfigurationError, match=message):
            store.scoped(**scope)

    def test_a_lease_model_without_the_mixin(self):
        with pytest.raises(ConfigurationError, match=r"User lacks the columns key, .*LeaseMixin"):
            SQLAlchemyTokenStore("sqlite://", lease_model=User)

    def test_the_packages_own_table_has_no_column_to_scope_by(self):
        self.refused(StoredToken, "Add it to your model", scope={"tenant_id": 1})


class TestTenants:
    def test_the_same_zoho_user_exists_once_per_tenant(self, engine):
        seven = tenant(engine, 7)
        eight = seven.scoped(tenant_id=8)
        for store, access_token in ((seven, "a7"), (eight, "a8"), (seven, "b7")):
            store.save_token(make_token(**FULL | {"id": None, "access_token": access_token}))
        assert [token.get_access_token() for token in seven.get_tokens()] == ["b7"]
        assert [token.get_access_token() for token in eight.get_tokens()] == ["a8"]

    def test_no_operation_reaches_another_tenants_row(self, engine):
        seven = tenant(engine, 7)
        eight = seven.scoped(tenant_id=8)
        token = make_token(**FULL)
        seven.save_token(token)
        assert eight.find_token_by_id(token.get_id()) is None
        for field in ("user", "refresh_token", "grant_token", "access_token"):
            if field in FULL:
                assert eight.find_token(make_token(**{field: FULL[field]})) is None
        assert eight.find_token(make_token(id=token.get_id())) is None
        eight.delete_token(token.get_id())
        eight.delete_tokens()
        assert stored(seven) == [known(token)]
        with engine.connect() as connection:
            repository = TokenRepository(connection, model=ZohoToken, scope={"tenant_id": 8})
            assert (repository.count(), repository.list(), [*repository.stream()]) == (0, [], [])

    @on_sqlite
    def test_a_tenants_secrets_are_bound_to_it_and_rotated_by_a_call_of_its_own(self, engine):
        key = generate_key()
        options = {"model": ZohoToken, "scope": {"tenant_id": 7}}
        seven = SQLAlchemyTokenStore(
            engine, cipher=FernetCipher(key), lease_model=RefreshLease, **options
        )
        seven.save_token(make_token(id="1", **FULL))
        seven.scoped(tenant_id=8).save_token(make_token(id="2", **FULL))
        only_decrypts = FernetCipher(key, encrypts=False)
        assert rotate_keys(engine, only_decrypts, **options) == (1, 0, (), 1)
        assert known(seven.find_token_by_id("1")) == known(make_token(**FULL))
        with engine.begin() as connection:
            connection.execute(ZohoToken.__table__.update().values(tenant_id=9))
        nine = seven.scoped(tenant_id=9)
        with pytest.raises(SDKException, match="changed by other means"):
            nine.find_token_by_id("2")

    @pytest.mark.parametrize("scope", [None, {"tenant_id": 8}], ids=["none", "another"])
    @on_sqlite
    def test_a_rotation_without_the_tenants_scope_leaves_its_tokens_alone(self, engine, scope):
        seven = tenant(engine, 7)
        seven.save_token(make_token(id="1", **FULL))
        if scope:
            with engine.begin() as connection:
                connection.execute(ZohoToken.__table__.update().values(tenant_id=8))
        cipher = FernetCipher(generate_key())
        options = {"model": ZohoToken, "scope": scope, "encrypt_plain_text": True}
        summary = rotate_keys(engine, cipher, **options)
        assert (summary.rotated, summary.left) == (0, 1)
        [error] = summary.undecryptable
        assert error.id == "1"
        assert "pass scope=" in str(error)
        assert "changed by other means" in str(error)
        with engine.begin() as connection:
            connection.execute(ZohoToken.__table__.update().values(tenant_id=7))
        assert stored(seven) == [known(make_token(**FULL))]

    def test_an_id_that_another_tenant_has_taken_gives_way_E2(self, engine):
        seven = tenant(engine, 7)
        eight = seven.scoped(tenant_id=8)
        first = make_token(id="default", user="u", access_token="a7")
        second = make_token(id="default", user="u", access_token="a8")
        seven.save_token(first)
        eight.save_token(second)
        assert (first.get_id(), second.get_id() == "default") == ("default", False)
        second.set_access_token("b8")
        eight.save_token(second)
        assert [token.get_access_token() for token in seven.get_tokens()] == ["a7"]
        assert [token.get_access_token() for token in eight.get_tokens()] == ["b8"]

    @on_sqlite
    def test_a_scope_that_its_owner_changes_later_stays_what_it_was(self, engine):
        scope = {"tenant_id": 7}
        store = SQLAlchemyTokenStore(engine, model=ZohoToken, lease_model=RefreshLease, scope=scope)
        store.save_token(make_token(**FULL))
        scope["tenant_id"] = 8
        assert len(store.get_tokens()) == 1

    @on_sqlite
    def test_a_sibling_shares_the_connections_and_does_not_close_them_H2(self, engine):
        seven = tenant(engine, 7)
        eight = seven.scoped(tenant_id=8)
        eight.close()
        seven.save_token(make_token(**FULL))
        seven.close()
        with pytest.raises(SDKException, match="closed"):
            eight.get_tokens()

    def test_tenants_that_save_one_user_at_once_get_a_row_each_E7(self, engine):
        root = tenant(engine, 0)
        jobs = [(number % 4, n) for n, number in enumerate(range(48))]

        def save(job):
            number, n = job
            root.scoped(tenant_id=number).save_token(make_token(user="u", access_token=f"a{n}"))

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(save, jobs))
        for number in range(4):
            (token,) = root.scoped(tenant_id=number).get_tokens()
            assert int(token.get_access_token()[1:]) % 4 == number


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["save", "save", "find", "find id", "delete", "delete all"]),
        st.sampled_from([7, 8]),
        st.sampled_from(["u", "v"]),
        st.sampled_from(["r", "R"]),
        st.sampled_from(["1", "2", None]),
    ),
    max_size=15,
)


@pytest.mark.parametrize("name", DATABASES)
def test_what_one_tenant_does_leaves_the_others_rows_as_they_were(name, engines):
    engine = engines(name)
    root = tenant(engine, 7)

    @settings(max_examples=60, deadline=None)
    @given(OPERATIONS)
    def check(operations):
        tenants = {number: root.scoped(tenant_id=number) for number in (7, 8)}
        for store in tenants.values():
            store.delete_tokens()
        fresh = itertools.count()
        for operation, number, user, refresh_token, id_ in operations:
            store, other = tenants[number], tenants[15 - number]
            before = stored(other)
            token = make_token(
                user=user, refresh_token=refresh_token, access_token=f"{next(fresh)}"
            )
            token.set_id(id_)
            try:
                if operation == "save":
                    store.save_token(token)
                    found = store.find_token_by_id(token.get_id())
                    assert found.get_access_token() == token.get_access_token()
                elif operation == "find":
                    store.find_token(token)
                elif operation == "find id" and id_:
                    store.find_token_by_id(id_)
                elif operation == "delete" and id_:
                    store.delete_token(id_)
                elif operation == "delete all":
                    store.delete_tokens()
            except SDKException as error:
                if "belongs to user" not in str(error):
                    raise
            assert stored(other) == before

    check()
    root.delete_tokens()
