"""What happens to a SQLite file in use: other programs write into it, replace or delete it."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from conftest import CIPHER, on_sqlite
from reliability import record
from sdk_tokens import make_token
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine
from typer.testing import CliRunner
from zohocrmsdk.src.com.zoho.crm.api.exception.sdk_exception import SDKException

from zoho_orm_store import (
    AsyncTokenRepository,
    DatabaseError,
    FileStoreFile,
    SchemaError,
    SQLAlchemyTokenStore,
    TokenRecord,
    TokenRepository,
    UnreadableTokenError,
    export_tokens,
    provision,
    rotate_keys,
)
from zoho_orm_store.cli import app

BLOB = "x'00ff'"

BROKEN = {
    "expiry_time is text": ("expiry_time", "'tomorrow'"),
    "expiry_time is a blob": ("expiry_time", BLOB),
    "updated_at is text": ("updated_at", "'yesterday'"),
    "updated_at has a time zone": ("updated_at", "'2026-01-01T00:00:00+02:00'"),
    "updated_at is a number": ("updated_at", "1700000000"),
    "created_at is text": ("created_at", "'last week'"),
    "created_at is a blob": ("created_at", BLOB),
    "access_token is a blob": ("access_token", BLOB),
    "client_id is a blob": ("client_id", BLOB),
}

broken = pytest.mark.parametrize(("column", "value"), BROKEN.values(), ids=BROKEN)


def numbered(number, **fields):
    return make_token(
        id=str(number),
        user=f"user {number}",
        client_id="c",
        refresh_token=f"1000.refresh.{number}",
        access_token=f"1000.access.{number}",
        **fields,
    )


def ids(tokens):
    return sorted(token.get_id() for token in tokens)


@pytest.fixture
def url(database):
    """A SQLite file with the tokens 1, 2 and 3."""
    with SQLAlchemyTokenStore(database) as store:
        for number in (1, 2, 3):
            store.save_token(numbered(number))
    return database


@pytest.fixture
def change(query):
    """Write a value into the row of the token 2 as another program would."""
    return lambda column, value: query(f"UPDATE oauthtoken SET {column} = {value} WHERE id = '2'")


@pytest.fixture
def repository(url):
    with create_engine(url).begin() as connection:
        yield TokenRepository(connection)


@on_sqlite
class TestARowThatAnotherProgramWrote:
    @broken
    def test_is_an_error_that_names_it_when_it_is_asked_for(self, url, change, column, value):
        change(column, value)
        with SQLAlchemyTokenStore(url) as store:
            for ask in (
                lambda: store.find_token_by_id("2"),
                lambda: store.find_token(make_token(user="user 2")),
                lambda: store.find_token(make_token(id="2")),
                lambda: store.save_token(make_token(id="2", access_token="1000.new")),
            ):
                with pytest.raises(SDKException, match=f"{column} of the token with id '2'") as e:
                    ask()
                cause = e.value.__cause__
                assert isinstance(cause, UnreadableTokenError)
                assert cause.id == "2"
                assert cause.record.user_name == "user 2"
                for shown in (
                    "tomorrow",
                    "yesterday",
                    "last week",
                    "1700000000",
                    "00ff",
                    "access.",
                ):
                    assert shown not in str(e.value)
                    assert shown not in repr(cause.record)
                assert pickle.loads(pickle.dumps(cause)).id == "2"

    @broken
    def test_does_not_keep_the_sdk_from_the_others(self, url, change, caplog, column, value):
        change(column, value)
        with SQLAlchemyTokenStore(url) as store:
            assert ids(store.get_tokens()) == ["1", "3"]
            assert store.find_token_by_id("3") is not None
            store.save_token(numbered(4))
            assert ids(store.get_tokens()) == ["1", "3", "4"]
        logged = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert len(logged) == 2
        assert logged[0].name == "zoho_orm_store"
        assert f"The {column} of the token with id '2' cannot be read" in logged[0].getMessage()

    @broken
    def test_does_not_keep_a_repository_from_the_others(self, url, change, column, value):
        change(column, value)
        with create_engine(url).begin() as connection:
            repository, left_out = TokenRepository(connection), []
            found = repository.list(on_undecryptable=left_out.append)
            streamed = [*repository.stream(on_undecryptable=left_out.append)]
            assert [[record.id for record in found]] * 2 == [["1", "3"], ["1", "3"]]
            assert {record.id for record in streamed} == {"1", "3"}
            assert [error.id for error in left_out] == ["2", "2"]
            assert repository.count() == 3
            with pytest.raises(UnreadableTokenError, match=column):
                repository.list()
            assert repository.delete("2")
            assert len(repository.list()) == 2

    async def test_does_not_keep_an_async_repository_from_the_others(self, url, change):
        change("updated_at", "'yesterday'")
        engine = create_async_engine(url.set(drivername="sqlite+aiosqlite"))
        async with engine.connect() as connection:
            repository, left_out = AsyncTokenRepository(connection), []
            assert len(await repository.list(on_undecryptable=left_out.append)) == 2
            stream = repository.stream(on_undecryptable=left_out.append)
            assert [record.id async for record in stream] == ["1", "3"]
            assert [error.id for error in left_out] == ["2", "2"]
        await engine.dispose()

    @broken
    def test_is_left_alone_by_a_rotation_of_keys(self, url, change, query, column, value):
        change(column, value)
        before = query("SELECT * FROM oauthtoken WHERE id = '2'")
        summary = rotate_keys(url, CIPHER, encrypt_plain_text=True)
        assert (summary.rotated, summary.left) == (2, 1)
        assert [error.id for error in summary.undecryptable] == ["2"]
        assert query("SELECT * FROM oauthtoken WHERE id = '2'") == before

    def test_is_left_out_of_an_export(self, url, change, tmp_path, caplog):
        change("expiry_time", "'tomorrow'")
        assert export_tokens(url, tmp_path / "tokens.txt") == 2
        exported = [found.record.id for found in FileStoreFile(tmp_path / "tokens.txt")]
        assert sorted(exported) == ["1", "3"]
        assert "token with id '2'" in caplog.text

    @broken
    def test_is_shown_by_the_command_line(self, url, change, monkeypatch, column, value):
        change(column, value)
        monkeypatch.setenv("ZOHO_ORM_STORE_URL", url.render_as_string())
        run = CliRunner().invoke
        listed = run(app, ["list"])
        assert [line.split()[0] for line in listed.stdout.splitlines()] == ["ID", "1", "2", "3"]
        assert "1 of them cannot be read. The" in listed.stderr
        assert listed.exit_code == 1
        marks = [json.loads(line) for line in run(app, ["list", "--json"]).stdout.splitlines()]
        assert [each.get("unreadable") for each in marks] == [None, True, None]
        examined = run(app, ["doctor"])
        assert "ok     3 tokens" in examined.stdout
        assert f"WRONG  1 of 3 tokens cannot be read. The {column} of the" in examined.stdout
        shown = run(app, ["show", "2"])
        assert shown.exit_code == 1
        assert "user 2" in shown.stdout
        assert run(app, ["delete", "2", "--yes"]).exit_code == 0
        assert run(app, ["list"]).exit_code == 0

    @pytest.mark.parametrize("value", ["'yesterday'", "1700000000", BLOB, "'1/2/2020'"])
    def test_is_not_idle_while_nobody_knows_when_it_was_saved(self, url, change, query, value):
        change("updated_at", value)
        query("UPDATE oauthtoken SET updated_at = '2020-01-01 00:00:00.000000' WHERE id = '1'")
        with create_engine(url).begin() as connection:
            repository = TokenRepository(connection)
            assert repository.purge(idle=timedelta(days=1), stranded=True) == 1
            assert {record.id for record in repository.stream(on_undecryptable=str)} == {"3"}
            assert repository.count() == 2

    def test_has_no_known_value_where_it_has_an_empty_text(self, url, change, repository):
        for column in ("expiry_time", "created_at", "updated_at", "access_token"):
            change(column, "''")
        assert repository.get("2").user_name == "user 2"
        for column in ("expiry_time", "created_at", "updated_at", "access_token"):
            assert getattr(repository.get("2"), column) is None
        repository.save(TokenRecord(id="2", access_token="a"))
        assert repository.get("2").access_token == "a"
        assert repository.get("2").created_at is not None

    def test_may_have_a_blob_as_its_id(self, url, query):
        query(f"UPDATE oauthtoken SET id = {BLOB} WHERE id = '2'")
        with create_engine(url).begin() as connection:
            left_out = []
            stream = TokenRepository(connection).stream(on_undecryptable=left_out.append)
            assert [record.id for record in stream] == ["1", "3"]
            assert len(left_out) == 1


def test_a_row_may_be_in_a_table_without_types(tmp_path):
    path = tmp_path / "untyped.db"
    provision.upgrade(f"sqlite:///{path}")
    with sqlite3.connect(path) as connection:
        columns = [row[1] for row in connection.execute("PRAGMA table_info(oauthtoken)")]
        connection.execute("DROP TABLE oauthtoken")
        connection.execute(f"CREATE TABLE oauthtoken ({', '.join(columns)})")
        connection.execute("CREATE UNIQUE INDEX one_identity ON oauthtoken (identity)")
    connection.close()
    with SQLAlchemyTokenStore(f"sqlite:///{path}") as store:
        store.save_token(numbered(1, expires_in="1700000000000"))
        with sqlite3.connect(path) as connection:
            connection.execute("UPDATE oauthtoken SET expiry_time = '1700000000001'")
            connection.execute("UPDATE oauthtoken SET updated_at = NULL")
        connection.close()
        assert store.find_token(make_token(id="1")).get_expires_in() == "1700000000001"
        assert ids(store.get_tokens()) == ["1"]


@pytest.mark.parametrize("database", ["mariadb"], indirect=True)
@pytest.mark.parametrize("driver", ["mysql+pymysql", "mysql+asyncmy", "mysql+aiomysql"])
def test_a_time_of_zeros_does_not_keep_others_from_being_listed(url, database, driver, query):
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("SET SESSION sql_mode = ''"))
        connection.execute(text("UPDATE oauthtoken SET updated_at = '0000-00-00' WHERE id = '2'"))
    engine.dispose()
    with SQLAlchemyTokenStore(url.set(drivername=driver)) as store:
        assert {"1", "3"} <= {*ids(store.get_tokens())}
        with store.transaction() as tokens:
            assert tokens.count() == 3
            assert tokens.purge(idle=timedelta(days=1)) == 0


# -- A file that is replaced ----------------------------------------------------------------------

on_each_driver = pytest.mark.parametrize("driver", ["sqlite", "sqlite+aiosqlite"])


def file_with(path, number, *, wal=False):
    """A database with one token."""
    with SQLAlchemyTokenStore(f"sqlite:///{path}") as store:
        store.save_token(numbered(number))
    if wal:
        use_write_ahead_log(path)
    return path


def use_write_ahead_log(path):
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.close()


def stored_in(path):
    with sqlite3.connect(path) as connection:
        found = [row[0] for row in connection.execute("SELECT id FROM oauthtoken ORDER BY id")]
    connection.close()
    return found


@pytest.fixture
def path(tmp_path):
    return file_with(tmp_path / "tokens.db", 1)


@pytest.fixture
def backup(tmp_path):
    return file_with(tmp_path / "backup.db", 2)


class TestAFileThatIsReplaced:
    @on_each_driver
    def test_is_what_the_next_call_works_on(self, path, backup, driver):
        with SQLAlchemyTokenStore(f"{driver}:///{path}") as store:
            assert ids(store.get_tokens()) == ["1"]
            os.replace(backup, path)
            store.save_token(numbered(3))
            assert ids(store.get_tokens()) == ["2", "3"]
        assert stored_in(path) == ["2", "3"]

    @on_each_driver
    def test_may_have_been_deleted(self, path, driver):
        with SQLAlchemyTokenStore(f"{driver}:///{path}") as store:
            for number in (1, 2):
                assert ids(store.get_tokens()) == ([str(number - 1)] if number > 1 else ["1"])
                path.unlink()
                assert store.get_tokens() == []
                path.unlink()
                store.save_token(numbered(number))
        assert stored_in(path) == ["2"]
        assert path.stat().st_mode & 0o777 == 0o600

    def test_that_was_deleted_is_an_error_for_a_store_that_makes_no_tables(self, path):
        with SQLAlchemyTokenStore(f"sqlite:///{path}", create_schema=False) as store:
            assert ids(store.get_tokens()) == ["1"]
            path.unlink()
            for _ in range(2):
                with pytest.raises(SDKException, match="zoho-orm-store upgrade") as raised:
                    store.get_tokens()
                assert isinstance(raised.value.__cause__, SchemaError)

    @pytest.mark.parametrize(
        "query", ["", "?mode=ro&uri=true", "?mode=rw&uri=true", "?mode=rwc&uri=true"]
    )
    def test_may_be_named_by_a_relative_path_or_a_uri(self, path, backup, monkeypatch, query):
        path.rename(path.with_name("to kens.db"))
        monkeypatch.chdir(path.parent)
        name = "file:to%20kens.db" if query else "to kens.db"
        with SQLAlchemyTokenStore(f"sqlite:///{name}{query}") as store:
            assert ids(store.get_tokens()) == ["1"]
            monkeypatch.chdir("/")
            assert ids(store.get_tokens()) == ["1"]
            monkeypatch.chdir(path.parent)
            os.replace(backup, "to kens.db")
            assert ids(store.get_tokens()) == ["2"]

    def test_may_be_behind_a_link(self, path, backup):
        link = path.with_name("link.db")
        link.symlink_to(path)
        with SQLAlchemyTokenStore(f"sqlite:///{link}") as store:
            assert ids(store.get_tokens()) == ["1"]
            link.unlink()
            link.symlink_to(backup)
            assert ids(store.get_tokens()) == ["2"]

    def test_that_only_can_be_read_and_is_gone_is_an_error(self, path):
        with SQLAlchemyTokenStore(f"sqlite:///file:{path}?mode=ro&uri=true") as store:
            assert ids(store.get_tokens()) == ["1"]
            path.unlink()
            with pytest.raises(SDKException, match="unable to open database file"):
                store.get_tokens()
        assert not path.exists()

    @on_each_driver
    def test_is_not_damaged_by_the_log_of_the_file_before(self, path, tmp_path, driver):
        use_write_ahead_log(path)
        with SQLAlchemyTokenStore(f"{driver}:///{path}") as store:
            store.save_token(numbered(3))
            assert ids(store.get_tokens()) == ["1", "3"]
            os.replace(file_with(tmp_path / "backup.db", 2, wal=True), path)
            for _ in range(2):
                with pytest.raises(SDKException, match=r"delete \S+tokens.db-wal and"):
                    store.get_tokens()
                with pytest.raises(SDKException, match="write-ahead log of the file before"):
                    store.save_token(numbered(4))
            for kind in ("wal", "shm"):
                path.with_name(f"tokens.db-{kind}").unlink()
            store.save_token(numbered(5))
            assert ids(store.get_tokens()) == ["2", "5"]
        assert stored_in(path) == ["2", "5"]

    def test_may_bring_a_log_of_its_own(self, path, tmp_path):
        use_write_ahead_log(path)
        other = file_with(tmp_path / "other.db", 2, wal=True)
        with SQLAlchemyTokenStore(f"sqlite:///{path}") as store:
            assert ids(store.get_tokens()) == ["1"]
            writer = sqlite3.connect(other)
            writer.execute("UPDATE oauthtoken SET id = '7'")
            writer.commit()
            shutil.copy(tmp_path / "other.db-wal", tmp_path / "log")
            writer.close()
            os.replace(other, path)
            os.replace(tmp_path / "log", tmp_path / "tokens.db-wal")
            (tmp_path / "tokens.db-shm").unlink()
            assert ids(store.get_tokens()) == ["7"]

    @on_each_driver
    @pytest.mark.parametrize("wal", [False, True], ids=["journal", "log"])
    def test_loses_no_save_that_was_under_way(self, path, tmp_path, driver, wal):
        if wal:
            use_write_ahead_log(path)
        with SQLAlchemyTokenStore(f"{driver}:///{path}") as store:
            assert ids(store.get_tokens()) == ["1"]

            def save_while_replaced():
                with store.transaction() as tokens:
                    tokens.save(TokenRecord(id="3", refresh_token="r"))
                    os.replace(file_with(tmp_path / "backup.db", 2), path)
                    for kind in ("wal", "shm", "journal"):
                        path.with_name(f"tokens.db-{kind}").unlink(missing_ok=True)

            with pytest.raises(DatabaseError, match="was replaced or deleted during") as raised:
                save_while_replaced()
            assert raised.value.retryable
            assert ids(store.get_tokens()) == ["2"]
        record("a SQLite file is replaced during a transaction", driver, 1, "rolled back")

    def test_is_noticed_by_every_thread(self, path, tmp_path):
        saved, failures, stopped = {}, [], threading.Event()
        with SQLAlchemyTokenStore(f"sqlite:///{path}") as store:

            def save(number):
                count = 0
                while not stopped.is_set():
                    count += 1
                    token = numbered(number)
                    token.set_access_token(f"a {count}")
                    try:
                        store.save_token(token)
                        store.find_token_by_id(str(number))
                    except SDKException as error:
                        # A file that is replaced while SQLite opens it may look damaged.
                        if "disk I/O error" not in str(error):
                            failures.append(error)
                    else:
                        saved[number] = f"a {count}"

            threads = [threading.Thread(target=save, args=(number,)) for number in (3, 4, 5)]
            for thread in threads:
                thread.start()
            for _ in range(5):
                stopped.wait(0.1)
                os.replace(file_with(tmp_path / "backup.db", 2), path)
            stopped.wait(0.3)
            stopped.set()
            for thread in threads:
                thread.join()
            assert failures == []
            stored = {n: store.find_token_by_id(str(n)).get_access_token() for n in saved}
            assert stored == saved
        assert stored_in(path) == ["2", "3", "4", "5"]
        record("a SQLite file is replaced while threads save", "pysqlite", 5, "noticed by all")


@pytest.mark.parametrize(
    "name",
    [
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite+aiosqlite:///:memory:",
        "sqlite:///file:tokens?mode=memory&cache=shared&uri=true",
    ],
)
def test_a_database_in_memory_stays(name):
    with SQLAlchemyTokenStore(name) as store:
        store.save_token(numbered(1))
        assert ids(store.get_tokens()) == ["1"]


def test_a_read_that_waited_for_other_threads_ends_in_time(path):
    with SQLAlchemyTokenStore(f"sqlite:///{path}", timeout=1.0) as store:
        assert ids(store.get_tokens()) == ["1"]
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")

        def wait(delay):
            time.sleep(delay)
            started = time.monotonic()
            with pytest.raises(SDKException):
                store.find_token_by_id("1")
            return time.monotonic() - started

        with ThreadPoolExecutor(2) as pool:
            assert max(pool.map(wait, (0, 0.2))) < 1.5
        other.close()
        assert ids(store.get_tokens()) == ["1"]


# -- Many processes -------------------------------------------------------------------------------

SIZES = [
    pytest.param(4, 3, id="4 processes for 3 s"),
    pytest.param(8, 20, id="8 processes for 20 s", marks=pytest.mark.soak),
]


@pytest.mark.parametrize(("number", "seconds"), SIZES)
def test_no_process_starves_beside_others_that_write(path, number, seconds):
    worker, tests = Path(__file__).with_name("sqlite_worker.py"), Path(__file__).parent
    search = os.pathsep.join(
        [*filter(None, [os.environ.get("PYTHONPATH")]), str(tests.parent), str(tests)]
    )
    processes = [
        subprocess.Popen(
            [sys.executable, worker, f"sqlite:///{path}", str(seconds)],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": search},
        )
        for _ in range(number)
    ]
    reports = [json.loads(process.communicate(timeout=90)[0]) for process in processes]
    assert [failure for report in reports for failure in report["failures"]] == []
    assert max(report["longest"] for report in reports) < 2.5
    saves = [report["saves"] for report in reports]
    assert min(saves) > max(saves) / 4
    outcome = "0 failed, nobody waited for 2.5 seconds"
    record("many processes write one SQLite file", "pysqlite", sum(saves), outcome)
