"""Which release of the SDK is installed, and what the older ones cannot do.

All of them install the same import package, so a run is on one. `nox -s sdk` runs the suites on
each in turn. A test of what an older release cannot do is marked with ``fails_before``, and must
fail there: `docs/compatibility.md` says so, with the same reasons.
"""

from __future__ import annotations

import re
from importlib import metadata
from typing import TYPE_CHECKING

from zohocrmsdk.src.com.zoho.crm.api.user_signature import UserSignature
from zohocrmsdk.src.com.zoho.crm.api.users import users_operations

if TYPE_CHECKING:
    import pytest


def _installed() -> tuple[int, int]:
    for distribution in metadata.distributions():
        named = re.fullmatch(r"zohocrmsdk(\d+)[-_.]0", distribution.metadata["Name"] or "")
        if named is not None:
            return int(named[1]), int(distribution.version.partition(".")[0])
    raise LookupError("No Zoho CRM SDK is installed.")


SDK = _installed()
"""The version of Zoho's API, and the release: ``(8, 7)`` for release 7.0.0 of zohocrmsdk8-0."""

FINDS_USERS = SDK >= (6, 0)
"""Whether it asks Zoho who has logged in. ``zohocrmsdk5-0`` must be told."""

TAKES_CHOICES = hasattr(users_operations, "Choice")
"""Whether a parameter of a few possible values is a ``Choice``. In others it is a string."""


def fails_before(
    release: tuple[int, int],
    reason: str,
    *,
    since: tuple[int, int] = (5, 0),
    strict: bool = True,
) -> pytest.MarkDecorator:
    """Mark a test of what only this release of the SDK and later ones can do.

    Args:
        release: The first release that passes.
        reason: What the releases before do instead.
        since: The first release that fails.
        strict: Whether all variants of the test fail there.
    """
    import pytest  # Worker processes, which import this module as well, have no use for it.

    return pytest.mark.xfail(since <= SDK < release, reason=reason, strict=strict)


RETURNS_NONE = "before 8.0's release 7.0.0, an unknown id ends in an AttributeError"
REVOKES = "before 8.0's release 7.0.0, revoke(id) makes a token that its own constructor refuses"
KNOWS_NO_USER = "5.0 does not ask Zoho who has logged in"
SWITCHES_FIRST = (
    "before 8.0's release 3.0.0, switch_user() logs in with the settings of the user before"
)


def user_of_token(
    user_name: str, *, find_user: bool = True, **arguments: object
) -> dict[str, object]:
    """The arguments of an ``OAuthToken`` that is to know its user after the login, or not."""
    if FINDS_USERS:
        return arguments | {"find_user": find_user}
    return arguments | ({"user_signature": UserSignature(user_name)} if find_user else {})
