"""Callers on the nodes of a MariaDB Galera cluster: rules E4, E6, E7 and one refresh for all.

Each node accepts writes. Of two transactions that conflict, one fails when it commits. A node may
answer a read a little later than another one.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest
import sdk_processes
from galera import galera_cluster
from reliability import record
from sdk_processes import run, store_expired, total
from sdk_tokens import make_token
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from zoho_orm_store import SQLAlchemyTokenStore, provision
from zoho_orm_store._sdk.conversion import SDKException
from zoho_orm_store.testing import LoopbackZoho

NEEDS = {"galera"}

GALERA = "MariaDB Galera"

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cluster():
    with galera_cluster() as nodes:
        provision.upgrade(nodes[0].url)
        yield nodes
        sdk_processes.stop_processes()


@pytest.fixture
def nodes(cluster):
    on_node(cluster[0], "DELETE FROM oauthtoken")
    return cluster


@pytest.fixture
def stores(nodes):
    """A store for each node."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(SQLAlchemyTokenStore(node.url, create_schema=False, refresh=None))
            for node in nodes
        ]


def on_node(node, statement):
    """Execute a statement that sees all that any node has committed before."""
    engine = create_engine(node.url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        connection.execute(text("SET SESSION wsrep_sync_wait = 15"))
        result = connection.execute(text(statement))
        return [tuple(row) for row in result] if result.returns_rows else []


def at_once(calls):
    """Make the calls in threads at the same moment."""
    barrier = threading.Barrier(len(calls))

    def wait_and(call):
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [done.result() for done in [pool.submit(wait_and, call) for call in calls]]


def saving(store, **fields):
    return lambda: store.save_token(make_token(**fields))


def test_one_identity_is_saved_through_all_nodes_at_once_E7(nodes, stores):
    for number in range(20):
        fields = {"user": f"u{number}", "client_id": "c", "refresh_token": f"r{number}"}
        at_once(
            [
                saving(store, **fields, access_token=f"a{n}", redirect_url=f"a{n}")
                for n, store in enumerate(stores * 8)
            ]
        )
    for node in nodes:
        rows = on_node(node, "SELECT user_name, access_token, redirect_url FROM oauthtoken")
        assert sorted(user for user, _, _ in rows) == sorted(f"u{n}" for n in range(20))
        assert all(access_token == redirect_url for _, access_token, redirect_url in rows)
    record("callers save one user through three nodes at once", GALERA, 20 * 24, "one row for each")


def test_a_token_is_saved_with_and_without_its_user_through_different_nodes_E4_E7(nodes, stores):
    rounds = 60
    for number in range(rounds):
        alone = {"client_id": "c", "refresh_token": f"r{number}"}
        with_user = alone | {"user": f"u{number}"}
        if number % 3 == 2:  # The user is known already, and logs in again.
            stores[2].save_token(make_token(**with_user | {"refresh_token": f"before{number}"}))
            on_node(nodes[0], "SELECT 1")
        at_once([saving(stores[number % 2], **alone), saving(stores[1 - number % 2], **with_user)])
    rows = on_node(nodes[2], "SELECT user_name, refresh_token FROM oauthtoken")
    assert sorted(rows) == sorted((f"u{number}", f"r{number}") for number in range(rounds))
    record(
        "nodes save one token with and without its user at once",
        GALERA,
        rounds,
        "one row for each token",
    )


def test_an_expired_token_is_refreshed_once_for_callers_on_all_nodes(nodes, tmp_path):
    rounds, refreshes = 14, []
    with LoopbackZoho(max_refreshes=None) as zoho:
        zoho.delay = 0.15
        for _ in range(rounds):
            before = zoho.counts.refreshes
            expired = store_expired(nodes[0].url, zoho)
            for node in nodes:
                on_node(node, "SELECT 1")
            with ExitStack() as stack:
                workers = []
                for node in nodes:
                    workers += stack.enter_context(
                        sdk_processes.processes(
                            2, node.url, zoho, tmp_path, token={"id": expired}, threads=4
                        )
                    )
                results, failures = run(workers)
            assert failures == []
            assert sum(len(result["calls"]) for result in results) == 24
            assert total(results, "timed_out") == total(results, "skipped") == 0
            refreshes.append(zoho.counts.refreshes - before)
            on_node(nodes[0], "DELETE FROM oauthtoken")
    assert refreshes == [1] * rounds
    record("a token expires for 24 callers on three nodes", GALERA, 24 * rounds, "refreshed once")


class Saver:
    """Saves its own token over and over, and remembers what was saved."""

    def __init__(self, node, name, timeout):
        self.name = name
        self.saved = 0
        self.failures = []
        self.longest = 0.0
        self._store = SQLAlchemyTokenStore(
            node.url, create_schema=False, refresh=None, timeout=timeout
        )
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self):
        self._stopped.set()
        self._thread.join()
        self._store.close()

    def saves(self, more):
        """Wait until so many more saves have succeeded."""
        deadline, before = time.monotonic() + 60, self.saved
        while self.saved < before + more:
            assert time.monotonic() < deadline, f"{self.name} saves nothing: {self.failures[-3:]}"
            time.sleep(0.05)

    def fails(self):
        """Wait until another save has failed."""
        deadline, before = time.monotonic() + 60, len(self.failures)
        while len(self.failures) == before:
            assert time.monotonic() < deadline, f"{self.name} saves on a dead node"
            time.sleep(0.05)

    def _run(self):
        number = 0
        while not self._stopped.is_set():
            number += 1
            token = make_token(user=self.name, refresh_token=self.name, access_token=f"a{number}")
            started = time.monotonic()
            try:
                self._store.save_token(token)
                self.saved = number
            except SDKException as error:
                self.failures.append(str(error))
            except BaseException as error:  # noqa: BLE001 - reported, whatever it is
                self.failures.append(f"UNEXPECTED {error!r}")
            self.longest = max(self.longest, time.monotonic() - started)
            time.sleep(0.02)


@contextmanager
def savers(node, timeout):
    """Three savers on a node."""
    with ExitStack() as stack:
        made = [Saver(node, f"{node.url.port}.{n}", timeout) for n in range(3)]
        for saver in made:
            stack.callback(saver.stop)
        yield made


def test_a_killed_node_joins_again_under_load_E6_E7(nodes):
    first, second, dead = nodes
    with (
        savers(first, timeout=30) as on_first,
        savers(second, timeout=30) as on_second,
        savers(dead, timeout=3) as on_dead,
    ):
        made = [*on_first, *on_second, *on_dead]
        for _ in range(3):
            for saver in made:
                saver.saves(5)
            dead.kill()
            for saver in on_dead:
                saver.fails()
            for saver in (*on_first, *on_second):
                saver.saves(5)
            dead.start(nodes)
        for saver in made:
            saver.saves(5)
    assert [saver.failures for saver in (*on_first, *on_second)] == [[]] * 6
    failures = [failure for saver in on_dead for failure in saver.failures]
    assert [failure for failure in failures if "UNEXPECTED" in failure] == []
    assert max(saver.longest for saver in on_dead) < 6
    for node in nodes:
        rows = dict(on_node(node, "SELECT user_name, access_token FROM oauthtoken"))
        lost = [saver.name for saver in made if int(rows[saver.name][1:]) < saver.saved]
        assert lost == [], "a save that was reported is lost"
    saves = sum(saver.saved for saver in made)
    record("a node is killed three times and joins again, during saves", GALERA, saves, "0 lost")
