"""The program: how it starts, how it shows errors, and what several commands share."""

from __future__ import annotations

import os
import re
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import zoho_orm_store
from zoho_orm_store.encryption import KEYS_VARIABLE
from zoho_orm_store.errors import ConfigurationError, MissingDependencyError, ZohoOrmStoreError

try:
    import typer
    from typer.core import TyperGroup
except ModuleNotFoundError as missing:
    if missing.name != "typer":
        raise
    # Only the installed script imports this module. Its user gets one sentence, not a traceback.
    sys.exit(str(MissingDependencyError("typer", "cli")))

if TYPE_CHECKING:
    from zoho_orm_store.encryption import FernetCipher

__all__ = [
    "AsJson",
    "CommandLineError",
    "Yes",
    "app",
    "ask",
    "env_cipher",
    "main",
    "one_line",
    "without_passwords",
]

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class CommandLineError(ConfigurationError):
    """An option has a value that it cannot have. The exit code is 2."""


class _Commands(TyperGroup):
    """Commands whose errors are one line on stderr, and contain no password."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - typer's type for it is not public
        try:
            return super().invoke(ctx)
        except ZohoOrmStoreError as error:
            typer.echo(f"Error: {one_line(error)}", err=True)
            raise typer.Exit(2 if isinstance(error, CommandLineError) else 1) from None
        except Exception as error:
            # A usage error quotes the unexpected argument, such as a URL without --url before it.
            if hasattr(error, "message"):
                error.message = re.sub(r"\S*(://|[@=?]\w)\S*", "***", str(error.message))
            raise


app = typer.Typer(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def one_line(error: Exception) -> str:
    """Return an error's message on one line."""
    return " ".join(str(error).split())


def without_passwords(text: str) -> str:
    """Remove what may be a password in a URL from a text."""
    return re.sub(r"://\S*@", "://***@", text)


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
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Manage the OAuth tokens that the Zoho CRM SDK keeps in a SQLAlchemy database.

    Name the database with --url, or in the environment variable ZOHO_ORM_STORE_URL, which keeps
    its password out of the list of processes. If tokens are encrypted, put the keys into
    ZOHO_ORM_STORE_KEYS. To see everything at work without a Zoho account, run: zoho-orm-store demo

    Options can also be set in the section [tool.zoho_orm_store] of the pyproject.toml in the
    current folder.

    Exit codes: 0 success; 1 failure, and stderr says why; 2 wrong command line.
    """
    from zoho_orm_store.cli.project import default_map, read_settings

    context.default_map = default_map(context.command, read_settings(Path.cwd()))
