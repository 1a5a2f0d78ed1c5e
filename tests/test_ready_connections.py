"""The connections that a store of a URL keeps out of its pool, ready for the next read."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from time import sleep

import pytest
from conftest import on_sqlite, statements_counted
from databases import SERVERS, kill_connections
from sdk_tokens import FULL, known, make_token
from sqlalchemy import event
from sqlalchemy.dialects import plugins
from sqlalchemy.engine import CreateEnginePlugin, Engine
from sqlalchemy.pool import NullPool, Pool

from zoho_orm_store import SQLAlchemyTokenStore

CONNECTIONS = 3


@pytest.fixture
def checkouts():
    """How often a connection was taken from any pool."""
    taken = []

    def note(*_):
        taken.append(1)

    event.listen(Pool, "checkout", note)
    yield taken
    event.remove(Pool, "checkout", note)


def stored(database, **options):
    store = SQLAlchemyTokenStore(database, **options)
    token = make_token(**FULL)
    store.save_token(token)
    store.find_token_by_id(token.get_id())
    return store, token


def test_a_lookup_takes_none_from_the_pool_and_is_one_statement(database, checkouts):
    store, token = stored(database)
    with store:
        taken = len(checkouts)
        with statements_counted() as statements:
            assert known(store.find_token_by_id(token.get_id())) == known(token)
        assert (len(statements), len(checkouts)) == (1, taken)


@pytest.mark.parametrize(
    "options", [{"pool_size": 1}, {"pool_recycle": 60}, {"pool_pre_ping": True}]
)
def test_whoever_asks_something_of_the_pool_gets_it_at_each_lookup(database, checkouts, options):
    store, token = stored(database, engine_options=options)
    with store:
        taken = len(checkouts)
        store.find_token_by_id(token.get_id())
        assert len(checkouts) == taken + 1


class PluginWithoutPool(CreateEnginePlugin):
    def __init__(self, url, options):
        options["poolclass"] = NullPool
        for name in ("pool_size", "max_overflow", "pool_timeout"):
            options.pop(name, None)

    def update_url(self, url):
        return url.difference_update_query(["plugin"])


def test_a_plugin_of_the_url_may_bring_another_pool(database):
    plugins.register("without_pool", __name__, PluginWithoutPool.__name__)
    store, token = stored(database.update_query_dict({"plugin": "without_pool"}))
    with store:
        assert known(store.find_token_by_id(token.get_id())) == known(token)


@pytest.mark.parametrize("database", SERVERS, indirect=True)
def test_a_thread_that_waits_at_the_pool_gets_the_first_that_is_free(database):
    """None is kept from it, although the pool does not know of those that are ready."""
    store, token = stored(database)
    entered = threading.Barrier(CONNECTIONS + 1)
    may_end = [threading.Event() for _ in range(CONNECTIONS)]

    def read_slowly(connection, event):
        entered.wait(10)
        event.wait(10)

    with store, ThreadPoolExecutor(CONNECTIONS + 1) as pool:
        slow = [pool.submit(store._database.read, read_slowly, each) for each in may_end]
        entered.wait(10)
        waiting = pool.submit(store.find_token_by_id, token.get_id())
        sleep(0.3)
        assert not waiting.done()
        may_end[0].set()
        assert known(waiting.result(5)) == known(token)
        assert not slow[1].done()
        for each in may_end:
            each.set()


def test_those_that_a_server_has_closed_are_replaced_in_one_call(database):
    store, token = stored(database)
    with store:
        if database.get_backend_name() != "sqlite":
            kill_connections(database)
        for _ in range(CONNECTIONS):
            assert known(store.find_token_by_id(token.get_id())) == known(token)


def test_all_go_back_to_the_pool_after_a_failure(database):
    """The pool knows which ones were lost together with the one that failed."""

    def fail(connection):
        raise LookupError

    store, _ = stored(database)
    with store:
        assert store._database._ready
        with pytest.raises(LookupError):
            store._database.read(fail)
        assert store._database._ready == []


@on_sqlite
def test_one_in_a_transaction_is_not_kept(database):
    """It would see no later change, and keep others from writing."""

    def begin(connection, *_):
        connection.exec_driver_sql("BEGIN")

    store, token = stored(database)
    with store:
        store._database.read(begin)
        assert store._database._ready == []
        token.set_access_token("changed")
        store.save_token(token)
        assert store.find_token_by_id(token.get_id()).get_access_token() == "changed"


def test_the_events_of_all_engines_fire_for_each_lookup(database):
    """As monitoring installs them."""
    store, token = stored(database)
    seen = []

    def note(connection, cursor, statement, *_):
        seen.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        with store:
            store.find_token_by_id(token.get_id())
            store.find_token_by_id(token.get_id())
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert len(seen) == 2
