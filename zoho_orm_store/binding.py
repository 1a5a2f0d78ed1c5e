"""From a URL or an engine to something that runs a piece of work in a transaction.

With retries, a time limit, and the care that threads, event loops and forks ask for (rules H1 to
H3). A synchronous engine is used directly, an asynchronous one through a `LoopThread`.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from contextlib import nullcontext
from itertools import count
from threading import Lock
from time import monotonic, sleep
from typing import TYPE_CHECKING, TypeVar

from sqlalchemy import Engine, exc
from sqlalchemy.pool import StaticPool

from zoho_orm_store.dialects import (
    connect_failure_of,
    failure_of,
    is_database_error,
    is_in_autocommit,
)
from zoho_orm_store.engines import engines_for
from zoho_orm_store.errors import (
    DatabaseError,
    DatabaseTimeoutError,
    StoreClosedError,
    without_frames,
)
from zoho_orm_store.forks import Gate, tell_forked_children
from zoho_orm_store.loop import LoopThread
from zoho_orm_store.statements import begin_immediate, limit_waiting

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import URL, Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

    from zoho_orm_store.engines import Bind, Engines

__all__ = ["Binding", "bind_to"]

T = TypeVar("T")

_FIRST_PAUSE = 0.005
_LONGEST_PAUSE = 0.25


@without_frames
def bind_to(bind: Bind, *, timeout: float | None = None, retry_for: float | None = None) -> Binding:
    """Bind to a database, without connecting to it.

    Args:
        bind: A URL, for which engines are made and owned, or an engine, which is only used.
        timeout: Seconds that one piece of work may take in all; ``None`` sets no limit.
        retry_for: Seconds in which work is tried again; the timeout, if not given.

    Raises:
        ConfigurationError: The URL or the engine cannot be used; the message says why.
        MissingDependencyError: The URL's driver is not installed.
    """
    engines = engines_for(bind, timeout)
    if isinstance(engines.writing, Engine):
        return SyncBinding(engines, timeout, retry_for)
    return AsyncBinding(engines, timeout, retry_for)


class Binding(ABC):
    """Runs work on a connection, in transactions that are retried as a whole."""

    def __init__(self, url: URL, timeout: float | None, retry_for: float | None) -> None:
        self.url = url
        self._timeout = timeout
        self._retry_for = timeout if retry_for is None else retry_for
        self._closed = False
        self._gate = Gate() if self.dialect_name == "sqlite" else nullcontext()
        tell_forked_children(self)

    def read(self, work: Callable[[Connection], T]) -> T:
        """Run work that only reads, and return its result.

        Raises:
            DatabaseError: The database refused or lost the work.
            StoreClosedError: `close` was called.
        """
        return self._run(work, writes=False)

    def write(self, work: Callable[[Connection], T]) -> T:
        """Run work in a transaction of its own, commit it, and return its result.

        The work may run several times, each time in a new transaction, and must have no other
        effect. The errors are those of `read`.
        """
        return self._run(work, writes=True)

    @property
    def dialect_name(self) -> str:
        """SQLAlchemy's name of the database's dialect."""
        return self.url.get_backend_name()

    @abstractmethod
    def close(self) -> None:
        """Give back every connection and thread; an engine of the application's is left alone."""

    @abstractmethod
    def _forked(self) -> None:
        """Start anew in a forked child, without touching what the parent goes on using."""

    @abstractmethod
    def _attempt(
        self, work: Callable[[Connection], T], remaining: float | None, *, writes: bool
    ) -> T: ...

    def _run(self, work: Callable[[Connection], T], *, writes: bool) -> T:
        if self._closed:
            raise StoreClosedError
        started = monotonic()
        for attempt in count():
            elapsed = monotonic() - started
            remaining = None if self._timeout is None else self._timeout - elapsed
            try:
                with self._gate:
                    return self._attempt(work, remaining, writes=writes)
            except DatabaseError as error:
                if not error.retryable:
                    raise
                failure = error
            sleep(random.uniform(0, min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**attempt)))  # noqa: S311
            if self._retry_for is not None and monotonic() - started >= self._retry_for:
                break
        raise DatabaseTimeoutError(
            "The database did not let the operation through within "
            f"{self._retry_for:g} seconds, in {attempt + 1} attempts. The last one: {failure}"
        )


