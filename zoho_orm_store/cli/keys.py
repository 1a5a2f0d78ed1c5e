"""The commands for the keys that encrypt secrets."""

from __future__ import annotations

import json

import typer

import zoho_orm_store
from zoho_orm_store.cli.app import AsJson, Yes, app, ask, env_cipher
from zoho_orm_store.cli.output import progress
from zoho_orm_store.cli.target import Target, takes_target
from zoho_orm_store.encryption import KEYS_VARIABLE, FernetCipher
from zoho_orm_store.errors import ConfigurationError

_MOST_PROBLEMS = 10

keys = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(
    keys,
    name="keys",
    help="Make, rotate and count the keys that encrypt secrets. Keys are read from the "
    f"environment variable {KEYS_VARIABLE}; the first one encrypts.",
    short_help="Make, rotate and count the keys that encrypt secrets.",
)


@keys.command()
def generate() -> None:
    """Print a new key. Anyone who has it can read the tokens, and nobody can without it."""
    typer.echo(zoho_orm_store.generate_key())


@keys.command()
@takes_target()
def status(target: Target, as_json: AsJson = False) -> None:
    """Count the tokens under each key, and those in plain text.

    A key is named by its id, which is a fingerprint. This command needs no key.
    """
    from zoho_orm_store._rotation import KeyRotation
    from zoho_orm_store._tokens import TokenOperations

    cipher = env_cipher()
    operations = TokenOperations.of_model(target.model, target.scope, None)
    with target.open() as database:
        counted = database.read(KeyRotation(operations).count_by_key)
    rows: list[tuple[str, int, str]] = []
    for number, key_id in enumerate(cipher.key_ids if cipher else ()):
        note = "encrypts new tokens" if number == 0 else "decrypts"
        rows.append((f"key {key_id}", counted.pop(key_id, 0), note))
    in_plain_text, garbled = counted.pop(None, 0), counted.pop("", 0)
    rows.append(("plain text", in_plain_text, _plain_text_note(in_plain_text, cipher)))
    for other, count in sorted(counted.items(), key=str):
        rows.append((f"key {other}", count, f"not in {KEYS_VARIABLE}"))
    if garbled:
        rows.append(("garbled", garbled, "changed by other means"))
    for what, count, note in rows:
        if as_json:
            typer.echo(json.dumps({"what": what, "tokens": count, "note": note}))
        else:
            typer.echo(f"{what:<20} {count:>8}  {note}".rstrip())


@keys.command()
@takes_target()
def rotate(target: Target) -> None:
    """Encrypt every encrypted token anew, under the first key.

    Tokens in plain text stay as they are: see the command encrypt. Workers can keep running: a
    token that one of them saves is never overwritten. Give them the new key first, so that they
    can read what this command writes. If a run is interrupted, run it again.
    """
    _rotate(target, _cipher_required())


@app.command()
@takes_target()
def encrypt(target: Target, yes: Yes = False) -> None:
    """Encrypt the tokens in plain text under the first key; counts them and asks first.

    Do this once, in order to turn encryption on, and when you know that every one of them is
    genuine: somebody who can write to the table may have planted some. Then give the store
    require_encryption=True.
    """
    from zoho_orm_store._rotation import KeyRotation
    from zoho_orm_store._tokens import TokenOperations

    cipher = _cipher_required()
    operations = TokenOperations.of_model(target.model, target.scope, cipher)
    target.check()
    with target.open() as database:
        number = database.read(KeyRotation(operations).count_plain)
    if number == 0:
        typer.echo("No token is in plain text.")
    else:
        are = "token is" if number == 1 else "tokens are"
        ask(f"{number} {are} in plain text. Encrypt under the key {cipher.key_id}?", yes=yes)
    _rotate(target, cipher, encrypt_plain_text=True)


@app.command()
@takes_target()
def decrypt(target: Target, yes: Yes = False) -> None:
    """Turn every encrypted token back into plain text; asks first.

    Workers can keep running if their cipher only decrypts (encrypts=False).
    """
    _cipher_required()
    ask("Keep all tokens in plain text?", yes=yes)
    _rotate(target, zoho_orm_store.FernetCipher(encrypts=False))


def _plain_text_note(number: int, cipher: FernetCipher | None) -> str:
    """Whether encryption can be required of the tokens, for somebody who encrypts."""
    if cipher is None:
        return ""
    if number:
        return "zoho-orm-store encrypt encrypts them"
    return "a store may be given require_encryption=True"


def _cipher_required() -> FernetCipher:
    cipher = env_cipher()
    if cipher is None:
        raise ConfigurationError(f"Set {KEYS_VARIABLE} to the keys, separated by commas.")
    return cipher


def _rotate(target: Target, cipher: FernetCipher, *, encrypt_plain_text: bool = False) -> None:
    from zoho_orm_store.rotation import rotate_keys

    target.check()
    with progress("Encrypting" if cipher.key_id else "Decrypting", 1000) as on_progress:
        summary = rotate_keys(
            target.bind,
            cipher,
            encrypt_plain_text=encrypt_plain_text,
            on_progress=on_progress,
            **target.options,
        )
    typer.echo(f"Tokens changed: {summary.rotated}.")
    if summary.plain_text and cipher.key_id and not encrypt_plain_text:
        typer.echo(
            f"Left in plain text: {summary.plain_text}. Encrypt them with: zoho-orm-store encrypt"
        )
    for problem in summary.undecryptable[:_MOST_PROBLEMS]:
        typer.echo(f"Left unchanged: {problem}", err=True)
    if (more := len(summary.undecryptable) - _MOST_PROBLEMS) > 0:
        typer.echo(f"Left unchanged: {more} more.", err=True)
    if (by_others := summary.left - len(summary.undecryptable)) > 0:
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
