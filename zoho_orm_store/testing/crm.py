"""The answers of Zoho CRM to a few read requests, and the page on which a user gives consent."""

from __future__ import annotations

import json
import re
import zlib
from html import escape
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlencode

from zoho_orm_store.testing.accounts import DEFAULT_USER

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from zoho_orm_store.testing.accounts import Client

__all__ = ["Answer", "consent_answer", "crm_answer", "json_answer"]

_FIELDS = {
    "id": "bigint",
    "First_Name": "text",
    "Last_Name": "text",
    "Company": "text",
    "Email": "email",
}
_LEADS = [
    dict(zip(_FIELDS, values, strict=True))
    for values in (
        ("4150868000000100001", "Ada", "Byron", "Engines Ltd", "ada.byron@example.com"),
        ("4150868000000100002", "Grace", "Murray", "Compilers Inc", "grace.murray@example.com"),
        ("4150868000000100003", "José", "O'Brien", "Ñandú S.A.", "jose.obrien@example.com"),
    )
]
_HTML = "text/html;charset=UTF-8"
_CONSENT_PAGE = """<!doctype html>
<title>Loopback Zoho</title>
<h1>Loopback Zoho</h1>
<p>The application <code>{client_id}</code> would like to read and write your CRM data.</p>
<form>
  {hidden}
  <label>Email <input name="user" value="{user}"></label>
  <button>Accept</button>
</form>
"""


class Answer(NamedTuple):
    """An HTTP answer, and the error code to record for it."""

    status: int | None  # None closes the connection without an answer.
    body: str = ""
    content_type: str = "application/json;charset=UTF-8"
    error: str | None = None
    location: str | None = None


def json_answer(status: int, payload: Mapping[str, object], error: str | None = None) -> Answer:
    """Return an answer whose body is a JSON object."""
    return Answer(status, json.dumps(payload), error=error)


def crm_answer(
    method: str, path: str, params: Mapping[str, str], user: str | None, zgid: str
) -> Answer:
    """Answer a request to any version of Zoho CRM. Without a live token, ``user`` is ``None``."""
    if user is None:
        return _error(401, "INVALID_TOKEN", "invalid oauth token")
    match = re.fullmatch(r"/crm/v\d+(?:\.\d+)?/([\w/]+)", path)
    payload = _payload(match[1], params, user, zgid) if match and method == "GET" else None
    if payload is None:
        message = "Please check if the URL trying to access is a correct one"
        return _error(404, "INVALID_URL_PATTERN", message)
    # Zoho answers 204 if there is no such record.
    return json_answer(200, payload) if payload else Answer(204)


def consent_answer(
    params: Mapping[str, str], client: Client | None, issue_grant_token: Callable[..., str]
) -> Answer:
    """Return the consent page, or redirect to the client with a grant token.

    The page's form repeats its parameters and adds ``user``, the user who accepts.
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
        page = _CONSENT_PAGE.format(
            client_id=escape(client.client_id), hidden=hidden, user=escape(DEFAULT_USER)
        )
        return Answer(200, page, _HTML)
    query = {"code": issue_grant_token(params["user"], client=client), "location": "us"}
    if "state" in params:
        query["state"] = params["state"]
    separator = "&" if "?" in client.redirect_url else "?"
    return Answer(302, location=f"{client.redirect_url}{separator}{urlencode(query)}")


def _error(status: int, code: str, message: str) -> Answer:
    payload = {"code": code, "details": {}, "message": message, "status": "error"}
    return json_answer(status, payload, code)


def _payload(
    resource: str, params: Mapping[str, str], user: str, zgid: str
) -> dict[str, object] | None:
    """Return a resource's content: ``{}`` if it is empty, ``None`` if it does not exist."""
    info = {"per_page": 200, "count": len(_LEADS), "page": 1, "more_records": False}
    if resource == "users":
        number, name = zlib.crc32(user.encode()), user.partition("@")[0].replace(".", " ").title()
        me = {"id": f"4150868{number:012}", "email": user, "full_name": name, "status": "active"}
        return {"users": [me], "info": info | {"count": 1}}
    if resource == "org":
        org = {"id": f"4150868{zgid}", "zgid": zgid, "company_name": "Loopback", "country": "US"}
        return {"org": [org]}
    if resource == "settings/modules":
        module = {"id": "4150868000000002175", "api_name": "Leads", "api_supported": True}
        return {"modules": [module | {"generated_type": "default"}]}
    if resource == "settings/fields":
        fields = [
            {"id": f"41508680000002{n:05}", "api_name": name, "data_type": kind, "visible": True}
            for n, (name, kind) in enumerate(_FIELDS.items())
        ]
        return {"fields": fields} if params.get("module") == "Leads" else {}
    if resource == "Leads":
        return {"data": _LEADS, "info": info}
    if resource.startswith("Leads/"):
        found = [lead for lead in _LEADS if resource == f"Leads/{lead['id']}"]
        return {"data": found} if found else {}
    return None
