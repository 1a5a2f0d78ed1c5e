"""Saving many new tokens in a few statements, for an import."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

from sqlalchemy import insert

from zoho_orm_store._matching import check_credentials, identity_of
from zoho_orm_store._sql.dialects import (
    has_row_locks,
    insert_unless_present,
    limit_lock_wait,
    lock_rows_by_index,
    lockable_by,
)
from zoho_orm_store.errors import InvalidTokenError
from zoho_orm_store.records import utc_now

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sqlalchemy import Connection

    from zoho_orm_store._tokens import TokenOperations
    from zoho_orm_store.records import TokenRecord

__all__ = ["NewTokens"]

_FINDING = ("user_digest", "access_digest", "refresh_digest", "grant_digest")
"""The digests by which tokens are found. Many tokens have the same client."""


class NewTokens:
    """Adds tokens to a table that holds none of them.

    Args:
        tokens: The operations on the table.
    """

    def __init__(self, tokens: TokenOperations) -> None:
        self._tokens = tokens
        self._digests = tokens.digests
        self._statements = tokens.statements

    def add(
        self, connection: Connection, asked: Sequence[TokenRecord]
    ) -> Sequence[TokenRecord | None]:
        """Save those of many tokens that are certainly not stored yet, in a few statements.

        No row has such a token's id or one of the values by which it is found, and no other of the
        tokens has.

        Args:
            connection: See `TokenOperations.save`.
            asked: What is known of the tokens.

        Returns:
            For each token its row, or ``None``: save it by itself, or learn why it cannot be saved.

        Raises:
            CipherError: A token may be stored under a key that is not known, or the cipher failed.
            DatabaseError: Another writer was faster; run the transaction again.
        """
        limit_lock_wait(connection)
        self._tokens.refuse_unknown_keys(connection)
        new = self._not_stored(connection, asked)
        if new:
            self._tokens.check_required({})
        scope = dict(self._tokens.scope.values)
        values = {place: self._tokens.row_values(row) | scope for place, row in new.items()}
        if new and has_row_locks(connection):
            for place in self._saved_meanwhile(connection, new, values):
                del new[place], values[place]
        if new:
            connection.execute(insert(self._tokens.table), [*values.values()])
        return [new.get(place) for place in range(len(asked))]

    def _not_stored(
        self, connection: Connection, asked: Sequence[TokenRecord]
    ) -> dict[int, TokenRecord]:
        """The rows of those tokens that can be stored and are not, by their places."""
        known = [{*self._marks(each)} for each in asked]
        counted = Counter(mark for marks in known for mark in marks)
        taken = {mark for mark, number in counted.items() if number > 1}
        for column in ("id", *_FINDING):
            values = [value for name, value in counted if name == column]
            found = connection.execute(self._statements.taken(column), {"values": values})
            taken |= {(column, value) for value in found.scalars()}
        start = utc_now()
        new = {}
        for place, (each, marks) in enumerate(zip(asked, known, strict=True)):
            if _is_whole(each) and marks.isdisjoint(taken):
                now = start + timedelta(microseconds=place)  # They are listed in this order.
                id_ = each.id or uuid4().hex
                new[place] = replace(each, id=id_, created_at=now, updated_at=now)
        return new

    def _marks(self, record: TokenRecord) -> Iterator[tuple[str, str]]:
        """The id and the digests by which a row would be found, by column."""
        if record.id:
            yield "id", record.id
        for column, digests in self._digests.parameters(record).items():
            if column in _FINDING:
                for digest in digests if isinstance(digests, list) else [digests]:
                    yield column, str(digest)

    def _saved_meanwhile(
        self,
        connection: Connection,
        new: Mapping[int, TokenRecord],
        values: Mapping[int, dict[str, object]],
    ) -> Sequence[int]:
        """Wait for other saves of the same tokens, and return the places of those that they saved.

        Until the transaction ends, other saves wait for this one.

        Args:
            connection: The connection.
            new: The rows to insert, by place.
            values: The values of their columns, by place.
        """
        turns = [
            values[place] | {"id": uuid4().hex, "identity": identity}
            for identities in (self._turns, self._claims)  # in the order of a single save
            for identity, place in sorted(identities(new))
        ]
        if not turns:
            return []
        insert_unless_present(connection, self._tokens.table, turns)
        ids, scope = [str(turn["id"]) for turn in turns], self._tokens.in_scope
        own = frozenset(ids)
        marks = {place: {*self._marks_in_turn(row)} for place, row in new.items()}
        found: set[tuple[str, str]] = set()
        for column in ("refresh_digest", "identity"):
            holders = self._statements.holders(column)
            held = [value for each in marks.values() for name, value in each if name == column]
            for some in lockable_by(held, connection):
                asked = {"values": some, **scope}
                rows = lock_rows_by_index(connection, holders, asked, self._tokens.table, column)
                found |= {(column, row.held) for row in rows if row.id not in own}
        for some in lockable_by(ids, connection):
            connection.execute(self._statements.delete_ids, {"ids": some, **scope})
        return [place for place, each in marks.items() if not each.isdisjoint(found)]

    def _turns(self, new: Mapping[int, TokenRecord]) -> Iterator[tuple[str, int]]:
        """The identities by which other saves of a token wait for this one, with their places."""
        if self._digests.are_keyed:
            yield from ((self._digests.turn(row), place) for place, row in new.items())

    def _claims(self, new: Mapping[int, TokenRecord]) -> Iterator[tuple[str, int]]:
        """Those by which other saves of a refresh token wait for this one."""
        for place, row in new.items():
            if row.refresh_token is not None:
                yield self._digests.claim(row), place

    def _marks_in_turn(self, new: TokenRecord) -> Iterator[tuple[str, str]]:
        """The digests by which a row would be found that another save has inserted meanwhile.

        Without keys, the unique index on identities refuses the second row.
        """
        yield from (mark for mark in self._marks(new) if mark[0] == "refresh_digest")
        if self._digests.are_keyed:
            identities = self._digests.identities([identity_of(new)])
            yield from (("identity", each) for each in identities)


def _is_whole(asked: TokenRecord) -> bool:
    """Whether a token can be stored as a row of its own."""
    try:
        asked.check_storable()
        check_credentials(asked)
    except InvalidTokenError:
        return False
    return True
