"""The operations on a table of stored tokens: each takes a connection, in a caller's transaction.

A store builds them once and calls them directly. The repositories run the same operations on an
application's session.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import timedelta
from time import time
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

from zoho_orm_store._digests import (
    UNSCOPED,
    Scope,
    digest,
    digests_of,
    identity_digest,
    updatable_digests,
)
from zoho_orm_store._matching import (
    Lookup,
    check_credentials,
    identity_of,
    is_absorbed,
    lookups_to_find,
    lookups_to_save,
    matches,
    plan_update,
    without_overtaken_pair,
)
from zoho_orm_store._secrets import Secrets, key_id_of, misplaced
from zoho_orm_store._sql.dialects import (
    has_row_locks,
    insert_unless_present,
    limit_lock_wait,
    lock_rows,
)
from zoho_orm_store._sql.tokens import RECORD_COLUMNS, token_statements
from zoho_orm_store.errors import (
    ConfigurationError,
    DatabaseError,
    InvalidTokenError,
    UndecryptableTokenError,
    without_frames,
)
from zoho_orm_store.models import StoredTokenMixin, token_table
from zoho_orm_store.records import DIGESTS, TokenRecord, check_text, is_storable, utc_now

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sqlalchemy import Connection, CursorResult, Executable, Row, Table
    from typing_extensions import Self

    from zoho_orm_store.encryption import TokenCipher

__all__ = ["Filters", "RotatedBatch", "TokenOperations", "scope_for"]


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


class RotatedBatch(NamedTuple):
    """The result of `TokenOperations.rotate_batch`.

    Attributes:
        last: The id after which to go on, or ``None`` at the end.
        rotated: How many tokens were re-encrypted. With asyncpg, which does not tell, tokens
            that were saved meanwhile are counted too.
        undecryptable: Why other tokens were left as they are.
    """

    last: str | None
    rotated: int
    undecryptable: list[UndecryptableTokenError]


class TokenOperations:
    """What can be done with the tokens in one table, within one scope, with one cipher.

    Args:
        table: The table of a model made with `StoredTokenMixin`.
        scope: The tenant whose rows are found, changed and inserted.
        cipher: Encrypts the secrets in the table; ``None`` stores plain text.

    Raises:
        ConfigurationError: The cipher is not a `TokenCipher`.
    """

    def __init__(
        self, table: Table, scope: Scope = UNSCOPED, cipher: TokenCipher | None = None
    ) -> None:
        self.table = table
        self.scope = scope
        self._secrets = Secrets(cipher, scope.parts)
        self._statements = token_statements(table, scope.columns)
        self._in_scope = {f"scope_{name}": value for name, value in scope.values}

    @classmethod
    def of_model(
        cls,
        model: type[StoredTokenMixin],
        scope: Mapping[str, object] | None,
        cipher: TokenCipher | None,
    ) -> Self:
        """The operations on a model's table.

        Raises:
            ConfigurationError: The model lacks something, the scope does not fit it, or the
                cipher is not a `TokenCipher`.
        """
        table = token_table(model, scope or ())
        return cls(table, scope_for(table, scope), cipher)

    # -- Reading ----------------------------------------------------------------------------------

    def get(self, connection: Connection, id: str) -> TokenRecord | None:  # noqa: A002
        """Return the token with an id, compared byte for byte."""
        check_text("id", id)
        if not is_storable("id", id):
            return None
        row = connection.execute(self._statements.by_id, {"row_id": id, **self._in_scope}).first()
        return None if row is None else self._secrets.decrypted(row)

    def find(self, connection: Connection, asked: TokenRecord) -> TokenRecord | None:
        """Return the stored token that another token means. A known id decides alone."""
        _check_record(asked)
        asked.check_types()
        return self.match(connection, asked, lookups_to_find(asked))

    def match(
        self, connection: Connection, asked: TokenRecord, lookups: Sequence[Lookup]
    ) -> TokenRecord | None:
        """Return the token that the first successful lookup finds."""
        for lookup in lookups:
            stored = self._look_up(connection, lookup, asked)
            # Digests that another tool left stale must not hand out the wrong token.
            if stored is not None and matches(lookup, asked, stored):
                return stored
        return None

    def rows(self, connection: Connection) -> Iterator[TokenRecord]:
        """Yield every token, oldest first, without a second copy of all of them in memory."""
        return map(self._secrets.decrypted, self._rows(connection, Filters()))

    def list(
        self, connection: Connection, filters: Filters
    ) -> Sequence[TokenRecord | UndecryptableTokenError]:
        """Return tokens, oldest first; the error in place of each that cannot be decrypted."""
        return [*map(self._decrypted_or_error, self._rows(connection, filters))]

    def page(
        self, connection: Connection, filters: Filters, after: str, limit: int
    ) -> Sequence[TokenRecord | UndecryptableTokenError]:
        """Return at most ``limit`` tokens whose ids come after one, in the order of ids."""
        parameters = self._filter_parameters(filters) | {"after": after, "limit": limit}
        page = self._statements.page(*_shape(filters))
        return [*map(self._decrypted_or_error, self._execute(connection, page, parameters))]

    def count(self, connection: Connection, filters: Filters) -> int:
        """Count tokens."""
        counting = self._statements.count(*_shape(filters))
        parameters = self._filter_parameters(filters)
        return int(self._execute(connection, counting, parameters).scalar_one())

    # -- Writing ----------------------------------------------------------------------------------

    def save(
        self, connection: Connection, asked: TokenRecord, seen: TokenRecord | None = None
    ) -> TokenRecord:
        """Save a token: into the row it means, or into a new one.

        Args:
            connection: A connection. On SQLite, its transaction already has the write lock.
            asked: What is known of the token.
            seen: The token as it was before the caller refreshed it without a lease. If another
                caller has saved a live access token since, that one is kept.

        Returns:
            The row as it is now.

        Raises:
            InvalidTokenError: The token cannot be stored as it is, or has no credential.
            UserMismatchError: Its id is that of another user's row.
            DatabaseError: Another writer changed the row; run the transaction again.
        """
        _check_record(asked)
        asked.check_storable()
        stored = self._lock_match(connection, asked)
        if stored is None:
            new = self._insert(connection, asked)
            stored = self._row_of_identity(connection, new)
            if stored == new:
                return stored
        if seen is not None:
            asked = without_overtaken_pair(asked, stored, seen, int(time() * 1000))
        return self._update(connection, stored, asked)

    def delete(self, connection: Connection, id: str) -> bool:  # noqa: A002
        """Delete the row with an id, and return whether there was one."""
        check_text("id", id)
        if not is_storable("id", id):
            return False
        limit_lock_wait(connection)
        return self._execute(connection, self._statements.delete, {"row_id": id}).rowcount > 0

    def delete_all(self, connection: Connection) -> int:
        """Delete every row in one statement, and return their number."""
        limit_lock_wait(connection)
        return self._execute(connection, self._statements.delete_all).rowcount

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
        statement = self._statements.purge(idle=idle is not None, stranded=stranded)
        limit_lock_wait(connection)
        return self._execute(connection, statement, parameters).rowcount

    # -- Rotating keys ----------------------------------------------------------------------------

    def rotate_batch(self, connection: Connection, after: str, limit: int) -> RotatedBatch:
        """Re-encrypt the tokens that are not yet under the cipher's present key.

        A token that somebody saves meanwhile is left as it was saved.

        Args:
            connection: A connection. On SQLite, its transaction already has the write lock.
            after: The id after which to go on; ``""`` at first.
            limit: The most tokens of a batch.

        Raises:
            CipherError: The cipher failed.
        """
        limit_lock_wait(connection)
        compare_time = has_row_locks(connection)
        statement = self._statements.not_rotated(to_plain_text=self._secrets.prefix is None)
        parameters = self._prefix_parameters() | {"after": after, "limit": limit}
        found = self._execute(connection, statement, parameters).all()
        decrypted = [(row, self._decrypted_in_scope(row)) for row in found]
        changes = [
            self._secrets.encrypted(record)
            | self._statements.seen(row, compare_time=compare_time)
            | self._in_scope
            for row, record in decrypted
            if isinstance(record, TokenRecord)
        ]
        rotated = len(changes)
        if changes:
            done = connection.execute(self._statements.rotate(compare_time=compare_time), changes)
            if done.supports_sane_multi_rowcount():
                rotated = done.rowcount
        undecryptable = [each for _, each in decrypted if isinstance(each, UndecryptableTokenError)]
        return RotatedBatch(found[-1].id if found else None, rotated, undecryptable)

    def count_not_rotated(self, connection: Connection) -> int:
        """Count the tokens that are not under the cipher's present key.

        With a cipher that only decrypts: those that are encrypted.
        """
        counting = self._statements.count_not_rotated(to_plain_text=self._secrets.prefix is None)
        return int(self._execute(connection, counting, self._prefix_parameters()).scalar_one())

    def count_by_key(self, connection: Connection) -> dict[str | None, int]:
        """Count the tokens under each key, by the key's id.

        ``None`` counts plain text, and ``""`` garbled values that name no key. A token with
        secrets under several keys counts for each of them.
        """
        counted: Counter[str | None] = Counter()
        for row in self._execute(connection, self._statements.key_prefixes):
            counted.update({key_id_of(value) for value in row if value})
        return dict(counted)

    def _prefix_parameters(self) -> dict[str, object]:
        prefix = self._secrets.prefix
        return {} if prefix is None else {"prefix": prefix, "length": len(prefix)}

    # -- Steps ------------------------------------------------------------------------------------

    def _look_up(
        self, connection: Connection, lookup: Lookup, asked: TokenRecord
    ) -> TokenRecord | None:
        if lookup is Lookup.ID:
            return self.get(connection, asked.id or "")
        statement = self._statements.by_lookup(
            lookup, user=asked.user_name is not None, client=asked.client_id is not None
        )
        parameters: dict[str, object] = {
            column: digest(field, value, self.scope)
            for field, column in DIGESTS.items()
            if (value := getattr(asked, field)) is not None
        }
        if lookup is Lookup.IDENTITY:
            parameters["identities"] = updatable_digests(asked, self.scope)
        row = self._execute(connection, statement, parameters).first()
        return None if row is None else self._secrets.decrypted(row)

    def _lock_match(self, connection: Connection, asked: TokenRecord) -> TokenRecord | None:
        """The row that a save updates, locked until the transaction ends."""
        lookups = lookups_to_save(asked)
        if lookups[:1] == (Lookup.ID,):
            stored = self._lock(connection, asked.id)
            if stored is not None:
                return stored
            lookups = lookups[1:]
        limit_lock_wait(connection)
        stored = self.match(connection, asked, lookups)
        if stored is None or not has_row_locks(connection):
            return stored
        locked = self._lock(connection, stored.id)
        if locked is None or not any(matches(lookup, asked, locked) for lookup in lookups):
            raise _changed_meanwhile()
        return locked

    def _lock(self, connection: Connection, id_: str | None) -> TokenRecord | None:
        parameters = {"row_id": id_, **self._in_scope}
        return self._first(lock_rows(connection, self._statements.lock_by_id, parameters))

    def _insert(self, connection: Connection, asked: TokenRecord) -> TokenRecord:
        """Insert the asked token, unless a row of its identity exists."""
        check_credentials(asked)
        now = utc_now()
        new = replace(asked, id=self._id_for(connection, asked), created_at=now, updated_at=now)
        values = self._values(new) | dict(self.scope.values)
        insert_unless_present(connection, self.table, values)
        return new

    def _id_for(self, connection: Connection, asked: TokenRecord) -> str:
        """The id of a new row: the token's own, unless another tenant's row has it."""
        if asked.id and self._in_scope:
            taken = connection.execute(self._statements.id_in_any_scope, {"row_id": asked.id})
            if taken.first() is not None:
                return uuid4().hex
        return asked.id or uuid4().hex

    def _row_of_identity(self, connection: Connection, new: TokenRecord) -> TokenRecord:
        """The row that has the identity of a token, whoever inserted it; locked."""
        identity = {"identity": self._identity(new), **self._in_scope}
        stored = self._first(connection.execute(self._statements.lock_by_identity, identity))
        if stored is None:
            raise _changed_meanwhile()
        if not matches(Lookup.IDENTITY, new, stored):
            raise DatabaseError(
                f"The row with id {stored.id!r} has the identity digest of the token that is being "
                "saved, but holds another token: it was changed by other means than this package. "
                f"Restore it from a backup, or delete it (zoho-orm-store delete {stored.id!r})."
            )
        return stored

    def _update(
        self, connection: Connection, stored: TokenRecord, asked: TokenRecord
    ) -> TokenRecord:
        """Write what the asked token knows into its locked row."""

        def find_absorbed(saved: TokenRecord) -> Sequence[TokenRecord]:
            parameters = digests_of(saved, self.scope) | {"row_id": saved.id}
            found = self._execute(connection, self._statements.lock_absorbed, parameters)
            others = map(self._secrets.decrypted, found)
            return [other for other in others if is_absorbed(other, saved)]

        saved, absorbed = plan_update(stored, asked, find_absorbed)
        for id_ in absorbed:
            self._execute(connection, self._statements.delete, {"row_id": id_})
        saved = replace(saved, updated_at=utc_now())
        values = self._values(saved) | {"row_id": saved.id}
        if self._execute(connection, self._statements.update, values).rowcount == 0:
            raise _changed_meanwhile()
        return saved

    def _rows(self, connection: Connection, filters: Filters) -> CursorResult[Any]:
        listing = self._statements.listing(*_shape(filters))
        return self._execute(connection, listing, self._filter_parameters(filters))

    def _filter_parameters(self, filters: Filters) -> dict[str, object]:
        parameters: dict[str, object] = {}
        for field in ("user_name", "client_id"):
            value = getattr(filters, field)
            if value is not None:
                check_text(field, value)
                parameters[DIGESTS[field]] = digest(field, value, self.scope)
        if filters.expired is not None:
            parameters["now"] = int(time() * 1000)
        return parameters

    def _execute(
        self,
        connection: Connection,
        statement: Executable,
        parameters: Mapping[str, object] | None = None,
    ) -> CursorResult[Any]:
        return connection.execute(statement, {**(parameters or {}), **self._in_scope})

    def _first(self, result: Any) -> TokenRecord | None:  # noqa: ANN401
        row = result.first()
        return None if row is None else self._secrets.decrypted(row)

    def _decrypted_or_error(self, row: Sequence[Any]) -> TokenRecord | UndecryptableTokenError:
        try:
            return self._secrets.decrypted(row)
        except UndecryptableTokenError as error:
            return without_frames(error)

    def _decrypted_in_scope(self, row: Row[Any]) -> TokenRecord | UndecryptableTokenError:
        """The record of a row, if the row is this scope's: only then may it be re-encrypted."""
        record = self._decrypted_or_error(row[: len(RECORD_COLUMNS)])
        if isinstance(record, TokenRecord) and self._identity(record) != row.identity:
            return misplaced(record)
        return record

    def _values(self, record: TokenRecord) -> dict[str, object]:
        values: dict[str, object] = {name: getattr(record, name) for name in RECORD_COLUMNS}
        return values | self._secrets.encrypted(record) | digests_of(record, self.scope)

    def _identity(self, record: TokenRecord) -> str:
        return identity_digest(identity_of(record), self.scope)


