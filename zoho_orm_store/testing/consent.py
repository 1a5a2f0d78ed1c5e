"""The page on which a user lets a client in, as far as a browser test needs it."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from zoho_orm_store.testing.answers import Answer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from zoho_orm_store.testing.accounts import Client

__all__ = ["consent_answer"]

_HTML = "text/html;charset=UTF-8"

_PAGE = """<!doctype html>
<title>Loopback Zoho</title>
<h1>Loopback Zoho</h1>
<p>The application <code>{client_id}</code> would like to read and write your CRM data.</p>
<form>
  {hidden}
  <label>Email <input name="user" value="{user}"></label>
  <button>Accept</button>
</form>
"""


def consent_answer(
    params: Mapping[str, str],
    client: Client | None,
    user: str,
    issue_grant_token: Callable[[str, Client], str],
) -> Answer:
    """What a browser gets: the page, and once the user has accepted, the way back with a code.

    Args:
        params: The parameters in the query string, those of Zoho's own page. ``user`` is the
            email address of the user who has accepted.
        client: The client that is named there.
        user: The email address that the page proposes.
        issue_grant_token: Makes a grant token for a user and the client.
    """
    if client is None:
        return Answer(400, "<h1>Invalid client</h1>", _HTML, "invalid_client")
    if params.get("redirect_uri") != client.redirect_url:
        return Answer(400, "<h1>Invalid redirect URL</h1>", _HTML, "invalid_redirect_uri")
    if not params.get("user"):
        hidden = "".join(
            f'<input type="hidden" name="{escape(name)}" value="{escape(value)}">'
            for name, value in params.items()
        )
        page = _PAGE.format(client_id=escape(client.client_id), hidden=hidden, user=escape(user))
        return Answer(200, page, _HTML)
    back = {"code": issue_grant_token(params["user"], client), "location": "us"}
    if "state" in params:
        back["state"] = params["state"]
    separator = "&" if "?" in client.redirect_url else "?"
    return Answer(302, location=f"{client.redirect_url}{separator}{urlencode(back)}")
