"""The real Zoho SDK on this package's store, step by step, for a reader's eyes.

`run` plays the steps in `STEPS` against a `LoopbackZoho`, so that it needs no account and no
network. Every step states what it has achieved, and each statement is checked against the database
and against what that Zoho was asked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import time
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, inspect

from zoho_orm_store import provision
from zoho_orm_store._database.database import open_database
from zoho_orm_store._database.drivers import is_memory, redacted_url
from zoho_orm_store.errors import (
    ConfigurationError,
    MissingDependencyError,
    SchemaError,
    ZohoOrmStoreError,
)
from zoho_orm_store.models import metadata
from zoho_orm_store.records import SECRETS, mask
from zoho_orm_store.repository import TokenRepository
from zoho_orm_store.testing import LoopbackZoho

try:
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
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
    from collections.abc import Callable, Iterator, Sequence

    from sqlalchemy import Connection

    from zoho_orm_store._database.database import Database
    from zoho_orm_store.records import TokenRecord

__all__ = ["STEPS", "SUCCESS", "DemoError", "run"]

SUCCESS = "The demo is complete: every step did what it says."
"""The last line of a demo in which everything was as it should be."""

TIMEOUT = 30.0
"""Seconds that the second process, or one operation of the database, may take."""


class DemoError(ZohoOrmStoreError):
    """A step of the demo did not do what it says."""


@dataclass(frozen=True)
class Stage:
    """What the steps have in common.

    Attributes:
        console: Where the reader looks.
        database: The database that holds the tokens, past the store.
        store: The store under demonstration, in the same database.
        zoho: The Zoho that the SDK talks to.
        folder: A temporary folder for what the SDK writes to disk.
    """

    console: Console
    database: Database
    store: SQLAlchemyTokenStore
    zoho: LoopbackZoho
    folder: Path

    def say(self, text: str) -> None:
        """Tell what happens."""
        self._print(Text(text))

    def check(self, claim: str, holds: bool) -> None:
        """State what has been achieved, and stop where it has not.

        Raises:
            DemoError: The claim does not hold.
        """
        sign, style = ("✓", "green") if holds else ("✗", "red")
        self._print(Text.assemble((sign, style), " ", claim))
        if not holds:
            raise DemoError(f"This is not so: {claim}")

    def show(self, values: dict[str, str]) -> None:
        """Show names and values in two columns."""
        table = Table.grid(padding=(0, 2))
        for name, value in values.items():
            table.add_row(Text(name, style="cyan"), Text(value))
        self._print(table, indent=5)

    def rows(self) -> Sequence[TokenRecord]:
        """The rows that this demo has made, known by the client that only its Zoho has."""
        client_id = self.zoho.client_id
        return self.database.read(
            lambda connection: TokenRepository(connection).list(client_id=client_id)
        )

    def row(self) -> TokenRecord:
        """The one row that this demo has made.

        Raises:
            DemoError: There is none, or there are several.
        """
        rows = self.rows()
        if len(rows) != 1:
            raise DemoError(
                f"The table oauthtoken should have one row of the demo, not {len(rows)}."
            )
        return rows[0]

    def _print(self, text: Text | Table, indent: int = 3) -> None:
        self.console.print(Padding(text, (0, 0, 0, indent), expand=False))


def run(url: str | None = None) -> None:
    """Play the demo, on stdout.

    Args:
        url: A database without tokens. The demo deletes the rows that it makes, and leaves the
            tables. If not given: a SQLite file in a temporary folder, which is removed.

    Raises:
        DemoError: A step did not do what it says.
        ConfigurationError: The database cannot be used, or holds tokens.
        DatabaseError: The database refused or lost an operation.
    """
    console = Console(highlight=False, markup=False)
    with TemporaryDirectory(prefix="zoho-orm-store-demo-") as folder:
        file = URL.create("sqlite", database=str(Path(folder, "zohooauth.db")))
        with (
            closing(open_database(url or file, timeout=TIMEOUT)) as database,
            SQLAlchemyTokenStore(database.url, create_schema=False, timeout=TIMEOUT) as store,
            LoopbackZoho() as zoho,
            _process_settings(),
        ):
            _refuse_unsuitable(database)
            place = redacted_url(database.url) if url else "a SQLite file in a temporary folder"
            console.print(f"The Zoho CRM SDK keeps its tokens in {place}", soft_wrap=True)
            revision = database.read(provision.current)
            _play(Stage(console, database, store, zoho, Path(folder)))
    if url is None:
        console.print("\nThe temporary folder is removed.")
    elif revision is None:
        console.print("\nThe demo's row is deleted, and its tables stay. To remove them, too:")
        console.print(f"zoho-orm-store downgrade --url '{place}'", soft_wrap=True)
    else:
        console.print("\nThe demo's row is deleted, and the tables stay.")
    console.print(SUCCESS)


def migrate(stage: Stage) -> None:
    """Provision the schema, as ``zoho-orm-store upgrade`` does."""
    before = stage.database.read(provision.current)
    stage.database.write(provision.upgrade)
    after = stage.database.read(provision.current)
    stage.say(f"Alembic: from revision {before or 'none'} to {after}.")
    tables = stage.database.read(lambda connection: inspect(connection).get_table_names())
    stage.check(f"{after} is the newest revision.", after == provision.head())
    stage.check(
        f"There are the tables {', '.join(metadata.tables)}.", {*metadata.tables} <= {*tables}
    )


def log_in(stage: Stage) -> None:
    """Initialize the SDK with what a user's consent has brought."""
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
    stage.show(_masked(row))
    stage.check("Zoho accepts the access token in it.", _is_live(stage, row.access_token))
    stage.check("Zoho accepts the refresh token in it.", _is_live(stage, row.refresh_token))


