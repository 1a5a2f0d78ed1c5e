"""The commands that create, upgrade and check the tables."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

import zoho_orm_store
from zoho_orm_store.cli.app import Yes, app, ask
from zoho_orm_store.cli.output import changed_id, number_of
from zoho_orm_store.cli.target import Target, takes_target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TypeVar

    from zoho_orm_store.provision import Target as Bind

    T = TypeVar("T")

Revision = Annotated[
    str,
    typer.Option(
        help="The revision to go to, or a number of steps such as +1 or -1.", metavar="REVISION"
    ),
]


@app.command()
@takes_target(scope=False)
def upgrade(target: Target, revision: Revision = "head") -> None:
    """Create the tables, or bring them up to date.

    You can run it again, and on several machines at once: one does the work, the others wait.

    If the SDK's DBStore or the sample SQLite store made the table, it is kept with its tokens. Back
    it up first, for example with mysqldump or by copying the SQLite file: if it has several rows of
    one user, only the newest stays, and stderr names the removed ones. "check" says beforehand
    whose table it is.
    """
    tell = partial(typer.echo, err=True)
    migrate = partial(zoho_orm_store.provision.upgrade, on_step=tell)
    adopted = _migrate(target, "upgrade", migrate, revision)
    if adopted:
        typer.echo(f"It took over {number_of(adopted)} of the SDK's table.")


@app.command()
@takes_target(scope=False)
def downgrade(target: Target, revision: Revision = "base", yes: Yes = False) -> None:
    """Take the tables back to an earlier revision; asks first.

    Back the tables up first. No token is lost: a table that holds tokens is never dropped. At
    "base" it is the SDK's own table again, which its DBStore can read. That needs whole numbers as
    ids: stderr names each id that had to change.
    """
    target.require_standard("downgrade")
    found = _current(target)
    if found is not None:
        ask(
            f"Back up the tables in {target.place} first. "
            f"Take them from {found} back to {revision}?",
            yes=yes,
        )
    if target.missing_file is not None:
        typer.echo(f"Nothing to do: the file {target.missing_file} does not exist.")
        return
    with _quiet_about_ids():
        renumbered = _migrate(target, "downgrade", zoho_orm_store.provision.downgrade, revision)
    for old, new in renumbered:
        typer.echo(changed_id(old, new), err=True)


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


@contextmanager
def _quiet_about_ids() -> Iterator[None]:
    """Leave out the warning that names the changed ids, which the command prints one by one."""
    logger = logging.getLogger("zoho_orm_store.migrations")

    def is_about_others(record: logging.LogRecord) -> bool:
        return "got new ids" not in str(record.msg)  # The revision that says it is frozen.

    logger.addFilter(is_about_others)
    try:
        yield
    finally:
        logger.removeFilter(is_about_others)


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
