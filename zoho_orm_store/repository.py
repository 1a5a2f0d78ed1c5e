"""Stored tokens inside an application's own session and transaction.

Neither repository ever commits or rolls back: the owner of the transaction does. Neither takes
or waits for a refresh lease.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine, inspect, select, update
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
)
from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.orm.attributes import set_committed_value
from typing_extensions import TypeVarTuple, Unpack

from zoho_orm_store._database.errors import connect_error, our_errors, translate
from zoho_orm_store._sql.dialects import check_dialect, take_write_lock
from zoho_orm_store._tokens import Filters, TokenOperations
from zoho_orm_store.errors import ConfigurationError, UnreadableTokenError, without_frames
from zoho_orm_store.models import StoredToken
from zoho_orm_store.records import TokenRecord

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
    from datetime import timedelta

    from sqlalchemy import Executable, Table
    from typing_extensions import Self

    from zoho_orm_store.encryption import TokenCipher
    from zoho_orm_store.models import StoredTokenMixin

    OnUndecryptable = Callable[[UnreadableTokenError], object]

__all__ = ["AsyncTokenRepository", "StoreTransaction", "TokenRepository", "is_asynchronous"]

S = TypeVar("S")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_PAGE = 1000
_SYNCHRONOUS = (Session, scoped_session, Connection)
_ASYNCHRONOUS = (AsyncSession, async_scoped_session, AsyncConnection)

_checked: WeakKeyDictionary[Engine, set[Table]] = WeakKeyDictionary()
"""The tables that have passed `TokenOperations.check` on an engine."""


def is_asynchronous(given: object) -> bool:
    """Whether this is an object or a class of SQLAlchemy's asyncio extension."""
    kind = given if isinstance(given, type) else type(given)
    return issubclass(kind, (*_ASYNCHRONOUS, AsyncEngine, async_sessionmaker))


class _Repository(Generic[S]):
    _kinds: ClassVar[tuple[type, ...]]
    _registry: ClassVar[type[Any]]

    @our_errors
    def __init__(
        self,
        session: S,
        *,
        model: type[StoredTokenMixin] = StoredToken,
        scope: Mapping[str, object] | None = None,
        cipher: TokenCipher | None = None,
        require_encryption: bool = False,
    ) -> None:
        self._model = model
        self._operations = TokenOperations.of_model(
            model, scope, cipher, require_encryption=require_encryption
        )
        self._use(session)

    @classmethod
    def _of(
        cls, session: object, model: type[StoredTokenMixin], operations: TokenOperations
    ) -> Self:
        """A repository with a store's operations."""
        self = cls.__new__(cls)
        self._model = model
        self._operations = operations
        self._use(session)
        return self

    def _use(self, given: object) -> None:
        self._given = given
        if not isinstance(given, self._registry):
            self._session()

    def _session(self) -> Any:  # noqa: ANN401
        """The session or connection to work on: a registry has one for each thread or task.

        Raises:
            ConfigurationError: It is something else.
        """
        given: Any = self._given
        session = given() if isinstance(given, self._registry) else given
        if isinstance(session, self._kinds):
            return session
        name = f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
        if isinstance(given, _SYNCHRONOUS):
            advice = f"an asynchronous session. Pass the {name} to TokenRepository"
        elif isinstance(given, _ASYNCHRONOUS):
            advice = f"a synchronous session. Pass the {name} to AsyncTokenRepository"
        else:
            names = [kind.__name__ for kind in (*self._kinds, self._registry)]
            article = "an" if names[0].startswith("A") else "a"
            *others, last = [f"{article} {each}" for each in names]
            advice = (
                f"{', '.join(others)} or {last}, not {name}. From a factory or an engine, make one "
                f"first, such as {names[0]}(engine)"
            )
        raise ConfigurationError(f"The {type(self).__name__} works on {advice}.")


