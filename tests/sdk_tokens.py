"""SDK tokens that know exactly what a test wants."""

from __future__ import annotations

from zoho_orm_store._sdk.conversion import OAuthToken, TokenStore, UserSignature, record_from

FIELDS = {
    "client_id": "set_client_id",
    "client_secret": "set_client_secret",
    "refresh_token": "set_refresh_token",
    "access_token": "set_access_token",
    "grant_token": "set_grant_token",
    "expires_in": "set_expires_in",
    "redirect_url": "set_redirect_url",
    "api_domain": "set_api_domain",
}


def make_token(*, id: str | None = None, user: str | None = None, **fields: object) -> OAuthToken:
    """An SDK token that knows exactly what is given, which the SDK's constructor may refuse."""
    token = OAuthToken(id="-")
    token.set_id(id)
    if user is not None:
        token.set_user_signature(UserSignature(user))
    for name, value in fields.items():
        getattr(token, FIELDS[name])(value)
    return token


def save(store: TokenStore, **fields: object) -> OAuthToken:
    """Save a token that knows exactly what is given, and return it."""
    token = make_token(**fields)
    store.save_token(token)
    return token


def known(token: OAuthToken | None) -> dict[str, object]:
    """What a token knows, but for its id and times."""
    assert token is not None
    record = record_from(token)
    names = ("user_name", "client_id", "client_secret", "refresh_token", "access_token")
    names += ("grant_token", "expiry_time", "redirect_url", "api_domain")
    return {name: value for name in names if (value := getattr(record, name)) is not None}


FULL = {
    "user": "ada@example.com:1",
    "client_id": "1000.CLIENT",
    "client_secret": "the-client-secret",
    "refresh_token": "1000.refresh",
    "access_token": "1000.access",
    "expires_in": "4102444800000",
    "redirect_url": "https://example.com/callback",
    "api_domain": "https://www.zohoapis.com",
}
"""Everything that a token knows after a login, but for the spent grant code."""
