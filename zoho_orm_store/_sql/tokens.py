"""The statements on a table of stored tokens, made once per table.

Parameters for a column carry its name. The digest column of a field is its parameter too; with
digests under several keys it is a list.
"""

from __future__ import annotations

from datetime import datetime
from enum import Enum, auto
from functools import cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    DateTime,
    String,
    and_,
    bindparam,
    case,
    cast,
    delete,
    exists,
    func,
    not_,
    or_,
    select,
    type_coerce,
    update,
)
from sqlalchemy.types import NullType

from zoho_orm_store._digests import KEYED
from zoho_orm_store._matching import Lookup
from zoho_orm_store._secrets import MARK, prefix_of
from zoho_orm_store._sql.dialects import equals_exactly, equals_in_any_collation
from zoho_orm_store.records import DIGESTS, ENCRYPTED, FIELDS, SECRETS

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Delete, Row, Select, Table, Update

__all__ = ["RECORD_COLUMNS", "Rotation", "TokenStatements", "token_statements"]

RECORD_COLUMNS = (*FIELDS, "created_at", "updated_at")
"""The columns of a `TokenRecord`, in the order of its fields."""

_KEY_PREFIX_LENGTH = 80
_FIRST_TIME = datetime.min


@cache
def token_statements(
    table: Table, scope_columns: tuple[str, ...], *, keyed: bool
) -> TokenStatements:
    """The statements for a table.

    Args:
        table: The table of a model made with `StoredTokenMixin`.
        scope_columns: The columns of a scope. Their values are the parameters ``scope_<column>``.
        keyed: Whether digests may be under several keys.
    """
    return TokenStatements(table, scope_columns, keyed=keyed)


class Rotation(Enum):
    """Which rows are written anew."""

    ENCRYPTED = auto()  # Those that are encrypted under another key than the present one.
    ALL = auto()  # Those in plain text as well.
    TO_PLAIN_TEXT = auto()  # Those that are encrypted.


