"""Changing the key that stored tokens are encrypted under, while workers go on.

Each batch is a transaction of its own, and tokens already under the present key are
skipped, so that an interrupted run can be repeated.
"""

from __future__ import annotations

import logging
from contextlib import closing
from functools import partial
from time import sleep
from typing import TYPE_CHECKING, NamedTuple

from zoho_orm_store._database.database import open_database
from zoho_orm_store._database.errors import our_errors
from zoho_orm_store._rotation import KeyRotation
from zoho_orm_store._sql.dialects import erase_deleted_values, overwriting_deleted_values
from zoho_orm_store._tokens import TokenOperations
from zoho_orm_store.errors import DatabaseError
from zoho_orm_store.models import StoredToken

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from sqlalchemy import Connection

    from zoho_orm_store._database.database import Database
    from zoho_orm_store._database.engines import Bind
    from zoho_orm_store._rotation import RotatedBatch
    from zoho_orm_store.encryption import TokenCipher
    from zoho_orm_store.errors import UnreadableTokenError
    from zoho_orm_store.models import StoredTokenMixin

__all__ = ["RotationSummary", "rotate_keys"]

logger = logging.getLogger("zoho_orm_store")

_TO_ERASE = 15.0
"""Seconds to wait for the readers of a SQLite file that is to be rewritten."""

_PASSES = 5
_PAUSE = 0.005
_BATCH = 100


class RotationSummary(NamedTuple):
    """The result of `rotate_keys`.

    Attributes:
        rotated: How many tokens were written anew.
        left: How many are still not under the present key. Those that are not undecryptable were
            saved meanwhile by workers that use another key.
        undecryptable: Why some tokens could not be decrypted, or not be read at all; they were
            left as they are.
        plain_text: How many tokens are still in plain text.
    """

    rotated: int
    left: int
    undecryptable: tuple[UnreadableTokenError, ...]
    plain_text: int


@our_errors
def rotate_keys(
    bind: Bind,
    cipher: TokenCipher,
    *,
    model: type[StoredTokenMixin] = StoredToken,
    scope: Mapping[str, object] | None = None,
    encrypt_plain_text: bool = False,
    on_progress: Callable[[int, int], object] = lambda done, total: None,
) -> RotationSummary:
    """Encrypt every token that is encrypted anew, under the key that a cipher uses now.

    Workers may run meanwhile: no token is locked for longer than a batch of a hundred takes, and a
    token that a worker saves meanwhile is left as it was saved. With a cipher that only decrypts,
    every token becomes plain text.

    On SQLite the file is rewritten at the end, so that no old value is left in it; it then needs
    twice its space on the disk. On a server old values stay in the files until the server reuses
    the space. Backups and logs keep them everywhere.

    Args:
        bind: The database, whose tables must be up to date.
        cipher: Decrypts the tokens as they are, and encrypts them again.
        model: The model whose table holds the tokens.
        scope: The tenant whose tokens are re-encrypted. Each tenant needs a call of its own,
            because its tokens are bound to its scope.
        encrypt_plain_text: Whether to encrypt tokens in plain text as well. Do this once, in order
            to turn encryption on, and see that nobody has planted any: after it, a planted token
            looks like every other.
        on_progress: Called after each batch with the number of tokens done, and the number in all.

    Raises:
        CipherError: The cipher failed.
        DatabaseError: The database refused or lost the operation.
    """
    rotation = KeyRotation(TokenOperations.of_model(model, scope, cipher))
    with closing(open_database(bind, timeout=None, retry_for=30.0)) as database:
        count = partial(rotation.count_left, plain_text=encrypt_plain_text)
        left = database.read(count)
        total, done = left, 0
        undecryptable: list[UnreadableTokenError] = []
        for _ in range(_PASSES):
            if left <= len(undecryptable):
                break
            undecryptable = []
            for batch in _one_pass(database, rotation, encrypt_plain_text):
                done += batch.rotated
                undecryptable += batch.undecryptable
                on_progress(done, max(total, done))
            left = database.read(count)
        try:
            database.read(erase_deleted_values, timeout=_TO_ERASE)
        except DatabaseError as error:
            logger.warning(
                "Old values may be left in the free space of the SQLite file, which could not be "
                "rewritten. Run this again when the file is less busy. %s",
                error,
            )
        plain_text = database.read(rotation.count_plain)
    return RotationSummary(done, left, tuple(undecryptable), plain_text)


def _one_pass(
    database: Database, rotation: KeyRotation, plain_text: bool
) -> Iterator[RotatedBatch]:
    after: str | None = ""
    while after is not None:
        batch = database.write(_rotate, rotation, after, plain_text)
        yield batch
        after = batch.last
        # Let waiting workers have their turn, if the database has one writer at a time.
        sleep(_PAUSE)


def _rotate(
    connection: Connection, rotation: KeyRotation, after: str, plain_text: bool
) -> RotatedBatch:
    with overwriting_deleted_values(connection):
        return rotation.batch(connection, after, _BATCH, plain_text=plain_text)
