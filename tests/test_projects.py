"""Projects made from nothing with the wheel, as the pages of the documentation say.

A page is the only source of its project: a test writes the files that the page shows and runs its
commands, in order and in one shell, in an empty folder and with the wheel of this checkout. In the
place of the stand-in for Zoho that a reader runs in a second shell, there is a `LoopbackZoho` of
the test, which also knows whose token came with each request.

A block of Python is a file if its first line names one: ``# crm/apps.py`` for a whole file, or
``# mysite/settings.py, at the end`` for more lines of one that a command has written. A command that
ends with ``&`` goes on running. The port 8000 stands for any that is free.
"""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
from databases import fresh_database
from programs import SCRIPTS, free_port, running
from test_migrations import SAMPLE_DDL

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (?P<name>[\w./]+\.py)(?P<at_the_end>, at the end)?\n")
DONE_ALREADY = re.compile(r"pip install|zoho-orm-store loopback|export ZOHO_API_URL=https")
"""The commands for which the tests have the wheel and a stand-in for Zoho."""

REPLACED = {
    "database": re.compile(r"(postgresql|mysql)\+\w+://\S+"),
    "data_centre": re.compile(r"USDataCenter\.PRODUCTION\(\)"),
}
"""What a reader replaces in the commands and files of a page."""

LEADS = ["Byron", "Murray", "O'Brien"]
"""What a user reads at the stand-in."""

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


