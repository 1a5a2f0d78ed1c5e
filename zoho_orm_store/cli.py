"""The command line, ``zoho-orm-store``.

SQLAlchemy, Alembic and the Zoho SDK are imported by the commands that use them, so that ``--help``
answers at once.
"""

from __future__ import annotations

import re
import sys
from io import TextIOWrapper
from typing import TYPE_CHECKING, Annotated, Any

from zoho_orm_store import __version__
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
    from collections.abc import Callable

__all__ = ["app", "main"]


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
                error.message = re.sub(r"://\S*@", "://***@", str(error.message))
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
    ZOHO_ORM_STORE_URL, which also keeps its password out of the list of processes. To see it all
    at work, without an account at Zoho, run: zoho-orm-store demo

    Exit codes: 0 done; 1 it failed, and stderr says why; 2 the command was not understood.
    """


@app.command()
def upgrade(
    url: Url,
    revision: Annotated[
        str, typer.Option(help="Where to: a revision, or a number of steps such as +1.")
    ] = "head",
) -> None:
    """Make the tables, or bring them up to date.

    Safe to run again, and from several machines at once: one does the work. A table that the
    SDK's own DBStore or the sample SQLite store has made is adopted with the tokens in it. Where
    that table holds several rows of one user, the newest stays, and stderr names the others.
    """
    from zoho_orm_store import provision

    _migrate(provision.upgrade, url, revision)


@app.command()
def downgrade(
    url: Url,
    revision: Annotated[
        str, typer.Option(help="Where to: a revision, or a number of steps such as -1.")
    ] = "base",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Take the tables back to an earlier revision; asks first.

    A table that holds tokens is never dropped, and no token is lost: at "base" it is the SDK's
    own table again, which its DBStore can read.
    """
    from sqlalchemy import make_url

    from zoho_orm_store import provision
    from zoho_orm_store.dialects import shown

    found = provision.current(url)
    if found is not None and not yes:
        question = f"Take the tables in {shown(make_url(url))} from {found} back to {revision}?"
        typer.confirm(question, abort=True, err=True)
    _migrate(provision.downgrade, url, revision)


@app.command()
def current(url: Url) -> None:
    """Print the revision that the tables are at, or "none"."""
    from zoho_orm_store import provision

    typer.echo(provision.current(url) or "none")


@app.command()
def check(url: Url) -> None:
    """Check that the tables are there and up to date, for a deployment to rely on.

    Exit code 1 and the command to run, if they are not.
    """
    from zoho_orm_store import provision

    provision.check(url)
    typer.echo(f"The tables are up to date, at {provision.head()}.")


@app.command()
def demo(
    url: Annotated[
        str | None,
        typer.Option(
            help="A database to run on instead of a temporary SQLite file. It must hold no tokens. "
            "ZOHO_ORM_STORE_URL is not looked at.",
            metavar="URL",
        ),
    ] = None,
) -> None:
    """Watch the real Zoho SDK log in, share and refresh a token, in a few seconds.

    Zoho is a stand-in on this machine: no account is needed, and nothing leaves it. Every step is
    checked against the database and against what that Zoho was asked; exit code 1 means that one
    did not do what it says.
    """
    from zoho_orm_store.demo import run

    run(url)


def _migrate(migrate: Callable[[str, str], None], url: str, revision: str) -> None:
    """Run ``provision.upgrade`` or ``provision.downgrade``, and say what has changed."""
    from zoho_orm_store import provision

    before = provision.current(url)
    migrate(url, revision)
    after = provision.current(url)
    if after == before:
        typer.echo(f"Nothing to do: the revision is {after or 'none'} already.")
    else:
        typer.echo(f"The revision is now {after or 'none'}; it was {before or 'none'}.")
