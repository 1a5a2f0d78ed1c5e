"""The demo: the real Zoho SDK on this package's store, step by step.

`run` plays `STEPS` against a `LoopbackZoho`, so it needs no account and no network. Each step
prints what it achieved, and checks that against the database and the requests that Zoho received.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import time
from typing import TYPE_CHECKING

from sqlalchemy import make_url

from zoho_orm_store import provision
from zoho_orm_store._database.drivers import is_memory, redacted_url
from zoho_orm_store.cli.output import known_values
from zoho_orm_store.errors import (
    ConfigurationError,
    MissingDependencyError,
    SchemaError,
    ZohoOrmStoreError,
)
from zoho_orm_store.models import metadata
from zoho_orm_store.testing import LoopbackZoho, RemoteZoho

try:
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text
    from zohocrmsdk.src.com.zoho.api.authenticator import OAuthToken
    from zohocrmsdk.src.com.zoho.api.logger import Logger
    from zohocrmsdk.src.com.zoho.crm.api import HeaderMap, Initializer, ParameterMap
    from zohocrmsdk.src.com.zoho.crm.api.exception import SDKException
    from zohocrmsdk.src.com.zoho.crm.api.record import GetRecordsParam, RecordOperations
except ModuleNotFoundError as missing:
    packages = {"rich": "rich", "zohocrmsdk": "zohocrmsdk8-0"}
    package = packages.get((missing.name or "").partition(".")[0])
    if package is None:
        raise
    raise MissingDependencyError(package, "demo") from None

from zoho_orm_store.store import SQLAlchemyTokenStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zoho_orm_store.records import TokenRecord

__all__ = ["STEPS", "SUCCESS", "DemoError", "run"]

SUCCESS = "The demo is complete: every check passed."
"""The last line of a demo that succeeded."""

TIMEOUT = 30.0
"""Seconds that the second process, or one operation of the database, may take."""


class DemoError(ZohoOrmStoreError):
    """A check of the demo failed."""


@dataclass(frozen=True)
class Stage:
    """What the steps share: the console, and a database, its store, a Zoho and a folder."""

    console: Console
    url: str
    store: SQLAlchemyTokenStore
    zoho: LoopbackZoho
    folder: Path

    def say(self, text: str | Text) -> None:
        """Print an indented line."""
        self.console.print(Padding(text, (0, 0, 0, 3), expand=False))

    def show(self, values: dict[str, object]) -> None:
        """Print names and values in two columns."""
        for name, value in values.items():
            self.say(Text.assemble((f"  {name:<25}", "cyan"), str(value)))

    def check(self, claim: str, holds: bool) -> None:
        """Print a claim, and whether it is true.

        Raises:
            DemoError: It is not.
        """
        self.say(Text.assemble(("✓", "green") if holds else ("✗", "red"), " ", claim))
        if not holds:
            raise DemoError(f"This is not so: {claim}")

    def row(self) -> TokenRecord:
        """Return the one row of this demo, which is the only one with its Zoho's client.

        Raises:
            DemoError: There is none, or there are several.
        """
        with self.store.transaction() as tokens:
            rows = tokens.list(client_id=self.zoho.client_id)
        if len(rows) != 1:
            raise DemoError(f"The demo should have one row in oauthtoken, not {len(rows)}.")
        return rows[0]


def run(url: str | None = None) -> None:
    """Play the demo, and print it on stdout.

    Args:
        url: A database without tokens. The demo deletes its row afterwards, and leaves the tables.
            ``None`` uses a SQLite file in a temporary folder, which is removed.

    Raises:
        DemoError: A check failed.
        ConfigurationError: The database cannot be used, or holds tokens.
        DatabaseError: The database refused or lost an operation.
    """
    console = Console(highlight=False, markup=False, emoji=False)
    with TemporaryDirectory(prefix="zoho-orm-store-demo-") as folder:
        database = url or f"sqlite:///{Path(folder, 'zohooauth.db')}"
        with (
            SQLAlchemyTokenStore(database, create_schema=False, timeout=TIMEOUT) as store,
            LoopbackZoho() as zoho,
            _process_settings(),
        ):
            place = redacted_url(make_url(database)) if url else "a temporary SQLite file"
            _refuse_unsuitable(database, store)
            console.print(f"The Zoho CRM SDK keeps its tokens in {place}", soft_wrap=True)
            revision = provision.current(database)
            _play(Stage(console, database, store, zoho, Path(folder)))
    if url is None:
        console.print("\nThe temporary file is removed.")
    elif revision is None:
        console.print("\nThe demo's row is deleted, and its tables stay. To remove those as well:")
        console.print(f"zoho-orm-store downgrade --url '{place}'", soft_wrap=True)
    else:
        console.print("\nThe demo's row is deleted, and the tables stay.")
    console.print(SUCCESS)


def migrate(stage: Stage) -> None:
    """Create the tables, as ``zoho-orm-store upgrade`` does."""
    before = provision.current(stage.url)
    provision.upgrade(stage.url)
    after = provision.current(stage.url)
    stage.say(f"Alembic: from revision {before or 'none'} to {after}.")
    stage.check(f"{after} is the newest revision.", after == provision.head())
    tables = " and ".join(metadata.tables)
    stage.check(f"The tables {tables} exist.", provision.is_current(stage.url))


def log_in(stage: Stage) -> None:
    """Initialize the SDK with the grant code that a user's consent brought."""
    zoho = stage.zoho
    token = OAuthToken(
        client_id=zoho.client_id,
        client_secret=zoho.client_secret,
        grant_token=zoho.issue_grant_token(),
        redirect_url=zoho.redirect_url,
    )
    stage.say(">>> Initializer.initialize(environment, OAuthToken(grant_token=...), store)")
    _start_sdk(zoho, token, stage.store, stage.folder / "first")
    stage.check("Zoho exchanged one grant code for tokens.", zoho.counts.exchanges == 1)
    signature = token.get_user_signature()
    user = signature and signature.get_name()
    stage.check(f"The SDK found out who the user is: {user}.", user == zoho.user_name())
    stage.check("The store saved the token, and gave it an id.", token.get_id() is not None)


