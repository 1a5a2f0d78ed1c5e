"""Alembic's migrations: from nothing, from the SDK's own tables, and back."""

from __future__ import annotations

import io
import logging
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import CommandLine, Config
from alembic.migration import MigrationContext
from conftest import on_empty_sqlite, statements_counted
from databases import DATABASES
from reliability import record
from sdk_tokens import known, make_token
from sqlalchemy import Engine, MetaData, create_engine, event, inspect, text
from sqlalchemy.ext.asyncio import create_async_engine
from typer.testing import CliRunner

from zoho_orm_store import SchemaError, SQLAlchemyTokenStore, metadata, provision
from zoho_orm_store._digests import digests_of
from zoho_orm_store._schema import NEWEST_REVISION
from zoho_orm_store._sdk.conversion import SDKException
from zoho_orm_store.cli import app

ROOT = Path(__file__).parent.parent
HEAD = "zoho_orm_store_0003"

SAMPLE_DDL = """
    CREATE TABLE oauthtoken (id varchar(10) NOT NULL, user_name varchar(255), client_id varchar(255),
    client_secret varchar(255), refresh_token varchar(255), access_token varchar(255),
    grant_token varchar(255), expiry_time varchar(20), redirect_url varchar(255),
    api_domain varchar(255), primary key (id))
"""
"""The table that the SDK documents for MySQL, and that the published SQLite sample makes."""

SDK_ROWS = [
    # id, user, client, secret, refresh, access, grant, expiry, redirect, domain
    ("1", "u1@x:1", "c1", "s1", "r1", "a1", None, "1700000000000", "https://cb", "https://api"),
    ("2", "u2@x:1", "c1", "s1", "r2", "a2", None, "1700000000001", None, None),
    ("3", "u2@x:1", "c1", "s1", "", "a2b", None, "1700000000009", None, None),
    ("4", "u3@x:1", "c1", "s1", "r3", "a3", "g3", "", "", ""),
    ("5", None, "c1", "s1", "r4", None, None, None, None, None),
    ("6", "", "c1", "s1", "r5", "", "", "never", None, None),
    ("7", "josé@x:1", "c1", "s1", "r6", "a6", None, "1700000000000", None, None),
    ("8", "jose@x:1", "c1", "s1", "r7", "a7", None, "1700000000000", None, None),
    ("9", "u2@x:1", "c1", "s1", "r2c", "a2c", None, "1700000000005", None, None),
    ("10", "u9@x:1", "c1", "s1", "r8", "a8", None, "1700000000000", None, None),
    ("11", "u9@x:1", "c1", "s1", "r8", "a8", None, "1700000000000", None, None),
    ("12", "u9@x:1", "c2", "s2", "r9", "a9", None, "1700000000000", None, None),
]


def alembic(*arguments: str, url: object) -> str:
    """Run a command of Alembic's command line in the checkout, and return what it prints."""
    command_line, printed = CommandLine(), io.StringIO()
    options = command_line.parser.parse_args(arguments)
    config = Config(toml_file=ROOT / "pyproject.toml", cmd_opts=options, stdout=printed)
    function, positional, named = options.cmd
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOHO_ORM_STORE_URL", url.render_as_string(hide_password=False))
        function(
            config,
            *(getattr(options, name) for name in positional),
            **{name: getattr(options, name) for name in named},
        )
    return printed.getvalue()


def upgrade_by_alembic(url):
    alembic("upgrade", "head", url=url)


def upgrade_by_engine(url):
    engine = create_engine(url)
    provision.upgrade(engine)
    engine.dispose()


def upgrade_by_async_engine(url):
    driver = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg"}
    drivername = driver.get(url.get_backend_name(), "mysql+asyncmy")
    provision.upgrade(create_async_engine(url.set(drivername=drivername)))


WAYS = {
    "url": provision.upgrade,
    "engine": upgrade_by_engine,
    "async engine": upgrade_by_async_engine,
    "alembic": upgrade_by_alembic,
}
"""Every way to the newest revision."""


def by(*ways):
    """Run a test on these pairs of a database and a way to upgrade it."""
    return pytest.mark.parametrize(
        ("empty_database", "upgrade"),
        [pytest.param(name, WAYS[way], id=f"{name}-{way}") for name, way in ways],
        indirect=["empty_database"],
    )


