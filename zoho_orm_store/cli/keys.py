"""The commands about the keys that secrets are encrypted under."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import typer

from zoho_orm_store.cli.app import Url, Yes, app, ask, cipher_given
from zoho_orm_store.encryption import KEYS_VARIABLE
from zoho_orm_store.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from zoho_orm_store.encryption import FernetCipher

_SHOWN = 10

keys = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(
    keys,
    name="keys",
    help=f"Make, change and count the keys that secrets are encrypted under. Keys are read from "
    f"the environment variable {KEYS_VARIABLE}, the first one encrypts.",
    short_help="Make, change and count the keys that secrets are encrypted under.",
)


@keys.command()
def generate() -> None:
    """Print a new key. Whoever has it can read the tokens, and without it nobody can."""
    from zoho_orm_store.encryption import generate_key

    typer.echo(generate_key())


@keys.command()
def status(url: Url) -> None:
    """Count the tokens under each key, and those in plain text.

    Keys are named by their ids, which are fingerprints. Works without any key.
    """
    from zoho_orm_store import provision
    from zoho_orm_store._database.database import open_database
    from zoho_orm_store._tokens import TokenOperations
    from zoho_orm_store.models import StoredToken

    cipher = cipher_given()
    known = cipher.key_ids if cipher is not None else ()
    with closing(open_database(url, timeout=None, retry_for=30.0)) as database:
        provision.check(database)
        counted = database.read(TokenOperations.of_model(StoredToken, None, None).count_by_key)
    for number, key_id in enumerate(known):
        note = "encrypts new tokens" if number == 0 else "decrypts"
        _echo_count(f"key {key_id}", counted.pop(key_id, 0), note)
    _echo_count("plain text", counted.pop(None, 0), "")
    garbled = counted.pop("", 0)
    for other, count in sorted(counted.items(), key=str):
        _echo_count(f"key {other}", count, f"not in {KEYS_VARIABLE}")
    if garbled:
        _echo_count("garbled", garbled, "changed by other means")


@keys.command()
def rotate(url: Url) -> None:
    """Encrypt every token under the first key, those in plain text too.

    Workers may go on meanwhile: a token that one of them saves is never overwritten. Give them
    the new key first, or they cannot read what this command has written. A run that was cut
    short is simply started again.
    """
    _rotate(url, _cipher_required())


@app.command()
def decrypt(url: Url, yes: Yes = False) -> None:
    """Turn every encrypted token back into plain text; asks first.

    Workers may go on meanwhile, if their cipher only decrypts (encrypts=False).
    """
    from zoho_orm_store.encryption import FernetCipher

    _cipher_required()
    ask("Keep all tokens in plain text?", yes=yes)
    _rotate(url, FernetCipher(encrypts=False))


def _cipher_required() -> FernetCipher:
    cipher = cipher_given()
    if cipher is None:
        raise ConfigurationError(f"Set {KEYS_VARIABLE} to the keys, separated by commas.")
    return cipher


def _rotate(url: str, cipher: FernetCipher) -> None:
    from zoho_orm_store import provision
    from zoho_orm_store.rotation import rotate_keys

    provision.check(url)
    summary = rotate_keys(url, cipher, on_progress=_progress())
    typer.echo(f"Tokens changed: {summary.rotated}.")
    for problem in summary.undecryptable[:_SHOWN]:
        typer.echo(f"Left as it was: {problem}", err=True)
    if len(summary.undecryptable) > _SHOWN:
        typer.echo(f"Left as they were: {len(summary.undecryptable) - _SHOWN} more.", err=True)
    by_others = summary.left - len(summary.undecryptable)
    if by_others > 0:
        others, cure = "use other keys", "the new keys"
        if cipher.key_id is None:
            others, cure = "still encrypt", "encrypts=False"
        typer.echo(
            f"{by_others} tokens were saved meanwhile by workers that {others}. "
            f"Restart those with {cure}, and run this again.",
            err=True,
        )
    if summary.left:
        raise typer.Exit(1)


def _progress() -> Callable[[int, int], None]:
    """What tells of each thousand, however many a batch adds."""
    told = 0

    def tell(done: int, total: int) -> None:
        nonlocal told
        if done // 1000 > told:
            told = done // 1000
            typer.echo(f"{done} of {total} tokens", err=True)

    return tell


def _echo_count(what: str, count: int, note: str) -> None:
    typer.echo(f"{what:<20} {count:>8}  {note}".rstrip())
