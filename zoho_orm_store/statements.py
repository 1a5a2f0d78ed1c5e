"""Every SQL statement, built once per table and dialect.

The only place where dialects' SQL differs: how a row is inserted unless it exists, and how rows
are locked. Parameters of a token's columns carry the columns' names.

Built once by `cache`, which takes no lock: that of `cached_property` is held across a fork, and
before Python 3.12 is shared by every instance in the process.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    BINARY,
    BigInteger,
    Delete,
    Select,
    and_,
    bindparam,
    case,
    cast,
    column,
    delete,
    false,
    func,
    insert,
    literal_column,
    or_,
    select,
    table,
    text,
    update,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite

from zoho_orm_store.cipher import MARK, SECRET_COLUMNS, prefix_of
from zoho_orm_store.digests import DIGEST_COLUMNS
from zoho_orm_store.matching import Rung
from zoho_orm_store.revisions import VERSION_TABLE

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Insert, Row, Table, TextClause, Update

    from zoho_orm_store.scopes import Scope

__all__ = [
    "FAILED",
    "RECORD_COLUMNS",
    "REVISION",
    "SDK_COLUMNS",
    "LeaseStatements",
    "Statements",
    "begin_immediate",
    "commit_schema",
    "empty_log",
    "lease_statements_for",
    "limit_waiting",
    "lock_schema",
    "scope_parameters",
    "secure_delete",
    "server_time",
    "statements_for",
    "unlock_schema",
]

SDK_COLUMNS = (
    "id",
    "user_name",
    "client_id",
    "client_secret",
    "refresh_token",
    "access_token",
    "grant_token",
    "expiry_time",
    "redirect_url",
    "api_domain",
)
"""The columns of the SDK's own table, in its order; older ones lack the last."""

RECORD_COLUMNS = (*SDK_COLUMNS, "created_at", "updated_at")
"""The columns of a `TokenRecord`, in the order of its fields."""

REVISION: Select[Any] = select(column("version_num")).select_from(table(VERSION_TABLE))
"""The revision that the tables are at."""

FAILED = "failed "
"""What stands before the number of failures, in place of a lease's owner."""

_MYSQL_FAMILY = ("mysql", "mariadb")
_SEALED_COLUMNS = (*SECRET_COLUMNS, "user_name", "client_id")
_SCHEMA_LOCK = 0x5A6F686F
_SECURE_DELETE = text("PRAGMA secure_delete")
_SET_SECURE_DELETE = [text(f"PRAGMA secure_delete = {mode}") for mode in ("OFF", "ON", "FAST")]


def begin_immediate() -> TextClause:
    """Begin a SQLite transaction with the write lock, so that schema changes are part of it."""
    return text("BEGIN IMMEDIATE")


def limit_waiting(dialect: str, seconds: float) -> Select[Any] | None:
    """Bound the wait for another transaction's lock, for the rest of the transaction.

    Args:
        dialect: SQLAlchemy's name of the dialect.
        seconds: The longest wait.
    """
    if dialect != "postgresql":
        return None
    return select(func.set_config("lock_timeout", f"{max(1, round(seconds * 1000))}ms", True))


def lock_schema(dialect: str) -> Select[Any] | None:
    """Wait until no other process changes the schema; PostgreSQL's lock ends by itself."""
    if dialect == "postgresql":
        return select(func.pg_advisory_xact_lock(_SCHEMA_LOCK))
    if dialect in _MYSQL_FAMILY:
        return select(func.get_lock(f"zoho_orm_store_{_SCHEMA_LOCK}", 600))
    return None


def commit_schema(dialect: str) -> TextClause | None:
    """Commit what follows a schema change that has committed itself, such as its revision.

    Otherwise whoever waits for `lock_schema` would go by the revision before.
    """
    return text("COMMIT") if dialect in _MYSQL_FAMILY else None


def unlock_schema(dialect: str) -> Select[Any] | None:
    """Give back what `lock_schema` took, where the end of the transaction does not."""
    if dialect in _MYSQL_FAMILY:
        return select(func.release_lock(f"zoho_orm_store_{_SCHEMA_LOCK}"))
    return None


