"""What differs from driver to driver, apart from SQL and errors."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from sqlalchemy import URL

__all__ = [
    "EXTRAS",
    "SUGGESTED_DRIVERS",
    "connect_args",
    "is_memory",
    "redacted_url",
    "sqlite_file",
]

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
    "aiomysql": ("connect_timeout",),
    "asyncmy": ("connect_timeout",),
}
_FRACTIONS_OF_SECONDS = ("pysqlite", "aiosqlite", "asyncpg")


def connect_args(url: URL, driver: str, timeout: float) -> dict[str, object]:
    """The driver's arguments that keep a connection from waiting longer than a store may.

    Args:
        url: The database; what its query already sets is left alone.
        driver: SQLAlchemy's name of the driver.
        timeout: The longest wait, in seconds.
    """
    value = timeout if driver in _FRACTIONS_OF_SECONDS else max(1, round(timeout))
    return {name: value for name in _TIMEOUTS.get(driver, ()) if name not in url.query}


def is_memory(url: URL) -> bool:
    """Whether a URL names a SQLite database in memory, which lives as long as its connection."""
    return url.get_backend_name() == "sqlite" and (
        not url.database or ":memory:" in url.database or url.query.get("mode") == "memory"
    )


def sqlite_file(database: str) -> str | None:
    """The file that SQLite would create for a database.

    Args:
        database: A path, ``":memory:"``, or a URI such as ``"file:tokens.db?mode=rwc"``.
    """
    if not database.startswith("file:"):
        return None if database in ("", ":memory:") else database
    parts = urlsplit(database)
    mode = parse_qs(parts.query).get("mode", ["rwc"])[0]
    return unquote(parts.path) if mode == "rwc" and parts.path != ":memory:" else None


def redacted_url(url: URL) -> str:
    """A URL without its password, and without its query, which may hold one too."""
    return url.set(query={}).render_as_string(hide_password=True)
