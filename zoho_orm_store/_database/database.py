"""A database that work can be run on, made of a URL or an engine.

Work is a function that takes a connection. It runs in a transaction, with retries, a time limit,
and the care that threads, event loops and forks ask for. A synchronous engine is used directly, an
asynchronous one through a `LoopThread`.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from abc import ABC, abstractmethod
from contextlib import contextmanager, nullcontext, suppress
from itertools import count
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.pool import Pool, StaticPool
from sqlalchemy.util import greenlet_spawn
from typing_extensions import TypeVarTuple, Unpack

from zoho_orm_store._database.drivers import limit_time, refuse_under_gevent
from zoho_orm_store._database.engines import engines_for, leave_to_parent
from zoho_orm_store._database.errors import connect_error, leaves_connection_unusable, translate
from zoho_orm_store._database.forks import (
    begin_work,
    end_work,
    notice_fork,
    tell_forked_children,
)
from zoho_orm_store._database.loop import LoopThread
from zoho_orm_store._database.sqlite_file import (
    check_not_replaced,
    is_of_present_file,
    is_watched,
)
from zoho_orm_store._sql.dialects import leave_autocommit, prepare_to_write, set_busy_timeout
from zoho_orm_store.errors import (
    DatabaseError,
    DatabaseTimeoutError,
    StoreClosedError,
    ZohoOrmStoreError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Mapping
    from contextlib import AbstractContextManager

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from zoho_orm_store._database.engines import Bind, Engines

__all__ = ["Database", "open_database"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_FIRST_PAUSE = 0.005
_LONGEST_PAUSE = 0.25

_FORK_WAITS = 1.0
_FORK_WAITS_FOR_SQLITE = 10.0
"""Seconds that a fork waits for a call. A child with SQLite's lock would have it for ever."""

_WORTH_A_STATEMENT = 0.2
"""Seconds of a wait from which a read tells SQLite how much time is left."""

_TO_CLOSE = 0.3
"""Seconds that a connection has to say goodbye to the server."""

_TO_GIVE_BACK = 0.5
"""Seconds that the caller who closes a store waits for its connections."""


def open_database(
    bind: Bind,
    *,
    timeout: float | None = None,
    retry_for: float | None = None,
    pooler: bool = False,
    engine_options: Mapping[str, Any] | None = None,
) -> Database:
    """Make a database of a URL or an engine, without connecting to it.

    Args:
        bind: A URL, for which engines are made and owned, or an engine, which is only used.
        timeout: Seconds that one piece of work may take in all; ``None`` sets no limit.
        retry_for: Seconds in which work is tried again; ``None`` stands for the timeout.
        pooler: Whether a pooler in transaction mode stands before the server of a URL.
        engine_options: Keyword arguments for ``create_engine``, for a URL.

    Raises:
        ConfigurationError: The URL, the engine or an option cannot be used; the message says why.
        MissingDependencyError: The URL's driver is not installed.
    """
    engines = engines_for(bind, timeout, pooler=pooler, engine_options=engine_options)
    if isinstance(engines.writing, Engine):
        make = _ReadyDatabase if engines.stay_ready else _SyncDatabase
        return make(engines, timeout, retry_for)
    return _AsyncDatabase(engines, timeout, retry_for)


class _RehearsedError(ZohoOrmStoreError):
    """Rolls a transaction back that was only to be tried.

    Attributes:
        result: The result of the work.
    """

    def __init__(self, result: Any) -> None:  # noqa: ANN401
        super().__init__("The transaction was only rehearsed.")
        self.result = result


