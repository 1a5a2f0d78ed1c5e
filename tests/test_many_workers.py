"""One refresh for many workers: real processes, the real SDK, and a Zoho that keeps its limits."""

from __future__ import annotations

import fcntl
import signal
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import gettempdir

import pytest
import sdk_processes
from conftest import on_sqlite
from databases import DATABASES
from reliability import record
from sdk_processes import calls_of, run, store_expired, total

from zoho_orm_store import SQLAlchemyTokenStore
from zoho_orm_store.testing import ACCESS_DENIED, SERVER_ERROR, LoopbackZoho


@pytest.fixture
def zoho():
    with LoopbackZoho(max_refreshes=10) as zoho:
        zoho.delay = 0.15
        yield zoho


@pytest.fixture(scope="module", autouse=True)
def processes_that_end():
    yield
    sdk_processes.stop_processes()


@pytest.fixture
def processes(database, zoho, tmp_path):
    """Makes worker processes, all of them ready to go."""
    return partial(sdk_processes.processes, url=database, zoho=zoho, folder=tmp_path)


@pytest.fixture
def client(zoho):
    return {"client_id": zoho.client_id, "client_secret": zoho.client_secret}


@pytest.fixture
def expired(database, zoho):
    """The id of a stored token that has expired."""
    return store_expired(database, zoho)


@pytest.fixture
def stored(database):
    def stored():
        with SQLAlchemyTokenStore(database, create_schema=False) as store:
            return store.get_tokens()

    return stored


@pytest.fixture
def wait_for_lease(query):
    """Wait until somebody has a lease, and has had the time to ask Zoho."""

    def wait_for_lease():
        until = time.monotonic() + 20
        while not query("SELECT owner FROM oauthtoken_refresh_lease"):
            assert time.monotonic() < until
            time.sleep(0.01)
        time.sleep(0.2)

    return wait_for_lease


class TestThirtyTwoCallers:
    def assert_all_live(self, results, failures):
        assert failures == []
        calls = calls_of(results)
        assert len(calls) == 32
        assert len({id_ for _, id_ in calls}) == 1
        assert max(seconds for seconds, _ in calls) < 5, "somebody has waited for a lease's end"

    def test_an_expired_token_is_refreshed_once(self, database, processes, zoho, expired):
        with processes(4, token={"id": expired}, threads=8) as workers:
            self.assert_all_live(*run(workers))
        assert (zoho.counts.refreshes, zoho.counts.refused) == (1, 0)
        record("a token expires for 32 callers in 4 processes", database, 32, "refreshed once")

    def test_a_cold_start_with_a_refresh_token_is_one_request(
        self, processes, zoho, client, stored
    ):
        token = client | {"refresh_token": zoho.issue_refresh_token()}
        with processes(4, token=token, threads=8) as workers:
            self.assert_all_live(*run(workers))
        assert (zoho.counts.refreshes, zoho.counts.refused) == (1, 0)
        assert len(stored()) == 1

    def test_a_cold_start_with_one_grant_code_is_one_request(self, processes, zoho, client, stored):
        token = client | {
            "grant_token": zoho.issue_grant_token(),
            "redirect_url": zoho.redirect_url,
        }
        with processes(4, token=token, threads=8) as workers:
            self.assert_all_live(*run(workers))
        assert (zoho.counts.exchanges, zoho.counts.refreshes, zoho.counts.refused) == (1, 0, 0)
        assert len(stored()) == 1

    @on_sqlite
    def test_without_coordination_zoho_refuses_most_of_them(self, processes, zoho, expired):
        """What the tests above would see if they could not fail."""
        with processes(4, token={"id": expired}, threads=8, policy=None) as workers:
            _, failures = run(workers)
        assert (zoho.counts.refreshes, zoho.counts.refused) == (10, len(failures))
        assert len(failures) > 10