def call_the_api(stage: Stage) -> None:
    """Read records through the SDK, which asks the store for its token."""
    stage.say('>>> RecordOperations("Leads").get_records(...)')
    with _no_token_request(stage):
        leads = _read_leads()
    stage.check(f"It returned {len(leads)} leads: {', '.join(leads)}.", len(leads) > 0)


def start_a_second_process(stage: Stage) -> None:
    """Let another process, which only has the refresh token, use what this one has stored."""
    zoho, row = stage.zoho, stage.row()
    given = {
        "url": stage.database.url.render_as_string(hide_password=False),
        "port": int(zoho.url.rpartition(":")[2]),
        "client_id": zoho.client_id,
        "client_secret": zoho.client_secret,
        "refresh_token": row.refresh_token,
        "folder": str(stage.folder / "second"),
    }
    stage.say(">>> Initializer.initialize(environment, OAuthToken(refresh_token=...), store)")
    stage.say('>>> RecordOperations("Leads").get_records(...)')
    with _no_token_request(stage):
        answer = _ask_process("second_process", given)
    pid, leads = answer["pid"], answer["leads"]
    stage.check(f"It was a process of its own, with the id {pid}.", pid != os.getpid())
    stage.check(f"It read the same {len(leads)} leads.", leads == _read_leads())
    stage.check("The row is as it was.", stage.row() == row)


def let_the_token_expire(stage: Stage) -> None:
    """Age the token, in the database and at Zoho, and call the API again."""
    old = stage.row()
    stage.say("The access token's hour is over: the row says so, and Zoho has ended it.")
    stage.zoho.expire_tokens()
    aged = replace(old, expiry_time=int(time() * 1000) - 1000)
    stage.database.write(lambda connection: TokenRepository(connection).save(aged))
    stage.check("Zoho refuses the old access token.", not _is_live(stage, old.access_token))
    stage.say('>>> RecordOperations("Leads").get_records(...)  # twice')
    stage.check("Zoho CRM answered both calls.", all([_read_leads(), _read_leads()]))
    stage.check("The SDK refreshed once for both.", stage.zoho.counts.refreshes == 1)
    new = stage.row()
    stage.show(_masked(new, "id", "refresh_token", "access_token", "expiry_time"))
    is_new = new.access_token != old.access_token and _is_live(stage, new.access_token)
    stage.check("The row holds the new access token, which Zoho accepts.", is_new)
    stage.check("Its expiry lies ahead.", (new.expiry_time or 0) > time() * 1000)
    kept = (new.id, new.refresh_token) == (old.id, old.refresh_token)
    stage.check("It is the same row, with the same refresh token.", kept)


def count_the_requests(stage: Stage) -> None:
    """Show what Zoho was asked from the beginning to the end."""
    counts = stage.zoho.counts
    stage.show(
        {
            "Grant codes exchanged": str(counts.exchanges),
            "Access tokens refreshed": str(counts.refreshes),
            "Token requests refused": str(counts.refused),
            "API calls": str(counts.api_calls),
        }
    )
    asked = (counts.exchanges, counts.refreshes, counts.refused)
    stage.check("One login and one refresh served two processes.", asked == (1, 1, 0))
    errors = [request.error for request in stage.zoho.requests if request.error]
    stage.check("Zoho found nothing wrong with any request.", not errors)


