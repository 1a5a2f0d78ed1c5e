"""The commands about the tokens in the tables."""

from __future__ import annotations

import json
import re
import shutil
import time
from contextlib import closing
from dataclasses import fields
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoho_orm_store.cli.app import Url, Yes, app, ask, cipher_given
from zoho_orm_store.errors import (
    ConfigurationError,
    InvalidTokenError,
    UndecryptableTokenError,
)
from zoho_orm_store.records import SECRETS, mask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import TypeVar

    from zoho_orm_store.records import TokenRecord
    from zoho_orm_store.repository import TokenRepository
    from zoho_orm_store.transfer import Found

    T = TypeVar("T")

Reveal = Annotated[bool, typer.Option("--reveal", help="Show the secrets.")]


@app.command(name="list")
def list_tokens(
    url: Url,
    user: Annotated[str | None, typer.Option(help="Only this user's tokens.")] = None,
    client: Annotated[str | None, typer.Option(help="Only this client's tokens.")] = None,
    expired: Annotated[
        bool | None,
        typer.Option(
            "--expired/--live", help="Only tokens whose access token has ended, or only others."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
    reveal: Reveal = False,
) -> None:
    """List the tokens, in the order of their ids.

    For each: its id, user and client, the data centre, how long its access token still lives, and
    when it was saved (UTC). --json has every value; secrets are masked, unless --reveal. Exit
    code 1 means that some cannot be decrypted, which --json marks as undecryptable.
    """
    line = _json_line(reveal=reveal) if as_json else _table_line()

    undecryptable: list[UndecryptableTokenError] = []

    def print_undecryptable(error: UndecryptableTokenError) -> None:
        undecryptable.append(error)
        if error.record is not None:
            typer.echo(line(error.record, undecryptable=True))

    def print_all(repository: TokenRepository) -> None:
        if not as_json:
            typer.echo(_columns("ID", "USER", "CLIENT", "DC", "LIVES", "SAVED"))
        for record in repository.stream(
            user_name=user,
            client_id=client,
            expired=expired,
            on_undecryptable=print_undecryptable,
        ):
            typer.echo(line(record))

    # What was printed cannot be taken back: a lost connection ends the list.
    _run(url, print_all, retry_for=0)
    if undecryptable:
        number = len(undecryptable)
        typer.echo(f"{number} of them cannot be decrypted. {undecryptable[0]}", err=True)
        raise typer.Exit(1)


@app.command()
def show(
    url: Url,
    id: Annotated[str, typer.Argument(metavar="ID")],  # noqa: A002 - the SDK's name for it
    reveal: Reveal = False,
) -> None:
    """Show everything that is known of one token. Its secrets are masked, unless --reveal."""
    record, problem = _existing(url, id)
    for name, value in _known(record, reveal=reveal).items():
        typer.echo(f"{name:<14} {_printable(str(value))}")
    if problem is not None:
        raise problem


@app.command()
def delete(
    url: Url,
    id: Annotated[str, typer.Argument(metavar="ID")],  # noqa: A002 - the SDK's name for it
    yes: Yes = False,
) -> None:
    """Delete one token; asks first. It goes on to be valid at Zoho, unless it is revoked there."""
    record, _ = _existing(url, id)
    ask(f"Delete the token {id!r} of {_printable(record.user_name or 'an unknown user')}?", yes=yes)
    _run(url, lambda repository: repository.delete(id), writes=True)
    typer.echo("Deleted.")


@app.command()
def clear(url: Url, yes: Yes = False) -> None:
    """Delete every token; asks first. The tables stay."""
    number = _run(url, lambda repository: repository.count())
    ask(f"Delete all {number} tokens?", yes=yes)
    deleted = _run(url, lambda repository: repository.delete_all(), writes=True)
    typer.echo(f"Deleted {deleted} tokens.")


@app.command()
def purge(
    url: Url,
    idle: Annotated[
        str | None,
        typer.Option(help="Tokens not saved for so long, such as 90d, 12h or 2w.", metavar="AGE"),
    ] = None,
    stranded: Annotated[
        bool, typer.Option(help="Tokens that have ended and have no refresh token.")
    ] = False,
    yes: Yes = False,
) -> None:
    """Delete tokens that are of no more use; asks first.

    A token in use is saved whenever it is refreshed, about once an hour. Its refresh token never
    ends by itself: who still needs an idle one has to log in again.
    """
    age = None if idle is None else _age(idle)
    if age is None and not stranded:
        raise ConfigurationError("Say what to purge: --idle AGE, --stranded, or both.")
    ask("Delete these tokens?", yes=yes)
    deleted = _run(
        url, lambda repository: repository.purge(idle=age, stranded=stranded), writes=True
    )
    typer.echo(f"Deleted {deleted} tokens.")


@app.command(name="import")
def import_(
    url: Url,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A file of the SDK's FileStore (sdk_tokens.txt), a SQLite file of the sample "
            "store (zohooauth.db), or the URL of a database.",
        ),
    ] = "sdk_tokens.txt",
    table: Annotated[str, typer.Option(help="The table in a database.")] = "oauthtoken",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="All tokens, or none.")] = False,
) -> None:
    """Take over the tokens of another store. A second import changes nothing.

    A token that is known by its user or one of its tokens is updated, any other is added. What
    cannot be read is named on stderr, and the others go in; exit code 1 says so. --strict
    imports nothing then.
    """
    from zoho_orm_store import provision
    from zoho_orm_store.transfer import import_tokens

    provision.check(url)
    try:
        summary = import_tokens(
            _source(source, table),
            url,
            cipher=cipher_given(),
            strict=strict,
            dry_run=dry_run,
            on_progress=_progress,
        )
    except InvalidTokenError as error:
        raise ConfigurationError(str(error)) from None
    for problem in summary.refused:
        typer.echo(f"Refused: {_printable(problem)}", err=True)
    typer.echo(
        f"{'Would be added' if dry_run else 'Added'}: {summary.added}, updated: {summary.updated}, "
        f"unchanged: {summary.unchanged}, refused: {len(summary.refused)}."
    )
    if summary.refused:
        raise typer.Exit(1)


