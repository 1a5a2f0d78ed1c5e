"""Operations on stored tokens, inside the caller's own transaction.

`SyncTokenRepository` is the one implementation; `TokenRepository` runs it inside an async session.
Neither ever commits or rolls back: whoever owns the transaction does.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext, suppress
from dataclasses import replace
from datetime import timedelta
from functools import wraps
from time import time
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    NamedTuple,
    ParamSpec,
    TypeAlias,
    TypeVar,
)
from uuid import uuid4
from weakref import WeakSet

from sqlalchemy import exc
from sqlalchemy.orm import Session

from zoho_orm_store.cipher import Vault, check_cipher, key_of, misplaced
from zoho_orm_store.dialects import (
    connect_failure_of,
    failure_of,
    is_database_error,
    is_in_autocommit,
    shown,
)
from zoho_orm_store.digests import (
    DIGEST_COLUMNS,
    digest,
    digests_met,
    digests_of,
    identity_digest,
)
from zoho_orm_store.errors import (
    ConfigurationError,
    DatabaseError,
    InvalidTokenError,
    SchemaError,
    UndecryptableTokenError,
    ZohoOrmStoreError,
    without_frames,
)
from zoho_orm_store.matching import (
    Rung,
    check_credentials,
    hits,
    identity_of,
    is_absorbed,
    rungs_to_find,
    rungs_to_save,
    update_of,
    without_overtaken_pair,
)
from zoho_orm_store.models import StoredToken, token_table
from zoho_orm_store.record import TokenRecord, check_text, storable, utc_now
from zoho_orm_store.revisions import NEWEST_REVISION, describe
from zoho_orm_store.scopes import scope_of
from zoho_orm_store.statements import (
    RECORD_COLUMNS,
    REVISION,
    scope_parameters,
    statements_for,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence

    from sqlalchemy import Connection, CursorResult, Engine, Executable, Row, Select
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

    from zoho_orm_store.cipher import TokenCipher
    from zoho_orm_store.models import StoredTokenMixin
    from zoho_orm_store.scopes import Scope
    from zoho_orm_store.statements import Statements

__all__ = ["SyncTokenRepository", "TokenRepository"]

P = ParamSpec("P")
T = TypeVar("T")

Records: TypeAlias = list[TokenRecord]
_Listed: TypeAlias = list[TokenRecord | UndecryptableTokenError]
OnUndecryptable: TypeAlias = "Callable[[UndecryptableTokenError], object]"

_PAGE = 1000

_checked: WeakSet[Engine] = WeakSet()
"""The engines on whose databases the tables were found to be of our revision, or of none."""


class _Filters(NamedTuple):
    """Which tokens a listing is about. Unknown: all of them."""

    user_name: str | None
    client_id: str | None
    expired: bool | None

    @property
    def shape(self) -> tuple[bool, bool, bool | None]:
        """What the listing's SQL depends on."""
        return (self.user_name is not None, self.client_id is not None, self.expired)

    def parameters(self, scope: Scope) -> dict[str, object]:
        """The parameters of the listing's SQL."""
        parameters: dict[str, object] = {}
        for field in ("user_name", "client_id"):
            value = getattr(self, field)
            if value is not None:
                check_text(field, value)
                parameters[DIGEST_COLUMNS[field]] = digest(field, value, scope)
        if self.expired is not None:
            parameters["now"] = int(time() * 1000)
        return parameters


_ALL = _Filters(None, None, None)


class Rekeyed(NamedTuple):
    """What `SyncTokenRepository.rekey` has done with one batch.

    Attributes:
        last: The id after which to go on, or ``None`` where no tokens are left.
        number: How many tokens were encrypted anew. A driver that does not tell, as asyncpg,
            counts those among them that were saved meanwhile.
        undecryptable: Why others were left as they are.
    """

    last: str | None
    number: int
    undecryptable: list[UndecryptableTokenError]


def _operation(
    method: Callable[Concatenate[SyncTokenRepository, P], T],
) -> Callable[Concatenate[SyncTokenRepository, P], T]:
    """Make a method raise this package's errors, with nothing of a secret behind them (rule G3).

    No other error is chained, and no frame kept whose local variables a traceback might show.
    """

    @wraps(method)
    def operation(self: SyncTokenRepository, /, *args: P.args, **kwargs: P.kwargs) -> T:
        failure: ZohoOrmStoreError
        try:
            self._flush()
            self._check_revision()
            return method(self, *args, **kwargs)
        except ZohoOrmStoreError as error:
            failure = error.with_traceback(None)
        except Exception as error:
            if not is_database_error(error):
                raise
            failure = failure_of(error)
            if isinstance(failure, SchemaError):
                failure = self._explained(failure)
        del args, kwargs
        raise failure

    return operation


