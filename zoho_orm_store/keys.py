"""Changing the key that stored tokens are encrypted under, while workers go on.

Each batch is a transaction of its own, and what is under the present key already is passed over:
a run that was cut short is simply started again.
"""

from __future__ import annotations

from contextlib import closing, contextmanager, suppress
from functools import partial
from time import sleep
from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import exc

from zoho_orm_store.binding import bind_to
from zoho_orm_store.errors import without_frames
from zoho_orm_store.models import StoredToken
from zoho_orm_store.repository import SyncTokenRepository
from zoho_orm_store.statements import empty_log, secure_delete

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from sqlalchemy import Connection, Executable

    from zoho_orm_store.binding import Binding
    from zoho_orm_store.cipher import TokenCipher
    from zoho_orm_store.engines import Bind
    from zoho_orm_store.errors import UndecryptableTokenError
    from zoho_orm_store.models import StoredTokenMixin
    from zoho_orm_store.repository import Rekeyed

__all__ = ["RekeySummary", "rekey_tokens"]

_PASSES = 5
_PAUSE = 0.005


class RekeySummary(NamedTuple):
    """What `rekey_tokens` has done.

    Attributes:
        number: How many tokens were encrypted anew.
        left: How many are still not under the present key. Those that are not among the
            undecryptable ones were saved meanwhile by workers that use another key.
        undecryptable: Why some could not be read; they were left as they are.
    """

    number: int
    left: int
    undecryptable: tuple[UndecryptableTokenError, ...]


@without_frames
def rekey_tokens(
    bind: Bind,
    cipher: TokenCipher,
    *,
    model: type[StoredTokenMixin] = StoredToken,
    scope: Mapping[str, object] | None = None,
    on_progress: Callable[[int, int], object] = lambda done, total: None,
) -> RekeySummary:
    """Encrypt every token under the key that a cipher uses now.

    Beside running workers: no token is locked for longer than a batch of a hundred, and one that
    is saved meanwhile is left as it was saved. With a cipher that only decrypts, every token
    becomes plain text.

    SQLite overwrites what was there. Elsewhere it is the database's own vacuuming that does, and
    no backup or log is ever changed.

    Args:
        bind: The database, whose tables must be up to date.
        cipher: What opens the tokens as they are, and encrypts them anew.
        model: The model whose table holds the tokens.
        scope: What fences off a tenant's tokens. They are bound to it: each tenant's are
            encrypted anew by a call of its own.
        on_progress: Called after each batch with the number of tokens that are done, and with
            the number that there were to do.

    Returns:
        What was done.

    Raises:
        CipherError: The cipher failed.
        DatabaseError: The database refused or lost the operation.
    """

    def tokens(connection: Connection) -> SyncTokenRepository:
        return SyncTokenRepository(connection, model=model, scope=scope, cipher=cipher)

    with closing(bind_to(bind, timeout=None, retry_for=30.0)) as binding:
        left = binding.read(lambda connection: tokens(connection).count_stale())
        total, done = left, 0
        undecryptable: list[UndecryptableTokenError] = []
        for _ in range(_PASSES):
            if left <= len(undecryptable):
                break
            undecryptable = []
            for batch in _one_pass(binding, tokens):
                done += batch.number
                undecryptable += batch.undecryptable
                on_progress(done, max(total, done))
            left = binding.read(lambda connection: tokens(connection).count_stale())
        binding.read(_empty_log)
    return RekeySummary(done, left, tuple(undecryptable))


def _one_pass(
    binding: Binding, tokens: Callable[[Connection], SyncTokenRepository]
) -> Iterator[Rekeyed]:
    after: str | None = ""

    def rekey(connection: Connection) -> Rekeyed:
        with _overwriting(connection):
            return tokens(connection).rekey(after=after or "")

    while after is not None:
        batch = binding.write(rekey)
        yield batch
        after = batch.last
        # Where there is one writer at a time, the workers that wait get their turn.
        sleep(_PAUSE)


@contextmanager
def _overwriting(connection: Connection) -> Iterator[None]:
    """Let no plain text stay in a SQLite file, in the space that it took."""
    found = _run(connection, secure_delete)
    _run(connection, partial(secure_delete, mode=1))
    try:
        yield
    finally:
        _run(connection, partial(secure_delete, mode=found))


def _empty_log(connection: Connection) -> None:
    # Another one who is reading keeps it; then it is emptied when the last connection is closed.
    with suppress(exc.DBAPIError):
        _run(connection, empty_log)


def _run(connection: Connection, statement_for: Callable[[str], Executable | None]) -> int | None:
    """Run what a dialect has a statement for, and return what it says."""
    statement = statement_for(connection.dialect.name)
    return None if statement is None else connection.scalar(statement)
