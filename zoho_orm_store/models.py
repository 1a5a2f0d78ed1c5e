"""The tables, as declarative models for a project's own ``Base`` or for everyone else's.

`oauthtoken` begins with the SDK's ten columns, same names, same order, so that the SDK's own
``DBStore`` can still read it. Our columns follow.
"""

from __future__ import annotations

from datetime import datetime  # noqa: TC003 - SQLAlchemy evaluates the annotations
from typing import TYPE_CHECKING, ClassVar

from sqlalchemy import BigInteger, DateTime, Index, MetaData, String, Text
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import DeclarativeBase, Mapped, declared_attr, mapped_column

if TYPE_CHECKING:
    from sqlalchemy import FromClause

__all__ = [
    "RefreshLease",
    "RefreshLeaseMixin",
    "StoredToken",
    "StoredTokenMixin",
    "metadata",
]

UTCDateTime = DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
"""A naive UTC time to the microsecond."""

Digest = String(64).with_variant(
    mysql.VARCHAR(64, charset="ascii", collation="ascii_bin"), "mysql", "mariadb"
)
"""A SHA-256 digest in hexadecimal, which a one-byte character set keeps small in an index."""

MYSQL_OPTIONS = {
    f"{dialect}_{option}": value
    for dialect in ("mysql", "mariadb")
    for option, value in (("charset", "utf8mb4"), ("collate", "utf8mb4_bin"))
}
"""What keeps text exact on MySQL and MariaDB, whose default collations do not (rule A2)."""


class StoredTokenMixin:
    """The columns of a table of OAuth tokens, for any declarative ``Base``.

    Set ``__tablename__`` on the class that uses it. Read the rows freely, and write them through
    a repository or a store: only those keep the digest columns right.
    """

    if TYPE_CHECKING:
        __tablename__: str
        __table__: ClassVar[FromClause]

    id: Mapped[str] = mapped_column(String(255), primary_key=True, sort_order=-100)
    user_name: Mapped[str | None] = mapped_column(String(512), sort_order=-99)
    client_id: Mapped[str | None] = mapped_column(String(255), sort_order=-98)
    client_secret: Mapped[str | None] = mapped_column(Text, sort_order=-97)
    refresh_token: Mapped[str | None] = mapped_column(Text, sort_order=-96)
    access_token: Mapped[str | None] = mapped_column(Text, sort_order=-95)
    grant_token: Mapped[str | None] = mapped_column(Text, sort_order=-94)
    expiry_time: Mapped[int | None] = mapped_column(BigInteger, sort_order=-93)
    redirect_url: Mapped[str | None] = mapped_column(Text, sort_order=-92)
    api_domain: Mapped[str | None] = mapped_column(Text, sort_order=-91)
    identity: Mapped[str] = mapped_column(Digest, sort_order=-90)
    user_digest: Mapped[str | None] = mapped_column(Digest, sort_order=-89)
    client_digest: Mapped[str | None] = mapped_column(Digest, sort_order=-88)
    access_digest: Mapped[str | None] = mapped_column(Digest, sort_order=-87)
    refresh_digest: Mapped[str | None] = mapped_column(Digest, sort_order=-86)
    grant_digest: Mapped[str | None] = mapped_column(Digest, sort_order=-85)
    created_at: Mapped[datetime] = mapped_column(UTCDateTime, sort_order=-84)
    updated_at: Mapped[datetime] = mapped_column(UTCDateTime, sort_order=-83)

    @declared_attr.directive
    @classmethod
    def __table_args__(cls) -> tuple[Index | dict[str, str], ...]:
        return (*token_indexes(cls.__tablename__), MYSQL_OPTIONS)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(id={self.id!r}, user_name={self.user_name!r})"


def token_indexes(table_name: str) -> tuple[Index, ...]:
    """The indexes of a token table: the unique identity, and one per digest that is looked up.

    Args:
        table_name: The table's name, the prefix of theirs.
    """
    return (
        Index(f"ix_{table_name}_identity", "identity", unique=True),
        Index(f"ix_{table_name}_user_digest", "user_digest"),
        Index(f"ix_{table_name}_access_digest", "access_digest"),
        Index(f"ix_{table_name}_refresh_digest", "refresh_digest"),
        Index(f"ix_{table_name}_grant_digest", "grant_digest"),
    )


class RefreshLeaseMixin:
    """The columns of the table that lets one worker refresh a token for all the others.

    The table is provisioned, and not used yet.
    """

    key: Mapped[str] = mapped_column(Digest, primary_key=True, sort_order=-100)
    owner: Mapped[str] = mapped_column(String(64), sort_order=-99)
    expires_at: Mapped[int] = mapped_column(BigInteger, sort_order=-98)

    @declared_attr.directive
    @classmethod
    def __table_args__(cls) -> dict[str, str]:
        return MYSQL_OPTIONS


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