BY_URL = [(name, "url") for name in DATABASES]


@pytest.fixture
def behind(empty_database):
    """Run SQL on the database without tables."""
    engine = create_engine(empty_database)

    def run(sql, parameters=None):
        with engine.begin() as connection:
            result = connection.execute(text(sql), parameters)
            return [tuple(row) for row in result] if result.returns_rows else []

    yield run
    engine.dispose()


@pytest.fixture
def sdk_table(behind):
    """The table of the SDK, filled by its stores, with duplicates and rubbish."""
    behind(SAMPLE_DDL)
    behind(
        "INSERT INTO oauthtoken VALUES (:a, :b, :c, :d, :e, :f, :g, :h, :i, :j)",
        [dict(zip("abcdefghij", row, strict=True)) for row in SDK_ROWS],
    )


def tokens_by_id(url):
    with SQLAlchemyTokenStore(url, create_schema=False) as store:
        return {token.get_id(): known(token) for token in store.get_tokens()}


@by(
    *BY_URL,
    *[(name, "async engine") for name in DATABASES],
    ("sqlite", "engine"),
    ("mariadb", "alembic"),
)
def test_an_empty_database_reaches_head_and_goes_back_and_up_again(empty_database, upgrade):
    assert provision.current(empty_database) is None
    upgrade(empty_database)
    assert provision.current(empty_database) == HEAD == provision.head()
    provision.check(empty_database)
    upgrade(empty_database)
    with SQLAlchemyTokenStore(empty_database, create_schema=False) as store:
        store.save_token(make_token(id="x" * 255, user="u", access_token="a" * 4096))
        store.delete_tokens()
    provision.downgrade(empty_database)
    assert provision.current(empty_database) is None
    assert "oauthtoken" not in tables(empty_database)
    upgrade(empty_database)
    provision.check(empty_database)


def tables(url):
    engine = create_engine(url)
    try:
        return set(inspect(engine).get_table_names())
    finally:
        engine.dispose()


def test_alembic_finds_nothing_to_change(empty_database):
    upgrade_by_alembic(empty_database)
    assert "No new upgrade operations detected" in alembic("check", url=empty_database)


def test_alembic_leaves_the_applications_tables_alone(empty_database, behind):
    behind("CREATE TABLE invoices (id integer primary key)")
    upgrade_by_alembic(empty_database)
    alembic("check", url=empty_database)
    alembic("downgrade", "base", url=empty_database)
    assert "invoices" in tables(empty_database)


def test_the_migrations_make_what_the_models_describe(empty_database):
    provision.upgrade(empty_database)
    engine = create_engine(empty_database)
    migrated = inspect(engine)
    for table in metadata.tables.values():
        columns = {
            column["name"]: column["nullable"] for column in migrated.get_columns(table.name)
        }
        assert columns == {column.name: column.nullable for column in table.columns}
        indexes = {index["name"]: index["unique"] for index in migrated.get_indexes(table.name)}
        assert indexes == {index.name: index.unique for index in table.indexes}
        assert list(columns) == [column.name for column in table.columns]
    engine.dispose()


@by(*BY_URL, ("mariadb", "engine"), ("postgresql", "async engine"), ("sqlite", "alembic"))
def test_the_sdks_table_is_adopted_with_every_live_token(
    empty_database, sdk_table, upgrade, caplog
):
    upgrade(empty_database)
    tokens = tokens_by_id(empty_database)
    # The newest of each user and client stays; what it did not know comes from the older ones.
    assert list(tokens) == ["1", "3", "4", "5", "6", "7", "8", "11", "12"]
    assert tokens["1"] == {
        "user_name": "u1@x:1",
        "client_id": "c1",
        "client_secret": "s1",
        "refresh_token": "r1",
        "access_token": "a1",
        "expiry_time": 1700000000000,
        "redirect_url": "https://cb",
        "api_domain": "https://api",
    }
    assert tokens["3"]["access_token"] == "a2b"
    assert tokens["3"]["refresh_token"] == "r2c"
    assert tokens["3"]["expiry_time"] == 1700000000009
    assert "expiry_time" not in tokens["6"]
    assert tokens["5"] == {"client_id": "c1", "client_secret": "s1", "refresh_token": "r4"}
    provision.check(empty_database)


