"""What differs from driver to driver, apart from SQL and errors."""

from __future__ import annotations

import os
import sys
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

from zoho_orm_store.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from sqlalchemy import URL, Connection

__all__ = [
    "EXTRAS",
    "SUGGESTED_DRIVERS",
    "connect_args",
    "connects_with_limit",
    "created_file",
    "gevent_monkey",
    "is_memory",
    "limit_time",
    "prepares_statements_in_two_steps",
    "redacted_url",
    "refuse_under_gevent",
    "sqlite_file",
]

T = TypeVar("T")

EXTRAS = {
    "psycopg": "postgresql",
    "psycopg2": "postgresql",
    "asyncpg": "postgresql",
    "pymysql": "mysql",
    "asyncmy": "mysql",
    "aiomysql": "mysql",
    "MySQLdb": "mysql",
}
"""The extra of this package that installs a driver for the same database.

An exception from one of these packages is a driver's: see `is_driver_error`.
"""

SUGGESTED_DRIVERS = {
    "psycopg2": "postgresql+psycopg",
    "MySQLdb": "mysql+pymysql",
    "aiomysql": "mysql+asyncmy",
}
"""The driver to suggest instead of one that is not among our extras."""

_TIMEOUTS = {
    "pysqlite": ("timeout",),
    "aiosqlite": ("timeout",),
    "psycopg": ("connect_timeout",),
    "psycopg_async": ("connect_timeout",),
    "asyncpg": ("timeout",),
    "pymysql": ("connect_timeout", "read_timeout", "write_timeout"),
    "mysqldb": ("connect_timeout", "read_timeout", "write_timeout"),
    "aiomysql": ("connect_timeout",),
    "asyncmy": ("connect_timeout",),
}
_FRACTIONS_OF_SECONDS = ("pysqlite", "aiosqlite", "asyncpg")


_OPTIONS: dict[str, dict[str, object]] = {
    # A prepared statement would stay on one of the pooler's connections to the server. Without it,
    # psycopg sends a statement and its values in one message.
    "psycopg": {"prepare_threshold": None},
    "psycopg_async": {"prepare_threshold": None},
    # Otherwise a server may store "????" for what a column's character set cannot hold.
    "pymysql": {"sql_mode": "STRICT_ALL_TABLES"},
    "mysqldb": {"sql_mode": "STRICT_ALL_TABLES"},
    "aiomysql": {"sql_mode": "STRICT_ALL_TABLES"},
    "asyncmy": {"sql_mode": "STRICT_ALL_TABLES"},
}

_OPTIONS_FOR_POOLERS: dict[str, dict[str, object]] = {
    "asyncpg": {
        "statement_cache_size": 0,
        "prepared_statement_cache_size": 0,
        # A statement without a name is replaced by the next one. Others would stay for ever.
        "prepared_statement_name_func": lambda: "",
    },
}


def connect_args(
    url: URL, driver: str, timeout: float, *, pooler: bool = False
) -> dict[str, object]:
    """The driver's arguments that a store needs; what the URL's query already sets is left alone.

    Args:
        url: The database.
        driver: SQLAlchemy's name of the driver.
        timeout: The longest time that a connection may wait, in seconds.
        pooler: Whether a pooler in transaction mode stands before the server.
    """
    value = timeout if driver in _FRACTIONS_OF_SECONDS else max(1, round(timeout))
    arguments: dict[str, object] = dict.fromkeys(_TIMEOUTS.get(driver, ()), value)
    arguments |= _OPTIONS.get(driver, {})
    if pooler:
        arguments |= _OPTIONS_FOR_POOLERS.get(driver, {})
    return {name: argument for name, argument in arguments.items() if name not in url.query}


def prepares_statements_in_two_steps(driver: str) -> bool:
    """Whether a driver prepares a statement and then executes it, in two messages.

    Behind a pooler, both must be in one transaction.
    """
    return driver == "asyncpg"


def gevent_monkey() -> Any:  # noqa: ANN401
    """Return gevent's module ``monkey`` if it has replaced threads by greenlets."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey if monkey and monkey.is_module_patched("threading") else None


def refuse_under_gevent(driver: str) -> None:
    """Refuse a driver that cannot work in greenlets.

    Raises:
        ConfigurationError: gevent has replaced the threads that the driver needs.
    """
    if driver == "aiosqlite" and gevent_monkey():
        raise ConfigurationError(
            "aiosqlite does not work under gevent, because it needs real threads. Use a URL that "
            "begins with sqlite:/// instead of sqlite+aiosqlite:///."
        )


# -- psycopg has no time limit for an answer ------------------------------------------------------


def connects_with_limit(driver: str, seconds: float) -> Callable[..., Any] | None:
    """A function that connects with a driver so that `limit_time` has an effect.

    Args:
        driver: SQLAlchemy's name of the driver.
        seconds: The limit for what happens before the first call of `limit_time`.

    Returns:
        The function, or ``None`` if the driver does not need one.
    """
    if driver != "psycopg":
        return None
    import psycopg

    class LimitedConnection(psycopg.Connection[Any]):
        """A connection that gives up at a point in time by the monotonic clock."""

        gives_up_at = float("inf")

        def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            return super().wait(self._limited(gen), *args, **kwargs)

        def _limited(self, gen: Generator[Any, Any, T]) -> Generator[Any, Any, T]:
            # psycopg resumes the generator several times a second, also if nothing has arrived.
            try:
                wanted = next(gen)
                while True:
                    ready = yield wanted
                    wanted = gen.send(ready)
                    if monotonic() >= self.gives_up_at:
                        self.pgconn.finish()
                        raise psycopg.OperationalError("the server did not answer in time")
            except StopIteration as end:
                result: T = end.value
                return result

    def connect(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        connection = LimitedConnection.connect(*args, **kwargs)
        connection.gives_up_at = monotonic() + seconds
        return connection

    return connect


def limit_time(connection: Connection, seconds: float | None) -> None:
    """Let a connection that was made by `connects_with_limit` give up after some seconds."""
    limited: Any = connection.connection.driver_connection
    limited.gives_up_at = float("inf") if seconds is None else monotonic() + seconds


# -- URLs -----------------------------------------------------------------------------------------


def is_memory(url: URL) -> bool:
    """Whether a URL names a SQLite database in memory, which lives as long as its connection."""
    return url.get_backend_name() == "sqlite" and (
        not url.database or ":memory:" in url.database or url.query.get("mode") == "memory"
    )


def sqlite_file(database: str) -> str | None:
    """The file of a SQLite database, or ``None`` if it has none.

    Args:
        database: A path, ``":memory:"``, or a URI such as ``"file:tokens.db?mode=ro"``.
    """
    if database.startswith("file:"):
        parts = urlsplit(database)
        query = parse_qs(parts.query)
        if query.get("mode") == ["memory"] or query.get("vfs") == ["memdb"]:
            return None
        database = unquote(parts.path)
        if os.name == "nt" and database[2:3] == ":":  # "/C:/tokens.db"
            database = database[1:]
    return None if database in ("", ":memory:") else database


def created_file(database: str) -> str | None:
    """The file that SQLite would create for a database; see `sqlite_file`."""
    is_uri = database.startswith("file:")
    mode = parse_qs(urlsplit(database).query).get("mode", ["rwc"])[0] if is_uri else "rwc"
    return sqlite_file(database) if mode == "rwc" else None


def redacted_url(url: URL) -> str:
    """A URL without its password, and without its query, which may hold one too."""
    return url.set(query={}).render_as_string(hide_password=True)
