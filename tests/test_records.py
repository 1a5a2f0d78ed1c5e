"""What a token record accepts, hides and refuses: rules A1, A3, A4 and G3."""

from __future__ import annotations

import pytest

from zoho_orm_store import InvalidTokenError, TokenRecord
from zoho_orm_store.records import FIELDS as ALL_FIELDS
from zoho_orm_store.records import SECRETS, TEXTS, is_storable, mask, parse_expiry

FIELDS = sorted(TEXTS)


@pytest.mark.parametrize("field", FIELDS)
def test_an_empty_string_is_unknown_A1(field):
    assert getattr(TokenRecord(**{field: ""}), field) is None


@pytest.mark.parametrize("field", FIELDS)
def test_the_longest_value_is_accepted_and_one_more_is_not_A4(field):
    limit = ALL_FIELDS[field].max_length
    TokenRecord(**{field: "\U0001f511" * limit}).check_storable()
    too_long = "s3cr3t" * limit
    with pytest.raises(InvalidTokenError, match=f"{field} has .* at most {limit}") as raised:
        TokenRecord(**{field: too_long[: limit + 1]}).check_storable()
    assert "s3cr3t" not in str(raised.value)


@pytest.mark.parametrize("field", FIELDS)
def test_what_no_database_stores_exactly_is_refused_A4(field):
    for value in ("a\0b", "\0", "a\ud800b", "é\0"):
        with pytest.raises(InvalidTokenError, match=f"{field} contains a NUL character or a lone"):
            TokenRecord(**{field: value}).check_storable()
        assert not is_storable(field, value)


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (None, None),
        ("", None),
        ("0", 0),
        ("-1", -1),
        ("1767225600000", 1767225600000),
        (1767225600000, 1767225600000),
        (str(2**63 - 1), 2**63 - 1),
        (-(2**63), -(2**63)),
    ],
)
def test_an_expiry_is_an_integer_A3(value, number):
    assert parse_expiry(value) == number


@pytest.mark.parametrize(
    "value",
    [
        *("+5", " 5", "05", "-0", "1.0", "1e3", "1_000", "٣", "never", "9" * 5000, str(2**63)),
        *(2**63, -(2**63) - 1, True, 1.5, b"1"),
    ],
)
def test_what_would_not_come_back_as_it_was_is_refused_A3(value):
    with pytest.raises(InvalidTokenError, match="expires_in must be an integer"):
        parse_expiry(value)


@pytest.mark.parametrize("secret", ["zq", "zbcdefghijk", "zbcdefghijklmnop"])
def test_no_more_than_four_characters_of_a_secret_are_shown_G3(secret):
    masked = mask(secret)
    assert secret not in masked
    assert not any(secret[n : n + 5] in masked for n in range(len(secret) - 4))
    for field in SECRETS:
        assert secret not in repr(TokenRecord(**{field: secret}))


def test_a_repr_shows_what_is_known_and_no_secret():
    record = TokenRecord(id="7", user_name="u", refresh_token="1000.abcdefgh", expiry_time=5)
    assert repr(record) == (
        "TokenRecord(id='7', user_name='u', refresh_token='…efgh', expiry_time=5)"
    )
