"""The examples of the documentation: the portal, in a browser and without one."""

from __future__ import annotations

import importlib.util
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest
import uvicorn
from conftest import CHROMIUM, empty
from playwright.sync_api import sync_playwright

from zoho_orm_store import SQLAlchemyTokenStore
from zoho_orm_store.testing import LoopbackZoho

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def zoho():
    with LoopbackZoho() as zoho:
        yield zoho


@pytest.fixture
def store(database):
    empty(database)
    with SQLAlchemyTokenStore(database) as store:
        yield store


@pytest.fixture
def portal(zoho, store):
    """The portal, served on a free port of this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        client = zoho.add_client(f"{address}/callback")
        app = example("portal").create_app(
            store=store,
            environment=zoho.environment(),
            consent_url=zoho.consent_url,
            client_id=client.client_id,
            client_secret=client.client_secret,
            redirect_url=client.redirect_url,
        )
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield address
        server.should_exit = True
        thread.join()


class TestPortal:
    @pytest.fixture
    def visitor(self, portal):
        with httpx.Client(base_url=portal, follow_redirects=True, trust_env=False) as visitor:
            yield visitor

    def accept(self, visitor, user):
        page = visitor.get("/login")
        assert "would like to read" in page.text
        return visitor.get(str(page.url), params={**page.url.params, "user": user})

    def test_there_and_back(self, zoho, store, visitor):
        assert "Login with Zoho" in visitor.get("/").text
        page = self.accept(visitor, "ada@example.com")
        assert "ada@example.com" in page.text
        assert "<li>José O&#x27;Brien</li>" in page.text
        (token,) = store.get_tokens()
        assert token.get_user_signature().get_name() == zoho.user_name("ada@example.com")
        assert zoho.counts.exchanges == 1
        assert "Login with Zoho" in visitor.post("/logout").text
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
        assert store.get_tokens() == []


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