class TestFailures:
    @pytest.mark.parametrize(
        ("failure", "database"),
        [
            *(("revoked", database) for database in DATABASES),
            ("access denied", "sqlite"),
            ("server error", "sqlite"),
        ],
        indirect=["database"],
    )
    def test_a_refresh_that_fails_is_not_multiplied(
        self, database, processes, zoho, expired, stored, failure
    ):
        if failure == "revoked":
            zoho.revoke(stored()[0].get_refresh_token())
        else:
            zoho.fail(ACCESS_DENIED if failure == "access denied" else SERVER_ERROR, times=None)
        with processes(4, token={"id": expired}, threads=8) as workers:
            started = time.monotonic()
            _, failures = run(workers)
            assert time.monotonic() - started < 8
        assert len(failures) == 32
        assert zoho.counts.refreshes == 0
        # Whoever starts when the others have given up tries once more for itself.
        assert 2 <= zoho.counts.refused <= 8
        record("Zoho refuses or fails for 32 callers", database, 32, "at most 8 requests to Zoho")

    def test_a_killed_owner_is_replaced_by_one(
        self, database, processes, zoho, expired, wait_for_lease
    ):
        lease = 2.0
        policy = {"lease": lease, "wait": 10}
        zoho.delay = 30
        with (
            processes(1, token={"id": expired}, threads=1, policy=policy) as (owner,),
            processes(2, token={"id": expired}, threads=8, policy=policy) as workers,
        ):
            owner.go()
            wait_for_lease()
            for worker in workers:
                worker.go()
            time.sleep(0.3)
            owner.signal(signal.SIGKILL)
            zoho.delay = 0.15
            results = [worker.result() for worker in workers]
        assert [failure for result in results for failure in result["failures"]] == []
        assert zoho.counts.refreshes == 1
        assert (total(results, "acquired"), total(results, "taken_over")) == (1, 1)
        slowest = max(seconds for seconds, _ in calls_of(results))
        assert slowest < lease + 4, "somebody has waited for longer than that lease"
        record("the worker that refreshes is killed", database, 1, "one other took over")

    def test_a_process_that_was_suspended_past_its_lease_does_not_undo_what_came_meanwhile(
        self, database, processes, zoho, expired, stored, wait_for_lease
    ):
        policy = {"lease": 1.0, "wait": 10}
        zoho.delay = 4  # Longer than it takes to see the lease on a busy machine.
        with (
            processes(1, token={"id": expired}, threads=1, policy=policy) as (suspended,),
            processes(1, token={"id": expired}, threads=1, policy=policy) as (worker,),
        ):
            suspended.go()
            wait_for_lease()
            suspended.signal(signal.SIGSTOP)
            zoho.delay = 0.5
            time.sleep(1)
            worker.go()
            assert worker.result()["failures"] == []
            (newer,) = stored()
            suspended.signal(signal.SIGCONT)
            assert suspended.result()["failures"] == []
        assert zoho.counts.refreshes == 2
        assert [token.get_access_token() for token in stored()] == [newer.get_access_token()]
        record(
            "the worker that refreshes is suspended, and saves when others have refreshed",
            database,
            1,
            "the newer token stayed",
        )


soak = pytest.mark.soak

UNUSABLE = 5
"""How many seconds before its end the SDK takes a token for expired."""


def gaps_between_refreshes(zoho):
    at = [request.at for request in zoho.requests if request.kind == "refresh"]
    return [later - earlier for earlier, later in pairwise(at)]


@pytest.fixture
def alone():
    """One such crowd at a time, whatever process of the test run it is of."""
    with Path(gettempdir(), "zoho_orm_store_crowd.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("number", "threads", "usable", "seconds", "database"),
    [
        pytest.param(4, 4, 2, 5, "postgresql", id="16 callers for three lives"),
        *(
            pytest.param(16, 4, 3, 60, name, id=f"64 callers for a minute, {name}", marks=soak)
            for name in DATABASES
        ),
    ],
    indirect=["database"],
)
def test_a_crowd_refreshes_once_in_a_usable_life(
    alone, database, processes, zoho, expired, number, threads, usable, seconds
):
    zoho.max_refreshes = None
    zoho.access_token_lifetime = usable + UNUSABLE
    pause = usable * 2 / 3
    with processes(
        number, token={"id": expired}, threads=threads, seconds=seconds, pause=pause
    ) as workers:
        results, failures = run(workers)
    assert failures == []
    assert zoho.counts.refused == 0
    gaps = gaps_between_refreshes(zoho)
    assert len(gaps) > seconds / (usable + 2)
    assert min(gaps) > usable - 0.5, "a token was refreshed twice in its life"
    assert total(results, "acquired") == len(gaps) + 1
    assert total(results, "timed_out") == total(results, "skipped") == 0
    record(
        "a token expires again and again under load",
        database,
        len(gaps) + 1,
        "refreshed once in each life, 0 calls failed",
    )


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("seconds", "database"),
    [
        (7, "sqlite"),
        *(pytest.param(25, name, marks=soak) for name in DATABASES),
    ],
    indirect=["database"],
)
def test_with_ahead_nobody_ever_waits_or_sees_an_expired_token(processes, zoho, expired, seconds):
    zoho.max_refreshes = None
    zoho.access_token_lifetime = 10
    # From the fourth second of ten on, up to the sixth.
    with processes(
        4, token={"id": expired}, threads=2, seconds=seconds, pause=0.15, policy={"ahead": 7}
    ) as workers:
        results, failures = run(workers)
    assert failures == []
    assert total(results, "ahead") >= seconds // 6
    assert total(results, "ahead") >= total(results, "acquired") - 1
    assert total(results, "waited") <= 8, "but for the first, expired one"
    assert [ended for result in results for _, ended in result["lookups"] if ended] == []
    assert min(gaps_between_refreshes(zoho)) > 2.5
