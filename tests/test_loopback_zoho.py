"""`LoopbackZoho` keeps Zoho's rules, misbehaves on demand, and satisfies the real SDK."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from typer.testing import CliRunner

from zoho_orm_store.cli import app
from zoho_orm_store.testing import (
    ACCESS_DENIED,
    ANSWER_LOST,
    CONNECTION_DROPPED,
    DEFAULT_USER,
    SERVER_ERROR,
    Counts,
    Failure,
    LoopbackZoho,
)

TOKEN = re.compile(r"1000\.[0-9a-f]{32}\.[0-9a-f]{32}")


def exchange(zoho, grant_token, **changes):
    form = {
        "grant_type": "authorization_code",
        "client_id": zoho.client_id,
        "client_secret": zoho.client_secret,
        "redirect_uri": zoho.redirect_url,
        "code": grant_token,
    }
    return requests.post(zoho.accounts_url, data=form | changes, timeout=10)


def refresh(zoho, refresh_token, **changes):
    form = {
        "grant_type": "refresh_token",
        "client_id": zoho.client_id,
        "client_secret": zoho.client_secret,
        "refresh_token": refresh_token,
    }
    return requests.post(zoho.accounts_url, data=form | changes, timeout=10)


def api(zoho, path, access_token):
    headers = {"Authorization": f"Zoho-oauthtoken {access_token}"}
    return requests.get(zoho.url + path, headers=headers, timeout=10)


class TestTokens:
    def test_a_grant_token_buys_a_refresh_and_an_access_token(self, zoho):
        answer = exchange(zoho, zoho.issue_grant_token()).json()
        assert TOKEN.fullmatch(answer.pop("access_token"))
        assert TOKEN.fullmatch(answer.pop("refresh_token"))
        assert answer == {"api_domain": zoho.url, "token_type": "Bearer", "expires_in": 3600}

    def test_a_refresh_makes_an_access_token_and_keeps_the_refresh_token(self, zoho):
        refresh_token = zoho.issue_refresh_token()
        answer = refresh(zoho, refresh_token).json()
        assert answer.keys() == {"access_token", "api_domain", "token_type", "expires_in"}
        assert zoho.is_live(answer["access_token"])
        assert zoho.is_live(refresh_token)

    def test_parameters_may_stand_in_the_query(self, zoho):
        query = {
            "grant_type": "refresh_token",
            "client_id": zoho.client_id,
            "client_secret": zoho.client_secret,
            "refresh_token": zoho.issue_refresh_token(),
        }
        answer = requests.post(zoho.accounts_url, params=query, timeout=10)
        assert "access_token" in answer.json()
        assert query["refresh_token"] not in repr(zoho.requests)

    @pytest.mark.parametrize(
        ("changes", "error"),
        [
            ({"client_id": "1000.NOBODY"}, "invalid_client"),
            ({"client_secret": "wrong"}, "invalid_client_secret"),
            ({"redirect_uri": "https://elsewhere.example.com/"}, "invalid_redirect_uri"),
            ({"code": "1000.00.00"}, "invalid_code"),
        ],
    )
    def test_an_exchange_is_refused_with_zohos_error_and_status_200(self, zoho, changes, error):
        code = zoho.issue_grant_token()
        answer = exchange(zoho, code, **changes)
        assert (answer.status_code, answer.json()) == (200, {"error": error})
        assert "access_token" in exchange(zoho, code).json(), "a refusal uses no grant token up"

    def test_a_self_client_leaves_the_redirect_url_out(self, zoho):
        assert "access_token" in exchange(zoho, zoho.issue_grant_token(), redirect_uri=None).json()

    def test_another_clients_refresh_token_is_an_invalid_code(self, zoho):
        other = zoho.issue_refresh_token(client=zoho.add_client())
        assert refresh(zoho, other).json() == {"error": "invalid_code"}

    def test_an_unknown_grant_type_is_refused(self, zoho):
        assert refresh(zoho, "", grant_type="password").status_code == 400
        assert zoho.requests[-1].kind == "unknown"

    def test_the_lifetime_may_change_while_running(self, zoho):
        refresh_token = zoho.issue_refresh_token()
        old = refresh(zoho, refresh_token).json()["access_token"]
        zoho.access_token_lifetime = 7
        answer = refresh(zoho, refresh_token).json()
        assert answer["expires_in"] == 7
        zoho.advance(8)
        assert not zoho.is_live(answer["access_token"])
        assert zoho.is_live(old)

    def test_an_access_token_needs_a_live_refresh_token(self, zoho):
        with pytest.raises(ValueError, match="live refresh token"):
            zoho.issue_access_token("1000.00.00")


class TestLimits:
    def test_a_grant_token_is_used_once(self, zoho):
        code = zoho.issue_grant_token()
        exchange(zoho, code)
        assert exchange(zoho, code).json() == {"error": "invalid_code"}

    def test_a_grant_token_ends(self, zoho):
        code = zoho.issue_grant_token()
        zoho.advance(60)
        assert exchange(zoho, code).json() == {"error": "invalid_code"}

    def test_a_grant_token_may_live_forever(self):
        with LoopbackZoho(grant_token_lifetime=None) as zoho:
            code = zoho.issue_grant_token()
            zoho.advance(1e9)
            assert "access_token" in exchange(zoho, code).json()

    def test_the_eleventh_refresh_in_ten_minutes_is_denied(self, zoho):
        refresh_token = zoho.issue_refresh_token()
        for _ in range(10):
            assert refresh(zoho, refresh_token).status_code == 200
        answer = refresh(zoho, refresh_token)
        assert answer.status_code == 400
        assert answer.json()["error"] == "Access Denied"
        assert "too many requests" in answer.json()["error_description"]
        assert refresh(zoho, zoho.issue_refresh_token()).status_code == 200, (
            "the limit is per token"
        )
        zoho.advance(601)
        assert refresh(zoho, refresh_token).status_code == 200

    def test_the_sixteenth_access_token_ends_the_oldest(self, zoho):
        refresh_token = zoho.issue_refresh_token()
        tokens = [zoho.issue_access_token(refresh_token) for _ in range(16)]
        assert [zoho.is_live(token) for token in tokens] == [False] + [True] * 15

    def test_expired_access_tokens_do_not_count_against_the_limit(self, zoho):
        refresh_token = zoho.issue_refresh_token()
        for _ in range(15):
            zoho.issue_access_token(refresh_token)
        zoho.advance(3600)
        tokens = [zoho.issue_access_token(refresh_token) for _ in range(15)]
        assert all(map(zoho.is_live, tokens))

    def test_the_twenty_first_refresh_token_ends_the_oldest_and_its_access_tokens(self, zoho):
        oldest = zoho.issue_refresh_token("ada@example.com")
        access_token = zoho.issue_access_token(oldest)
        for _ in range(18):
            zoho.issue_refresh_token("ada@example.com")
        exchange(zoho, zoho.issue_grant_token("ada@example.com"))
        zoho.issue_refresh_token("bob@example.com")
        zoho.issue_refresh_token("ada@example.com", client=zoho.add_client())
        assert zoho.is_live(oldest), "another user or client does not count"
        exchange(zoho, zoho.issue_grant_token("ada@example.com"))
        assert not zoho.is_live(oldest)
        assert not zoho.is_live(access_token)

    def test_none_lifts_a_limit(self):
        lifted = {"max_refreshes": None, "max_access_tokens": None, "max_refresh_tokens": None}
        with LoopbackZoho(**lifted) as zoho:
            refresh_tokens = [zoho.issue_refresh_token() for _ in range(25)]
            tokens = [refresh(zoho, refresh_tokens[0]).json()["access_token"] for _ in range(25)]
            assert all(map(zoho.is_live, refresh_tokens + tokens))


class TestRevoke:
    @pytest.mark.parametrize("where", ["params", "data"])
    def test_a_revoked_refresh_token_takes_its_access_tokens_along(self, zoho, where):
        refresh_token = zoho.issue_refresh_token()
        access_token = zoho.issue_access_token(refresh_token)
        url = zoho.accounts_url + "/revoke"
        answer = requests.post(url, **{where: {"token": refresh_token}}, timeout=10)
        assert (answer.status_code, answer.json()) == (200, {"status": "success"})
        assert api(zoho, "/crm/v8/org", access_token).status_code == 401
        assert refresh(zoho, refresh_token).json() == {"error": "invalid_code"}
        assert zoho.counts.revokes == 1

    def test_an_access_token_can_be_revoked_alone(self, zoho):
        refresh_token = zoho.issue_refresh_token()
        revoked, kept = (zoho.issue_access_token(refresh_token) for _ in range(2))
        requests.post(zoho.accounts_url + "/revoke", data={"token": revoked}, timeout=10)
        assert [zoho.is_live(token) for token in (revoked, kept)] == [False, True]

    def test_an_unknown_token_is_an_error_400(self, zoho):
        answer = requests.post(zoho.accounts_url + "/revoke", data={"token": "x"}, timeout=10)
        assert answer.status_code == 400
        assert zoho.counts.revokes == 0

    def test_revoking_from_python_is_no_request(self, zoho):
        refresh_token = zoho.issue_refresh_token()
        zoho.revoke(refresh_token)
        zoho.revoke(refresh_token)
        assert not zoho.is_live(refresh_token)
        assert zoho.requests == []


class TestCrm:
    @pytest.fixture
    def access_token(self, zoho):
        return zoho.issue_access_token(zoho.issue_refresh_token())

    @pytest.mark.parametrize("version", ["v2.1", "v5", "v6", "v7", "v8"])
    def test_each_user_sees_their_own_email(self, zoho, version):
        for user in ("ada@example.com", "josé@example.com"):
            token = zoho.issue_access_token(zoho.issue_refresh_token(user))
            me = api(zoho, f"/crm/{version}/users?type=CurrentUser", token).json()["users"][0]
            org = api(zoho, f"/crm/{version}/org", token).json()["org"][0]
            assert f"{me['email']}:{org['zgid']}" == zoho.user_name(user)
            assert zoho.requests[-1].user == user

    def test_leads_can_be_read(self, zoho, access_token):
        leads = api(zoho, "/crm/v8/Leads?fields=id", access_token).json()["data"]
        one = api(zoho, f"/crm/v8/Leads/{leads[1]['id']}", access_token).json()["data"]
        assert one == [leads[1]]
        assert len(leads) == 3

    def test_a_lead_that_is_not_there_is_no_content(self, zoho, access_token):
        assert api(zoho, "/crm/v8/Leads/1", access_token).status_code == 204

    def test_what_is_not_built_is_not_found(self, zoho, access_token):
        answer = api(zoho, "/crm/v8/Deals", access_token)
        assert (answer.status_code, answer.json()["code"]) == (404, "INVALID_URL_PATTERN")

    @pytest.mark.parametrize("header", [None, "", "Zoho-oauthtoken 1000.0.0", "Zoho-oauthtoken"])
    def test_without_a_live_token_there_is_nothing_to_see(self, zoho, header):
        headers = {"Authorization": header}
        answer = requests.get(zoho.url + "/crm/v8/Leads", headers=headers, timeout=10)
        assert (answer.status_code, answer.json()["code"]) == (401, "INVALID_TOKEN")

    def test_access_tokens_expire(self, zoho, access_token):
        zoho.advance(3599)
        assert api(zoho, "/crm/v8/org", access_token).status_code == 200
        zoho.advance(1)
        assert api(zoho, "/crm/v8/org", access_token).status_code == 401

    def test_access_tokens_can_be_ended_early_for_one_user(self, zoho, access_token):
        other = zoho.issue_access_token(zoho.issue_refresh_token("ada@example.com"))
        zoho.expire_tokens("ada@example.com")
        assert [zoho.is_live(token) for token in (access_token, other)] == [True, False]
        zoho.expire_tokens()
        assert not zoho.is_live(access_token)


class TestFailures:
    def test_zoho_is_down_for_as_many_requests_as_ordered(self, zoho):
        refresh_token = zoho.issue_refresh_token()
        zoho.fail(times=2)
        answers = [refresh(zoho, refresh_token) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [500, 500, 200]
        assert answers[0].text == SERVER_ERROR.body
        assert "html" in answers[0].headers["Content-Type"]

    def test_zoho_is_down_until_it_recovers(self, zoho):
        refresh_token = zoho.issue_refresh_token()
        zoho.fail(ACCESS_DENIED, times=None)
        for _ in range(3):
            answer = refresh(zoho, refresh_token)
            assert (answer.status_code, answer.json()["error"]) == (400, "Access Denied")
        zoho.recover()
        assert refresh(zoho, refresh_token).status_code == 200

    def test_an_answer_can_be_made_up(self, zoho):
        zoho.fail(Failure(200, '{"error": "Access Denied"}', "application/json"))
        assert refresh(zoho, zoho.issue_refresh_token()).json() == {"error": "Access Denied"}

    def test_a_dropped_connection_leaves_the_grant_token_unused(self, zoho):
        code = zoho.issue_grant_token()
        zoho.fail(CONNECTION_DROPPED)
        with pytest.raises(requests.ConnectionError):
            exchange(zoho, code)
        assert "access_token" in exchange(zoho, code).json()

    def test_a_lost_answer_has_used_the_grant_token_up(self, zoho):
        code = zoho.issue_grant_token()
        zoho.fail(ANSWER_LOST)
        with pytest.raises(requests.ConnectionError):
            exchange(zoho, code)
        assert exchange(zoho, code).json() == {"error": "invalid_code"}
        assert zoho.counts.exchanges == 1
        assert zoho.requests[0].status is None

    def test_the_api_goes_on_while_accounts_fails(self, zoho):
        access_token = zoho.issue_access_token(zoho.issue_refresh_token())
        zoho.fail(times=None)
        assert api(zoho, "/crm/v8/org", access_token).status_code == 200

    def test_a_delay_holds_back_accounts_alone(self, zoho):
        refresh_token = zoho.issue_refresh_token()
        zoho.delay = 0.3
        start = time.monotonic()
        access_token = refresh(zoho, refresh_token).json()["access_token"]
        assert time.monotonic() - start >= 0.3
        start = time.monotonic()
        api(zoho, "/crm/v8/org", access_token)
        assert time.monotonic() - start < 0.3


class TestCounting:
    def test_requests_are_counted_by_what_came_of_them(self, zoho):
        tokens = exchange(zoho, zoho.issue_grant_token()).json()
        refresh(zoho, tokens["refresh_token"])
        refresh(zoho, "unknown")
        zoho.fail()
        exchange(zoho, "unknown")
        api(zoho, "/crm/v8/org", tokens["access_token"])
        api(zoho, "/crm/v8/org", "unknown")
        requests.post(zoho.accounts_url + "/revoke", params={"token": "unknown"}, timeout=10)
        expected = Counts(exchanges=1, refreshes=1, revokes=0, refused=2, api_calls=2)
        assert zoho.counts == expected
        recorded = [(each.kind, each.status, each.error) for each in zoho.requests]
        assert recorded == [
            ("exchange", 200, None),
            ("refresh", 200, None),
            ("refresh", 200, "invalid_code"),
            ("exchange", 500, "failed"),
            ("api", 200, None),
            ("api", 401, "INVALID_TOKEN"),
            ("revoke", 400, "invalid_token"),
        ]

    def test_counters_can_be_reset_and_tokens_stay(self, zoho):
        refresh_token = zoho.issue_refresh_token()
        refresh(zoho, refresh_token)
        zoho.reset_counts()
        assert zoho.counts == Counts(0, 0, 0, 0, 0)
        assert refresh(zoho, refresh_token).status_code == 200

    def test_no_secret_is_in_a_repr(self, zoho):
        tokens = exchange(zoho, zoho.issue_grant_token()).json()
        url = zoho.accounts_url + "/revoke"
        requests.post(url, params={"token": tokens["refresh_token"]}, timeout=10)
        shown = repr(zoho.requests) + repr(zoho.client) + repr(zoho)
        for secret in (tokens["access_token"], tokens["refresh_token"], zoho.client_secret):
            assert secret not in shown

    def test_a_request_says_when_it_was(self, zoho):
        before = time.time()
        refresh(zoho, zoho.issue_refresh_token())
        assert before <= zoho.requests[0].at <= time.time()


class TestComingAndGoing:
    def test_it_has_no_url_before_it_starts(self):
        with pytest.raises(RuntimeError, match="start"):
            _ = LoopbackZoho().url

    def test_close_gives_threads_and_port_back_though_a_client_stays(self):
        before = set(threading.enumerate())
        zoho = LoopbackZoho().start()
        with requests.Session() as session, socket.create_connection(_address(zoho)):
            session.get(zoho.url, timeout=10)
            zoho.close()
            assert set(threading.enumerate()) == before
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(_address(zoho), timeout=5)
        zoho.close()

    def test_close_does_not_wait_for_a_delayed_answer(self):
        with LoopbackZoho(delay=60) as zoho, ThreadPoolExecutor() as pool:
            answer = pool.submit(refresh, zoho, zoho.issue_refresh_token())
            time.sleep(0.2)
            start = time.monotonic()
            zoho.close()
            assert time.monotonic() - start < 5
            assert isinstance(answer.exception(timeout=5), requests.ConnectionError)

    def test_it_comes_back_on_the_same_port_and_remembers(self):
        with LoopbackZoho() as zoho:
            url, refresh_token = zoho.url, zoho.issue_refresh_token()
            zoho.close()
            with pytest.raises(requests.ConnectionError):
                refresh(zoho, refresh_token)
            zoho.start()
            assert zoho.url == url
            assert refresh(zoho, refresh_token).status_code == 200

    def test_64_clients_at_once_are_all_answered(self):
        with LoopbackZoho(max_refreshes=None, max_access_tokens=None) as zoho:
            refresh_token = zoho.issue_refresh_token()
            barrier = threading.Barrier(64)

            def one(_):
                barrier.wait()
                return refresh(zoho, refresh_token).json()["access_token"]

            with ThreadPoolExecutor(64) as pool:
                tokens = set(pool.map(one, range(64)))
            assert len(tokens) == zoho.counts.refreshes == 64
            assert all(map(zoho.is_live, tokens))

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12: threads
    def test_a_forked_child_may_close_it(self, zoho):
        with requests.Session() as session:
            session.get(zoho.url, timeout=10)
            child = os.fork()
            if child == 0:
                zoho.close()
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            assert session.get(zoho.url, timeout=10).status_code == 401

    def test_importing_it_loads_neither_the_sdk_nor_sqlalchemy(self):
        script = (
            "import sys, zoho_orm_store.testing\n"
            "print([m for m in ('zohocrmsdk', 'sqlalchemy', 'alembic') if m in sys.modules])"
        )
        command = [sys.executable, "-c", script]
        assert subprocess.run(command, capture_output=True, text=True).stdout == "[]\n"


def _address(zoho):
    return "127.0.0.1", int(zoho.url.rpartition(":")[2])


class TestAnotherProcess:
    def test_it_learns_where_zoho_is_and_who_the_client_is(self, zoho):
        other = LoopbackZoho.connect(f"{zoho.url}/")
        assert (other.url, other.accounts_url, other.consent_url) == (
            zoho.url,
            zoho.accounts_url,
            zoho.consent_url,
        )
        assert other.client == zoho.client
        assert (other.client_id, other.client_secret) == (zoho.client_id, zoho.client_secret)
        assert other.redirect_url == zoho.redirect_url
        assert other.user_name("a@b") == zoho.user_name("a@b")
        assert vars(other.environment()) == vars(zoho.environment())

    def test_to_connect_is_no_request_of_the_sdk(self, zoho):
        zoho.delay = 60
        zoho.fail(times=None)
        LoopbackZoho.connect(zoho.url)
        assert zoho.requests == []

    def test_it_does_not_go_through_a_proxy(self, zoho, monkeypatch):
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        assert LoopbackZoho.connect(zoho.url).client == zoho.client

    def test_when_nobody_answers(self):
        with LoopbackZoho() as zoho:
            url = zoho.url
        with pytest.raises(ConnectionError, match=f"No LoopbackZoho answers at {url}.*loopback"):
            LoopbackZoho.connect(url)


class TestCommand:
    """``zoho-orm-store loopback``"""

    @pytest.fixture
    def process(self):
        users = ("--user", "ada@example.com", "--user", "bob@example.com")
        command = [sys.executable, "-m", "zoho_orm_store", "loopback", *users]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        yield process
        process.kill()
        process.communicate()

    def test_what_it_prints_works_until_ctrl_c(self, process, tmp_path):
        lines = []
        while not lines or "Initializer.initialize(" not in lines[-1]:
            lines.append(process.stdout.readline())
        exported = [line.removeprefix("export ").strip() for line in lines if "export " in line]
        variables = dict(line.split("=", 1) for line in exported)
        zoho = LoopbackZoho.connect(variables["ZOHO_LOOPBACK_URL"])
        assert variables["ZOHO_CLIENT_SECRET"] == zoho.client_secret
        for name in ("ZOHO_REFRESH_TOKEN", "ZOHO_REFRESH_TOKEN_2"):
            assert "access_token" in refresh(zoho, variables[name]).json()
        assert "ZOHO_REFRESH_TOKEN_3" not in variables

        start = next(number for number, line in enumerate(lines) if "import os" in line)
        code = "".join(line[4:] for line in lines[start:])
        program = [sys.executable, "-W", "ignore", "-c", f"{code}\nprint(store.get_tokens())"]
        done = subprocess.run(
            program,
            cwd=tmp_path,
            env=os.environ | variables,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "zohooauth.db").exists()

        process.send_signal(signal.SIGINT)
        assert "# Stopped, after 1 logins, 2 refreshes" in process.stdout.read()
        assert process.wait(10) == 0

    def test_a_port_that_is_taken(self, zoho):
        result = CliRunner().invoke(app, ["loopback", "--port", str(zoho.port)])
        assert (result.exit_code, result.stdout) == (1, "")
        assert f"Error: Cannot listen on port {zoho.port} of 127.0.0.1" in result.stderr


class TestSdk:
    """The real SDK, which has no idea that this is not Zoho."""

    @pytest.fixture
    def sdk(self, zoho, tmp_path):
        """What to call with a token to start the SDK; it returns the SDK's store."""
        from zohocrmsdk.src.com.zoho.api.authenticator.store import FileStore
        from zohocrmsdk.src.com.zoho.api.logger import Logger
        from zohocrmsdk.src.com.zoho.crm.api.initializer import Initializer

        def start(token):
            store = FileStore(str(tmp_path / "tokens.csv"))
            logger = Logger.get_instance(Logger.Levels.NOTSET, str(tmp_path / "sdk.log"))
            Initializer.initialize(
                environment=zoho.environment(),
                token=token,
                store=store,
                resource_path=str(tmp_path),
                logger=logger,
            )
            return store

        yield start
        Initializer.initializer = None
        Initializer.LOCAL.init = None

    @pytest.fixture
    def token(self, zoho):
        """An SDK token for what is given: a grant token, say."""
        from zohocrmsdk.src.com.zoho.api.authenticator.oauth_token import OAuthToken

        def make(**credentials):
            client = {"client_id": zoho.client_id, "client_secret": zoho.client_secret}
            return OAuthToken(**client, **credentials)

        return make

    def read_leads(self):
        from zohocrmsdk.src.com.zoho.crm.api import HeaderMap, ParameterMap
        from zohocrmsdk.src.com.zoho.crm.api.record import GetRecordsParam, RecordOperations

        params = ParameterMap()
        params.add(GetRecordsParam.fields, "id,Last_Name")
        return RecordOperations("Leads").get_records(params, HeaderMap())

    def test_it_logs_in_with_a_grant_token(self, zoho, sdk, token):
        kim = token(
            grant_token=zoho.issue_grant_token("kim@example.com"), redirect_url=zoho.redirect_url
        )
        sdk(kim)
        assert kim.get_user_signature().get_name() == zoho.user_name("kim@example.com")
        assert zoho.is_live(kim.get_access_token())
        assert zoho.is_live(kim.get_refresh_token())
        assert int(kim.get_expires_in()) / 1000 == pytest.approx(time.time() + 3600, abs=10)
        assert zoho.counts == Counts(1, 0, 0, 0, 2)

    def test_it_refreshes(self, zoho, sdk, token):
        patricia = token(refresh_token=zoho.issue_refresh_token())
        sdk(patricia)
        assert patricia.get_user_signature().get_name() == zoho.user_name(DEFAULT_USER)
        first = patricia.get_access_token()
        patricia.set_expires_in("0")
        assert patricia.get_token() == first, "the store's own expiry counts"
        zoho.access_token_lifetime = 4
        fresh = token(refresh_token=zoho.issue_refresh_token("kim@example.com"))
        sdk(fresh)
        assert fresh.get_token() != fresh.get_token(), "the SDK refreshes in the last 5 seconds"

    def test_it_reads_records(self, zoho, sdk, token):
        sdk(token(refresh_token=zoho.issue_refresh_token()))
        response = self.read_leads()
        assert response.get_status_code() == 200
        names = [lead.get_key_value("Last_Name") for lead in response.get_object().get_data()]
        assert names == ["Byron", "Murray", "O'Brien"]
        assert [each.path for each in zoho.requests] == [
            "/oauth/v2/token",
            "/crm/v8/users?type=CurrentUser",
            "/crm/v8/org",
            "/crm/v8/settings/fields?module=Leads",
            "/crm/v8/Leads?fields=id%2CLast_Name",
        ]

    def test_it_hears_that_a_token_was_ended_early(self, zoho, sdk, token):
        sdk(token(refresh_token=zoho.issue_refresh_token()))
        self.read_leads()
        zoho.expire_tokens()
        response = self.read_leads()
        assert response.get_status_code() == 401
        assert response.get_object().get_code().get_value() == "INVALID_TOKEN"

    def test_it_revokes(self, zoho, sdk, token, monkeypatch):
        patricia = token(refresh_token=zoho.issue_refresh_token())
        store = sdk(patricia)
        # revoke() asks with an id alone, for which the SDK's FileStore finds nothing.
        monkeypatch.setattr(store, "find_token", lambda asked: _fill(asked, patricia))
        assert patricia.revoke(patricia.get_id()) is True
        assert not zoho.is_live(patricia.get_refresh_token())
        assert zoho.counts.revokes == 1

    @pytest.mark.parametrize(
        ("failure", "said"),
        [
            (ACCESS_DENIED, "Access Denied"),
            (SERVER_ERROR, "JSONDecodeError|Expecting value"),
            (CONNECTION_DROPPED, "Connection aborted"),
        ],
    )
    def test_its_own_error_comes_out_of_each_failure(self, zoho, sdk, token, failure, said):
        from zohocrmsdk.src.com.zoho.crm.api.exception import SDKException

        zoho.fail(failure)
        with pytest.raises(SDKException) as caught:
            sdk(token(refresh_token=zoho.issue_refresh_token()))
        assert re.search(said, str(caught.value) + repr(caught.value.cause))
        assert zoho.counts.refused == 1


def _fill(asked, stored):
    asked.set_refresh_token(stored.get_refresh_token())
    return asked
