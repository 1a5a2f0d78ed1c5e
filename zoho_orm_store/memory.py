"""A token store without a database, for tests and for processes that need no other."""

from __future__ import annotations

import threading
from dataclasses import replace
from datetime import datetime, timedelta
from time import time
from typing import TYPE_CHECKING
from uuid import uuid4

from zoho_orm_store._database.forks import notice_fork, tell_forked_children
from zoho_orm_store._matching import (
    check_credentials,
    filled,
    find_match,
    is_new_login,
    lookups_to_find,
    lookups_to_save,
    plan_update,
    without_used_grant,
    without_used_grants,
)
from zoho_orm_store._refresh.coordinator import Settled
from zoho_orm_store._sdk.adapter import TokenStoreAdapter
from zoho_orm_store._sdk.conversion import token_from
from zoho_orm_store.records import check_text, utc_now

if TYPE_CHECKING:
    from zoho_orm_store._sdk.adapter import MissingId, UsedGrants
    from zoho_orm_store._sdk.conversion import OAuthToken
    from zoho_orm_store.records import TokenRecord

__all__ = ["MemoryTokenStore"]


class MemoryTokenStore(TokenStoreAdapter):
    """A ``TokenStore`` that keeps its tokens in a list, by the same rules as the one in a database.

    It may be used from any number of threads. A forked child goes on with its own copy.

    Args:
        missing_id: What `find_token_by_id` does for an unknown id: ``"none"`` returns ``None``,
            ``"raise"`` raises, which the SDKs for the API versions 5 to 7, and ``zohocrmsdk8-0``
            before 7.0.0, need.
        used_grants: What becomes of a grant token that was exchanged: with ``"find"`` it goes on
            finding its token, with ``"forget"`` it is removed and finds nothing. Web logins need
            ``"forget"``.

    Raises:
        ConfigurationError: An argument is something else.
    """

    def __init__(self, *, missing_id: MissingId = "none", used_grants: UsedGrants = "find") -> None:
        super().__init__(missing_id, used_grants)
        # Oldest first. Each change replaces the whole list, so that none is half done.
        self._records: list[TokenRecord] = []
        self._last_saved_at = datetime.min
        self._forked()
        tell_forked_children(self)

    def __repr__(self) -> str:
        return f"MemoryTokenStore({len(self._records)} tokens)"

    def _forked(self) -> None:
        """Go on in a forked child, even if another thread was at work in the parent."""
        self._lock = threading.RLock()

    def _turn(self) -> threading.RLock:
        """The lock of this process."""
        notice_fork()
        return self._lock

    def _get(self, id_: str) -> Settled:
        check_text("id", id_)
        return Settled(next((record for record in self._records if record.id == id_), None))

    def _find(self, asked: TokenRecord) -> Settled:
        with self._turn():
            stored = find_match(lookups_to_find(asked), asked, self._records)
        if stored is not None and is_new_login(asked, stored):
            return Settled(None, fallback_id=None if self._forget_grants else stored.id)
        return Settled(None if stored is None else filled(asked, stored))

    def _save(self, asked: TokenRecord) -> TokenRecord:
        asked.check_storable()
        with self._turn():
            stored = find_match(lookups_to_save(asked), asked, self._records)
            return self._insert(asked) if stored is None else self._update(stored, asked)

    def _insert(self, asked: TokenRecord) -> TokenRecord:
        check_credentials(asked)
        if self._forget_grants:
            asked = without_used_grant(asked)
        now = self._now()
        saved = replace(asked, id=asked.id or uuid4().hex, created_at=now, updated_at=now)
        self._records = [*self._records, saved]
        return saved

    def _update(self, stored: TokenRecord, asked: TokenRecord) -> TokenRecord:
        others = (record for record in self._records if record.id != stored.id)
        if self._forget_grants:
            stored, asked = without_used_grants(stored, asked)
        saved, absorbed = plan_update(stored, asked, others)
        saved = replace(saved, updated_at=self._now())
        self._records = [
            saved if record.id == saved.id else record
            for record in self._records
            if record.id not in absorbed
        ]
        return saved

    def _delete(self, id_: str) -> None:
        check_text("id", id_)
        with self._turn():
            self._records = [record for record in self._records if record.id != id_]

    def _delete_all(self) -> None:
        with self._turn():
            self._records = []

    def _expire(self, id_: str) -> bool:
        check_text("id", id_)
        ended = int(time() * 1000) - 1
        with self._turn():
            is_stored = any(record.id == id_ for record in self._records)
            self._records = [
                replace(record, expiry_time=ended) if record.id == id_ else record
                for record in self._records
            ]
        return is_stored

    def _tokens(self) -> list[OAuthToken]:
        return [*map(token_from, self._records)]

    def _now(self) -> datetime:
        """The time, never the same twice: it must be clear which token was saved last."""
        self._last_saved_at = max(utc_now(), self._last_saved_at + timedelta(microseconds=1))
        return self._last_saved_at
