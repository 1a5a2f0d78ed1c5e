"""Databases, stores and tokens for the tests.

The server tests use PostgreSQL and MariaDB over real connections, each run in a database of its
own. If ZOHO_ORM_STORE_TEST_MYSQL_URL names a MySQL server, they run on it too. Where a server is not
reachable, its tests are left out and the summary says so; with ZOHO_ORM_STORE_REQUIRE_SERVERS=1
that is an error instead.

A test runs where its behaviour can differ, and nowhere else: pure rules in memory, SQL once per
database, driver behaviour once per driver, the application's engines and ciphers on a few routes.
Tests that take minutes are marked `soak` and run with `python -m pytest -m soak`. Each has a short
version that always runs.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from databases import (
    DATABASES,
    SERVERS,
    VARIABLES,
    clear_postgresql,
    fresh_database,
    why_unreachable,
)
from programs import ABSENT_PROGRAMS
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool, Pool

from zoho_orm_store import (
    FernetCipher,
    MemoryTokenStore,
    SQLAlchemyTokenStore,
    StoredToken,
    metadata,
    provision,
)
from zoho_orm_store._tokens import TokenOperations
from zoho_orm_store.encryption import generate_key
from zoho_orm_store.testing import LoopbackZoho

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import URL

# Before each connection PyMySQL reads the certificates that the system trusts, which takes twenty
# times as long as to connect, and none of the tests needs one.
os.environ["SSL_CERT_FILE"] = os.devnull

REQUIRE_SERVERS = os.environ.get("ZOHO_ORM_STORE_REQUIRE_SERVERS") == "1"


@dataclass(frozen=True)
class Route:
    """One way to a store: a database, a driver, and whether the store gets a URL or an engine."""

    database: str
    driver: str
    kind: str
    encrypted: bool = False

    def __str__(self) -> str:
        where = "memory" if self.database == "sqlite-memory" else self.kind
        server = "-mysql-server" if self.database == "mysql" else ""
        return f"{self.driver}-{where}{server}{'-encrypted' if self.encrypted else ''}"


MEMORY = Route("memory", "list", "store")

IN_MEMORY = (MEMORY, Route("sqlite-memory", "sqlite+pysqlite", "url"))
"""Both stores, without a file or a server."""

BY_DATABASE = (
    Route("sqlite", "sqlite+pysqlite", "url"),
    Route("postgresql", "postgresql+psycopg", "url"),
    Route("mariadb", "mysql+pymysql", "url"),
    *(Route(name, "mysql+pymysql", "url") for name in SERVERS if name == "mysql"),
)

BY_DRIVER = (
    *BY_DATABASE,
    Route("sqlite", "sqlite+aiosqlite", "url"),
    Route("postgresql", "postgresql+psycopg_async", "url"),
    Route("postgresql", "postgresql+asyncpg", "url"),
    Route("mariadb", "mysql+asyncmy", "url"),
    Route("mariadb", "mysql+aiomysql", "url"),
    *(Route(name, "mysql+asyncmy", "url") for name in SERVERS if name == "mysql"),
)

SHARED = (
    Route("sqlite-memory", "sqlite+pysqlite", "url"),
    Route("sqlite-memory", "sqlite+aiosqlite", "url"),
)
"""SQLite in memory: all threads share one connection."""

ENCRYPTED = Route("sqlite", "sqlite+pysqlite", "engine", encrypted=True)

ENGINES = (
    ENCRYPTED,
    Route("postgresql", "postgresql+psycopg", "engine", encrypted=True),
    Route("postgresql", "postgresql+asyncpg", "async_engine", encrypted=True),
    Route("mariadb", "mysql+pymysql", "engine", encrypted=True),
    Route("mariadb", "mysql+asyncmy", "async_engine", encrypted=True),
)
"""Engines that the application made, of both kinds and on each database, with a cipher."""

ROUTES = (
    MEMORY,
    *SHARED,
    *BY_DRIVER,
    *ENGINES,
    Route("sqlite", "sqlite+aiosqlite", "async_engine", encrypted=True),
    Route("postgresql", "postgresql+psycopg_async", "async_engine", encrypted=True),
    Route("mariadb", "mysql+aiomysql", "async_engine", encrypted=True),
)
"""Every driver by URL and with an engine. Only the round trip of the real SDK runs on them all."""


def on_routes(*routes: Route) -> pytest.MarkDecorator:
    """Run a test, or each test of a class, on these routes."""
    return pytest.mark.parametrize("route", routes, ids=str)


# Without one of these a test of the `store` runs in memory and once per database, which is right
# for rules that SQL implements.
in_memory = on_routes(*IN_MEMORY)
on_each_driver = on_routes(MEMORY, *BY_DRIVER)
on_each_driver_and_engine = on_routes(MEMORY, *BY_DRIVER, *ENGINES)
on_each_pool = on_routes(MEMORY, *SHARED, *BY_DRIVER, *ENGINES)
with_a_cipher_too = on_routes(MEMORY, *BY_DATABASE, ENCRYPTED)

# For tests of a `database` whose result does not depend on which one it is.
on_sqlite = pytest.mark.parametrize("database", ["sqlite"], indirect=True)
on_empty_sqlite = pytest.mark.parametrize("empty_database", ["sqlite"], indirect=True)

CIPHER = FernetCipher(generate_key())
"""What encrypts on the encrypted routes."""

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

ABSENT = {
    name: f"{url.render_as_string(hide_password=True)} is not reachable ({reason}). "
    f"Set {VARIABLES[name]} to another URL."
    for name, url in SERVERS.items()
    if (reason := why_unreachable(url)) is not None
}
"""What some tests need and is not there, and why."""

if CHROMIUM is None:
    ABSENT["chromium"] = "neither chromium nor google-chrome is installed."
ABSENT |= ABSENT_PROGRAMS

_left_out: dict[str, int] = {}


def pytest_configure(config: pytest.Config) -> None:
    if ABSENT and REQUIRE_SERVERS:
        raise pytest.UsageError(f"All of it is required, but: {' '.join(ABSENT.values())}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = []
    for item in items:
        needed = ABSENT.keys() & _needs(item)
        for name in needed:
            _left_out[name] = _left_out.get(name, 0) + 1
        if not needed:
            kept.append(item)
    items[:] = sorted(kept, key=_time_allowed, reverse=True)


def _time_allowed(item: pytest.Item) -> float:
    """What takes longest begins first: it is not to be what all other processes wait for."""
    marker = item.get_closest_marker("timeout")
    return marker.args[0] if marker else 0


def _needs(item: pytest.Item) -> set[str]:
    """The servers and programs that a test's parameters name, or its module in ``NEEDS``."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    names = {*getattr(item.module, "NEEDS", ())}
    for parameter in parameters:
        for part in parameter if isinstance(parameter, tuple) else (parameter,):
            name = part.database if isinstance(part, Route) else part
            if isinstance(name, str):
                names.add(name)
    return names


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, count in _left_out.items():
        line = f"NOT RUN: {count} tests on {name}, because {ABSENT[name]}"
        terminalreporter.write_line(line, yellow=True, bold=True)