def secure_delete(dialect: str, mode: int | None = None) -> TextClause | None:
    """Ask a SQLite connection whether it overwrites what it deletes, or set that.

    Args:
        dialect: SQLAlchemy's name of the dialect. The servers have no such setting.
        mode: What to set: 0 off, 1 on, 2 where it costs no more writing.
    """
    if dialect != "sqlite":
        return None
    return _SECURE_DELETE if mode is None else _SET_SECURE_DELETE[mode]


def empty_log(dialect: str) -> TextClause | None:
    """Write SQLite's write-ahead log into the file, and leave nothing in it."""
    return text("PRAGMA wal_checkpoint(TRUNCATE)") if dialect == "sqlite" else None


def server_time(dialect: str) -> Select[Any] | None:
    """The server's time in epoch seconds; a database in a file has none of its own."""
    now = _server_clock(dialect)
    return None if now is None else select(now)


def _server_clock(dialect: str) -> ColumnElement[Any] | None:
    if dialect == "postgresql":
        return func.date_part("epoch", func.clock_timestamp())
    if dialect in _MYSQL_FAMILY:
        # Not NOW(): where summer time ends, the server's zone has an hour twice.
        epoch: ColumnElement[Any] = literal_column("'1970-01-01 00:00:00'")
        return func.timestampdiff(text("MICROSECOND"), epoch, func.utc_timestamp(6)) / 1_000_000
    return None


@cache
def lease_statements_for(table: Table, dialect: str) -> LeaseStatements:
    """The statements for a table of refresh leases, in a dialect's SQL.

    Args:
        table: The table of a model made with `RefreshLeaseMixin`.
        dialect: SQLAlchemy's name of the dialect.
    """
    return LeaseStatements(table, dialect)


@cache
def statements_for(table: Table, dialect: str, scope_columns: tuple[str, ...] = ()) -> Statements:
    """The statements for a table of stored tokens, in a dialect's SQL.

    Args:
        table: The table of a model made with `StoredTokenMixin`.
        dialect: SQLAlchemy's name of the dialect.
        scope_columns: The columns that fence off a tenant's rows. A statement that reads or
            changes rows takes their values as parameters, as `scope_parameters` names them.
    """
    return Statements(table, dialect, scope_columns)


def scope_parameters(scope: Scope) -> dict[str, object]:
    """The parameters that keep a statement within a scope."""
    return {f"scope_{name}": value for name, value in scope.values}


