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
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from hashlib import sha256
from itertools import count
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql

from zoho_orm_store.errors import SchemaError
from zoho_orm_store.migrations.support import (
    INNODB,
    alter_table,
    altered,
    is_offline,
    op,
    refuse_dependent_objects,
    report,
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
PAGE = 5000  # rows of which little is read
NAMED = 100  # how many ids one log record names
MARK = "$zos1$"  # what an encrypted value begins with
LITERAL = "$zos1$$"  # what plain text gets in front that begins like an encrypted value
MYSQL_FAMILY = ("mysql", "mariadb")
EXACT = "CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"

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
IDENTIFYING = ("user_name", "refresh_token", "grant_token", "access_token")
"""What makes a row one of its kind: the first of these that is known, and the client."""

rows = sa.Table(
    TABLE,
    sa.MetaData(),
    sa.Column("id", sa.String),
    *map(sa.Column, VALUES),
    *(sa.Column(name, type_) for name, type_ in ADDED.items()),
)

logger = logging.getLogger("zoho_orm_store.migrations")
adoption_logger = logging.getLogger("zoho_orm_store")


@revision_step
def upgrade() -> None:
    refuse_dependent_objects(TABLE, ["id", *WIDER, "expiry_time"])
    to_convert = not is_offline() and not was_made_here()
    if to_convert:
        refuse_encrypted_tokens()
    number = number_of_rows() if to_convert else 0
    add_columns()
    if to_convert:
        tell(number, f"Converting {number:,} tokens")
        clear_unreadable_expiries()
        convert_rows()
    tell(number, "Giving the columns their types")
    give_types()
    if not is_offline():
        tell(number, "Making one row of those that hold one token")
        collapse_identities()
        merge_rows_without_user()
    if to_convert:
        report_adoption()
    tell(number, "Making the indexes")
    create_indexes()
    create_leases()


def number_of_rows() -> int:
    return op.get_bind().scalar(sa.select(sa.func.count()).select_from(rows)) or 0


def tell(number: int, step: str) -> None:
    """Say what comes next, if there are enough rows for it to take a while."""
    if number > PAGE:
        report().on_step(step)


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
    page = select("id", "expiry_time").where(is_doubtful()).order_by(rows.c.id).limit(PAGE)
    found = connection.execute(page).all()
    while found:
        unreadable = [{"row_id": row.id} for row in found if not is_readable(row.expiry_time)]
        if unreadable:
            connection.execute(clear, unreadable)
        found = connection.execute(page.where(rows.c.id > found[-1].id)).all()


def is_doubtful() -> sa.ColumnElement[bool]:
    """Whether an expiry is anything but thirteen digits, of which the first is not zero.

    So the client need not look at the milliseconds of every row.
    """
    written = sa.cast(rows.c.expiry_time, sa.String)
    if is_sqlite():
        return ~written.bool_op("GLOB")("[1-9]" + 12 * "[0-9]")
    return sa.or_(sa.func.length(written) != 13, ~written.regexp_match("^[1-9][0-9]{12}"))


def is_readable(expiry: object) -> bool:
    """Whether an expiry is unknown, or an integer of 64 bits in plain decimal notation."""
    if expiry is None or isinstance(expiry, int):
        return True
    try:
        number = int(str(expiry))
    except ValueError:
        return False
    return str(number) == expiry and -(2**63) <= number < 2**63


def add_columns() -> None:
    """Add our columns, nullable for now, which copies the table on no database."""
    present = columns_present()
    missing = {name: type_ for name, type_ in ADDED.items() if name not in present}
    if is_mysql() and not present <= {*rows.c.keys()} and not is_text_exact():
        # Also the text of columns that somebody else has added. It would undo later changes.
        alter_table(TABLE, [f"CONVERT TO {EXACT}"])
    if is_sqlite():
        for name, type_ in missing.items():
            op.add_column(TABLE, sa.Column(name, type_, nullable=True), schema=table_schema())
    elif missing:
        added = [f"ADD COLUMN {name} {type_name(type_)} NULL" for name, type_ in missing.items()]
        alter_table(TABLE, added)


def give_types() -> None:
    """Give every column the type it has in the models.

    After the rows are converted: this copies the table, and leaves their old versions behind.
    """
    if is_mysql():
        give_types_on_mysql()
        return
    types: dict[str, sa.types.TypeEngine[Any]] = {"id": id_type(), **wider()}
    types["expiry_time"] = sa.BigInteger()
    if is_sqlite():
        with altered(TABLE) as table:
            for name, type_ in types.items():
                table.alter_column(name, type_=type_)
            for name in ("id", *REQUIRED):
                table.alter_column(name, nullable=False)
        return
    changes = [f"ALTER COLUMN {name} TYPE {type_name(type_)}" for name, type_ in types.items()]
    changes[-1] += " USING expiry_time::bigint"
    changes += [f"ALTER COLUMN {name} SET NOT NULL" for name in ("id", *REQUIRED)]
    alter_table(TABLE, changes)


def give_types_on_mysql() -> None:
    """Text is to compare byte for byte, which the default collations do not."""
    changes = [f"MODIFY id {type_name(id_type())} NOT NULL"]
    for name, type_ in {"client_id": sa.String(255), **wider()}.items():
        changes.append(f"MODIFY {name} {type_name(type_)} {EXACT} NULL")
    changes.append("MODIFY expiry_time BIGINT NULL")
    changes += [f"MODIFY {name} {type_name(ADDED[name])} NOT NULL" for name in REQUIRED]
    alter_table(TABLE, [*changes, f"DEFAULT {EXACT}"])


def wider() -> dict[str, sa.types.TypeEngine[str]]:
    """The types to give to the SDK's columns of text."""
    if is_next_revision_planned():
        # It would copy the table again for this one column.
        return WIDER | {"user_name": sa.Text()}
    return WIDER


def is_next_revision_planned() -> bool:
    return "zoho_orm_store_0003" in report().planned


def is_sqlite() -> bool:
    return op.get_context().dialect.name == "sqlite"


def is_mysql() -> bool:
    return op.get_context().dialect.name in MYSQL_FAMILY


def is_text_exact() -> bool:
    if is_offline():
        return False
    options = sa.inspect(op.get_bind()).get_table_options(TABLE, schema=table_schema())
    return "utf8mb4_bin" in options.values()


def type_name(type_: sa.types.TypeEngine[Any]) -> str:
    return type_.compile(op.get_context().dialect)


def id_type() -> sa.types.TypeEngine[str]:
    """A string that also keeps ids apart that differ in trailing blanks."""
    dialect = op.get_context().dialect
    if dialect.name not in MYSQL_FAMILY:
        return sa.String(255)
    is_mariadb = getattr(dialect, "is_mariadb", False)
    collation = "utf8mb4_nopad_bin" if is_mariadb else "utf8mb4_0900_bin"
    return mysql.VARCHAR(255, charset="utf8mb4", collation=collation)


def convert_rows() -> None:
    """Write what our columns hold about the existing rows, oldest ids first.

    The SDK's stores say in two ways that a value is unknown; only NULL is left. No secret is among
    the parameters, which an error or a log may show.
    """
    start = datetime.now(timezone.utc).replace(tzinfo=None)
    if is_sqlite():
        convert_one_by_one(start)
    else:
        convert_on_the_server(start)


def convert_one_by_one(start: datetime) -> None:
    connection = op.get_bind()
    for name in TEXTS:
        is_blank = sa.func.length(rows.c[name]) == 0
        connection.execute(sa.update(rows).where(is_blank).values({name: None}))
    change = sa.update(rows).where(rows.c.id == sa.bindparam("row_id"))
    ticks = count()
    for ids in batches(connection):
        by_id = {record["id"]: record for record in records(connection, rows.c.id.in_(ids))}
        values = []
        for id_ in ids:
            saved_at = start + timedelta(microseconds=next(ticks))
            times = {"row_id": id_, "created_at": saved_at, "updated_at": saved_at}
            values.append(digests_of(by_id[id_]) | times)
        connection.execute(change, values)


def convert_on_the_server(start: datetime) -> None:
    """Convert all rows in one statement, which takes a fraction of the time of one for each."""
    position = sa.func.row_number().over(order_by=in_order()).label("position")
    ordered = sa.select(rows.c.id.label("row_id"), position).subquery("ordered")
    begin = sa.bindparam("start", start, ADDED["created_at"])
    saved_at: Any
    if is_mysql():
        saved_at = sa.func.timestampadd(sa.text("MICROSECOND"), ordered.c.position, begin)
    else:
        saved_at = begin + ordered.c.position * sa.text("interval '1 microsecond'")
    known = {name: sa.case((sa.func.length(rows.c[name]) > 0, rows.c[name])) for name in TEXTS}
    values = known | digests_in_sql(known) | {"created_at": saved_at, "updated_at": saved_at}
    change = sa.update(rows).where(rows.c.id == ordered.c.row_id).values(values)
    op.get_bind().execute(change)


def digests_in_sql(known: dict[str, Any]) -> dict[str, Any]:
    """What `digests_of` returns, as expressions for PostgreSQL, MariaDB and MySQL."""
    client = sa.func.coalesce(known["client_id"], "")
    identities = [
        (known[name].is_not(None), digest_in_sql("identity", name, known[name], client))
        for name in IDENTIFYING
    ]
    by_id = digest_in_sql("identity", "id", rows.c.id, "")
    digests = {"identity": sa.case(*identities, else_=by_id)}
    for name, column in DIGESTED.items():
        digests[column] = digest_in_sql(name, known[name])  # NULL if the value is.
    return digests


def digest_in_sql(*parts: Any) -> Any:  # noqa: ANN401
    framed: Any = sa.literal("")
    for part in parts:
        if isinstance(part, str):
            framed = framed + f"{len(part)}:{part}"
        elif is_mysql():
            # The column of an old table may have a character set of its own.
            exact = sa.func.convert(part.op("USING")(sa.text("utf8mb4")))
            framed = framed + sa.cast(sa.func.length(exact), sa.String) + ":" + exact
        else:
            length = sa.func.octet_length(sa.func.convert_to(part, "UTF8"))
            framed = framed + sa.cast(length, sa.String) + ":" + part
    if is_mysql():
        return sa.func.sha2(framed, 256)
    return sa.func.encode(sa.func.sha256(sa.func.convert_to(framed, "UTF8")), "hex")


def collapse_identities() -> None:
    """Make one row of those that the SDK's stores have written for one user and client."""
    for groups in repeated("identity", identity_of):
        kept = [(max(group, key=age), group) for group in groups]
        combine(kept, "rows of one user and client (or of one token); the newest")


def merge_rows_without_user() -> None:
    """Make one row of a user's own row and one without a user that holds its refresh token."""
    lacks_user = sa.func.count(rows.c.user_digest) < sa.func.count()
    for groups in repeated("refresh_digest", lambda record: record["refresh_token"], lacks_user):
        combine(
            (tie for group in groups for tie in ties(group)),
            "rows with one refresh token; the one that says most about whose it is",
        )


def repeated(
    column: str, key: Callable[[dict[str, Any]], str], *having: sa.ColumnElement[bool]
) -> Iterator[Iterable[list[dict[str, Any]]]]:
    """The groups of rows that have the same digest in a column, in batches of groups.

    Args:
        column: The column.
        key: What the digest is made of, from a row.
        having: More conditions for a group.
    """
    connection, value = op.get_bind(), rows.c[column]
    several = sa.select(value).where(value.is_not(None)).group_by(value)
    digests = connection.scalars(several.having(sa.func.count() > 1, *having)).all()
    for start in range(0, len(digests), BATCH):
        groups: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        for record in records(connection, value.in_(digests[start : start + BATCH])):
            groups[key(record)].append(record)
        yield groups.values()


def ties(
    group: Sequence[dict[str, Any]],
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Each row with the others that turn out to be the same token, of those with one refresh token.

    A row without a user is the same token as the row of a user with the same client, or as one
    that differs only in that its client is known. A client that is not known differs from none.
    """
    same = defaultdict(list)
    for other in group:
        targets = [record for record in group if is_absorbed(other, record)]
        if targets:
            target = max(targets, key=lambda record: (record["user_name"] is not None, age(record)))
            same[target["id"]].append(other)
    for record in group:
        if record["id"] in same:
            yield record, [record, *same[record["id"]]]


def is_absorbed(other: dict[str, Any], record: dict[str, Any]) -> bool:
    if other["user_name"] is not None or other["client_id"] not in (None, record["client_id"]):
        return False
    return record["user_name"] is not None or other["client_id"] != record["client_id"]


def combine(
    merging: Iterable[tuple[dict[str, Any], Sequence[dict[str, Any]]]], description: str
) -> None:
    """Make one row of several, with the newest values.

    Args:
        merging: The row to keep, and all of the rows that become it.
        description: What the rows have in common, and which one is kept, for the log.
    """
    dropped, changes = [], []
    for kept, group in merging:
        found = sorted(group, key=age)
        combined = merged(found) | {"id": kept["id"]}
        if combined != kept:
            values = {name: combined[name] for name in VALUES}
            changes.append({"row_id": kept["id"]} | values | digests_of(combined))
        ids = [record["id"] for record in found if record is not kept]
        dropped += ids
        logger.warning(
            "The table %s held %d %s, with id %r, was kept, and those with the ids %s were "
            "dropped.",
            TABLE,
            len(found),
            description,
            kept["id"],
            ", ".join(map(repr, ids)),
        )
    connection = op.get_bind()
    for start in range(0, len(dropped), BATCH):
        connection.execute(sa.delete(rows).where(rows.c.id.in_(dropped[start : start + BATCH])))
    if changes:
        keep = sa.update(rows).where(rows.c.id == sa.bindparam("row_id"))
        connection.execute(keep, changes)


def report_adoption() -> None:
    report().adopted = adopted = number_of_rows()
    if adopted:
        adoption_logger.info("Adopted the %d tokens of the SDK's table %s.", adopted, TABLE)


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
    for name in IDENTIFYING:
        if record[name] is not None:
            return digest("identity", name, record[name], record["client_id"] or "")
    return digest("identity", "id", record["id"], "")


def digest(*parts: str) -> str:
    encoded = [part.encode("utf-8", "surrogatepass") for part in parts]
    return sha256(b"".join(b"%d:%b" % (len(each), each) for each in encoded)).hexdigest()


def create_indexes() -> None:
    present = set() if is_offline() else indexes_present()
    missing = [name for name in INDEXED if f"ix_{TABLE}_{name}" not in present]
    if is_mysql() and missing:
        # One statement reads the table once. Together with the types, it would not sort the
        # digests, but insert one after the other.
        kinds = {"identity": "UNIQUE INDEX"}
        added = (f"{kinds.get(name, 'INDEX')} ix_{TABLE}_{name} ({name})" for name in missing)
        alter_table(TABLE, [f"ADD {index}" for index in added])
        return
    for name in missing:
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
        make_ids_whole_numbers()
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


def make_ids_whole_numbers() -> None:
    """Change ids with which the SDK's stores cannot work: they compute the next one from the last.

    The change is reported.
    """
    connection = op.get_bind()
    ids = connection.scalars(sa.select(rows.c.id).order_by(rows.c.created_at, rows.c.id)).all()
    renumbered = new_ids(ids)
    if not renumbered:
        return
    pairs = [*renumbered.items()]
    change = sa.update(rows).where(rows.c.id == sa.bindparam("old"))
    change = change.values(id=sa.bindparam("new"))
    for start in range(0, len(pairs), BATCH):
        connection.execute(change, [{"old": a, "new": b} for a, b in pairs[start : start + BATCH]])
    report().renumbered |= renumbered
    for start in range(0, len(pairs), NAMED):
        logger.warning(
            "Tokens in the table %s got new ids, because the SDK's stores need whole numbers that "
            "they can count on from: %s.",
            TABLE,
            ", ".join(f"{old!r} is now {new!r}" for old, new in pairs[start : start + NAMED]),
        )


def new_ids(ids: Sequence[str]) -> dict[str, str]:
    """The ids to change, and what they become, so that the SDK's stores can add a token.

    Args:
        ids: All ids, the oldest first.
    """
    kept = [id_ for id_ in ids if is_whole_number(id_)]
    first = max(map(int, kept), default=0) + 1
    others = [id_ for id_ in ids if not is_whole_number(id_)]
    changed = {id_: str(number) for number, id_ in enumerate(others, first)}
    # The DBStore takes the last id in the order of text, in which "9" comes after "10", and adds 1.
    # So one id gets ten digits, which is what the SDK's column holds, for it to count on from.
    used = {*kept, *changed.values()}
    last = max(used, default="0")
    if (others and len(last) < 10) or str(int(last) + 1) in used:
        moved = others[-1] if others else last
        changed[moved] = last.ljust(10, "0") if len(last) < 10 else f"{last}0"
    return changed


def is_whole_number(id_: str) -> bool:
    return id_.isascii() and id_.isdigit()


def batches(connection: sa.Connection) -> Iterator[Sequence[str]]:
    """The ids of all rows, in batches, numbers in the order in which the SDK counts them.

    SQLite has sorted them all before it returns the first, so rows may be changed meanwhile.
    """
    return connection.scalars(sa.select(rows.c.id).order_by(*in_order())).partitions(BATCH)


def in_order() -> tuple[sa.ColumnElement[Any], ...]:
    id_: sa.ColumnElement[Any] = rows.c.id
    if is_mysql():
        # The column of an old table may ignore case.
        id_ = sa.func.convert(id_.op("USING")(sa.text("utf8mb4"))).collate("utf8mb4_bin")
    return sa.func.length(id_), id_


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
