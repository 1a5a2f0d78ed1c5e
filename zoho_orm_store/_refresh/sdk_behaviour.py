"""What the Zoho SDK forces on us, and why.

The SDK itself decides when to refresh: it asks the store for the token, compares the expiry
with its own clock, and refreshes 5 seconds before the end. To make a caller refresh earlier, the
store has to return another expiry than the real one. The SDK reports a successful refresh, by
saving the token, but not a failed one. So that the other callers need not wait until the lease
ends, the store watches the request itself.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

from zoho_orm_store.errors import errors_behind

if TYPE_CHECKING:
    from collections.abc import Callable

    from zoho_orm_store.records import TokenRecord

__all__ = [
    "SDK_MARGIN",
    "SLACK",
    "ends_within",
    "needs_refresh",
    "shown_as_expired",
    "watch_request",
]

SDK_MARGIN = 5.0
"""Seconds before its end from which the SDK refreshes an access token."""

SLACK = 0.25
"""Seconds that may pass between the store's look at the clock and the SDK's. The SDK would refresh
without a lease if it found a token expired that the store took for live."""

_REFRESH = "refresh_access_token"
_TOKEN_REQUESTS = (_REFRESH, "generate_access_token")
"""The methods by which an ``OAuthToken`` asks Zoho for an access token."""

_FINAL_REFUSALS = frozenset({"invalid_code", "invalid_client"})
"""Zoho's errors for a refresh token that it has revoked, or whose client it has deleted. They stay,
unlike a wrong client secret, too many requests, or a server error."""


class SDKToken(Protocol):
    """What `watch_request` needs of an ``OAuthToken``."""

    def set_access_token(self, access_token: str | None) -> None: ...
    def set_expires_in(self, expires_in: str | None) -> None: ...
    def refresh_access_token(self, oauth_token: object, url: str) -> object: ...


def ends_within(record: TokenRecord, seconds: float, now: float) -> bool:
    """Whether a token has no access token, or one that ends within some seconds of ``now``."""
    if record.access_token is None:
        return True
    return record.expiry_time is not None and record.expiry_time < (now + seconds) * 1000


def shown_as_expired(record: TokenRecord, now: float) -> TokenRecord:
    """Return a token with an expiry that makes the SDK refresh it."""
    if ends_within(record, SDK_MARGIN, now):
        return record
    return replace(record, expiry_time=int(now * 1000))


def watch_request(
    token: SDKToken,
    on_failure: Callable[..., TokenRecord | None] | None,
    fall_back: Callable[..., bool] | None = None,
) -> None:
    """Notice if the SDK's next refresh or exchange of a token fails.

    Args:
        token: The SDK's token.
        on_failure: Called then, with ``refused=True`` if no later refresh can succeed either. If it
            returns a token, the SDK goes on with that one's access token and expiry.
        fall_back: Called if there is no such token, with the token and the arguments of the
            request, which differ between the SDK's releases. It gives the token other values and
            returns ``True``, or returns ``False`` to let the failure through.
    """

    def watched_request(method: str, *args: object) -> object:
        for name in _TOKEN_REQUESTS:
            vars(token).pop(name, None)
        try:
            return getattr(token, method)(*args)
        except BaseException as error:
            refused = method == _REFRESH and _is_final_refusal(error)
            live = None if on_failure is None else on_failure(refused=refused)
            goes_on = isinstance(error, Exception) and (
                live is not None or (fall_back is not None and fall_back(token, *args))
            )
            if not goes_on:
                # The SDK's frames show the refresh token and the client's secret.
                for each in errors_behind(error):
                    each.__traceback__ = None
                raise error
        if live is not None:
            token.set_access_token(live.access_token)
            token.set_expires_in(str(live.expiry_time))
        return token

    for name in _TOKEN_REQUESTS:
        setattr(token, name, partial(watched_request, name))


def _is_final_refusal(error: BaseException) -> bool:
    """Whether the SDK's exception says that Zoho does not know a refresh token or client."""
    return getattr(error, "error_message", None) in _FINAL_REFUSALS


def needs_refresh(record: TokenRecord, now: float) -> bool:
    """Whether the SDK would refresh a token at this time."""
    return ends_within(record, SDK_MARGIN, now)
