"""The program itself: its options, and how its errors are shown."""

from __future__ import annotations

import os
import re
import sys
from io import TextIOWrapper
from typing import TYPE_CHECKING, Annotated, Any

from zoho_orm_store import __version__
from zoho_orm_store.encryption import KEYS_VARIABLE
from zoho_orm_store.errors import MissingDependencyError, ZohoOrmStoreError

try:
    import typer
    from typer.core import TyperGroup
except ModuleNotFoundError as missing:
    if missing.name != "typer":
        raise
    # Only the installed script imports this module: its user gets a sentence, no traceback.
    sys.exit(str(MissingDependencyError("typer", "cli")))

if TYPE_CHECKING:
    from zoho_orm_store.encryption import FernetCipher

__all__ = ["Url", "Yes", "app", "ask", "cipher_given", "main"]


class _Commands(TyperGroup):
    """Commands whose errors are one line on stderr and exit code 1, and show no password."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - typer's type for it is not public
        try:
            return super().invoke(ctx)
        except ZohoOrmStoreError as error:
            typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(1) from None
        except Exception as error:
            # A usage error quotes what it did not expect, such as a URL without its --url.
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


def ask(question: str, *, yes: bool) -> None:
    """Ask on stderr, unless the answer was given; end the command at a no."""
    if not yes:
        typer.confirm(question, abort=True, err=True)


def cipher_given() -> FernetCipher | None:
    """The cipher with the keys in the environment, or ``None`` where there are none.

    Raises:
        ConfigurationError: A key is malformed.
    """
    from zoho_orm_store.encryption import FernetCipher

    return FernetCipher() if os.environ.get(KEYS_VARIABLE) else None


def main() -> None:
    """Run ``zoho-orm-store``: do what ``sys.argv`` says, and exit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A name that the terminal's encoding lacks is no reason to fail.
            stream.reconfigure(errors="replace")
    app(prog_name="zoho-orm-store")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"zoho-orm-store {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Look after the OAuth tokens that the Zoho CRM SDK keeps in a SQLAlchemy database.

    Name the database with --url, or once and for all commands in the environment variable
    ZOHO_ORM_STORE_URL, which also keeps its password out of the list of processes. Where tokens
    are encrypted, put the keys into ZOHO_ORM_STORE_KEYS. To see it all
    at work, without an account at Zoho, run: zoho-orm-store demo

    Exit codes: 0 done; 1 it failed, and stderr says why; 2 the command was not understood.
    """
