"""The program: its options, how it shows errors, and what several commands share."""

from __future__ import annotations

import os
import re
import sys
from contextlib import closing, contextmanager
from io import TextIOWrapper
from typing import TYPE_CHECKING, Annotated, Any

import zoho_orm_store
from zoho_orm_store.encryption import KEYS_VARIABLE
from zoho_orm_store.errors import MissingDependencyError, ZohoOrmStoreError

try:
    import typer
    from typer.core import TyperGroup
except ModuleNotFoundError as missing:
    if missing.name != "typer":
        raise
    # Only the installed script imports this module. Its user gets one sentence, not a traceback.
    sys.exit(str(MissingDependencyError("typer", "cli")))

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zoho_orm_store._database.database import Database
    from zoho_orm_store.encryption import FernetCipher

__all__ = ["Progress", "Url", "Yes", "app", "ask", "env_cipher", "main", "one_line", "open_tables"]

Url = Annotated[
    str,
    typer.Option(
        envvar="ZOHO_ORM_STORE_URL",
        help="The database as a SQLAlchemy URL, for example sqlite:///zohooauth.db or "
        "postgresql+psycopg://user@host/name.",
        metavar="URL",
    ),
]

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


class _Commands(TyperGroup):
    """Commands whose errors are one line on stderr with exit code 1, and contain no password."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - typer's type for it is not public
        try:
            return super().invoke(ctx)
        except ZohoOrmStoreError as error:
            typer.echo(f"Error: {one_line(error)}", err=True)
            raise typer.Exit(1) from None
        except Exception as error:
            # A usage error quotes the unexpected argument, such as a URL without --url before it.
            if hasattr(error, "message"):
                error.message = re.sub(r"\S*(://|[@=?]\w)\S*", "***", str(error.message))
            raise


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


class Progress:
    """Prints on stderr how many tokens are done, each time another ``step`` of them are."""

    def __init__(self, step: int) -> None:
        self._step = step
        self._printed = 0

    def __call__(self, done: int, total: int | None = None) -> None:
        """Take note of how many are done, and print it if it is time to."""
        if done // self._step > self._printed:
            self._printed = done // self._step
            so_far = "tokens so far" if total is None else f"of {total} tokens"
            typer.echo(f"{done} {so_far}", err=True)


def one_line(error: Exception) -> str:
    """Return an error's message on one line."""
    return " ".join(str(error).split())


def ask(question: str, *, yes: bool) -> None:
    """Ask on stderr, unless the answer is already yes. Any other answer ends the command."""
    if not yes:
        typer.confirm(question, abort=True, err=True)


def env_cipher() -> FernetCipher | None:
    """Return a cipher with the keys from the environment, or ``None`` if there are none.

    Raises:
        ConfigurationError: A key is malformed.
    """
    return zoho_orm_store.FernetCipher() if os.environ.get(KEYS_VARIABLE) else None


@contextmanager
def open_tables(url: str, *, retry_for: float = 30.0) -> Iterator[Database]:
    """Open a database and check its tables.

    Raises:
        SchemaError: The tables are not up to date.
    """
    from zoho_orm_store._database.database import open_database

    with closing(open_database(url, timeout=None, retry_for=retry_for)) as database:
        zoho_orm_store.provision.check(database)
        yield database


def main() -> None:
    """Run the command in ``sys.argv``, and exit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # If the terminal's encoding lacks a character, print a replacement and go on.
            stream.reconfigure(errors="replace")
    app(prog_name="zoho-orm-store")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"zoho-orm-store {zoho_orm_store.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Manage the OAuth tokens that the Zoho CRM SDK keeps in a SQLAlchemy database.

    Name the database with --url, or in the environment variable ZOHO_ORM_STORE_URL, which keeps
    its password out of the list of processes. If tokens are encrypted, put the keys into
    ZOHO_ORM_STORE_KEYS. To see everything at work without a Zoho account, run: zoho-orm-store demo

    Exit codes: 0 success; 1 failure, and stderr says why; 2 wrong command line.
    """
