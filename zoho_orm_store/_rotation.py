"""Writing tokens anew under another key, batch by batch, and counting the tokens of each key."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from zoho_orm_store._matching import identity_of
from zoho_orm_store._secrets import is_partly_encrypted, key_id_of, partly_encrypted
from zoho_orm_store._sql.dialects import has_row_locks, limit_lock_wait
from zoho_orm_store._sql.tokens import Rotation
from zoho_orm_store.records import TokenRecord

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection, Row

    from zoho_orm_store._tokens import TokenOperations
    from zoho_orm_store.errors import UnreadableTokenError

__all__ = ["KeyRotation", "RotatedBatch"]

_LOOKED_AT = 1000
"""How many rows are looked at for a batch."""


class RotatedBatch(NamedTuple):
    """The result of `KeyRotation.batch`.

    Attributes:
        last: The id after which to go on, or ``None`` at the end.
        rotated: How many tokens were re-encrypted. With asyncpg, which does not tell, tokens
            that were saved meanwhile are counted too.
        undecryptable: Why other tokens were left as they are.
    """

    last: str | None
    rotated: int
    undecryptable: list[UnreadableTokenError]


class KeyRotation:
    """Writes the tokens of a table anew under the present key of its cipher.

    Args:
        tokens: The operations on the table, with the cipher.
    """

    def __init__(self, tokens: TokenOperations) -> None:
        self._tokens = tokens
        self._digests = tokens.digests
        self._statements = tokens.statements

    def batch(
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
        near = self._tokens.ids(connection, after, _LOOKED_AT)
        if not near:
            return RotatedBatch(None, 0, [])
        limit_lock_wait(connection)
        statement = self._statements.not_rotated(self._kind(plain_text))
        parameters = self._parameters() | {"after": after, "limit": limit}
        found = self._tokens.execute(connection, statement, parameters | {"until": near[-1]}).all()
        last = found[-1].id if len(found) == limit else near[-1]
        readable: list[tuple[Row[Any], TokenRecord]] = []
        undecryptable: list[UnreadableTokenError] = []
        for row in found:
            record = self._tokens.decrypted_in_scope(row)
            if isinstance(record, TokenRecord) and plain_text and is_partly_encrypted(row):
                record = partly_encrypted(record)
            if isinstance(record, TokenRecord):
                readable.append((row, record))
            else:
                undecryptable.append(record)
        merged_ids = self._merge_twins(connection, [record for _, record in readable])
        compare_time = has_row_locks(connection)
        changes = [
            self._tokens.secrets.encrypted(record)
            | self._digests.of(record)
            | self._statements.seen(row, compare_time=compare_time)
            | self._tokens.in_scope
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
        rows = self._tokens.execute(connection, self._statements.by_identity, asked).all()
        others = self._tokens.readable([row for row in rows if row.id not in by_id])
        done: set[str] = set()
        for twin in (*records, *others):
            record = by_identity.get(identity_of(twin))
            if record is None or record.id == twin.id or record.id is None or twin.id is None:
                continue
            locked = [self._tokens.lock(connection, each) for each in sorted((record.id, twin.id))]
            if None not in locked:
                rows_locked = {each.record.id: each.record for each in locked if each}
                stored, other = rows_locked[record.id], rows_locked[twin.id]
                self._tokens.update(
                    connection, stored, TokenRecord(id=stored.id), None, [other], {}
                )
            done |= {record.id, twin.id}
        return done

    def count_left(self, connection: Connection, *, plain_text: bool) -> int:
        """Count the tokens that are not under the cipher's present key.

        With a cipher that only decrypts: those that are encrypted.

        Args:
            connection: A connection.
            plain_text: Whether to count those in plain text as well.
        """
        counting = self._statements.count_not_rotated(self._kind(plain_text))
        counted = self._tokens.execute(connection, counting, self._parameters())
        return int(counted.scalar_one())

    def count_plain(self, connection: Connection) -> int:
        """Count the tokens with a secret in plain text."""
        return int(self._tokens.execute(connection, self._statements.count_plain).scalar_one())

    def count_by_key(self, connection: Connection) -> dict[str | None, int]:
        """Count the tokens under each key, by the key's id.

        ``None`` counts plain text, and ``""`` garbled values that name no key. A token with
        secrets under several keys counts for each of them.
        """
        counted: Counter[str | None] = Counter()
        for row in self._tokens.execute(connection, self._statements.key_prefixes):
            counted.update({key_id_of(value) for value in row if value})
        return dict(counted)

    def _kind(self, plain_text: bool) -> Rotation:
        if self._tokens.secrets.prefix is None:
            return Rotation.TO_PLAIN_TEXT
        return Rotation.ALL if plain_text else Rotation.ENCRYPTED

    def _parameters(self) -> dict[str, object]:
        prefix, digest_prefix = self._tokens.secrets.prefix, self._digests.prefix
        parameters: dict[str, object] = {}
        if prefix is not None:
            parameters |= {"prefix": prefix, "length": len(prefix)}
        if digest_prefix is not None:
            parameters |= {"digest_prefix": digest_prefix, "digest_length": len(digest_prefix)}
        return parameters
