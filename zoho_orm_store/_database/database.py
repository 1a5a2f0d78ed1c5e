"""A database that work can be run on, made of a URL or an engine.

Work is a function that takes a connection. It runs in a transaction, with retries, a time limit,
and the care that threads, event loops and forks ask for. A synchronous engine is used directly, an
asynchronous one through a `LoopThread`.
"""

from __future__ import annotations

import asyncio
import random
import time
from abc import ABC, abstractmethod
from contextlib import contextmanager, nullcontext, suppress
from itertools import count
from threading import Lock
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.pool import StaticPool
from typing_extensions import TypeVarTuple, Unpack

from zoho_orm_store._database.engines import engines_for
from zoho_orm_store._database.errors import connect_error, is_driver_error, translate
from zoho_orm_store._database.forks import hold_while_forking, tell_forked_children
from zoho_orm_store._database.loop import LoopThread
from zoho_orm_store._sql.dialects import leave_autocommit, prepare_to_write
from zoho_orm_store.errors import DatabaseError, DatabaseTimeoutError, StoreClosedError

if TYPE_CHECKING:
    from _thread import LockType
    from collections.abc import Callable, Coroutine, Iterator
    from contextlib import AbstractContextManager

    from sqlalchemy import RootTransaction
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from zoho_orm_store._database.engines import Bind, Engines

