"""The commands for the tokens in the tables."""

from __future__ import annotations

import json
import re
import shutil
import time
from datetime import timedelta
from enum import Enum
from io import BytesIO
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import zoho_orm_store
from zoho_orm_store.cli.app import AsJson, CommandLineError, Yes, app, ask, env_cipher
from zoho_orm_store.cli.logins import Logins
from zoho_orm_store.cli.output import (
    changed_id,
    duration,
    echo,
    known_values,
    number_of,
    printable,
    progress,
    readable_values,
    reason_left_out,
)
from zoho_orm_store.cli.target import Target, takes_target
from zoho_orm_store.cli.urls import checked_url, missing_file
from zoho_orm_store.errors import (
    ConfigurationError,
    UndecryptableTokenError,
    UnreadableTokenError,
)
from zoho_orm_store.records import utc_now

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TypeAlias

    from sqlalchemy import Connection

    from zoho_orm_store import FileStoreFile, TokenRecord, TokenRepository, TokenTable

    Marked: TypeAlias = "tuple[TokenRecord, dict[str, bool]]"

Id = Annotated[str, typer.Argument(metavar="ID", help="The token's id.")]
Reveal = Annotated[bool, typer.Option("--reveal", help="Show the secrets.")]

_ID, _DC, _LIVES, _SAVED = 32, 6, 9, 11
_WIDE = 110
"""From so many columns on, a terminal has room for the client."""


class Sort(str, Enum):
    """The orders of a list besides that of the ids."""

    user = "user"
    expiry = "expiry"
    saved = "saved"


