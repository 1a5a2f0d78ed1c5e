"""A network that swallows what is sent, and a server that is gone for a while: rule H8."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial

import pytest
from conftest import comes_true
from relay import Relay
from reliability import record
from sdk_processes import ENVIRONMENT, HERE
from sdk_tokens import FULL, known, make_token

from zoho_orm_store import SQLAlchemyTokenStore
from zoho_orm_store._sdk.conversion import SDKException

DRIVERS = {
    "postgresql": ("postgresql+psycopg", "postgresql+psycopg_async", "postgresql+asyncpg"),
    "mariadb": ("mysql+pymysql", "mysql+asyncmy", "mysql+aiomysql"),
}

ASYNC_DRIVERS = ("psycopg_async", "asyncpg", "asyncmy", "aiomysql")

TIMEOUT = 2
"""Seconds that a call may take. Some drivers know whole seconds only."""

on_servers = pytest.mark.parametrize("database", [*DRIVERS], indirect=True)

in_both_ways = pytest.mark.parametrize(
    ("lose_packets", "database"),
    [
        pytest.param(False, "postgresql", id="nobody answers, postgresql"),
        pytest.param(False, "mariadb", id="nobody answers, mariadb"),
        # The kernel can tell that packets get lost, and libpq can ask it to.
        pytest.param(True, "postgresql", id="packets get lost, postgresql"),
        pytest.param(True, "mariadb", id="packets get lost, mariadb", marks=pytest.mark.soak),
    ],
    indirect=["database"],
)

# SQLAlchemy does not close a connection of psycopg whose set-up was cancelled.
pytestmark = pytest.mark.filterwarnings("ignore:.*was deleted while still open:ResourceWarning")


@pytest.fixture
def relay(database):
    with Relay(database.host, database.port) as relay:
        yield relay


@pytest.fixture
def stores(request, database, relay):
    """A store per driver of the database, with connections through the relay."""
    name = request.node.callspec.params["database"]
    url = database.set(host="127.0.0.1", port=relay.port)
    threads = set(threading.enumerate())
    with ExitStack() as stack:
        yield {
            driver.partition("+")[2]: stack.enter_context(
                SQLAlchemyTokenStore(
                    url.set(drivername=driver), create_schema=False, timeout=TIMEOUT
                )
            )
            for driver in DRIVERS[name]
        }
        relay.refuse()  # What a test has left silent is not to keep the stores from closing.
    gc.collect()  # What was not closed warns here, and not in another test.
    comes_true(lambda: set(threading.enumerate()) <= threads)
    assert {*threading.enumerate()} - threads == set(), "threads are left behind"


class Call:
    """A call in a thread of its own, which may never end."""

    def __init__(self, name, call):
        self.name = name
        self.result = self.error = None
        self.started = time.monotonic()
        self.ended = None
        self._call = call
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        try:
            self.result = self._call()
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            self.error = error
        self.ended = time.monotonic()

    def __str__(self):
        if self.ended is None:
            return f"{self.name}: still waits after {time.monotonic() - self.started:.1f} s"
        outcome = self.error or self.result
        return f"{self.name}: {outcome!s:.250} after {self.ended - self.started:.1f} s"

    def wait_until(self, deadline):
        self._thread.join(max(0, deadline - time.monotonic()))
        return self.ended is not None


def calls_on(stores, **methods):
    """Start calls on all stores at once."""
    return [
        Call(f"{driver} {name}", partial(method, store))
        for driver, store in stores.items()
        for name, method in methods.items()
    ]


def expect(is_right, calls, seconds):
    """Wait until calls have ended, which is to be within some seconds and with the right outcome."""
    deadline = time.monotonic() + seconds
    wrong = [
        str(call)
        for call in calls
        if not (call.wait_until(deadline) and call.ended <= deadline and is_right(call))
    ]
    assert not wrong, "\n".join(wrong)


def failed(call):
    return isinstance(call.error, SDKException)


def succeeded(call):
    return call.error is None


def find(store):
    return store.find_token_by_id("known")


def save(store):
    store.save_token(make_token(id="known", **FULL))


def note(fault, drivers, calls):
    for driver in drivers:
        record(fault, driver, calls, "every call ended within its timeout, the next one worked")


def fill_pools(stores):
    """Let each store open as many connections as it ever does."""
    for store in stores.values():
        save(store)
        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(call, store) for call in [find, save] * 12]:
                done.result()


class TestCalls:
    @in_both_ways
    def test_a_call_in_the_middle_of_silence_ends_in_time_H8(self, stores, relay, lose_packets):
        fill_pools(stores)
        relay.fall_silent(lose_packets=lose_packets)
        expect(failed, calls_on(stores, find=find, save=save), TIMEOUT + 1)
        # The connections that are still in the pool stay silent: none of them may be tried.
        relay.recover()
        expect(succeeded, calls_on(stores, find=find, save=save), 1)
        note("the network falls silent between two calls", stores, 2)

    @on_servers
    def test_a_save_whose_transaction_falls_silent_ends_in_time_H8(self, request, database):
        with ExitStack() as stack:
            relays, stores = [], {}
            for driver in DRIVERS[request.node.callspec.params["database"]]:
                # One relay each, because it counts their messages.
                relay = stack.enter_context(Relay(database.host, database.port))
                url = database.set(drivername=driver, host="127.0.0.1", port=relay.port)
                store = SQLAlchemyTokenStore(url, create_schema=False, timeout=1)
                stores[driver] = stack.enter_context(store)
                stack.callback(relay.refuse)
                relays.append(relay)

            def save_own(store):
                """Each driver a row of its own: a lock is held until the server notices."""
                name = repr(store)
                store.save_token(make_token(id=name, user=name, access_token="a"))

            expect(succeeded, calls_on(stores, save=save_own), 5)
            for relay in relays:
                relay.fall_silent(after=2)
            expect(failed, calls_on(stores, save=save_own), 2)
            for relay in relays:
                relay.recover()
            expect(succeeded, calls_on(stores, save=save_own), 1)
        gc.collect()
        note("the network falls silent in the middle of a transaction", stores, 2)

    @in_both_ways
    def test_silence_while_connecting_ends_in_time_H8(self, stores, relay, lose_packets):
        relay.fall_silent(lose_packets=lose_packets)
        expect(failed, calls_on(stores, find=find, save=save), TIMEOUT + 1)
        relay.recover()
        expect(succeeded, calls_on(stores, find=find, save=save), 2)
        note("the network falls silent while a connection is made", stores, 2)


class TestClose:
    @on_servers
    def test_it_returns_at_once_while_others_wait_in_silence_H8(self, stores, relay):
        fill_pools(stores)
        relay.fall_silent()
        waiting = [call for _ in range(2) for call in calls_on(stores, find=find, save=save)]
        time.sleep(0.3)
        closing = calls_on(stores, close=SQLAlchemyTokenStore.close)
        expect(succeeded, closing, 1)
        is_async = [call for call in waiting if call.name.split()[0] in ASYNC_DRIVERS]
        expect(failed, is_async, 1)
        expect(failed, waiting, TIMEOUT)


@contextmanager
def program(name, *arguments):
    """Run a function of user programs, until it says that it is done."""
    process = subprocess.Popen(
        [sys.executable, str(HERE / "exit_program.py"), name, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
    )
    try:
        assert process.stdout.readline() == "DONE\n", process.communicate()[0]
        yield process
    finally:
        process.kill()
        process.communicate()


class TestExit:
    @pytest.mark.parametrize(
        ("database", "driver"),
        [
            ("sqlite", "sqlite+aiosqlite"),
            ("postgresql", "postgresql+asyncpg"),
            pytest.param("mariadb", "mysql+asyncmy", marks=pytest.mark.soak),
        ],
        indirect=["database"],
    )
    def test_a_call_from_a_finalizer_at_exit_ends_at_once_H8(self, database, driver):
        url = database.set(drivername=driver).render_as_string(hide_password=False)
        with program("call_from_a_finalizer", url) as process:
            try:
                process.wait(2)
            except subprocess.TimeoutExpired:
                pytest.fail("the process did not end")
            assert process.returncode == 0, process.stdout.read()


class TestRefusals:
    @on_servers
    def test_a_save_is_tried_again_until_the_server_is_back_H8(self, stores, relay):
        for store in stores.values():
            save(store)
        relay.refuse()
        calls = calls_on(stores, save=save)
        time.sleep(1)
        assert not [str(call) for call in calls if call.ended]
        relay.listen()
        expect(succeeded, calls, TIMEOUT - 1)
        expect(succeeded, calls_on(stores, find=find), 1)

    @on_servers
    def test_a_find_fails_at_once_H8(self, stores, relay):
        for store in stores.values():
            save(store)
            find(store)
        relay.refuse()
        calls = calls_on(stores, find=find)
        expect(failed, calls, 0.5)
        assert not [str(call) for call in calls if "Cannot connect" not in str(call)]
        relay.listen()
        expect(succeeded, calls_on(stores, find=find), 1)

    @on_servers
    def test_no_save_is_lost_when_the_server_restarts_H8(self, database, stores, relay):
        stop = threading.Event()

        def keep_saving(store, name):
            number = 0
            while not stop.is_set():
                number += 1
                token = make_token(id=name, user=name, access_token=f"a{number}")
                store.save_token(token)
            return number

        with ThreadPoolExecutor(len(stores)) as pool:
            saving = {
                driver: pool.submit(keep_saving, store, driver) for driver, store in stores.items()
            }
            for _ in range(2):
                time.sleep(0.2)
                relay.refuse()
                time.sleep(0.4)
                relay.listen()
            time.sleep(0.3)
            stop.set()
            saved = {driver: done.result() for driver, done in saving.items()}
        with SQLAlchemyTokenStore(database, create_schema=False) as direct:
            stored = {
                driver: known(direct.find_token_by_id(driver))["access_token"] for driver in saved
            }
        assert stored == {driver: f"a{number}" for driver, number in saved.items()}
        for driver, number in saved.items():
            record("every connection is cut, twice, during saves", driver, number, "0 saves lost")
