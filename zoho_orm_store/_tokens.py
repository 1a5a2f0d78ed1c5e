"""The operations on a table of stored tokens: each takes a connection, in a caller's transaction.

A store builds them once and calls them directly. The repositories run the same operations on an
application's session.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import chain
from time import time
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias
from uuid import uuid4

from zoho_orm_store._cache import tell_changed
from zoho_orm_store._database.drivers import redacted_url
from zoho_orm_store._digests import KEYED, PREFIX_LENGTH, UNSCOPED, Digests, Scope
from zoho_orm_store._matching import (
    Lookup,
    check_credentials,
    check_owner,
    find_match,
    identity_of,
    learns_refresh_token,
    lookups_to_find,
    lookups_to_save,
    matches,
    merged,
    plan_update,
    without_overtaken_pair,
    without_used_grant,
    without_used_grants,
)
from zoho_orm_store._schema import check_revision
from zoho_orm_store._scopes import scope_for
from zoho_orm_store._secrets import (
    Secrets,
    key_of_digest,
    misplaced,
    unknown_key,
)
from zoho_orm_store._sql.dialects import (
    check_text_is_kept,
    has_row_locks,
    insert_unless_present,
    limit_lock_wait,
    lock_rows,
    lock_rows_by_index,
)
from zoho_orm_store._sql.tokens import RECORD_COLUMNS, token_statements
from zoho_orm_store.errors import (
    ConfigurationError,
    DatabaseError,
    InvalidTokenError,
    UndecryptableTokenError,
    UnreadableTokenError,
    without_frames,
)
from zoho_orm_store.models import StoredToken, StoredTokenMixin, token_table
from zoho_orm_store.records import DIGESTS, TokenRecord, check_text, is_storable, utc_now

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from sqlalchemy import Connection, CursorResult, Executable, Row, Table
    from typing_extensions import Self

    from zoho_orm_store.encryption import TokenCipher

__all__ = ["Filters", "TokenOperations"]

Reconcile: TypeAlias = "Callable[[TokenRecord, TokenRecord], TokenRecord]"

logger = logging.getLogger("zoho_orm_store")

_FETCHED = 500
"""How many rows of a listing are taken from the driver at once."""

_LOOKED_AT = 1000
"""How many rows are looked at at once, in search of misplaced ones."""


class Filters(NamedTuple):
    """Which tokens a listing returns; unknown filters return all.

    Attributes:
        user_name: Only this user's.
        client_id: Only this client's.
        expired: Only those whose access token has expired, or only the others.
    """

    user_name: str | None = None
    client_id: str | None = None
    expired: bool | None = None


class _Locked(NamedTuple):
    """A row that is locked until the transaction ends.

    Attributes:
        record: The row.
        is_tied: Whether another row may turn out to be the same token.
        identity: Its identity digest, of which the scope is a part.
    """

    record: TokenRecord
    is_tied: bool
    identity: str


class TokenOperations:
    """What can be done with the tokens in one table, within one scope, with one cipher.

    Args:
        table: The table of a model made with `StoredTokenMixin`.
        scope: The tenant whose rows are found, changed and inserted.
        cipher: Encrypts the secrets in the table; ``None`` stores plain text.
        require_encryption: Whether secrets in plain text are refused.
        forget_grants: Whether a grant token that was exchanged is not stored, and finds nothing.

    Raises:
        ConfigurationError: The cipher is not a `TokenCipher`, or encryption is required without
            one.
    """

    def __init__(
        self,
        table: Table,
        scope: Scope = UNSCOPED,
        cipher: TokenCipher | None = None,
        *,
        require_encryption: bool = False,
        forget_grants: bool = False,
    ) -> None:
        self.table = table
        self.scope = scope
        self._cipher = cipher
        self._options = {"require_encryption": require_encryption, "forget_grants": forget_grants}
        self._forget_grants = forget_grants
        self.secrets = Secrets(cipher, scope, require=require_encryption)
        self.digests = Digests(scope, self.secrets.digest_keys)
        keyed = self.digests.are_keyed
        self.statements = token_statements(table, scope.columns, keyed=keyed)
        self.in_scope = {f"scope_{name}": value for name, value in scope.values}
        has_own_columns = any(not hasattr(StoredTokenMixin, column.key) for column in table.c)
        self._may_have_tenants = has_own_columns and not scope.values

    @classmethod
    def of_model(
        cls,
        model: type[StoredTokenMixin],
        scope: Mapping[str, object] | None,
        cipher: TokenCipher | None,
        **options: bool,
    ) -> Self:
        """The operations on a model's table.

        Raises:
            ConfigurationError: The model lacks something, the scope does not fit it, or the
                cipher is not a `TokenCipher`.
        """
        table = token_table(model)
        return cls(table, scope_for(table, scope), cipher, **options)

    def within(self, scope: Scope) -> Self:
        """The same operations within another scope."""
        return type(self)(self.table, scope, self._cipher, **self._options)

    def check(self, connection: Connection) -> None:
        """Check, before the first operation on a database, that the table can be used.

        Raises:
            SchemaError: The tables are of another revision.
            ConfigurationError: The database would not keep all text.
        """
        if self.table is StoredToken.__table__:
            check_revision(connection, redacted_url(connection.engine.url))
        check_text_is_kept(connection, self.table)

    # -- Reading ----------------------------------------------------------------------------------

    def get(self, connection: Connection, id: str) -> TokenRecord | None:  # noqa: A002
        """Return the token with an id, compared byte for byte."""
        if not isinstance(id, str):
            check_text("id", id)
        if not is_storable("id", id):
            return None
        row = connection.execute(self.statements.by_id, {"row_id": id, **self.in_scope}).first()
        if row is None:
            return None
        if row.id != id:
            raise _crossed(connection)
        return self.secrets.decrypted(row)

    def find(self, connection: Connection, asked: TokenRecord) -> TokenRecord | None:
        """Return the stored token that another token means. A known id decides alone."""
        _check_record(asked)
        asked.check_types()
        return self.match(connection, asked, lookups_to_find(asked))

    def match(
        self, connection: Connection, asked: TokenRecord, lookups: Sequence[Lookup]
    ) -> TokenRecord | None:
        """Return the token that the first successful lookup finds.

        Raises:
            CipherError: None finds one, and it may be among those under a key that is not known.
        """
        for lookup in lookups:
            stored = self._look_up(connection, lookup, asked)
            if stored is not None and self._forget_grants:
                stored = without_used_grant(stored)
            # Digests that another tool left stale must not hand out the wrong token.
            if stored is not None and matches(lookup, asked, stored):
                return stored
        if lookups not in ((), (Lookup.ID,)):
            self.refuse_unknown_keys(connection)
        return None

    def refuse_unknown_keys(self, connection: Connection) -> None:
        """See that the cipher knows the keys of all digests, before a token counts as not stored.

        The keys are distinguished by what their digests begin with, so that this takes one look
        into the index for each key. A digest that goes with no key of its row was planted.
        """
        after, known = KEYED, self.digests.prefixes
        while row := self.execute(
            connection, self.statements.next_digest, {"after": after}
        ).first():
            prefix = row.identity[:PREFIX_LENGTH]
            if not prefix.startswith(KEYED):
                return
            if prefix not in known and (key_id := key_of_digest(prefix, row[2:])) is not None:
                raise unknown_key(row.id, key_id)
            after = f"{prefix}g"  # which comes after every hexadecimal digit

    def rows(self, connection: Connection) -> Iterator[TokenRecord]:
        """Yield every token, oldest first, without a second copy of all of them in memory.

        Those that another program made unreadable are logged and left out.

        Raises:
            UndecryptableTokenError: A token cannot be decrypted.
        """
        # Fetched one by one, they would take a tenth longer.
        for row in chain.from_iterable(self._rows(connection, Filters()).partitions(_FETCHED)):
            try:
                yield self.secrets.decrypted(row)
            except UndecryptableTokenError:
                raise
            except UnreadableTokenError as error:
                logger.error("A token was left out. %s", error)

    def list(
        self, connection: Connection, filters: Filters
    ) -> Sequence[TokenRecord | UnreadableTokenError]:
        """Return tokens, oldest first; the error in place of each that cannot be read."""
        return [*map(self._decrypted_or_error, self._rows(connection, filters))]

    def page(
        self, connection: Connection, filters: Filters, after: str, limit: int
    ) -> Sequence[TokenRecord | UnreadableTokenError]:
        """Return at most ``limit`` tokens whose ids come after one, in the order of ids."""
        parameters = self._filter_parameters(connection, filters) | {"after": after, "limit": limit}
        page = self.statements.page(*_shape(filters))
        return [*map(self._decrypted_or_error, self.execute(connection, page, parameters))]

    def misplaced(self, connection: Connection) -> Iterator[UnreadableTokenError]:
        """Yield an error for each token whose row cannot be read, or has another's identity.

        Somebody has planted or changed the row. Without a scope, those of tenants cannot be told.
        """
        after = ""
        while not self._may_have_tenants:
            parameters = {"after": after, "limit": _LOOKED_AT}
            rows = self.execute(connection, self.statements.with_identity, parameters).all()
            for row in rows:
                found = self.decrypted_in_scope(row)
                if isinstance(found, UnreadableTokenError):
                    yield found
            if len(rows) < _LOOKED_AT:
                return
            after = rows[-1].id

    def ids(self, connection: Connection, after: str, limit: int) -> Sequence[str]:
        """Return at most ``limit`` ids that come after one, in their order."""
        parameters = {"after": after, "limit": limit}
        return self.execute(connection, self.statements.ids, parameters).scalars().all()

    def count(self, connection: Connection, filters: Filters) -> int:
        """Count tokens."""
        counting = self.statements.count(*_shape(filters))
        parameters = self._filter_parameters(connection, filters)
        return int(self.execute(connection, counting, parameters).scalar_one())

    # -- Writing ----------------------------------------------------------------------------------

    def save(
        self,
        connection: Connection,
        asked: TokenRecord,
        seen: TokenRecord | None = None,
        values: Mapping[str, object] | None = None,
        reconcile: Reconcile | None = None,
    ) -> TokenRecord:
        """Save a token: into the row it means, or into a new one.

        Args:
            connection: A connection. On SQLite, its transaction already has the write lock.
            asked: What is known of the token.
            seen: The token as it was before the caller refreshed it without a lease. If another
                caller has saved a live access token since, that one is kept.
            values: The values of columns that the model adds, such as a foreign key.
            reconcile: Called with what is known of the token, and with its row once that is
                locked; returns what is to be written.

        Returns:
            The row as it is now.

        Raises:
            InvalidTokenError: The token cannot be stored as it is, or has no credential.
            UserMismatchError: Its id is that of another user's row.
            DatabaseError: Another writer changed the row; run the transaction again.
        """
        _check_record(asked)
        asked.check_storable()
        own = self._own_values(values)
        if seen is not None:
            reconcile = partial(_unless_overtaken, seen)
        locked = self._lock_match(connection, asked)
        if locked is None:
            return self._save_new(connection, asked, reconcile, own)
        stored, is_tied, identity = locked
        check_owner(asked, stored)
        if self._may_have_tenants and not self.digests.is_identity(stored, identity):
            raise ConfigurationError(
                f"The row with id {stored.id!r} is a tenant's. Pass its scope= to save the token. "
                "Without a scope, tokens can only be listed, expired and deleted."
            )
        rows: Sequence[Row[Any]] = []
        learns = learns_refresh_token(stored, asked)
        if learns and has_row_locks(connection):
            # The row gets its identity back at once: an application may go on after an error.
            claim = {"row_id": stored.id, "identity": self.digests.claim(asked)}
            self.execute(connection, self.statements.update, claim)
            rows = self._lock_holders(connection, merged(stored, asked))
            self.execute(connection, self.statements.update, claim | {"identity": identity})
        elif learns or is_tied:
            rows = self._lock_holders(connection, merged(stored, asked))
        return self.update(connection, stored, asked, reconcile, self.readable(rows), own)

    def expire(self, connection: Connection, id: str) -> bool:  # noqa: A002
        """End the access token of the row with an id, and return whether there was such a row."""
        check_text("id", id)
        if not is_storable("id", id):
            return False
        limit_lock_wait(connection)
        parameters = {"row_id": id, "expiry_time": int(time() * 1000) - 1}
        done = self.execute(connection, self.statements.update, parameters)
        tell_changed(self.table, id)
        return done.rowcount > 0

    def delete(self, connection: Connection, id: str) -> bool:  # noqa: A002
        """Delete the row with an id, and return whether there was one."""
        check_text("id", id)
        if not is_storable("id", id):
            return False
        limit_lock_wait(connection)
        done = self.execute(connection, self.statements.delete, {"row_id": id})
        tell_changed(self.table, id)
        return done.rowcount > 0

    def delete_all(self, connection: Connection) -> int:
        """Delete every row in one statement, and return their number."""
        limit_lock_wait(connection)
        done = self.execute(connection, self.statements.delete_all)
        tell_changed(self.table)
        return done.rowcount

    def purge(self, connection: Connection, idle: timedelta | None, stranded: bool) -> int:
        """Delete tokens that are of no more use in one statement, and return their number.

        Raises:
            ConfigurationError: Nothing is to be purged, or ``idle`` is negative.
        """
        if idle is None and not stranded:
            raise ConfigurationError("Say what to purge: idle tokens, stranded ones, or both.")
        if idle is not None and idle < timedelta(0):
            raise ConfigurationError("idle must not be negative.")
        parameters: dict[str, object] = {"now": int(time() * 1000)} if stranded else {}
        if idle is not None:
            parameters["saved_before"] = utc_now() - idle
        statement = self.statements.purge(idle=idle is not None, stranded=stranded)
        limit_lock_wait(connection)
        done = self.execute(connection, statement, parameters)
        tell_changed(self.table)
        return done.rowcount

    # -- Steps ------------------------------------------------------------------------------------

    def _look_up(
        self, connection: Connection, lookup: Lookup, asked: TokenRecord
    ) -> TokenRecord | None:
        if lookup is Lookup.ID:
            return self.get(connection, asked.id or "")
        statement = self.statements.by_lookup(
            lookup, user=asked.user_name is not None, client=asked.client_id is not None
        )
        parameters = self.digests.parameters(asked)
        if lookup is Lookup.IDENTITY:
            parameters["identities"] = self.digests.updatable(asked)
        row = self.execute(connection, statement, parameters).first()
        return None if row is None else self.secrets.decrypted(row)

    def _lock_match(self, connection: Connection, asked: TokenRecord) -> _Locked | None:
        """The row that a save updates, locked until the transaction ends."""
        lookups = lookups_to_save(asked)
        if lookups[:1] == (Lookup.ID,):
            locked = self.lock(connection, asked.id)
            if locked is not None:
                return locked
            lookups = lookups[1:]
        limit_lock_wait(connection)
        stored = self.match(connection, asked, lookups)
        if stored is None:
            return None
        locked = self.lock(connection, stored.id)
        if locked is None or find_match(lookups, asked, [locked.record]) is None:
            raise _changed_meanwhile()
        return locked

    def lock(self, connection: Connection, id_: str | None) -> _Locked | None:
        parameters = {"row_id": id_, **self.in_scope}
        row = lock_rows(connection, self.statements.lock_by_id, parameters).first()
        if row is None:
            return None
        record = self.secrets.decrypted(row[: len(RECORD_COLUMNS)])
        return _Locked(record, row.is_tied, row.identity)

    def _save_new(
        self,
        connection: Connection,
        asked: TokenRecord,
        reconcile: Reconcile | None,
        own: Mapping[str, object],
    ) -> TokenRecord:
        """Save a token for which no row was found, unless another writer was faster.

        Two rows may hold one refresh token, so no unique index makes a save that knows the user
        wait for one that does not. Therefore each save that brings a refresh token into a row
        first gives its row an identity that depends on this token alone, and that no row has for
        longer than a transaction. SQLite has one writer at a time anyway.
        """
        check_credentials(asked)
        if self._forget_grants:
            asked = without_used_grant(asked)
        self.check_required(own)
        now, id_ = utc_now(), self._id_for(connection, asked)
        new = replace(asked, id=id_, created_at=now, updated_at=now)
        values = self.row_values(new) | dict(self.scope.values) | dict(own)
        others: Sequence[TokenRecord] = []
        if self.digests.are_keyed and has_row_locks(connection):
            stored = self._take_turn(connection, new, values)
            if stored is not None:
                rows = self._lock_holders(connection, asked) if asked.refresh_token else []
                return self.update(connection, stored, asked, reconcile, self.readable(rows), own)
        if asked.refresh_token is not None and has_row_locks(connection):
            claim = uuid4().hex if id_ == asked.id else id_
            claimed = values | {"id": claim, "identity": self.digests.claim(asked)}
            insert_unless_present(connection, self.table, claimed)
            rows = [row for row in self._lock_holders(connection, asked) if row.id != claim]
            if not rows and self._find_identity(connection, new) is None:
                parameters = values | {"row_id": claim}
                if self.execute(connection, self.statements.update, parameters).rowcount == 0:
                    raise _changed_meanwhile()
                return new
            self.execute(connection, self.statements.delete, {"row_id": claim})
            others = self.readable(rows)
            match = find_match(lookups_to_save(asked), asked, others)
            if match is not None:
                return self.update(connection, match, asked, reconcile, others, own)
        insert_unless_present(connection, self.table, values)
        stored = self._row_of_identity(connection, new)
        if stored == new:
            return stored
        return self.update(connection, stored, asked, reconcile, others, own)

    def _take_turn(
        self, connection: Connection, new: TokenRecord, values: Mapping[str, object]
    ) -> TokenRecord | None:
        """Wait for other first saves of an identity, and return what they have saved, locked.

        The unique index on identities does that for digests under one key. While a key is being
        changed, two workers may store different digests of one identity.
        """
        turn = {"id": uuid4().hex, "identity": self.digests.turn(new)}
        insert_unless_present(connection, self.table, {**values, **turn})
        self.execute(connection, self.statements.delete, {"row_id": turn["id"]})
        return self._lock_identity(connection, new)

    def _own_values(self, values: Mapping[str, object] | None) -> Mapping[str, object]:
        """Check the values of columns that the model adds."""
        for name in values or {}:
            if name not in self.table.c or hasattr(StoredTokenMixin, name):
                raise ConfigurationError(
                    f"values names {name!r}, which is not a column that the model of the table "
                    f"{self.table} adds."
                )
            if name in self.scope.columns:
                raise ConfigurationError(f"The scope gives the column {name!r} its value already.")
        return values or {}

    def check_required(self, own: Mapping[str, object]) -> None:
        """Refuse to insert a row without a value that the model demands."""
        for column in self.table.c:
            is_set = hasattr(StoredTokenMixin, column.key) or column.key in self.scope.columns
            fills_itself = column.nullable or column.default is not None
            if is_set or column.key in own or fills_itself or column.server_default is not None:
                continue
            raise ConfigurationError(
                f"A new token needs a value for the column {column.key!r}. If it tells tenants "
                f"apart, pass scope={{{column.key!r}: ...}}; otherwise pass "
                f"values={{{column.key!r}: ...}} to a repository's save(), or give the column a "
                "default."
            )

    def _id_for(self, connection: Connection, asked: TokenRecord) -> str:
        """The id of a new row: the token's own, unless another tenant's row has it."""
        if asked.id and self.in_scope:
            taken = connection.execute(self.statements.id_in_any_scope, {"row_id": asked.id})
            if taken.first() is not None:
                return uuid4().hex
        return asked.id or uuid4().hex

    def _row_of_identity(self, connection: Connection, new: TokenRecord) -> TokenRecord:
        """The row that has the identity of a token, whoever inserted it; locked."""
        stored = self._lock_identity(connection, new)
        if stored is None:
            raise _changed_meanwhile()
        _check_identity(new, stored)
        return stored

    def _lock_identity(self, connection: Connection, new: TokenRecord) -> TokenRecord | None:
        parameters = {"identity": self.digests.identity(new)}
        row = self.execute(connection, self.statements.lock_by_identity, parameters).first()
        return None if row is None else self.secrets.decrypted(row)

    def _lock_holders(self, connection: Connection, record: TokenRecord) -> Sequence[Row[Any]]:
        """The rows that hold a token's refresh token, but for those of other users and clients."""
        statement = self.statements.lock_refresh_token(
            user=record.user_name is not None, client=record.client_id is not None
        )
        parameters = self.digests.parameters(record) | self.in_scope
        return lock_rows_by_index(
            connection, statement, parameters, self.table, "refresh_digest"
        ).all()

    def readable(self, rows: Sequence[Row[Any]]) -> Sequence[TokenRecord]:
        records = map(self._decrypted_or_error, rows)
        return [record for record in records if isinstance(record, TokenRecord)]

    def update(
        self,
        connection: Connection,
        stored: TokenRecord,
        asked: TokenRecord,
        reconcile: Reconcile | None,
        holders: Iterable[TokenRecord],
        own: Mapping[str, object],
    ) -> TokenRecord:
        """Write what the asked token knows into its locked row.

        Args:
            connection: The connection.
            stored: The row.
            asked: What is known of the token.
            reconcile: See `save`.
            holders: The rows that hold the refresh token, if there may be others.
            own: The values of columns that the model adds.
        """
        if reconcile is not None:
            asked = reconcile(asked, stored)
        others = {holder.id: holder for holder in holders if holder.id != stored.id}
        known = (stored, asked)
        if self._forget_grants:
            known = without_used_grants(stored, asked)
        others |= self._lock_new_identity(connection, stored, merged(*known))
        saved, absorbed = plan_update(*known, others.values())
        if self._forget_grants:
            saved = without_used_grant(saved)
        now = utc_now()
        # Another program may have left the first one empty.
        saved = replace(saved, created_at=saved.created_at or now, updated_at=now)
        values = self.row_values(saved) | dict(own) | {"row_id": saved.id}
        for id_ in absorbed:
            self.execute(connection, self.statements.delete, {"row_id": id_})
            tell_changed(self.table, id_)
        tell_changed(self.table, saved.id)
        if self.execute(connection, self.statements.update, values).rowcount == 0:
            raise _changed_meanwhile()
        return saved

    def _find_identity(self, connection: Connection, record: TokenRecord) -> Row[Any] | None:
        """The row that has the identity of a token, not locked.

        Where there is none, MySQL would lock its place: other saves could not insert rows beside
        it, and so would often end in deadlocks.
        """
        parameters = {"identity": self.digests.identity(record)}
        return self.execute(connection, self.statements.by_identity, parameters).first()

    def _lock_new_identity(
        self, connection: Connection, stored: TokenRecord, saved: TokenRecord
    ) -> dict[str | None, TokenRecord]:
        """The row that already has the identity which a row gets, by its id, if there is one."""
        if identity_of(saved) == identity_of(stored):
            return {}
        row = self._find_identity(connection, saved)
        if row is None:
            return {}
        found = self.secrets.decrypted(row)
        _check_identity(saved, found)
        locked = self.lock(connection, found.id)
        if locked is None or identity_of(locked.record) != identity_of(saved):
            raise _changed_meanwhile()
        return {found.id: locked.record}

    def _rows(self, connection: Connection, filters: Filters) -> CursorResult[Any]:
        listing = self.statements.listing(*_shape(filters))
        return self.execute(connection, listing, self._filter_parameters(connection, filters))

    def _filter_parameters(self, connection: Connection, filters: Filters) -> dict[str, object]:
        parameters: dict[str, object] = {}
        if (filters.user_name, filters.client_id) != (None, None):
            self.refuse_unknown_keys(connection)
        for field in ("user_name", "client_id"):
            value = getattr(filters, field)
            if value is not None:
                check_text(field, value)
                parameters[DIGESTS[field]] = self.digests.parameter(field, value)
        if filters.expired is not None:
            parameters["now"] = int(time() * 1000)
        return parameters

    def execute(
        self,
        connection: Connection,
        statement: Executable,
        parameters: Mapping[str, object] | None = None,
    ) -> CursorResult[Any]:
        return connection.execute(statement, {**(parameters or {}), **self.in_scope})

    def _decrypted_or_error(self, row: Sequence[Any]) -> TokenRecord | UnreadableTokenError:
        try:
            return self.secrets.decrypted(row)
        except UnreadableTokenError as error:
            return without_frames(error)

    def decrypted_in_scope(self, row: Row[Any]) -> TokenRecord | UnreadableTokenError:
        """The record of a row, if the row is this scope's: only then may it be re-encrypted."""
        record = self._decrypted_or_error(row[: len(RECORD_COLUMNS)])
        if isinstance(record, TokenRecord) and not self.digests.is_identity(record, row.identity):
            return misplaced(record)
        return record

    def row_values(self, record: TokenRecord) -> dict[str, object]:
        values: dict[str, object] = {name: getattr(record, name) for name in RECORD_COLUMNS}
        return values | self.secrets.encrypted(record) | self.digests.of(record)


