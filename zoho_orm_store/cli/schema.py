"""The commands that create, upgrade and check the tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

import zoho_orm_store
from zoho_orm_store.cli.app import Yes, app, ask
from zoho_orm_store.cli.output import number_of
from zoho_orm_store.cli.target import Target, takes_target

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from zoho_orm_store.provision import Target as Bind

    T = TypeVar("T")

Revision = Annotated[
    str, typer.Option(help="The revision to go to, or a number of steps such as +1 or -1.")
]


@app.command()
@takes_target(scope=False)
def upgrade(target: Target, revision: Revision = "head") -> None:
    """Create the tables, or bring them up to date.

    You can run it again, and on several machines at once: one does the work, the others wait. If
    the SDK's DBStore or the sample SQLite store made the table, it is kept with its tokens. If it
    has several rows of one user, the newest row stays, and stderr names the removed ones.
    """
    adopted = _migrate(target, "upgrade", zoho_orm_store.provision.upgrade, revision)
    if adopted:
        typer.echo(f"It took over {number_of(adopted)} of the SDK's table.")


@app.command()
@takes_target(scope=False)
def downgrade(target: Target, revision: Revision = "base", yes: Yes = False) -> None:
    """Take the tables back to an earlier revision; asks first.

    No token is lost: a table that holds tokens is never dropped. At "base" it is the SDK's own
    table again, which its DBStore can read.
    """
    target.require_standard("downgrade")
    found = _current(target)
    if found is not None:
        ask(f"Take the tables in {target.place} from {found} back to {revision}?", yes=yes)
    if target.missing_file is None:
        _migrate(target, "downgrade", zoho_orm_store.provision.downgrade, revision)
    else:
        typer.echo(f"Nothing to do: the file {target.missing_file} does not exist.")


@app.command()
@takes_target(scope=False)
def current(target: Target) -> None:
    """Print the revision of the tables, or "none"."""
    target.require_standard("current")
    typer.echo(_current(target) or "none")


@app.command()
@takes_target(scope=False, lease_model=True)
def check(target: Target) -> None:
    """Check that the tables exist and are up to date, for example in a deployment.

    If they are not, the exit code is 1, and stderr names the command to run. A table of your own
    must have all columns and indexes of its model.
    """
    target.require_file()
    with target.open_unchecked(timeout=30.0, retry_for=30.0) as database:
        target.check_tables(database)
    if target.is_standard:
        typer.echo(f"The tables are up to date, at {zoho_orm_store.provision.head()}.")
    else:
        typer.echo(f"The table {target.table_name} is complete.")


@app.command()
def sql(
    dialect: Annotated[str, typer.Argument(metavar="DIALECT", help="postgresql, mysql or mariadb")],
) -> None:
    """Print the upgrade of an empty database as an SQL script, for an administrator to run.

    If a table already holds tokens, run "upgrade" instead, which also converts its rows.
    """
    typer.echo(zoho_orm_store.provision.sql(dialect))


def _current(target: Target) -> str | None:
    """The revision of the tables. A SQLite database that does not exist is not created."""
    if target.missing_file is not None:
        return None
    return zoho_orm_store.provision.current(target.bind)


def _migrate(target: Target, name: str, migrate: Callable[[Bind, str], T], revision: str) -> T:
    target.require_standard(name)
    before = _current(target)
    result = migrate(target.bind, revision)
    after = _current(target)
    if after == before:
        typer.echo(f"Nothing to do: the revision is {after or 'none'} already.")
    else:
        typer.echo(f"The revision is now {after or 'none'}; it was {before or 'none'}.")
    return result
