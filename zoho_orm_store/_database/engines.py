"""From a URL or an engine to the engines that a database uses: one to read, and one to write.

An application's engine is used exactly as it is, for both. On a server, a store that was given a
URL reads in autocommit, which saves round trips, on a pool of its own, so that a read never waits
behind writers that wait for locks.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from sqlalchemy import Engine, create_engine, event, exc, make_url
from sqlalchemy.engine.base import OptionEngine
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, QueuePool

from zoho_orm_store._database.drivers import (
    EXTRAS,
    SUGGESTED_DRIVERS,
    connect_args,
    connects_with_limit,
    created_file,
    is_memory,
    prepares_statements_in_two_steps,
    refuse_under_gevent,
)
from zoho_orm_store._database.sqlite_file import reconnect_when_replaced
from zoho_orm_store._sql.dialects import check_dialect
from zoho_orm_store.errors import ConfigurationError, MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy import URL
    from sqlalchemy.engine import Dialect

__all__ = ["Bind", "Engines", "engines_for", "leave_to_parent"]

E = TypeVar("E", Engine, AsyncEngine)

Bind: TypeAlias = "str | URL | Engine | AsyncEngine"

_CONNECTIONS = 3
"""The most that one of our engines opens. More make no thread faster, and a server allows about a
hundred for all processes together."""

_KEEP_ONE = {"pool_size": 1, "max_overflow": _CONNECTIONS - 1}
"""A token is written once an hour, and a server also counts idle connections."""

_POOL_CLASSES = frozenset({"poolclass", "pool"})
_POOL_OPTIONS = _POOL_CLASSES | {"pool_size", "max_overflow"}

_HARMLESS = frozenset({"connect_args", "echo", "hide_parameters", "logging_name"})
"""The options that ask nothing of the pool, nor of the connections that it hands out."""

_LONGEST_CONNECT = 10.0
_LONGEST_STATEMENT = 3600

_LOGGING_NAME = "zoho_orm_store"
"""What follows ``sqlalchemy.engine.Engine.`` in the name of our engines' logger."""

_inherited: list[object] = []
"""What a child has of its parent. Finalizing it would close the parent's connections."""


@dataclass(frozen=True)
class Engines(Generic[E]):
    """The engines of a database, which may be one and the same.

    Attributes:
        reading: For work that only reads.
        writing: For transactions.
        owned: Whether the store made them or their pools, and disposes of them.
        limits_time: Whether their connections must be told how long they may wait for an answer.
        stay_ready: Whether connections may be kept out of the pool between two reads.
    """

    reading: E
    writing: E
    owned: bool
    limits_time: bool = False
    stay_ready: bool = False

    def renewed(self) -> Engines[E]:
        """The same in a forked child, with new pools; the parent's are left untouched."""
        leave_to_parent(self.reading.pool, self.writing.pool)
        if not self.owned:
            own = _with_own_pool(self.writing)
            return Engines(own, own, owned=True)
        for engine in (self.reading, self.writing):
            synchronous(engine).dispose(close=False)
        return self


class _EngineWithOwnPool(OptionEngine):
    """An application's engine with another pool of the same class and size.

    It shares everything else: the dialect, the options, and the events, also those that are
    listened to later.
    """

    pool: Any = None

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine, {})
        self.pool = engine.pool.recreate()


def engines_for(
    bind: Bind,
    timeout: float | None,
    *,
    pooler: bool = False,
    engine_options: Mapping[str, Any] | None = None,
) -> Engines[Engine] | Engines[AsyncEngine]:
    """Make or adopt engines, without connecting.

    Args:
        bind: A URL, for which engines are made, or an engine. An ``AsyncEngine`` gets another pool,
            since its own belongs to an event loop.
        timeout: The longest time to connect, in seconds.
        pooler: Whether a pooler in transaction mode stands before the server of a URL.
        engine_options: Keyword arguments for ``create_engine``, for a URL.

    Raises:
        ConfigurationError: The URL, the engine or an option cannot be used; the message says why.
        MissingDependencyError: The URL's driver is not installed.
    """
    if isinstance(bind, Engine | AsyncEngine):
        check_dialect(bind.dialect.name)
        refuse_under_gevent(bind.dialect.driver)
        if pooler or engine_options is not None:
            raise ConfigurationError(
                "pooler and engine_options are for a URL. An engine of your own has its options "
                "already: pass them to create_engine."
            )
        if isinstance(bind, Engine):
            return Engines(bind, bind, owned=False)
        own = _with_own_pool(_shareable(bind))
        return Engines(own, own, owned=True)
    url = _parse(bind)
    check_dialect(url.get_backend_name())
    return _made_for(url, timeout, pooler, dict(engine_options or {}))


def leave_to_parent(*connections: object) -> None:
    """In a forked child, never finalize pools or connections that are the parent's."""
    _inherited.extend(connections)


def synchronous(engine: Engine | AsyncEngine) -> Engine:
    return engine.sync_engine if isinstance(engine, AsyncEngine) else engine


def _make_private(
    dialect: Dialect, record: object, arguments: Sequence[Any], options: Mapping[str, object]
) -> None:
    """Create the file of a new SQLite database so that only its owner can read it.

    SQLite treats an empty file as a new database, gives its journals the file's permissions, and
    follows a link to a file that does not exist. If the file cannot be made, connecting says why.
    """
    path = created_file(str(arguments[0]))
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


