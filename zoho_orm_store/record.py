"""What a token is: ten values, of which each may be unknown."""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from zoho_orm_store.errors import InvalidTokenError

if TYPE_CHECKING:
    from typing import NoReturn

__all__ = [
    "MAX_LENGTHS",
    "SECRETS",
    "TokenRecord",
    "check_text",
    "mask",
    "parse_expiry",
    "storable",
    "utc_now",
]

MAX_LENGTHS = {
    "id": 255,
    "user_name": 512,
    "client_id": 255,
    "client_secret": 4096,
    "refresh_token": 4096,
    "access_token": 4096,
    "grant_token": 4096,
    "redirect_url": 4096,
    "api_domain": 4096,
}
"""The most characters each text field may have (rule A4)."""

SECRETS = frozenset({"client_secret", "refresh_token", "access_token", "grant_token"})
"""The fields that are never shown."""

_INT64 = range(-(2**63), 2**63)


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """One OAuth token, stored or asked for.

    An unknown value is ``None``; an empty string given to the constructor becomes ``None``
    (rule A1). The ``repr`` shows no more than the last four characters of a secret.

    Attributes:
        id: The token's id, the SDK's handle on it.
        user_name: The user signature's name, as a rule ``email:zgid``.
        client_id: The OAuth client.
        client_secret: The client's secret.
        refresh_token: The refresh token.
        access_token: The access token.
        grant_token: The one-time grant code.
        expiry_time: When the access token ends, in epoch milliseconds.
        redirect_url: The OAuth redirect URL.
        api_domain: The API domain of the user's data centre.
        created_at: When the row was made, in naive UTC; set by the repositories.
        updated_at: When the row was last saved, in naive UTC; set by the repositories.
    """

    id: str | None = None
    user_name: str | None = None
    client_id: str | None = None
    client_secret: str | None = None
    refresh_token: str | None = None
    access_token: str | None = None
    grant_token: str | None = None
    expiry_time: int | None = None
    redirect_url: str | None = None
    api_domain: str | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None

    def __post_init__(self) -> None:
        if "" in (
            self.id,
            self.user_name,
            self.client_id,
            self.client_secret,
            self.refresh_token,
            self.access_token,
            self.grant_token,
            self.redirect_url,
            self.api_domain,
        ):
            for name in MAX_LENGTHS:
                if getattr(self, name) == "":
                    object.__setattr__(self, name, None)

    def __repr__(self) -> str:
        known = ((field.name, getattr(self, field.name)) for field in fields(self))
        shown = (
            f"{name}={mask(value) if name in SECRETS else repr(value)}"
            for name, value in known
            if value is not None
        )
        return f"TokenRecord({', '.join(shown)})"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "A TokenRecord holds secrets and is not pickled. Pass its id on, and get it there."
        )

    def __copy__(self) -> TokenRecord:
        return self

    def __deepcopy__(self, memo: object) -> TokenRecord:
        return self

    def check_types(self) -> None:
        """Refuse values that are no strings.

        Raises:
            InvalidTokenError: A text field holds something else; the message names the field.
        """
        for name in MAX_LENGTHS:
            if getattr(self, name) is not None:
                check_text(name, getattr(self, name))

    def check_storable(self) -> None:
        """Refuse values that no database of this project stores exactly.

        Raises:
            InvalidTokenError: A value has the wrong type, is too long, or holds a NUL character
                or a lone surrogate. The message names the field and never the value
                (rules A3 and A4).
        """
        self.check_types()
        parse_expiry(self.expiry_time)
        for name, limit in MAX_LENGTHS.items():
            if getattr(self, name) is None or storable(name, getattr(self, name)):
                continue
            length = len(getattr(self, name))
            if length > limit:
                raise InvalidTokenError(
                    f"{name} has {length} characters; at most {limit} can be stored."
                )
            raise InvalidTokenError(
                f"{name} holds a NUL character or a lone surrogate, which cannot be stored."
            )


def check_text(name: str, value: object) -> None:
    """Refuse a value that is no string.

    Args:
        name: What the value is, for the message.
        value: A known value.

    Raises:
        InvalidTokenError: The value is no ``str``.
    """
    if not isinstance(value, str):
        raise InvalidTokenError(f"{name} must be a string, not {type(value).__name__}.")


def parse_expiry(value: object) -> int | None:
    """Read an expiry as the SDK writes it: a string of epoch milliseconds (rule A3).

    Args:
        value: A string in plain decimal notation, an ``int``, or unknown (``None``, ``""``).

    Returns:
        Epoch milliseconds, or ``None`` when unknown.

    Raises:
        InvalidTokenError: The value is no integer of 64 bits, or is a string that would not
            come back as it was given.
    """
    if value is None or value == "":
        return None
    if isinstance(value, str):
        try:
            number = int(value)
        except ValueError:
            number = None
        if number is not None and str(number) == value and number in _INT64:
            return number
    elif isinstance(value, int) and not isinstance(value, bool) and value in _INT64:
        return value
    raise InvalidTokenError(
        "expires_in must be an integer of epoch milliseconds, such as '1767225600000'."
    )


def storable(name: str, value: str) -> bool:
    """Whether a stored token can have this value; a lookup by any other finds nothing.

    Args:
        name: A text field of `TokenRecord`.
        value: The value asked for.
    """
    return len(value) <= MAX_LENGTHS[name] and _is_exact_text(value)


def utc_now() -> datetime:
    """The time as the tables hold it: naive UTC, to the microsecond."""
    return datetime.now(timezone.utc).replace(tzinfo=None)


def mask(secret: object) -> str:
    """Show that a secret is known, and at most its last four characters.

    Args:
        secret: A secret. One of fewer than twelve characters is hidden completely, and so is
            what is no string.
    """
    return f"'…{secret[-4:]}'" if isinstance(secret, str) and len(secret) >= 12 else "'…'"


def _is_exact_text(value: str) -> bool:
    if value.isascii():
        return "\0" not in value
    try:
        return b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False
