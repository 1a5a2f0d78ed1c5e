"""The operations on a table of stored tokens: each takes a connection, in a caller's transaction.

A store builds them once and calls them directly. The repositories run the same operations on an
application's session.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from difflib import get_close_matches
from itertools import chain
from operator import itemgetter
from time import time
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

from sqlalchemy import exc, insert

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
from zoho_orm_store._secrets import (
    Secrets,
    is_partly_encrypted,
    key_id_of,
    key_of_digest,
    misplaced,
    partly_encrypted,
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
from zoho_orm_store._sql.tokens import RECORD_COLUMNS, Rotation, token_statements
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
    from collections.abc import Iterable, Iterator, Sequence

    from sqlalchemy import Connection, CursorResult, Executable, Row, Table
    from typing_extensions import Self

    from zoho_orm_store.encryption import TokenCipher

__all__ = ["Filters", "RotatedBatch", "TokenOperations", "scope_for"]

logger = logging.getLogger("zoho_orm_store")

_FETCHED = 500
"""How many rows of a listing are taken from the driver at once."""

_LOOKED_AT = 1000
"""How many rows are looked at for a batch to rotate."""

_FINDING = ("user_digest", "access_digest", "refresh_digest", "grant_digest")
"""The digests by which tokens are found. Many tokens have the same client."""


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
    undecryptable: list[UnreadableTokenError]


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
        self._secrets = Secrets(cipher, scope, require=require_encryption)
        self._digests = Digests(scope, self._secrets.digest_keys)
        keyed = self._digests.are_keyed
        self._statements = token_statements(table, scope.columns, keyed=keyed)
        self._in_scope = {f"scope_{name}": value for name, value in scope.values}
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
        row = connection.execute(self._statements.by_id, {"row_id": id, **self._in_scope}).first()
        if row is None:
            return None
        if row.id != id:
            raise _crossed(connection)
        return self._secrets.decrypted(row)

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
            self._refuse_unknown_keys(connection)
        return None

    def _refuse_unknown_keys(self, connection: Connection) -> None:
        """See that the cipher knows the keys of all digests, before a token counts as not stored.

        The keys are distinguished by what their digests begin with, so that this takes one look
        into the index for each key. A digest that goes with no key of its row was planted.
        """
        after, known = KEYED, self._digests.prefixes
        while row := self._execute(
            connection, self._statements.next_digest, {"after": after}
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
                yield self._secrets.decrypted(row)
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
        page = self._statements.page(*_shape(filters))
        return [*map(self._decrypted_or_error, self._execute(connection, page, parameters))]

    def misplaced(self, connection: Connection) -> Iterator[UnreadableTokenError]:
        """Yield an error for each token whose row cannot be read, or has another's identity.

        Somebody has planted or changed the row. Without a scope, those of tenants cannot be told.
        """
        after = ""
        while not self._may_have_tenants:
            parameters = {"after": after, "limit": _LOOKED_AT}
            rows = self._execute(connection, self._statements.with_identity, parameters).all()
            for row in rows:
                found = self._decrypted_in_scope(row)
                if isinstance(found, UnreadableTokenError):
                    yield found
            if len(rows) < _LOOKED_AT:
                return
            after = rows[-1].id

    def ids(self, connection: Connection, after: str, limit: int) -> Sequence[str]:
        """Return at most ``limit`` ids that come after one, in their order."""
        parameters = {"after": after, "limit": limit}
        return self._execute(connection, self._statements.ids, parameters).scalars().all()

    def count(self, connection: Connection, filters: Filters) -> int:
        """Count tokens."""
        counting = self._statements.count(*_shape(filters))
        parameters = self._filter_parameters(connection, filters)
        return int(self._execute(connection, counting, parameters).scalar_one())

    # -- Writing ----------------------------------------------------------------------------------

    def save(
        self,
        connection: Connection,
        asked: TokenRecord,
        seen: TokenRecord | None = None,
        values: Mapping[str, object] | None = None,
    ) -> TokenRecord:
        """Save a token: into the row it means, or into a new one.

        Args:
            connection: A connection. On SQLite, its transaction already has the write lock.
            asked: What is known of the token.
            seen: The token as it was before the caller refreshed it without a lease. If another
                caller has saved a live access token since, that one is kept.
            values: The values of columns that the model adds, such as a foreign key.

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
        locked = self._lock_match(connection, asked)
        if locked is None:
            return self._save_new(connection, asked, seen, own)
        stored, is_tied, identity = locked
        check_owner(asked, stored)
        if self._may_have_tenants and not self._digests.is_identity(stored, identity):
            raise ConfigurationError(
                f"The row with id {stored.id!r} is a tenant's. Pass its scope= to save the token. "
                "Without a scope, tokens can only be listed, expired and deleted."
            )
        rows: Sequence[Row[Any]] = []
        learns = learns_refresh_token(stored, asked)
        if learns and has_row_locks(connection):
            # The row gets its identity back at once: an application may go on after an error.
            claim = {"row_id": stored.id, "identity": self._digests.claim(asked)}
            self._execute(connection, self._statements.update, claim)
            rows = self._lock_holders(connection, merged(stored, asked))
            self._execute(connection, self._statements.update, claim | {"identity": identity})
        elif learns or is_tied:
            rows = self._lock_holders(connection, merged(stored, asked))
        return self._update(connection, stored, asked, seen, self._readable(rows), own)

    def add_new(
        self, connection: Connection, asked: Sequence[TokenRecord]
    ) -> Sequence[TokenRecord | None]:
        """Save those of many tokens that are certainly not stored yet, in a few statements.

        No row has such a token's id or one of the values by which it is found, and no other of the
        tokens has.

        Args:
            connection: See `save`.
            asked: What is known of the tokens.

        Returns:
            For each token its row, or ``None``: `save` it, or learn why it cannot be saved.

        Raises:
            CipherError: A token may be stored under a key that is not known, or the cipher failed.
            DatabaseError: Another writer was faster; run the transaction again.
        """
        limit_lock_wait(connection)
        self._refuse_unknown_keys(connection)
        new = self._not_stored(connection, asked)
        if new:
            self._check_required({})
        if new and has_row_locks(connection):
            found = self._found_in_turn(connection, [*new.values()])
            new = {
                place: row
                for place, row in new.items()
                if found.isdisjoint(self._marks_in_turn(row))
            }
        if new:
            values = [self._values(row) | dict(self.scope.values) for row in new.values()]
            try:
                connection.execute(insert(self.table), values)
            except exc.IntegrityError:
                raise _changed_meanwhile() from None
        return [new.get(place) for place in range(len(asked))]

    def _not_stored(
        self, connection: Connection, asked: Sequence[TokenRecord]
    ) -> dict[int, TokenRecord]:
        """The rows of those tokens that can be stored and are not, by their places."""
        known = {place: {*self._marks(each)} for place, each in enumerate(asked) if _is_whole(each)}
        counted = Counter(mark for marks in known.values() for mark in marks)
        taken = {mark for mark, number in counted.items() if number > 1}
        for column in ("id", *_FINDING):
            values = [value for name, value in counted if name == column]
            found = connection.execute(self._statements.taken(column), {"values": values})
            taken |= {(column, value) for value in found.scalars()}
        new = {place: asked[place] for place, marks in known.items() if marks.isdisjoint(taken)}
        now = utc_now()
        return {
            place: replace(each, id=each.id or uuid4().hex, created_at=now, updated_at=now)
            for place, each in new.items()
        }

    def _marks(self, record: TokenRecord) -> Iterator[tuple[str, str]]:
        """The id and the digests by which a row would be found, by column."""
        if record.id:
            yield "id", record.id
        for column, digests in self._digests.parameters(record).items():
            if column in _FINDING:
                for digest in digests if isinstance(digests, list) else [digests]:
                    yield column, str(digest)

    def _found_in_turn(
        self, connection: Connection, new: Sequence[TokenRecord]
    ) -> set[tuple[str, str]]:
        """Wait for other saves of the same tokens, and return what their rows are found by.

        Until the transaction ends, other saves wait for this one.
        """
        turns = [
            dict(self.scope.values)
            | {
                "id": uuid4().hex,
                "identity": identity,
                "refresh_digest": self._digests.of(row)[DIGESTS["refresh_token"]],
                "created_at": row.created_at,
                "updated_at": row.updated_at,
            }
            for row in new
            for identity in self._turns(row)
        ]
        if not turns:
            return set()
        turns.sort(key=itemgetter("identity"))  # Two imports at once do not block each other.
        insert_unless_present(connection, self.table, turns)
        ids = {turn["id"] for turn in turns}
        found: set[tuple[str, str]] = set()
        for column in ("refresh_digest", "identity"):
            marks = (mark for row in new for mark in self._marks_in_turn(row))
            values = [value for name, value in marks if name == column]
            if values:
                holders = self._statements.holders(column)
                parameters = {"values": values, **self._in_scope}
                rows = lock_rows_by_index(connection, holders, parameters, self.table, column)
                found |= {(column, row.held) for row in rows if row.id not in ids}
        connection.execute(self._statements.delete_ids, {"ids": [*ids], **self._in_scope})
        return found

    def _turns(self, new: TokenRecord) -> Iterator[str]:
        """The identities by which other saves of a token wait for this one."""
        if new.refresh_token is not None:
            yield self._digests.claim(new)
        if self._digests.are_keyed:
            yield self._digests.turn(new)

    def _marks_in_turn(self, new: TokenRecord) -> Iterator[tuple[str, str]]:
        """The digests by which a row would be found that another save has inserted meanwhile.

        Without keys, the unique index on identities refuses the second row.
        """
        yield from (mark for mark in self._marks(new) if mark[0] == "refresh_digest")
        if self._digests.are_keyed:
            yield from (("identity", each) for each in self._digests.identities([identity_of(new)]))

    def expire(self, connection: Connection, id: str) -> bool:  # noqa: A002
        """End the access token of the row with an id, and return whether there was such a row."""
        check_text("id", id)
        if not is_storable("id", id):
            return False
        limit_lock_wait(connection)
        parameters = {"row_id": id, "expiry_time": int(time() * 1000) - 1}
        done = self._execute(connection, self._statements.update, parameters)
        tell_changed(self.table, id)
        return done.rowcount > 0

    def delete(self, connection: Connection, id: str) -> bool:  # noqa: A002
        """Delete the row with an id, and return whether there was one."""
        check_text("id", id)
        if not is_storable("id", id):
            return False
        limit_lock_wait(connection)
        done = self._execute(connection, self._statements.delete, {"row_id": id})
        tell_changed(self.table, id)
        return done.rowcount > 0

    def delete_all(self, connection: Connection) -> int:
        """Delete every row in one statement, and return their number."""
        limit_lock_wait(connection)
        done = self._execute(connection, self._statements.delete_all)
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
        statement = self._statements.purge(idle=idle is not None, stranded=stranded)
        limit_lock_wait(connection)
        done = self._execute(connection, statement, parameters)
        tell_changed(self.table)
        return done.rowcount

    # -- Rotating keys ----------------------------------------------------------------------------

    def rotate_batch(
        self, connection: Connection, after: str, limit: int, *, plain_text: bool
    ) -> RotatedBatch:
        """Write tokens anew that are not yet under the cipher's present key.

        A token that somebody saves meanwhile is left as it was saved. Two rows that turn out to be
        one token, because they were saved under different keys, become one.

        Args:
            connection: A connection. On SQLite, its transaction already has the write lock.
            after: The id after which to go on; ``""`` at first.
            limit: The most tokens of a batch.
            plain_text: Whether tokens in plain text are encrypted as well.

        Raises:
            CipherError: The cipher failed.
        """
        near = self.ids(connection, after, _LOOKED_AT)
        if not near:
            return RotatedBatch(None, 0, [])
        limit_lock_wait(connection)
        statement = self._statements.not_rotated(self._rotation(plain_text))
        parameters = self._rotation_parameters() | {"after": after, "limit": limit}
        found = self._execute(connection, statement, parameters | {"until": near[-1]}).all()
        last = found[-1].id if len(found) == limit else near[-1]
        readable: list[tuple[Row[Any], TokenRecord]] = []
        undecryptable: list[UnreadableTokenError] = []
        for row in found:
            record = self._decrypted_in_scope(row)
            if isinstance(record, TokenRecord) and plain_text and is_partly_encrypted(row):
                record = partly_encrypted(record)
            if isinstance(record, TokenRecord):
                readable.append((row, record))
            else:
                undecryptable.append(record)
        merged_ids = self._merge_twins(connection, [record for _, record in readable])
        compare_time = has_row_locks(connection)
        changes = [
            self._secrets.encrypted(record)
            | self._digests.of(record)
            | self._statements.seen(row, compare_time=compare_time)
            | self._in_scope
            for row, record in readable
            if record.id not in merged_ids
        ]
        rotated = len(changes)
        if changes:
            done = connection.execute(self._statements.rotate(compare_time=compare_time), changes)
            if done.supports_sane_multi_rowcount():
                rotated = done.rowcount
        rotated += len(merged_ids)
        return RotatedBatch(last, rotated, undecryptable)

    def _merge_twins(self, connection: Connection, records: Sequence[TokenRecord]) -> set[str]:
        """Make one row of two that have the same identity under different keys.

        Returns:
            The ids of those of the records that are done.
        """
        if not records or not self._digests.are_keyed:
            return set()
        by_identity = {identity_of(record): record for record in records}
        by_id = {record.id: record for record in records}
        asked = {"identity": self._digests.identities([*by_identity])}
        rows = self._execute(connection, self._statements.by_identity, asked).all()
        others = self._readable([row for row in rows if row.id not in by_id])
        done: set[str] = set()
        for twin in (*records, *others):
            record = by_identity.get(identity_of(twin))
            if record is None or record.id == twin.id or record.id is None or twin.id is None:
                continue
            locked = [self._lock(connection, each) for each in sorted((record.id, twin.id))]
            if None not in locked:
                rows_locked = {each.record.id: each.record for each in locked if each}
                stored, other = rows_locked[record.id], rows_locked[twin.id]
                self._update(connection, stored, TokenRecord(id=stored.id), None, [other], {})
            done |= {record.id, twin.id}
        return done

    def count_not_rotated(self, connection: Connection, *, plain_text: bool) -> int:
        """Count the tokens that are not under the cipher's present key.

        With a cipher that only decrypts: those that are encrypted.

        Args:
            connection: A connection.
            plain_text: Whether to count those in plain text as well.
        """
        counting = self._statements.count_not_rotated(self._rotation(plain_text))
        return int(self._execute(connection, counting, self._rotation_parameters()).scalar_one())

    def count_plain(self, connection: Connection) -> int:
        """Count the tokens with a secret in plain text."""
        return int(self._execute(connection, self._statements.count_plain).scalar_one())

    def count_by_key(self, connection: Connection) -> dict[str | None, int]:
        """Count the tokens under each key, by the key's id.

        ``None`` counts plain text, and ``""`` garbled values that name no key. A token with
        secrets under several keys counts for each of them.
        """
        counted: Counter[str | None] = Counter()
        for row in self._execute(connection, self._statements.key_prefixes):
            counted.update({key_id_of(value) for value in row if value})
        return dict(counted)

    def _rotation(self, plain_text: bool) -> Rotation:
        if self._secrets.prefix is None:
            return Rotation.TO_PLAIN_TEXT
        return Rotation.ALL if plain_text else Rotation.ENCRYPTED

    def _rotation_parameters(self) -> dict[str, object]:
        prefix, digest_prefix = self._secrets.prefix, self._digests.prefix
        parameters: dict[str, object] = {}
        if prefix is not None:
            parameters |= {"prefix": prefix, "length": len(prefix)}
        if digest_prefix is not None:
            parameters |= {"digest_prefix": digest_prefix, "digest_length": len(digest_prefix)}
        return parameters

    # -- Steps ------------------------------------------------------------------------------------

    def _look_up(
        self, connection: Connection, lookup: Lookup, asked: TokenRecord
    ) -> TokenRecord | None:
        if lookup is Lookup.ID:
            return self.get(connection, asked.id or "")
        statement = self._statements.by_lookup(
            lookup, user=asked.user_name is not None, client=asked.client_id is not None
        )
        parameters = self._digests.parameters(asked)
        if lookup is Lookup.IDENTITY:
            parameters["identities"] = self._digests.updatable(asked)
        row = self._execute(connection, statement, parameters).first()
        return None if row is None else self._secrets.decrypted(row)

    def _lock_match(self, connection: Connection, asked: TokenRecord) -> _Locked | None:
        """The row that a save updates, locked until the transaction ends."""
        lookups = lookups_to_save(asked)
        if lookups[:1] == (Lookup.ID,):
            locked = self._lock(connection, asked.id)
            if locked is not None:
                return locked
            lookups = lookups[1:]
        limit_lock_wait(connection)
        stored = self.match(connection, asked, lookups)
        if stored is None:
            return None
        locked = self._lock(connection, stored.id)
        if locked is None or find_match(lookups, asked, [locked.record]) is None:
            raise _changed_meanwhile()
        return locked

    def _lock(self, connection: Connection, id_: str | None) -> _Locked | None:
        parameters = {"row_id": id_, **self._in_scope}
        row = lock_rows(connection, self._statements.lock_by_id, parameters).first()
        if row is None:
            return None
        record = self._secrets.decrypted(row[: len(RECORD_COLUMNS)])
        return _Locked(record, row.is_tied, row.identity)

    def _save_new(
        self,
        connection: Connection,
        asked: TokenRecord,
        seen: TokenRecord | None,
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
        self._check_required(own)
        now, id_ = utc_now(), self._id_for(connection, asked)
        new = replace(asked, id=id_, created_at=now, updated_at=now)
        values = self._values(new) | dict(self.scope.values) | dict(own)
        others: Sequence[TokenRecord] = []
        if self._digests.are_keyed and has_row_locks(connection):
            stored = self._take_turn(connection, new, values)
            if stored is not None:
                rows = self._lock_holders(connection, asked) if asked.refresh_token else []
                return self._update(connection, stored, asked, seen, self._readable(rows), own)
        if asked.refresh_token is not None and has_row_locks(connection):
            claim = uuid4().hex if id_ == asked.id else id_
            claimed = values | {"id": claim, "identity": self._digests.claim(asked)}
            insert_unless_present(connection, self.table, claimed)
            rows = [row for row in self._lock_holders(connection, asked) if row.id != claim]
            if not rows and self._find_identity(connection, new) is None:
                parameters = values | {"row_id": claim}
                if self._execute(connection, self._statements.update, parameters).rowcount == 0:
                    raise _changed_meanwhile()
                return new
            self._execute(connection, self._statements.delete, {"row_id": claim})
            others = self._readable(rows)
            match = find_match(lookups_to_save(asked), asked, others)
            if match is not None:
                return self._update(connection, match, asked, seen, others, own)
        insert_unless_present(connection, self.table, values)
        stored = self._row_of_identity(connection, new)
        if stored == new:
            return stored
        return self._update(connection, stored, asked, seen, others, own)

    def _take_turn(
        self, connection: Connection, new: TokenRecord, values: Mapping[str, object]
    ) -> TokenRecord | None:
        """Wait for other first saves of an identity, and return what they have saved, locked.

        The unique index on identities does that for digests under one key. While a key is being
        changed, two workers may store different digests of one identity.
        """
        turn = {"id": uuid4().hex, "identity": self._digests.turn(new)}
        insert_unless_present(connection, self.table, {**values, **turn})
        self._execute(connection, self._statements.delete, {"row_id": turn["id"]})
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

    def _check_required(self, own: Mapping[str, object]) -> None:
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
        if asked.id and self._in_scope:
            taken = connection.execute(self._statements.id_in_any_scope, {"row_id": asked.id})
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
        parameters = {"identity": self._digests.identity(new)}
        row = self._execute(connection, self._statements.lock_by_identity, parameters).first()
        return None if row is None else self._secrets.decrypted(row)

    def _lock_holders(self, connection: Connection, record: TokenRecord) -> Sequence[Row[Any]]:
        """The rows that hold a token's refresh token, but for those of other users and clients."""
        statement = self._statements.lock_refresh_token(
            user=record.user_name is not None, client=record.client_id is not None
        )
        parameters = self._digests.parameters(record) | self._in_scope
        return lock_rows_by_index(
            connection, statement, parameters, self.table, "refresh_digest"
        ).all()

    def _readable(self, rows: Sequence[Row[Any]]) -> Sequence[TokenRecord]:
        records = map(self._decrypted_or_error, rows)
        return [record for record in records if isinstance(record, TokenRecord)]

    def _update(
        self,
        connection: Connection,
        stored: TokenRecord,
        asked: TokenRecord,
        seen: TokenRecord | None,
        holders: Iterable[TokenRecord],
        own: Mapping[str, object],
    ) -> TokenRecord:
        """Write what the asked token knows into its locked row.

        Args:
            connection: The connection.
            stored: The row.
            asked: What is known of the token.
            seen: See `save`.
            holders: The rows that hold the refresh token, if there may be others.
            own: The values of columns that the model adds.
        """
        if seen is not None:
            asked = without_overtaken_pair(asked, stored, seen, int(time() * 1000))
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
        values = self._values(saved) | dict(own) | {"row_id": saved.id}
        for id_ in absorbed:
            self._execute(connection, self._statements.delete, {"row_id": id_})
            tell_changed(self.table, id_)
        tell_changed(self.table, saved.id)
        if self._execute(connection, self._statements.update, values).rowcount == 0:
            raise _changed_meanwhile()
        return saved

    def _find_identity(self, connection: Connection, record: TokenRecord) -> Row[Any] | None:
        """The row that has the identity of a token, not locked.

        Where there is none, MySQL would lock its place: other saves could not insert rows beside
        it, and so would often end in deadlocks.
        """
        parameters = {"identity": self._digests.identity(record)}
        return self._execute(connection, self._statements.by_identity, parameters).first()

    def _lock_new_identity(
        self, connection: Connection, stored: TokenRecord, saved: TokenRecord
    ) -> dict[str | None, TokenRecord]:
        """The row that already has the identity which a row gets, by its id, if there is one."""
        if identity_of(saved) == identity_of(stored):
            return {}
        row = self._find_identity(connection, saved)
        if row is None:
            return {}
        found = self._secrets.decrypted(row)
        _check_identity(saved, found)
        locked = self._lock(connection, found.id)
        if locked is None or identity_of(locked.record) != identity_of(saved):
            raise _changed_meanwhile()
        return {found.id: locked.record}

    def _rows(self, connection: Connection, filters: Filters) -> CursorResult[Any]:
        listing = self._statements.listing(*_shape(filters))
        return self._execute(connection, listing, self._filter_parameters(connection, filters))

    def _filter_parameters(self, connection: Connection, filters: Filters) -> dict[str, object]:
        parameters: dict[str, object] = {}
        if (filters.user_name, filters.client_id) != (None, None):
            self._refuse_unknown_keys(connection)
        for field in ("user_name", "client_id"):
            value = getattr(filters, field)
            if value is not None:
                check_text(field, value)
                parameters[DIGESTS[field]] = self._digests.parameter(field, value)
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

    def _decrypted_or_error(self, row: Sequence[Any]) -> TokenRecord | UnreadableTokenError:
        try:
            return self._secrets.decrypted(row)
        except UnreadableTokenError as error:
            return without_frames(error)

    def _decrypted_in_scope(self, row: Row[Any]) -> TokenRecord | UnreadableTokenError:
        """The record of a row, if the row is this scope's: only then may it be re-encrypted."""
        record = self._decrypted_or_error(row[: len(RECORD_COLUMNS)])
        if isinstance(record, TokenRecord) and not self._digests.is_identity(record, row.identity):
            return misplaced(record)
        return record

    def _values(self, record: TokenRecord) -> dict[str, object]:
        values: dict[str, object] = {name: getattr(record, name) for name in RECORD_COLUMNS}
        return values | self._secrets.encrypted(record) | self._digests.of(record)


def scope_for(table: Table, given: Mapping[str, object] | None) -> Scope:
    """The scope that a store or a repository was given.

    Args:
        table: The table of its model.
        given: The columns that tell tenants apart, and their values.

    Raises:
        ConfigurationError: It is not a mapping, the table has no such column, the column is one of
            this package's own, or its value is missing or of another type.
    """
    if given is None:
        return UNSCOPED
    if not isinstance(given, Mapping):
        raise ConfigurationError(
            f"A scope is a mapping such as {{'tenant_id': 7}}, not {type(given).__name__}."
        )
    if not given:
        raise ConfigurationError("A scope needs a column and its value, or leave it out.")
    for name, value in given.items():
        _check_scope(table, name, value)
    return Scope(tuple(sorted(given.items())))


def _check_scope(table: Table, name: str, value: object) -> None:
    if name not in table.c:
        own = [each.key for each in table.c if not hasattr(StoredTokenMixin, each.key)]
        guess = get_close_matches(str(name), own, 1)
        raise ConfigurationError(
            f"The table {table} has no column {name!r} to scope by. "
            + (
                f"Did you mean {guess[0]!r}?"
                if guess
                else "Add it to your model, migrate, and pass the model to the store."
            )
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
    try:
        wanted = table.c[name].type.python_type
    except NotImplementedError:  # A type of the project's own.
        return
    # True is an integer in Python, and a database may take the text "7" for the number.
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise ConfigurationError(
            f"The scope's column {name!r} needs a value of the type {wanted.__name__}, not "
            f"{type(value).__name__}: another type may be taken for another tenant's value."
        )


def _shape(filters: Filters) -> tuple[bool, bool, bool | None]:
    return (filters.user_name is not None, filters.client_id is not None, filters.expired)


def _is_whole(asked: TokenRecord) -> bool:
    """Whether a token can be stored as a row of its own."""
    try:
        asked.check_storable()
        check_credentials(asked)
    except InvalidTokenError:
        return False
    return True


def _check_record(asked: object) -> None:
    if not isinstance(asked, TokenRecord):
        raise InvalidTokenError(f"The token must be a TokenRecord, not {type(asked).__name__}.")


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