@on_empty_sqlite
def test_the_ids_that_are_dropped_are_named_in_a_warning(empty_database, sdk_table, caplog):
    provision.upgrade(empty_database)
    warnings = [r.getMessage() for r in caplog.records if r.name == "zoho_orm_store.migrations"]
    assert len(warnings) == 2
    assert any("id '3', was kept" in w and "ids '2', '9'" in w for w in warnings)
    assert any("id '11', was kept" in w and "ids '10'" in w for w in warnings)
    assert not any(secret in "".join(warnings) for secret in ("a2", "r2", "s1"))


def test_adopted_tokens_are_found_by_every_rung(empty_database, sdk_table):
    provision.upgrade(empty_database)
    with SQLAlchemyTokenStore(empty_database, create_schema=False) as store:
        for asked, expected in (
            (make_token(id="4"), "4"),
            (make_token(user="josé@x:1"), "7"),
            (make_token(user="u9@x:1", client_id="c2"), "12"),
            (make_token(access_token="a3"), "4"),
            (make_token(grant_token="g3"), "4"),
            (make_token(refresh_token="r4"), "5"),
        ):
            assert store.find_token(asked).get_id() == expected
        again = make_token(user="u1@x:1", client_id="c1", access_token="new")
        store.save_token(again)
        assert again.get_id() == "1"


def test_down_to_base_and_up_again_keeps_every_token(empty_database, sdk_table):
    provision.upgrade(empty_database)
    before = tokens_by_id(empty_database)
    alembic("downgrade", "base", url=empty_database)
    assert "oauthtoken" in tables(empty_database), "a table that holds tokens is never dropped"
    upgrade_by_alembic(empty_database)
    assert tokens_by_id(empty_database) == before


def test_the_sdks_dbstore_can_read_the_table_by_position(empty_database, sdk_table, behind):
    provision.upgrade(empty_database)
    row = behind("select * from oauthtoken where id = '1'")[0]
    expected = list(SDK_ROWS[0])
    expected[7] = int(expected[7])
    assert list(row[:10]) == expected


@on_empty_sqlite
def test_a_nine_column_table_of_an_older_sdk_is_adopted(empty_database, behind):
    behind(SAMPLE_DDL.replace(",\n    api_domain varchar(255)", ""))
    behind("INSERT INTO oauthtoken (id, user_name, access_token) VALUES ('1', 'u', 'a')")
    provision.upgrade(empty_database)
    assert tokens_by_id(empty_database) == {"1": {"user_name": "u", "access_token": "a"}}


def test_a_table_that_is_not_the_sdks_is_refused_and_left_alone(empty_database, behind):
    behind("CREATE TABLE oauthtoken (id varchar(10) primary key, secret varchar(20))")
    behind("INSERT INTO oauthtoken VALUES ('1', 'x')")
    with pytest.raises(SchemaError, match="not the Zoho SDK's: it lacks the columns access_token"):
        provision.upgrade(empty_database)
    assert behind("select * from oauthtoken") == [("1", "x")]
    assert provision.current(empty_database) is None


@pytest.mark.parametrize("number", [1, 3, 6])
def test_a_run_that_was_cut_short_can_be_repeated(empty_database, sdk_table, number):
    """At one of the statements that change the table."""

    class KilledError(Exception):
        pass

    seen = []

    def fail_late(connection, cursor, statement, parameters, context, executemany):
        if re.match(r"\s*(UPDATE|ALTER|DELETE|CREATE|INSERT|DROP)", statement):
            seen.append(statement)
            if len(seen) == number + 2:
                raise KilledError

    event.listen(Engine, "before_cursor_execute", fail_late)
    try:
        with pytest.raises(KilledError):
            provision.upgrade(empty_database)
    finally:
        event.remove(Engine, "before_cursor_execute", fail_late)
    provision.upgrade(empty_database)
    provision.check(empty_database)
    assert len(tokens_by_id(empty_database)) == 9
    alembic("check", url=empty_database)
    record("a migration is cut short", empty_database, 1, "the next one ended it, 0 tokens lost")


