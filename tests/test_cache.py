"""Tokens answered from memory: the store's option cache_ttl."""

from __future__ import annotations

import os
import time

import pytest
from conftest import empty
from databases import SERVERS
from sdk_tokens import known, make_token
from sqlalchemy import Engine, String, create_engine, event, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from zohocrmsdk.src.com.zoho.crm.api.exception import SDKException

from zoho_orm_store import (
    ConfigurationError,
    RefreshPolicy,
    SQLAlchemyTokenStore,
    StoredTokenMixin,
    TokenRepository,
)
from zoho_orm_store._cache import _MOST, TokenCache
from zoho_orm_store.records import TokenRecord

TTL = 60.0


def live(**other):
    expires_in = str(int((time.time() + 3600) * 1000))
    values = {"refresh_token": "1000.r", "access_token": "1000.a", "expires_in": expires_in}
    return make_token(**{"id": "1", "user": "ada", **values, **other})


@pytest.fixture
def database(provisioned):
    """The cache is the same for every database."""
    url = provisioned("sqlite")
    empty(url)
    return url


@pytest.fixture
def store(database):
    with SQLAlchemyTokenStore(database, cache_ttl=TTL) as store:
        yield store


@pytest.fixture
def reads():
    """The statements that read tokens, on every engine."""
    seen = []

    def note(connection, cursor, statement, *_):
        if statement.startswith("SELECT oauthtoken.id"):
            seen.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    yield seen
    event.remove(Engine, "before_cursor_execute", note)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """The cache's clock, which tests move on."""
    offset = [0.0]

    def monotonic():
        return time.monotonic() + offset[0]

    for module in ("zoho_orm_store._cache", "zoho_orm_store.store"):
        monkeypatch.setattr(f"{module}.monotonic", monotonic)
    return offset


@pytest.fixture
def settle(clock):
    """Wait until a token that has just been changed is kept again, or until one is not any more."""

    def settle():
        clock[0] += TTL

    return settle


def access_token(store, id_="1"):
    found = store.find_token_by_id(id_)
    return None if found is None else found.get_access_token()


def change_elsewhere(url, statement):
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text(statement))
    engine.dispose()


class TestWhatIsKept:
    def test_a_second_lookup_reads_nothing(self, store, reads, settle):
        store.save_token(live())
        settle()
        first = store.find_token_by_id("1")
        del reads[:]
        second = store.find_token_by_id("1")
        assert reads == []
        assert known(second) == known(first)
        assert second is not first, "the SDK changes the token that it is given"
        second.set_access_token("changed")
        assert access_token(store) == "1000.a"

    def test_a_lease_on_another_token_does_not_matter(self, store, reads, settle):
        store.save_token(live())
        expired = {"access_token": "1000.old", "expires_in": "1", "refresh_token": "1000.other"}
        store.save_token(live(id="2", user="bob", **expired))
        store.find_token_by_id("2")  # which the caller is to refresh
        settle()
        access_token(store)
        del reads[:]
        assert access_token(store) == "1000.a"
        assert reads == []

    def test_by_default_nothing_is_kept(self, database, reads):
        with SQLAlchemyTokenStore(database) as store:
            store.save_token(live())
            del reads[:]
            assert access_token(store) == access_token(store) == "1000.a"
            assert len(reads) == 2

    def test_it_ends_after_its_time(self, store, database, settle):
        store.save_token(live())
        settle()
        assert access_token(store) == "1000.a"
        change_elsewhere(database, "DELETE FROM oauthtoken")
        assert access_token(store) == "1000.a"
        settle()
        assert access_token(store) is None

    @pytest.mark.parametrize(("ahead", "left"), [(0.0, 4.0), (60.0, 50.0)])
    @pytest.mark.parametrize("refresh", [True, False], ids=["shared", "each for itself"])
    def test_a_token_near_its_end_is_not_kept(self, database, reads, ahead, left, refresh):
        if not refresh and ahead:
            left = 4.0
        policy = RefreshPolicy(ahead=ahead) if refresh else None
        with SQLAlchemyTokenStore(database, cache_ttl=60, refresh=policy) as store:
            store.save_token(live(expires_in=str(int((time.time() + left) * 1000))))
            store._cache._changed.clear()
            access_token(store)
            del reads[:]
            access_token(store)
            assert reads

    def test_a_bounded_number(self):
        cache = TokenCache(object_like_a_table(), 60)
        for number in range(_MOST + 10):
            cache.keep(None, TokenRecord(id=str(number)), time.monotonic())
            cache.forget(f"gone {number}")
        assert len(cache._kept) <= _MOST
        assert len(cache._changed) <= _MOST

    @pytest.mark.parametrize("ttl", [-1, float("inf"), float("nan")])
    def test_another_number_is_refused(self, ttl):
        with pytest.raises(ConfigurationError, match="cache_ttl must be a number of seconds"):
            SQLAlchemyTokenStore("sqlite://", cache_ttl=ttl)


