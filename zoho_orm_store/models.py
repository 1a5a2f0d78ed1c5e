"""The tables, as declarative models for a project's own ``Base`` or for everyone else's.

`oauthtoken` begins with the SDK's ten columns, same names, same order, so that the SDK's own
``DBStore`` can still read it. Our columns follow.
"""

from __future__ import annotations

from datetime import datetime  # noqa: TC003 - SQLAlchemy evaluates the annotations
from functools import cache
from typing import TYPE_CHECKING, ClassVar, cast

from sqlalchemy import BigInteger, DateTime, Integer, MetaData, String, Table, Text
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from zoho_orm_store.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Hashable

    from sqlalchemy import FromClause
    from sqlalchemy.types import TypeEngine

__all__ = [
    "RefreshLease",
    "RefreshLeaseMixin",
    "StoredToken",
    "StoredTokenMixin",
    "lease_table",
    "metadata",
    "token_table",
]

UTCDateTime = DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
"""A naive UTC time to the microsecond."""

Digest = String(64).with_variant(
    mysql.VARCHAR(64, charset="ascii", collation="ascii_bin"), "mysql", "mariadb"
)
"""A SHA-256 digest in hexadecimal. A one-byte character set keeps it small in an index."""

LongText = Text().with_variant(
    mysql.TEXT(charset="utf8mb4", collation="utf8mb4_bin"), "mysql", "mariadb"
)
"""Text compared byte for byte; the default collations of MySQL and MariaDB do not."""


def short_text(length: int) -> TypeEngine[str]:
    """A type like `LongText` that can be a key, with a limit in characters."""
    exact = mysql.VARCHAR(length, charset="utf8mb4", collation="utf8mb4_bin")
    return String(length).with_variant(exact, "mysql", "mariadb")


TokenId = String(255).with_variant(
    mysql.VARCHAR(255, charset="utf8mb4", binary=True), "mysql", "mariadb"
)
"""Text compared byte for byte, in whichever way: the migrations give the ids of MariaDB and MySQL
collations that also tell trailing blanks apart, which have different names on the two."""


class StoredTokenMixin:
    """The columns and indexes of a table of OAuth tokens, for any declarative ``Base``.

    Set ``__tablename__`` on the class that uses it, and ``__table_args__`` as you like. Read the
    rows as you like, but write them only through a repository or a store, which keep the digest
    columns right.

    If your base makes dataclasses, or with SQLModel, use a second base with the same metadata; the
    page on provisioning in the documentation shows it.
    """

    if TYPE_CHECKING:
        __tablename__: str
        __table__: ClassVar[FromClause]

    id: Mapped[str] = mapped_column(TokenId, primary_key=True, sort_order=-100)
    user_name: Mapped[str | None] = mapped_column(LongText, sort_order=-99)
    client_id: Mapped[str | None] = mapped_column(short_text(255), sort_order=-98)
    client_secret: Mapped[str | None] = mapped_column(LongText, sort_order=-97)
    refresh_token: Mapped[str | None] = mapped_column(LongText, sort_order=-96)
    access_token: Mapped[str | None] = mapped_column(LongText, sort_order=-95)
    grant_token: Mapped[str | None] = mapped_column(LongText, sort_order=-94)
    expiry_time: Mapped[int | None] = mapped_column(BigInteger, sort_order=-93)
    redirect_url: Mapped[str | None] = mapped_column(LongText, sort_order=-92)
    api_domain: Mapped[str | None] = mapped_column(LongText, sort_order=-91)
    identity: Mapped[str] = mapped_column(Digest, index=True, unique=True, sort_order=-90)
    user_digest: Mapped[str | None] = mapped_column(Digest, index=True, sort_order=-89)
    client_digest: Mapped[str | None] = mapped_column(Digest, sort_order=-88)
    access_digest: Mapped[str | None] = mapped_column(Digest, index=True, sort_order=-87)
    refresh_digest: Mapped[str | None] = mapped_column(Digest, index=True, sort_order=-86)
    grant_digest: Mapped[str | None] = mapped_column(Digest, index=True, sort_order=-85)
    created_at: Mapped[datetime] = mapped_column(UTCDateTime, sort_order=-84)
    updated_at: Mapped[datetime] = mapped_column(UTCDateTime, sort_order=-83)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(id={self.id!r}, user_name={self.user_name!r})"


def token_table(model: type[StoredTokenMixin]) -> Table:
    """The table of a model, checked for what storing tokens needs.

    Args:
        model: A class made with `StoredTokenMixin`.

    Raises:
        ConfigurationError: The model lacks something; the message says what.
    """
    return _checked_table(cast("Hashable", model))


@cache
def _checked_table(model: type[StoredTokenMixin]) -> Table:
    table, name = _table_like(model, StoredToken, "StoredTokenMixin"), model.__name__
    if table.primary_key.columns.keys() != ["id"]:
        raise ConfigurationError(f"The model {name} must have 'id' alone as its primary key.")
    if not any(index.unique and index.columns.keys() == ["identity"] for index in table.indexes):
        raise ConfigurationError(
            f"The model {name} lacks the unique index on 'identity', without which one user may "
            "get several rows. Make it with zoho_orm_store.StoredTokenMixin."
        )
    return table


def lease_table(model: type[RefreshLeaseMixin]) -> Table:
    """The table of a model, checked for what refresh leases need.

    Raises:
        ConfigurationError: The model lacks something; the message says what.
    """
    return _table_like(model, RefreshLease, "RefreshLeaseMixin")


def _table_like(model: type[object], pattern: type[DeclarativeBase], mixin: str) -> Table:
    table = getattr(model, "__table__", None)
    if not isinstance(table, Table):
        raise ConfigurationError(
            f"The model must be a mapped class with a table of its own, not {model!r}."
        )
    wanted = (column.name for column in pattern.__table__.c)
    if lacking := [name for name in wanted if name not in table.c]:
        raise ConfigurationError(
            f"The model {model.__name__} lacks the columns {', '.join(lacking)}. "
            f"Make it with zoho_orm_store.{mixin}."
        )
    return table


class RefreshLeaseMixin:
    """The columns of the table that lets one worker refresh a token for all the others.

    For any declarative ``Base``, with a ``__tablename__`` of your own. Only stores write its rows.
    A row lasts for seconds; only if Zoho has refused a token for good, the row says so for 90 days.
    """

    key: Mapped[str] = mapped_column(Digest, primary_key=True, sort_order=-100)
    owner: Mapped[str] = mapped_column(short_text(64), sort_order=-99)
    expires_at: Mapped[int] = mapped_column(BigInteger, sort_order=-98)
    failures: Mapped[int] = mapped_column(Integer, sort_order=-97)


class Base(DeclarativeBase):
    """The declarative base of the tables below, for projects that have none of their own."""

    metadata = MetaData()


class StoredToken(StoredTokenMixin, Base):
    """The table ``oauthtoken``."""

    __tablename__ = "oauthtoken"


class RefreshLease(RefreshLeaseMixin, Base):
    """The table ``oauthtoken_refresh_lease``."""

    __tablename__ = "oauthtoken_refresh_lease"


metadata = Base.metadata
"""The metadata of `StoredToken` and `RefreshLease`, for a project's autogenerate targets."""
