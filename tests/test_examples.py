"""The examples of the documentation: the portal, in a browser and without one."""

from __future__ import annotations

import importlib.util
import re
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from conftest import CHROMIUM, empty
from playwright.sync_api import sync_playwright

from zoho_orm_store import SQLAlchemyTokenStore
from zoho_orm_store.testing import SERVER_ERROR

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_app(zoho, store, client):
    return example("portal").create_app(
        store=store,
        environment=zoho.environment(),
        consent_url=zoho.consent_url,
        client_id=client.client_id,
        client_secret=client.client_secret,
        redirect_url=client.redirect_url,
        session_key="one key for all workers",
    )


@contextmanager
def served(app, listener=None):
    """Serve an application on a free port, and yield its address."""
    with listener or socket.socket() as listener:
        if listener.getsockname()[1] == 0:
            listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture
def store(database):
    empty(database)
    with SQLAlchemyTokenStore(database, used_grants="forget") as store:
        yield store


@pytest.fixture
def portal(zoho, store):
    """The portal's address on this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        app = make_app(zoho, store, zoho.add_client(f"{address}/callback"))
        with served(app, listener):
            yield address


class TestPortal:
    @pytest.fixture
    def visitor(self, portal):
        with httpx.Client(base_url=portal, follow_redirects=True, trust_env=False) as visitor:
            yield visitor

    def accept(self, visitor, user):
        page = visitor.get("/login")
        assert "would like to read" in page.text
        return visitor.get(str(page.url), params={**page.url.params, "user": user})

    def log_out(self, visitor):
        form_token = re.search('name="form_token" value="([^"]+)"', visitor.get("/").text)
        return visitor.post("/logout", data={"form_token": form_token[1]})

    def test_there_and_back(self, zoho, store, visitor):
        assert "Login with Zoho" in visitor.get("/").text
        page = self.accept(visitor, "ada@example.com")
        assert "ada@example.com" in page.text
        assert "<li>José O&#x27;Brien</li>" in page.text
        (token,) = store.get_tokens()
        assert token.get_user_signature().get_name() == zoho.user_name("ada@example.com")
        assert zoho.counts.exchanges == 1
        assert "Login with Zoho" in self.log_out(visitor).text
        assert store.get_tokens() == []
        assert not zoho.is_live(token.get_refresh_token())

    def test_two_visitors_see_their_own(self, portal, visitor):
        self.accept(visitor, "ada@example.com")
        with httpx.Client(base_url=portal, follow_redirects=True, trust_env=False) as other:
            self.accept(other, "bob@example.com")
            assert "bob@example.com" in other.get("/").text
            assert "ada@example.com" in visitor.get("/").text

    def test_an_expired_token_is_refreshed_in_passing(self, zoho, visitor):
        zoho.access_token_lifetime = 4  # which the SDK takes for ended
        self.accept(visitor, "ada@example.com")
        zoho.reset_counts()
        assert "ada@example.com" in visitor.get("/").text
        assert zoho.counts.refreshes > 0

    def test_a_callback_that_nobody_asked_for_is_refused(self, visitor, store):
        assert visitor.get("/callback?code=x&state=").status_code == 400
        visitor.get("/login")
        assert visitor.get("/callback?code=x&state=forged").status_code == 400
        assert store.get_tokens() == []

    def test_a_code_that_zoho_refuses_is_no_login(self, visitor, store, zoho):
        page = visitor.get("/login")
        answer = visitor.get("/callback", params={"code": "x", "state": page.url.params["state"]})
        assert answer.status_code == 401
        assert "Zoho did not accept the login" in answer.text
        assert store.get_tokens() == []

    def test_the_callback_of_another_is_no_login_B12(self, portal, visitor, store, zoho):
        """Its address, code included, stands in the access log and in the browser's history."""
        page = self.accept(visitor, "ada@example.com")
        (callback,) = (each.url for each in page.history if each.url.path == "/callback")
        with httpx.Client(base_url=portal, follow_redirects=True, trust_env=False) as attacker:
            assert attacker.get(str(callback)).status_code == 400
            own_state = attacker.get("/login").url.params["state"]
            stolen = {"code": callback.params["code"], "state": own_state}
            zoho.reset_counts()
            answer = attacker.get("/callback", params=stolen)
            assert answer.status_code == 401
            assert zoho.counts.exchanges == 0
            assert [each.kind for each in zoho.requests] == ["exchange"]
            assert "ada@" not in answer.text + attacker.get("/").text
        assert len(store.get_tokens()) == 1

    def test_a_visitor_who_gives_no_access_is_told_so(self, visitor, store):
        state = visitor.get("/login").url.params["state"]
        answer = visitor.get("/callback", params={"error": "access_denied", "state": state})
        assert answer.status_code == 403
        assert "You did not give the portal access" in answer.text

    def test_a_logout_needs_the_forms_token(self, visitor, store):
        self.accept(visitor, "ada@example.com")
        for data in ({}, {"form_token": ""}, {"form_token": "forged"}):
            assert visitor.post("/logout", data=data).status_code == 403
        assert visitor.get("/logout").status_code == 405
        assert "ada@example.com" in visitor.get("/").text
        assert len(store.get_tokens()) == 1

    def test_nothing_of_a_session_survives_the_login_in_it(self, visitor):
        visitor.get("/login")
        before = visitor.cookies["session"]
        self.accept(visitor, "ada@example.com")
        assert visitor.cookies["session"] != before
        visitor.cookies.set("session", before)
        assert "Login with Zoho" in visitor.get("/").text

    def test_a_copied_cookie_is_worth_nothing_after_the_logout(self, visitor):
        self.accept(visitor, "ada@example.com")
        copied = visitor.cookies["session"]
        self.log_out(visitor)
        visitor.cookies.set("session", copied)
        assert "Login with Zoho" in visitor.get("/").text

    def test_an_error_page_has_no_details(self, visitor, zoho):
        self.accept(visitor, "ada@example.com")
        zoho.fail(SERVER_ERROR, times=100)
        zoho.expire_tokens()
        answer = visitor.get("/")
        assert answer.status_code == 502
        assert "Zoho does not answer, or no longer accepts your login" in answer.text
        assert "SDK" not in answer.text

    def test_every_page_says_what_a_browser_must_not_do(self, visitor):
        self.accept(visitor, "ada@example.com")
        for path in ("/", "/login", "/callback", "/nothing"):
            answer = visitor.get(path, follow_redirects=False)
            assert answer.headers["Referrer-Policy"] == "no-referrer"
            assert answer.headers["Cache-Control"] == "no-store"
            assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
        assert visitor.get("/openapi.json").status_code == 404

    @pytest.mark.parametrize(
        ("redirect_url", "is_secure"),
        [("https://portal.example/callback", True), ("http://127.0.0.1/callback", False)],
    )
    def test_the_cookie_is_for_this_site_alone(self, zoho, store, redirect_url, is_secure):
        app = make_app(zoho, store, zoho.add_client(redirect_url))
        with served(app) as address:
            answer = httpx.get(f"{address}/login", trust_env=False)
        flags = answer.headers["Set-Cookie"].lower().split("; ")
        assert {"httponly", "samesite=lax", "path=/"} <= {*flags}
        assert ("secure" in flags) is is_secure
        assert flags[0].startswith("__host-session=" if is_secure else "session=")

    def test_a_login_may_begin_in_one_worker_and_end_in_another(self, zoho, store):
        client = zoho.add_client("http://127.0.0.1/callback")
        one, other = (make_app(zoho, store, client) for _ in range(2))
        with served(one) as first, served(other) as second:
            begun = httpx.get(f"{first}/login", trust_env=False)
            state = httpx.URL(begun.headers["Location"]).params["state"]
            code = zoho.issue_grant_token(client=client)
            with httpx.Client(cookies=begun.cookies, trust_env=False) as visitor:
                visitor.get(f"{second}/callback", params={"code": code, "state": state})
                assert "Logout" in visitor.get(second).text


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
@pytest.mark.parametrize("browser_name", ["chromium"])
def test_the_portal_in_a_browser(browser_name, portal, store, tmp_path):
    arguments = ["--no-sandbox", "--disable-background-networking", "--no-first-run"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page()
        page.goto(portal)
        page.click("#login")
        page.fill("input[name=user]", "ada@example.com")
        page.click("text=Accept")
        page.wait_for_selector("#logout")
        assert page.locator("li").all_inner_texts()[0] == "Ada Byron"
        page.screenshot(path=tmp_path / "portal.png")
        page.click("#logout")
        page.wait_for_selector("#login")
        browser.close()
    assert store.get_tokens() == []
