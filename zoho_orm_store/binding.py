"""From a URL or an engine to something that runs a piece of work in a transaction.

With retries, a time limit, and the care that threads, event loops and forks ask for (rules H1 to
H3). A synchronous engine is used directly, an asynchronous one through a `LoopThread`.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from contextlib import nullcontext
from itertools import count
from threading import RLock
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from sqlalchemy import Engine, create_engine, exc, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, QueuePool, StaticPool

from zoho_orm_store.dialects import (
    AUTOCOMMIT_READS,
    EXTRAS,
    connect_args,
    connect_failure_of,
    failure_of,
    is_database_error,
    is_memory,
)
from zoho_orm_store.errors import (
    ConfigurationError,
    DatabaseError,
    DatabaseTimeoutError,
    MissingDependencyError,
    StoreClosedError,
)
from zoho_orm_store.forks import Gate, tell_forked_children
from zoho_orm_store.loop import LoopThread
from zoho_orm_store.statements import begin_immediate, limit_waiting

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import URL, Connection, Pool

__all__ = ["Bind", "Binding", "bind_to"]

T = TypeVar("T")

Bind: TypeAlias = "str | URL | Engine | AsyncEngine"

_FIRST_PAUSE = 0.005
_LONGEST_PAUSE = 0.25
_LONGEST_CONNECT = 10.0

_inherited: list[object] = []
"""Pools of a parent process. Finalizing one here would close the parent's connections."""


def bind_to(bind: Bind, *, timeout: float | None = None, retry_for: float | None = None) -> Binding:
    """Bind to a database, without connecting to it.

    Args:
        bind: A URL, for which an engine is made and owned, or an engine, which is only used.
        timeout: Seconds that one piece of work may take in all; ``None`` sets no limit.
        retry_for: Seconds in which work is tried again; the timeout, if not given.

    Raises:
        ConfigurationError: The URL or the engine cannot be used; the message says why.
        MissingDependencyError: The URL's driver is not installed.
    """
    if isinstance(bind, Engine):
        return SyncBinding(bind, timeout, retry_for, owned=False)
    if isinstance(bind, AsyncEngine):
        return AsyncBinding(_clone_async(bind), timeout, retry_for)
    engine = _engine_for(_parse(bind), timeout)
    if isinstance(engine, AsyncEngine):
        return AsyncBinding(engine, timeout, retry_for)
    return SyncBinding(engine, timeout, retry_for, owned=True)


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
        self, engine: Engine, timeout: float | None, retry_for: float | None, *, owned: bool
    ) -> None:
        super().__init__(engine.url, timeout, retry_for)
        self._owned = owned
        self._use(engine)

    def _use(self, engine: Engine) -> None:
        self._engine = engine
        self._reading_engine = _reading(engine)
        # One connection for all threads: their transactions must not run into each other.
        self._turn = RLock() if isinstance(engine.pool, StaticPool) else None

    def close(self) -> None:
        self._closed = True
        if self._owned:
            self._engine.dispose()

    def _forked(self) -> None:
        pool = self._engine.pool
        _inherited.append(pool)
        if self._owned:
            self._engine.dispose(close=False)
        else:
            self._engine, self._owned = _clone(self._engine, pool), True
        self._use(self._engine)

    def _attempt(
        self, work: Callable[[Connection], T], remaining: float | None, *, writes: bool
    ) -> T:
        if self._turn is None:
            return self._connect_and_run(work, remaining, writes=writes)
        with self._turn:
            return self._connect_and_run(work, remaining, writes=writes)

    def _connect_and_run(
        self, work: Callable[[Connection], T], remaining: float | None, *, writes: bool
    ) -> T:
        engine = self._engine if writes else self._reading_engine
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

    def __init__(self, engine: AsyncEngine, timeout: float | None, retry_for: float | None) -> None:
        super().__init__(engine.url, timeout, retry_for)
        self._engine = engine
        self._reading_engine = AsyncEngine(_reading(engine.sync_engine))
        self._loop_thread = LoopThread()

    def close(self) -> None:
        self._closed = True
        self._loop_thread.run(self._engine.dispose(), timeout=None)
        self._loop_thread.stop()

    def _forked(self) -> None:
        _inherited.append(self._engine.sync_engine.pool)
        self._engine.sync_engine.dispose(close=False)
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
        engine = self._engine if writes else self._reading_engine
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
    dialect = connection.dialect
    if dialect.name == "sqlite":
        return
    dbapi_connection = connection.connection.dbapi_connection
    if dbapi_connection is not None and dialect.detect_autocommit_setting(dbapi_connection):
        connection.execution_options(isolation_level=connection.default_isolation_level)