class SyncTokenRepository:
    """Stored tokens, through a session or a connection of the caller's.

    Every method works inside the transaction that the session or connection is in, or begins one
    as SQLAlchemy does, and leaves committing to the caller. A `DatabaseError` that is
    ``retryable`` asks the caller to roll back and to run the whole transaction again.

    Args:
        session: A ``Session``, or a ``Connection``, which is twice as fast for a lookup.
        model: The model whose table holds the tokens.
        scope: Columns that the model adds, and their values, such as ``{"tenant_id": 7}``: only
            rows with these values are found, listed, changed or deleted, and new rows get them.
        cipher: What encrypts the secrets in the table; ``None`` keeps them as plain text. Rows of
            both kinds may stand side by side.

    Raises:
        ConfigurationError: The model lacks something, the scope does not fit it, or what is given
            for a cipher is none.
    """

    @without_frames
    def __init__(
        self,
        session: Session | Connection,
        *,
        model: type[StoredTokenMixin] = StoredToken,
        scope: Mapping[str, object] | None = None,
        cipher: TokenCipher | None = None,
    ) -> None:
        self._session = session
        self._model = model
        self._table = token_table(model, scope or ())
        self._scope = scope_of(self._table, scope)
        self._vault = Vault(cipher, self._scope.parts)

    @_operation
    def get(self, id: str) -> TokenRecord | None:  # noqa: A002 - the SDK's name for it
        """Find the token with an id (rule B1).

        Args:
            id: The id, compared byte for byte.

        Returns:
            The stored token, or ``None`` where there is none.
        """
        check_text("id", id)
        if not storable("id", id):
            return None
        return self._one(self._statements.by_id, {"row_id": id})

    @_operation
    def find(self, asked: TokenRecord) -> TokenRecord | None:
        """Find the stored token that another token means (rules B1 to B9).

        Args:
            asked: What is known of the token. With an id, the id alone decides.

        Returns:
            The stored token as it is, or ``None``.
        """
        _check_record(asked)
        asked.check_types()
        return self._match(asked, rungs_to_find(asked))

    @_operation
    def save(self, asked: TokenRecord, *, seen: TokenRecord | None = None) -> TokenRecord:
        """Save a token: into the row it means, or into a new one (rules E1 to E7).

        Args:
            asked: What is known of the token; unknown values leave what is stored.
            seen: The token as it was before the caller refreshed it, without a lock or a lease.
                If another one has saved a live access token since, that is kept.

        Returns:
            The row as it is now, with its id.

        Raises:
            InvalidTokenError: The token cannot be stored as it is, or has no credential.
            UserMismatchError: Its id is that of another user's row.
            DatabaseError: The database refused or lost the operation.
        """
        _check_record(asked)
        asked.check_storable()
        if self._statements.begin_write is not None:
            self._connection().execute(self._statements.begin_write)
        stored = self._lock_match(asked)
        if stored is None:
            new = self._insert(asked)
            stored = self._one(self._statements.by_identity, {"identity": self._identity(new)})
            if stored is None:
                raise _changed_meanwhile()
            if not hits(Rung.IDENTITY, new, stored):
                raise DatabaseError(
                    f"The row with id {stored.id!r} holds the identity of the token that is being "
                    "saved, and is another one: it was changed by other means than this package. "
                    f"Restore it from a backup, or delete it (zoho-orm-store delete {stored.id!r})."
                )
            if stored.id == new.id:
                return stored
        if seen is not None:
            asked = without_overtaken_pair(asked, stored, seen, int(time() * 1000))
        saved = self._update(stored, asked)
        self._expire_loaded()
        return saved

    @_operation
    def delete(self, id: str) -> bool:  # noqa: A002 - the SDK's name for it
        """Remove the row with an id, and no other (rule F1).

        Args:
            id: The id, whatever characters it holds.

        Returns:
            Whether there was such a row.
        """
        check_text("id", id)
        if not storable("id", id):
            return False
        deleted = self._execute(self._statements.delete, {"row_id": id}).rowcount
        self._expire_loaded()
        return deleted > 0

    @_operation
    def delete_all(self) -> int:
        """Remove every stored token in one statement (rule F2).

        Returns:
            How many there were.
        """
        deleted = self._execute(self._statements.delete_all).rowcount
        self._expire_loaded()
        return deleted

    @_operation
    def list(
        self,
        *,
        user_name: str | None = None,
        client_id: str | None = None,
        expired: bool | None = None,
        on_undecryptable: OnUndecryptable | None = None,
    ) -> Records:
        """Return stored tokens, oldest first (rule F3).

        Args:
            user_name: Only this user's.
            client_id: Only this client's.
            expired: Only those whose access token has ended, or only the others.
            on_undecryptable: Called with the error for each token that no key opens; the others
                are returned. ``None`` raises the first such error.

        Raises:
            UndecryptableTokenError: No key opens one of the tokens.
        """
        rows = self._rows(_Filters(user_name, client_id, expired))
        return [*_readable(map(self._opened, rows), on_undecryptable)]

    @_operation
    def _oldest_first(self) -> Iterator[TokenRecord]:
        """Every token, not all of them in memory as rows and as records at once."""
        return map(self._vault.opened, self._rows(_ALL))

    def _rows(self, wanted: _Filters) -> CursorResult[Any]:
        statement = self._statements.listing(*wanted.shape)
        return self._execute(statement, wanted.parameters(self._scope))

    def _opened(self, row: Sequence[Any]) -> TokenRecord | UndecryptableTokenError:
        try:
            return self._vault.opened(row)
        except UndecryptableTokenError as error:
            return error.with_traceback(None)

    def _opened_as_ours(self, row: Row[Any]) -> TokenRecord | UndecryptableTokenError:
        """The record of a row of this scope, to whose place it may be bound anew."""
        opened = self._opened(row[: len(RECORD_COLUMNS)])
        if isinstance(opened, TokenRecord) and self._identity(opened) != row.identity:
            return misplaced(opened)
        return opened

    def stream(
        self,
        *,
        user_name: str | None = None,
        client_id: str | None = None,
        expired: bool | None = None,
        on_undecryptable: OnUndecryptable | None = None,
    ) -> Iterator[TokenRecord]:
        """Yield stored tokens in the order of their ids, without holding them all in memory.

        The arguments are those of `list`.
        """
        wanted = _Filters(user_name, client_id, expired)
        after: str | None = ""
        while page := self._page(after, wanted):
            yield from _readable(page, on_undecryptable)
            after = page[-1].id

    @_operation
    def _page(self, after: str | None, wanted: _Filters) -> _Listed:
        """The next tokens of a `stream`, after the one whose id is given; at first ``""``."""
        rows = self._execute(
            self._statements.listing(*wanted.shape, page=True),
            wanted.parameters(self._scope) | {"after": after, "limit": _PAGE},
        )
        return [*map(self._opened, rows)]

    @_operation
    def count(
        self,
        *,
        user_name: str | None = None,
        client_id: str | None = None,
        expired: bool | None = None,
    ) -> int:
        """Count stored tokens. The filters are those of `list`."""
        wanted = _Filters(user_name, client_id, expired)
        result = self._execute(
            self._statements.count(*wanted.shape), wanted.parameters(self._scope)
        )
        return int(result.scalar_one())

    @_operation
    def purge(self, *, idle: timedelta | None = None, stranded: bool = False) -> int:
        """Remove stored tokens that are of no more use, in one statement.

        Args:
            idle: Those that were not saved for so long. A token in use is saved when it is
                refreshed, at the latest an hour after its last use.
            stranded: Those whose access token has ended, and that have no refresh token.

        Returns:
            How many there were.

        Raises:
            ConfigurationError: Neither is asked for, or ``idle`` is negative.
        """
        if idle is None and not stranded:
            raise ConfigurationError("Say what to purge: idle tokens, stranded ones, or both.")
        if idle is not None and idle < timedelta(0):
            raise ConfigurationError("idle must not be negative.")
        parameters: dict[str, object] = {"now": int(time() * 1000)} if stranded else {}
        if idle is not None:
            parameters["saved_before"] = utc_now() - idle
        statement = self._statements.purge(idle=idle is not None, stranded=stranded)
        deleted = self._execute(statement, parameters).rowcount
        self._expire_loaded()
        return deleted

    @_operation
    def rekey(self, *, after: str = "", limit: int = 100) -> Rekeyed:
        """Encrypt one batch of tokens anew, under the key that the cipher uses now.

        Tokens that are under it already are passed over. A token that is saved meanwhile is left
        as it was saved. Commit after each batch, and go on after its ``last`` id.

        Args:
            after: The id after which to go on; at first ``""``.
            limit: The most tokens of a batch.

        Returns:
            What was done, and where to go on.

        Raises:
            CipherError: The cipher failed.
            DatabaseError: The database refused or lost the operation.
        """
        if self._statements.begin_write is not None:
            self._connection().execute(self._statements.begin_write)
        statement = self._statements.stale(plain=self._vault.prefix is None)
        parameters = self._staleness() | {"after": after, "limit": limit}
        found = self._execute(statement, parameters).all()
        opened = [(row, self._opened_as_ours(row)) for row in found]
        undecryptable = [each for _, each in opened if isinstance(each, UndecryptableTokenError)]
        changes = [
            self._vault.sealed(record) | self._statements.seen(row) | scope_parameters(self._scope)
            for row, record in opened
            if isinstance(record, TokenRecord)
        ]
        number = len(changes)
        if changes:
            updated = self._connection().execute(self._statements.rekey, changes)
            if updated.supports_sane_multi_rowcount():
                number = updated.rowcount
            self._expire_loaded()
        last = found[-1].id if found else None
        return Rekeyed(last, number, undecryptable)

    @_operation
    def count_stale(self) -> int:
        """Count the tokens that are not under the key that the cipher uses now.

        With a cipher that only decrypts: those that are encrypted.
        """
        statement = self._statements.count_stale(plain=self._vault.prefix is None)
        return int(self._execute(statement, self._staleness()).scalar_one())

    @_operation
    def count_by_key(self) -> dict[str | None, int]:
        """Count the tokens under each key, by its id.

        ``None`` stands for plain text, and ``""`` for what is garbled and names no key. A token
        with secrets under several keys counts for each of them.
        """
        counted: Counter[str | None] = Counter()
        for row in self._execute(self._statements.keys):
            counted.update({key_of(value) for value in row if value})
        return dict(counted)

    def _staleness(self) -> dict[str, object]:
        """The parameters that tell which tokens are not under the present key."""
        prefix = self._vault.prefix
        return {} if prefix is None else {"prefix": prefix, "length": len(prefix)}

    def _match(self, asked: TokenRecord, rungs: Sequence[Rung]) -> TokenRecord | None:
        for rung in rungs:
            stored = self._hit(rung, asked)
            # Digests that some other tool left stale must not hand out the wrong token.
            if stored is not None and hits(rung, asked, stored):
                return stored
        return None

    def _hit(self, rung: Rung, asked: TokenRecord) -> TokenRecord | None:
        if rung is Rung.ID:
            return self.get(asked.id or "")
        statement = self._statements.by_rung(
            rung, user=asked.user_name is not None, client=asked.client_id is not None
        )
        parameters: dict[str, object] = {
            column: digest(field, value, self._scope)
            for field, column in DIGEST_COLUMNS.items()
            if (value := getattr(asked, field)) is not None
        }
        if rung is Rung.IDENTITY:
            parameters["identities"] = digests_met(asked, self._scope)
        return self._one(statement, parameters)

    def _lock_match(self, asked: TokenRecord) -> TokenRecord | None:
        """The row that a save is to update, locked until the transaction ends."""
        rungs = rungs_to_save(asked)
        stored = self._match(asked, rungs)
        if stored is None or self._statements.begin_write is not None:
            return stored
        locked = self._one(self._statements.lock, {"row_id": stored.id})
        if locked is None or not any(hits(rung, asked, locked) for rung in rungs):
            raise _changed_meanwhile()
        return locked

    def _insert(self, asked: TokenRecord) -> TokenRecord:
        """Insert the asked token as a row of its own, unless one of its identity is there."""
        check_credentials(asked)
        now, connection = utc_now(), self._connection()
        new = replace(asked, id=self._id_for(asked), created_at=now, updated_at=now)
        statement = self._statements.insert_unless_present
        values = self._values(new) | dict(self._scope.values)
        if not self._statements.insert_may_raise:
            connection.execute(statement, values)
        else:
            with suppress(exc.IntegrityError), connection.begin_nested():
                connection.execute(statement, values)
        return new

    def _id_for(self, asked: TokenRecord) -> str:
        """The id of a new row: the token's own, unless that is another tenant's (rule E2)."""
        if asked.id and self._scope.values:
            takes_id = self._statements.takes_id
            if self._connection().execute(takes_id, {"row_id": asked.id}).first() is not None:
                return uuid4().hex
        return asked.id or uuid4().hex

    def _update(self, stored: TokenRecord, asked: TokenRecord) -> TokenRecord:
        """Write what the asked token knows into its locked row (rules E1, E4, E5)."""
        saved, removed = update_of(stored, asked, self._find_absorbed)
        for id_ in removed:
            self._execute(self._statements.delete, {"row_id": id_})
        saved = replace(saved, updated_at=utc_now())
        updated = self._execute(self._statements.update, self._values(saved) | {"row_id": saved.id})
        if updated.rowcount == 0:
            raise _changed_meanwhile()
        return saved

    def _find_absorbed(self, saved: TokenRecord) -> Records:
        parameters = digests_of(saved, self._scope) | {"row_id": saved.id}
        found = self._execute(self._statements.absorbed, parameters)
        return [record for record in map(self._vault.opened, found) if is_absorbed(record, saved)]

    def _one(self, statement: Select[Any], parameters: dict[str, object]) -> TokenRecord | None:
        row = self._execute(statement, parameters).first()
        return None if row is None else self._vault.opened(row)

    def _execute(
        self, statement: Executable, parameters: Mapping[str, object] | None = None
    ) -> CursorResult[Any]:
        """Run a statement that reads or changes rows, within the scope."""
        return self._connection().execute(
            statement, {**(parameters or {}), **scope_parameters(self._scope)}
        )

    def _values(self, record: TokenRecord) -> dict[str, object]:
        values: dict[str, object] = {name: getattr(record, name) for name in RECORD_COLUMNS}
        return values | self._vault.sealed(record) | digests_of(record, self._scope)

    def _identity(self, record: TokenRecord) -> str:
        return identity_digest(identity_of(record), self._scope)

    def _check_revision(self) -> None:
        """Refuse tables of another revision, at the first use of an engine (rule G2).

        Tables of a project's own migrations have no revision to read.
        """
        if self._model is not StoredToken or self._bind.engine in _checked:
            return
        connection, found = self._connection(), None
        # On PostgreSQL a failure would end the application's transaction.
        is_fragile = connection.dialect.name == "postgresql" and not is_in_autocommit(connection)
        try:
            with connection.begin_nested() if is_fragile else nullcontext():
                found = connection.scalar(REVISION)
        except exc.DBAPIError as error:
            if not isinstance(failure_of(error), SchemaError):
                raise
        if found not in (None, NEWEST_REVISION):
            raise SchemaError(describe(shown(self._bind.engine.url), found))
        _checked.add(self._bind.engine)

    def _explained(self, error: SchemaError) -> SchemaError:
        """The schema's error with the command that mends it (rule G2)."""
        mend = f"zoho-orm-store upgrade --url '{shown(self._bind.engine.url)}'"
        if self._model is not StoredToken:
            mend = "your project's migrations"
        return SchemaError(
            f"The table {self._table.name!r} is missing or of another version than this package. "
            f"Run: {mend}. {error.reported}",
            reported=error.reported,
        )

    def _flush(self) -> None:
        """Write first what the application's session holds back, as its own queries do."""
        if isinstance(self._session, Session) and self._session.autoflush:
            self._session.flush()

    def _connection(self) -> Connection:
        if not isinstance(self._session, Session):
            return self._session
        try:
            return self._session.connection(bind_arguments={"mapper": self._model})
        except Exception as error:  # noqa: BLE001 - drivers raise whatever they like here
            failure = connect_failure_of(error, self._bind.engine.url)
        raise failure

    @property
    def _bind(self) -> Engine | Connection:
        if isinstance(self._session, Session):
            return self._session.get_bind(self._model)
        return self._session

    @property
    def _statements(self) -> Statements:
        return statements_for(self._table, self._bind.dialect.name, self._scope.columns)

    def _expire_loaded(self) -> None:
        """Let the session load anew what it holds of the table, which changed beneath it."""
        if isinstance(self._session, Session):
            for loaded in self._session.identity_map.values():
                if isinstance(loaded, self._model):
                    self._session.expire(loaded)


