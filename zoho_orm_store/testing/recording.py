"""What `LoopbackZoho` was asked."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Counts", "Kind", "RecordedRequest", "counted"]

Kind: TypeAlias = Literal["consent", "exchange", "refresh", "revoke", "api", "unknown"]
"""What a request asked for; see `RecordedRequest`."""


@dataclass(frozen=True)
class RecordedRequest:
    """One request that was answered or dropped. It holds no secret.

    Attributes:
        kind: ``"consent"`` (the page in a browser), ``"exchange"`` (of a grant token),
            ``"refresh"``, ``"revoke"``, ``"api"`` (Zoho CRM), or ``"unknown"`` for anything else
            asked of Zoho Accounts.
        path: The path; with the query string for Zoho CRM only, since Zoho Accounts takes tokens
            in it.
        at: When the request arrived, in epoch seconds.
        status: The HTTP status of the answer, ``None`` when there was none. Zoho refuses most
            token requests with status 200: look at ``error``.
        error: Zoho's error code, such as ``"invalid_code"`` or ``"INVALID_TOKEN"``; ``"failed"``
            for a failure on demand; ``None`` when Zoho did what was asked.
        user: The email address of the user whose token it was, where that was found out.
    """

    kind: Kind
    path: str
    at: float
    status: int | None
    error: str | None
    user: str | None


@dataclass(frozen=True)
class Counts:
    """How many requests of which kind there were.

    Attributes:
        exchanges: Grant tokens exchanged for a refresh and an access token.
        refreshes: Access tokens made from a refresh token.
        revokes: Tokens revoked over HTTP.
        refused: Exchanges and refreshes that failed, for whatever reason.
        api_calls: Requests to Zoho CRM, the unauthorized ones included.
    """

    exchanges: int
    refreshes: int
    revokes: int
    refused: int
    api_calls: int


def counted(requests: Iterable[RecordedRequest]) -> Counts:
    """Count requests."""
    done: Counter[Kind] = Counter()
    refused = 0
    for request in requests:
        if request.error is None or request.kind == "api":
            done[request.kind] += 1
        elif request.kind in ("exchange", "refresh"):
            refused += 1
    return Counts(done["exchange"], done["refresh"], done["revoke"], refused, done["api"])