@app.command(name="list")
@takes_target(lease_model=True)
def list_tokens(
    target: Target,
    user: Annotated[
        str | None, typer.Option(help="Only this user's tokens.", metavar="NAME")
    ] = None,
    client: Annotated[
        str | None, typer.Option(help="Only this client's tokens.", metavar="CLIENT_ID")
    ] = None,
    expired: Annotated[
        bool | None,
        typer.Option(
            "--expired/--live", help="Only tokens whose access token has expired, or has not."
        ),
    ] = None,
    sort: Annotated[
        Sort | None,
        typer.Option(
            help="Sort by the user's name, by expiry (the next to expire first), or by the time of "
            "the last save (the latest first). This holds all tokens in memory."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many tokens.", metavar="NUMBER")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
    reveal: Reveal = False,
) -> None:
    """List the tokens, in the order of their ids.

    Each line has the id, the user, the client if the terminal is wide, the data centre, how long
    the access token still lives, and when the token was saved. "new login" means that the token
    cannot be refreshed any more. The total is printed on stderr.

    --json has every value; secrets are masked without --reveal. A token that needs a new login has
    "needs_new_login". Exit code 1 means that some tokens cannot be read or decrypted; --json marks
    them as unreadable or undecryptable.
    """
    filters = {"user_name": user, "client_id": client, "expired": expired}
    left_out: list[UnreadableTokenError] = []

    def all_tokens(repository: TokenRepository, logins: Logins) -> Iterator[Marked]:
        told = 0
        stream = repository.stream(**filters, on_undecryptable=left_out.append)  # type: ignore[arg-type]
        for record in chain(stream, [None]):
            for error in left_out[told:]:
                is_encrypted = isinstance(error, UndecryptableTokenError)
                if error.record is not None:
                    yield error.record, {"undecryptable" if is_encrypted else "unreadable": True}
            told = len(left_out)
            if record is not None:
                needs_login = logins.reason_for_new(record) is not None
                yield record, {"needs_new_login": True} if needs_login else {}

    def print_all(repository: TokenRepository, logins: Logins) -> None:
        if not as_json:
            echo(_columns("ID", "USER", "CLIENT", "DC", "LIVES", "SAVED"))
        tokens, number, to_log_in = all_tokens(repository, logins), 0, 0
        if sort is not None:
            tokens = iter(sorted(tokens, key=lambda marked: _sort_key(marked[0], sort)))
        for record, marks in islice(tokens, limit):
            number += 1
            needs_login = "needs_new_login" in marks
            to_log_in += needs_login
            if as_json:
                echo(json.dumps(known_values(record, reveal=reveal) | marks))
            else:
                echo(_columns(*_summary(record, needs_login=needs_login)))
        if not as_json:
            total = repository.count(**filters) if number == limit else number  # type: ignore[arg-type]
            shown = f"{number} of " if number < total else ""
            typer.echo(f"{shown}{number_of(total)}", err=True)
            if to_log_in:
                need = "needs" if to_log_in == 1 else "need"
                typer.echo(f"{to_log_in} of them {need} a new login", err=True)

    # Nothing can unprint a line, so a lost connection ends the list instead of starting it again.
    with target.open(retry_for=0) as database:
        logins = Logins(target, database)
        database.read(lambda connection: print_all(target.repository(connection), logins))
    if left_out:
        typer.echo(f"{len(left_out)} of them {reason_left_out(left_out)}", err=True)
        raise typer.Exit(1)


@app.command()
@takes_target(lease_model=True)
def show(
    target: Target,
    id: Id,  # noqa: A002 - the SDK's name for it
    as_json: AsJson = False,
    reveal: Reveal = False,
) -> None:
    """Show every known value of one token. Secrets are masked without --reveal."""
    record, problem = _existing(target, id)
    with target.open() as database:
        reason = None if problem else Logins(target, database).reason_for_new(record)
    if as_json:
        marks = {"needs_new_login": True} if reason else {}
        typer.echo(json.dumps(known_values(record, reveal=reveal) | marks))
    else:
        for name, value in readable_values(record, reveal=reveal).items():
            typer.echo(f"{name:<14} {value}")
        if reason:
            typer.echo(f"{'new login':<14} needed: {reason}")
    if problem is not None:
        raise problem


@app.command()
@takes_target()
def expire(target: Target, id: Id) -> None:  # noqa: A002 - the SDK's name for it
    """End a token's access token before its hour is over: its next user refreshes it.

    For example if Zoho refuses it. The token, its refresh token included, stays.
    """
    if not target.run(zoho_orm_store.TokenRepository.expire, id, writes=True):
        raise _no_such_token(id)
    typer.echo("Expired. It is refreshed before its next use.")


@app.command()
@takes_target()
def delete(target: Target, id: Id, yes: Yes = False) -> None:  # noqa: A002 - the SDK's name for it
    """Delete one token; asks first. At Zoho it stays valid until you revoke it there."""
    record, _ = _existing(target, id)
    ask(f"Delete the token {id!r} of {printable(record.user_name or 'an unknown user')}?", yes=yes)
    target.run(zoho_orm_store.TokenRepository.delete, id, writes=True)
    typer.echo("Deleted.")


@app.command()
@takes_target()
def clear(target: Target, yes: Yes = False) -> None:
    """Delete every token; asks first. The tables stay."""
    number = target.run(zoho_orm_store.TokenRepository.count)
    where = f"in the table {target.table_name} of {target.place}"
    if target.scope is None and not target.is_standard:
        where += ", whatever their scope"
    ask(f"Delete all {number_of(number)} {where}?", yes=yes)
    deleted = target.run(zoho_orm_store.TokenRepository.delete_all, writes=True)
    typer.echo(f"Deleted {number_of(deleted)}.")


@app.command()
@takes_target()
def purge(
    target: Target,
    idle: Annotated[
        str | None,
        typer.Option(
            help="Tokens that were not saved for this long, such as 90d, 12h or 2w.", metavar="AGE"
        ),
    ] = None,
    stranded: Annotated[
        bool,
        typer.Option("--stranded", help="Tokens that have expired and have no refresh token."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say how many.")] = False,
    yes: Yes = False,
) -> None:
    """Delete tokens that nobody uses any more; asks first.

    A token in use is saved at every refresh, about once an hour. An idle token could still be
    refreshed: if you delete it, its user has to log in again.
    """
    age = None if idle is None else _age(idle)
    if age is None and not stranded:
        raise CommandLineError("Say what to purge: --idle AGE, --stranded, or both.")
    if dry_run or not yes:
        number = _count_to_purge(target, age, stranded)
        if dry_run or not number:
            typer.echo(f"Would delete {number_of(number)}." if dry_run else "Nothing to delete.")
            return
        ask(f"Delete {number_of(number)}?", yes=False)
    purging = zoho_orm_store.TokenRepository.purge
    deleted = target.run(purging, writes=True, idle=age, stranded=stranded)
    typer.echo(f"Deleted {number_of(deleted)}.")


@app.command(name="import")
@takes_target()
def import_(
    target: Target,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A file of the SDK's FileStore (sdk_tokens.txt), a SQLite file of the sample "
            "store (zohooauth.db), or the URL of a database.",
        ),
    ] = "sdk_tokens.txt",
    from_table: Annotated[
        str, typer.Option(help="The table, if the source is a database.", metavar="NAME")
    ] = "oauthtoken",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Import all tokens, or none.")] = False,
    as_json: AsJson = False,
) -> None:
    """Import the tokens of another store. A second import changes nothing.

    A token that is already stored, known by its user or by one of its tokens, is updated; any
    other is added. stderr names each id that had to change.

    stderr also names what cannot be imported. The exit code is then 1, and the other tokens are
    still imported, unless you pass --strict.
    """
    tokens = _source(source, from_table)
    target.check()
    with progress("Importing", 5000) as on_progress:
        summary = zoho_orm_store.import_tokens(
            tokens,
            target.bind,
            cipher=env_cipher(),
            strict=strict,
            dry_run=dry_run,
            on_progress=on_progress,
            **target.options,
        )
    for problem in summary.refused:
        typer.echo(f"Refused: {printable(problem)}", err=True)
    for old, new in () if as_json else summary.renumbered:
        typer.echo(changed_id(old, new, dry_run=dry_run), err=True)
    if as_json:
        typer.echo(json.dumps(summary._asdict()))
    else:
        typer.echo(
            f"{'Would be added' if dry_run else 'Added'}: {summary.added}, "
            f"updated: {summary.updated}, unchanged: {summary.unchanged}, "
            f"refused: {len(summary.refused)}."
        )
    if summary.refused:
        raise typer.Exit(1)


@app.command()
@takes_target()
def export(
    target: Target,
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The file, which must not exist.")],
) -> None:
    """Write every token, with its secrets, into a file that the SDK's FileStore can read."""
    target.check()
    with progress("Exporting", 5000) as on_progress:
        number = zoho_orm_store.export_tokens(
            target.bind, path, cipher=env_cipher(), on_progress=on_progress, **target.options
        )
    typer.echo(f"Wrote {number_of(number)}, with their secrets, into {path}.")


def _existing(target: Target, id_: str) -> tuple[TokenRecord, UnreadableTokenError | None]:
    """A token, and the error if it cannot be read or decrypted."""
    record: TokenRecord | None
    try:
        record, problem = target.run(zoho_orm_store.TokenRepository.get, id_), None
    except UnreadableTokenError as error:
        record, problem = error.record, error
    if record is None:
        raise _no_such_token(id_)
    return record, problem


def _no_such_token(id_: str) -> ConfigurationError:
    return ConfigurationError(f"There is no token with the id {id_!r}.")


def _count_to_purge(target: Target, idle: timedelta | None, stranded: bool) -> int:
    def purge(connection: Connection) -> int:
        return target.repository(connection).purge(idle=idle, stranded=stranded)

    with target.open() as database:
        return database.rehearse(purge)


def _source(source: str, table: str) -> FileStoreFile | TokenTable:
    if "://" not in source:
        path = Path(source)
        with path.open("rb") if path.is_file() else BytesIO() as file:
            if file.read(16) != b"SQLite format 3\0":
                return zoho_orm_store.FileStoreFile(path)
        source = f"sqlite:///{path}"
    missing = missing_file(checked_url(source))
    if missing is not None:
        raise ConfigurationError(f"The file {missing} does not exist.")
    return zoho_orm_store.TokenTable(source, table, cipher=env_cipher())


def _age(text: str) -> timedelta:
    units = {"h": "hours", "d": "days", "w": "weeks"}
    match = re.fullmatch(r"(\d{1,5})([hdw])", text)
    if match is None:
        raise CommandLineError(f"--idle takes a number of h, d or w, such as 90d, not {text!r}.")
    return timedelta(**{units[match[2]]: int(match[1])})


def _sort_key(record: TokenRecord, sort: Sort) -> tuple[bool, str | float]:
    """What to sort by; unknown values come last."""
    if sort is Sort.user:
        return record.user_name is None, record.user_name or ""
    if sort is Sort.expiry:
        return record.expiry_time is None, record.expiry_time or 0
    saved = record.updated_at
    return saved is None, 0.0 if saved is None else (utc_now() - saved).total_seconds()


def _summary(record: TokenRecord, *, needs_login: bool) -> tuple[str, ...]:
    saved = record.updated_at
    return (
        record.id or "",
        record.user_name or "-",
        record.client_id or "-",
        _data_centre(record.api_domain),
        "new login" if needs_login else _lives(record.expiry_time),
        f"{duration(max(0, (utc_now() - saved).total_seconds()), short=True)} ago"
        if saved
        else "-",
    )


def _columns(id_: str, user: str, client: str, *others: str) -> str:
    """One line of the table, as wide as the terminal."""
    from rich.cells import cell_len, set_cell_size

    columns = shutil.get_terminal_size((140, 24)).columns
    space = columns - _ID - _DC - _LIVES - _SAVED - 4
    middle = [(user, max(10, space))]
    if columns >= _WIDE:
        for_user = space * 2 // 3
        middle = [(user, for_user), (client, space - for_user - 1)]
    cells = [(id_, _ID), *middle, *zip(others, (_DC, _LIVES, _SAVED), strict=True)]
    line = []
    for text, width in cells:
        clean = printable(text)
        if cell_len(clean) > width:
            clean = f"{set_cell_size(clean, width - 1)}…"
        line.append(set_cell_size(clean, width))
    return " ".join(line).rstrip()


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
    return "ended" if seconds <= 0 else duration(seconds, short=True)