class Statements:
    """The SQL for each operation on a table of stored tokens."""

    def __init__(self, table: Table, dialect: str, scope_columns: tuple[str, ...] = ()) -> None:
        self.table = table
        self.dialect = dialect
        self._in_scope = [table.c[name] == bindparam(f"scope_{name}") for name in scope_columns]
        # MySQL takes a text for equal that differs in trailing blanks, so the time tells too. In
        # SQLite, which compares exactly, a time is text, which another tool may write otherwise.
        self._seen = (*_SEALED_COLUMNS, *(() if dialect == "sqlite" else ("updated_at",)))

    @property
    @cache
    def rows(self) -> Select[Any]:
        """Every row."""
        return select(*(self.table.c[name] for name in RECORD_COLUMNS)).where(*self._in_scope)

    @property
    @cache
    def by_id(self) -> Select[Any]:
        """The row whose id is ``row_id``."""
        return self.rows.where(self._has_id("row_id"))

    @property
    @cache
    def by_identity(self) -> Select[Any]:
        """The row with the identity digest ``identity``, locked."""
        return self.rows.where(self.table.c.identity == bindparam("identity")).with_for_update()

    @property
    @cache
    def lock(self) -> Select[Any]:
        """The row whose id is ``row_id``, locked until the transaction ends."""
        return self.by_id.with_for_update()

    @cache
    def by_rung(self, rung: Rung, *, user: bool, client: bool) -> Select[Any]:
        """The row that a rung hits, the best first, then the one saved last (rules B2 to B7).

        Parameters are named after the digest columns; ``identities`` is a list.

        Args:
            rung: Any but `Rung.ID`.
            user: Whether the asked token knows its user.
            client: Whether the asked token knows its client.
        """
        columns = self.table.c
        if rung is Rung.IDENTITY:
            met: ColumnElement[bool] = columns.identity.in_(bindparam("identities", expanding=True))
        else:
            met = self._equals(DIGEST_COLUMNS[rung.value])
        conditions = [met]
        if user and rung is not Rung.USER:
            conditions.append(self._agrees("user_digest"))
        order: list[ColumnElement[Any]] = [columns.updated_at.desc(), columns.id.desc()]
        if client:
            conditions.append(self._agrees("client_digest"))
            if rung in (Rung.USER, Rung.IDENTITY):
                order.insert(0, case((columns.client_digest.is_(None), 1), else_=0))
        return self.rows.where(and_(*conditions)).order_by(*order).limit(1)

    @property
    @cache
    def absorbed(self) -> Select[Any]:
        """The rows that turn out to be the row that is being saved, locked (rule E4).

        Those with the same identity, and those without a user that hold the same refresh token,
        but for the row ``row_id`` itself.
        """
        columns = self.table.c
        holds_the_refresh_token = and_(
            self._equals("refresh_digest"),
            columns.user_digest.is_(None),
            or_(columns.client_digest.is_(None), self._equals("client_digest")),
        )
        return (
            self.rows.where(
                ~self._has_id("row_id"),
                or_(self._equals("identity"), holds_the_refresh_token),
            )
            .order_by(columns.updated_at, columns.id)
            .with_for_update()
        )

    def _equals(self, column: str) -> ColumnElement[bool]:
        return self.table.c[column] == bindparam(column)

    def _agrees(self, digest_column: str) -> ColumnElement[bool]:
        return or_(self.table.c[digest_column].is_(None), self._equals(digest_column))

    @property
    @cache
    def begin_write(self) -> Delete | None:
        """What makes SQLite take the write lock before anything is read.

        A transaction that reads first and writes then fails at once, however long the busy
        timeout, when another one has written in between. A deletion of nothing takes the lock in
        every transaction mode of the driver.
        """
        return delete(self.table).where(false()) if self.dialect == "sqlite" else None

    @property
    @cache
    def insert_unless_present(self) -> Insert:
        """Insert a row, or do nothing where its id or its identity exists (rule E7).

        Waits for a concurrent transaction that inserts the same. A dialect without such a
        statement raises an ``IntegrityError`` instead (`insert_may_raise`).
        """
        if self.dialect == "postgresql":
            return postgresql.insert(self.table).on_conflict_do_nothing()
        if self.dialect == "sqlite":
            return sqlite.insert(self.table).on_conflict_do_nothing()
        if self.dialect in _MYSQL_FAMILY:
            # Not IGNORE, which would also turn errors into truncated values.
            return mysql.insert(self.table).on_duplicate_key_update(id=self.table.c.id)
        return insert(self.table)

    @property
    def insert_may_raise(self) -> bool:
        """Whether `insert_unless_present` raises where a row is present, in this dialect."""
        return self.dialect not in ("postgresql", "sqlite", *_MYSQL_FAMILY)

    @property
    @cache
    def update(self) -> Update:
        """Write the given columns of the row whose id is ``row_id``."""
        return update(self.table).where(self._has_id("row_id"), *self._in_scope)

    @property
    @cache
    def delete(self) -> Delete:
        """Remove the row whose id is ``row_id``."""
        return delete(self.table).where(self._has_id("row_id"), *self._in_scope)

    @property
    @cache
    def delete_all(self) -> Delete:
        """Remove every row."""
        return delete(self.table).where(*self._in_scope)

    @cache
    def purge(self, *, idle: bool, stranded: bool) -> Delete:
        """Remove rows that are of no more use.

        Args:
            idle: Those that were last saved before ``saved_before``.
            stranded: Those whose access token has ended by ``now``, and that have no refresh token.
        """
        columns = self.table.c
        useless = []
        if idle:
            useless.append(columns.updated_at < bindparam("saved_before"))
        if stranded:
            has_ended = columns.expiry_time <= bindparam("now")
            useless.append(and_(has_ended, columns.refresh_digest.is_(None)))
        return delete(self.table).where(*self._in_scope, or_(*useless))

    @property
    @cache
    def takes_id(self) -> Select[Any]:
        """The id ``row_id``, if a row of whatever scope has it."""
        return select(self.table.c.id).where(self._has_id("row_id"))

    def _has_id(self, parameter: str) -> ColumnElement[bool]:
        """That a row's id is the parameter, byte for byte.

        On MySQL and MariaDB an id column with a padding or case-blind collation, such as one
        that a project's own migration made, takes more for equal (rule A2).
        """
        column, value = self.table.c.id, bindparam(parameter, type_=self.table.c.id.type)
        if self.dialect in _MYSQL_FAMILY:
            return and_(column == value, cast(column, BINARY) == cast(value, BINARY))
        return column == value

    @cache
    def listing(
        self, user: bool, client: bool, expired: bool | None, *, page: bool = False
    ) -> Select[Any]:
        """The rows of a user or a client, or those whose access token has ended by ``now``.

        Args:
            user: Only those of ``user_digest``.
            client: Only those of ``client_digest``.
            expired: Only the ended ones, only the others, or both.
            page: In the order of ids, those after ``after`` and at most ``limit``. Otherwise all
                of them, oldest first (rule F3).
        """
        columns = self.table.c
        listed = self.rows.where(*self._filters(user, client, expired))
        if page:
            after = columns.id > bindparam("after")
            return listed.where(after).order_by(columns.id).limit(bindparam("limit"))
        return listed.order_by(columns.created_at, columns.id)

    @cache
    def count(self, user: bool, client: bool, expired: bool | None) -> Select[Any]:
        """How many rows `listing` has."""
        filters = self._filters(user, client, expired)
        return select(func.count()).select_from(self.table).where(*self._in_scope, *filters)

    def _filters(self, user: bool, client: bool, expired: bool | None) -> list[ColumnElement[bool]]:
        conditions = []
        if user:
            conditions.append(self._equals("user_digest"))
        if client:
            conditions.append(self._equals("client_digest"))
        ended = self.table.c.expiry_time <= bindparam("now")
        if expired is True:
            conditions.append(ended)
        elif expired is False:
            conditions.append(or_(self.table.c.expiry_time.is_(None), ~ended))
        return conditions

    @cache
    def stale(self, *, plain: bool) -> Select[Any]:
        """The rows after the id ``after``, at most ``limit``, that a `rekey` is to change.

        With their identity digest as a last column.

        Args:
            plain: Those that hold anything encrypted. Otherwise those that hold anything that is
                not encrypted under the key whose values begin with ``prefix``.
        """
        columns = self.table.c
        rows = self.rows.add_columns(columns.identity)
        page = rows.where(self._is_stale(plain), columns.id > bindparam("after"))
        return page.order_by(columns.id).limit(bindparam("limit"))

    @cache
    def count_stale(self, *, plain: bool) -> Select[Any]:
        """How many rows `stale` has in all."""
        condition = self._is_stale(plain)
        return select(func.count()).select_from(self.table).where(*self._in_scope, condition)

    def _is_stale(self, plain: bool) -> ColumnElement[bool]:
        return or_(*(self._is_other(self.table.c[name], plain) for name in SECRET_COLUMNS))

    def _is_other(self, column: ColumnElement[Any], plain: bool) -> ColumnElement[bool]:
        if plain:
            literal = prefix_of("")
            is_literal = func.substr(column, 1, len(literal)) == literal
            return and_(func.substr(column, 1, len(MARK)) == MARK, ~is_literal)
        prefix = bindparam("prefix", type_=column.type)
        return func.substr(column, 1, bindparam("length")) != prefix

    @property
    @cache
    def rekey(self) -> Update:
        """Write the secrets of the row ``row_id``, unless it was changed since it was seen.

        What a ciphertext is bound to must be as it was, and not the secrets alone.
        """
        as_seen = (
            self.table.c[name].is_not_distinct_from(bindparam(f"seen_{name}"))
            for name in self._seen
        )
        return update(self.table).where(self._has_id("row_id"), *self._in_scope, *as_seen)

    def seen(self, row: Row[Any]) -> dict[str, object]:
        """The parameters with which `rekey` spares a row that was changed since."""
        return {"row_id": row.id} | {f"seen_{name}": getattr(row, name) for name in self._seen}

    @property
    @cache
    def keys(self) -> Select[Any]:
        """What the secrets of every row begin with, enough to tell their keys."""
        columns = (self.table.c[name] for name in SECRET_COLUMNS)
        return select(*(func.substr(each, 1, 80) for each in columns)).where(*self._in_scope)