class Database(ABC):
    """Runs work on a connection, in transactions that are tried again as a whole."""

    def __init__(
        self, engine: Engine | AsyncEngine, timeout: float | None, retry_for: float | None
    ) -> None:
        self.url = engine.url
        self._driver = engine.dialect.driver
        self._has_one_connection = isinstance(engine.pool, StaticPool)
        self._timeout = timeout
        self._retry_for = timeout if retry_for is None else retry_for
        self._fork_waits = _FORK_WAITS
        if self.dialect_name == "sqlite":
            self._fork_waits = _FORK_WAITS_FOR_SQLITE
        self._closed = False
        self._make_turns()
        tell_forked_children(self)

    @property
    def dialect_name(self) -> str:
        """SQLAlchemy's name of the dialect."""
        return self.url.get_backend_name()

    def read(
        self,
        work: Callable[[Connection, Unpack[Ts]], T],
        *args: Unpack[Ts],
        timeout: float | None = None,
    ) -> T:
        """Run work that only reads, and return its result.

        Args:
            work: A function of a connection and of ``args``.
            args: More arguments of the function.
            timeout: Seconds that this work may take in all; ``None`` stands for those that the
                database was opened with.

        Raises:
            DatabaseError: The database refused or lost the work.
            StoreClosedError: `close` was called.
        """
        return self._run(False, work, args, timeout, None)

    def write(
        self,
        work: Callable[[Connection, Unpack[Ts]], T],
        *args: Unpack[Ts],
        timeout: float | None = None,
        retry_for: float | None = None,
    ) -> T:
        """Run work in a transaction of its own, commit it, and return its result.

        The work may run several times, each time in a new transaction, so it must have no other
        effect. A server that restarts is waited for. Arguments and errors are those of `read`.

        Args:
            work: See `read`.
            args: See `read`.
            timeout: See `read`.
            retry_for: Seconds in which this work is tried again; ``None`` stands for those that
                the database was opened with.
        """
        return self._run(True, work, args, timeout, retry_for)

    def rehearse(self, work: Callable[[Connection, Unpack[Ts]], T], *args: Unpack[Ts]) -> T:
        """Run work as `write` does, but roll it back, and return its result.

        Arguments and errors are those of `write`.
        """

        def run(connection: Connection) -> None:
            raise _RehearsedError(work(connection, *args))

        try:
            self.write(run)
        except _RehearsedError as rehearsed:
            result: T = rehearsed.result
        return result

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
        working = begin_work(self._fork_waits)
        try:
            with self._writing_turn or nullcontext(), self._transaction() as run:
                yield self._translating(run)
        finally:
            end_work(working)

    @abstractmethod
    def close(self) -> None:
        """Give back every connection and thread. An application's engine is left alone."""

    @abstractmethod
    def _attempt(
        self, writes: bool, work: Callable[..., T], args: tuple[Any, ...], remaining: float | None
    ) -> T: ...

    @abstractmethod
    def _transaction(self) -> AbstractContextManager[Callable[..., Any]]: ...

    def _run(
        self,
        writes: bool,
        work: Callable[..., T],
        args: tuple[Any, ...],
        timeout: float | None,
        retry_for: float | None,
    ) -> T:
        if self._closed:
            raise StoreClosedError
        if timeout is None:
            timeout = self._timeout
        if retry_for is None:
            retry_for = self._retry_for
        started, paused, remaining = monotonic(), 0.0, timeout
        for attempt in count():
            working = begin_work(self._fork_waits)
            turn, is_my_turn = self._writing_turn if writes else self._reading_turn, False
            try:
                if turn is not None:
                    longest = -1 if remaining is None else max(0, remaining)
                    # A signal handler may raise between a call and the assignment of its result,
                    # but not between the step of an iterator and the assignment to its variable.
                    for is_my_turn in map(turn.acquire, (True,), (longest,)):
                        if not is_my_turn:
                            raise DatabaseTimeoutError("Other threads kept the database too busy.")
                    if timeout is not None:
                        remaining = timeout - max(monotonic() - started, paused)
                        if not writes and timeout - remaining > _WORTH_A_STATEMENT:
                            late = (remaining, work, args)
                            result: T = self._attempt(False, _read_in_time, late, remaining)
                            return result
                return self._attempt(writes, work, args, remaining)
            except Exception as error:
                failure = translate(error, self.url)
                if failure is None:
                    raise
            finally:
                if turn is not None and is_my_turn:
                    turn.release()
                end_work(working)
            if not (isinstance(failure, DatabaseError) and failure.retryable):
                raise failure
            pause = random.uniform(0, min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(attempt, 10)))  # noqa: S311
            time.sleep(pause)
            paused += pause
            # A test may have stopped the clock.
            elapsed = max(monotonic() - started, paused)
            remaining = None if timeout is None else timeout - elapsed
            is_over = remaining is not None and remaining <= 0
            if is_over or (retry_for is not None and elapsed >= retry_for):
                break
        raise DatabaseTimeoutError(
            f"The operation did not succeed within {elapsed:.1f} seconds, in "
            f"{attempt + 1} attempts. The last one: {failure}"
        )

    def _make_turns(self) -> None:
        """Make the locks that threads wait for before they read, and before they write.

        A SQLite file has one writer at a time, and its readers contend for the interpreter's lock
        at every step: both are faster in turns. If an engine has one connection for all threads,
        their transactions must not run into each other.
        """
        self._reading_turn: threading.Lock | None = None
        self._writing_turn: threading.Lock | None = None
        if self.dialect_name == "sqlite":
            self._reading_turn = self._writing_turn = threading.Lock()
            if not self._has_one_connection:
                self._writing_turn = threading.Lock()

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
        notice_fork()
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
        connection = self._connect(writes)
        try:
            if self._engines.limits_time:
                limit_time(connection, remaining)
            return _work(connection, writes, work, args, remaining)
        finally:
            _give_back(connection)

    @contextmanager
    def _transaction(self) -> Iterator[Callable[..., Any]]:
        connection = self._connect(True)

        def run(work: Callable[..., T], *args: object) -> T:
            if self._engines.limits_time:
                limit_time(connection, self._timeout)
            return work(connection, *args)

        try:
            with self._errors_translated():
                run(_begin, self._timeout)
            try:
                yield run
                with self._errors_translated():
                    run(_commit)
            except BaseException as error:
                _undo(connection, error)
                raise
        finally:
            _give_back(connection)

    def _connect(self, writes: bool) -> Connection:
        engine = self._engines.writing if writes else self._engines.reading
        try:
            return engine.connect()
        except Exception as error:  # noqa: BLE001 - drivers raise anything here
            raise connect_error(error, self.url, wait_for_server=writes) from None


