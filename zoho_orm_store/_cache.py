"""Tokens kept in memory for a short time, so that the next lookup by id needs no database.

A cache is told of each change that is made in this process, by whichever store or repository. A
change may be committed only a little later, so a token that has changed is not kept again for as
long as others may be: whoever looks it up meanwhile asks the database.
"""

from __future__ import annotations

import threading
from time import monotonic
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

from zoho_orm_store._database.forks import notice_fork, tell_forked_children

if TYPE_CHECKING:
    from collections.abc import Hashable

    from zoho_orm_store.records import TokenRecord

__all__ = ["TokenCache", "tell_changed"]

_MOST = 1024
"""How many tokens a cache holds."""

_caches: WeakKeyDictionary[Any, WeakSet[TokenCache]] = WeakKeyDictionary()
"""The caches of the tokens in each table."""


def tell_changed(table: Hashable, id_: str | None = None) -> None:
    """Let the caches of this process forget a token, or all tokens of a table.

    Args:
        table: The table.
        id_: The token's id; ``None`` stands for all.
    """
    for cache in tuple(_caches.get(table, ())):
        cache.forget(id_)


class TokenCache:
    """Tokens by their scope and id.

    Args:
        table: The table whose tokens these are.
        seconds: How long a token is kept.
    """

    def __init__(self, table: Hashable, seconds: float) -> None:
        self._seconds = seconds
        self._forked()
        _caches.setdefault(table, WeakSet()).add(self)
        tell_forked_children(self)

    def _forked(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[tuple[Hashable, str], tuple[TokenRecord, float]] = {}
        self._changed: dict[str | None, float] = {}

    def get(self, scope: Hashable, id_: str) -> TokenRecord | None:
        """Return a token that is kept."""
        notice_fork()
        found = self._kept.get((scope, id_))
        if found is None or monotonic() >= found[1]:
            return None
        return found[0]

    def keep(self, scope: Hashable, record: TokenRecord, read_at: float) -> None:
        """Keep a token, unless it has changed or been replaced since it was read.

        Args:
            scope: The scope in which it was looked up.
            record: The token.
            read_at: The time by the monotonic clock before it was read.
        """
        id_ = record.id or ""
        with self._lock:
            for changed in (id_, None):
                if read_at < self._changed.get(changed, 0.0) + self._seconds:
                    return
            self._kept.pop((scope, id_), None)
            while len(self._kept) >= _MOST:
                del self._kept[next(iter(self._kept))]  # The one that was kept first.
            self._kept[scope, id_] = (record, read_at + self._seconds)

    def forget(self, id_: str | None) -> None:
        """Forget a token in every scope, or all."""
        notice_fork()
        now = monotonic()
        with self._lock:
            if len(self._changed) >= _MOST:
                self._changed = {None: now}
            self._changed[id_] = now
            kept = [key for key in self._kept if id_ in (None, key[1])]
            for key in kept:
                del self._kept[key]
