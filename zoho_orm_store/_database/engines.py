"""From a URL or an engine to the engines that a database uses: one to read, and one to write.

An application's engine is used exactly as it is, for both. On a server, a store that was given a
URL reads in autocommit, which saves round trips, on a pool of its own, so that a read never waits
behind writers that wait for locks.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from sqlalchemy import Engine, create_engine, event, exc, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, QueuePool

from zoho_orm_store._database.drivers import (
    EXTRAS,
    SUGGESTED_DRIVERS,
    connect_args,
    is_memory,
    sqlite_file,
)
from zoho_orm_store._sql.dialects import check_dialect
from zoho_orm_store.errors import ConfigurationError, MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy import URL
    from sqlalchemy.engine import Dialect

__all__ = ["Bind", "Engines", "engines_for"]

E = TypeVar("E", Engine, AsyncEngine)

Bind: TypeAlias = "str | URL | Engine | AsyncEngine"

_CONNECTIONS = 3
"""The most that one of our engines opens. More make no thread faster, and a server allows about a
hundred for all processes together."""

_KEEP_ONE = {"pool_size": 1, "max_overflow": _CONNECTIONS - 1}
"""A token is written once an hour, and a server also counts idle connections."""

_LONGEST_CONNECT = 10.0

_inherited: list[object] = []
"""Pools of a parent process. Finalizing one in a child would close the parent's connections."""


@dataclass(frozen=True)
class Engines(Generic[E]):
    """The engines of a database, which may be one and the same.

    Attributes:
        reading: For work that only reads.
        writing: For transactions.
        owned: Whether the store made them, and disposes of them.
    """

    reading: E
    writing: E
    owned: bool

    def renewed(self) -> Engines[E]:
        """The same in a forked child, with new pools; the parent's are left untouched."""
        _inherited.extend((self.reading.pool, self.writing.pool))
        if not self.owned:
            clone = _clone(self.writing)
            return Engines(clone, clone, owned=True)
        for engine in (self.reading, self.writing):
            synchronous(engine).dispose(close=False)
        return self


def engines_for(bind: Bind, timeout: float | None) -> Engines[Engine] | Engines[AsyncEngine]:
    """Make or adopt engines, without connecting.

    Args:
        bind: A URL, for which engines are made, or an engine. An ``AsyncEngine`` is copied,
            since its pool belongs to an event loop.
        timeout: The longest time to connect, in seconds.

    Raises:
        ConfigurationError: The URL or the engine cannot be used; the message says why.
        MissingDependencyError: The URL's driver is not installed.
    """
    if isinstance(bind, Engine):
        check_dialect(bind.dialect.name)
        return Engines(bind, bind, owned=False)
    if isinstance(bind, AsyncEngine):
        check_dialect(bind.dialect.name)
        clone = _clone(_shareable(bind))
        return Engines(clone, clone, owned=True)
    url = _parse(bind)
    check_dialect(url.get_backend_name())
    return _made_for(url, timeout)


def synchronous(engine: Engine | AsyncEngine) -> Engine:
    return engine.sync_engine if isinstance(engine, AsyncEngine) else engine


def _make_private(
    dialect: Dialect, record: object, arguments: Sequence[Any], options: Mapping[str, object]
) -> None:
    """Create the file of a new SQLite database so that only its owner can read it.

    SQLite treats an empty file as a new database, gives its journals the file's permissions, and
    follows a link to a file that does not exist. If the file cannot be made, connecting says why.
    """
    path = sqlite_file(str(arguments[0]))
    if path:
        with suppress(OSError):
            os.close(os.open(os.path.realpath(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


def _parse(bind: object) -> URL:
    try:
        return make_url(bind)  # type: ignore[arg-type]  # It refuses anything but a URL.
    except (exc.ArgumentError, ValueError):  # Their texts may hold a password.
        given = "this text" if isinstance(bind, str) else type(bind).__name__
    raise ConfigurationError(
        "The database must be a URL such as 'sqlite:///zohooauth.db' or "
        f"'postgresql+psycopg://user:password@host:5432/name', or an engine; not {given}."
    )


def _made_for(url: URL, timeout: float | None) -> Engines[Engine] | Engines[AsyncEngine]:
    try:
        dialect = url.get_dialect()
        options = _options(url, dialect.driver, timeout)
        make: Any = create_async_engine if dialect.is_async else create_engine
        if url.get_backend_name() == "sqlite":
            engine = make(url, **options)
            event.listen(synchronous(engine), "do_connect", _make_private)
            return Engines(engine, engine, owned=True)
        # Our transactions always end with COMMIT or ROLLBACK: a reset would only cost a round trip.
        writing = make(url, **options | _KEEP_ONE, pool_reset_on_return=None)
        reading = make(url, **options, isolation_level="AUTOCOMMIT", skip_autocommit_rollback=True)
        return Engines(reading, writing, owned=True)
    except exc.NoSuchModuleError:
        raise ConfigurationError(
            f"SQLAlchemy has no database driver {url.drivername!r}. Use for example "
            "'sqlite://', 'postgresql+psycopg://' or 'mysql+pymysql://'."
        ) from None
    except ModuleNotFoundError as error:
        raise _missing_driver(error.name or dialect.driver, url) from None
    except exc.ArgumentError as error:
        raise ConfigurationError(f"The database URL cannot be used: {error}") from None
    except (ValueError, TypeError):  # Their texts may hold a value of the URL's query.
        raise ConfigurationError(
            "The database URL cannot be used: an option after its question mark has a value of "
            f"the wrong kind for the driver {dialect.driver}."
        ) from None


def _missing_driver(package: str, url: URL) -> ConfigurationError:
    if package in EXTRAS:
        return MissingDependencyError(
            package, EXTRAS[package], instead=SUGGESTED_DRIVERS.get(package, "")
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
        # The database is its one connection, which the threads share in turns.
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
