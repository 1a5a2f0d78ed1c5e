"""Whatever goes wrong, the SDK gets its exception and our error, without a secret: G1, G3, A2."""

from __future__ import annotations

import logging
import threading
import time
import traceback

import pytest
from conftest import BY_DATABASE, on_routes, on_sqlite, open_store
from databases import kill_connections
from freezegun import freeze_time
from reliability import record
from sdk_tokens import FULL, known, make_token, save
from sqlalchemy import create_engine, event
from zohocrmsdk.src.com.zoho.crm.api.exception import SDKException

from zoho_orm_store import DatabaseError, RefreshPolicy, SQLAlchemyTokenStore
from zoho_orm_store._database.errors import translate
from zoho_orm_store.errors import ConfigurationError

SECRETS = {
    "client_secret": "CLIENTSECRET-0123456789",
    "refresh_token": "REFRESHTOKEN-0123456789",
    "access_token": "ACCESSTOKEN-0123456789",
    "grant_token": "GRANTTOKEN-0123456789",
}

on_mariadb = pytest.mark.parametrize("database", ["mariadb"], indirect=True)
on_postgresql = pytest.mark.parametrize("database", ["postgresql"], indirect=True)


def fails(call, caplog):
    """The error behind the SDK's exception, after a look for secrets."""
    caplog.clear()
    with pytest.raises(SDKException) as raised:
        call()
    everything = "".join(traceback.format_exception(raised.value))
    everything += repr(raised.value) + str(raised.value) + caplog.text
    for secret in SECRETS.values():
        assert secret not in everything
    assert raised.value.code == "TOKEN_STORE"
    assert isinstance(raised.value.cause, DatabaseError)
    return raised.value.cause


class TestCharacterSets:
    @pytest.mark.parametrize("driver", ["pymysql", "asyncmy", "aiomysql"])
    @pytest.mark.parametrize(
        ("charset", "user", "message"),
        [
            ("latin1", "Müller 東京", "character set cannot hold a value.*charset=utf8mb4"),
            ("utf8", "\N{GRINNING FACE}", "Incorrect string value"),
        ],
    )
    @on_mariadb
    def test_a_value_that_the_connection_cannot_hold_is_refused_A2(
        self, database, driver, charset, user, message, query, caplog
    ):
        caplog.set_level(logging.DEBUG, "zoho_orm_store")
        url = database.set(drivername=f"mysql+{driver}", query={"charset": charset})
        with SQLAlchemyTokenStore(url) as store:
            error = fails(lambda: save(store, user=user, **SECRETS), caplog)
            assert pytest.raises(DatabaseError, match=message)
            with pytest.raises(DatabaseError, match=message):
                raise error
            assert "was not saved" in caplog.text
            saved = save(store, user="plain", **SECRETS)
            assert known(store.find_token_by_id(saved.get_id()))["user_name"] == "plain"
        assert query("SELECT user_name FROM oauthtoken") == [("plain",)]

    @pytest.mark.parametrize("narrow", ["connection", "column"])
    @on_mariadb
    def test_a_server_that_would_store_question_marks_is_refused_A2(self, database, query, narrow):
        charset = "utf8mb3" if narrow == "connection" else "utf8mb4"
        engine = create_engine(
            database.set(query={"charset": charset}), connect_args={"sql_mode": ""}
        )
        if narrow == "column":
            query("ALTER TABLE oauthtoken MODIFY user_name TEXT CHARACTER SET latin1")
        try:
            with SQLAlchemyTokenStore(engine) as store:
                with pytest.raises(SDKException, match=r"would store '\?\?\?\?'") as raised:
                    save(store, user="東京", access_token="a")
                assert isinstance(raised.value.cause, ConfigurationError)
        finally:
            query(
                "ALTER TABLE oauthtoken MODIFY user_name TEXT "
                "CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"
            )
            engine.dispose()
        assert query("SELECT * FROM oauthtoken") == []

    @on_mariadb
    def test_a_lax_server_with_wide_columns_is_accepted(self, database):
        engine = create_engine(database, connect_args={"sql_mode": ""})
        with SQLAlchemyTokenStore(engine) as store:
            saved = save(store, user="東京 \N{GRINNING FACE}", access_token="a")
            found = store.find_token_by_id(saved.get_id())
            assert known(found) == known(saved)
        engine.dispose()

    @on_postgresql
    def test_a_narrow_connection_to_postgresql_A2(self, database, caplog):
        url = database.update_query_dict({"client_encoding": "latin1"})
        with SQLAlchemyTokenStore(url) as store:
            error = fails(lambda: save(store, user="東京", **SECRETS), caplog)
            assert "character set cannot hold a value" in str(error)