class TokenRepository(_Repository["Session | scoped_session[Any] | Connection"]):
    """Stored tokens, through a session or a connection of the application's.

    Every method works inside the transaction that the session or connection is in, or begins one
    as SQLAlchemy does. It never commits. After a `DatabaseError` that is ``retryable``, roll back
    and run the whole transaction again.

    Args:
        session: A ``Session``, a ``scoped_session``, or a ``Connection``, which makes a lookup
            twice as fast.
        model: The model whose table holds the tokens.
        scope: Columns that the model adds, and their values, such as ``{"tenant_id": 7}``. Only
            rows with these values are found, listed, changed or deleted, and new rows get them.
        cipher: Encrypts the secrets and the user names in the table; ``None`` stores plain text.
            Encrypted and plain rows may stand side by side.
        require_encryption: Whether a secret in plain text is an error, because somebody without
            the keys may have written it.

    Raises:
        ConfigurationError: The session is something else, the model lacks something, the scope
            does not fit it, or the cipher is not a `TokenCipher`.
    """

    _kinds = (Session, Connection)
    _registry = scoped_session

    def get(self, id: str) -> TokenRecord | None:  # noqa: A002 - the SDK's name for it
        """Return the token with an id, or ``None``.

        Args:
            id: The id, compared byte for byte.
        """
        return self._run(self._operations.get, id)

    def find(self, asked: TokenRecord) -> TokenRecord | None:
        """Return the stored token that another token means, or ``None``.

        Args:
            asked: What is known of the token. A known id decides alone.
        """
        return self._run(self._operations.find, asked)

    def save(
        self,
        asked: TokenRecord,
        values: Mapping[str, object] | None = None,
        *,
        seen: TokenRecord | None = None,
    ) -> TokenRecord:
        """Save a token: into the row that it means, or into a new one.

        Args:
            asked: What is known of the token; unknown values leave what is stored.
            values: The values of columns that your model adds, such as a foreign key, by name.
            seen: The token as it was before the caller refreshed it. If another caller has saved
                a live access token since, that one is kept.

        Returns:
            The row as it is now, with its id.

        Raises:
            InvalidTokenError: The token cannot be stored as it is, or has no credential.
            UserMismatchError: Its id is that of another user's row.
            DatabaseError: The database refused or lost the operation.
        """
        saved = self._execute(self._writing, self._save, asked, seen, values)
        self._reload(
            lambda loaded: loaded.get("id") == saved.id or loaded.get("user_digest") is None
        )
        return saved

    def delete(self, id: str) -> bool:  # noqa: A002 - the SDK's name for it
        """Delete exactly the row with an id, and return whether there was one."""
        return self._change(self._operations.delete, id)

    def expire(self, id: str) -> bool:  # noqa: A002 - the SDK's name for it
        """End an access token before its hour is over: the next caller refreshes it.

        Args:
            id: The token's id.

        Returns:
            Whether there was such a token.
        """
        return self._change(self._operations.expire, id)

    def delete_all(self) -> int:
        """Delete every stored token in one statement, and return their number."""
        return self._change(self._operations.delete_all)

    def list(
        self,
        *,
        user_name: str | None = None,
        client_id: str | None = None,
        expired: bool | None = None,
        on_undecryptable: OnUndecryptable | None = None,
    ) -> Sequence[TokenRecord]:
        """Return stored tokens, oldest first.

        Args:
            user_name: Only this user's.
            client_id: Only this client's.
            expired: Only those whose access token has expired, or only the others.
            on_undecryptable: Called with the error for each token that cannot be decrypted, or
                that another program made unreadable, which is left out. ``None`` raises the first
                such error.

        Raises:
            UndecryptableTokenError: A token cannot be decrypted.
            UnreadableTokenError: A token cannot be read.
        """
        filters = Filters(user_name, client_id, expired)
        return [*_readable(self._run(self._operations.list, filters), on_undecryptable)]

    def stream(
        self,
        *,
        user_name: str | None = None,
        client_id: str | None = None,
        expired: bool | None = None,
        on_undecryptable: OnUndecryptable | None = None,
    ) -> Iterator[TokenRecord]:
        """Yield stored tokens in the order of their ids, without holding all of them in memory.

        The arguments are those of `list`.
        """
        filters, after = Filters(user_name, client_id, expired), ""
        while page := self._run(self._operations.page, filters, after, _PAGE):
            yield from _readable(page, on_undecryptable)
            after = page[-1].id or ""

    def count(
        self,
        *,
        user_name: str | None = None,
        client_id: str | None = None,
        expired: bool | None = None,
    ) -> int:
        """Count stored tokens. The filters are those of `list`."""
        return self._run(self._operations.count, Filters(user_name, client_id, expired))

    def purge(self, *, idle: timedelta | None = None, stranded: bool = False) -> int:
        """Delete stored tokens that are of no more use, in one statement.

        Args:
            idle: Those that were not saved for so long. A token in use is saved at each refresh,
                at most an hour before its last use.
            stranded: Those whose access token has expired and that have no refresh token.

        Returns:
            How many there were.

        Raises:
            ConfigurationError: Neither is asked for, or ``idle`` is negative.
        """
        return self._change(self._operations.purge, idle, stranded)

    def _save(
        self,
        connection: Connection,
        asked: TokenRecord,
        seen: TokenRecord | None,
        values: Mapping[str, object] | None,
    ) -> TokenRecord:
        take_write_lock(connection, self._operations.table)
        return self._operations.save(connection, asked, seen, values)

    @property
    def _writing(self) -> Executable:
        return update(self._operations.table)

    def _run(self, operation: Callable[[Connection, Unpack[Ts]], T], *args: Unpack[Ts]) -> T:
        return self._execute(select(self._operations.table), operation, *args)

    def _change(self, operation: Callable[[Connection, Unpack[Ts]], T], *args: Unpack[Ts]) -> T:
        result = self._execute(self._writing, operation, *args)
        self._reload(lambda loaded: True)
        return result

    @our_errors
    def _execute(
        self,
        statement: Executable,
        operation: Callable[[Connection, Unpack[Ts]], T],
        *args: Unpack[Ts],
    ) -> T:
        """Run an operation where the session would run such a statement."""
        connection = self._connect(self._session(), statement)
        try:
            return operation(connection, *args)
        except Exception as error:
            failure = translate(error, connection.engine.url)
            if failure is None:
                raise
            raise failure from None

    def _connect(self, session: Session | Connection, statement: Executable) -> Connection:
        """The connection to work on, once the session has flushed and the tables were checked."""
        if isinstance(session, Connection):
            connection = session
        else:
            # As the session's own queries do. Its get_bind() may send writes to another server.
            if session.autoflush:
                session.flush()
            bind_arguments: dict[str, Any] = {"mapper": inspect(self._model), "clause": statement}
            try:
                connection = session.connection(bind_arguments=bind_arguments)
            except Exception as error:  # noqa: BLE001 - drivers raise anything here
                url = session.get_bind(**bind_arguments).engine.url
                raise connect_error(error, url) from None
        check_dialect(connection.dialect.name)
        checked = _checked.setdefault(connection.engine, set())
        if self._operations.table not in checked:
            self._operations.check(connection)
            checked.add(self._operations.table)
        return connection

    @our_errors
    def _reload(self, may_have_changed: Callable[[Mapping[str, Any]], bool]) -> None:
        """Reload the session's objects of this table, which has changed without it.

        Expiring them would not do: asynchronous code cannot load an attribute later. Objects
        whose row is gone leave the session as they are.

        Args:
            may_have_changed: Whether the row of an object may have changed, by the attributes of
                the object that are loaded.
        """
        session = self._session()
        if not isinstance(session, Session):
            return
        for loaded in session.identity_map.values():
            if isinstance(loaded, self._model) and may_have_changed(vars(loaded)):
                before = {**vars(loaded)}
                try:
                    session.refresh(loaded)
                except InvalidRequestError:
                    session.expunge(loaded)
                    for name in before.keys() & inspect(self._model).column_attrs.keys():
                        set_committed_value(loaded, name, before[name])