class TokenRepository:
    """Stored tokens, through an async session or an async connection of the caller's.

    The methods are those of `SyncTokenRepository`, to be awaited, and work inside the caller's
    transaction in the same way.

    Args:
        session: An ``AsyncSession`` or an ``AsyncConnection``.
        model: The model whose table holds the tokens.
        scope: What fences off a tenant's tokens; see `SyncTokenRepository`.
        cipher: What encrypts the secrets in the table; see `SyncTokenRepository`.

    Raises:
        ConfigurationError: The model lacks something, the scope does not fit it, or what is given
            for a cipher is none.
    """

    @without_frames
    def __init__(
        self,
        session: AsyncSession | AsyncConnection,
        *,
        model: type[StoredTokenMixin] = StoredToken,
        scope: Mapping[str, object] | None = None,
        cipher: TokenCipher | None = None,
    ) -> None:
        scope_of(token_table(model, scope or ()), scope)
        check_cipher(cipher)
        self._session = session
        self._options: dict[str, Any] = {
            "model": model,
            "scope": scope and dict(scope),
            "cipher": cipher,
        }

    async def get(self, id: str) -> TokenRecord | None:  # noqa: A002 - the SDK's name for it
        """Find the token with an id. See `SyncTokenRepository.get`."""
        return await self._run(SyncTokenRepository.get, id)

    async def find(self, asked: TokenRecord) -> TokenRecord | None:
        """Find the stored token that another token means. See `SyncTokenRepository.find`."""
        return await self._run(SyncTokenRepository.find, asked)

    async def save(self, asked: TokenRecord, *, seen: TokenRecord | None = None) -> TokenRecord:
        """Save a token. See `SyncTokenRepository.save`."""
        return await self._run(SyncTokenRepository.save, asked, seen=seen)

    async def delete(self, id: str) -> bool:  # noqa: A002 - the SDK's name for it
        """Remove the row with an id. See `SyncTokenRepository.delete`."""
        return await self._run(SyncTokenRepository.delete, id)

    async def delete_all(self) -> int:
        """Remove every stored token. See `SyncTokenRepository.delete_all`."""
        return await self._run(SyncTokenRepository.delete_all)

    async def list(
        self,
        *,
        user_name: str | None = None,
        client_id: str | None = None,
        expired: bool | None = None,
        on_undecryptable: OnUndecryptable | None = None,
    ) -> Records:
        """Return stored tokens, oldest first. See `SyncTokenRepository.list`."""
        return await self._run(
            SyncTokenRepository.list,
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
        """Yield stored tokens in the order of their ids. See `SyncTokenRepository.stream`."""
        wanted = _Filters(user_name, client_id, expired)
        after: str | None = ""
        while page := await self._run(SyncTokenRepository._page, after, wanted):
            for record in _readable(page, on_undecryptable):
                yield record
            after = page[-1].id

    async def count(
        self,
        *,
        user_name: str | None = None,
        client_id: str | None = None,
        expired: bool | None = None,
    ) -> int:
        """Count stored tokens. See `SyncTokenRepository.count`."""
        return await self._run(
            SyncTokenRepository.count, user_name=user_name, client_id=client_id, expired=expired
        )

    async def purge(self, *, idle: timedelta | None = None, stranded: bool = False) -> int:
        """Remove stored tokens that are of no more use. See `SyncTokenRepository.purge`."""
        return await self._run(SyncTokenRepository.purge, idle=idle, stranded=stranded)

    async def rekey(self, *, after: str = "", limit: int = 100) -> Rekeyed:
        """Encrypt one batch of tokens anew. See `SyncTokenRepository.rekey`."""
        return await self._run(SyncTokenRepository.rekey, after=after, limit=limit)

    async def count_stale(self) -> int:
        """Count the tokens not under the present key. See `SyncTokenRepository.count_stale`."""
        return await self._run(SyncTokenRepository.count_stale)

    async def count_by_key(self) -> dict[str | None, int]:
        """Count the tokens under each key. See `SyncTokenRepository.count_by_key`."""
        return await self._run(SyncTokenRepository.count_by_key)

    async def _run(
        self,
        operation: Callable[Concatenate[SyncTokenRepository, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        def run(session: Session | Connection) -> T:
            return operation(SyncTokenRepository(session, **self._options), *args, **kwargs)

        return await self._session.run_sync(run)


def _readable(
    listed: Iterable[TokenRecord | UndecryptableTokenError], skip: OnUndecryptable | None
) -> Iterator[TokenRecord]:
    for each in listed:
        if isinstance(each, TokenRecord):
            yield each
        elif skip is None:
            raise each
        else:
            skip(each)


def _check_record(asked: object) -> None:
    if not isinstance(asked, TokenRecord):
        raise InvalidTokenError(f"The token must be a TokenRecord, not {type(asked).__name__}.")


def _changed_meanwhile() -> DatabaseError:
    return DatabaseError(
        "The token's row was changed by another writer while it was being saved. "
        "Roll the transaction back and run it again.",
        retryable=True,
    )
