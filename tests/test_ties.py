"""Rows that turn out to be one token become one row: rules E4 and E7."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta

import pytest
import reliability
from conftest import (
    BY_DATABASE,
    CIPHER,
    ENCRYPTED,
    MEMORY,
    on_routes,
    on_sqlite,
    operations,
    statements_counted,
)
from databases import SERVERS
from sdk_tokens import known, make_token
from sqlalchemy import CheckConstraint, UniqueConstraint, create_engine, event, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped
from test_concurrency import start

from zoho_orm_store import (
    CipherError,
    FernetCipher,
    SQLAlchemyTokenStore,
    StoredToken,
    StoredTokenMixin,
    TokenRecord,
    TokenRepository,
    generate_key,
)

on_each_server = pytest.mark.parametrize("database", SERVERS, indirect=True)
on_mariadb = pytest.mark.parametrize("database", ["mariadb"], indirect=True)


@contextmanager
def engine_of(url):
    engine = create_engine(url)
    yield engine
    engine.dispose()


def as_another_tool_leaves_them(records):
    """The records with times, the first one saved first."""
    first = datetime(2026, 1, 1)
    for number, record in enumerate(records):
        saved_at = first + timedelta(hours=number)
        yield replace(record, created_at=saved_at, updated_at=saved_at)


def insert(url, *records, cipher=None):
    with engine_of(url) as engine, engine.begin() as connection:
        for record in as_another_tool_leaves_them(records):
            connection.execute(
                StoredToken.__table__.insert(), operations(cipher).row_values(record)
            )


def stored(url):
    with SQLAlchemyTokenStore(url, create_schema=False) as store:
        return store.get_tokens()


class TestLeftBehind:
    """Rows that another tool left behind."""

    @pytest.fixture
    def leave(self, route, store, route_url):
        def leave(*rows):
            records = [TokenRecord(**row) for row in rows]
            if route.database == "memory":
                store._records = [*as_another_tool_leaves_them(records)]
            else:
                insert(route_url, *records, cipher=CIPHER if route.encrypted else None)

        return leave

    @on_routes(MEMORY, *BY_DATABASE, ENCRYPTED)
    @pytest.mark.parametrize(
        "client_of_the_other", ["c", pytest.param(None, marks=pytest.mark.soak)]
    )
    @pytest.mark.parametrize(
        "asked",
        [
            {"id": "own"},
            {"id": "own", "user": "u", "client_id": "c", "refresh_token": "r"},
            {"user": "u"},
            {"refresh_token": "r"},
            {"id": "other"},
            {"id": "other", "user": "u", "client_id": "c"},
        ],
        ids=" ".join,
    )
    def test_the_next_save_makes_them_one_E4_E7(self, store, leave, asked, client_of_the_other):
        leave(
            {"id": "own", "user_name": "u", "client_id": "c", "refresh_token": "r"},
            {"id": "other", "client_id": client_of_the_other, "refresh_token": "r"}
            | {"access_token": "old", "expiry_time": 5, "redirect_url": "d"},
        )
        token = make_token(**asked, access_token="new", expires_in="9")
        store.save_token(token)
        assert token.get_id() == "own"
        [token] = store.get_tokens()
        assert token.get_id() == "own"
        assert known(token) == {
            "user_name": "u",
            "client_id": "c",
            "refresh_token": "r",
            "access_token": "new",
            "expiry_time": 9,
            "redirect_url": "d",
        }

    @pytest.mark.parametrize("asked", ["1", "2"])
    @pytest.mark.parametrize(
        "other",
        [
            {"user_name": "v", "client_id": "c", "refresh_token": "r"},
            {"client_id": "d", "refresh_token": "r"},
            {"client_id": "c", "refresh_token": "R"},
            {"client_id": "c", "grant_token": "g"},
        ],
        ids=" ".join,
    )
    def test_rows_of_other_tokens_stay_B6_B10(self, store, leave, other, asked):
        user = {"user_name": "u", "client_id": "c", "refresh_token": "r"}
        leave({"id": "1"} | user, {"id": "2"} | other)
        store.save_token(make_token(id=asked, access_token="a"))
        assert len(store.get_tokens()) == 2

    def test_of_several_users_the_one_saved_last_gets_the_row_B7_B10(self, store, leave):
        token = {"client_id": "c", "refresh_token": "r"}
        leave(
            {"id": "1", "user_name": "u"} | token,
            {"id": "2", "user_name": "v"} | token,
            {"id": "3"} | token,
        )
        saved = make_token(id="3", access_token="a")
        store.save_token(saved)
        assert saved.get_id() == "2"
        access_tokens = {token.get_id(): token.get_access_token() for token in store.get_tokens()}
        assert access_tokens == {"1": None, "2": "a"}

    def test_a_user_who_has_another_refresh_token_by_now_is_not_tied_E4(self, store, leave):
        leave(
            {"id": "1", "user_name": "u", "client_id": "c", "refresh_token": "r"},
            {"id": "2", "client_id": "c", "refresh_token": "r"},
        )
        store.save_token(make_token(user="u", refresh_token="other", access_token="a"))
        assert len(store.get_tokens()) == 2

    @on_sqlite
    def test_a_row_that_cannot_be_decrypted_is_left_alone(self, database):
        row = TokenRecord(client_id="c", refresh_token="r")
        insert(database, replace(row, id="1"), cipher=FernetCipher(generate_key()))
        insert(database, replace(row, id="2", user_name="u"))
        with SQLAlchemyTokenStore(database) as store:
            store.save_token(make_token(id="2", access_token="a"))
            assert store.find_token_by_id("2").get_access_token() == "a"
        with engine_of(database) as engine, engine.connect() as connection:
            assert TokenRepository(connection).count() == 2


ALONE = {"client_id": "c", "refresh_token": "r", "access_token": "alone", "redirect_url": "d"}
WITHOUT_CLIENT = {"refresh_token": "r", "access_token": "without client", "redirect_url": "d"}
WITH_USER = {"user": "u", "client_id": "c", "refresh_token": "r", "access_token": "with user"}
BEFORE = TokenRecord(id="own", user_name="u", client_id="c", refresh_token="before")

PAIRS = [
    pytest.param(ALONE, WITH_USER, id="the user comes second"),
    pytest.param(WITH_USER, ALONE, id="the user comes first"),
    pytest.param(WITHOUT_CLIENT, WITH_USER, id="user and client come second"),
    pytest.param(WITH_USER, WITHOUT_CLIENT, id="user and client come first"),
    pytest.param(WITHOUT_CLIENT, ALONE, id="the client comes second"),
    pytest.param(ALONE, WITHOUT_CLIENT, id="the client comes first"),
]


@on_each_server
@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([], id="new"),
        pytest.param([BEFORE], id="a new login", marks=pytest.mark.soak),
    ],
)
@pytest.mark.parametrize(("first", "second"), PAIRS)
class TestTwoWriters:
    """Both look for the token's row when there is none yet, and then write."""

    @pytest.fixture(autouse=True)
    def stored_before(self, database, rows):
        insert(database, *rows)

    def assert_one(self, database, first, second, rows):
        """All values have ended in one row, and of each pair the second one's."""
        holders = [token for token in stored(database) if token.get_refresh_token() == "r"]
        [token] = holders
        values = known(make_token(**first)) | known(make_token(**second))
        assert known(token) == values
        if rows and "user" in first | second:
            assert token.get_id() == "own"

    def test_the_first_commits_before_the_second_writes(self, database, first, second, rows):
        due = [first]

        def another_is_faster(connection, cursor, statement, *_):
            if statement.startswith(("INSERT INTO oauthtoken ", "UPDATE oauthtoken ")) and due:
                with SQLAlchemyTokenStore(database, create_schema=False) as other:
                    other.save_token(make_token(**due.pop()))

        with engine_of(database) as engine, SQLAlchemyTokenStore(engine) as store:
            event.listen(engine, "before_cursor_execute", another_is_faster)
            store.save_token(make_token(**second))
        assert due == []
        self.assert_one(database, first, second, rows)

    def test_the_first_commits_while_the_second_waits(self, database, first, second, rows):
        with (
            SQLAlchemyTokenStore(database, create_schema=False) as store,
            SQLAlchemyTokenStore(database, create_schema=False) as other,
            ThreadPoolExecutor(1) as pool,
        ):
            with store.transaction() as tokens:
                tokens.save(record_of(first))
                saving = pool.submit(other.save_token, make_token(**second))
                assert wait([saving], timeout=0.3).not_done
            saving.result(timeout=20)
        self.assert_one(database, first, second, rows)


