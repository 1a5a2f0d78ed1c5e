"""The commands about the tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from zoho_orm_store.cli.app import Url, Yes, app, ask

if TYPE_CHECKING:
    from collections.abc import Callable


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
    yes: Yes = False,
) -> None:
    """Take the tables back to an earlier revision; asks first.

    A table that holds tokens is never dropped, and no token is lost: at "base" it is the SDK's
    own table again, which its DBStore can read.
    """
    from sqlalchemy import make_url

    from zoho_orm_store import provision
    from zoho_orm_store._database.drivers import redacted_url

    found = provision.current(url)
    if found is not None:
        question = (
            f"Take the tables in {redacted_url(make_url(url))} from {found} back to {revision}?"
        )
        ask(question, yes=yes)
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
def sql(
    dialect: Annotated[str, typer.Argument(metavar="DIALECT", help="postgresql, mysql or mariadb")],
) -> None:
    """Print the upgrade of an empty database as an SQL script, for an administrator to run.

    A table that holds tokens already needs "upgrade", which also converts its rows.
    """
    from zoho_orm_store import provision

    typer.echo(provision.sql(dialect))


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
