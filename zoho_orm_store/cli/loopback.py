"""The command that runs the stand-in for Zoho for several processes."""

from __future__ import annotations

import time
from contextlib import suppress
from shlex import quote
from typing import Annotated

import typer

from zoho_orm_store.cli.app import app
from zoho_orm_store.errors import ConfigurationError

_SNIPPET = """
# In Python, in as many processes as you like:
#
#   import os
#   from zohocrmsdk.src.com.zoho.api.authenticator import OAuthToken
#   from zohocrmsdk.src.com.zoho.crm.api import Initializer
#   from zoho_orm_store import SQLAlchemyTokenStore
#   from zoho_orm_store.testing import LoopbackZoho
#
#   zoho = LoopbackZoho.connect("{url}")
#   token = OAuthToken(
#       client_id=zoho.client_id,
#       client_secret=zoho.client_secret,
#       grant_token=os.environ["ZOHO_GRANT_TOKEN"],  # can be exchanged once
#       redirect_url=zoho.redirect_url,
#   )
#   store = SQLAlchemyTokenStore("sqlite:///zohooauth.db")
#   Initializer.initialize(environment=zoho.environment(), token=token, store=store)
"""


@app.command()
def loopback(
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="The port of 127.0.0.1; 0 chooses a free one.")
    ] = 0,
    user: Annotated[
        list[str] | None,
        typer.Option(
            metavar="EMAIL",
            help="A user of Zoho's, who gets a refresh token and a grant code; may be repeated. "
            "The second one's are ZOHO_REFRESH_TOKEN_2 and ZOHO_GRANT_TOKEN_2.",
        ),
    ] = None,
) -> None:
    """Run a stand-in for Zoho on this machine until Ctrl-C, for several processes.

    It prints a client, a refresh token and a grant code as lines to paste into a shell. Everything
    is forgotten when it ends.
    """
    from zoho_orm_store.testing import DEFAULT_USER, LoopbackZoho

    zoho = LoopbackZoho(port=port, grant_token_lifetime=None)
    try:
        zoho.start()
    except OSError as error:
        raise ConfigurationError(
            f"Cannot listen on port {port} of 127.0.0.1: {error.strerror}."
        ) from None
    variables = {
        "ZOHO_LOOPBACK_URL": zoho.url,
        "ZOHO_API_URL": zoho.url,
        "ZOHO_ACCOUNTS_URL": zoho.accounts_url,
        "ZOHO_CLIENT_ID": zoho.client_id,
        "ZOHO_CLIENT_SECRET": zoho.client_secret,
        "ZOHO_REDIRECT_URL": zoho.redirect_url,
    }
    for number, email in enumerate(user or [DEFAULT_USER], 1):
        suffix = f"_{number}" if number > 1 else ""
        variables[f"ZOHO_REFRESH_TOKEN{suffix}"] = zoho.issue_refresh_token(email)
        variables[f"ZOHO_GRANT_TOKEN{suffix}"] = zoho.issue_grant_token(email)
    variables["no_proxy"] = "127.0.0.1"
    typer.echo(f"# A stand-in for Zoho answers at {zoho.url} until Ctrl-C. In another shell:")
    for name, value in variables.items():
        typer.echo(f"export {name}={quote(value)}")
    typer.echo(_SNIPPET.format(url=zoho.url))
    with suppress(KeyboardInterrupt):
        while True:
            time.sleep(3600)
    counts = zoho.counts
    zoho.close()
    typer.echo(
        f"# Stopped, after {counts.exchanges} logins, {counts.refreshes} refreshes and "
        f"{counts.api_calls} API calls."
    )
