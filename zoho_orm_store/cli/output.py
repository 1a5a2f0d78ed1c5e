"""How tokens, times and long jobs are printed."""

from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager
from dataclasses import fields
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import typer

from zoho_orm_store.errors import UndecryptableTokenError
from zoho_orm_store.records import SECRETS, mask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from zoho_orm_store import TokenRecord
    from zoho_orm_store.errors import UnreadableTokenError

__all__ = [
    "changed_id",
    "duration",
    "echo",
    "known_values",
    "number_of",
    "printable",
    "progress",
    "readable_values",
    "reason_left_out",
]

_UNITS = (("day", 86_400), ("hour", 3_600), ("minute", 60), ("second", 1))


def echo(line: str) -> None:
    """Print a line on stdout. If nobody reads it any more (``| head``), end without an error."""
    try:
        typer.echo(line)
    except BrokenPipeError:
        # Otherwise Python reports at its exit that it cannot write the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # Unlike typer.Exit, it is not taken for an error of the database.
        raise SystemExit(0) from None


def printable(text: str) -> str:
    """A text that cannot move the terminal's cursor or change its colours."""
    return "".join(character if character.isprintable() else "?" for character in text)


def number_of(number: int) -> str:
    """A number of tokens, in words."""
    return f"{number} token{'' if number == 1 else 's'}"


def changed_id(old: str, new: str, *, dry_run: bool = False) -> str:
    """Say which id a token has now, or would have."""
    became = "would become" if dry_run else "is now"
    return f"The id {printable(repr(old))} {became} {printable(repr(new))}."


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


def readable_values(record: TokenRecord, *, reveal: bool = False) -> dict[str, str]:
    """Return a record's known values by name, with the times as people read them."""
    known = known_values(record, reveal=reveal)
    times = {
        "expiry_time": None if record.expiry_time is None else record.expiry_time / 1000,
        "created_at": _epoch(record.created_at),
        "updated_at": _epoch(record.updated_at),
    }
    known |= {name: _readable(at) for name, at in times.items() if at is not None}
    return {name: printable(str(value)) for name, value in known.items()}


def duration(seconds: float, *, short: bool = False) -> str:
    """A length of time in its largest unit of which there are two: ``90 minutes``, or ``90 min``.

    Args:
        seconds: The length.
        short: Whether to abbreviate the unit.
    """
    name, length = next((each for each in _UNITS if seconds >= 2 * each[1]), _UNITS[-1])
    number = int(seconds // length)
    if short:
        return f"{number} {'min' if name == 'minute' else name[0]}"
    return f"{number} {name}{'' if number == 1 else 's'}"


def reason_left_out(errors: Sequence[UnreadableTokenError]) -> str:
    """Say what cannot be done with some tokens, and why not with the first one."""
    are_encrypted = all(isinstance(error, UndecryptableTokenError) for error in errors)
    return f"cannot be {'decrypted' if are_encrypted else 'read'}. {errors[0]}"


@contextmanager
def progress(what: str, step: int) -> Iterator[Callable[..., None]]:
    """Show on stderr how far a long job is: as a bar on a terminal, or else line by line.

    Args:
        what: What the job does.
        step: After how many tokens to print a line, if it is not a terminal.

    Yields:
        A function of the number of tokens that are done, and of the number in all if it is known.
    """
    if not sys.stderr.isatty():
        yield _Lines(step)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total=None: bar.update(task, completed=done, total=total)


class _Lines:
    """Prints on stderr how many tokens are done, each time another ``step`` of them are."""

    def __init__(self, step: int) -> None:
        self._step = step
        self._printed = 0

    def __call__(self, done: int, total: int | None = None) -> None:
        if done // self._step > self._printed:
            self._printed = done // self._step
            so_far = "tokens so far" if total is None else f"of {total} tokens"
            typer.echo(f"{done} {so_far}", err=True)


def _epoch(moment: datetime | None) -> float | None:
    """The epoch seconds of a naive UTC time."""
    return None if moment is None else moment.replace(tzinfo=timezone.utc).timestamp()


def _readable(at: float) -> str:
    """A time in the local zone, and how far away it is."""
    try:
        local = f"{datetime.fromtimestamp(at, timezone.utc).astimezone():%Y-%m-%d %H:%M:%S %Z}"
    except (ValueError, OverflowError, OSError):
        return f"{at * 1000:.0f}"
    away = at - time.time()
    return f"{local} ({f'in {duration(away)}' if away > 0 else f'{duration(-away)} ago'})"
