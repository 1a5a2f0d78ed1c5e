"""Under gevent, where each request is a greenlet: rule H5."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from databases import DATABASES
from reliability import record
from sdk_processes import store_expired
from sdk_tokens import make_token
from wsgi_servers import gunicorn_with_gevent, way_to

from zoho_orm_store import SQLAlchemyTokenStore
from zoho_orm_store.testing import LoopbackZoho

NEEDS = {"postgresql", "mariadb", "gunicorn-gevent"}

DRIVERS = {
    "pysqlite": "sqlite",
    "psycopg": "postgresql",
    "psycopg_async": "postgresql",
    "asyncpg": "postgresql",
    "pymysql": "mariadb",
    "asyncmy": "mariadb",
    "aiomysql": "mariadb",
    "aiosqlite": "sqlite",
}
BY_URL = [f"{driver} by url" for driver in DRIVERS if driver != "aiosqlite"]
BY_ENGINE = ["psycopg by engine", "asyncpg by engine"]
REFUSED = ["aiosqlite by url", "aiosqlite by engine"]

LIVE = {"client_id": "c", "client_secret": "s", "access_token": "a", "expires_in": "4102444800000"}

soak = pytest.mark.soak


@pytest.fixture(scope="module")
def zoho():
    with LoopbackZoho(max_refreshes=None, max_refresh_tokens=None, delay=1) as zoho:
        yield zoho


@pytest.fixture(scope="module")
def databases(provisioned, tmp_path_factory):
    """The URLs of the databases, in which there is a live token with the id "live"."""
    urls = {name: provisioned(name) for name in DATABASES}
    for url in urls.values():
        with SQLAlchemyTokenStore(url) as store:
            store.delete_tokens()
            # Not FULL: the SDK would go on with the API domain that it names.
            store.save_token(make_token(id="live", user="live", **LIVE))
    return urls


SERVERS = {
    "1 worker": (1, ()),
    "2 workers, preloaded": (2, ("--preload",)),
    "2 workers": (2, ()),
    "1 worker, preloaded": (1, ("--preload",)),
}
IN_GATE = (
    "pysqlite by url",
    "psycopg by url",
    "pymysql by url",
    "asyncmy by url",
    "asyncpg by engine",
)


@pytest.fixture(
    scope="module",
    params=[
        "1 worker",
        "2 workers, preloaded",
        pytest.param("2 workers", marks=soak),
        pytest.param("1 worker, preloaded", marks=soak),
    ],
)
def server(request, databases, zoho, tmp_path_factory):
    """A server whose stores were used when it imported the application.

    A preloaded application is imported before gevent patches anything, and before the fork.
    """
    stores = {
        way: way_to(databases[DRIVERS[driver]], driver, kind)
        for way in (*BY_URL, *BY_ENGINE, *REFUSED)
        for driver, kind in [way.split(" by ")]
    }
    workers, options = SERVERS[request.param]
    folder = tmp_path_factory.mktemp("gunicorn")
    with gunicorn_with_gevent(
        *options, workers=workers, zoho=zoho, folder=folder, stores=stores, uses="live"
    ) as server:
        yield server


@pytest.mark.parametrize(
    "way",
    [pytest.param(way, marks=() if way in IN_GATE else soak) for way in (*BY_URL, *BY_ENGINE)],
)
def test_an_expired_token_is_refreshed_once_and_others_go_on_H5(server, databases, zoho, way):
    expired = store_expired(databases[DRIVERS[way.partition(" ")[0]]], zoho)
    zoho.reset_counts()
    with ThreadPoolExecutor(30) as pool:
        calls = [pool.submit(server.get, "/call", store=way, id=expired) for _ in range(12)]
        pings = []
        while not all(call.done() for call in calls) and len(pings) < 100:
            # Several at once, so that every worker gets some.
            pings += [pool.submit(server.get, "/ping") for _ in range(4)]
            time.sleep(0.1)
        answers, pings = ([each.result() for each in sent] for sent in (calls, pings))
    assert [answer.error for answer in answers if answer.error] == []
    assert {answer.answer for answer in answers} == {zoho.user_name().partition(":")[0]}
    assert (zoho.counts.refreshes, zoho.counts.refused) == (1, 0)
    assert len(pings) >= 16
    assert {ping.pid for ping in pings} >= {answer.pid for answer in answers}
    assert max(ping.seconds for ping in pings) < 0.7, "others were blocked"
    record("a token expires under gevent", way.split()[0], len(answers), "refreshed once")


@pytest.mark.parametrize("way", REFUSED)
def test_aiosqlite_is_refused_and_the_message_says_what_to_use_H5(server, way):
    refused = server.get("/refused", store=way)
    # Either the constructor refuses, or the first call does if gevent patched after that.
    message = refused.answer or refused.error
    assert "aiosqlite does not work under gevent" in message
    assert "sqlite:///" in message
    assert refused.seconds < 2
