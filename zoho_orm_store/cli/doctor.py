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

    from zoho_orm_store.binding import Binding

_PACKAGES = ("SQLAlchemy", "alembic", "zohocrmsdk8-0")
_MOST_SECONDS_APART = 5.0


@app.command()
def doctor(url: Url) -> None:
    """Check the installation, the database, its tables and its clock.

    Each finding is a line. Exit code 1 means that something is wrong; the line says how to mend it.
    """
    from zoho_orm_store.binding import bind_to

    typer.echo(f"ok     zoho-orm-store {__version__}, {', '.join(map(_version, _PACKAGES))}")
    # A server that does not answer is soon told; a large table takes its time to be read.
    for timeout, examinations in (
        (15.0, (_connection, _schema, _clock)),
        (None, (_tokens, _secrets)),
    ):
        with closing(bind_to(url, timeout=timeout, retry_for=15.0)) as binding:
            if not all(_is_well(examine, binding) for examine in examinations):
                raise typer.Exit(1)


def _is_well(examine: Callable[[Binding], Iterator[str]], binding: Binding) -> bool:
    try:
        for finding in examine(binding):
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


def _connection(binding: Binding) -> Iterator[str]:
    from zoho_orm_store.dialects import shown

    server, driver = binding.read(
        lambda connection: (connection.dialect.server_version_info, connection.dialect.driver)
    )
    started = perf_counter()
    binding.read(lambda connection: connection.exec_driver_sql("SELECT 1").scalar())
    milliseconds = (perf_counter() - started) * 1000
    number = ".".join(map(str, server or ()))
    yield (
        f"connected to {shown(binding.url)}: {binding.dialect_name} {number} by {driver}, "
        f"{milliseconds:.1f} ms for a query"
    )


def _schema(binding: Binding) -> Iterator[str]:
    from zoho_orm_store import provision

    provision.check(binding)
    found = provision.current(binding)
    yield f"the tables are up to date, at {found or 'a revision of your own migrations'}"


def _tokens(binding: Binding) -> Iterator[str]:
    from zoho_orm_store.repository import SyncTokenRepository

    number, ended = binding.read(
        lambda connection: (
            SyncTokenRepository(connection).count(),
            SyncTokenRepository(connection).count(expired=True),
        )
    )
    yield f"{number} tokens, of which {ended} have to be refreshed before their next use"


def _secrets(binding: Binding) -> Iterator[str]:
    from zoho_orm_store.errors import UndecryptableTokenError
    from zoho_orm_store.repository import SyncTokenRepository

    cipher, undecryptable = cipher_given(), list[UndecryptableTokenError]()

    def count(connection: Connection) -> tuple[int, dict[str | None, int]]:
        undecryptable.clear()
        repository = SyncTokenRepository(connection, cipher=cipher)
        readable = sum(1 for _ in repository.stream(on_undecryptable=undecryptable.append))
        return readable, repository.count_by_key()

    readable, counted = binding.read(count)
    if undecryptable:
        number = len(undecryptable)
        raise CipherError(
            f"{number} of {number + readable} tokens cannot be decrypted. {undecryptable[0]}"
        )
    keys = [f"{number} under the key {key}" for key, number in counted.items() if key]
    kinds = ", ".join([*keys, f"{counted.get(None, 0)} in plain text"])
    yield f"the secrets of all tokens can be read: {kinds}"


def _clock(binding: Binding) -> Iterator[str]:
    from zoho_orm_store.errors import DatabaseError
    from zoho_orm_store.statements import server_time

    statement = server_time(binding.dialect_name)
    if statement is None:
        return
    there = binding.read(lambda connection: float(connection.execute(statement).scalar_one()))
    apart = abs(datetime.now(timezone.utc).timestamp() - there)
    if apart > _MOST_SECONDS_APART:
        raise DatabaseError(
            f"The clocks of this machine and of the database server are {apart:.0f} seconds apart. "
            "Set both by NTP: expired tokens are told by the clock."
        )
    yield f"this machine's clock and the server's are {apart:.1f} seconds apart"
