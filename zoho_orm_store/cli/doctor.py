"""The command that says what is wrong, and how to mend it."""

from __future__ import annotations

from contextlib import closing
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from time import perf_counter
from typing import TYPE_CHECKING

import typer

from zoho_orm_store import __version__
from zoho_orm_store.cli.app import Url, app, cipher_given
from zoho_orm_store.errors import CipherError, ZohoOrmStoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Connection

    from zoho_orm_store._database.database import Database

_PACKAGES = ("SQLAlchemy", "alembic", "zohocrmsdk8-0")
_MOST_SECONDS_APART = 5.0


@app.command()
def doctor(url: Url) -> None:
    """Check the installation, the database, its tables and its clock.

    Each finding is a line. Exit code 1 means that something is wrong; the line says how to mend it.
    """
    from zoho_orm_store._database.database import open_database

    typer.echo(f"ok     zoho-orm-store {__version__}, {', '.join(map(_version, _PACKAGES))}")
    # A server that does not answer is soon told; a large table takes its time to be read.
    for timeout, examinations in (
        (15.0, (_connection, _schema, _clock)),
        (None, (_tokens, _secrets)),
    ):
        with closing(open_database(url, timeout=timeout, retry_for=15.0)) as database:
            if not all(_is_well(examine, database) for examine in examinations):
                raise typer.Exit(1)


def _is_well(examine: Callable[[Database], Iterator[str]], database: Database) -> bool:
    try:
        for finding in examine(database):
            typer.echo(f"ok     {finding}")
    except ZohoOrmStoreError as error:
        typer.echo(f"WRONG  {' '.join(str(error).split())}")
        return False
    return True


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} not installed"


def _connection(database: Database) -> Iterator[str]:
    from zoho_orm_store._database.drivers import redacted_url

    server, driver = database.read(
        lambda connection: (connection.dialect.server_version_info, connection.dialect.driver)
    )
    started = perf_counter()
    database.read(lambda connection: connection.exec_driver_sql("SELECT 1").scalar())
    milliseconds = (perf_counter() - started) * 1000
    number = ".".join(map(str, server or ()))
    yield (
        f"connected to {redacted_url(database.url)}: {database.dialect_name} {number} by {driver}, "
        f"{milliseconds:.1f} ms for a query"
    )


def _schema(database: Database) -> Iterator[str]:
    from zoho_orm_store import provision

    provision.check(database)
    found = provision.current(database)
    yield f"the tables are up to date, at {found or 'a revision of your own migrations'}"


def _tokens(database: Database) -> Iterator[str]:
    from zoho_orm_store.repository import TokenRepository

    number, ended = database.read(
        lambda connection: (
            TokenRepository(connection).count(),
            TokenRepository(connection).count(expired=True),
        )
    )
    yield f"{number} tokens, of which {ended} have to be refreshed before their next use"


def _secrets(database: Database) -> Iterator[str]:
    from zoho_orm_store._tokens import TokenOperations
    from zoho_orm_store.errors import UndecryptableTokenError
    from zoho_orm_store.models import StoredToken
    from zoho_orm_store.repository import TokenRepository

    cipher, undecryptable = cipher_given(), list[UndecryptableTokenError]()

    def count(connection: Connection) -> tuple[int, dict[str | None, int]]:
        undecryptable.clear()
        repository = TokenRepository(connection, cipher=cipher)
        readable = sum(1 for _ in repository.stream(on_undecryptable=undecryptable.append))
        operations = TokenOperations.of_model(StoredToken, None, cipher)
        return readable, operations.count_by_key(connection)

    readable, counted = database.read(count)
    if undecryptable:
        number = len(undecryptable)
        raise CipherError(
            f"{number} of {number + readable} tokens cannot be decrypted. {undecryptable[0]}"
        )
    keys = [f"{number} under the key {key}" for key, number in counted.items() if key]
    kinds = ", ".join([*keys, f"{counted.get(None, 0)} in plain text"])
    yield f"the secrets of all tokens can be read: {kinds}"


def _clock(database: Database) -> Iterator[str]:
    from zoho_orm_store._sql.dialects import server_time
    from zoho_orm_store.errors import DatabaseError

    there = database.read(server_time)
    if there is None:
        return
    apart = abs(datetime.now(timezone.utc).timestamp() - there)
    if apart > _MOST_SECONDS_APART:
        raise DatabaseError(
            f"The clocks of this machine and of the database server are {apart:.0f} seconds apart. "
            "Set both by NTP: the clock decides which tokens have expired."
        )
    yield f"this machine's clock and the server's are {apart:.1f} seconds apart"