class StoreTransaction(TokenRepository):
    """The repository that a store hands out in a transaction of its own.

    Args:
        run: Runs work in the transaction.
        operations: The store's operations.
    """

    def __init__(self, run: Callable[..., Any], operations: TokenOperations) -> None:
        self._run_in_transaction = run
        self._operations = operations

    @our_errors
    def _execute(
        self,
        statement: Executable,
        operation: Callable[[Connection, Unpack[Ts]], T],
        *args: Unpack[Ts],
    ) -> T:
        result: T = self._run_in_transaction(operation, *args)
        return result

    def _reload(self, may_have_changed: Callable[[Mapping[str, Any]], bool]) -> None:
        """There is no session that holds objects."""


class AsyncTokenRepository(
    _Repository["AsyncSession | async_scoped_session[Any] | AsyncConnection"]
):
    """Stored tokens, through an async session or an async connection of the application's.

    The methods are those of `TokenRepository`, to be awaited, and work inside the application's
    transaction in the same way.

    Args:
        session: An ``AsyncSession``, an ``async_scoped_session``, or an ``AsyncConnection``.
        model: See `TokenRepository`.
        scope: See `TokenRepository`.
        cipher: See `TokenRepository`.
        require_encryption: See `TokenRepository`.

    Raises:
        ConfigurationError: See `TokenRepository`.
    """

    _kinds = (AsyncSession, AsyncConnection)
    _registry = async_scoped_session

    async def get(self, id: str) -> TokenRecord | None:  # noqa: A002 - the SDK's name for it
        """Return the token with an id, or ``None``. See `TokenRepository.get`."""
        return await self._run(TokenRepository.get, id)

    async def find(self, asked: TokenRecord) -> TokenRecord | None:
        """Return the token that another token means. See `TokenRepository.find`."""
        return await self._run(TokenRepository.find, asked)

    async def save(
        self,
        asked: TokenRecord,
        values: Mapping[str, object] | None = None,
        *,
        seen: TokenRecord | None = None,
    ) -> TokenRecord:
        """Save a token. See `TokenRepository.save`."""
        return await self._run(TokenRepository.save, asked, values, seen=seen)

    async def delete(self, id: str) -> bool:  # noqa: A002 - the SDK's name for it
        """Delete the row with an id. See `TokenRepository.delete`."""
        return await self._run(TokenRepository.delete, id)

    async def expire(self, id: str) -> bool:  # noqa: A002 - the SDK's name for it
        """End an access token before its hour is over. See `TokenRepository.expire`."""
        return await self._run(TokenRepository.expire, id)

    async def delete_all(self) -> int:
        """Delete every stored token. See `TokenRepository.delete_all`."""
        return await self._run(TokenRepository.delete_all)

    async def list(
        self,
        *,
        user_name: str | None = None,
        client_id: str | None = None,
        expired: bool | None = None,
        on_undecryptable: OnUndecryptable | None = None,
    ) -> Sequence[TokenRecord]:
        """Return stored tokens, oldest first. See `TokenRepository.list`."""
        return await self._run(
            TokenRepository.list,
            user_name=user_name,
            client_id=client_id,
            expired=expired,
            on_undecryptable=on_undecryptable,
        )

    async def stream(
        self,
        *,
        user_name: str | None = None,
        client_id: str | None = None,
        expired: bool | None = None,
        on_undecryptable: OnUndecryptable | None = None,
    ) -> AsyncIterator[TokenRecord]:
        """Yield stored tokens in the order of their ids. See `TokenRepository.stream`."""
        filters, after = Filters(user_name, client_id, expired), ""
        page_of = self._operations.page
        while page := await self._run(TokenRepository._run, page_of, filters, after, _PAGE):
            for record in _readable(page, on_undecryptable):
                yield record
            after = page[-1].id or ""

    async def count(
        self,
        *,
        user_name: str | None = None,
        client_id: str | None = None,
        expired: bool | None = None,
    ) -> int:
        """Count stored tokens. See `TokenRepository.count`."""
        return await self._run(
            TokenRepository.count, user_name=user_name, client_id=client_id, expired=expired
        )

    async def purge(self, *, idle: timedelta | None = None, stranded: bool = False) -> int:
        """Delete stored tokens that are of no more use. See `TokenRepository.purge`."""
        return await self._run(TokenRepository.purge, idle=idle, stranded=stranded)

    async def _run(self, method: Callable[..., T], *args: Any, **kwargs: Any) -> T:  # noqa: ANN401
        def run(session: Session | Connection) -> T:
            repository = TokenRepository._of(session, self._model, self._operations)
            return method(repository, *args, **kwargs)

        result: T = await self._session().run_sync(run)
        return result


def _readable(
    listed: Iterable[TokenRecord | UnreadableTokenError], skip: OnUndecryptable | None
) -> Iterator[TokenRecord]:
    for each in listed:
        if isinstance(each, TokenRecord):
            yield each
        elif skip is None:
            raise without_frames(each)
        else:
            skip(each)
