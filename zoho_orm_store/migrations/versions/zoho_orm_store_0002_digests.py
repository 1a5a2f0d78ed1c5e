"""Digest columns, wider types, one row per identity, and the table of refresh leases.

Existing rows are kept and converted. Several rows of one identity become one, with the newest
values. Each step looks at what is there first, so that an interrupted run can be repeated on a
database without transactional DDL.

This file is frozen: it has its own copies of what it needs (digests, the merging of rows), so that
later changes of the package cannot change what it writes.

Revision: zoho_orm_store_0002
Revises: zoho_orm_store_0001
"""

import logging
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta, timezone
from hashlib import sha256
from itertools import count
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql

from zoho_orm_store.errors import SchemaError
from zoho_orm_store.migrations.support import (
    INNODB,
    altered,
    is_offline,
    op,
    refuse_dependent_objects,
    revision_step,
    table_schema,
)

revision = "zoho_orm_store_0002"
down_revision = "zoho_orm_store_0001"
branch_labels = None
depends_on = None

TABLE = "oauthtoken"
LEASES = "oauthtoken_refresh_lease"
BATCH = 500
MARK = "$zos1$"  # what an encrypted value begins with
LITERAL = "$zos1$$"  # what plain text gets in front that begins like an encrypted value
MYSQL_FAMILY = ("mysql", "mariadb")

DIGEST: Any = sa.String(64).with_variant(
    mysql.VARCHAR(64, charset="ascii", collation="ascii_bin"), *MYSQL_FAMILY
)
UTC_DATETIME: Any = sa.DateTime().with_variant(mysql.DATETIME(fsp=6), *MYSQL_FAMILY)

WIDER: dict[str, sa.types.TypeEngine[str]] = {
    "user_name": sa.String(512),
    "client_secret": sa.Text(),
    "refresh_token": sa.Text(),
    "access_token": sa.Text(),
    "grant_token": sa.Text(),
    "redirect_url": sa.Text(),
    "api_domain": sa.Text(),
}
ADDED: dict[str, sa.types.TypeEngine[Any]] = {
    "identity": DIGEST,
    "user_digest": DIGEST,
    "client_digest": DIGEST,
    "access_digest": DIGEST,
    "refresh_digest": DIGEST,
    "grant_digest": DIGEST,
    "created_at": UTC_DATETIME,
    "updated_at": UTC_DATETIME,
}
REQUIRED = ("identity", "created_at", "updated_at")
INDEXED = ("identity", "user_digest", "access_digest", "refresh_digest", "grant_digest")

TEXTS = (
    "user_name",
    "client_id",
    "client_secret",
    "refresh_token",
    "access_token",
    "grant_token",
    "redirect_url",
    "api_domain",
)
VALUES = (*TEXTS, "expiry_time")
SECRETS = ("client_secret", "refresh_token", "access_token", "grant_token")
DIGESTED = {
    "user_name": "user_digest",
    "client_id": "client_digest",
    "access_token": "access_digest",
    "refresh_token": "refresh_digest",
    "grant_token": "grant_digest",
}
rows = sa.Table(
    TABLE,
    sa.MetaData(),
    sa.Column("id", sa.String),
    *map(sa.Column, VALUES),
    *(sa.Column(name, type_) for name, type_ in ADDED.items()),
)

logger = logging.getLogger("zoho_orm_store.migrations")


@revision_step
def upgrade() -> None:
    refuse_dependent_objects(TABLE, ["id", *WIDER, "expiry_time"])
    to_convert = not is_offline() and not was_made_here()
    if to_convert:
        refuse_encrypted_tokens()
        clear_unreadable_expiries()
    widen()
    if to_convert:
        clear_blanks()
        convert_rows()
    if not is_offline():
        collapse_identities()
    tighten()
    create_leases()


def was_made_here() -> bool:
    """Whether every row is as this revision leaves it, as in a backup of this table alone.

    Its rows may then be encrypted, and could not be converted.
    """
    if not ADDED.keys() <= columns_present():
        return False
    is_unfinished = sa.or_(*(rows.c[name].is_(None) for name in REQUIRED))
    return not op.get_bind().scalar(sa.select(sa.exists().where(is_unfinished)))


def begins_with(name: str, beginning: str) -> sa.ColumnElement[bool]:
    return sa.func.substr(rows.c[name], 1, len(beginning)) == beginning


def refuse_encrypted_tokens() -> None:
    """Without their keys there is neither a digest to be made of them, nor a use for the SDK."""
    is_encrypted = (
        sa.and_(begins_with(name, MARK), ~begins_with(name, LITERAL)) for name in SECRETS
    )
    number = op.get_bind().scalar(sa.select(sa.func.count()).where(sa.or_(*is_encrypted)))
    if number:
        raise SchemaError(
            f"{number} tokens in the table {TABLE} are encrypted, which the revision before "
            "zoho_orm_store_0002 does not know. Nothing was changed. Run first, with the keys in "
            "ZOHO_ORM_STORE_KEYS, at zoho_orm_store_0002: zoho-orm-store decrypt"
        )


