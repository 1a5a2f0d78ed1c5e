"""Changing the key that stored tokens are encrypted under, while workers go on.

Each batch is a transaction of its own, and what is under the present key already is passed over:
a run that was cut short is simply started again.
"""

from __future__ import annotations

from contextlib import closing
from time import sleep
from typing import TYPE_CHECKING, NamedTuple

from zoho_orm_store.binding import bind_to
from zoho_orm_store.errors import without_frames
from zoho_orm_store.models import StoredToken
from zoho_orm_store.repository import SyncTokenRepository

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from sqlalchemy import Connection

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
    return RekeySummary(done, left, tuple(undecryptable))


def _one_pass(
    binding: Binding, tokens: Callable[[Connection], SyncTokenRepository]
) -> Iterator[Rekeyed]:
    after: str | None = ""
    while after is not None:
        start = after
        batch = binding.write(lambda connection: tokens(connection).rekey(after=start))  # noqa: B023
        yield batch
        after = batch.last
        # Where there is one writer at a time, the workers that wait get their turn.
        sleep(_PAUSE)
