"""What a token is: ten values, each of which may be unknown."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from datetime import datetime, timezone
from functools import cache
from itertools import zip_longest
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from zoho_orm_store.errors import InvalidTokenError, UnreadableTokenError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import NoReturn

__all__ = ["FIELDS", "Field", "TokenRecord"]


class Field(NamedTuple):
    """One of the values that the SDK stores of a token.

    Attributes:
        name: The attribute of `TokenRecord`, and the column of the table.
        max_length: The longest text that can be stored, in characters; ``None`` for an integer.
        is_secret: Whether it is encrypted in the table, and masked wherever it is shown.
        digest: The column that holds its digest, for a field by which tokens are looked up.
        sdk_name: What follows ``get_`` and ``set_`` in the SDK's ``OAuthToken``; ``None`` for a
            value that the SDK does not have.
    """

    name: str
    max_length: int | None
    is_secret: bool
    digest: str | None
    sdk_name: str | None


FIELDS = {
    field.name: field
    for field in (
        Field("id", 255, False, None, "id"),
        Field("user_name", 512, False, "user_digest", "user_signature"),
        Field("client_id", 255, False, "client_digest", "client_id"),
        Field("client_secret", 4096, True, None, "client_secret"),
        Field("refresh_token", 4096, True, "refresh_digest", "refresh_token"),
        Field("access_token", 4096, True, "access_digest", "access_token"),
        Field("grant_token", 4096, True, "grant_digest", "grant_token"),
        Field("expiry_time", None, False, None, "expires_in"),
        Field("redirect_url", 4096, False, None, "redirect_url"),
        Field("api_domain", 4096, False, None, "api_domain"),
    )
}
"""The fields by name, in the order of the SDK's own table."""

TEXTS = tuple(name for name, field in FIELDS.items() if field.max_length is not None)
SECRETS = tuple(name for name, field in FIELDS.items() if field.is_secret)
ENCRYPTED = ("user_name", *SECRETS)
"""What a cipher encrypts: the secrets, and who has them."""
DIGESTS = {name: field.digest for name, field in FIELDS.items() if field.digest is not None}

_texts_of = attrgetter(*TEXTS)
_INT64 = range(-(2**63), 2**63)


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """One OAuth token, stored or asked for.

    An unknown value is ``None``; an empty string becomes ``None``. The ``repr`` shows at most the
    last four characters of a secret.

    Attributes:
        id: The token's id, which the SDK finds it by.
        user_name: The name of the user signature, usually ``email:zgid``.
        client_id: The OAuth client.
        client_secret: The client's secret.
        refresh_token: The refresh token.
        access_token: The access token.
        grant_token: The one-time grant code.
        expiry_time: When the access token expires, in epoch milliseconds.
        redirect_url: The OAuth redirect URL.
        api_domain: The API domain of the user's data centre.
        created_at: When the row was inserted, in naive UTC; set by the repositories.
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
        if "" in _texts_of(self):
            for name in TEXTS:
                if getattr(self, name) == "":
                    object.__setattr__(self, name, None)

    def __repr__(self) -> str:
        known = ((field.name, getattr(self, field.name)) for field in fields(self))
        masked = (
            f"{name}={mask(value) if name in SECRETS else repr(value)}"
            for name, value in known
            if value is not None
        )
        return f"TokenRecord({', '.join(masked)})"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "A TokenRecord holds secrets and cannot be pickled. Pass its id on, and get it there."
        )

    def __copy__(self) -> TokenRecord:
        return self

    def __deepcopy__(self, memo: object) -> TokenRecord:
        return self

    def check_types(self) -> None:
        """Refuse text fields that hold something other than a string.

        Raises:
            InvalidTokenError: The message names the field and never the value.
        """
        for name in TEXTS:
            if getattr(self, name) is not None:
                check_text(name, getattr(self, name))

    def check_storable(self) -> None:
        """Refuse values that not every database stores exactly.

        Raises:
            InvalidTokenError: A value has the wrong type, is too long, or contains a NUL character
                or a lone surrogate. The message names the field and never the value.
        """
        self.check_types()
        parse_expiry(self.expiry_time)
        for name in TEXTS:
            value = getattr(self, name)
            if value is None or is_storable(name, value):
                continue
            limit = FIELDS[name].max_length
            if limit is not None and len(value) > limit:
                raise InvalidTokenError(
                    f"{name} has {len(value)} characters; at most {limit} can be stored."
                )
            raise InvalidTokenError(
                f"{name} contains a NUL character or a lone surrogate, which cannot be stored."
            )


def check_text(name: str, value: object) -> None:
    """Refuse a value that is not a string.

    Raises:
        InvalidTokenError: The message names what the value is for, and never the value.
    """
    if not isinstance(value, str):
        raise InvalidTokenError(f"{name} must be a string, not {type(value).__name__}.")


def parse_expiry(value: object) -> int | None:
    """Read an expiry as the SDK writes it: a string of epoch milliseconds.

    Args:
        value: A string in plain decimal notation, an ``int``, or unknown (``None``, ``""``).

    Returns:
        Epoch milliseconds, or ``None`` when unknown.

    Raises:
        InvalidTokenError: The value is not an integer of 64 bits, or is a string that would come
            back differently, such as ``"007"``.
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


