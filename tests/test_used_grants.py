"""A used grant code is not a password: rule B12, through the real SDK."""

from __future__ import annotations

import threading

import pytest
import sdk_process
from conftest import BY_DATABASE, MEMORY, in_memory, on_routes, open_store
from sdk_releases import SWITCHES_FIRST, fails_before
from sdk_tokens import make_token
from zohocrmsdk.src.com.zoho.api.authenticator.oauth_token import OAuthToken
from zohocrmsdk.src.com.zoho.crm.api.exception import SDKException

from zoho_orm_store import MemoryTokenStore
from zoho_orm_store._sdk.conversion import record_from
from zoho_orm_store.errors import ConfigurationError

on_each_database = on_routes(MEMORY, *BY_DATABASE)


@pytest.fixture
def forgetful(route, route_url):
    with open_store(route, route_url, used_grants="forget") as store:
        yield store


def stored(store):
    return [*map(record_from, store.get_tokens())]


class TestRules:
    @in_memory
    @pytest.mark.parametrize("known", ["access_token", "refresh_token"])
    def test_an_exchanged_code_is_not_stored_B12(self, forgetful, known):
        forgetful.save_token(make_token(grant_token="g", **{known: "x"}))
        (record,) = stored(forgetful)
        assert (record.grant_token, getattr(record, known)) == (None, "x")
        assert forgetful.find_token(make_token(grant_token="g")) is None

    @in_memory
    def test_a_code_that_is_not_exchanged_yet_finds_its_row_B12(self, forgetful):
        token = make_token(grant_token="g", user="u")
        forgetful.save_token(token)
        assert forgetful.find_token(make_token(grant_token="g")).get_id() == token.get_id()
        exchanged = make_token(grant_token="g", user="u", refresh_token="r", access_token="a")
        forgetful.save_token(exchanged)
        assert exchanged.get_id() == token.get_id()
        assert [record.grant_token for record in stored(forgetful)] == [None]

    @in_memory
    def test_a_row_known_by_its_code_alone_becomes_the_tokens_own_B12(self, forgetful):
        forgetful.save_token(make_token(grant_token="g"))
        forgetful.save_token(make_token(grant_token="g", access_token="a"))
        forgetful.save_token(make_token(access_token="a", expires_in="7"))
        (record,) = stored(forgetful)
        assert (record.access_token, record.grant_token) == ("a", None)

    @in_memory
    def test_two_logins_of_a_user_are_one_row_B12(self, forgetful):
        for number in "12":
            forgetful.save_token(
                make_token(user="u", grant_token=f"g{number}", refresh_token=f"r{number}")
            )
        (record,) = stored(forgetful)
        assert (record.refresh_token, record.grant_token) == ("r2", None)

    @on_routes(*BY_DATABASE)
    def test_a_row_that_was_saved_before_the_option_is_not_found_B12(self, route, route_url):
        with open_store(route, route_url) as before:
            before.save_token(make_token(grant_token="g", refresh_token="r"))
        with open_store(route, route_url, used_grants="forget") as store:
            assert store.find_token(make_token(grant_token="g")) is None
            assert store.find_token(make_token(refresh_token="r")) is not None
            store.save_token(make_token(refresh_token="r", access_token="a"))
            assert [record.grant_token for record in stored(store)] == [None]

    @in_memory
    def test_by_default_a_code_finds_its_token_B4(self, store):
        store.save_token(make_token(grant_token="g", refresh_token="r"))
        assert store.find_token(make_token(grant_token="g")).get_refresh_token() == "r"

    def test_another_word_is_refused(self):
        with pytest.raises(ConfigurationError, match="'find' or 'forget', not 'keep'"):
            MemoryTokenStore(used_grants="keep")


@on_each_database
def test_a_replayed_login_is_refused_by_zoho_B12(forgetful, zoho, log_in):
    code = zoho.issue_grant_token()
    log_in(forgetful, code)
    zoho.reset_counts()
    with pytest.raises(SDKException):
        log_in(forgetful, code)
    assert [each.kind for each in zoho.requests] == ["exchange"]
    assert len(stored(forgetful)) == 1


@on_each_database
def test_not_even_a_known_user_gets_in_with_a_used_code_B12(forgetful, zoho, log_in):
    code = zoho.issue_grant_token()
    log_in(forgetful, code, "tenant 7")
    (before,) = stored(forgetful)
    with pytest.raises(SDKException):
        log_in(forgetful, code, "tenant 7")
    with pytest.raises(SDKException):
        log_in(forgetful, "1000.another", "tenant 7")
    assert stored(forgetful) == [before]


@on_each_database
def test_the_next_real_login_is_the_users_B12(forgetful, zoho, log_in):
    first = log_in(forgetful, zoho.issue_grant_token(), "tenant 7")
    second = log_in(forgetful, zoho.issue_grant_token(), "tenant 7")
    assert first.get_id() == second.get_id()
    (record,) = stored(forgetful)
    assert record.refresh_token == second.get_refresh_token()
    assert zoho.counts.exchanges == 2


@fails_before((8, 3), SWITCHES_FIRST, since=(6, 0))
@on_routes(*BY_DATABASE)
def test_of_a_code_sent_twice_at_once_one_wins_B12(forgetful, zoho):
    """A browser may repeat a request: one login, one refusal, one row."""
    zoho.delay = 0.1
    code = zoho.issue_grant_token()
    forgetful.initialize_sdk(zoho.environment())
    barrier, outcomes = threading.Barrier(2), []

    def visit():
        token = OAuthToken(
            client_id=zoho.client_id,
            client_secret=zoho.client_secret,
            grant_token=code,
            redirect_url=zoho.redirect_url,
        )
        barrier.wait()
        try:
            with forgetful.acting_as(token):
                outcomes.append(sdk_process.whoami())
        except SDKException:
            outcomes.append(None)

    threads = [threading.Thread(target=visit) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(bool, outcomes)) == [False, True]
    assert len(stored(forgetful)) == 1