@pytest.fixture(scope="session")
def provisioned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], URL]]:
    """One database with our tables per kind of server, shared by the tests of a run."""
    from contextlib import ExitStack

    urls: dict[str, URL] = {}
    with ExitStack() as stack:

        def url_of(name: str) -> URL:
            if name not in urls:
                directory = tmp_path_factory.mktemp(name)
                urls[name] = stack.enter_context(fresh_database(name, directory, is_durable=False))
                provision.upgrade(urls[name])
            return urls[name]

        yield url_of


@pytest.fixture(params=DATABASES)
def database(request: pytest.FixtureRequest, provisioned: Callable[[str], URL]) -> URL:
    """The URL of a database with our tables, empty, of each kind in turn."""
    url = provisioned(request.param)
    empty(url)
    return url


@pytest.fixture(scope="session")
def postgresql_to_clear(tmp_path_factory: pytest.TempPathFactory) -> Iterator[URL]:
    with fresh_database("postgresql", tmp_path_factory.getbasetemp(), is_durable=False) as url:
        yield url


@pytest.fixture(params=DATABASES)
def empty_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[URL]:
    """The URL of a database without any table, of each kind in turn."""
    if request.param == "postgresql":
        url = request.getfixturevalue("postgresql_to_clear")
        yield url
        clear_postgresql(url)
    else:
        with fresh_database(request.param, tmp_path) as url:
            yield url


def empty(url: URL) -> None:
    with _engine_behind_the_back(url).begin() as connection:
        for table in metadata.tables.values():
            connection.execute(table.delete())


@cache
def _engine_behind_the_back(url: URL) -> Engine:
    return create_engine(url, poolclass=NullPool)


@pytest.fixture
def query(database: URL) -> Callable[..., list[tuple[object, ...]]]:
    """Run SQL on the database behind the store's back."""
    engine = _engine_behind_the_back(database)

    def run(sql: str, **parameters: object) -> list[tuple[object, ...]]:
        with engine.begin() as connection:
            result = connection.execute(text(sql), parameters)
            return [tuple(row) for row in result] if result.returns_rows else []

    return run