def _prepare_to_write(connection: Connection, remaining: float | None) -> None:
    if connection.dialect.name == "sqlite":
        if not getattr(connection.connection.driver_connection, "in_transaction", False):
            connection.execute(begin_immediate())
    elif remaining is not None:
        limit = limit_waiting(connection.dialect.name, remaining)
        if limit is not None:
            connection.execute(limit)


def _reading(engine: Engine) -> Engine:
    if engine.dialect.name not in AUTOCOMMIT_READS:
        return engine
    return engine.execution_options(isolation_level="AUTOCOMMIT")


def _parse(bind: object) -> URL:
    try:
        return make_url(bind)  # type: ignore[arg-type]  # refuses what is no URL
    except (exc.ArgumentError, ValueError):  # whose texts may hold a password
        given = "text that is none" if isinstance(bind, str) else type(bind).__name__
    raise ConfigurationError(
        "The database must be a URL such as 'sqlite:///zohooauth.db' or "
        f"'postgresql+psycopg://user:password@host:5432/name', or an engine; not {given}."
    )


def _engine_for(url: URL, timeout: float | None) -> Engine | AsyncEngine:
    try:
        dialect = url.get_dialect()
        make_engine = create_async_engine if dialect.is_async else create_engine
        return make_engine(url, **_engine_options(url, dialect.driver, timeout))
    except exc.NoSuchModuleError:
        problem: ConfigurationError = ConfigurationError(
            f"SQLAlchemy knows no database driver {url.drivername!r}. Use for example "
            "'sqlite://', 'postgresql+psycopg://' or 'mysql+pymysql://'."
        )
    except ModuleNotFoundError as error:
        package = error.name or dialect.driver
        problem = _missing_driver(package, url)
    except exc.ArgumentError as error:
        problem = ConfigurationError(f"The database URL cannot be used: {error}")
    raise problem


def _missing_driver(package: str, url: URL) -> ConfigurationError:
    if package in EXTRAS:
        return MissingDependencyError(package, EXTRAS[package])
    return ConfigurationError(
        f"The database driver of {url.drivername!r} needs the package {package!r}, "
        "which is not installed."
    )


def _engine_options(url: URL, driver: str, timeout: float | None) -> dict[str, Any]:
    limit = _LONGEST_CONNECT if timeout is None else timeout
    arguments = connect_args(url, driver, limit)
    options: dict[str, Any] = {"connect_args": arguments, "hide_parameters": True}
    if is_memory(url):
        # The database is its one connection, which the threads take in turns.
        is_async = driver == "aiosqlite"
        arguments["check_same_thread"] = False
        options |= {
            "poolclass": AsyncAdaptedQueuePool if is_async else QueuePool,
            "pool_size": 1,
            "max_overflow": 0,
        }
    return options | {"pool_timeout": limit}


def _clone(engine: Engine, pool: Pool) -> Engine:
    """The same engine with a pool of its own, of the same class and size."""
    return create_engine(
        engine.url,
        pool=pool.recreate(),
        hide_parameters=True,
        execution_options=engine.get_execution_options(),
    )


def _clone_async(engine: AsyncEngine) -> AsyncEngine:
    """The same engine with a pool of its own, since a pool belongs to one event loop."""
    if is_memory(engine.url):
        raise ConfigurationError(
            "An AsyncEngine on an in-memory SQLite database cannot be shared with the store's "
            "event loop, where the database would be another, empty one. Pass the URL "
            "'sqlite+aiosqlite:///:memory:' for a private database, or use a file."
        )
    return create_async_engine(
        engine.url,
        pool=engine.sync_engine.pool.recreate(),
        hide_parameters=True,
        execution_options=engine.get_execution_options(),
    )
