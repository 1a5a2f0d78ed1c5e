"""Database URLs as people type them: what was meant, and whether a SQLite file exists."""

from __future__ import annotations

import os
import re
from difflib import get_close_matches

from zoho_orm_store.errors import ConfigurationError

__all__ = ["checked_url", "missing_file"]

_DRIVERS = (
    "sqlite",
    "sqlite+aiosqlite",
    "postgresql",
    "postgresql+psycopg",
    "postgresql+asyncpg",
    "mysql",
    "mysql+pymysql",
    "mysql+asyncmy",
    "mysql+aiomysql",
    "mariadb+pymysql",
    "mariadb+asyncmy",
)
_MEANT = {"postgres": "postgresql+psycopg", "mariadb": "mariadb+pymysql", "sqlite3": "sqlite"}


def checked_url(url: str) -> str:
    """Return a URL, unless it is one that people often type by mistake.

    Raises:
        ConfigurationError: The message says what was probably meant, and shows no password.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        if re.fullmatch(r"[\w./\\~ -]+", url):
            raise ConfigurationError(
                f"{url!r} is not a database URL. Did you mean 'sqlite:///{url}'?"
            )
        return url
    if re.fullmatch(r"[\w+]+", scheme) and scheme not in _DRIVERS:
        nearest = _MEANT.get(scheme) or next(iter(get_close_matches(scheme, _DRIVERS, 1)), None)
        # Another spelling of a driver may be right: SQLAlchemy decides.
        if nearest and not _is_known(scheme):
            raise ConfigurationError(
                f"There is no database driver {scheme!r}. Did you mean '{nearest}://…'?"
            )
    if scheme.startswith("sqlite") and re.fullmatch(r"[\w.-]+", rest):
        raise ConfigurationError(
            f"A SQLite URL has three slashes before the file. Did you mean '{scheme}:///{rest}'?"
        )
    return url


def missing_file(url: str) -> str | None:
    """The path of a SQLite database that does not exist, and that connecting would create."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    from zoho_orm_store._database.drivers import created_file, is_memory

    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # Opening the database says what is wrong.
        return None
    if parsed.get_backend_name() != "sqlite" or is_memory(parsed):
        return None
    path = created_file(parsed.database or "")
    return path if path and not os.path.exists(path) else None


def _is_known(scheme: str) -> bool:
    from sqlalchemy.dialects import registry
    from sqlalchemy.exc import NoSuchModuleError

    try:
        registry.load(scheme.replace("+", "."))
    except NoSuchModuleError:
        return False
    except ImportError:
        return True
    return True