def _shape(filters: Filters) -> tuple[bool, bool, bool | None]:
    return (filters.user_name is not None, filters.client_id is not None, filters.expired)


def _check_record(asked: object) -> None:
    if not isinstance(asked, TokenRecord):
        raise InvalidTokenError(f"The token must be a TokenRecord, not {type(asked).__name__}.")


def _unless_overtaken(seen: TokenRecord, asked: TokenRecord, stored: TokenRecord) -> TokenRecord:
    return without_overtaken_pair(asked, stored, seen, int(time() * 1000))


def _crossed(connection: Connection) -> DatabaseError:
    """The error for the answer to somebody else's question, after giving up the connection."""
    connection.invalidate()
    return DatabaseError(
        "The database answered with another row than was asked for. Something else uses the same "
        "connection: a process that was forked from this one, or a pooler that mixes up prepared "
        "statements (see pooler=True). The row was not used.",
        retryable=True,
    )


def _check_identity(saved: TokenRecord, stored: TokenRecord) -> None:
    """Refuse a row that has a token's identity digest and holds another token."""
    if not matches(Lookup.IDENTITY, saved, stored):
        raise DatabaseError(
            f"The row with id {stored.id!r} has the identity digest of the token that is being "
            "saved, but holds another token: it was changed by other means than this package. "
            f"Restore it from a backup, or delete it (zoho-orm-store delete {stored.id!r})."
        )


def _changed_meanwhile() -> DatabaseError:
    return DatabaseError(
        "Another writer changed the token's row while it was being saved. "
        "Roll the transaction back and run it again.",
        retryable=True,
    )