@contextmanager
def open_store(
    route: Route, url: URL | None, *, gives_up: bool = False, **options: object
) -> Iterator[object]:
    """A store on one of the routes, and afterwards the check that it left nothing behind.

    A call that an asynchronous driver gives up in time gives its connection back a little later.
    """
    if route.encrypted:
        options["cipher"] = CIPHER
    threads_before = set(threading.enumerate())
    engine: Engine | None = None
    if route.database == "memory":
        store: object = MemoryTokenStore(**options)
    elif route.database == "sqlite-memory":
        store = SQLAlchemyTokenStore(f"{route.driver}://", **options)
    else:
        assert url is not None
        target = url.set(drivername=route.driver)
        if route.kind == "url":
            bind: object = target
        elif route.kind == "engine":
            bind = engine = create_engine(target)
        else:
            bind = create_async_engine(target)
        store = SQLAlchemyTokenStore(bind, **options)
    with checkouts_counted() as checked_out:
        with store:
            yield store

            def ready():
                return len(getattr(getattr(store, "_database", None), "_ready", ()))

            if gives_up:
                comes_true(lambda: checked_out() == ready())
            assert checked_out() == ready(), "a connection is still checked out"
        assert checked_out() == 0, "the store has kept a connection"
    if engine is not None:
        engine.dispose()
    assert comes_true(lambda: set(threading.enumerate()) <= threads_before), (
        "a thread is left behind"
    )


def comes_true(condition: Callable[[], bool]) -> bool:
    """Whether a condition holds within five seconds."""
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


@contextmanager
def checkouts_counted() -> Iterator[Callable[[], int]]:
    count = 0

    def out(*_: object) -> None:
        nonlocal count
        count += 1

    def back(*_: object) -> None:
        nonlocal count
        count -= 1

    event.listen(Pool, "checkout", out)
    event.listen(Pool, "checkin", back)
    try:
        yield lambda: count
    finally:
        event.remove(Pool, "checkout", out)
        event.remove(Pool, "checkin", back)


@contextmanager
def statements_counted() -> Iterator[list[str]]:
    """The statements that any engine executes meanwhile."""
    statements: list[str] = []

    def record(connection: object, cursor: object, statement: str, *_: object) -> None:
        statements.append(statement)

    event.listen(Engine, "before_cursor_execute", record)
    try:
        yield statements
    finally:
        event.remove(Engine, "before_cursor_execute", record)


@pytest.fixture(params=(MEMORY, *BY_DATABASE), ids=str)
def route(request: pytest.FixtureRequest) -> Route:
    """A way to a store: in memory, and to each database. `on_routes` chooses others."""
    return request.param


@pytest.fixture
def route_url(route: Route, provisioned: Callable[[str], URL]) -> URL | None:
    if route.database not in DATABASES:
        return None
    url = provisioned(route.database)
    empty(url)
    return url


@pytest.fixture
def store(route: Route, route_url: URL | None) -> Iterator[object]:
    """An empty store, on each route in turn."""
    with open_store(route, route_url) as store:
        yield store


def operations(cipher=None) -> TokenOperations:
    """What a store does with the tokens in our table."""
    return TokenOperations.of_model(StoredToken, None, cipher)


@pytest.fixture
def zoho() -> Iterator[LoopbackZoho]:
    """A stand-in for Zoho with Zoho's limits."""
    with LoopbackZoho() as zoho:
        yield zoho


@pytest.fixture
def log_in(
    zoho: LoopbackZoho, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., object]]:
    """Start the SDK with a grant code, for a user if one is named, and return the token."""
    import sdk_process
    from zohocrmsdk.src.com.zoho.api.authenticator.oauth_token import OAuthToken
    from zohocrmsdk.src.com.zoho.crm.api.initializer import Initializer
    from zohocrmsdk.src.com.zoho.crm.api.user_signature import UserSignature

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(Initializer, "initializer", None)

    def log_in(store: object, code: str, user: str | None = None) -> object:
        token = OAuthToken(
            client_id=zoho.client_id,
            client_secret=zoho.client_secret,
            grant_token=code,
            redirect_url=zoho.redirect_url,
            user_signature=user and UserSignature(user),
        )
        sdk_process.start(zoho, token, store, tmp_path)
        return token

    yield log_in
    Initializer.LOCAL.init = None


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as its wheel installs it."""
    folder = tmp_path_factory.mktemp("wheel")

    packages = folder / "packages"

    def python(*arguments: object) -> str:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(packages)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    root = Path(__file__).parent.parent
    python("-m", "build", "-q", "--no-isolation", "--wheel", "--outdir", folder, root)
    (wheel,) = folder.glob("*.whl")
    pip = ("-m", "pip", "install", "-q", "--no-deps", "--no-warn-conflicts", "--no-index")
    python(*pip, "--target", packages, wheel)
    where = python("-c", "import zoho_orm_store; print(zoho_orm_store.__file__)")
    assert where.startswith(str(packages))
    return packages


@pytest.fixture
def in_child():
    """Run a function in a forked child, and wait for it at most ten seconds."""

    def run(work):
        pid = os.fork()
        if pid == 0:
            try:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(10)
                work()
                os._exit(0)
            except BaseException as error:  # noqa: BLE001
                os.write(2, repr(error).encode())
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0

    return run
