"""The commands that create, upgrade and check the tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

import zoho_orm_store
from zoho_orm_store.cli.app import Url, Yes, app, ask

if TYPE_CHECKING:
    from collections.abc import Callable

Revision = Annotated[
    str, typer.Option(help="The revision to go to, or a number of steps such as +1 or -1.")
]


@app.command()
def upgrade(url: Url, revision: Revision = "head") -> None:
    """Create the tables, or bring them up to date.

    You can run it again, and on several machines at once: one does the work, the others wait. If
    the SDK's DBStore or the sample SQLite store made the table, it is kept with its tokens. If it
    has several rows of one user, the newest row stays, and stderr names the removed ones.
    """
    _migrate(zoho_orm_store.provision.upgrade, url, revision)


@app.command()
def downgrade(url: Url, revision: Revision = "base", yes: Yes = False) -> None:
    """Take the tables back to an earlier revision; asks first.

    No token is lost: a table that holds tokens is never dropped. At "base" it is the SDK's own
    table again, which its DBStore can read.
    """
    from sqlalchemy import make_url

    from zoho_orm_store._database.drivers import redacted_url

    found = zoho_orm_store.provision.current(url)
    if found is not None:
        database = redacted_url(make_url(url))
        ask(f"Take the tables in {database} from {found} back to {revision}?", yes=yes)
    _migrate(zoho_orm_store.provision.downgrade, url, revision)


@app.command()
def current(url: Url) -> None:
    """Print the revision of the tables, or "none"."""
    typer.echo(zoho_orm_store.provision.current(url) or "none")


@app.command()
def check(url: Url) -> None:
    """Check that the tables exist and are up to date, for example in a deployment.

    If they are not, the exit code is 1, and stderr names the command to run.
    """
    zoho_orm_store.provision.check(url)
    typer.echo(f"The tables are up to date, at {zoho_orm_store.provision.head()}.")


@app.command()
def sql(
    dialect: Annotated[str, typer.Argument(metavar="DIALECT", help="postgresql, mysql or mariadb")],
) -> None:
    """Print the upgrade of an empty database as an SQL script, for an administrator to run.

    If a table already holds tokens, run "upgrade" instead, which also converts its rows.
    """
    typer.echo(zoho_orm_store.provision.sql(dialect))


def _migrate(migrate: Callable[[str, str], None], url: str, revision: str) -> None:
    before = zoho_orm_store.provision.current(url)
    migrate(url, revision)
    after = zoho_orm_store.provision.current(url)
    if after == before:
        typer.echo(f"Nothing to do: the revision is {after or 'none'} already.")
    else:
        typer.echo(f"The revision is now {after or 'none'}; it was {before or 'none'}.")