def look_at_the_row(stage: Stage) -> None:
    """Show what the store has written, with the secrets masked."""
    row = stage.row()
    stage.show(known_values(row))
    stage.check("Zoho accepts its access token.", stage.zoho.is_live(row.access_token or ""))
    stage.check("Zoho accepts its refresh token.", stage.zoho.is_live(row.refresh_token or ""))


def call_the_api(stage: Stage) -> None:
    """Read records through the SDK, which asks the store for its token."""
    stage.say('>>> RecordOperations("Leads").get_records(...)')
    with _no_token_request(stage):
        leads = _read_leads()
    stage.check(f"It returned {len(leads)} leads: {', '.join(leads)}.", len(leads) > 0)


def start_a_second_process(stage: Stage) -> None:
    """Let another process, which only has the refresh token, use the stored access token."""
    row = stage.row()
    stage.say(">>> Initializer.initialize(environment, OAuthToken(refresh_token=...), store)")
    stage.say('>>> RecordOperations("Leads").get_records(...)')
    with _no_token_request(stage):
        pid, leads = _run_second_process(stage, row.refresh_token)
    stage.check(f"It was another process, with the id {pid}.", pid != os.getpid())
    stage.check(f"It read the same {len(leads)} leads.", leads == _read_leads())
    stage.check("The row is unchanged.", stage.row() == row)


def let_the_token_expire(stage: Stage) -> None:
    """Let the token expire, in the database and at Zoho, and call the API again."""
    zoho, old = stage.zoho, stage.row()
    stage.say("The access token's hour is over, in the database and at Zoho.")
    zoho.expire_tokens()
    with stage.store.transaction() as tokens:
        tokens.save(replace(old, expiry_time=int(time() * 1000) - 1000))
    stage.check("Zoho refuses the old access token.", not zoho.is_live(old.access_token or ""))
    stage.say('>>> RecordOperations("Leads").get_records(...)  # twice')
    stage.check("Zoho CRM answered both calls.", all([_read_leads(), _read_leads()]))
    stage.check("The SDK refreshed once for both.", zoho.counts.refreshes == 1)
    new, shown = stage.row(), ("id", "refresh_token", "access_token", "expiry_time")
    stage.show({name: value for name, value in known_values(new).items() if name in shown})
    is_new = new.access_token != old.access_token and zoho.is_live(new.access_token or "")
    stage.check("The row holds a new access token, which Zoho accepts.", is_new)
    minutes = round(((new.expiry_time or 0) / 1000 - time()) / 60)
    stage.check(f"It expires in {minutes} minutes.", minutes > 0)
    kept = (new.id, new.refresh_token) == (old.id, old.refresh_token)
    stage.check("It is the same row, with the same refresh token.", kept)


def count_the_requests(stage: Stage) -> None:
    """Show the requests that Zoho received."""
    counts = stage.zoho.counts
    stage.show(
        {
            "Grant codes exchanged": counts.exchanges,
            "Access tokens refreshed": counts.refreshes,
            "Token requests refused": counts.refused,
            "API calls": counts.api_calls,
        }
    )
    received = (counts.exchanges, counts.refreshes, counts.refused)
    stage.check("One login and one refresh served two processes.", received == (1, 1, 0))
    errors = [request.error for request in stage.zoho.requests if request.error]
    stage.check("Zoho found nothing wrong with any request.", not errors)


