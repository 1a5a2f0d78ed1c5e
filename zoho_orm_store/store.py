"""The store that the SDK is given."""

from __future__ import annotations

from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, TypeVar

from sqlalchemy import URL

from zoho_orm_store.adapter import TokenStoreAdapter
from zoho_orm_store.binding import bind_to
from zoho_orm_store.cipher import check_cipher
from zoho_orm_store.dialects import shown
from zoho_orm_store.errors import (
    ConfigurationError,
    DatabaseTimeoutError,
    DatabaseUnreachableError,
    SchemaError,
    ZohoOrmStoreError,
    without_frames,
)
from zoho_orm_store.forks import tell_forked_children
from zoho_orm_store.models import RefreshLease, StoredToken, lease_table, token_table
from zoho_orm_store.refresh import RefreshCoordinator, RefreshPolicy, RefreshStats
from zoho_orm_store.repository import SyncTokenRepository
from zoho_orm_store.scopes import scope_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sqlalchemy import Connection
    from typing_extensions import Self

    from zoho_orm_store.adapter import MissingId, StoredTokens
    from zoho_orm_store.cipher import TokenCipher
    from zoho_orm_store.engines import Bind
    from zoho_orm_store.models import RefreshLeaseMixin, StoredTokenMixin
    from zoho_orm_store.record import TokenRecord
    from zoho_orm_store.refresh import Look, Settled
    from zoho_orm_store.scopes import Scope

__all__ = ["SQLAlchemyTokenStore"]

T = TypeVar("T")