def run(*command, cwd, env=None):
    done = subprocess.run(
        [str(each) for each in command],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Shell:
    """A reader's shell in an empty folder: what one command exports, the next ones have."""

    def __init__(self, folder, installed, zoho):
        self.folder = folder
        self.port = free_port()
        self.log = ""
        self._zoho_port = zoho.port
        self._exported = folder.parent / "exported.sh"
        self._exported.write_text("")
        # The package comes from the wheel. The rest is what `zoho-orm-store loopback` prints.
        self.environment = os.environ | {
            "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(installed),
            "ZOHO_API_URL": zoho.url,
            "ZOHO_ACCOUNTS_URL": zoho.accounts_url,
            "ZOHO_CLIENT_ID": zoho.client_id,
            "ZOHO_CLIENT_SECRET": zoho.client_secret,
            "ZOHO_REFRESH_TOKEN": zoho.issue_refresh_token("ada@example.com"),
            "no_proxy": "127.0.0.1",
        }
        where = self.run("python -c 'import zoho_orm_store; print(zoho_orm_store.__file__)'")
        assert where.startswith(f"{installed}{os.sep}"), "this is not the wheel's package"

    def run(self, commands, **environment):
        script = f"set -euo pipefail\n. {self._exported}\n{commands}\nexport -p >{self._exported}"
        return run("bash", "-c", script, cwd=self.folder, env=self.environment | environment)

    @contextmanager
    def follow(self, page, after="", **replace):
        """Do what a page says, and leave running what runs; what the commands wrote is yielded.

        Args:
            page: The page's name.
            after: The text behind which to begin.
            replace: The values for what `REPLACED` names.
        """
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        text = text[text.index(after) :].replace("8000", str(self.port))
        for name, value in replace.items():
            text, number = REPLACED[name].subn(lambda _, value=value: value, text)
            assert number, f"{page} names no {name}"
        outputs = []
        with ExitStack() as programs:
            for language, block in BLOCK.findall(text):
                if language == "python":
                    self._write(block)
                elif block.endswith("&\n"):
                    programs.enter_context(self._running(block.removesuffix("&\n")))
                elif not DONE_ALREADY.match(block):
                    outputs.append(self.run(block))
            try:
                yield outputs
            except Exception:
                print(self.log)
                raise

    def _write(self, block):
        if file := FILE.match(block):
            path = self.folder / file["name"]
            assert path.parent.is_dir(), f"no command has made the folder of {file['name']}"
            before = path.read_text() if file["at_the_end"] else ""
            path.write_text(f"{before}\n{block}")

    @contextmanager
    def _running(self, command):
        script = f". {self._exported}\nexec {command}"
        # A worker listens nowhere, and takes later what is sent before it is ready.
        port = self.port if "--port" in command else self._zoho_port
        options = {"cwd": self.folder, "env": self.environment}
        with running(("bash", "-c", script), port, **options) as self.log:
            yield


@pytest.fixture
def shell(tmp_path, installed, zoho):
    folder = tmp_path / "project"
    folder.mkdir()
    return Shell(folder, installed, zoho)


@pytest.fixture
def browser(shell):
    """Make a browser, with some cookies or none, for what the shell runs."""
    with ExitStack() as stack:

        def browser(cookies=None):
            address = f"http://127.0.0.1:{shell.port}"
            client = httpx.Client(base_url=address, trust_env=False, cookies=cookies)
            return stack.enter_context(client)

        yield browser


def ask_at_once(ask, tenants):
    """Let all tenants ask ten times, eight at once, and return the answers in this order."""
    with ThreadPoolExecutor(8) as pool:
        return [*pool.map(ask, tenants * 10)]


def users_seen(zoho):
    """The users whose tokens came with the requests for leads, as Zoho knows them."""
    return sorted(request.user for request in zoho.requests if "/Leads" in request.path)


def seen(zoho, user):
    """What a page shows to a tenant with this user's token."""
    return {"user": zoho.user_name(user), "leads": LEADS}


TENANTS = {"acme": "ada@example.com", "globex": "grace@example.com"}
USERS = sorted(TENANTS.values())


def two_tenants_with_curl(shell, zoho, browser, outputs):
    """What the walk with curl has shown, and the second tenant, which connects behind it."""
    logins_and_connect, answers = outputs[-2:]
    assert re.findall("acme|globex|token_id", logins_and_connect) == ["acme", "globex", "token_id"]
    assert answers.count(zoho.user_name("ada@example.com")) == 1
    assert answers.index(LEADS[0]) < answers.index("Connect Zoho first")
    assert answers.index("Connect Zoho first") < answers.index("Log in first")

    clients = {name: browser(cookies_of(shell.folder / f"{name}.cookies")) for name in TENANTS}
    refresh_token = zoho.issue_refresh_token(TENANTS["globex"])
    connected = clients["globex"].post("/zoho", json={"refresh_token": refresh_token})
    assert connected.status_code == 200
    zoho.reset_counts()
    answers = ask_at_once(lambda name: clients[name].get("/leads").json(), [*TENANTS])
    assert answers == [seen(zoho, user) for user in TENANTS.values()] * 10
    assert users_seen(zoho) == sorted(USERS * 10)
    assert zoho.counts.refreshes == 1  # Globex's first, for all who asked at once

    (forged,) = clients["acme"].cookies.items()
    stranger = browser({forged[0]: forged[1][:-2]})
    assert stranger.get("/leads").status_code == 401
    for secret in (refresh_token, shell.environment["ZOHO_REFRESH_TOKEN"]):
        assert secret not in str(shell.log)


def cookies_of(path):
    """The cookies in a file that curl has written."""
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    return {line[5]: line[6] for line in lines if len(line) == 7}


@needs_curl
@pytest.mark.parametrize("server", ["postgresql"])
def test_fastapi_with_asyncpg_in_a_schema(server, shell, zoho, browser, tmp_path):
    with fresh_database(server, tmp_path) as url:
        address = url.set(drivername="postgresql+asyncpg").render_as_string(hide_password=False)
        with shell.follow("fastapi.md", database=address) as outputs:
            two_tenants_with_curl(shell, zoho, browser, outputs)
            shell.run("alembic check")


@needs_curl
@pytest.mark.parametrize("server", ["mariadb"])
def test_flask_sqlalchemy_and_flask_migrate(server, shell, zoho, browser, tmp_path):
    with fresh_database(server, tmp_path) as url:
        address = url.render_as_string(hide_password=False)
        with shell.follow("flask.md", database=address) as outputs:
            two_tenants_with_curl(shell, zoho, browser, outputs)
            shell.run("flask db check")


def test_celery(shell, zoho):
    with shell.follow("celery.md") as outputs:
        assert outputs[-1] == f"{seen(zoho, 'ada@example.com')}\n"
        refresh_token = zoho.issue_refresh_token("grace@example.com")
        shell.run("printenv TOKEN | python connect.py 8", TOKEN=refresh_token)
        zoho.reset_counts()
        lines = shell.run(f"python report.py {'7 8 ' * 10}").splitlines()
    assert lines == [str(seen(zoho, user)) for user in USERS] * 10
    assert users_seen(zoho) == sorted(USERS * 10)


def test_django_on_an_asgi_server(shell, zoho, browser):
    with shell.follow("django.md"):
        password = shell.run("printenv DJANGO_SUPERUSER_PASSWORD").strip()
        ada, grace, stranger = browser(), browser(), browser()
        for name, client in {"ada": ada, "grace": grace}.items():
            log_in_at_django(client, name, password)
        for path in ("/leads", "/leads/async"):
            assert ada.get(path).json() == {"user": 1, "leads": LEADS}
            assert grace.get(path).json() == {"error": "Connect Zoho first."}
            assert stranger.get(path).headers["location"].startswith("/admin/login/")

        refresh_token = zoho.issue_refresh_token("grace@example.com")
        shell.run("printenv TOKEN | python manage.py connect_zoho grace", TOKEN=refresh_token)
        zoho.reset_counts()
        asked = [(client, path) for client in (ada, grace) for path in ("/leads", "/leads/async")]
        answers = ask_at_once(lambda each: each[0].get(each[1]).json(), asked)
    assert answers == [{"user": number, "leads": LEADS} for number in (1, 1, 2, 2)] * 10
    assert users_seen(zoho) == sorted(USERS * 20)


def log_in_at_django(client, name, password):
    page = client.get("/leads", follow_redirects=True)
    (form_token,) = re.findall(r'name="csrfmiddlewaretoken" value="(\w+)"', page.text)
    form = {"csrfmiddlewaretoken": form_token, "username": name, "password": password}
    assert client.post(str(page.url), data=form).headers["location"] == "/leads"


def test_the_file_of_the_published_sample(shell, zoho):
    """Its access tokens have expired, so the refresh tokens are all that is left of the logins."""
    with sqlite3.connect(shell.folder / "zohooauth.db") as connection:
        connection.execute(SAMPLE_DDL)
        columns = (
            "id, user_name, client_id, client_secret, refresh_token, access_token, expiry_time"
        )
        for number, user in enumerate(USERS, 1):
            refresh_token = zoho.issue_refresh_token(user)
            connection.execute(
                f"INSERT INTO oauthtoken ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    str(number),
                    zoho.user_name(user),
                    zoho.client_id,
                    zoho.client_secret,
                    refresh_token,
                    zoho.issue_access_token(refresh_token),
                    "1700000000000",
                ),
            )
    connection.close()
    (shell.folder / "stand_in.py").write_text(
        "from zoho_orm_store.testing import LoopbackZoho\n"
        f"environment = LoopbackZoho.connect({zoho.url!r}).environment()\n"
    )
    zoho.reset_counts()
    with shell.follow(
        "moving.md",
        after="## From the custom store sample",
        data_centre="__import__('stand_in').environment",
        database="sqlite:///other.db",
    ) as (adopted, leads, imported):
        assert "took over 2 tokens" in adopted
        assert leads.splitlines() == [f"{zoho.user_name(user)} {LEADS}" for user in USERS]
        assert "Added: 2" in imported
    assert (zoho.counts.exchanges, zoho.counts.refreshes, zoho.counts.refused) == (0, 2, 0)
    assert users_seen(zoho) == USERS
