"""Conversion between the SDK's objects and this package's records."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoho_orm_store.errors import ConfigurationError, InvalidTokenError, MissingDependencyError
from zoho_orm_store.records import FIELDS, TokenRecord, parse_expiry

try:
    from zohocrmsdk.src.com.zoho.api.authenticator.oauth_token import OAuthToken
    from zohocrmsdk.src.com.zoho.api.authenticator.store.token_store import TokenStore
    from zohocrmsdk.src.com.zoho.api.authenticator.token import Token
    from zohocrmsdk.src.com.zoho.crm.api.exception.sdk_exception import SDKException
    from zohocrmsdk.src.com.zoho.crm.api.initializer import Initializer
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
    from zoho_orm_store.errors import ZohoOrmStoreError

__all__ = [
    "Initializer",
    "OAuthToken",
    "SDKException",
    "Token",
    "TokenStore",
    "fill",
    "missing_id_exception",
    "record_from",
    "store_exception",
    "token_from",
]


def record_from(token: object) -> TokenRecord:
    """The record of an SDK token.

    Raises:
        InvalidTokenError: It is not an ``OAuthToken``, its expiry is not an integer, or another
            value is not a string.
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


def token_from(record: TokenRecord) -> OAuthToken:
    """A new SDK token with every value of a record.

    It is made by the SDK's constructor, which sets the private attributes that the SDK needs.
    """
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
    """Set the values of an SDK token that a find has changed.

    Args:
        token: The token that the store was asked with.
        asked: The token's values as they are.
        found: Its values as they are to be.
    """
    for name, field in FIELDS.items():
        value = getattr(found, name)
        if field.sdk_name is None or value == getattr(asked, name):
            continue
        if name == "user_name":
            value = UserSignature(value)
        elif name == "expiry_time":
            value = None if value is None else str(value)
        getattr(token, f"set_{field.sdk_name}")(value)


def store_exception(store: str, operation: str, cause: ZohoOrmStoreError) -> SDKException:
    """The exception that a store raises for an error of this package.

    Args:
        store: The name of the store's class.
        operation: The ``TokenStore`` method that failed.
        cause: The error.
    """
    return SDKException(
        Constants.TOKEN_STORE, f"Exception in {operation} - {store} : ", cause=cause
    )


def missing_id_exception() -> SDKException:
    """The exception that the SDK's own stores raise for an unknown id."""
    return SDKException(Constants.TOKEN_STORE, Constants.GET_TOKEN_BY_ID_DB_ERROR)