class LeaseStatements:
    """The SQL for each operation on a table of refresh leases.

    Times are epoch milliseconds by the server's clock, so that those of its clients may differ. A
    database in a file goes by the clock of its one machine: the parameter ``now``.
    """

    def __init__(self, table: Table, dialect: str) -> None:
        self.table = table
        self.dialect = dialect
        clock = _server_clock(dialect)
        self.has_clock = clock is not None
        self._now: ColumnElement[int] = (
            bindparam("now", type_=BigInteger())
            if clock is None
            else cast(func.floor(clock * 1000), BigInteger)
        )

    @property
    @cache
    def holder(self) -> Select[Any]:
        """Who has the lease ``key``, and the milliseconds until it ends."""
        columns = self.table.c
        left = columns.expires_at - self._now
        return select(columns.owner, left.label("left")).where(columns.key == bindparam("key"))

    @property
    @cache
    def take(self) -> Insert:
        """Give the lease ``key`` to ``owner`` for ``milliseconds``.

        Unless there is one, but for ``owner``'s own and for that of ``before``, if it has ended. A
        dialect without such a statement takes these away first (`drop_ended`), and raises an
        ``IntegrityError`` where there is another.
        """
        columns = self.table.c
        values = {
            "key": bindparam("key"),
            "owner": bindparam("owner"),
            "expires_at": self._now + bindparam("milliseconds", type_=BigInteger()),
        }
        if self.dialect in _MYSQL_FAMILY:
            taking = mysql.insert(self.table).values(values)
            new = taking.inserted
            # The second assignment sees the new owner, or under MariaDB's SIMULTANEOUS_ASSIGNMENT
            # the old one. It comes to the same.
            may_take = or_(columns.owner == new.owner, self._has_ended)
            return taking.on_duplicate_key_update(
                [
                    (name, func.if_(may_take, new[name], columns[name]))
                    for name in ("owner", "expires_at")
                ]
            )
        if self.take_may_raise:
            return insert(self.table).values(values)
        native: Any = postgresql if self.dialect == "postgresql" else sqlite
        upsert: postgresql.Insert = native.insert(self.table).values(values)
        new = upsert.excluded
        return upsert.on_conflict_do_update(
            index_elements=[columns.key],
            set_={"owner": new.owner, "expires_at": new.expires_at},
            where=or_(columns.owner == new.owner, self._has_ended),
        )

    @property
    def take_may_raise(self) -> bool:
        """Whether `take` raises where another one has the lease, in this dialect."""
        return self.dialect not in ("postgresql", "sqlite", *_MYSQL_FAMILY)

    @property
    @cache
    def drop_ended(self) -> Delete:
        """Remove the lease ``key`` of ``owner``, or that of ``before``, if it has ended."""
        columns = self.table.c
        is_mine = columns.owner == bindparam("owner")
        return delete(self.table).where(
            columns.key == bindparam("key"), or_(is_mine, self._has_ended)
        )

    @property
    def _has_ended(self) -> ColumnElement[bool]:
        """That the lease is over; after a failure it is, even if the clock was set back since."""
        columns = self.table.c
        has_failed = columns.owner.like(f"{FAILED}%")
        is_over = or_(has_failed, columns.expires_at <= self._now)
        return and_(columns.owner == bindparam("before"), is_over)

    @property
    @cache
    def release(self) -> Delete:
        """Remove the lease ``key``, if ``owner`` has it."""
        columns = self.table.c
        return delete(self.table).where(
            columns.key == bindparam("key"), columns.owner == bindparam("owner")
        )

    @property
    @cache
    def fail(self) -> Update:
        """End the lease ``lease_key`` of ``failed_owner``, whose place ``mark`` takes."""
        columns = self.table.c
        held = and_(
            columns.key == bindparam("lease_key"), columns.owner == bindparam("failed_owner")
        )
        return update(self.table).where(held).values(owner=bindparam("mark"), expires_at=self._now)

    @property
    @cache
    def long_ended(self) -> Select[Any]:
        """The keys of leases that have ended ``milliseconds`` ago, a hundred at most."""
        return select(self.table.c.key).where(self._has_long_ended).limit(100)

    @property
    @cache
    def sweep(self) -> Delete:
        """Remove those of the leases ``keys`` that have ended ``milliseconds`` ago."""
        is_one_of_them = self.table.c.key.in_(bindparam("keys", expanding=True))
        return delete(self.table).where(is_one_of_them, self._has_long_ended)

    @property
    def _has_long_ended(self) -> ColumnElement[bool]:
        return self.table.c.expires_at < self._now - bindparam("milliseconds", type_=BigInteger())
