"""The commands for the tokens in the tables."""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import fields
from datetime import datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import zoho_orm_store
from zoho_orm_store.cli.app import Progress, Url, Yes, app, ask, env_cipher, open_tables
from zoho_orm_store.errors import (
    ConfigurationError,
    UndecryptableTokenError,
    UnreadableTokenError,
)
from zoho_orm_store.records import SECRETS, mask

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeVar

    from zoho_orm_store import FileStoreFile, TokenRecord, TokenRepository, TokenTable

    T = TypeVar("T")

__all__ = ["known_values", "reason_left_out"]

Id = Annotated[str, typer.Argument(metavar="ID", help="The token's id.")]
Reveal = Annotated[bool, typer.Option("--reveal", help="Show the secrets.")]


@app.command(name="list")
def list_tokens(
    url: Url,
    user: Annotated[str | None, typer.Option(help="Only this user's tokens.")] = None,
    client: Annotated[str | None, typer.Option(help="Only this client's tokens.")] = None,
    expired: Annotated[
        bool | None,
        typer.Option(
            "--expired/--live", help="Only tokens whose access token has expired, or has not."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
    reveal: Reveal = False,
) -> None:
    """List the tokens, in the order of their ids.

    Each line has the id, user and client, the data centre, how long the access token still lives,
    and when the token was saved (UTC). --json has every value; secrets are masked without
    --reveal. Exit code 1 means that some tokens cannot be read or decrypted; --json marks them as
    unreadable or undecryptable.
    """
    left_out: list[UnreadableTokenError] = []

    def print_token(record: TokenRecord, **marks: bool) -> None:
        if as_json:
            typer.echo(json.dumps(known_values(record, reveal=reveal) | marks))
        else:
            typer.echo(_columns(*_summary(record)))

    def print_left_out(error: UnreadableTokenError) -> None:
        left_out.append(error)
        if error.record is not None:
            is_encrypted = isinstance(error, UndecryptableTokenError)
            print_token(error.record, **{"undecryptable" if is_encrypted else "unreadable": True})

    def print_all(repository: TokenRepository) -> None:
        if not as_json:
            typer.echo(_columns("ID", "USER", "CLIENT", "DC", "LIVES", "SAVED"))
        for record in repository.stream(
            user_name=user, client_id=client, expired=expired, on_undecryptable=print_left_out
        ):
            print_token(record)

    # Nothing can unprint a line, so a lost connection ends the list instead of starting it again.
    _run(url, print_all, retry_for=0)
    if left_out:
        typer.echo(f"{len(left_out)} of them {reason_left_out(left_out)}", err=True)
        raise typer.Exit(1)


@app.command()
def show(url: Url, id: Id, reveal: Reveal = False) -> None:  # noqa: A002 - the SDK's name for it
    """Show every known value of one token. Secrets are masked without --reveal."""
    record, problem = _existing(url, id)
    for name, value in known_values(record, reveal=reveal).items():
        typer.echo(f"{name:<14} {_printable(str(value))}")
    if problem is not None:
        raise problem


@app.command()
def delete(url: Url, id: Id, yes: Yes = False) -> None:  # noqa: A002 - the SDK's name for it
    """Delete one token; asks first. At Zoho it stays valid until you revoke it there."""
    record, _ = _existing(url, id)
    ask(f"Delete the token {id!r} of {_printable(record.user_name or 'an unknown user')}?", yes=yes)
    _run(url, zoho_orm_store.TokenRepository.delete, id, writes=True)
    typer.echo("Deleted.")


@app.command()
def clear(url: Url, yes: Yes = False) -> None:
    """Delete every token; asks first. The tables stay."""
    number = _run(url, zoho_orm_store.TokenRepository.count)
    ask(f"Delete all {number} tokens?", yes=yes)
    deleted = _run(url, zoho_orm_store.TokenRepository.delete_all, writes=True)
    typer.echo(f"Deleted {deleted} tokens.")


@app.command()
def purge(
    url: Url,
    idle: Annotated[
        str | None,
        typer.Option(
            help="Tokens that were not saved for this long, such as 90d, 12h or 2w.", metavar="AGE"
        ),
    ] = None,
    stranded: Annotated[
        bool, typer.Option(help="Tokens that have expired and have no refresh token.")
    ] = False,
    yes: Yes = False,
) -> None:
    """Delete tokens that nobody uses any more; asks first.

    A token in use is saved at every refresh, about once an hour. An idle token could still be
    refreshed: if you delete it, its user has to log in again.
    """
    age = None if idle is None else _age(idle)
    if age is None and not stranded:
        raise ConfigurationError("Say what to purge: --idle AGE, --stranded, or both.")
    ask("Delete these tokens?", yes=yes)
    purging = zoho_orm_store.TokenRepository.purge
    deleted = _run(url, purging, writes=True, idle=age, stranded=stranded)
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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Import all tokens, or none.")] = False,
) -> None:
    """Import the tokens of another store. A second import changes nothing.

    A token that is already stored, known by its user or by one of its tokens, is updated; any
    other is added. stderr names what cannot be imported. The exit code is then 1, and the other
    tokens are still imported, unless you pass --strict.
    """
    zoho_orm_store.provision.check(url)
    summary = zoho_orm_store.import_tokens(
        _source(source, table),
        url,
        cipher=env_cipher(),
        strict=strict,
        dry_run=dry_run,
        on_progress=Progress(5000),
    )
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
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The file, which must not exist.")],
) -> None:
    """Write every token, with its secrets, into a file that the SDK's FileStore can read."""
    zoho_orm_store.provision.check(url)
    number = zoho_orm_store.export_tokens(url, path, cipher=env_cipher())
    typer.echo(f"Wrote {number} tokens, with their secrets, into {path}.")