class SyncBinding(Binding):
    """A binding to a synchronous engine."""

    def __init__(
        self, engines: Engines[Engine], timeout: float | None, retry_for: float | None
    ) -> None:
        super().__init__(engines.writing.url, timeout, retry_for)
        self._use(engines)

    def _use(self, engines: Engines[Engine]) -> None:
        self._engines = engines
        self._reading_turn, self._writing_turn = _turns(engines.writing)

    def close(self) -> None:
        self._closed = True
        if self._engines.owned:
            self._engines.reading.dispose()
            self._engines.writing.dispose()

    def _forked(self) -> None:
        self._use(self._engines.renewed())

    def _attempt(
        self, work: Callable[[Connection], T], remaining: float | None, *, writes: bool
    ) -> T:
        turn = self._writing_turn if writes else self._reading_turn
        if turn is None:
            return self._connect_and_run(work, remaining, writes=writes)
        if not turn.acquire(timeout=-1 if remaining is None else max(0, remaining)):
            raise DatabaseTimeoutError("Other threads kept the database busy for too long.")
        try:
            return self._connect_and_run(work, remaining, writes=writes)
        finally:
            turn.release()

    def _connect_and_run(
        self, work: Callable[[Connection], T], remaining: float | None, *, writes: bool
    ) -> T:
        engine = self._engines.writing if writes else self._engines.reading
        try:
            connection = engine.connect()
        except Exception as error:  # noqa: BLE001 - drivers raise whatever they like here
            failure = connect_failure_of(error, self.url)
        else:
            with connection:
                return _transact(connection, work, remaining, writes=writes)
        raise failure


class AsyncBinding(Binding):
    """A binding to an asynchronous engine of its own, which lives on a loop thread."""

    def __init__(
        self, engines: Engines[AsyncEngine], timeout: float | None, retry_for: float | None
    ) -> None:
        super().__init__(engines.writing.url, timeout, retry_for)
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
        self._engines = self._engines.renewed()
        self._loop_thread.abandon()

    def _attempt(
        self, work: Callable[[Connection], T], remaining: float | None, *, writes: bool
    ) -> T:
        return self._loop_thread.run(
            self._connect_and_run(work, remaining, writes=writes), remaining
        )

    async def _connect_and_run(
        self, work: Callable[[Connection], T], remaining: float | None, *, writes: bool
    ) -> T:
        engine = self._engines.writing if writes else self._engines.reading
        try:
            connection = await engine.connect()
        except Exception as error:  # noqa: BLE001 - drivers raise whatever they like here
            failure = connect_failure_of(error, self.url)
        else:
            try:
                return await connection.run_sync(_transact, work, remaining, writes=writes)
            finally:
                await connection.close()
        raise failure


def _transact(
    connection: Connection,
    work: Callable[[Connection], T],
    remaining: float | None,
    *,
    writes: bool,
) -> T:
    try:
        if not writes:
            return work(connection)
        _leave_autocommit(connection)
        with connection.begin():
            _prepare_to_write(connection, remaining)
            return work(connection)
    except Exception as error:
        if not is_database_error(error):
            raise
        failure = failure_of(error)
        if not isinstance(error, exc.SQLAlchemyError):
            connection.invalidate()
    raise failure


def _leave_autocommit(connection: Connection) -> None:
    """Make a transaction possible on a connection of an engine in AUTOCOMMIT (rule E6)."""
    if is_in_autocommit(connection):
        connection.execution_options(isolation_level=connection.default_isolation_level)


def _prepare_to_write(connection: Connection, remaining: float | None) -> None:
    if connection.dialect.name == "sqlite":
        if not getattr(connection.connection.driver_connection, "in_transaction", False):
            connection.execute(begin_immediate())
    elif remaining is not None:
        limit = limit_waiting(connection.dialect.name, remaining)
        if limit is not None:
            connection.execute(limit)


def _turns(engine: Engine) -> tuple[Lock | None, Lock | None]:
    """What threads wait for before they read, and before they write.

    A SQLite file has one writer at a time, and its readers would contend for the interpreter's
    lock at every step: both are faster in turns. On an engine with one connection for all
    threads, the transactions must not run into each other.
    """
    if isinstance(engine.pool, StaticPool):
        turn = Lock()
        return turn, turn
    if engine.dialect.name == "sqlite":
        return Lock(), Lock()
    return None, None