class _ReadyDatabase(_SyncDatabase):
    """A database of a URL, which keeps connections ready to read.

    To take one from the pool for each lookup, and to end its transaction, would take longer than
    the lookup.
    """

    def __init__(
        self, engines: Engines[Engine], timeout: float | None, retry_for: float | None
    ) -> None:
        super().__init__(engines, timeout, retry_for)
        self._ready: list[Connection] = []

    def close(self) -> None:
        super().close()
        self._close_ready()

    def _forked(self) -> None:
        super()._forked()
        leave_to_parent(*self._ready)
        self._ready = []

    def _attempt(
        self, writes: bool, work: Callable[..., T], args: tuple[Any, ...], remaining: float | None
    ) -> T:
        if writes:
            return super()._attempt(writes, work, args, remaining)
        connection: Connection | None = None
        with suppress(IndexError):
            connection = self._ready.pop()
        if connection is not None and not is_of_present_file(connection):
            _give_back(connection)
            connection = None
        connection = connection or self._connect(writes)
        try:
            if self._engines.limits_time:
                limit_time(connection, remaining)
            result = _work(connection, writes, work, args, remaining)
            is_ready = self._may_keep(connection)
        except BaseException:
            _give_back(connection)
            for other in self._taken_ready():  # The pool knows which ones are lost with it.
                _give_back(other)
            raise
        if is_ready:
            self._ready.append(connection)
        else:
            _give_back(connection)
        if self._closed:
            self._close_ready()
        return result

    def _may_keep(self, connection: Connection) -> bool:
        """Whether a connection is in no transaction, and no thread waits for it at the pool."""
        pool: Any = self._engines.reading.pool
        is_busy = getattr(connection.connection.driver_connection, "in_transaction", False)
        return not is_busy and pool.checkedout() < pool.size()

    def _taken_ready(self) -> Iterator[Connection]:
        with suppress(IndexError):
            while True:
                yield self._ready.pop()

    def _close_ready(self) -> None:
        for connection in self._taken_ready():
            connection.invalidate()  # Its pool may be disposed of, and not take it back.
            connection.close()


