"""A token store without a database, for tests and for processes that need no other."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from threading import RLock
from typing import TYPE_CHECKING, TypeVar
from uuid import uuid4

from zoho_orm_store.adapter import StoredTokens, TokenStoreAdapter
from zoho_orm_store.forks import tell_forked_children
from zoho_orm_store.matching import (
    Rung,
    check_credentials,
    hits,
    is_absorbed,
    rungs_to_find,
    rungs_to_save,
    update_of,
)
from zoho_orm_store.record import utc_now

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from zoho_orm_store.adapter import MissingId
    from zoho_orm_store.record import TokenRecord

__all__ = ["MemoryTokenStore"]

T = TypeVar("T")


class MemoryTokenStore(TokenStoreAdapter):
    """A `TokenStore` that keeps its tokens in a list, by the same rules as every other.

    It may be used from any number of threads. A forked child goes on with a copy of its own.

    Args:
        missing_id: What `find_token_by_id` does about an unknown id: ``"none"`` returns ``None``,
            ``"raise"`` raises, which the SDK's releases for the API versions 5 to 7 need.

    Raises:
        ConfigurationError: ``missing_id`` is something else.
    """

    def __init__(self, *, missing_id: MissingId = "none") -> None:
        super().__init__(missing_id)
        self._tokens = _TokenList()
        self._lock = RLock()
        tell_forked_children(self)

    def __repr__(self) -> str:
        return f"MemoryTokenStore({len(self._tokens)} tokens)"

    def _forked(self) -> None:
        """Go on in a forked child, even if another thread was at work in the parent."""
        self._lock = RLock()

    def _read(self, operation: Callable[[StoredTokens], T]) -> T:
        with self._lock:
            return operation(self._tokens)

    _write = _read


class _TokenList:
    """Stored tokens, oldest first. Each change replaces the whole list, so that none is halfway."""

    def __init__(self) -> None:
        self._records: list[TokenRecord] = []
        self._last_saved_at = datetime.min

    def get(self, id: str) -> TokenRecord | None:  # noqa: A002 - the SDK's name for it
        return next((record for record in self._records if record.id == id), None)

    def find(self, asked: TokenRecord) -> TokenRecord | None:
        return self._match(asked, rungs_to_find(asked))

    def save(self, asked: TokenRecord) -> TokenRecord:
        asked.check_storable()
        stored = self._match(asked, rungs_to_save(asked))
        if stored is None:
            check_credentials(asked)
            now = self._now()
            saved = replace(asked, id=asked.id or uuid4().hex, created_at=now, updated_at=now)
            self._records = [*self._records, saved]
            return saved
        saved, removed = update_of(
            stored,
            asked,
            lambda saved: [
                other
                for other in self._records
                if other.id != saved.id and is_absorbed(other, saved)
            ],
        )
        saved = replace(saved, updated_at=self._now())
        self._records = [
            saved if record.id == saved.id else record
            for record in self._records
            if record.id not in removed
        ]
        return saved

    def delete(self, id: str) -> bool:  # noqa: A002 - the SDK's name for it
        kept = [record for record in self._records if record.id != id]
        deleted = len(kept) < len(self._records)
        self._records = kept
        return deleted

    def delete_all(self) -> int:
        deleted = len(self._records)
        self._records = []
        return deleted

    def _oldest_first(self) -> Iterator[TokenRecord]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def _match(self, asked: TokenRecord, rungs: Sequence[Rung]) -> TokenRecord | None:
        for rung in rungs:
            found = [record for record in self._records if hits(rung, asked, record)]
            if found:
                return max(found, key=lambda record: _preference(rung, asked, record))
        return None

    def _now(self) -> datetime:
        """The time, never the same twice: which of two tokens was saved last must be clear."""
        self._last_saved_at = max(utc_now(), self._last_saved_at + timedelta(microseconds=1))
        return self._last_saved_at


def _preference(rung: Rung, asked: TokenRecord, stored: TokenRecord) -> tuple[bool, datetime]:
    """The asked client's own token first, then the one saved last (rules B2, B7)."""
    by_client = rung in (Rung.USER, Rung.IDENTITY) and asked.client_id is not None
    is_own = not by_client or asked.client_id == stored.client_id
    return (is_own, stored.updated_at or datetime.min)
