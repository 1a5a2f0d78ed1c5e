"""What Zoho sends back: answers, refusals, and failures on demand."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "ACCESS_DENIED",
    "ANSWER_LOST",
    "CONNECTION_DROPPED",
    "NO_CONTENT",
    "SERVER_ERROR",
    "TOO_MANY_REQUESTS",
    "Answer",
    "Failure",
    "RefusedError",
    "failed_answer",
    "json_answer",
]

_JSON = "application/json;charset=UTF-8"


class Answer(NamedTuple):
    """One answer over HTTP.

    Attributes:
        status: The HTTP status; ``None`` closes the connection without an answer.
        body: The text.
        content_type: The content type.
        error: Zoho's error code, or ``"failed"`` for a failure on demand.
        location: Where a redirect leads to.
    """

    status: int | None
    body: str = ""
    content_type: str = _JSON
    error: str | None = None
    location: str | None = None


NO_CONTENT = Answer(204)
"""Zoho's way to say that there is no such record."""


def json_answer(status: int, payload: Mapping[str, object], error: str | None = None) -> Answer:
    """An answer with a JSON object in it."""
    return Answer(status, json.dumps(payload), error=error)


class RefusedError(Exception):
    """Zoho Accounts refuses a request, most often with status 200.

    Attributes:
        answer: What it says.
    """

    def __init__(
        self, error: str, *, status: int = 200, payload: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(error)
        self.answer = json_answer(status, payload or {"error": error}, error)


@dataclass(frozen=True)
class Failure:
    """How a request to Zoho Accounts goes wrong; for `LoopbackZoho.fail`.

    Attributes:
        status: The HTTP status of the answer; ``None`` closes the connection without an answer.
        body: The answer's text.
        content_type: The answer's content type.
        handled: Whether Zoho does what was asked before it fails, as when an answer is lost on
            its way: a grant token is then used up, a refresh token revoked.
    """

    status: int | None
    body: str = ""
    content_type: str = "text/html;charset=UTF-8"
    handled: bool = False


def failed_answer(failure: Failure, error: str | None = "failed") -> Answer:
    """A failure as an answer.

    Args:
        failure: How the request goes wrong.
        error: What Zoho found wrong with the request, if it did what was asked.
    """
    return Answer(failure.status, failure.body, failure.content_type, error)


TOO_MANY_REQUESTS = {
    "error": "Access Denied",
    "error_description": (
        "You have made too many requests continuously. Please try again after some time."
    ),
    "status": "failure",
}

SERVER_ERROR = Failure(500, "<html><body><h1>Internal Server Error</h1></body></html>")
"""Zoho is down: status 500 and a page of HTML."""
ACCESS_DENIED = Failure(400, json.dumps(TOO_MANY_REQUESTS), _JSON)
"""Zoho's answer to too many token requests, whatever the real number."""
CONNECTION_DROPPED = Failure(None)
"""The connection ends before Zoho has done anything."""
ANSWER_LOST = Failure(None, handled=True)
"""The connection ends after Zoho has done what was asked."""
