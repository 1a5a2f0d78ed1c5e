"""The command that shows everything at work."""

from __future__ import annotations

from typing import Annotated

import typer

from zoho_orm_store.cli.app import app


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
    from zoho_orm_store.cli.demo_steps import run

    run(url)