class SQLAlchemyTokenStore(TokenStoreAdapter):
    """A `TokenStore` in a SQLAlchemy database, to be passed to ``Initializer.initialize``.

    Making one opens no connection and starts no thread. It may be used from any number of threads
    at once, inside a running event loop, and in forked children (rule H1). Every call is a
    transaction of its own, and is run again after a deadlock, a serialization failure, a busy
    SQLite file or a dropped connection.

    Args:
        bind: The database. For a URL, such as ``"sqlite:///zohooauth.db"``, the store makes an
            engine and disposes of it. An ``Engine`` is used as it is and never disposed of. An
            ``AsyncEngine`` is copied, pool and all, for the store's own event loop.
        model: The model whose table holds the tokens.
        lease_model: The model whose table holds the refresh leases.
        create_schema: Whether to run the migrations on first use; ``None`` does for a SQLite URL
            and for nothing else.
        missing_id: What `find_token_by_id` does about an unknown id: ``"none"`` returns ``None``,
            ``"raise"`` raises, which the SDK's releases for the API versions 5 to 7 need.
        scope: Columns that the model adds, and their values, such as ``{"tenant_id": 7}``: the
            store finds, lists, changes and deletes only the rows with these values, and new rows
            get them. A Zoho user can then exist once per tenant.
        refresh: How many workers share one refresh; ``None`` lets each refresh for itself.
        cipher: What encrypts the secrets in the table, such as a `FernetCipher`; ``None`` keeps
            them as plain text. Rows of both kinds may stand side by side.
        timeout: Seconds that one call may take in all, retries included, but for the wait for
            another caller's refresh, which has a limit of its own. Where the server stops
            answering in the middle of a statement, a synchronous ``Engine`` of your own waits
            as long as its driver was told to.

    Raises:
        ConfigurationError: An argument cannot be used; the message says why.
        MissingDependencyError: The driver of the URL is not installed.
    """

    @without_frames
    def __init__(
        self,
        bind: Bind,
        *,
        model: type[StoredTokenMixin] = StoredToken,
        lease_model: type[RefreshLeaseMixin] = RefreshLease,
        cipher: TokenCipher | None = None,
        refresh: RefreshPolicy | None = RefreshPolicy(),
        create_schema: bool | None = None,
        missing_id: MissingId = "none",
        scope: Mapping[str, object] | None = None,
        timeout: float = 30.0,
    ) -> None:
        super().__init__(missing_id)
        if not timeout > 0:
            raise ConfigurationError(f"timeout must be a number of seconds above 0, not {timeout}.")
        if not isinstance(refresh, RefreshPolicy | None):
            raise ConfigurationError(f"refresh must be a RefreshPolicy or None, not {refresh!r}.")
        self._model = model
        leases = lease_table(lease_model)
        self._scope = _scope_in(model, scope)
        check_cipher(cipher)
        self._cipher = cipher
        self._binding = bind_to(bind, timeout=timeout)
        self._coordinator = (
            None if refresh is None else RefreshCoordinator(self._binding, leases, refresh)
        )
        self._has_own_model = (model, lease_model) != (StoredToken, RefreshLease)
        self._owns_binding = True
        self._create_schema = self._resolve(create_schema, bind)
        self._is_new = True
        self._schema_lock = Lock()
        tell_forked_children(self)

    def __repr__(self) -> str:
        # A traceback may show the store of a constructor that has failed.
        binding = self.__dict__.get("_binding")
        return f"SQLAlchemyTokenStore({binding and shown(binding.url)!r})"

    def scoped(self, **scope: object) -> Self:
        """Return a store for another tenant, which shares this one's connections.

        Args:
            scope: The columns and values that fence off the tenant, instead of this store's.

        Returns:
            A store like this one. It works until this one is closed; closing it has no effect.

        Raises:
            ConfigurationError: The model has no such column, or a value is missing.
        """
        sibling = type(self).__new__(type(self))
        sibling.__dict__.update(self.__dict__)
        sibling._scope = _scope_in(self._model, scope)
        sibling._owns_binding = False
        tell_forked_children(sibling)
        return sibling

    def close(self) -> None:
        """Give every connection and thread back (rule H2).

        An engine that was passed in is left as it is (rule H3). The store cannot be used again.
        """
        if self._owns_binding:
            self._binding.close()

    def _forked(self) -> None:
        """Start anew in a forked child, where an in-memory database is another, empty one."""
        self._schema_lock = Lock()
        self._is_new = True

    @property
    def refresh_stats(self) -> RefreshStats:
        """What callers have done about expired tokens, in this process, for a monitor to read."""
        return RefreshStats() if self._coordinator is None else self._coordinator.stats

    def _find_to_use(self, asked: TokenRecord) -> Settled:
        found = self._find(asked)
        # The SDK never refreshes what it has asked for with an id here: that is its revoke.
        if self._coordinator is None or asked.id:
            return found, None
        return self._settled(self._coordinator, found, asked, partial(self._find, asked))

    def _get_to_use(self, id_: str) -> Settled:
        found = self._get(id_)
        if self._coordinator is None or found is None:
            return found, None
        return self._settled(self._coordinator, found, None, partial(self._get, id_))

    def _settled(
        self,
        coordinator: RefreshCoordinator,
        found: TokenRecord | None,
        asked: TokenRecord | None,
        look: Look,
    ) -> Settled:
        try:
            return coordinator.settle(found, asked, look, self._scope)
        except SchemaError as error:
            failure = error
        raise self._explained(failure)

    def _save(self, asked: TokenRecord) -> TokenRecord:
        coordinator = self._coordinator
        key = coordinator.held_for(asked, self._scope) if coordinator is not None else None
        if coordinator is None or key is None:
            return super()._save(asked)
        release, record = coordinator.releasing(key), coordinator.refreshed(key, asked)
        try:
            saved = self._run(
                self._binding.write,
                lambda connection: self._tokens(connection).save(record, seen=release(connection)),
            )
        except ZohoOrmStoreError as error:
            if not isinstance(error, DatabaseUnreachableError | DatabaseTimeoutError):
                coordinator.failed(key)
            raise
        coordinator.forget(key)
        return saved

    def _read(self, operation: Callable[[StoredTokens], T]) -> T:
        return self._run(self._binding.read, lambda connection: operation(self._tokens(connection)))

    def _write(self, operation: Callable[[StoredTokens], T]) -> T:
        return self._run(
            self._binding.write, lambda connection: operation(self._tokens(connection))
        )

    def _run(
        self,
        transact: Callable[[Callable[[Connection], T]], T],
        work: Callable[[Connection], T],
    ) -> T:
        if self._is_new:
            self._prepare()
        try:
            return transact(work)
        except SchemaError as error:
            failure = error
        raise self._explained(failure)

    def _tokens(self, connection: Connection) -> SyncTokenRepository:
        scope = dict(self._scope.values) or None
        return SyncTokenRepository(connection, model=self._model, scope=scope, cipher=self._cipher)

    def _resolve(self, create_schema: bool | None, bind: Bind) -> bool:
        own_model = self._model is not StoredToken
        if create_schema and own_model:
            raise ConfigurationError(
                "create_schema=True makes the table 'oauthtoken', not that of your own model. "
                "Make yours with your project's migrations and leave create_schema out."
            )
        if create_schema is None:
            is_url = isinstance(bind, str | URL)
            return is_url and not own_model and self._binding.dialect_name == "sqlite"
        return create_schema

    def _prepare(self) -> None:
        """Make the tables, or see that the one is there that is needed only later."""
        with self._schema_lock:
            if not self._is_new:
                return
            if self._create_schema:
                self._make_schema()
            if self._coordinator is not None and self._has_own_model:
                self._coordinator.check()
            self._is_new = False

    def _make_schema(self) -> None:
        from zoho_orm_store import provision

        if not provision.is_current(self._binding):
            provision.upgrade(self._binding)

    def _explained(self, error: SchemaError) -> SchemaError:
        """The schema's error with what is found, what is needed, and the command (rule G2)."""
        if self._model is not StoredToken:
            return error
        from zoho_orm_store import provision

        return SchemaError(f"{self._binding.read(provision.describe)} {error.reported}".rstrip())


def _scope_in(model: type[StoredTokenMixin], scope: Mapping[str, object] | None) -> Scope:
    """A scope, once it is known to fit the model."""
    return scope_of(token_table(model, scope or ()), scope)