class _AsyncDatabase(Database):
    """A database behind an asynchronous engine, whose connections live on a loop thread."""

    def __init__(
        self, engines: Engines[AsyncEngine], timeout: float | None, retry_for: float | None
    ) -> None:
        super().__init__(engines.writing, timeout, retry_for)
        self._engines = engines
        self._loop_thread = LoopThread()

    def close(self) -> None:
        notice_fork()
        is_first, self._closed = not self._closed, True
        self._loop_thread.cancel()
        if is_first:
            with suppress(DatabaseTimeoutError, StoreClosedError):
                self._loop_thread.run(_to_its_end(self._dispose()), _TO_GIVE_BACK)
        self._loop_thread.stop()

    async def _dispose(self) -> None:
        for engine in {self._engines.reading, self._engines.writing}:
            await _close_connections(engine.sync_engine.pool)
            await engine.dispose()

    def _forked(self) -> None:
        super()._forked()
        self._engines = self._engines.renewed()
        self._loop_thread.abandon()

    def _attempt(
        self, writes: bool, work: Callable[..., T], args: tuple[Any, ...], remaining: float | None
    ) -> T:
        refuse_under_gevent(self._driver)
        try:
            return self._loop_thread.run(
                self._connect_and_work(writes, work, args, remaining), remaining
            )
        except DatabaseTimeoutError:
            self._loop_thread.begin(self._reconnect())
            raise

    async def _reconnect(self) -> None:
        """Replace the connections after one of them has fallen silent: the others may have too."""
        for engine in {self._engines.reading, self._engines.writing}:
            pool = engine.sync_engine.pool
            engine.sync_engine.dispose(close=False)
            await _close_connections(pool)

    async def _connect_and_work(
        self, writes: bool, work: Callable[..., T], args: tuple[Any, ...], remaining: float | None
    ) -> T:
        engine = (self._engines.writing if writes else self._engines.reading).sync_engine
        pool = engine.pool
        connection = await self._connect(writes)
        try:
            return await connection.run_sync(_work, writes, work, args, remaining)
        finally:
            await connection.run_sync(_give_back)
            if engine.pool is not pool:  # It was replaced meanwhile, and nobody else closes it.
                await _close_connections(pool)

    @contextmanager
    def _transaction(self) -> Iterator[Callable[..., Any]]:
        refuse_under_gevent(self._driver)
        connection = self._loop_thread.run(self._connect(True), self._timeout)
        # An operation that was given up may go on for a little while.
        one_at_a_time = asyncio.Lock()

        async def in_turn(work: Callable[..., T], *args: object) -> T:
            async with one_at_a_time:
                return await connection.run_sync(work, *args)

        def run(work: Callable[..., T], *args: object) -> T:
            return self._loop_thread.run(in_turn(work, *args), self._timeout)

        error: BaseException | None = None
        try:
            with self._errors_translated():
                run(_begin, self._timeout)
            yield run
            with self._errors_translated():
                run(_commit)
        except BaseException as raised:
            error = raised
            raise
        finally:
            with suppress(DatabaseTimeoutError, StoreClosedError):
                ending = _to_its_end(in_turn(_end, error))
                self._loop_thread.run(ending, self._timeout)

    async def _connect(self, writes: bool) -> AsyncConnection:
        engine = self._engines.writing if writes else self._engines.reading
        try:
            return await engine.connect()
        except Exception as error:  # noqa: BLE001 - drivers raise anything here
            raise connect_error(error, self.url, wait_for_server=writes) from None


def _work(
    connection: Connection,
    writes: bool,
    work: Callable[..., T],
    args: tuple[Any, ...],
    remaining: float | None,
) -> T:
    try:
        if writes:
            _begin(connection, remaining)
        result = work(connection, *args)
        if writes:
            _commit(connection)
    except BaseException as error:
        _undo(connection, error)
        raise
    return result


def _read_in_time(
    connection: Connection, remaining: float, work: Callable[..., T], args: tuple[Any, ...]
) -> T:
    """Read from SQLite after a wait for other threads, which leaves less time for its own wait."""
    if is_watched(connection):
        set_busy_timeout(connection, remaining)
    return work(connection, *args)


def _begin(connection: Connection, remaining: float | None) -> None:
    leave_autocommit(connection)
    connection.begin()
    prepare_to_write(connection, remaining, polls=is_watched(connection))


def _commit(connection: Connection) -> None:
    check_not_replaced(connection)
    connection.commit()


def _undo(connection: Connection, error: BaseException) -> None:
    """End a transaction after an error. If the connection is lost, the server does the same."""
    if connection.dialect.name == "sqlite" or not leaves_connection_unusable(error):
        try:
            connection.rollback()
        except Exception as failed:  # noqa: BLE001 - drivers raise anything here
            _let_out_the_applications(failed)
        else:
            return
    with suppress(Exception):
        connection.invalidate()


def _give_back(connection: Connection) -> None:
    """Return a connection to its pool. What was done on it is done, whatever happens here."""
    try:
        connection.close()
    except Exception as failed:  # noqa: BLE001 - drivers raise anything here
        with suppress(Exception):
            connection.invalidate()
            connection.close()
        _let_out_the_applications(failed)


def _end(connection: Connection, error: BaseException | None) -> None:
    if error is not None:
        _undo(connection, error)
    _give_back(connection)


def _let_out_the_applications(error: Exception) -> None:
    """Raise an exception again if it is the application's, from a signal handler perhaps."""
    failure = translate(error)
    if failure is None:
        raise error
    if not isinstance(failure, DatabaseError):
        raise failure from None


async def _close_connections(pool: Pool) -> None:
    """Close the idle connections of a pool; those that do not say goodbye in time, at once."""
    is_over = False
    while not is_over:
        try:
            await asyncio.wait_for(greenlet_spawn(pool.dispose), _TO_CLOSE)
            is_over = True
        except asyncio.TimeoutError:
            # The connection that was being closed is closed by its cancellation.
            pass


async def _to_its_end(coroutine: Coroutine[object, object, None]) -> None:
    """Run a coroutine that goes on when its caller no longer waits for it."""
    await asyncio.shield(coroutine)