def take_literal_marks_away() -> None:
    """Give plain text that looks encrypted back as it was."""
    for name in SECRETS:
        plain = sa.func.substr(rows.c[name], len(LITERAL) + 1)
        marked = sa.update(rows).where(begins_with(name, LITERAL))
        op.get_bind().execute(marked.values({name: plain}))


def clear_unreadable_expiries() -> None:
    """Clear expiries that are not integers. The SDK then learns the expiry by itself."""
    connection = op.get_bind()
    clear = sa.update(rows).where(rows.c.id == sa.bindparam("row_id")).values(expiry_time=None)
    for ids in batches(connection):
        found = connection.execute(select("id", "expiry_time").where(rows.c.id.in_(ids)))
        unreadable = [row.id for row in found if not is_readable(row.expiry_time)]
        if unreadable:
            connection.execute(clear, [{"row_id": id_} for id_ in unreadable])


def is_readable(expiry: object) -> bool:
    """Whether an expiry is unknown, or an integer of 64 bits in plain decimal notation."""
    if expiry is None or isinstance(expiry, int):
        return True
    try:
        number = int(str(expiry))
    except ValueError:
        return False
    return str(number) == expiry and -(2**63) <= number < 2**63


def widen() -> None:
    """Give every column the type it has in the models, and add ours, nullable for now."""
    make_text_exact()
    present = columns_present()
    with altered(TABLE) as table:
        table.alter_column(
            "id",
            existing_type=sa.String(10),
            type_=id_type(),
            existing_nullable=False,
            nullable=False,
        )
        for name, type_ in WIDER.items():
            table.alter_column(name, existing_type=sa.String(255), type_=type_)
        table.alter_column(
            "expiry_time",
            existing_type=sa.String(20),
            type_=sa.BigInteger(),
            postgresql_using="expiry_time::bigint",
        )
        for name, type_ in ADDED.items():
            if name not in present:
                table.add_column(sa.Column(name, type_, nullable=True))


def make_text_exact() -> None:
    """Compare text byte for byte on MySQL and MariaDB, whose default collations do not."""
    if op.get_context().dialect.name not in MYSQL_FAMILY:
        return
    if not is_offline():
        options = sa.inspect(op.get_bind()).get_table_options(TABLE, schema=table_schema())
        if "utf8mb4_bin" in options.values():
            return
    preparer = op.get_context().dialect.identifier_preparer
    name = preparer.format_table(sa.table(TABLE, schema=table_schema()))
    op.execute(f"ALTER TABLE {name} CONVERT TO CHARACTER SET utf8mb4 COLLATE utf8mb4_bin")


def id_type() -> sa.types.TypeEngine[str]:
    """A string that also keeps ids apart that differ in trailing blanks."""
    dialect = op.get_context().dialect
    if dialect.name not in MYSQL_FAMILY:
        return sa.String(255)
    is_mariadb = getattr(dialect, "is_mariadb", False)
    collation = "utf8mb4_nopad_bin" if is_mariadb else "utf8mb4_0900_bin"
    return mysql.VARCHAR(255, charset="utf8mb4", collation=collation)


def clear_blanks() -> None:
    """Make one of the two ways in which the SDK's stores say that a value is unknown."""
    for name in TEXTS:
        is_blank = sa.func.length(rows.c[name]) == 0
        op.get_bind().execute(sa.update(rows).where(is_blank).values({name: None}))


def convert_rows() -> None:
    """Write what our columns hold about the existing rows, oldest ids first.

    No secret is written, so that none is among the parameters that an error or a log may show.
    """
    connection = op.get_bind()
    change = sa.update(rows).where(rows.c.id == sa.bindparam("row_id"))
    start = datetime.now(timezone.utc).replace(tzinfo=None)
    ticks = count()
    for ids in batches(connection):
        by_id = {record["id"]: record for record in records(connection, rows.c.id.in_(ids))}
        values = []
        for id_ in ids:
            saved_at = start + timedelta(microseconds=next(ticks))
            times = {"row_id": id_, "created_at": saved_at, "updated_at": saved_at}
            values.append(digests_of(by_id[id_]) | times)
        connection.execute(change, values)


def collapse_identities() -> None:
    """Make one row of those that the SDK's stores have written for one user and client."""
    connection = op.get_bind()
    repeated = sa.select(rows.c.identity).group_by(rows.c.identity).having(sa.func.count() > 1)
    for identity in connection.scalars(repeated).all():
        found = sorted(records(connection, rows.c.identity == identity), key=age)
        newest, combined = found[-1], merged(found)
        learned = {name: combined[name] for name in VALUES if combined[name] != newest[name]}
        dropped = [record["id"] for record in found[:-1]]
        connection.execute(sa.delete(rows).where(rows.c.id.in_(dropped)))
        keep = sa.update(rows).where(rows.c.id == newest["id"])
        connection.execute(keep.values(learned | digests_of(combined)))
        logger.warning(
            "The table %s held %d rows of one user and client (or of one token); "
            "the newest, with id %r, was kept, and those with the ids %s were dropped.",
            TABLE,
            len(found),
            newest["id"],
            ", ".join(map(repr, dropped)),
        )


