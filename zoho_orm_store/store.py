"""The token store that the SDK is given."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar, overload

from sqlalchemy import URL
from typing_extensions import TypeVarTuple, Unpack

from zoho_orm_store._database.database import open_database
from zoho_orm_store._database.drivers import redacted_url
from zoho_orm_store._database.errors import our_errors
from zoho_orm_store._database.forks import tell_forked_children
from zoho_orm_store._matching import filled
from zoho_orm_store._refresh.coordinator import RefreshCoordinator, Settled
from zoho_orm_store._refresh.leases import DatabaseLeases
from zoho_orm_store._schema import check_revision
from zoho_orm_store._sdk.adapter import TokenStoreAdapter
from zoho_orm_store._sdk.conversion import token_from
from zoho_orm_store._tokens import TokenOperations
from zoho_orm_store.errors import (
    ConfigurationError,
    DatabaseTimeoutError,
    DatabaseUnreachableError,
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
    from zoho_orm_store._refresh.coordinator import Held
    from zoho_orm_store._sdk.adapter import MissingId
    from zoho_orm_store._sdk.conversion import OAuthToken
    from zoho_orm_store.encryption import TokenCipher
    from zoho_orm_store.models import RefreshLeaseMixin, StoredTokenMixin
    from zoho_orm_store.records import TokenRecord

__all__ = ["SQLAlchemyTokenStore"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class SQLAlchemyTokenStore(TokenStoreAdapter):
    """A ``TokenStore`` in a SQLAlchemy database, to be passed to ``Initializer.initialize``.

    Making one opens no connection and starts no thread. It may be used from any number of threads
    at once, inside a running event loop, and in forked children. Every call is a transaction of
    its own, which is run again after a deadlock, a serialization failure, a busy SQLite file or a
    lost connection.

    Args:
        bind: The database. For a URL, such as ``"sqlite:///zohooauth.db"``, the store makes an
            engine and disposes of it. An ``Engine`` is used as it is and never disposed of. An
            ``AsyncEngine`` is copied, pool and all, for the store's own event loop.
        model: The model whose table holds the tokens.
        lease_model: The model whose table holds the refresh leases.
        cipher: Encrypts the secrets in the table, such as a `FernetCipher`; ``None`` stores plain
            text. Encrypted and plain rows may stand side by side.
        scope: Columns that the model adds, and their values, such as ``{"tenant_id": 7}``. The
            store finds, lists, changes and deletes only the rows with these values, and new rows
            get them. A Zoho user can then exist once per tenant.
        refresh: How many workers share one refresh; ``None`` lets each refresh for itself.
        create_schema: Whether to run the migrations on first use; ``None`` does so for a SQLite
            URL only.
        missing_id: What `find_token_by_id` does for an unknown id: ``"none"`` returns ``None``,
            ``"raise"`` raises, which the SDK's releases for the API versions 5 to 7 need.
        timeout: Seconds that one call may take in all, retries included. The wait for another
            caller's refresh has a limit of its own. If the server stops answering in the middle
            of a statement, a synchronous ``Engine`` of your own waits until its driver's own
            timeout.

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
        lease_model: type[RefreshLeaseMixin] = RefreshLease,
        cipher: TokenCipher | None = None,
        scope: Mapping[str, object] | None = None,
        refresh: RefreshPolicy | None = RefreshPolicy(),
        create_schema: bool | None = None,
        missing_id: MissingId = "none",
        timeout: float = 30.0,
    ) -> None:
        super().__init__(missing_id)
        if not timeout > 0:
            raise ConfigurationError(f"timeout must be a number of seconds above 0, not {timeout}.")
        if not isinstance(refresh, RefreshPolicy | None):
            raise ConfigurationError(f"refresh must be a RefreshPolicy or None, not {refresh!r}.")
        self._model = model
        self._cipher = cipher
        self._use_scope(scope)
        table = lease_table(lease_model)
        self._database = open_database(bind, timeout=timeout)
        self._leases = DatabaseLeases(self._database, table)
        self._coordinator = None if refresh is None else RefreshCoordinator(self._leases, refresh)
        self._has_own_models = (model, lease_model) != (StoredToken, RefreshLease)
        self._create_schema = self._resolve(create_schema, bind)
        self._owns_database = True
        self._is_new = True
        self._first_use = Lock()
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
        if is_asynchronous(session):
            return AsyncTokenRepository._of(session, self._model, self._operations)
        return TokenRepository._of(session, self._model, self._operations)

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
            self._prepare()
            with self._database.transaction() as run:
                yield StoreTransaction(run, self._operations)
        except ZohoOrmStoreError as error:
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
        return RefreshStats() if self._coordinator is None else self._coordinator.stats

    def _get(self, id_: str) -> Settled:
        if self._is_new:
            self._prepare()
        found = self._database.read(self._operations.get, id_)
        coordinator = self._coordinator
        if coordinator is None or found is None or coordinator.is_settled(found):
            return Settled(found)
        look_again = partial(self._database.read, self._operations.get, id_)
        return coordinator.settle(found, None, look_again, self._scope_parts)

    def _find(self, asked: TokenRecord) -> Settled:
        found = self._find_filled(asked)
        coordinator = self._coordinator
        # The SDK never refreshes what it asks for with an id here: that is its revoke().
        if coordinator is None or asked.id or coordinator.is_settled(found):
            return Settled(found)
        look_again = partial(self._find_filled, asked)
        return coordinator.settle(found, asked, look_again, self._scope_parts)

    def _find_filled(self, asked: TokenRecord) -> TokenRecord | None:
        stored = self._read(self._operations.find, asked)
        return None if stored is None else filled(asked, stored)

    def _save(self, asked: TokenRecord) -> TokenRecord:
        coordinator = self._coordinator
        key = None if coordinator is None else coordinator.lease_for(asked, self._scope_parts)
        held = None if coordinator is None or key is None else coordinator.held(key)
        if coordinator is None or key is None or held is None:
            return self._write(self._operations.save, asked, None)
        record = held.without_shown_expiry(asked)
        try:
            saved = self._write(self._save_and_release, record, key, held)
        except ZohoOrmStoreError as error:
            if not isinstance(error, DatabaseUnreachableError | DatabaseTimeoutError):
                coordinator.failed(key)
            raise
        coordinator.forget(key)
        return saved

    def _save_and_release(
        self, connection: Connection, asked: TokenRecord, key: str, held: Held
    ) -> TokenRecord:
        """Save a refreshed token. If the lease was lost, another caller's refresh may win."""
        is_ours = self._leases.release_in(connection, key, held.owner)
        return self._operations.save(connection, asked, None if is_ours else held.seen)

    def _delete(self, id_: str) -> None:
        self._write(self._operations.delete, id_)

    def _delete_all(self) -> None:
        self._write(self._operations.delete_all)

    def _tokens(self) -> list[OAuthToken]:
        return self._read(self._all_tokens)

    def _all_tokens(self, connection: Connection) -> list[OAuthToken]:
        return [*map(token_from, self._operations.rows(connection))]

    def _read(self, work: Callable[[Connection, Unpack[Ts]], T], *args: Unpack[Ts]) -> T:
        if self._is_new:
            self._prepare()
        return self._database.read(work, *args)

    def _write(self, work: Callable[[Connection, Unpack[Ts]], T], *args: Unpack[Ts]) -> T:
        if self._is_new:
            self._prepare()
        return self._database.write(work, *args)

    def _use_scope(self, scope: Mapping[str, object] | None) -> None:
        self._operations = TokenOperations.of_model(self._model, scope, self._cipher)
        self._scope_parts = self._operations.scope.parts

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

    def _prepare(self) -> None:
        """Before the first call, make the tables or check them."""
        with self._first_use:
            if not self._is_new:
                return
            if self._create_schema:
                self._make_schema()
            elif self._model is StoredToken:
                self._database.read(check_revision, redacted_url(self._database.url))
            if self._coordinator is not None and self._has_own_models:
                self._leases.check()
            self._is_new = False

    def _make_schema(self) -> None:
        from zoho_orm_store import provision

        if not provision.is_current(self._database):
            provision.upgrade(self._database)

    def _forked(self) -> None:
        """Start again in a forked child, where an in-memory database is a new, empty one."""
        self._first_use = Lock()
        self._is_new = True