def record_of(fields):
    return TokenRecord(**{"user_name" if name == "user" else name: fields[name] for name in fields})


def save_in_processes(url, names):
    """Save tokens in four processes, each of them at once; see `worker.py`."""
    processes = [start("save_with_and_without_user", url, str(number)) for number in range(4)]
    answers = [process.stdout.readline() for process in processes]
    assert answers == ["READY\n"] * 4
    for name in names:
        for process in processes:
            process.stdin.write(f"{name}\n")
            process.stdin.flush()
        answers = [process.stdout.readline() for process in processes]
        assert answers == ["SAVED\n"] * 4
    for process in processes:
        process.communicate()


@pytest.mark.parametrize(
    ("number", "database"),
    [
        *(pytest.param(30, name, id=name) for name in SERVERS),
        *(pytest.param(500, name, id=f"500, {name}", marks=pytest.mark.soak) for name in SERVERS),
        pytest.param(100, "sqlite", id="100, sqlite", marks=pytest.mark.soak),
    ],
    indirect=["database"],
)
@pytest.mark.timeout(600)
def test_processes_save_a_token_with_and_without_its_user_E4_E7(database, number):
    names = [str(each) for each in range(number)]
    save_in_processes(database, names)
    assert sorted(token.get_refresh_token() for token in stored(database)) == sorted(
        f"r {name}" for name in names
    )
    users = {token.get_user_signature().get_name() for token in stored(database)}
    assert users == {f"u {name}" for name in names}
    reliability.record(
        "4 processes save one token with and without its user at once",
        database,
        number,
        "one row for each token",
    )