def age(record: dict[str, Any]) -> tuple[int, int, str]:
    """Sort key from the oldest row to the newest: these tables do not say when a row was saved."""
    return (record["expiry_time"] or 0, len(record["id"]), record["id"])


def merged(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row with the newest known values of several, given from the oldest to the newest.

    An access token and its expiry are one pair.
    """
    result = Record(found[0])
    for newer in found[1:]:
        is_new_pair = newer["access_token"] not in (None, result["access_token"])
        if is_new_pair or newer["expiry_time"] is not None:
            result["expiry_time"] = newer["expiry_time"]
        result |= {name: newer[name] for name in TEXTS if newer[name] is not None}
    return result


def digests_of(record: dict[str, Any]) -> dict[str, str | None]:
    """The digest columns of a row, the identity among them."""
    digests: dict[str, str | None] = {"identity": identity_of(record)}
    for name, column in DIGESTED.items():
        digests[column] = None if record[name] is None else digest(name, record[name])
    return digests


def identity_of(record: dict[str, Any]) -> str:
    """The digest of what makes a row one of its kind: its user, or the first token it holds."""
    for name in ("user_name", "refresh_token", "grant_token", "access_token"):
        if record[name] is not None:
            return digest("identity", name, record[name], record["client_id"] or "")
    return digest("identity", "id", record["id"], "")


def digest(*parts: str) -> str:
    encoded = [part.encode("utf-8", "surrogatepass") for part in parts]
    return sha256(b"".join(b"%d:%b" % (len(each), each) for each in encoded)).hexdigest()


def tighten() -> None:
    with altered(TABLE) as table:
        for name in REQUIRED:
            table.alter_column(name, existing_type=ADDED[name], nullable=False)
    present = set() if is_offline() else indexes_present()
    for name in INDEXED:
        if f"ix_{TABLE}_{name}" not in present:
            op.create_index(
                f"ix_{TABLE}_{name}",
                TABLE,
                [name],
                unique=name == "identity",
                schema=table_schema(),
            )


def create_leases() -> None:
    if not is_offline() and sa.inspect(op.get_bind()).has_table(LEASES, schema=table_schema()):
        return
    op.create_table(
        LEASES,
        sa.Column("key", DIGEST, primary_key=True),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        schema=table_schema(),
        mysql_charset="utf8mb4",
        mysql_collate="utf8mb4_bin",
        mariadb_charset="utf8mb4",
        mariadb_collate="utf8mb4_bin",
        **INNODB,
    )


@revision_step
def downgrade() -> None:
    """Take our columns away; the SDK's keep their wider types, so that no value is cut."""
    refuse_dependent_objects(TABLE, [*ADDED, "expiry_time"])
    if not is_offline():
        refuse_encrypted_tokens()
        take_literal_marks_away()
    op.drop_table(LEASES, schema=table_schema())
    for name in INDEXED:
        op.drop_index(f"ix_{TABLE}_{name}", TABLE, schema=table_schema())
    with altered(TABLE) as table:
        for name in ADDED:
            table.drop_column(name)
        table.alter_column(
            "expiry_time",
            existing_type=sa.BigInteger(),
            type_=sa.String(20),
            postgresql_using="expiry_time::varchar(20)",
        )


def batches(connection: sa.Connection) -> Iterator[Sequence[str]]:
    """The ids of all rows, in batches, numbers in the order in which the SDK counts them."""
    order = (sa.func.length(rows.c.id), rows.c.id)
    ids = connection.scalars(sa.select(rows.c.id).order_by(*order)).all()
    for start in range(0, len(ids), BATCH):
        yield ids[start : start + BATCH]


def select(*names: str) -> sa.Select[tuple[object, ...]]:
    return sa.select(*(rows.c[name] for name in names))


class Record(dict[str, Any]):
    """A row by its columns' names; a traceback that shows variables shows no secret."""

    def __repr__(self) -> str:
        return f"Record(id={self['id']!r})"


def records(connection: sa.Connection, condition: sa.ColumnElement[bool]) -> Iterator[Record]:
    for row in connection.execute(select("id", *VALUES).where(condition)).mappings():
        known = {name: None if value == "" else value for name, value in row.items()}
        if known["expiry_time"] is not None:
            known["expiry_time"] = int(known["expiry_time"])
        yield Record(known)


def columns_present() -> set[str]:
    if is_offline():
        return set()
    columns = sa.inspect(op.get_bind()).get_columns(TABLE, schema=table_schema())
    return {column["name"] for column in columns}


def indexes_present() -> set[str | None]:
    indexes = sa.inspect(op.get_bind()).get_indexes(TABLE, schema=table_schema())
    return {index["name"] for index in indexes}