def test_every_digest_is_what_a_store_looks_for(empty_database, behind):
    """Each database computes them in its own way."""
    behind(SAMPLE_DDL)
    values = ["", None, "a", "A ", "josé", "日本語", "🔑", "it's 100% \"q\\", "1:2", " ", "x" * 200]
    names = ("user_name", "client_id", "refresh_token", "access_token", "grant_token")
    rows = [
        {"id": str(number), "expiry": str(number)}
        | {name: values[number * step % 11] for step, name in enumerate(names, 1)}
        for number in range(1, 30)
    ]
    behind(
        f"INSERT INTO oauthtoken (id, {', '.join(names)}, expiry_time) "
        f"VALUES (:id, {', '.join(f':{name}' for name in names)}, :expiry)",
        rows,
    )
    provision.upgrade(empty_database)
    with SQLAlchemyTokenStore(empty_database) as store, store.transaction() as tokens:
        for stored in tokens.list():
            columns = ", ".join(digests_of(stored))
            found = behind(f"SELECT {columns} FROM oauthtoken WHERE id = :id", {"id": stored.id})
            assert found == [tuple(digests_of(stored).values())]


def test_the_number_of_adopted_tokens_is_reported(empty_database, sdk_table, caplog):
    with caplog.at_level(logging.INFO, "zoho_orm_store"):
        assert provision.upgrade(empty_database) == 9
        assert provision.upgrade(empty_database) == 0
    infos = [(r.name, r.getMessage()) for r in caplog.records if r.levelno == logging.INFO]
    adopted = "Adopted the 9 tokens of the SDK's table oauthtoken."
    assert [each for each in infos if each[0].startswith("zoho")] == [("zoho_orm_store", adopted)]


def test_the_adoption_of_a_large_table_says_what_it_does(empty_database, behind):
    behind(SAMPLE_DDL)
    rows = [{"id": str(n), "user": f"u{n}", "access": f"a{n}"} for n in range(5001)]
    behind(
        "INSERT INTO oauthtoken (id, user_name, access_token) VALUES (:id, :user, :access)", rows
    )
    url = empty_database.render_as_string(hide_password=False)
    steps, done = [], CliRunner().invoke(app, ["upgrade", "--url", url])
    assert done.stderr.splitlines() == [
        "Converting 5,001 tokens",
        "Giving the columns their types",
        "Making one row of those that hold one token",
        "Making the indexes",
    ]
    assert "It took over 5001 tokens" in done.stdout
    assert provision.upgrade(empty_database, on_step=steps.append) == 0
    assert steps == []


@on_empty_sqlite
def test_new_tables_adopt_nothing(empty_database, caplog):
    with caplog.at_level(logging.INFO, "zoho_orm_store"):
        assert provision.upgrade(empty_database) == 0
    assert "Adopted" not in caplog.text


@on_empty_sqlite
def test_adoption_does_not_take_a_statement_per_token(empty_database, behind):
    def statements(number):
        behind("DROP TABLE IF EXISTS zoho_orm_store_version")
        behind("DROP TABLE IF EXISTS oauthtoken_refresh_lease")
        behind("DROP TABLE IF EXISTS oauthtoken")
        behind(SAMPLE_DDL)
        # Each token is in the table twice.
        rows = [{"id": str(n), "user": f"u{n // 2}", "access": f"a{n}"} for n in range(2 * number)]
        behind(
            "INSERT INTO oauthtoken (id, user_name, access_token) VALUES (:id, :user, :access)",
            rows,
        )
        with statements_counted() as counted:
            provision.upgrade(empty_database)
        return len(counted)

    assert statements(240) == statements(20)