STEPS: list[tuple[str, Callable[[Stage], None]]] = [
    ("Migrations create the tables", migrate),
    ("The SDK logs in with a grant code", log_in),
    ("The login is a row in the table oauthtoken; secrets are masked here", look_at_the_row),
    ("The SDK calls the API", call_the_api),
    ("A second process calls the API, without a login", start_a_second_process),
    ("The access token expires, and the SDK refreshes it", let_the_token_expire),
    ("What Zoho received", count_the_requests),
]
"""The title of each step, and its function."""


def second_process() -> None:
    """Be the second process: read the arguments as JSON from stdin, and answer on stdout."""
    given = json.load(sys.stdin)
    folder = Path(given.pop("folder"))
    zoho = LoopbackZoho.connect(given.pop("zoho"))
    with SQLAlchemyTokenStore(given.pop("url"), create_schema=False, timeout=TIMEOUT) as store:
        _start_sdk(zoho, OAuthToken(**given), store, folder)
        json.dump([os.getpid(), _read_leads()], sys.stdout)


def _run_second_process(stage: Stage, refresh_token: str | None) -> tuple[int, list[str]]:
    zoho = stage.zoho
    given = {
        "url": stage.url,
        "zoho": zoho.url,
        "folder": str(stage.folder / "second"),
        "client_id": zoho.client_id,
        "client_secret": zoho.client_secret,
        "refresh_token": refresh_token,
    }
    command = [sys.executable, "-c", f"from {__name__} import second_process as f; f()"]
    try:
        # Secrets go through stdin: other users can see arguments and environment variables.
        done = subprocess.run(  # noqa: S603 - this interpreter, and this module's name
            command,
            input=json.dumps(given),
            capture_output=True,
            encoding="utf-8",
            timeout=TIMEOUT,
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise DemoError(f"The process did not end within {TIMEOUT:g} seconds.") from None
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().rpartition("\n")[2]
        raise DemoError(f"The process failed, exit code {error.returncode}: {reason}") from None
    pid, leads = json.loads(done.stdout)
    return pid, leads


def _play(stage: Stage) -> None:
    """Play all steps. Delete the demo's rows, even if a step fails."""
    try:
        for number, (title, step) in enumerate(STEPS, 1):
            stage.console.print(f"\n{number}. {title}", style="bold")
            try:
                step(stage)
            except (DemoError, SDKException) as error:
                raise DemoError(f"Step {number} of the demo failed ({title}). {error}") from error
    finally:
        # If the migrations failed, there may be no table, and so no rows.
        with suppress(SchemaError), stage.store.transaction() as tokens:
            for row in tokens.list(client_id=stage.zoho.client_id):
                tokens.delete(row.id or "")


def _start_sdk(
    zoho: LoopbackZoho | RemoteZoho, token: OAuthToken, store: SQLAlchemyTokenStore, folder: Path
) -> None:
    """Start the SDK as an application does, but let it write into a temporary folder only."""
    folder.mkdir()
    Initializer.initialize(
        environment=zoho.environment(),
        token=token,
        store=store,
        resource_path=str(folder),
        logger=Logger.get_instance(Logger.Levels.NOTSET),
    )


def _read_leads() -> list[str]:
    wanted = ParameterMap()
    wanted.add(GetRecordsParam.fields, "First_Name,Last_Name")
    response = RecordOperations("Leads").get_records(wanted, HeaderMap())
    if response.get_status_code() != 200:
        raise DemoError(f"Zoho CRM answered with status {response.get_status_code()}.")
    return [
        f"{lead.get_key_value('First_Name')} {lead.get_key_value('Last_Name')}"
        for lead in response.get_object().get_data()
    ]


@contextmanager
def _no_token_request(stage: Stage) -> Iterator[None]:
    """Check that Zoho receives API calls, and no request for a token."""
    before = stage.zoho.counts
    yield
    after = stage.zoho.counts
    only_calls = replace(after, api_calls=before.api_calls) == before
    stage.check("Zoho was called, and asked for no token.", only_calls and after != before)


@contextmanager
def _process_settings() -> Iterator[None]:
    """Send no request to the loopback Zoho through a proxy. Restore the process's settings."""
    initializer, found = Initializer.initializer, os.environ.get("no_proxy")
    no_proxy = found or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = f"{no_proxy},127.0.0.1" if no_proxy else "127.0.0.1"
    try:
        yield
    finally:
        Initializer.initializer = initializer
        del os.environ["no_proxy"]
        if found is not None:
            os.environ["no_proxy"] = found


def _refuse_unsuitable(url: str, store: SQLAlchemyTokenStore) -> None:
    if is_memory(make_url(url)):
        raise ConfigurationError(
            "The demo's second process cannot reach a database in memory. "
            "Leave --url out to run on a temporary file."
        )
    # Without a table there are no tokens either.
    with suppress(SchemaError), store.transaction() as tokens:
        if held := tokens.count():
            raise ConfigurationError(
                f"The table oauthtoken in {redacted_url(make_url(url))} already holds tokens "
                f"({held}). Give the demo a database of its own, or leave --url out."
            )