@app.command()
def export(
    url: Url,
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The file, which must be new.")],
) -> None:
    """Write every token into a file that the SDK's FileStore can read, secrets included."""
    from zoho_orm_store import provision
    from zoho_orm_store.transfer import export_tokens

    provision.check(url)
    number = export_tokens(url, path, cipher=cipher_given())
    typer.echo(f"Wrote {number} tokens, with their secrets, into {path}.")


def _existing(url: str, id_: str) -> tuple[TokenRecord, UndecryptableTokenError | None]:
    """A token, and why its secrets are missing, if no key opens them."""
    try:
        record, problem = _run(url, lambda repository: repository.get(id_)), None
    except UndecryptableTokenError as error:
        record, problem = error.record, error
    if record is None:
        raise ConfigurationError(f"There is no token with the id {id_!r}.")
    return record, problem


def _run(
    url: str,
    work: Callable[[TokenRepository], T],
    *,
    writes: bool = False,
    retry_for: float = 30.0,
) -> T:
    from zoho_orm_store import provision
    from zoho_orm_store._database.database import open_database
    from zoho_orm_store.repository import TokenRepository

    cipher = cipher_given()
    with closing(open_database(url, timeout=None, retry_for=retry_for)) as database:
        provision.check(database)
        run = database.write if writes else database.read
        return run(lambda connection: work(TokenRepository(connection, cipher=cipher)))


def _source(given: str, table: str) -> Iterable[Found]:
    from zoho_orm_store.transfer import FileStoreFile, TokenTable

    if "://" in given:
        return TokenTable(given, table, cipher=cipher_given())
    path = Path(given)
    if _is_sqlite(path):
        return TokenTable(f"sqlite:///{path}", table, cipher=cipher_given())
    return FileStoreFile(path)


def _is_sqlite(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(16) == b"SQLite format 3\0"


def _progress(number: int) -> None:
    if number >= 5000 and number % 5000 == 0:
        typer.echo(f"{number} tokens so far", err=True)


def _age(text: str) -> timedelta:
    units = {"h": "hours", "d": "days", "w": "weeks"}
    match = re.fullmatch(r"(\d{1,5})([hdw])", text)
    if match is None:
        raise ConfigurationError(f"An age is a number of h, d or w, such as 90d, and not {text!r}.")
    return timedelta(**{units[match[2]]: int(match[1])})


def _known(record: TokenRecord, *, reveal: bool) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, datetime):
            known[field.name] = f"{value.isoformat()}Z"
        elif value is not None and field.name in SECRETS and not reveal:
            known[field.name] = mask(value).strip("'")
        elif value is not None:
            known[field.name] = value
    return known


def _json_line(*, reveal: bool) -> Callable[..., str]:
    def line(record: TokenRecord, **marks: bool) -> str:
        return json.dumps(_known(record, reveal=reveal) | marks)

    return line


def _table_line() -> Callable[..., str]:
    now = time.time() * 1000

    def line(record: TokenRecord, **marks: bool) -> str:
        return _columns(
            record.id or "",
            record.user_name or "-",
            record.client_id or "-",
            _data_centre(record.api_domain),
            _lives(record.expiry_time, now),
            f"{record.updated_at:%Y-%m-%d %H:%M}" if record.updated_at else "-",
        )

    return line


def _columns(*values: str) -> str:
    """One line of the table, as wide as the terminal: id, user, client, centre, life, saved."""
    flexible = max(30, shutil.get_terminal_size((140, 24)).columns - 70)
    widths = (32, flexible * 2 // 3, flexible // 3, 7, 8, 16)
    cut = (_cut(value, width) for value, width in zip(values, widths, strict=True))
    return " ".join(f"{value:<{width}}" for value, width in zip(cut, widths, strict=True)).rstrip()


def _cut(text: str, width: int) -> str:
    text = _printable(text)
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _printable(text: str) -> str:
    """A text that cannot move the cursor or colour the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _data_centre(api_domain: str | None) -> str:
    """What tells Zoho's data centres apart, such as ``eu``."""
    if api_domain is None:
        return "-"
    host = api_domain.partition("://")[2] or api_domain
    return re.sub(r"^www\.(zohoapis\.|zohocloud\.)?", "", host)


def _lives(expiry_time: int | None, now: float) -> str:
    if expiry_time is None:
        return "unknown"
    seconds = (expiry_time - now) / 1000
    if seconds <= 0:
        return "ended"
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds:.0f} s"