class TokenStatements:
    """The SQL for each operation on a table of stored tokens."""

    def __init__(self, table: Table, scope_columns: tuple[str, ...], *, keyed: bool) -> None:
        self._columns = columns = table.c
        self._table = table
        self._keyed = keyed
        self._in_scope = [_has_value(columns[name], f"scope_{name}") for name in scope_columns]
        self._has_id = equals_exactly(columns.id, bindparam("row_id", type_=columns.id.type))
        selected = (_as_stored(columns[name]) for name in RECORD_COLUMNS)
        rows = select(*selected).where(*self._in_scope)

        self.rows = rows
        self.by_id = rows.where(self._has_id)
        self.lock_by_id = self.by_id.add_columns(
            self._is_tied(), columns.identity
        ).with_for_update()
        self.by_identity = rows.where(self._equals("identity"))
        self.lock_by_identity = self.by_identity.with_for_update()
        self.update = update(table).where(self._has_id, *self._in_scope)
        self.delete = delete(table).where(self._has_id, *self._in_scope)
        self.delete_ids = delete(table).where(
            columns.id.in_(bindparam("ids", expanding=True)), *self._in_scope
        )
        self.delete_all = delete(table).where(*self._in_scope)
        self.id_in_any_scope = select(columns.id).where(self._has_id)
        self.ids = self._next(select(columns.id).where(*self._in_scope))
        self.with_identity = self._next(rows.add_columns(columns.identity))
        self.next_digest = (
            select(columns.identity, columns.id, *(columns[name] for name in ENCRYPTED))
            .where(columns.identity > bindparam("after"), *self._in_scope)
            .order_by(columns.identity)
            .limit(1)
        )
        self.key_prefixes = select(
            *(func.substr(columns[name], 1, _KEY_PREFIX_LENGTH) for name in SECRETS)
        ).where(*self._in_scope)

    def _is_tied(self) -> ColumnElement[bool]:
        """Whether another row may turn out to be the same token as the selected one.

        It locks no row, and reads only those with the same refresh digest, of which the scope is a
        part.
        """
        columns, other = self._columns, self._table.alias("other").c
        return (
            exists()
            .where(
                other.refresh_digest == columns.refresh_digest,
                other.identity != columns.identity,
                _one_lacks(columns.user_digest, other.user_digest),
                or_(
                    _one_lacks(columns.client_digest, other.client_digest),
                    columns.client_digest == other.client_digest,
                ),
            )
            .correlate(self._table)
            .label("is_tied")
        )

    @cache
    def taken(self, column: str) -> Select[Any]:
        """Which of some ``values`` a column holds already, in any scope."""
        stored = self._columns[column]
        return select(stored).where(stored.in_(bindparam("values", expanding=True)))

    @cache
    def holders(self, column: str) -> Select[Any]:
        """The rows that hold one of some ``values`` in a column: their ids, and which; locked."""
        held = self._columns[column]
        return (
            select(self._columns.id, held.label("held"))
            .where(held.in_(bindparam("values", expanding=True)), *self._in_scope)
            .with_for_update()
        )

    @cache
    def lock_refresh_token(self, *, user: bool, client: bool) -> Select[Any]:
        """The rows that hold a refresh token, but for those of other users and clients.

        Args:
            user: Whether the asked token knows its user.
            client: Whether the asked token knows its client.
        """
        conditions = [self._equals("refresh_digest")]
        if user:
            # MariaDB must not use the users' index, in which it would lock all rows without user.
            stored = func.coalesce(self._columns.user_digest, "")
            conditions.append(or_(stored == "", self._equals("user_digest", stored)))
        if client:
            conditions.append(self._agrees("client_digest"))
        return self.rows.where(*conditions).with_for_update()

    @cache
    def by_lookup(self, lookup: Lookup, *, user: bool, client: bool) -> Select[Any]:
        """The row that a lookup finds: the best first, then the one saved last.

        Args:
            lookup: Any but `Lookup.ID`. For `Lookup.IDENTITY`, ``identities`` is a list.
            user: Whether the asked token knows its user.
            client: Whether the asked token knows its client.
        """
        columns = self._columns
        if lookup is Lookup.IDENTITY:
            found: ColumnElement[bool] = columns.identity.in_(
                bindparam("identities", expanding=True)
            )
        else:
            found = self._equals(DIGESTS[lookup.value])
        conditions = [found]
        order: list[ColumnElement[Any]] = [columns.updated_at.desc(), columns.id.desc()]
        if user and lookup is not Lookup.USER:
            conditions.append(self._agrees("user_digest"))
        if client:
            conditions.append(self._agrees("client_digest"))
            if lookup in (Lookup.USER, Lookup.IDENTITY):
                order.insert(0, case((columns.client_digest.is_(None), 1), else_=0))
        return self.rows.where(*conditions).order_by(*order).limit(1)

    @cache
    def listing(self, user: bool, client: bool, expired: bool | None) -> Select[Any]:
        """The rows of ``user_digest``, of ``client_digest``, or expired by ``now``; oldest first.

        Args:
            user: Whether to filter by user.
            client: Whether to filter by client.
            expired: Only the expired ones, only the others, or both.
        """
        columns = self._columns
        rows = self.rows.where(*self._filters(user, client, expired))
        return rows.order_by(columns.created_at, columns.id)

    @cache
    def page(self, user: bool, client: bool, expired: bool | None) -> Select[Any]:
        """The rows of `listing` in the order of ids: those after ``after``, at most ``limit``."""
        rows = self.rows.where(*self._filters(user, client, expired))
        return self._next(rows)

    @cache
    def count(self, user: bool, client: bool, expired: bool | None) -> Select[Any]:
        """The number of rows in `listing`."""
        return self._count(*self._filters(user, client, expired))

    @cache
    def purge(self, *, idle: bool, stranded: bool) -> Delete:
        """Delete rows that are of no more use.

        Args:
            idle: Those last saved before ``saved_before``.
            stranded: Those expired by ``now`` that have no refresh token, and those without any
                token.
        """
        columns, useless = self._columns, []
        if idle:
            # SQLite sorts numbers before text, and text that is not a time anywhere.
            is_time = cast(columns.updated_at, String).like("____-__-__%")
            useless.append(
                and_(is_time, columns.updated_at.between(_FIRST_TIME, bindparam("saved_before")))
            )
        if stranded:
            has_nothing = and_(columns.access_digest.is_(None), columns.grant_digest.is_(None))
            is_dead = or_(self._is_expired, has_nothing)
            useless.append(and_(is_dead, columns.refresh_digest.is_(None)))
        return delete(self._table).where(*self._in_scope, or_(*useless))

    @cache
    def not_rotated(self, rotation: Rotation) -> Select[Any]:
        """The rows to rotate, with their identity digest: at most ``limit``.

        Those after ``after`` and up to ``until``: how many rows of a table are left to rotate is
        nothing that a database can estimate, so without a bound PostgreSQL reads the whole table
        and sorts it, for each batch.

        Those whose values do not begin with ``prefix``, which has the length ``length``, or whose
        digests do not begin with ``digest_prefix``, of the length ``digest_length``; in a rotation
        to plain text, those with an encrypted value.
        """
        rows = self.rows.add_columns(self._columns.identity)
        is_near = self._columns.id <= bindparam("until")
        return self._next(rows.where(is_near, self._is_not_rotated(rotation)))

    @cache
    def count_not_rotated(self, rotation: Rotation) -> Select[Any]:
        """The number of rows that are left to rotate in the whole table."""
        return self._count(self._is_not_rotated(rotation))

    @property
    def count_plain(self) -> Select[Any]:
        """The number of rows with a secret in plain text."""
        return self._count(self._has_plain_secret)

    @cache
    def rotate(self, *, compare_time: bool) -> Update:
        """Write what is encrypted of the row ``row_id``, unless it was changed since it was read.

        Args:
            compare_time: Whether to compare ``updated_at`` as well: MySQL ignores trailing blanks
                in text. In SQLite, which does not, another tool may have written the time in
                another form.
        """
        seen = _seen_columns(compare_time)
        is_unchanged = (
            self._columns[name].is_not_distinct_from(bindparam(f"seen_{name}")) for name in seen
        )
        return update(self._table).where(self._has_id, *self._in_scope, *is_unchanged)

    def seen(self, row: Row[Any], *, compare_time: bool) -> dict[str, object]:
        """The parameters of `rotate` that describe the row as it was read."""
        names = _seen_columns(compare_time)
        return {"row_id": row.id} | {f"seen_{name}": getattr(row, name) for name in names}

    @property
    def _is_expired(self) -> ColumnElement[bool]:
        return self._columns.expiry_time <= bindparam("now")

    def _equals(self, column: str, stored: ColumnElement[Any] | None = None) -> ColumnElement[bool]:
        """Whether a digest is the asked one, or one of those under several keys."""
        stored = self._columns[column] if stored is None else stored
        asked = bindparam(column, type_=self._columns[column].type, expanding=self._keyed)
        return stored.in_(asked) if self._keyed else stored == asked

    def _agrees(self, digest_column: str) -> ColumnElement[bool]:
        return or_(self._columns[digest_column].is_(None), self._equals(digest_column))

    def _next(self, rows: Select[Any]) -> Select[Any]:
        is_next = self._columns.id > bindparam("after")
        return rows.where(is_next).order_by(self._columns.id).limit(bindparam("limit"))

    def _count(self, *conditions: ColumnElement[bool]) -> Select[Any]:
        return select(func.count()).select_from(self._table).where(*self._in_scope, *conditions)

    def _filters(self, user: bool, client: bool, expired: bool | None) -> list[ColumnElement[bool]]:
        conditions = []
        if user:
            conditions.append(self._equals("user_digest"))
        if client:
            conditions.append(self._equals("client_digest"))
        if expired is True:
            conditions.append(self._is_expired)
        elif expired is False:
            conditions.append(or_(self._columns.expiry_time.is_(None), ~self._is_expired))
        return conditions

    def _is_not_rotated(self, rotation: Rotation) -> ColumnElement[bool]:
        columns = self._columns
        if rotation is Rotation.TO_PLAIN_TEXT:
            is_keyed = func.substr(columns.identity, 1, len(KEYED)) == KEYED
            return or_(is_keyed, *(_is_encrypted(columns[name]) for name in ENCRYPTED))
        conditions = [
            func.substr(columns[name], 1, bindparam("length"))
            != bindparam("prefix", type_=columns[name].type)
            for name in ENCRYPTED
        ]
        if self._keyed:
            begins = func.substr(columns.identity, 1, bindparam("digest_length"))
            asked = bindparam("digest_prefix", type_=columns.identity.type)
            conditions.append(begins != asked)
        is_old = or_(*conditions)
        return is_old if rotation is Rotation.ALL else and_(is_old, not_(self._has_plain_secret))

    @property
    def _has_plain_secret(self) -> ColumnElement[bool]:
        secrets = (self._columns[name] for name in SECRETS)
        return or_(
            *(and_(func.coalesce(each, "") != "", not_(_is_encrypted(each))) for each in secrets)
        )


def _is_encrypted(column: ColumnElement[Any]) -> ColumnElement[bool]:
    literal = prefix_of("")
    return and_(
        func.substr(column, 1, len(MARK)) == MARK,
        func.substr(column, 1, len(literal)) != literal,
    )


def _as_stored(column: ColumnElement[Any]) -> ColumnElement[Any]:
    """A column to select, whose values `read_values` converts one by one.

    SQLAlchemy would read SQLite's text as times, and fail a whole result because of one row.
    """
    return type_coerce(column, NullType()) if isinstance(column.type, DateTime) else column


def _one_lacks(one: ColumnElement[Any], other: ColumnElement[Any]) -> ColumnElement[bool]:
    """That one of two texts is NULL, in a form for which no database uses an index."""
    return (one + other).is_(None)


def _has_value(column: ColumnElement[Any], parameter: str) -> ColumnElement[bool]:
    value = bindparam(parameter, type_=column.type)
    is_text = issubclass(column.type._type_affinity or String, String)
    return equals_in_any_collation(column, value) if is_text else column == value


def _seen_columns(compare_time: bool) -> tuple[str, ...]:
    return (*SECRETS, "user_name", "client_id", *(("updated_at",) if compare_time else ()))
