"""What real failures of real servers mean, through each driver: rules G1 to G3."""

from __future__ import annotations

import asyncio

import pytest
from conftest import empty
from databases import DATABASES
from pymysql.err import OperationalError
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from zoho_orm_store import DatabaseError, DatabaseTimeoutError, SchemaError
from zoho_orm_store._database.drivers import connect_args, redacted_url
from zoho_orm_store._database.errors import connect_error, translate

DRIVERS = {
    "postgresql+psycopg": "postgresql",
    "postgresql+psycopg_async": "postgresql",
    "postgresql+asyncpg": "postgresql",
    "mysql+pymysql": "mariadb",
    "mysql+asyncmy": "mariadb",
    "mysql+aiomysql": "mariadb",
}
INSERT = (
    "INSERT INTO oauthtoken (id, identity, refresh_token, created_at, updated_at) "
    "VALUES ('{id}', '{id}', 's3cret', '2026-01-01', '2026-01-01')"
)
LOCK = "SELECT id FROM oauthtoken WHERE id = '{id}' FOR UPDATE"
IMPATIENT = {
    "postgresql": "SET lock_timeout = '200ms'",
    "mariadb": "SET innodb_lock_wait_timeout = 1",
}


@pytest.fixture(
    params=[pytest.param((name, driver), id=driver) for driver, name in DRIVERS.items()]
)
def server(request, provisioned):
    name, driver = request.param
    url = provisioned(name)
    empty(url)
    return name, url.set(drivername=driver)


@pytest.fixture
def fail(server):
    """Run statements in two connections in turn, and say what the failure means."""
    _, url = server

    def sync(steps):
        engine = create_engine(url)
        try:
            with engine.connect() as one, engine.connect() as two:
                return in_turn(one, two, steps)
        finally:
            engine.dispose()

    async def asynchronous(steps):
        engine = create_async_engine(url)
        try:
            async with engine.connect() as one, engine.connect() as two:
                return await one.run_sync(lambda first: in_turn(first, two.sync_connection, steps))
        finally:
            await engine.dispose()

    def in_turn(one, two, steps):
        try:
            for number, step in steps:
                connection = (one, two)[number]
                connection.commit() if step == "COMMIT" else connection.execute(text(step))
        except Exception as error:  # noqa: BLE001 - whatever the driver raises
            return translate(error)
        raise AssertionError("Nothing failed.")

    is_sync = url.drivername in ("postgresql+psycopg", "mysql+pymysql")
    return lambda *steps: sync(steps) if is_sync else asyncio.run(asynchronous(steps))


def test_a_missing_table(fail):
    failure = fail((0, "SELECT * FROM nowhere"))
    assert isinstance(failure, SchemaError)
    assert "nowhere" in str(failure)
    assert "exist" in str(failure)


def test_a_missing_column(fail):
    assert isinstance(fail((0, "SELECT nothing FROM oauthtoken")), SchemaError)


def test_a_row_of_the_same_key_is_worth_another_try(fail):
    failure = fail((0, INSERT.format(id="hidden")), (0, INSERT.format(id="hidden")))
    assert failure.retryable
    assert "hidden" not in str(failure)
    assert "s3cret" not in str(failure)


def test_a_row_that_another_holds_is_worth_another_try(fail, server):
    failure = fail(
        (0, INSERT.format(id="1")),
        (0, "COMMIT"),
        (1, IMPATIENT[server[0]]),
        (0, LOCK.format(id="1")),
        (1, LOCK.format(id="1")),
    )
    assert isinstance(failure, DatabaseError)
    assert failure.retryable


def test_what_is_not_understood_is_not_tried_again(fail):
    failure = fail((0, "SELEC 's3cret'"))
    assert type(failure) is DatabaseError
    assert not failure.retryable
    assert "s3cret" not in str(failure)


def test_a_busy_sqlite_file_is_worth_another_try(tmp_path):
    url = f"sqlite:///{tmp_path / 'busy.db'}"
    one, two = create_engine(url), create_engine(url, connect_args={"timeout": 0.05})
    with one.connect() as first, two.connect() as second:
        first.execute(text("CREATE TABLE t (x)"))
        first.execute(text("BEGIN IMMEDIATE"))
        with pytest.raises(Exception, match="locked") as raised:
            second.execute(text("BEGIN IMMEDIATE"))
        assert translate(raised.value).retryable
    one.dispose()
    two.dispose()


def test_an_exhausted_pool_says_what_to_change(tmp_path):
    engine = create_engine(
        f"sqlite:///{tmp_path / 'pool.db'}", pool_size=1, max_overflow=0, pool_timeout=0.05
    )
    with engine.connect():
        with pytest.raises(Exception, match="QueuePool") as raised:
            engine.connect()
        failure = connect_error(raised.value, engine.url)
    assert isinstance(failure, DatabaseTimeoutError)
    assert "pool_size" in str(failure)
    engine.dispose()


@pytest.mark.parametrize("code", [2002, 2003])
def test_a_save_waits_for_a_mysql_server_that_restarts_whatever_the_drivers_code(code):
    """PyMySQL says 2003, and mysqlclient 2002."""
    url, error = make_url("mysql+mysqldb://u@h/d"), OperationalError(code, "Can't connect")
    assert connect_error(error, url, wait_for_server=True).retryable
    assert not connect_error(error, url).retryable


@pytest.mark.parametrize("driver", ["pymysql", "mysqldb"])
def test_drivers_that_wait_for_ever_by_themselves_get_a_limit_H8(driver):
    arguments = connect_args(make_url(f"mysql+{driver}://u@h/d"), driver, 7.4)
    limits = {name: value for name, value in arguments.items() if "timeout" in name}
    assert limits == dict.fromkeys(("connect_timeout", "read_timeout", "write_timeout"), 7)


@pytest.mark.parametrize("password", ["p", "s3cret", "a.*b", "'"])
def test_a_password_is_hidden_and_nothing_else_G3(password):
    url = make_url("postgresql://u@h/d").set(password=password)
    failure = connect_error(OSError(f"no password {password} supplied"), url)
    assert f" {password} " not in str(failure)
    assert "no password *** supplied" in str(failure)


def test_a_url_is_shown_without_what_may_be_secret_G3():
    url = make_url("postgresql+psycopg://u:s3cret@h:5/d?sslpassword=s3cret")
    assert redacted_url(url) == "postgresql+psycopg://u:***@h:5/d"


def test_the_databases_of_these_tests_are_those_of_all_others():
    assert set(DRIVERS.values()) == set(DATABASES) - {"sqlite", "mysql"}
