"""The command that says what is wrong, and how to fix it."""

from __future__ import annotations

from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from time import perf_counter, time
from typing import TYPE_CHECKING

import typer

import zoho_orm_store
from zoho_orm_store.cli.app import Url, app, env_cipher, one_line
from zoho_orm_store.cli.tokens import reason_left_out
from zoho_orm_store.errors import (
    DatabaseError,
    UnreadableTokenError,
    ZohoOrmStoreError,
)

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from zoho_orm_store._database.database import Database

_PACKAGES = ("SQLAlchemy", "alembic", "zohocrmsdk8-0")
_MOST_SECONDS_APART = 5.0


@app.command()
def doctor(url: Url) -> None:
    """Check the installation, the database, its tables, tokens and clock.

    Each finding is one line. Exit code 1 means that something is wrong; its line says how to fix
    it.
    """
    from zoho_orm_store._database.database import open_database

    typer.echo(f"ok     zoho-orm-store {zoho_orm_store.__version__}, {_versions()}")
    # Soon report a server that does not answer, but give a large table the time that it takes.
    for timeout, checks in ((15.0, (_connection, _schema, _clock)), (None, (_tokens, _secrets))):
        with closing(open_database(url, timeout=timeout, retry_for=15.0)) as database:
            for check in checks:
                try:
                    finding = check(database)
                except ZohoOrmStoreError as error:
                    typer.echo(f"WRONG  {one_line(error)}")
                    raise typer.Exit(1) from None
                if finding is not None:
                    typer.echo(f"ok     {finding}")


def _versions() -> str:
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)


def _connection(database: Database) -> str:
    from zoho_orm_store._database.drivers import redacted_url

    dialect = database.read(lambda connection: connection.dialect)
    started = perf_counter()
    database.read(lambda connection: connection.exec_driver_sql("SELECT 1").scalar())
    milliseconds = (perf_counter() - started) * 1000
    number = ".".join(map(str, dialect.server_version_info or ()))
    return (
        f"connected to {redacted_url(database.url)}: {database.dialect_name} {number} by "
        f"{dialect.driver}, {milliseconds:.1f} ms for a query"
    )


def _schema(database: Database) -> str:
    zoho_orm_store.provision.check(database)
    found = zoho_orm_store.provision.current(database)
    return f"the tables are up to date, at {found or 'a revision of your own migrations'}"


def _clock(database: Database) -> str | None:
    from zoho_orm_store._sql.dialects import server_time

    there = database.read(server_time)
    if there is None:
        return None
    apart = abs(time() - there)
    if apart > _MOST_SECONDS_APART:
        raise DatabaseError(
            f"The clocks of this machine and of the database server are {apart:.0f} seconds apart. "
            "Set both by NTP: the clock decides which tokens have expired."
        )
    return f"this machine's clock and the server's are {apart:.1f} seconds apart"


def _tokens(database: Database) -> str:
    def count(connection: Connection) -> tuple[int, int]:
        repository = zoho_orm_store.TokenRepository(connection)
        return repository.count(), repository.count(expired=True)

    number, expired = database.read(count)
    return f"{number} tokens, of which {expired} have to be refreshed before their next use"


def _secrets(database: Database) -> str:
    from zoho_orm_store._tokens import TokenOperations

    cipher, unreadable = env_cipher(), list[UnreadableTokenError]()

    def count(connection: Connection) -> tuple[int, dict[str | None, int]]:
        unreadable.clear()
        repository = zoho_orm_store.TokenRepository(connection, cipher=cipher)
        readable = sum(1 for _ in repository.stream(on_undecryptable=unreadable.append))
        operations = TokenOperations.of_model(zoho_orm_store.StoredToken, None, cipher)
        return readable, operations.count_by_key(connection)

    readable, counted = database.read(count)
    if unreadable:
        total = len(unreadable) + readable
        raise ZohoOrmStoreError(
            f"{len(unreadable)} of {total} tokens {reason_left_out(unreadable)}"
        )
    keys = [f"{number} under the key {key}" for key, number in counted.items() if key]
    kinds = ", ".join([*keys, f"{counted.get(None, 0)} in plain text"])
    return f"the secrets of all tokens can be read: {kinds}"
