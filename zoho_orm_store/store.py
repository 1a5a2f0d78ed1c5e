"""The token store that the SDK is given."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from functools import lru_cache, partial
from math import inf
from time import monotonic, time
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, overload

from sqlalchemy import URL
from typing_extensions import TypeVarTuple, Unpack

from zoho_orm_store._cache import TokenCache
from zoho_orm_store._database.database import open_database
from zoho_orm_store._database.drivers import redacted_url
from zoho_orm_store._database.errors import our_errors
from zoho_orm_store._database.forks import notice_fork, tell_forked_children
from zoho_orm_store._matching import fallen_back, filled, is_new_login
from zoho_orm_store._refresh.coordinator import RefreshCoordinator, Settled
from zoho_orm_store._refresh.leases import DatabaseLeases
from zoho_orm_store._refresh.sdk_behaviour import SLACK, needs_refresh
from zoho_orm_store._scopes import scope_for
from zoho_orm_store._sdk.adapter import TokenStoreAdapter
from zoho_orm_store._sdk.conversion import token_from
from zoho_orm_store._tokens import TokenOperations
from zoho_orm_store.errors import (
    ConfigurationError,
    DatabaseTimeoutError,
    DatabaseUnreachableError,
    RefreshFailedError,
    SchemaError,
    ZohoOrmStoreError,
    without_frames,
)
from zoho_orm_store.models import RefreshLease, StoredToken, lease_table
from zoho_orm_store.refresh import RefreshPolicy, RefreshStats
from zoho_orm_store.repository import (
    AsyncTokenRepository,
    StoreTransaction,
    TokenRepository,
    is_asynchronous,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
    from sqlalchemy.orm import Session, scoped_session
    from typing_extensions import Self

    from zoho_orm_store._database.engines import Bind
    from zoho_orm_store._sdk.adapter import MissingId, UsedGrants
    from zoho_orm_store._sdk.conversion import OAuthToken
    from zoho_orm_store.encryption import TokenCipher
    from zoho_orm_store.models import RefreshLeaseMixin, StoredTokenMixin
    from zoho_orm_store.records import TokenRecord

__all__ = ["SQLAlchemyTokenStore"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

Scope: TypeAlias = "Mapping[str, object] | Callable[[], Mapping[str, object]]"

_TENANTS_REMEMBERED = 1024

_SHORTEST_TIMEOUT = 0.25
"""Seconds that a call has in any case, however long it took to prepare the database for it."""


class SQLAlchemyTokenStore(TokenStoreAdapter):
    """A ``TokenStore`` in a SQLAlchemy database, to be passed to ``Initializer.initialize``.

    Making one opens no connection and starts no thread. It may be used from any number of threads
    at once, inside a running event loop, and in forked children. Every call is a transaction of
    its own, which is run again after a deadlock, a serialization failure, a busy SQLite file or a
    lost connection.

    Args:
        bind: The database. For a URL, such as ``"sqlite:///zohooauth.db"``, the store makes an
            engine and disposes of it. An ``Engine`` is used as it is and never disposed of. An
            ``AsyncEngine`` gets a second pool, for the store's own event loop.
        model: The model whose table holds the tokens.
        lease_model: The model whose table holds the refresh leases; ``None`` stands for
            `RefreshLease` with `StoredToken`. A model of your own comes with a lease model of your
            own, unless ``refresh`` is ``None``.
        cipher: Encrypts the secrets and the user names in the table, such as a `FernetCipher`;
            ``None`` stores plain text. Encrypted and plain rows may stand side by side.
        require_encryption: Whether a secret in plain text is an error, because somebody without
            the keys may have written it. Set it once every token is encrypted.
        scope: Columns that the model adds, and their values, such as ``{"tenant_id": 7}``. The
            store finds, lists, changes and deletes only the rows with these values, and new rows
            get them. A Zoho user can then exist once per tenant. Or a function that returns such a
            mapping: it is called at each call of the store, in the caller's thread and context, so
            that one store serves each request's own tenant. If it returns nothing or raises an
            exception, the call fails.
        refresh: How many workers share one refresh; ``None`` lets each refresh for itself.
        create_schema: Whether to run the migrations on first use; ``None`` does so for a SQLite
            URL only.
        missing_id: What `find_token_by_id` does for an unknown id: ``"none"`` returns ``None``,
            ``"raise"`` raises, which the SDKs for the API versions 5 to 7, and ``zohocrmsdk8-0``
            before 7.0.0, need.
        used_grants: What becomes of a grant token that was exchanged. With ``"find"`` it goes on
            finding its token, for programs that start with the same one again and again. With
            ``"forget"`` it is removed and finds nothing, which web logins need: whoever replays
            one from a log or a browser's history is refused by Zoho.
        timeout: Seconds that one call may take in all, retries included. The wait for another
            caller's refresh has a limit of its own. If the server stops answering in the middle
            of a statement, a synchronous ``Engine`` of your own waits until its driver's own
            timeout.
        cache_ttl: Seconds for which `find_token_by_id` may answer from memory; 0 never does. What
            this process changes is seen at once, what others change after this time at the
            latest: a token that was deleted centrally may be used for so much longer.
        pooler: For a URL: whether PgBouncer, Supabase, Neon, RDS Proxy or another pooler in
            transaction mode stands before the server. Drivers other than asyncpg do not need it.
        engine_options: For a URL: keyword arguments for SQLAlchemy's ``create_engine``, which
            replace the store's own.

    Raises:
        ConfigurationError: An argument cannot be used; the message says why.
        MissingDependencyError: The driver of the URL is not installed.
    """

    @our_errors
    def __init__(
        self,
        bind: Bind,
        *,
        model: type[StoredTokenMixin] = StoredToken,
        lease_model: type[RefreshLeaseMixin] | None = None,
        cipher: TokenCipher | None = None,
        require_encryption: bool = False,
        scope: Scope | None = None,
        refresh: RefreshPolicy | None = RefreshPolicy(),
        create_schema: bool | None = None,
        missing_id: MissingId = "none",
        used_grants: UsedGrants = "find",
        timeout: float = 30.0,
        cache_ttl: float = 0.0,
        pooler: bool = False,
        engine_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(missing_id, used_grants)
        if not timeout > 0:
            raise ConfigurationError(f"timeout must be a number of seconds above 0, not {timeout}.")
        if not isinstance(refresh, RefreshPolicy | None):
            raise ConfigurationError(f"refresh must be a RefreshPolicy or None, not {refresh!r}.")
        if not 0 <= cache_ttl < inf:
            raise ConfigurationError(
                f"cache_ttl must be a number of seconds, 0 or more, not {cache_ttl!r}."
            )
        self._model = model
        self._cipher = cipher
        self._require_encryption = require_encryption
        self._timeout = timeout
        self._use_scope(scope)
        if lease_model is None:
            if model is not StoredToken and refresh is not None:
                raise ConfigurationError(
                    f"The model {getattr(model, '__name__', model)} needs a lease model beside it: "
                    "pass lease_model=, a class of your own with RefreshLeaseMixin. Or pass "
                    "refresh=None, and each worker refreshes for itself."
                )
            lease_model = RefreshLease
        table = lease_table(lease_model)
        self._cache = TokenCache(self._table, cache_ttl) if cache_ttl else None
        self._database = open_database(
            bind, timeout=timeout, pooler=pooler, engine_options=engine_options
        )
        self._leases = DatabaseLeases(self._database, table)
        self._coordinator = None if refresh is None else RefreshCoordinator(self._leases, refresh)
        self._has_own_models = (model, lease_model) != (StoredToken, RefreshLease)
        self._create_schema = self._resolve(create_schema, bind)
        self._owns_database = True
        self._is_new = True
        self._first_use = threading.Lock()
        tell_forked_children(self)

    def __repr__(self) -> str:
        # A traceback may show the store of a constructor that has failed.
        database = self.__dict__.get("_database")
        return f"SQLAlchemyTokenStore({database and redacted_url(database.url)!r})"

    @our_errors
    def scoped(self, **scope: object) -> Self:
        """Return a store for another tenant, which shares this one's connections.

        Args:
            scope: The tenant's columns and values, instead of this store's.

        Returns:
            A store like this one. It works until this one is closed; closing it has no effect.

        Raises:
            ConfigurationError: The model has no such column, or a value is missing.
        """
        sibling = type(self).__new__(type(self))
        sibling.__dict__.update(self.__dict__)
        sibling._use_scope(scope)
        sibling._owns_database = False
        tell_forked_children(sibling)
        return sibling

    @overload
    def repository(
        self, session: Session | scoped_session[Any] | Connection
    ) -> TokenRepository: ...

    @overload
    def repository(
        self, session: AsyncSession | async_scoped_session[Any] | AsyncConnection
    ) -> AsyncTokenRepository: ...

    @our_errors
    def repository(self, session: Any) -> TokenRepository | AsyncTokenRepository:
        """Return a repository with this store's model, scope and cipher.

        Args:
            session: Your session or connection, synchronous or asynchronous. You own its
                transaction.

        Raises:
            ConfigurationError: It is something else.
        """
        operations = self._operations_in_scope()
        if is_asynchronous(session):
            return AsyncTokenRepository._of(session, self._model, operations)
        return TokenRepository._of(session, self._model, operations)

    @contextmanager
    def transaction(self) -> Iterator[TokenRepository]:
        """Open a transaction on the store's own engine; never takes or waits for a lease.

        It is committed at the end of the ``with`` block, and rolled back after an exception. On
        SQLite it keeps other writers waiting.

        Yields:
            A repository that works in the transaction.

        Raises:
            DatabaseError: The database refused or lost the transaction, which is not tried again.
        """
        try:
            operations = self._operations_in_scope()
            self._prepare(self._database.read)
            with self._database.transaction() as run:
                yield StoreTransaction(run, operations)
        except ZohoOrmStoreError as error:
            if isinstance(error, SchemaError) and self._create_schema:
                self._is_new = True  # The next transaction makes the tables first.
            raise without_frames(error)  # noqa: B904 - it must have no cause

    def close(self) -> None:
        """Give back every connection and thread.

        An engine that was passed in is left as it is. The store cannot be used again.
        """
        if self._owns_database:
            self._database.close()

    @property
    def refresh_stats(self) -> RefreshStats:
        """What callers have done about expired tokens, in this process."""
        notice_fork()  # A child may be asked before its first call, and begins at 0.
        return RefreshStats() if self._coordinator is None else self._coordinator.stats

    def _get(self, id_: str) -> Settled:
        operations = self._operations or self._operations_in_scope()
        cache, coordinator = self._cache, self._coordinator
        if cache is not None:
            found = cache.get(operations.scope, id_)
            if found is not None and self._is_usable(found, operations):
                return Settled(found)
            read_at = monotonic()
        found = self._run(self._database.read, operations.get, id_)
        if cache is not None and found is not None and self._is_usable(found, operations):
            cache.keep(operations.scope, found, read_at)
        if coordinator is None or found is None or coordinator.is_settled(found):
            return Settled(found)
        look_again = partial(self._database.read, operations.get, id_)
        return coordinator.settle(found, None, look_again, operations.scope.parts)

    def _is_usable(self, found: TokenRecord, operations: TokenOperations) -> bool:
        """Whether a token from memory may be used without a look at the database."""
        if self._coordinator is None:
            return not needs_refresh(found, time() + SLACK)
        return self._coordinator.is_usable(found, operations.scope.parts)

    def _find(self, asked: TokenRecord) -> Settled:
        operations = self._operations_in_scope()
        stored = self._run(self._database.read, operations.find, asked)
        if stored is not None and is_new_login(asked, stored):
            return self._log_in_anew(operations, asked, stored)
        found = None if stored is None else filled(asked, stored)
        return self._settle_found(operations, asked, found)

    def _log_in_anew(
        self, operations: TokenOperations, asked: TokenRecord, stored: TokenRecord
    ) -> Settled:
        try:
            settled = self._settle_found(operations, asked, None)
        except RefreshFailedError:  # Other callers could not exchange the grant token.
            if self._forget_grants or stored.id is None:
                raise
            if (found := self._get(stored.id)).record is None:
                raise
            self._seen(found.record)
            return found._replace(record=fallen_back(asked, found.record))
        if self._forget_grants or settled.record is not None:
            return settled
        return settled._replace(fallback_id=stored.id)

    def _settle_found(
        self, operations: TokenOperations, asked: TokenRecord, found: TokenRecord | None
    ) -> Settled:
        coordinator = self._coordinator
        # The SDK never refreshes what it asks for with an id here: that is its revoke().
        if coordinator is None or asked.id or coordinator.is_settled(found):
            return Settled(found)

        def look_again() -> TokenRecord | None:
            stored = self._run(self._database.read, operations.find, asked)
            return None if stored is None or is_new_login(asked, stored) else filled(asked, stored)

        return coordinator.settle(found, asked, look_again, operations.scope.parts)

    def _seen(self, stored: TokenRecord) -> None:
        if self._coordinator is not None:
            operations = self._operations_in_scope()
            self._coordinator.remember_seen(stored, operations.scope.parts)

    def _save(self, asked: TokenRecord) -> TokenRecord:
        operations = self._operations_in_scope()
        coordinator, parts = self._coordinator, operations.scope.parts
        key = None if coordinator is None else coordinator.lease_for(asked, parts)
        held = None if coordinator is None or key is None else coordinator.held(key)
        if coordinator is None or key is None or held is None:
            return self._run(self._database.write, operations.save, asked, None)
        record = held.without_shown_expiry(asked)

        def save_and_release(connection: Connection) -> TokenRecord:
            # If the lease was lost, another caller's refresh may win.
            is_ours = self._leases.release_in(connection, key, held.owner)
            return operations.save(connection, record, None if is_ours else held.seen)

        try:
            saved = self._run(self._database.write, save_and_release)
        except ZohoOrmStoreError as error:
            if not isinstance(error, DatabaseUnreachableError | DatabaseTimeoutError):
                coordinator.failed(key)
            raise
        coordinator.forget(key)
        return saved

    def _delete(self, id_: str) -> None:
        operations = self._operations_in_scope()
        self._run(self._database.write, operations.delete, id_)

    def _delete_all(self) -> None:
        operations = self._operations_in_scope()
        self._run(self._database.write, operations.delete_all)

    @our_errors
    def _expire(self, id_: str) -> bool:
        operations = self._operations_in_scope()
        return self._run(self._database.write, operations.expire, id_)

    def _tokens(self) -> list[OAuthToken]:
        operations = self._operations_in_scope()
        return self._run(
            self._database.read, lambda connection: [*map(token_from, operations.rows(connection))]
        )

    def _run(
        self,
        run: Callable[..., Any],
        work: Callable[[Connection, Unpack[Ts]], T],
        *args: Unpack[Ts],
    ) -> T:
        """Run work once the tables are there.

        Args:
            run: The database's ``read`` or ``write``, which waits for a server that restarts.
            work: A function of a connection and of ``args``.
            args: More arguments of the function.
        """
        timeout = self._prepare(run) if self._is_new else None
        try:
            result: T = run(work, *args, timeout=timeout)
        except SchemaError:
            result = run(work, *args, timeout=self._prepare_again())
        return result

    def _use_scope(self, scope: Scope | None) -> None:
        """Resolve a scope once and for all, or prepare to ask a function for it at each call."""
        unscoped = TokenOperations.of_model(
            self._model,
            None,
            self._cipher,
            require_encryption=self._require_encryption,
            forget_grants=self._forget_grants,
        )
        self._check, self._table = unscoped.check, unscoped.table
        self._operations: TokenOperations | None = None
        if callable(scope):
            self._ask_scope = scope
            self._within = lru_cache(_TENANTS_REMEMBERED)(unscoped.within)
        else:
            self._operations = unscoped.within(scope_for(unscoped.table, scope))

    def _operations_in_scope(self) -> TokenOperations:
        """What the present caller may do, whose tenant the application's function tells."""
        if self._operations is not None:
            return self._operations
        try:
            scope = self._ask_scope()
        except Exception as error:  # noqa: BLE001 - whatever the application raises
            raised = type(error).__name__
            scope, reason = None, f"raised {raised}"
        else:
            reason = f"returned {scope!r}"
        if not scope:
            raise ConfigurationError(
                f"The store's function scope {reason}, so it is not known whose token is meant. It "
                "must return a mapping such as {'tenant_id': 7}."
            )
        return self._within(scope_for(self._table, scope))

    def _resolve(self, create_schema: bool | None, bind: Bind) -> bool:
        has_own_model = self._model is not StoredToken
        if create_schema and has_own_model:
            raise ConfigurationError(
                "create_schema=True makes the table 'oauthtoken', not that of your own model. "
                "Make yours with your project's migrations and leave create_schema out."
            )
        if create_schema is None:
            is_url = isinstance(bind, str | URL)
            return is_url and not has_own_model and self._database.dialect_name == "sqlite"
        return create_schema

    def _prepare(self, run: Callable[..., object]) -> float:
        """Before the first call, make the tables or check them.

        Args:
            run: Runs the check in the same way as the call.

        Returns:
            The seconds that are left to the call.
        """
        notice_fork()  # It replaces the lock.
        deadline = monotonic() + self._timeout
        mine = self._first_use.acquire(timeout=self._timeout)
        left = deadline - monotonic()
        try:
            if self._is_new and (not mine or left < _SHORTEST_TIMEOUT):
                raise DatabaseTimeoutError("The first call of another thread did not end in time.")
            if self._is_new:
                if self._create_schema:
                    self._make_schema()
                else:
                    run(self._check, timeout=left)
                if self._coordinator is not None and self._has_own_models:
                    self._leases.check()
                self._is_new = False
        finally:
            if mine:
                self._first_use.release()
        return max(_SHORTEST_TIMEOUT, deadline - monotonic())

    def _prepare_again(self) -> float:
        """Make the tables that are missing by now: in another file, or in a forked child's memory.

        Raises:
            SchemaError: The one that is being handled, unless this store makes its tables.
        """
        if not self._create_schema:
            raise
        self._is_new = True
        return self._prepare(self._database.read)

    def _make_schema(self) -> None:
        from zoho_orm_store import provision

        if not provision.is_current(self._database):
            provision.upgrade(self._database)

    def _forked(self) -> None:
        """Start again in a forked child, where an in-memory database is a new, empty one."""
        self._first_use = threading.Lock()
        self._is_new = True
