"""Tables of many tokens, with values as long as Zoho's."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from sqlalchemy import create_engine, insert

from zoho_orm_store import StoredToken, TokenRecord, provision
from zoho_orm_store._digests import digests_of
from zoho_orm_store._sdk.conversion import OAuthToken, UserSignature
from zoho_orm_store._sql.tokens import RECORD_COLUMNS
from zoho_orm_store.records import utc_now

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import URL

_BATCH = 10_000


def record(number: int) -> TokenRecord:
    """The token of one user, with tokens of 70 characters."""
    now = utc_now()
    return TokenRecord(
        id=f"{number:032x}",
        user_name=f"user{number}@example.com:{number}",
        client_id=f"1000.{0:030d}",
        client_secret=f"{0:042d}",
        refresh_token=f"1000.r{number:064x}",
        access_token=f"1000.a{number:064x}",
        expiry_time=1_900_000_000_000,
        redirect_url="https://example.com/callback",
        api_domain="https://www.zohoapis.com",
        created_at=now,
        updated_at=now,
    )


def sdk_token(number: int) -> OAuthToken:
    """What an application asks the store to save for that user."""
    known = record(number)
    token = OAuthToken(
        id=known.id,
        client_id=known.client_id,
        client_secret=known.client_secret,
        refresh_token=known.refresh_token,
        access_token=known.access_token,
        redirect_url=known.redirect_url,
        user_signature=UserSignature(known.user_name),
        api_domain=known.api_domain,
    )
    token.set_expires_in(str(known.expiry_time))
    return token


def fill(url: URL, rows: int, start: int = 0) -> None:
    """Make the tables and put tokens into them, from one number on."""
    engine = create_engine(url)
    provision.upgrade(engine)
    with engine.begin() as connection:
        for first in range(start, rows, _BATCH):
            records = map(record, range(first, min(first + _BATCH, rows)))
            connection.execute(insert(StoredToken), [row_of(each) for each in records])
    engine.dispose()


def row_of(known: TokenRecord) -> dict[str, object]:
    return {name: getattr(known, name) for name in RECORD_COLUMNS} | digests_of(known)


def any_of(rows: int) -> Callable[[], int]:
    """Numbers of tokens in a table, the same ones in every run."""
    generator = random.Random(rows)
    return lambda: generator.randrange(rows)