STEPS: list[tuple[str, Callable[[Stage], None]]] = [
    ("Migrations make the tables", migrate),
    ("The SDK logs in with a grant code", log_in),
    ("The login is a row in the table oauthtoken; secrets are masked here", look_at_the_row),
    ("The SDK calls the API", call_the_api),
    ("A second process calls the API, without a login", start_a_second_process),
    ("The access token expires, and the SDK refreshes it", let_the_token_expire),
    ("What Zoho saw", count_the_requests),
]
"""The demo: what the reader is told, and the function that does it."""


def second_process() -> None:
    """Be the second process: read what is given as JSON on stdin, answer on stdout."""
    given = json.load(sys.stdin)
    token = OAuthToken(
        client_id=given["client_id"],
        client_secret=given["client_secret"],
        refresh_token=given["refresh_token"],
    )
    # Never started: it only tells where the first process's one is.
    zoho = LoopbackZoho(port=given["port"])
    with SQLAlchemyTokenStore(given["url"], create_schema=False, timeout=TIMEOUT) as store:
        _start_sdk(zoho, token, store, Path(given["folder"]))
        json.dump({"pid": os.getpid(), "leads": _read_leads()}, sys.stdout)


def _play(stage: Stage) -> None:
    """Play all steps, and delete the demo's rows however that ends."""
    try:
        for number, (title, step) in enumerate(STEPS, 1):
            stage.console.print(f"\n{number}. {title}", style="bold")
            try:
                step(stage)
            except (DemoError, SDKException) as error:
                raise DemoError(f"Step {number} of the demo failed ({title}). {error}") from error
    finally:
        _delete_rows(stage)


def _delete_rows(stage: Stage) -> None:
    def delete(connection: Connection) -> None:
        tokens = TokenRepository(connection)
        for row in tokens.list(client_id=stage.zoho.client_id):
            tokens.delete(str(row.id))

    # Without a table, since the migrations were not completed, there are no rows either.
    with suppress(SchemaError):
        stage.database.write(delete)


def _start_sdk(
    zoho: LoopbackZoho, token: OAuthToken, store: SQLAlchemyTokenStore, folder: Path
) -> None:
    """Start the SDK as an application does, but let it write to no folder of the user's."""
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
    names = ("First_Name", "Last_Name")
    return [
        " ".join(str(lead.get_key_value(name)) for name in names)
        for lead in response.get_object().get_data()
    ]


@contextmanager
def _no_token_request(stage: Stage) -> Iterator[None]:
    """Check that Zoho CRM is asked something, and Zoho Accounts nothing."""
    before = stage.zoho.counts
    yield
    after = stage.zoho.counts
    only_calls = replace(after, api_calls=before.api_calls) == before
    stage.check("Zoho was called, and asked for no token.", only_calls and after != before)


def _ask_process(function: str, given: dict[str, Any]) -> dict[str, Any]:
    """Run a function of this module in a Python process of its own.

    What is given goes through stdin, since arguments and environment are there for others to see.
    """
    command = [sys.executable, "-c", f"from {__name__} import {function}; {function}()"]
    try:
        done = subprocess.run(  # noqa: S603 - this interpreter, and a name out of this module
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
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@contextmanager
def _process_settings() -> Iterator[None]:
    """Keep requests to Zoho's stand-in out of proxies; leave the process as it was found."""
    initializer, found = Initializer.initializer, os.environ.get("no_proxy")
    no_proxy = found or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = f"{no_proxy},127.0.0.1" if no_proxy else "127.0.0.1"
    try:
        yield
    finally:
        Initializer.initializer = initializer
        if found is None:
            del os.environ["no_proxy"]
        else:
            os.environ["no_proxy"] = found


def _refuse_unsuitable(database: Database) -> None:
    if is_memory(database.url):
        raise ConfigurationError(
            "The demo's second process cannot reach a database in memory. "
            "Leave --url out to run on a temporary file."
        )
    try:
        held = database.read(lambda connection: TokenRepository(connection).count())
    except SchemaError:
        return  # no table, so no tokens
    if held:
        raise ConfigurationError(
            f"The table oauthtoken in {redacted_url(database.url)} already holds tokens ({held}). "
            "Give the demo a database of its own, or leave --url out."
        )


def _masked(record: TokenRecord, *names: str) -> dict[str, str]:
    """A row's known values, or some of them, as they may be shown."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    shown = {
        name: mask(value) if name in SECRETS else str(value)
        for name, value in values.items()
        if value is not None and (not names or name in names)
    }
    if record.expiry_time is not None:
        minutes = round((record.expiry_time / 1000 - time()) / 60)
        shown["expiry_time"] += f" (in {minutes} minutes)"
    return shown


def _is_live(stage: Stage, token: str | None) -> bool:
    return token is not None and stage.zoho.is_live(token)
