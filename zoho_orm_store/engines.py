"""From a URL or an engine to the engines that a binding uses: one to read, and one to write.

Where a read outside a transaction saves round trips, the two have pools of their own, and a read
never waits behind writers that wait for locks.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from sqlalchemy import Engine, create_engine, event, exc, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, QueuePool

from zoho_orm_store.dialects import (
    AUTOCOMMIT_IS_FREE,
    AUTOCOMMIT_READS,
    BROUGHT_INSTEAD,
    EXTRAS,
    connect_args,
    is_memory,
    sqlite_file,
)
from zoho_orm_store.errors import ConfigurationError, MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy import URL
    from sqlalchemy.engine import Dialect

__all__ = ["Bind", "Engines", "engines_for"]

E = TypeVar("E", Engine, AsyncEngine)

Bind: TypeAlias = "str | URL | Engine | AsyncEngine"

_CONNECTIONS = 3
"""The most that one of our engines opens. More make no thread faster, and a server has some hundred
for all processes together."""

_KEEP_ONE = {"pool_size": 1, "max_overflow": _CONNECTIONS - 1}
"""Where reads have connections of their own: a token is written once an hour, and servers count
the connections of many workers that lie idle."""

_LONGEST_CONNECT = 10.0

_inherited: list[object] = []
"""Pools of a parent process. Finalizing one here would close the parent's connections."""


@dataclass(frozen=True)
class Engines(Generic[E]):
    """The engines of a binding, which may be one and the same.

    Attributes:
        reading: For work that only reads.
        writing: For transactions.
        owned: Whether they are ours to dispose of.
    """

    reading: E
    writing: E
    owned: bool

    def renewed(self) -> Engines[E]:
        """The same in a forked child, with new pools and no touch on the parent's."""
        _inherited.extend((self.reading.pool, self.writing.pool))
        if not self.owned:
            return _of(_clone(self.writing), owned=True)
        for engine in (self.reading, self.writing):
            _synchronous(engine).dispose(close=False)
        return self


def engines_for(bind: Bind, timeout: float | None) -> Engines[Engine] | Engines[AsyncEngine]:
    """Make or adopt engines, without connecting.

    Args:
        bind: A URL, for which engines are made, or an engine. An asynchronous one is copied,
            since its pool belongs to an event loop.
        timeout: Seconds that a connection may take.

    Raises:
        ConfigurationError: The URL or the engine cannot be used; the message says why.
        MissingDependencyError: The URL's driver is not installed.
    """
    if isinstance(bind, Engine):
        return _of(bind, owned=False)
    if isinstance(bind, AsyncEngine):
        return _of(_clone(_shareable(bind)), owned=True)
    return _made_for(_parse(bind), timeout)


def _synchronous(engine: Engine | AsyncEngine) -> Engine:
    return engine.sync_engine if isinstance(engine, AsyncEngine) else engine


def _make_private(
    dialect: Dialect, record: object, arguments: Sequence[Any], options: Mapping[str, object]
) -> None:
    """Make the file of a new SQLite database, readable by its owner alone.

    SQLite gives its journals the permissions of the file, takes an empty file for a new database,
    and follows a link to a file that is not there yet. Where there can be no file, connecting says
    why.
    """
    path = sqlite_file(str(arguments[0]))
    if path:
        with suppress(OSError):
            os.close(os.open(os.path.realpath(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


def _of(engine: E, *, owned: bool) -> Engines[E]:
    reading = engine
    if engine.dialect.name in AUTOCOMMIT_IS_FREE:
        reading = engine.execution_options(isolation_level="AUTOCOMMIT")
    return Engines(reading, engine, owned)


def _parse(bind: object) -> URL:
    try:
        return make_url(bind)  # type: ignore[arg-type]  # refuses what is no URL
    except (exc.ArgumentError, ValueError):  # whose texts may hold a password
        given = "text that is none" if isinstance(bind, str) else type(bind).__name__
    raise ConfigurationError(
        "The database must be a URL such as 'sqlite:///zohooauth.db' or "
        f"'postgresql+psycopg://user:password@host:5432/name', or an engine; not {given}."
    )


def _made_for(url: URL, timeout: float | None) -> Engines[Engine] | Engines[AsyncEngine]:
    try:
        dialect = url.get_dialect()
        options = _options(url, dialect.driver, timeout)
        make: Any = create_async_engine if dialect.is_async else create_engine
        has_two = url.get_backend_name() in AUTOCOMMIT_READS
        writing = make(url, **(options | _KEEP_ONE if has_two else options))
        if url.get_backend_name() == "sqlite":
            event.listen(_synchronous(writing), "do_connect", _make_private)
        reading = writing
        if has_two:
            options |= {"isolation_level": "AUTOCOMMIT", "skip_autocommit_rollback": True}
            reading = make(url, **options)
        return Engines(reading, writing, owned=True)
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
    except (ValueError, TypeError):  # whose texts may hold a value of the URL's query
        problem = ConfigurationError(
            "The database URL cannot be used: an option after its question mark has a value of "
            f"the wrong kind for the driver {dialect.driver}."
        )
    raise problem


def _missing_driver(package: str, url: URL) -> ConfigurationError:
    if package in EXTRAS:
        return MissingDependencyError(
            package, EXTRAS[package], instead=BROUGHT_INSTEAD.get(package, "")
        )
    return ConfigurationError(
        f"The database driver of {url.drivername!r} needs the package {package!r}, "
        "which is not installed."
    )


def _options(url: URL, driver: str, timeout: float | None) -> dict[str, Any]:
    limit = _LONGEST_CONNECT if timeout is None else timeout
    arguments = connect_args(url, driver, limit)
    options: dict[str, Any] = {
        "connect_args": arguments,
        "hide_parameters": True,
        "pool_size": _CONNECTIONS,
        "max_overflow": 0,
        "pool_timeout": limit,
    }
    if is_memory(url):
        # The database is its one connection, which the threads take in turns.
        is_async = driver == "aiosqlite"
        arguments["check_same_thread"] = False
        options |= {"poolclass": AsyncAdaptedQueuePool if is_async else QueuePool, "pool_size": 1}
    return options


def _clone(engine: E) -> E:
    """The same engine with a pool of its own, of the same class and size."""
    is_async = isinstance(engine, AsyncEngine)
    make: Any = create_async_engine if is_async else create_engine
    options = engine.get_execution_options()
    pool = engine.pool.recreate()
    clone: E = make(engine.url, pool=pool, hide_parameters=True, execution_options=options)
    return clone


def _shareable(engine: AsyncEngine) -> AsyncEngine:
    if is_memory(engine.url):
        raise ConfigurationError(
            "An AsyncEngine on an in-memory SQLite database cannot be shared with the store's "
            "event loop, where the database would be another, empty one. Pass the URL "
            "'sqlite+aiosqlite:///:memory:' for a private database, or use a file."
        )
    return engine