__all__ = ["Database", "open_database"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_FIRST_PAUSE = 0.005
_LONGEST_PAUSE = 0.25


def open_database(
    bind: Bind, *, timeout: float | None = None, retry_for: float | None = None
) -> Database:
    """Make a database of a URL or an engine, without connecting to it.

    Args:
        bind: A URL, for which engines are made and owned, or an engine, which is only used.
        timeout: Seconds that one piece of work may take in all; ``None`` sets no limit.
        retry_for: Seconds in which work is tried again; ``None`` stands for the timeout.

    Raises:
        ConfigurationError: The URL or the engine cannot be used; the message says why.
        MissingDependencyError: The URL's driver is not installed.
    """
    engines = engines_for(bind, timeout)
    if isinstance(engines.writing, Engine):
        return _SyncDatabase(engines, timeout, retry_for)
    return _AsyncDatabase(engines, timeout, retry_for)


class Database(ABC):
    """Runs work on a connection, in transactions that are tried again as a whole."""

    def __init__(
        self, engine: Engine | AsyncEngine, timeout: float | None, retry_for: float | None
    ) -> None:
        self.url = engine.url
        self._has_one_connection = isinstance(engine.pool, StaticPool)
        self._timeout = timeout
        self._retry_for = timeout if retry_for is None else retry_for
        self._closed = False
        self._make_turns()
        tell_forked_children(self)

    @property
    def dialect_name(self) -> str:
        """SQLAlchemy's name of the dialect."""
        return self.url.get_backend_name()

    def read(self, work: Callable[[Connection, Unpack[Ts]], T], *args: Unpack[Ts]) -> T:
        """Run work that only reads, and return its result.

        Args:
            work: A function of a connection and of ``args``.
            args: More arguments of the function.

        Raises:
            DatabaseError: The database refused or lost the work.
            StoreClosedError: `close` was called.
        """
        return self._run(False, work, args)

    def write(self, work: Callable[[Connection, Unpack[Ts]], T], *args: Unpack[Ts]) -> T:
        """Run work in a transaction of its own, commit it, and return its result.

        The work may run several times, each time in a new transaction, so it must have no other
        effect. Arguments and errors are those of `read`.
        """
        return self._run(True, work, args)

    @contextmanager
    def transaction(self) -> Iterator[Callable[..., Any]]:
        """Open a transaction; commit it at the end, or roll it back after an error.

        Yields:
            A function that runs work, as `read` takes it, in the transaction.

        Raises:
            DatabaseError: The database refused or lost the transaction. It is not tried again.
            StoreClosedError: `close` was called.
        """
        if self._closed:
            raise StoreClosedError
        with self._writing_turn or nullcontext(), self._transaction() as run:
            yield self._translating(run)

    @abstractmethod
    def close(self) -> None:
        """Give back every connection and thread. An application's engine is left alone."""

    @abstractmethod
    def _attempt(
        self, writes: bool, work: Callable[..., T], args: tuple[Any, ...], remaining: float | None
    ) -> T: ...

    @abstractmethod
    def _transaction(self) -> AbstractContextManager[Callable[..., Any]]: ...

    def _run(self, writes: bool, work: Callable[..., T], args: tuple[Any, ...]) -> T:
        if self._closed:
            raise StoreClosedError
        started, remaining = monotonic(), self._timeout
        for attempt in count():
            turn = self._writing_turn if writes else self._reading_turn
            if turn and not turn.acquire(timeout=-1 if remaining is None else max(0, remaining)):
                raise DatabaseTimeoutError("Other threads kept the database busy for too long.")
            try:
                return self._attempt(writes, work, args, remaining)
            except Exception as error:
                failure = translate(error, self.url)
                if failure is None:
                    raise
                if not (isinstance(failure, DatabaseError) and failure.retryable):
                    raise failure from None
            finally:
                if turn:
                    turn.release()
            time.sleep(random.uniform(0, min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**attempt)))  # noqa: S311
            elapsed = monotonic() - started
            if self._retry_for is not None and elapsed >= self._retry_for:
                break
            remaining = None if self._timeout is None else self._timeout - elapsed
        raise DatabaseTimeoutError(
            f"The operation did not succeed within {self._retry_for:g} seconds, in "
            f"{attempt + 1} attempts. The last one: {failure}"
        )

    def _make_turns(self) -> None:
        """Make the locks that threads wait for before they read, and before they write.

        A SQLite file has one writer at a time, and its readers contend for the interpreter's lock
        at every step: both are faster in turns. If an engine has one connection for all threads,
        their transactions must not run into each other.
        """
        self._reading_turn: LockType | None = None
        self._writing_turn: LockType | None = None
        if self.dialect_name == "sqlite":
            self._reading_turn = self._writing_turn = Lock()
            if not self._has_one_connection:
                self._writing_turn = Lock()
            hold_while_forking(self._reading_turn)
            hold_while_forking(self._writing_turn)

    def _forked(self) -> None:
        self._make_turns()

    def _translating(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def translating(work: Callable[..., T], *args: object) -> T:
            with self._errors_translated():
                result: T = run(work, *args)
            return result

        return translating

    @contextmanager
    def _errors_translated(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            failure = translate(error, self.url)
            if failure is None:
                raise
            raise failure from None


class _SyncDatabase(Database):
    def __init__(
        self, engines: Engines[Engine], timeout: float | None, retry_for: float | None
    ) -> None:
        super().__init__(engines.writing, timeout, retry_for)
        self._engines = engines

    def close(self) -> None:
        self._closed = True
        if self._engines.owned:
            self._engines.reading.dispose()
            self._engines.writing.dispose()

    def _forked(self) -> None:
        super()._forked()
        self._engines = self._engines.renewed()

    def _attempt(
        self, writes: bool, work: Callable[..., T], args: tuple[Any, ...], remaining: float | None
    ) -> T:
        engine = self._engines.writing if writes else self._engines.reading
        with self._connect(engine) as connection:
            return _work(connection, writes, work, args, remaining)

    @contextmanager
    def _transaction(self) -> Iterator[Callable[..., Any]]:
        with self._connect(self._engines.writing) as connection:
            with self._errors_translated():
                _begin(connection, self._timeout)
            try:
                yield lambda work, *args: work(connection, *args)
                with self._errors_translated():
                    connection.commit()
            except BaseException:
                _roll_back(connection)
                raise

    def _connect(self, engine: Engine) -> Connection:
        try:
            return engine.connect()
        except Exception as error:  # noqa: BLE001 - drivers raise anything here
            raise connect_error(error, self.url) from None


class _AsyncDatabase(Database):
    """A database behind an asynchronous engine, whose connections live on a loop thread."""

    def __init__(
        self, engines: Engines[AsyncEngine], timeout: float | None, retry_for: float | None
    ) -> None:
        super().__init__(engines.writing, timeout, retry_for)
        self._engines = engines
        self._loop_thread = LoopThread()

    def close(self) -> None:
        self._closed = True
        self._loop_thread.run(self._dispose(), timeout=None)
        self._loop_thread.stop()

    async def _dispose(self) -> None:
        await self._engines.reading.dispose()
        await self._engines.writing.dispose()

    def _forked(self) -> None:
        super()._forked()
        self._engines = self._engines.renewed()
        self._loop_thread.abandon()

    def _attempt(
        self, writes: bool, work: Callable[..., T], args: tuple[Any, ...], remaining: float | None
    ) -> T:
        return self._loop_thread.run(
            self._connect_and_work(writes, work, args, remaining), remaining
        )

    async def _connect_and_work(
        self, writes: bool, work: Callable[..., T], args: tuple[Any, ...], remaining: float | None
    ) -> T:
        connection = await self._connect(self._engines.writing if writes else self._engines.reading)
        try:
            return await connection.run_sync(_work, writes, work, args, remaining)
        finally:
            await connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[Callable[..., Any]]:
        connection = self._loop_thread.run(self._connect(self._engines.writing), self._timeout)
        # An operation that was given up may go on for a little while.
        one_at_a_time = asyncio.Lock()

        async def in_turn(work: Callable[..., T], *args: object) -> T:
            async with one_at_a_time:
                return await connection.run_sync(work, *args)

        async def close() -> None:
            async with one_at_a_time:
                await connection.run_sync(_roll_back)
                await connection.close()

        def run(work: Callable[..., T], *args: object) -> T:
            return self._loop_thread.run(in_turn(work, *args), self._timeout)

        try:
            with self._errors_translated():
                run(_begin, self._timeout)
            yield run
            with self._errors_translated():
                run(Connection.commit)
        finally:
            with suppress(DatabaseTimeoutError):
                self._loop_thread.run(_to_its_end(close()), self._timeout)

    async def _connect(self, engine: AsyncEngine) -> AsyncConnection:
        try:
            return await engine.connect()
        except Exception as error:  # noqa: BLE001 - drivers raise anything here
            raise connect_error(error, self.url) from None


def _work(
    connection: Connection,
    writes: bool,
    work: Callable[..., T],
    args: tuple[Any, ...],
    remaining: float | None,
) -> T:
    try:
        if not writes:
            return work(connection, *args)
        with _begin(connection, remaining):
            return work(connection, *args)
    except Exception as error:
        if is_driver_error(error):
            connection.invalidate()
        raise


async def _to_its_end(coroutine: Coroutine[object, object, None]) -> None:
    """Run a coroutine that goes on when its caller no longer waits for it."""
    await asyncio.shield(coroutine)


def _roll_back(connection: Connection) -> None:
    """End a transaction after an error. If the connection is lost, the server does the same."""
    try:
        connection.rollback()
    except Exception:  # noqa: BLE001 - drivers raise anything here
        connection.invalidate()


def _begin(connection: Connection, remaining: float | None) -> RootTransaction:
    leave_autocommit(connection)
    transaction = connection.begin()
    try:
        prepare_to_write(connection, remaining)
    except BaseException:
        transaction.rollback()
        raise
    return transaction
