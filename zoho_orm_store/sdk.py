"""Between the SDK's objects and ours. Nothing below the stores imports the SDK."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoho_orm_store.errors import ConfigurationError, InvalidTokenError, MissingDependencyError
from zoho_orm_store.record import TokenRecord, parse_expiry

try:
    from zohocrmsdk.src.com.zoho.api.authenticator.oauth_token import OAuthToken
    from zohocrmsdk.src.com.zoho.api.authenticator.store.token_store import TokenStore
    from zohocrmsdk.src.com.zoho.crm.api.exception.sdk_exception import SDKException
    from zohocrmsdk.src.com.zoho.crm.api.user_signature import UserSignature
    from zohocrmsdk.src.com.zoho.crm.api.util.constants import Constants
except ModuleNotFoundError as error:
    package = (error.name or "").partition(".")[0]
    if package == "zohocrmsdk":
        raise MissingDependencyError("zohocrmsdk8-0", "sdk") from None
    raise ConfigurationError(
        f"The installed Zoho CRM SDK needs the package {package!r}, which is not installed"
        f"{' (pip install mysql-connector-python)' if package == 'mysql' else ''}."
    ) from None

if TYPE_CHECKING:
    from collections.abc import Callable

    from zoho_orm_store.errors import ZohoOrmStoreError
    from zoho_orm_store.refresh import OnFailure

__all__ = [
    "OAuthToken",
    "SDKException",
    "TokenStore",
    "UserSignature",
    "fill",
    "missing_id",
    "record_of",
    "store_exception",
    "token_of",
    "watch_request",
]

_TOKEN_REQUESTS = ("refresh_access_token", "generate_access_token")
"""The methods by which an ``OAuthToken`` asks Zoho for an access token."""


def record_of(token: object) -> TokenRecord:
    """What an SDK token knows.

    Raises:
        InvalidTokenError: It is no ``OAuthToken`` (rule C4), or its expiry is no
            integer (A3), or another value is no string.
    """
    if not isinstance(token, OAuthToken):
        raise InvalidTokenError(
            f"The token must be an OAuthToken of the Zoho SDK, not {type(token).__name__}."
        )
    signature = token.get_user_signature()
    record = TokenRecord(
        id=token.get_id(),
        user_name=None if signature is None else signature.get_name(),
        client_id=token.get_client_id(),
        client_secret=token.get_client_secret(),
        refresh_token=token.get_refresh_token(),
        access_token=token.get_access_token(),
        grant_token=token.get_grant_token(),
        expiry_time=parse_expiry(token.get_expires_in()),
        redirect_url=token.get_redirect_url(),
        api_domain=token.get_api_domain(),
    )
    record.check_types()
    return record


def token_of(record: TokenRecord) -> OAuthToken:
    """A new SDK token with everything that a stored one knows (rule D1)."""
    token = OAuthToken(
        client_id=record.client_id,
        client_secret=record.client_secret,
        grant_token=record.grant_token,
        refresh_token=record.refresh_token,
        redirect_url=record.redirect_url,
        id=record.id,
        access_token=record.access_token,
        user_signature=None if record.user_name is None else UserSignature(record.user_name),
        api_domain=record.api_domain,
    )
    if record.expiry_time is not None:
        token.set_expires_in(str(record.expiry_time))
    return token


def fill(token: OAuthToken, asked: TokenRecord, found: TokenRecord) -> None:
    """Set on an SDK token what a find has changed (rules C1, C2).

    Args:
        token: The token asked with.
        asked: What it knew.
        found: What it is to know; see `zoho_orm_store.matching.filled`.
    """
    if found.user_name != asked.user_name:
        token.set_user_signature(UserSignature(found.user_name))
    if found.expiry_time != asked.expiry_time:
        expiry = None if found.expiry_time is None else str(found.expiry_time)
        token.set_expires_in(expiry)
    for name, set_value in (
        ("id", token.set_id),
        ("client_id", token.set_client_id),
        ("client_secret", token.set_client_secret),
        ("refresh_token", token.set_refresh_token),
        ("access_token", token.set_access_token),
        ("grant_token", token.set_grant_token),
        ("redirect_url", token.set_redirect_url),
        ("api_domain", token.set_api_domain),
    ):
        value = getattr(found, name)
        if value != getattr(asked, name):
            set_value(value)


def watch_request(token: OAuthToken, on_failure: OnFailure) -> None:
    """Call something if the SDK's next refresh or exchange of a token fails.

    The SDK tells a store of a success, by saving the token, and of nothing else.

    Args:
        token: The token that the SDK is about to refresh.
        on_failure: Called with the failure at hand. What it returns puts the token's access token
            and expiry back, and the SDK goes on; ``None`` lets the failure through.
    """

    def watched(request: Callable[..., object]) -> Callable[..., object]:
        def watched_request(*args: object) -> object:
            for name in _TOKEN_REQUESTS:
                vars(token).pop(name, None)
            try:
                return request(token, *args)
            except BaseException as error:
                live = on_failure()
                if live is None or not isinstance(error, Exception):
                    raise
            token.set_access_token(live.access_token)
            token.set_expires_in(str(live.expiry_time))
            return token

        return watched_request

    for name in _TOKEN_REQUESTS:
        setattr(token, name, watched(getattr(type(token), name)))


def store_exception(store: str, operation: str, cause: ZohoOrmStoreError) -> SDKException:
    """What a store raises: the SDK's exception, with our error as its cause (rule G1).

    Args:
        store: The store's class.
        operation: The ``TokenStore`` method that failed.
        cause: Why.
    """
    return SDKException(
        Constants.TOKEN_STORE, f"Exception in {operation} - {store} : ", cause=cause
    )


def missing_id() -> SDKException:
    """What the SDK's own stores raise for an id that they do not have (rule D2)."""
    return SDKException(Constants.TOKEN_STORE, Constants.GET_TOKEN_BY_ID_DB_ERROR)
