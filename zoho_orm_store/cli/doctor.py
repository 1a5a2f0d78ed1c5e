"""The command that says what is wrong, and how to fix it."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from time import perf_counter, time
from typing import TYPE_CHECKING, NamedTuple

import typer

import zoho_orm_store
from zoho_orm_store.cli.app import AsJson, app, env_cipher, one_line
from zoho_orm_store.cli.logins import NO_REFRESH_TOKEN, Logins
from zoho_orm_store.cli.output import number_of, reason_left_out
from zoho_orm_store.cli.target import Target, takes_target
from zoho_orm_store.errors import DatabaseError, UnreadableTokenError, ZohoOrmStoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Connection, Executable, Table

    from zoho_orm_store import TokenRepository
    from zoho_orm_store._database.database import Database

_PACKAGES = ("SQLAlchemy", "alembic", "zohocrmsdk8-0")
_MOST_SECONDS_APART = 5.0
_SERVERS = {"mysql": "MySQL", "postgresql": "PostgreSQL", "sqlite": "SQLite"}


class Finding(NamedTuple):
    """What a check has found.

    Attributes:
        level: ``"ok"``, ``"hint"`` for what could be better, or ``"WRONG"``.
        text: One line.
    """

    level: str
    text: str


@app.command()
@takes_target(lease_model=True)
def doctor(target: Target, as_json: AsJson = False) -> None:
    """Check the installation, the database, its tables, permissions, tokens and clock.

    Each finding is one line: "ok", "hint" for what could be better, or "WRONG", which also says how
    to fix it. Exit code 1 means that something is wrong.
    """
    for finding in _findings(target):
        if as_json:
            typer.echo(json.dumps(finding._asdict()))
        else:
            typer.echo(f"{finding.level:<6} {finding.text}")
        if finding.level == "WRONG":
            raise typer.Exit(1)


def _findings(target: Target) -> Iterator[Finding]:
    """The findings up to the first that is wrong, on which the others depend."""
    yield Finding("ok", f"zoho-orm-store {zoho_orm_store.__version__}, {_versions()}")
    try:
        target.require_file()
        # Soon report a server that does not answer, but give a large table the time that it takes.
        for timeout, checks in _CHECKS:
            with target.open_unchecked(timeout=timeout, retry_for=15.0) as database:
                for check in checks:
                    yield from check(target, database)
    except ZohoOrmStoreError as error:
        yield Finding("WRONG", one_line(error))


def _versions() -> str:
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)


def _connection(target: Target, database: Database) -> Iterator[Finding]:
    dialect = database.read(lambda connection: connection.dialect)
    started = perf_counter()
    database.read(lambda connection: connection.exec_driver_sql("SELECT 1").scalar())
    milliseconds = (perf_counter() - started) * 1000
    number = ".".join(map(str, dialect.server_version_info or ()))
    name = "MariaDB" if getattr(dialect, "is_mariadb", False) else _SERVERS[dialect.name]
    yield Finding(
        "ok",
        f"connected to {target.place}: {name} {number} by {dialect.driver}, "
        f"{milliseconds:.1f} ms for a query",
    )


def _tables(target: Target, database: Database) -> Iterator[Finding]:
    target.check_tables(database)
    if target.is_standard:
        found = zoho_orm_store.provision.current(database) or "a revision of your own migrations"
        yield Finding("ok", f"the tables are up to date, at {found}")
    else:
        yield Finding("ok", f"the table {target.table_name} has all columns and indexes")
    if target.lease_model is None:
        yield Finding(
            "hint",
            "the table of refresh leases was not checked: name its model with --lease-model",
        )


def _permissions(target: Target, database: Database) -> Iterator[Finding]:
    """Try statements that change no row. The check of the tables has read the revision already."""
    from zoho_orm_store.models import token_table

    tables = [token_table(target.model)]
    if target.lease_model is not None:
        tables.append(target.lease_table)
    for table in tables:
        for statement in _harmless(table):
            database.rehearse(_execute, statement)
    names = " and ".join(table.fullname for table in tables)
    yield Finding("ok", f"this user may SELECT, INSERT, UPDATE and DELETE in {names}")


def _harmless(table: Table) -> list[Executable]:
    """Statements that need each right on a table, and find no row."""
    from sqlalchemy import delete, false, insert, select, update

    columns = list(table.columns)
    none = select(*columns).where(false())
    key = columns[0]
    return [
        none,
        insert(table).from_select(columns, none, include_defaults=False),
        update(table).where(false()).values({key: key}),
        delete(table).where(false()),
    ]


def _execute(connection: Connection, statement: Executable) -> None:
    connection.execute(statement)


def _clock(target: Target, database: Database) -> Iterator[Finding]:
    from zoho_orm_store._sql.dialects import server_time

    there = database.read(server_time)
    if there is None:
        return
    apart = abs(time() - there)
    if apart > _MOST_SECONDS_APART:
        raise DatabaseError(
            f"The clocks of this machine and of the database server are {apart:.0f} seconds apart. "
            "Set both by NTP: the clock decides which tokens have expired."
        )
    yield Finding("ok", f"this machine's clock and the server's are {apart:.1f} seconds apart")


class _Counted(NamedTuple):
    """The tokens in the table: those to refresh at their next use, and those that cannot be."""

    tokens: int
    to_refresh: int
    stranded: int
    refused: int
    unreadable: list[UnreadableTokenError]


def _count(repository: TokenRepository, logins: Logins) -> _Counted:
    unreadable: list[UnreadableTokenError] = []
    number = to_refresh = stranded = refused = 0
    now = time() * 1000
    for record in repository.stream(on_undecryptable=unreadable.append):
        number += 1
        has_ended = record.expiry_time is not None and record.expiry_time <= now
        reason = logins.reason_for_new(record)
        if reason is not None:
            stranded += reason == NO_REFRESH_TOKEN
            refused += reason != NO_REFRESH_TOKEN
        elif record.refresh_token is not None:
            to_refresh += has_ended or record.access_token is None
    return _Counted(number + len(unreadable), to_refresh, stranded, refused, unreadable)


def _tokens(target: Target, database: Database) -> Iterator[Finding]:
    logins = Logins(target, database)
    counted = database.read(lambda connection: _count(target.repository(connection), logins))
    yield Finding(
        "ok",
        f"{number_of(counted.tokens)}, of which {counted.to_refresh} will be refreshed at the next "
        "use",
    )
    if counted.stranded:
        yield Finding(
            "hint",
            f"{number_of(counted.stranded)} expired and cannot be refreshed: their users have to "
            "log in again ('zoho-orm-store purge --stranded' deletes them)",
        )
    if counted.refused:
        yield Finding(
            "hint",
            f"Zoho has refused to refresh {number_of(counted.refused)}, whose users have to log in "
            "again ('zoho-orm-store list' shows them)",
        )
    if counted.unreadable:
        raise ZohoOrmStoreError(
            f"{len(counted.unreadable)} of {counted.tokens} tokens "
            f"{reason_left_out(counted.unreadable)}"
        )


def _secrets(target: Target, database: Database) -> Iterator[Finding]:
    from zoho_orm_store._rotation import KeyRotation
    from zoho_orm_store._tokens import TokenOperations

    cipher = env_cipher()
    operations = TokenOperations.of_model(target.model, target.scope, cipher)
    planted = database.read(lambda connection: [*operations.misplaced(connection)])
    if planted:
        raise ZohoOrmStoreError(
            f"{number_of(len(planted))} in a row that somebody has planted or changed: {planted[0]}"
        )
    counted = database.read(KeyRotation(operations).count_by_key)
    in_plain_text = counted.get(None, 0)
    keys = [f"{number} under the key {key}" for key, number in counted.items() if key]
    kinds = ", ".join([*keys, f"{in_plain_text} in plain text"])
    yield Finding("ok", f"the secrets of all tokens can be read: {kinds}")
    if cipher is None:
        yield Finding(
            "hint",
            "secrets are stored as plain text: who can read the table can use the tokens. "
            "To encrypt them, see 'zoho-orm-store keys --help'",
        )
    elif in_plain_text:
        yield Finding("hint", "to encrypt what is in plain text: zoho-orm-store encrypt")
    elif keys:
        yield Finding(
            "hint",
            "every token is encrypted: give the store require_encryption=True, and plain text that "
            "somebody without the keys writes into the table is refused",
        )


_CHECKS: tuple[tuple[float | None, tuple[Callable[..., Iterator[Finding]], ...]], ...] = (
    (15.0, (_connection, _tables, _permissions, _clock)),
    (None, (_tokens, _secrets)),
)
"""The checks in their order, each group with the seconds that one may take."""
