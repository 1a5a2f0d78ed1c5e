"""Under uWSGI, which forks in C after it has imported the application: rule H4."""

from __future__ import annotations

import pytest
from conftest import empty
from reliability import record
from sdk_processes import store_expired
from sdk_tokens import make_token
from wsgi_servers import uwsgi, way_to

from zoho_orm_store import SQLAlchemyTokenStore
from zoho_orm_store.testing import LoopbackZoho

NEEDS = {"postgresql", "mariadb", "uwsgi"}

DRIVERS = {
    "psycopg": "postgresql",
    "asyncpg": "postgresql",
    "pymysql": "mariadb",
    "asyncmy": "mariadb",
}
BY_URL = [f"{driver} by url" for driver in DRIVERS]
BY_ENGINE = [f"{driver} by engine" for driver in DRIVERS]

USERS = [f"user {number}" for number in range(20)]


@pytest.fixture(scope="module")
def zoho():
    with LoopbackZoho(max_refreshes=None, max_refresh_tokens=None, delay=0.3) as zoho:
        yield zoho


@pytest.fixture(scope="module")
def databases(provisioned):
    """The URLs of the databases, in which each user has a token."""
    urls = {name: provisioned(name) for name in set(DRIVERS.values())}
    for url in urls.values():
        empty(url)
        with SQLAlchemyTokenStore(url) as store:
            for user in USERS:
                token = make_token(id=user, user=user, access_token=f"token of {user}")
                token.set_expires_in("4102444800000")
                store.save_token(token)
    return urls


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((), id="without threads"),
        pytest.param(
            ("--enable-threads", "--threads", "2"), id="with threads", marks=pytest.mark.soak
        ),
    ],
)
def server(request, databases, zoho, tmp_path_factory):
    """A server whose stores have connections since before it forked its workers."""
    stores = {
        f"{driver} by {kind}": way_to(databases[name], driver, kind)
        for driver, name in DRIVERS.items()
        for kind in ("url", "engine")
    }
    folder = tmp_path_factory.mktemp("uwsgi")
    with uwsgi(*request.param, zoho=zoho, folder=folder, stores=stores, uses=USERS[0]) as server:
        yield server


@pytest.mark.parametrize("way", [*BY_URL, *BY_ENGINE])
@pytest.mark.parametrize("number", [60, pytest.param(2000, marks=pytest.mark.soak)])
def test_every_answer_is_that_users_H4(server, way, number):
    users = [USERS[n % len(USERS)] for n in range(number)]
    answers = []
    for first in range(0, number, 60):
        answers += server.get_at_once(
            ("/lookups", {"store": way, "user": user, "number": n})
            for n, user in enumerate(users[first : first + 60], first)
        )
    assert [answer.error for answer in answers if answer.error] == []
    mixed_up = [
        (user, found)
        for user, answer in zip(users, answers, strict=True)
        for found in answer.answer
        if found != [user, user, f"token of {user}"]
    ]
    assert mixed_up == []
    assert len({answer.pid for answer in answers}) > 1
    lookups = sum(len(answer.answer) for answer in answers)
    record("uWSGI forks four workers in C", way.split()[0], lookups, "0 of another user")


@pytest.mark.parametrize(
    "way", [*BY_URL, *(pytest.param(way, marks=pytest.mark.soak) for way in BY_ENGINE)]
)
def test_an_expired_token_is_refreshed_once_by_all_workers_H4(server, databases, zoho, way):
    expired = store_expired(databases[DRIVERS[way.partition(" ")[0]]], zoho)
    zoho.reset_counts()
    answers = server.get_at_once([("/call", {"store": way, "id": expired})] * 12)
    assert [answer.error for answer in answers if answer.error] == []
    assert {answer.answer for answer in answers} == {zoho.user_name().partition(":")[0]}
    assert (zoho.counts.refreshes, zoho.counts.refused) == (1, 0)
    assert len({answer.pid for answer in answers}) > 1
    record("a token expires under uWSGI", way.split()[0], len(answers), "refreshed once")
