"""The command that shows everything at work."""

from __future__ import annotations

from typing import Annotated

import typer

from zoho_orm_store.cli.app import app
from zoho_orm_store.cli.urls import checked_url


@app.command()
def demo(
    url: Annotated[
        str | None,
        typer.Option(
            help="A database without tokens to run on, instead of a temporary SQLite file. "
            "ZOHO_ORM_STORE_URL is ignored.",
            metavar="URL",
        ),
    ] = None,
) -> None:
    """Watch the real Zoho SDK log in, share a token and refresh it, in a few seconds.

    A server on this machine stands in for Zoho: you need no account, and nothing leaves the
    machine. Each step is checked against the database and against the requests that this server
    received. Exit code 1 means that a check failed.
    """
    from zoho_orm_store.cli.demo_steps import run

    run(None if url is None else checked_url(url))