def scope_for(table: Table, given: Mapping[str, object] | None) -> Scope:
    """The scope that a store or a repository was given.

    Args:
        table: The table of its model.
        given: The columns that tell tenants apart, and their values.

    Raises:
        ConfigurationError: The table has no such column, it is one of this package's own, or a
            value is missing.
    """
    if given is None:
        return UNSCOPED
    if not given:
        raise ConfigurationError("A scope needs a column and its value, or leave it out.")
    for name, value in given.items():
        if name not in table.c:
            raise ConfigurationError(
                f"The table {table} has no column {name!r} to scope by. Add it to your model, "
                "migrate, and pass the model to the store."
            )
        if hasattr(StoredTokenMixin, name):
            raise ConfigurationError(
                f"The column {name!r} is the token's own. Scope by a column that your model adds."
            )
        if value is None or value == "":
            raise ConfigurationError(
                f"The scope's column {name!r} needs a value, not {value!r}: "
                "a store without one would see every tenant's tokens."
            )
    return Scope(tuple(sorted(given.items())))


def _shape(filters: Filters) -> tuple[bool, bool, bool | None]:
    return (filters.user_name is not None, filters.client_id is not None, filters.expired)


def _check_record(asked: object) -> None:
    if not isinstance(asked, TokenRecord):
        raise InvalidTokenError(f"The token must be a TokenRecord, not {type(asked).__name__}.")


def _changed_meanwhile() -> DatabaseError:
    return DatabaseError(
        "Another writer changed the token's row while it was being saved. "
        "Roll the transaction back and run it again.",
        retryable=True,
    )