def _made_for(
    url: URL, timeout: float | None, pooler: bool, given: dict[str, Any]
) -> Engines[Engine] | Engines[AsyncEngine]:
    try:
        dialect = url.get_dialect()
        driver = dialect.driver
        refuse_under_gevent(driver)
        options = _options(url, driver, timeout, pooler, given)
        make: Any = create_async_engine if dialect.is_async else create_engine
        if url.get_backend_name() == "sqlite":
            if pooler:
                raise ConfigurationError("pooler=True is for a server, not for SQLite.")
            engine = _without_rows_in_logs(make(url, **options))
            event.listen(synchronous(engine), "do_connect", _make_private)
            reconnect_when_replaced(synchronous(engine))
            return Engines(engine, engine, owned=True, stay_ready=_may_stay_ready(engine, given))
        # Our transactions always end with COMMIT or ROLLBACK: a reset would only cost a round trip.
        writing = make(url, **{"pool_reset_on_return": None} | options | _kept_small(given))
        _without_rows_in_logs(writing)
        in_autocommit = {"isolation_level": "AUTOCOMMIT", "skip_autocommit_rollback": True}
        if pooler and prepares_statements_in_two_steps(driver):
            in_autocommit = {}
        reading = _without_rows_in_logs(make(url, **in_autocommit | options))
        engines = Engines(reading, writing, owned=True, stay_ready=_may_stay_ready(reading, given))
        return engines if dialect.is_async else _limited(engines, driver, options)
    except exc.NoSuchModuleError:
        raise ConfigurationError(
            f"SQLAlchemy has no database driver {url.drivername!r}. Use for example "
            "'sqlite://', 'postgresql+psycopg://' or 'mysql+pymysql://'."
        ) from None
    except ModuleNotFoundError as error:
        raise _missing_driver(error.name or dialect.driver, url) from None
    except exc.ArgumentError as error:
        raise ConfigurationError(f"The database URL cannot be used: {error}") from None
    except (ValueError, TypeError) as error:
        if isinstance(error, ConfigurationError):
            raise
        if given:  # It names the options, and no values.
            raise ConfigurationError(f"engine_options cannot be used: {error}") from None
        # The text may hold a value of the URL's query.
        raise ConfigurationError(
            "The database URL cannot be used: an option after its question mark has a value of "
            f"the wrong kind for the driver {dialect.driver}."
        ) from None


class _NoRows(logging.Filter):
    """Drops the rows that SQLAlchemy logs at DEBUG, whatever ``hide_parameters`` says."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.msg != "Row %r"


_no_rows = _NoRows()


def _without_rows_in_logs(engine: E) -> E:
    logger: Any = synchronous(engine).logger
    getattr(logger, "logger", logger).addFilter(_no_rows)
    return engine


def _may_stay_ready(engine: Engine | AsyncEngine, given: Mapping[str, Any]) -> bool:
    """Whether connections may be kept out of an engine's pool, for all that the URL asks of it.

    The one connection of a database in memory also writes. A plugin may bring its own pool.
    """
    is_plain = type(engine.pool) is QueuePool and not is_memory(engine.url)
    return is_plain and given.keys() <= _HARMLESS


def _kept_small(given: Mapping[str, Any]) -> dict[str, int]:
    """The size of the pool for writing, unless the application has chosen its pools."""
    return {} if _POOL_OPTIONS & given.keys() else _KEEP_ONE


def _limited(engines: Engines[E], driver: str, options: Mapping[str, Any]) -> Engines[E]:
    """Let connections give up in time if their driver does not do so by itself."""
    connect = connects_with_limit(driver, options.get("pool_timeout", _LONGEST_CONNECT))
    if connect is None:
        return engines

    def connects(dialect: Dialect, record: object, args: Any, arguments: Any) -> object:  # noqa: ANN401
        return connect(*args, **arguments)

    for engine in (engines.reading, engines.writing):
        event.listen(synchronous(engine), "do_connect", connects)
    return replace(engines, limits_time=True)


def _missing_driver(package: str, url: URL) -> ConfigurationError:
    if package in EXTRAS:
        return MissingDependencyError(
            package, EXTRAS[package], instead=SUGGESTED_DRIVERS.get(package, "")
        )
    return ConfigurationError(
        f"The database driver of {url.drivername!r} needs the package {package!r}, "
        "which is not installed."
    )


def _options(
    url: URL, driver: str, timeout: float | None, pooler: bool, given: Mapping[str, Any]
) -> dict[str, Any]:
    limit = _LONGEST_CONNECT if timeout is None else timeout
    arguments = connect_args(url, driver, limit, pooler=pooler)
    if timeout is None:
        # Drivers limit each statement, and those that upgrade a large table take minutes.
        for name in {"read_timeout", "write_timeout"} & arguments.keys():
            arguments[name] = _LONGEST_STATEMENT
    options: dict[str, Any] = {"hide_parameters": True, "logging_name": _LOGGING_NAME}
    if not _POOL_CLASSES & given.keys():
        options |= {"pool_size": _CONNECTIONS, "max_overflow": 0, "pool_timeout": limit}
    if is_memory(url):
        # The database is its one connection, which the threads share in turns.
        is_async = driver == "aiosqlite"
        arguments["check_same_thread"] = False
        options |= {"poolclass": AsyncAdaptedQueuePool if is_async else QueuePool, "pool_size": 1}
    options |= given
    options["connect_args"] = arguments | dict(given.get("connect_args", {}))
    return options


def _with_own_pool(engine: E) -> E:
    if isinstance(engine, AsyncEngine):
        return AsyncEngine(_EngineWithOwnPool(engine.sync_engine))
    return _EngineWithOwnPool(engine)


def _shareable(engine: AsyncEngine) -> AsyncEngine:
    if is_memory(engine.url):
        raise ConfigurationError(
            "An AsyncEngine on an in-memory SQLite database cannot be shared with the store's "
            "event loop, where the database would be another, empty one. Pass the URL "
            "'sqlite+aiosqlite:///:memory:' for a private database, or use a file."
        )
    return engine