@pytest.mark.parametrize("number", [1, 12])
def test_a_store_recognizes_a_table_to_adopt(empty_database, behind, number):
    behind(SAMPLE_DDL)
    for id_ in range(number):
        behind(f"INSERT INTO oauthtoken (id, user_name, access_token) VALUES ({id_}, '{id_}', 'a')")
    tokens = "1 token" if number == 1 else "12 tokens"
    message = rf"is the Zoho SDK's own, with {tokens}\. The upgrade adopts it.* back it up\."
    with pytest.raises(SchemaError, match=message):
        provision.check(empty_database)
    with SQLAlchemyTokenStore(empty_database, create_schema=False) as store:
        with pytest.raises(SDKException, match=message):
            store.find_token_by_id("1")
        assert provision.upgrade(empty_database) == number
        assert len(store.get_tokens()) == number
    provision.downgrade(empty_database)
    with pytest.raises(SchemaError, match=message):
        provision.check(empty_database)


def adopt(empty_database, behind, rows):
    behind(SAMPLE_DDL)
    names = ("id", "user_name", "client_id", "refresh_token", "access_token", "expiry_time")
    behind(
        f"INSERT INTO oauthtoken ({', '.join(names)}) VALUES (:a, :b, :c, :d, :e, :f)",
        [dict(zip("abcdef", row, strict=True)) for row in rows],
    )
    provision.upgrade(empty_database)
    return tokens_by_id(empty_database)


class TestRowsThatAreOneToken:
    def test_a_row_without_user_joins_the_users_own_E4(self, empty_database, behind, caplog):
        tokens = adopt(
            empty_database,
            behind,
            [
                ("1", "u", "c", "r", "old", "5"),
                ("2", None, "c", "r", "new", "9"),
                ("3", "", None, "r", "older", "4"),
            ],
        )
        expected = {"user_name": "u", "client_id": "c", "refresh_token": "r"}
        assert tokens == {"1": expected | {"access_token": "new", "expiry_time": 9}}
        assert "with id '1', was kept, and those with the ids '3', '2' were dropped" in caplog.text
        assert "new" not in caplog.text
        with SQLAlchemyTokenStore(empty_database, create_schema=False) as store:
            asked = make_token(refresh_token="r", client_id="c", client_secret="s")
            assert store.find_token(asked).get_id() == "1"

    @on_empty_sqlite
    def test_of_several_users_the_newest_gets_it(self, empty_database, behind):
        rows = [
            ("1", "u", "c", "r", "a1", "7"),
            ("2", "v", "c", "r", "a2", "8"),
            ("3", None, "c", "r", "a3", "9"),
        ]
        tokens = adopt(empty_database, behind, rows)
        assert {id_: token["access_token"] for id_, token in tokens.items()} == {
            "1": "a1",
            "2": "a3",
        }

    @on_empty_sqlite
    def test_a_row_that_only_lacks_the_client(self, empty_database, behind):
        rows = [("1", None, None, "r", "a1", "9"), ("2", None, "c", "r", "a2", "8")]
        tokens = adopt(empty_database, behind, rows)
        assert {i: (t["client_id"], t["access_token"]) for i, t in tokens.items()} == {
            "2": ("c", "a1")
        }

    @on_empty_sqlite
    @pytest.mark.parametrize(
        "rows",
        [
            [("1", "u", "c", "r", "a1", "5"), ("2", None, "d", "r", "a2", "9")],
            [("1", "u", None, "r", "a1", "5"), ("2", None, "d", "r", "a2", "9")],
            [("1", "u", "c", "r", "a1", "5"), ("2", "v", "c", "r", "a2", "9")],
            [("1", "u", "c", None, "a1", "5"), ("2", None, "c", None, "a2", "9")],
            [("1", None, "c", "r", "a1", "5"), ("2", None, "d", "r", "a2", "9")],
        ],
    )
    def test_others_stay_apart_B6_B10(self, empty_database, behind, rows):
        assert list(adopt(empty_database, behind, rows)) == ["1", "2"]

    def test_many_of_them(self, empty_database, behind):
        rows = []
        for number in range(600):
            rows.append((f"{number}", f"u{number}", "c", f"r{number}", f"a{number}", "5"))
            rows.append((f"1{number:03}", None, "c", f"r{number}", f"b{number}", "9"))
        tokens = adopt(empty_database, behind, rows)
        assert len(tokens) == 600
        assert all(tokens[str(n)]["access_token"] == f"b{n}" for n in range(600))