def known_values(record: TokenRecord, *, reveal: bool = False) -> dict[str, Any]:
    """Return a record's known values by name, ready for JSON.

    Args:
        record: The token.
        reveal: Whether to return the secrets themselves instead of their last characters.
    """
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    known = {name: value for name, value in values.items() if value is not None}
    for name, value in known.items():
        if isinstance(value, datetime):
            known[name] = f"{value.isoformat()}Z"
        elif name in SECRETS and not reveal:
            known[name] = mask(value).strip("'")
    return known


def reason_left_out(errors: Sequence[UnreadableTokenError]) -> str:
    """Say what cannot be done with some tokens, and why not with the first one."""
    are_encrypted = all(isinstance(error, UndecryptableTokenError) for error in errors)
    return f"cannot be {'decrypted' if are_encrypted else 'read'}. {errors[0]}"


def _existing(url: str, id_: str) -> tuple[TokenRecord, UnreadableTokenError | None]:
    """A token, and the error if it cannot be read or decrypted."""
    record: TokenRecord | None
    try:
        record, problem = _run(url, zoho_orm_store.TokenRepository.get, id_), None
    except UnreadableTokenError as error:
        record, problem = error.record, error
    if record is None:
        raise ConfigurationError(f"There is no token with the id {id_!r}.")
    return record, problem


def _run(
    url: str,
    work: Callable[..., T],
    *args: object,
    writes: bool = False,
    retry_for: float = 30.0,
    **options: object,
) -> T:
    """Run work that takes a repository and other arguments, in a transaction."""
    cipher = env_cipher()
    with open_tables(url, retry_for=retry_for) as database:
        run = database.write if writes else database.read
        return run(
            lambda connection: work(
                zoho_orm_store.TokenRepository(connection, cipher=cipher), *args, **options
            )
        )


def _source(source: str, table: str) -> FileStoreFile | TokenTable:
    if "://" not in source:
        path = Path(source)
        with path.open("rb") if path.is_file() else BytesIO() as file:
            if file.read(16) != b"SQLite format 3\0":
                return zoho_orm_store.FileStoreFile(path)
        source = f"sqlite:///{path}"
    return zoho_orm_store.TokenTable(source, table, cipher=env_cipher())


def _age(text: str) -> timedelta:
    units = {"h": "hours", "d": "days", "w": "weeks"}
    match = re.fullmatch(r"(\d{1,5})([hdw])", text)
    if match is None:
        raise ConfigurationError(f"An age is a number of h, d or w, such as 90d, not {text!r}.")
    return timedelta(**{units[match[2]]: int(match[1])})


def _summary(record: TokenRecord) -> tuple[str, ...]:
    return (
        record.id or "",
        record.user_name or "-",
        record.client_id or "-",
        _data_centre(record.api_domain),
        _lives(record.expiry_time),
        f"{record.updated_at:%Y-%m-%d %H:%M}" if record.updated_at else "-",
    )


def _columns(*values: str) -> str:
    """One line of the table, as wide as the terminal; its values are those of `_summary`."""
    flexible = max(30, shutil.get_terminal_size((140, 24)).columns - 70)
    widths = (32, flexible * 2 // 3, flexible // 3, 7, 8, 16)
    cells = zip(map(_printable, values), widths, strict=True)
    cut = (text if len(text) <= width else f"{text[: width - 1]}…" for text, width in cells)
    return " ".join(f"{text:<{width}}" for text, width in zip(cut, widths, strict=True)).rstrip()


def _printable(text: str) -> str:
    """A text that cannot move the terminal's cursor or change its colours."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _data_centre(api_domain: str | None) -> str:
    """The short name of a Zoho data centre, such as ``eu``."""
    if api_domain is None:
        return "-"
    host = api_domain.partition("://")[2] or api_domain
    return re.sub(r"^www\.(zohoapis\.|zohocloud\.)?", "", host)


def _lives(expiry_time: int | None) -> str:
    """How long an access token still lives."""
    if expiry_time is None:
        return "unknown"
    seconds = expiry_time / 1000 - time.time()
    if seconds <= 0:
        return "ended"
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds:.0f} s"