def object_like_a_table():
    class Table:
        pass

    return Table()


class TestWhatThisProcessChanges:
    @pytest.fixture
    def kept(self, store, settle):
        store.save_token(live())
        settle()
        assert access_token(store) == "1000.a"
        return store

    def test_a_save_is_seen_at_once(self, kept):
        kept.save_token(live(access_token="1000.b"))
        assert access_token(kept) == "1000.b"

    def test_a_delete(self, kept):
        kept.delete_token("1")
        assert access_token(kept) is None

    def test_the_delete_of_all(self, kept):
        kept.delete_tokens()
        assert access_token(kept) is None

    def test_an_end_of_the_access_token(self, kept):
        assert kept.expire("1")
        assert int(kept.find_token_by_id("1").get_expires_in()) < time.time() * 1000

    def test_what_another_store_does(self, kept, database):
        with SQLAlchemyTokenStore(database) as other:
            other.save_token(live(access_token="1000.b"))
            assert access_token(kept) == "1000.b"

    def test_what_a_transaction_of_the_store_does(self, kept):
        with kept.transaction() as tokens:
            tokens.delete("1")
        assert access_token(kept) is None

    @pytest.mark.parametrize("name", SERVERS)  # A reader of SQLite would find the file locked.
    def test_what_a_session_of_the_applications_commits_later(self, provisioned, name, settle):
        url = provisioned(name)
        empty(url)
        engine = create_engine(url)
        with SQLAlchemyTokenStore(url, cache_ttl=TTL) as kept, Session(engine) as session:
            kept.save_token(live())
            settle()
            kept.repository(session).save(TokenRecord(id="1", access_token="1000.b"))
            assert access_token(kept) == "1000.a", "it is not committed yet"
            session.commit()
            assert access_token(kept) == "1000.b"
        engine.dispose()

    def test_a_purge(self, kept):
        with kept.transaction() as tokens:
            tokens.save(TokenRecord(id="1", expiry_time=1))
        with kept.transaction() as tokens:
            assert tokens.purge(stranded=True) == 0
        assert int(kept.find_token_by_id("1").get_expires_in()) < time.time() * 1000

    def test_a_lookup_that_began_before_the_change_does_not_bring_it_back(self, kept):
        read_at = time.monotonic()
        kept.save_token(live(access_token="1000.b"))
        kept._cache.keep(kept._operations.scope, TokenRecord(id="1", access_token="old"), read_at)
        assert access_token(kept) == "1000.b"


class Base(DeclarativeBase):
    pass


class Tenants(StoredTokenMixin, Base):
    __tablename__ = "cache_tenants"

    tenant: Mapped[str] = mapped_column(String(20))


def test_tenants_are_kept_apart_I1(database):
    tenant = "acme"
    engine = create_engine(database)
    Base.metadata.create_all(engine)
    with SQLAlchemyTokenStore(
        database, model=Tenants, refresh=None, scope=lambda: {"tenant": tenant}, cache_ttl=60
    ) as store:
        token = live()
        store.save_token(token)
        store._cache._changed.clear()
        assert access_token(store) == access_token(store) == "1000.a"
        tenant = "ACME"
        assert access_token(store) is None
        tenant = "acme"
        assert access_token(store.scoped(tenant="acme")) == "1000.a"
        assert access_token(store.scoped(tenant="other")) is None
    Base.metadata.drop_all(engine)
    engine.dispose()


def test_a_child_begins_with_nothing(store, in_child, reads, settle):
    store.save_token(live())
    settle()
    assert access_token(store) == "1000.a"

    def look():
        del reads[:]
        assert access_token(store) == "1000.a"
        assert reads
        assert os.getpid()

    in_child(look)


def test_an_unknown_id_is_asked_for_each_time(database, reads):
    with SQLAlchemyTokenStore(database, cache_ttl=60, missing_id="raise") as store:
        with pytest.raises(SDKException):
            store.find_token_by_id("1")
        engine = create_engine(database)
        with engine.begin() as connection:
            TokenRepository(connection).save(TokenRecord(id="1", access_token="1000.a"))
        assert access_token(store) == "1000.a"
        engine.dispose()