def test_more_rows_than_two_batches_are_converted(empty_database, behind):
    behind(SAMPLE_DDL)
    rows = [{"id": str(n), "user": f"u{n}", "access": f"a{n}"} for n in range(1, 1002)]
    behind(
        "INSERT INTO oauthtoken (id, user_name, access_token) VALUES (:id, :user, :access)", rows
    )
    provision.upgrade(empty_database)
    tokens = tokens_by_id(empty_database)
    assert list(tokens) == [row["id"] for row in rows]


def test_eight_threads_provision_one_database_at_once(empty_database):
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(provision.upgrade, empty_database) for _ in range(8)]:
            done.result()
    provision.check(empty_database)
    record("8 threads migrate one database at once", empty_database, 8, "migrated once")


@on_empty_sqlite
def test_check_names_both_revisions_and_the_command(empty_database):
    with pytest.raises(
        SchemaError, match=r"has no tables .* zoho-orm-store upgrade --url"
    ) as missing:
        provision.check(empty_database)
    assert HEAD in str(missing.value)
    provision.upgrade(empty_database, "zoho_orm_store_0001")
    with pytest.raises(SchemaError, match="zoho_orm_store_0001") as behind:
        provision.check(empty_database)
    assert HEAD in str(behind.value)


def test_check_says_that_a_newer_release_has_made_the_tables(empty_database, behind):
    provision.upgrade(empty_database)
    behind("UPDATE zoho_orm_store_version SET version_num = 'zoho_orm_store_9999'")
    newer = r"zoho_orm_store_9999.* newer release.* pip install"
    for look in (provision.check, provision.upgrade):
        with pytest.raises(SchemaError, match=newer):
            look(empty_database)
    for create_schema in (True, False):
        with SQLAlchemyTokenStore(empty_database, create_schema=create_schema) as store:
            for _ in range(2):
                with pytest.raises(SDKException, match=newer):
                    store.get_tokens()


@on_empty_sqlite
def test_a_store_on_tables_that_are_behind_names_both_revisions(empty_database):
    provision.upgrade(empty_database, "zoho_orm_store_0001")
    with SQLAlchemyTokenStore(empty_database, create_schema=False) as store:
        with pytest.raises(SDKException, match=f"at revision zoho_orm_store_0001, but {HEAD}"):
            store.find_token_by_id("1")
        provision.upgrade(empty_database)
        assert store.find_token_by_id("1") is None


@on_empty_sqlite
def test_a_store_reads_the_revision_once(empty_database):
    provision.upgrade(empty_database)
    with SQLAlchemyTokenStore(empty_database, create_schema=False) as store:
        with statements_counted() as statements:
            store.find_token_by_id("1")
            assert [s for s in statements if "zoho_orm_store_version" in s] == statements[:2]
            store.find_token_by_id("1")
        assert len(statements) == 4


@on_empty_sqlite
def test_no_lookup_update_or_deletion_reads_the_whole_table(empty_database, behind):
    """By the query plans, which need no large table to be right."""
    executed = []

    def remember(connection, cursor, statement, parameters, context, executemany):
        executed.append((statement, parameters))

    with SQLAlchemyTokenStore(empty_database, refresh=None) as store:
        store.save_token(make_token(id="1", user="u", client_id="c", refresh_token="r"))
        event.listen(Engine, "before_cursor_execute", remember)
        try:
            store.find_token_by_id("1")
            for known_values in (
                {"user": "u", "client_id": "c"},
                {"access_token": "a"},
                {"grant_token": "g", "client_id": "c"},
                {"refresh_token": "r", "client_id": "c"},
            ):
                store.find_token(make_token(**known_values))
            for id_ in ("1", None):
                store.save_token(make_token(id=id_, user="u", client_id="c", access_token="a"))
            store.delete_token("1")
        finally:
            event.remove(Engine, "before_cursor_execute", remember)
    about_rows = [each for each in executed if " WHERE " in " ".join(each[0].split())]
    assert {statement.split()[0] for statement, _ in about_rows} == {"SELECT", "UPDATE", "DELETE"}
    engine = create_engine(empty_database)
    with engine.connect() as connection:
        for statement, parameters in about_rows:
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
            steps = [row[-1] for row in plan]
            assert not any(step.startswith("SCAN") for step in steps), (statement, steps)
    engine.dispose()