def read_values(row: Sequence[Any]) -> list[Any]:
    """The values of a stored row, each as `TokenRecord` has it.

    SQLite lets other programs write values of any type, and stores times as text.

    Args:
        row: The values of a record's fields, in their order. The last fields may be missing.

    Raises:
        UnreadableTokenError: The message names the row and the columns, and never a value.
    """
    values, unreadable = [*row], []
    for position, read in _conversions(tuple(map(type, values))):
        try:
            values[position] = read(values[position])
        except (ValueError, TypeError):
            if values[position] != "":
                unreadable.append(position)
            values[position] = None
    if unreadable:
        raise _unreadable(row[0], unreadable, values)
    return values


def record_of(values: Sequence[Any]) -> TokenRecord:
    """The record with the values of `read_values`, in a third less time than by its constructor.

    A listing makes one for each row.
    """
    record = object.__new__(TokenRecord)
    for set_value, value in zip_longest(_SETTERS, values):
        set_value(record, value)
    if "" in values:
        record.__post_init__()
    return record


def _read_time(value: Any) -> datetime:  # noqa: ANN401
    time = datetime.fromisoformat(value)
    if time.tzinfo is not None:
        raise ValueError
    return time


def _read_text(value: object) -> NoReturn:
    raise TypeError


_NAMES = tuple(field.name for field in fields(TokenRecord))
_SETTERS = tuple(vars(TokenRecord)[name].__set__ for name in _NAMES)
_READERS: dict[str, tuple[type, Callable[[Any], object]]] = {
    **dict.fromkeys(TEXTS, (str, _read_text)),
    "expiry_time": (int, parse_expiry),
    "created_at": (datetime, _read_time),
    "updated_at": (datetime, _read_time),
}
"""The type of each field, and how to read a value of another type."""


@cache
def _conversions(
    types: tuple[type, ...],
) -> tuple[tuple[int, Callable[[Any], object]], ...]:
    """The positions at which a row's values have another type than the field; how to read them."""
    return tuple(
        (position, _READERS[name][1])
        for position, (name, found) in enumerate(zip(_NAMES, types, strict=False))
        if not issubclass(found, (_READERS[name][0], type(None)))
    )


def _unreadable(id_: Any, positions: list[int], values: list[Any]) -> UnreadableTokenError:  # noqa: ANN401
    columns = " and the ".join(_NAMES[position] for position in positions)
    return UnreadableTokenError(
        f"The {columns} of the token with id {id_!r} cannot be read: another program wrote a value "
        "of the wrong kind. Correct it in the table, or delete the token "
        "(zoho-orm-store delete ID) and let its user log in again.",
        id_,  # As it is stored, since a listing goes on after it.
        replace(record_of(values), **dict.fromkeys(SECRETS)),
    )


def is_storable(name: str, value: str) -> bool:
    """Whether a text field can have this value. A lookup by any other value finds nothing."""
    limit = FIELDS[name].max_length
    if limit is not None and len(value) > limit:
        return False
    if value.isascii():
        return "\0" not in value
    try:
        return b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False


def utc_now() -> datetime:
    """The current time as the tables hold it: naive UTC, to the microsecond."""
    return datetime.now(timezone.utc).replace(tzinfo=None)


def mask(secret: object) -> str:
    """Show that a secret is known, and its last four characters if it has at least twelve."""
    return f"'…{secret[-4:]}'" if isinstance(secret, str) and len(secret) >= 12 else "'…'"
