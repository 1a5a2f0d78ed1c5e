"""A user who is stored logs in anew: rule B11, through the real SDK."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from conftest import BY_DATABASE, MEMORY, in_memory, on_routes, open_store
from reliability import record
from sdk_tokens import known, make_token
from zohocrmsdk.src.com.zoho.api.authenticator.oauth_token import OAuthToken
from zohocrmsdk.src.com.zoho.crm.api.exception import SDKException
from zohocrmsdk.src.com.zoho.crm.api.initializer import Initializer
from zohocrmsdk.src.com.zoho.crm.api.user_signature import UserSignature

from zoho_orm_store._sdk.conversion import record_from
from zoho_orm_store.testing import SERVER_ERROR

USER = "tenant 7"

on_each_database = on_routes(MEMORY, *BY_DATABASE)


@pytest.fixture
def log_in(log_in):
    """Start the SDK for the tenant with a grant code, and return the token."""
    return partial(log_in, user=USER)


def token_requests(zoho):
    return [each.kind for each in zoho.requests if each.kind != "api"]


def spent_code(zoho):
    return "1000.spent.code"


class TestRules:
    @in_memory
    def test_a_known_user_with_another_grant_is_not_found_B11(self, store):
        store.save_token(make_token(user="u", refresh_token="r", grant_token="old"))
        for grant in ("new", "o'ther"):
            asked = make_token(user="u", grant_token=grant)
            before = known(asked)
            assert store.find_token(asked) is None
            assert known(asked) == before

    @in_memory
    def test_a_row_without_a_grant_is_a_login_of_another_kind_B11(self, store):
        store.save_token(make_token(user="u", refresh_token="r"))
        assert store.find_token(make_token(user="u", grant_token="new")) is None

    @in_memory
    def test_the_same_grant_finds_the_row_B4(self, store):
        store.save_token(make_token(user="u", refresh_token="r", grant_token="g"))
        assert store.find_token(make_token(user="u", grant_token="g")).get_refresh_token() == "r"
        assert store.find_token(make_token(grant_token="g")).get_refresh_token() == "r"

    @in_memory
    def test_an_id_decides_alone_B9(self, store):
        saved = make_token(user="u", refresh_token="r", grant_token="old")
        store.save_token(saved)
        asked = make_token(id=saved.get_id(), user="u", grant_token="new")
        assert store.find_token(asked).get_refresh_token() == "r"

    @in_memory
    def test_the_save_updates_the_users_row_B11(self, store):
        store.save_token(make_token(user="u", refresh_token="dead", grant_token="old"))
        new = make_token(user="u", refresh_token="new", grant_token="new", access_token="a")
        store.save_token(new)
        (stored,) = map(record_from, store.get_tokens())
        assert (stored.refresh_token, stored.grant_token) == ("new", "new")


@on_each_database
def test_the_new_code_is_exchanged_once_and_replaces_the_dead_token_B11(store, zoho, log_in):
    first = log_in(store, zoho.issue_grant_token())
    zoho.revoke(first.get_refresh_token())
    zoho.reset_counts()
    second = log_in(store, zoho.issue_grant_token())
    assert second.get_id() == first.get_id()
    assert second.get_refresh_token() != first.get_refresh_token()
    assert token_requests(zoho) == ["exchange"]
    log_in(store, second.get_grant_token())
    assert token_requests(zoho) == ["exchange"]
    (stored,) = map(record_from, store.get_tokens())
    assert stored.refresh_token == second.get_refresh_token()
    assert zoho.is_live(stored.access_token)


@on_each_database
def test_an_old_code_falls_back_to_what_is_stored_B11(store, zoho, log_in):
    first = log_in(store, zoho.issue_grant_token())
    (before,) = map(record_from, store.get_tokens())
    zoho.reset_counts()
    again = log_in(store, spent_code(zoho))
    assert again.get_id() == first.get_id()
    assert again.get_access_token() == before.access_token
    (after,) = map(record_from, store.get_tokens())
    assert after.grant_token == before.grant_token
    assert (after.refresh_token, after.access_token, after.expiry_time) == (
        before.refresh_token,
        before.access_token,
        before.expiry_time,
    )
    assert token_requests(zoho) == ["exchange"]


@on_each_database
def test_an_expired_token_that_is_fallen_back_on_is_refreshed_B11(store, zoho, log_in):
    first = log_in(store, zoho.issue_grant_token())
    store.save_token(make_token(id=first.get_id(), access_token="gone", expires_in="1"))
    zoho.reset_counts()
    again = log_in(store, spent_code(zoho))
    assert token_requests(zoho) == ["exchange", "refresh"]
    assert zoho.is_live(again.get_access_token())
    (stored,) = map(record_from, store.get_tokens())
    assert stored.access_token == again.get_access_token()


@in_memory
def test_without_a_usable_stored_token_the_failure_is_the_sdks_B11(store, zoho, log_in):
    first = log_in(store, zoho.issue_grant_token())
    zoho.revoke(first.get_refresh_token())
    store.save_token(make_token(id=first.get_id(), access_token="gone", expires_in="1"))
    with pytest.raises(SDKException):
        log_in(store, spent_code(zoho))


@in_memory
def test_zoho_out_of_reach_falls_back_too_B11(store, zoho, log_in):
    first = log_in(store, zoho.issue_grant_token())
    zoho.fail(SERVER_ERROR, times=1)
    again = log_in(store, zoho.issue_grant_token())
    assert again.get_access_token() == first.get_access_token()


@pytest.mark.parametrize("is_spent", [False, True], ids=["new code", "spent code"])
@on_routes(*BY_DATABASE)
def test_many_callers_with_one_code_at_once_B11(route, route_url, zoho, tmp_path, is_spent, log_in):
    """Of a new code, one exchange; of a spent one, a few that fail, and everybody goes on."""
    with open_store(route, route_url) as store:
        first = log_in(store, zoho.issue_grant_token())
        zoho.reset_counts()
        zoho.delay = 0.1
        code = spent_code(zoho) if is_spent else zoho.issue_grant_token()
        barrier = threading.Barrier(8)

        def call():
            token = OAuthToken(
                client_id=zoho.client_id,
                client_secret=zoho.client_secret,
                grant_token=code,
                redirect_url=zoho.redirect_url,
                user_signature=UserSignature(USER),
            )
            Initializer.switch_user(environment=zoho.environment(), token=token)
            barrier.wait()
            started = time.monotonic()
            access_token = token.get_token()
            assert time.monotonic() - started < 5
            return access_token

        with ThreadPoolExecutor(8) as pool:
            tokens = {done.result() for done in [pool.submit(call) for _ in range(8)]}
        (stored,) = map(record_from, store.get_tokens())
        assert tokens == {stored.access_token}
        assert stored.id == first.get_id()
        assert (stored.access_token == first.get_access_token()) == is_spent
        assert 1 <= token_requests(zoho).count("exchange") <= (3 if is_spent else 1)
        assert token_requests(zoho).count("refresh") == 0
    grant = "spent" if is_spent else "new"
    outcome = "the stored token served all" if is_spent else "exchanged once"
    record(f"8 callers bring a {grant} grant token at once", route.driver, 8, outcome)