def test_the_revision_that_a_store_expects_is_the_newest():
    assert provision.head() == HEAD == NEWEST_REVISION


def test_a_column_that_was_dropped_is_reported_and_made_again(empty_database, behind):
    provision.upgrade(empty_database)
    with SQLAlchemyTokenStore(empty_database) as store:
        store.save_token(make_token(user="u", access_token="a"))
    drop_index = "DROP INDEX ix_oauthtoken_grant_digest"
    is_mysql = empty_database.get_backend_name() == "mysql"
    behind(f"{drop_index} ON oauthtoken" if is_mysql else drop_index)
    behind("ALTER TABLE oauthtoken DROP COLUMN grant_digest")
    with pytest.raises(SchemaError, match=f"at revision {HEAD}, .* changed since"):
        provision.check(empty_database)
    with SQLAlchemyTokenStore(empty_database) as store, pytest.raises(SDKException) as raised:
        store.save_token(make_token(user="v", access_token="a"))
    assert "drop the table zoho_orm_store_version" in str(raised.value.cause)
    behind("DROP TABLE zoho_orm_store_version")
    provision.upgrade(empty_database)
    provision.check(empty_database)
    assert len(tokens_by_id(empty_database)) == 1


class TestTablesOfTheProjectsOwnMigrations:
    @pytest.fixture
    def project(self, empty_database):
        engine = create_engine(empty_database)
        metadata.create_all(engine)
        yield engine
        engine.dispose()

    def test_they_are_taken_for_current(self, project):
        provision.check(project)
        assert provision.is_current(project)
        assert provision.current(project) is None

    def test_a_store_that_provisions_leaves_them_alone(self, project):
        before = inspect(project).get_table_names()
        with SQLAlchemyTokenStore(project.url, create_schema=True) as store:
            store.save_token(make_token(user="u", access_token="a"))
        assert inspect(project).get_table_names() == before

    def test_they_are_behind_without_a_column(self, project):
        with project.begin() as connection:
            connection.execute(text("ALTER TABLE oauthtoken_refresh_lease DROP COLUMN owner"))
        with pytest.raises(SchemaError, match="own migrations make the tables, run those instead"):
            provision.check(project)

    def test_autogenerate_proposes_to_drop_nothing_of_ours(self, project):
        provision.upgrade(project)
        with project.connect() as connection:
            options = {"include_name": provision.include_name}
            context = MigrationContext.configure(connection, opts=options)
            assert compare_metadata(context, MetaData()) == []
            context = MigrationContext.configure(connection)
            assert len(compare_metadata(context, MetaData())) >= len(metadata.tables)


def test_a_connection_stays_the_callers_to_commit(tmp_path):
    engine = create_engine(f"sqlite:///{tmp_path / 'app.db'}")
    with engine.connect() as connection:
        connection.exec_driver_sql("BEGIN")
        provision.upgrade(connection)
        connection.rollback()
    assert inspect(engine).get_table_names() == []
    engine.dispose()


class TestAlembicsCommandLine:
    """In a process of its own, where it finds pyproject.toml by itself."""

    def run(self, *arguments, **variables):
        others = {k: v for k, v in os.environ.items() if k != "ZOHO_ORM_STORE_URL"}
        return subprocess.run(
            [sys.executable, "-m", "alembic", *arguments],
            cwd=ROOT,
            env=others | {"PYTHONPATH": str(ROOT)} | variables,
            capture_output=True,
            text=True,
            check=False,
        )

    def test_it_upgrades_the_database_that_the_variable_names(self, tmp_path):
        url = f"sqlite:///{tmp_path / 'tokens.db'}"
        result = self.run("upgrade", "head", ZOHO_ORM_STORE_URL=url)
        assert result.returncode == 0, result.stderr
        provision.check(url)

    def test_it_says_which_variable_is_missing(self):
        result = self.run("current")
        assert result.returncode != 0
        # Where it prints depends on Alembic's release.
        printed = result.stdout + result.stderr
        assert "Set ZOHO_ORM_STORE_URL" in printed
        assert "Traceback" not in printed