@on_each_server
def test_no_claim_is_left_if_an_application_goes_on_after_an_error(database):
    insert(database, BEFORE)
    cipher = BrokenCipher(generate_key())
    with SQLAlchemyTokenStore(database, create_schema=False, cipher=cipher) as store:
        for asked in (replace(BEFORE, refresh_token="r"), TokenRecord(refresh_token="new")):
            with store.transaction() as tokens, pytest.raises(CipherError):
                tokens.save(asked)
    assert [known(token)["refresh_token"] for token in stored(database)] == ["before"]
    with SQLAlchemyTokenStore(database, create_schema=False) as store:
        store.save_token(make_token(user="u", client_id="c", access_token="a"))
    assert len(stored(database)) == 1, "the row has lost its identity"


class BrokenCipher(FernetCipher):
    def encrypt(self, plaintext, key_id):
        raise OSError


class ProjectBase(DeclarativeBase):
    pass


class ProjectToken(StoredTokenMixin, ProjectBase):
    """A project's own table, which demands more of a row than ours."""

    __tablename__ = "project_token"
    __table_args__ = (CheckConstraint("refresh_token IS NOT NULL"), UniqueConstraint("customer"))
    customer: Mapped[int]


@pytest.mark.parametrize("empty_database", SERVERS, indirect=True)
def test_a_claim_keeps_to_a_projects_own_constraints(empty_database):
    with engine_of(empty_database) as engine:
        ProjectBase.metadata.create_all(engine)

        def save(values, **fields):
            with engine.begin() as connection:
                tokens = TokenRepository(connection, model=ProjectToken)
                tokens.save(TokenRecord(user_name="u", client_id="c", **fields), values=values)
                return tokens.count()

        assert save({"customer": 7}, refresh_token="r1") == 1
        assert save(None, refresh_token="r2") == 1
        with engine.connect() as connection:
            rows = connection.execute(select(ProjectToken.customer, ProjectToken.refresh_token))
            assert [tuple(row) for row in rows] == [(7, "r2")]


@on_each_server
def test_a_save_that_brings_no_refresh_token_reads_no_other_row_E4(database):
    insert(database, BEFORE)
    with SQLAlchemyTokenStore(database, create_schema=False) as store:
        store.get_tokens()
        with statements_counted() as statements:
            store.save_token(make_token(id="own", user="u", client_id="c", access_token="a"))
    assert [statement.split()[0] for statement in statements] == ["SELECT", "UPDATE"]


@on_mariadb
def test_an_index_of_another_name_makes_no_difference(database):
    rename = "ALTER TABLE oauthtoken RENAME INDEX {} TO {}"
    names = "ix_oauthtoken_refresh_digest", "of_another_name"
    with engine_of(database) as engine:
        with engine.begin() as connection:
            connection.execute(text(rename.format(*names)))
        try:
            with SQLAlchemyTokenStore(engine) as store:
                store.save_token(make_token(**ALONE))
                store.save_token(make_token(**WITH_USER))
                assert len(store.get_tokens()) == 1
        finally:
            with engine.begin() as connection:
                connection.execute(text(rename.format(*reversed(names))))
