"""The little of Zoho CRM that there is: who am I, which organization, and a few leads to read."""

from __future__ import annotations

import re
import zlib
from typing import TYPE_CHECKING

from zoho_orm_store.testing.answers import NO_CONTENT, Answer, json_answer

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["crm_answer"]

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
_MODULE = {
    "id": "4150868000000002175",
    "api_name": "Leads",
    "api_supported": True,
    "generated_type": "default",
}


def crm_answer(
    method: str, path: str, params: Mapping[str, str], user: str | None, zgid: str
) -> Answer:
    """What Zoho CRM answers, in every version of its API.

    Args:
        method: The HTTP method.
        path: The path, without the query string.
        params: The parameters in the query string.
        user: The email address of the user whose access token came along; ``None`` without a
            live one.
        zgid: The id of the user's organization.
    """
    if user is None:
        return _error(401, "INVALID_TOKEN", "invalid oauth token")
    match = re.fullmatch(r"/crm/v\d+(?:\.\d+)?/([\w/]+)", path)
    resource = match[1] if match and method == "GET" else ""
    payload = _payload(resource, params, user, zgid)
    if payload is None:
        message = "Please check if the URL trying to access is a correct one"
        return _error(404, "INVALID_URL_PATTERN", message)
    return json_answer(200, payload) if payload else NO_CONTENT


def _error(status: int, code: str, message: str) -> Answer:
    payload = {"code": code, "details": {}, "message": message, "status": "error"}
    return json_answer(status, payload, code)


def _payload(
    resource: str, params: Mapping[str, str], user: str, zgid: str
) -> dict[str, object] | None:
    """The content of a resource: ``{}`` when it is empty, ``None`` when it does not exist."""
    info = {"per_page": 200, "count": len(_LEADS), "page": 1, "more_records": False}
    if resource == "users":
        return {"users": [_user(user)], "info": info | {"count": 1}}
    if resource == "org":
        org = {"id": f"4150868{zgid}", "zgid": zgid, "company_name": "Loopback", "country": "US"}
        return {"org": [org]}
    if resource == "settings/modules":
        return {"modules": [_MODULE]}
    if resource == "settings/fields":
        return {"fields": list(map(_field, _FIELDS))} if params.get("module") == "Leads" else {}
    if resource == "Leads":
        return {"data": _LEADS, "info": info}
    if resource.startswith("Leads/"):
        found = [lead for lead in _LEADS if resource == f"Leads/{lead['id']}"]
        return {"data": found} if found else {}
    return None


def _user(email: str) -> dict[str, object]:
    number = f"4150868{zlib.crc32(email.encode()):012}"
    name = email.partition("@")[0].replace(".", " ").title()
    return {"id": number, "email": email, "full_name": name, "status": "active"}


def _field(name: str) -> dict[str, object]:
    number = f"41508680000002{list(_FIELDS).index(name):05}"
    return {"id": number, "api_name": name, "data_type": _FIELDS[name], "visible": True}