class TestDrivers:
    @pytest.mark.parametrize(
        ("database", "driver"),
        [
            ("mariadb", "mysql+mysqlconnector"),
            ("postgresql", "postgresql+psycopg2"),
        ],
        indirect=["database"],
    )
    def test_other_drivers_live_through_a_lost_connection_G1(self, database, driver):
        with SQLAlchemyTokenStore(database.set(drivername=driver)) as store:
            saved = save(store, **FULL)
            for _ in range(2):
                kill_connections(database)
                assert known(store.find_token_by_id(saved.get_id())) == known(saved)
                kill_connections(database)
                save(store, **FULL | {"access_token": "new"})
                save(store, **FULL)
            assert len(store.get_tokens()) == 1
        record("the server closes every connection", driver, 4, "the next call succeeded")

    @pytest.mark.parametrize("database", ["postgresql", "mariadb"], indirect=True)
    def test_a_connection_that_is_lost_while_it_is_given_back_G1(self, database):
        """The result is there already, and the server rolls back by itself."""
        engine = create_engine(database)
        with SQLAlchemyTokenStore(engine) as store:
            saved = save(store, **FULL)
            losses = []

            @event.listens_for(engine, "rollback")
            def lose(connection):
                losses.append(connection)
                kill_connections(database)

            assert known(store.find_token_by_id(saved.get_id())) == known(saved)
            assert len(store.get_tokens()) == 1
            assert len(losses) == 2
            event.remove(engine, "rollback", lose)
            assert engine.pool.checkedout() == 0
            save(store, **FULL)
        engine.dispose()
        record("a connection is lost while it is given back", database, 2, "the result is returned")

    @pytest.mark.parametrize("error", [KeyError("REFRESHTOKEN-0123456789"), RecursionError("deep")])
    @on_sqlite
    def test_an_exception_of_the_drivers_own_G1(self, database, error, caplog, monkeypatch):
        """An exception class that says nothing, raised in the driver's code."""
        import sqlalchemy.dialects.sqlite.pysqlite as driver

        with SQLAlchemyTokenStore(database) as store:
            store.get_tokens()
            code = compile("def execute(*_):\n    raise error", "driver.py", "exec")
            namespace = {"__name__": driver.__name__, "error": error}
            exec(code, namespace)
            dialect = driver.SQLiteDialect_pysqlite
            monkeypatch.setattr(dialect, "do_execute", namespace["execute"])
            cause = fails(lambda: save(store, user="u", **SECRETS), caplog)
            assert str(cause) == f"{type(error).__name__} was raised while the database was used."
            monkeypatch.undo()
            save(store, user="u", **SECRETS)

    @on_sqlite
    def test_an_exception_of_a_listener_is_the_applications_G1(self, database):
        class OutOfHoursError(Exception):
            pass

        engine = create_engine(database)
        with SQLAlchemyTokenStore(engine) as store:
            store.get_tokens()

            @event.listens_for(engine, "before_cursor_execute")
            def refuse(*_):
                raise OutOfHoursError("come back tomorrow")

            with pytest.raises(OutOfHoursError, match="come back tomorrow"):
                store.get_tokens()
            with pytest.raises(OutOfHoursError):
                save(store, **FULL)
            event.remove(engine, "before_cursor_execute", refuse)
            save(store, **FULL)
        engine.dispose()


class TestMessages:
    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            (
                "Row size too large. The maximum row size for the used table type is 65535.",
                "Row size too large. The maximum row size for the used table type is 65535.",
            ),
            ("Column 'tenant_id' cannot be null", "Column 'tenant_id' cannot be null"),
            ("Data too long for column 'n' at row 1", "Data too long for column 'n' at row 1"),
            ("Duplicate entry 'a@b' for key 'PRIMARY'", "Duplicate entry '…'"),
            ("Duplicate entry 'o' for key 'x' for key 'y'", "Duplicate entry '…'"),
            ("Incorrect string value: '\\xE6' for column 'a'", "Incorrect string value: '…'"),
            (
                "INSERT command denied to user 'app'@'localhost' for table `db`.`oauthtoken`",
                "INSERT command denied to user 'app'@'localhost' for table `db`.`oauthtoken`",
            ),
            ("the server doesn't know", "the server doesn't know"),
            ("an open 'quotation", "an open '…'"),
        ],
    )
    def test_what_is_left_of_a_servers_message_G3(self, text, shown):
        from pymysql.err import OperationalError
        from sqlalchemy.exc import OperationalError as Wrapped

        error = translate(Wrapped("INSERT", {}, OperationalError(9999, text)))
        assert str(error).startswith(f"The database reported OperationalError 9999: {shown}")
        assert "a@b" not in str(error)


class TestStoppedClock:
    """freezegun also stops the monotonic clock. Waiting must end all the same."""

    @on_routes(*BY_DATABASE)
    def test_a_wait_for_another_caller_ends(self, route, route_url):
        policy = RefreshPolicy(lease=30, wait=1)
        with open_store(route, route_url, refresh=policy) as store:
            save(store, **FULL | {"expires_in": "1"})

            def find():
                return store.find_token(make_token(user=FULL["user"]))

            holder = threading.Thread(target=find)
            holder.start()
            holder.join()
            started = time.perf_counter()
            with freeze_time("2026-01-01", ignore=["test_any_error"]):
                assert find() is not None
            assert time.perf_counter() - started < 10

    @on_sqlite
    def test_a_busy_database_is_given_up(self, database):
        blocker = create_engine(database)
        with SQLAlchemyTokenStore(database, timeout=0.3) as store, blocker.connect() as connection:
            store.get_tokens()
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            with freeze_time("2026-01-01"), pytest.raises(SDKException, match="locked"):
                save(store, user="u", access_token="a")
            connection.rollback()
        blocker.dispose()
