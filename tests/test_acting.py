"""Starting the SDK before anybody has logged in, and acting as stored users in turn."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import BY_DATABASE, MEMORY, in_memory, on_routes, open_store
from sdk_process import last_names, whoami
from sdk_releases import SWITCHES_FIRST, fails_before
from zohocrmsdk.src.com.zoho.api.authenticator.oauth_token import OAuthToken
from zohocrmsdk.src.com.zoho.api.logger import Logger
from zohocrmsdk.src.com.zoho.crm.api.dc import EUDataCenter, USDataCenter
from zohocrmsdk.src.com.zoho.crm.api.exception import SDKException
from zohocrmsdk.src.com.zoho.crm.api.initializer import Initializer

from zoho_orm_store import ConfigurationError, MemoryTokenStore, RefreshPolicy
from zoho_orm_store._sdk.conversion import record_from

ADA, BOB = "ada@example.com", "bob@example.com"

on_each_database = on_routes(MEMORY, *BY_DATABASE)


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(Initializer, "initializer", None)
    Initializer.LOCAL.init = None
    yield {
        "resource_path": str(tmp_path),
        "logger": Logger.get_instance(Logger.Levels.NOTSET),
    }
    Initializer.LOCAL.init = None


@pytest.fixture
def started(store, zoho, options):
    """A store whose process has started the SDK on an empty table."""
    store.initialize_sdk(zoho.environment(), **options)
    assert zoho.requests == []
    return store


def login(zoho, user=ADA):
    return OAuthToken(
        client_id=zoho.client_id,
        client_secret=zoho.client_secret,
        grant_token=zoho.issue_grant_token(user),
        redirect_url=zoho.redirect_url,
    )


@fails_before((8, 3), SWITCHES_FIRST, since=(6, 0))
@on_each_database
def test_an_empty_table_then_a_login_then_calls(started, zoho):
    assert started.get_tokens() == []
    with started.acting_as(login(zoho)) as token:
        assert whoami() == ADA
    assert token.get_id()
    with started.acting_as(token.get_id()):
        assert last_names()
    with pytest.raises(SDKException, match="Nobody is logged in in this thread"):
        whoami()


@fails_before((8, 3), SWITCHES_FIRST, since=(6, 0))
@on_each_database
def test_threads_act_as_users_of_their_own(started, zoho):
    ids = {}
    for user in (ADA, BOB):
        with started.acting_as(login(zoho, user)) as token:
            ids[user] = token.get_id()
    barrier = threading.Barrier(8)

    def call(number):
        user = (ADA, BOB)[number % 2]
        barrier.wait()
        for _ in range(3):
            with started.acting_as(ids[user]):
                assert whoami() == user

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(call, number) for number in range(8)]:
            done.result()
    (count,) = {len(started.get_tokens())}
    assert count == 2


@fails_before((8, 3), SWITCHES_FIRST)
@in_memory
def test_a_token_whose_user_is_not_known_yet(started, zoho):
    """The SDK names a file after the user, whom it finds out in the middle of the first call."""
    token = OAuthToken(
        client_id=zoho.client_id,
        client_secret=zoho.client_secret,
        refresh_token=zoho.issue_refresh_token(ADA),
    )
    started.save_token(token)
    with started.acting_as(token.get_id()) as acting:
        assert last_names()
        assert acting.get_user_signature().get_name() == zoho.user_name(ADA)


@fails_before((8, 3), SWITCHES_FIRST, since=(6, 0))
@in_memory
def test_blocks_may_stand_in_one_another_and_end_with_errors(started, zoho):
    with started.acting_as(login(zoho, ADA)):
        with pytest.raises(ZeroDivisionError), started.acting_as(login(zoho, BOB)):  # noqa: PT012
            assert whoami() == BOB
            raise ZeroDivisionError
        assert whoami() == ADA


@in_memory
def test_an_unknown_id_is_an_error_before_zoho_is_asked(started, zoho):
    with pytest.raises(SDKException, match="Given Id is invalid"), started.acting_as("nobody"):
        pass
    assert zoho.requests == []


@in_memory
def test_a_login_that_zoho_refuses(started, zoho):
    token = login(zoho)
    token.set_grant_token("1000.spent")
    with pytest.raises(SDKException, match="invalid_code"), started.acting_as(token):
        pass
    assert started.get_tokens() == []
    with pytest.raises(SDKException, match="Nobody is logged in"):
        whoami()


@in_memory
def test_without_initialize_sdk_it_says_so(store, zoho, options):
    with (
        pytest.raises(ConfigurationError, match="Call initialize_sdk"),
        store.acting_as(login(zoho)),
    ):
        pass
    other = MemoryTokenStore()
    other.initialize_sdk(zoho.environment(), **options)
    with (
        pytest.raises(ConfigurationError, match="does not use this store"),
        store.acting_as(login(zoho)),
    ):
        pass


@fails_before((8, 3), SWITCHES_FIRST)
@in_memory
def test_each_token_is_used_at_its_own_data_centre(store, options):
    store.initialize_sdk(USDataCenter.PRODUCTION(), **options)
    ids = {}
    for domain in ("https://www.zohoapis.eu", "https://www.zohoapis.com"):
        token = OAuthToken(
            client_id="c",
            client_secret="s",
            refresh_token=f"r {domain}",
            access_token=f"a {domain}",
            find_user=False,
        )
        token.set_expires_in("4102444800000")
        token.set_api_domain(domain)
        store.save_token(token)
        ids[domain] = token.get_id()
    for domain, environment in (
        ("https://www.zohoapis.eu", EUDataCenter.PRODUCTION()),
        ("https://www.zohoapis.com", USDataCenter.PRODUCTION()),
    ):
        with store.acting_as(ids[domain]) as token:
            assert Initializer.get_initializer().environment.url == environment.url
            assert Initializer.get_initializer().environment.accounts_url == (
                environment.accounts_url
            )
            assert record_from(token).api_domain == domain
    assert Initializer.initializer.environment.url == USDataCenter.PRODUCTION().url


@fails_before((8, 3), SWITCHES_FIRST, since=(6, 0))
@on_each_database
def test_an_access_token_that_is_dead_before_its_hour_is_refreshed(started, zoho):
    token = login(zoho)
    with started.acting_as(token):
        assert whoami() == ADA
    zoho.expire_tokens()
    assert started.expire(token.get_id())
    assert not started.expire("another")
    with started.acting_as(token.get_id()):
        assert whoami() == ADA
    assert zoho.counts.refreshes == 1


@fails_before((8, 3), SWITCHES_FIRST, since=(6, 0))
@on_routes(*BY_DATABASE)
def test_a_token_is_refreshed_ahead_of_its_end(route, route_url, zoho, options):
    """The SDK looks a token up twice, once more for the call itself."""
    policy = RefreshPolicy(ahead=600)
    with open_store(route, route_url, refresh=policy) as store:
        store.initialize_sdk(zoho.environment(), **options)
        zoho.access_token_lifetime = 100
        token = login(zoho)
        with store.acting_as(token):
            assert whoami() == ADA
        zoho.access_token_lifetime = 3600
        zoho.reset_counts()
        before = store.refresh_stats.ahead
        for _ in range(2):
            with store.acting_as(token.get_id()):
                assert whoami() == ADA
        assert zoho.counts.refreshes == 1
        assert (store.refresh_stats.ahead - before, store.refresh_stats.failed) == (1, 0)
