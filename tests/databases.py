"""The databases that the tests and the benchmarks run on."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sqlalchemy import create_engine, make_url, text
from sqlalchemy.pool import NullPool

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sqlalchemy import URL

VARIABLES = {
    "postgresql": "ZOHO_ORM_STORE_TEST_POSTGRESQL",
    "mariadb": "ZOHO_ORM_STORE_TEST_MARIADB",
    "mysql": "ZOHO_ORM_STORE_TEST_MYSQL_URL",
}
"""The environment variables that name the servers."""

_DEFAULTS = {
    "postgresql": "postgresql+psycopg://postgres@127.0.0.1:5432/test",
    "mariadb": "mysql+pymysql://root@127.0.0.1:3306/test",
}

SERVERS = {
    name: make_url(url)
    for name, variable in VARIABLES.items()
    if (url := os.environ.get(variable) or _DEFAULTS.get(name))
}
"""The servers to test on. MySQL itself is one of them only if its variable is set."""

DATABASES = ("sqlite", *SERVERS)


def why_unreachable(url: URL) -> str | None:
    engine = create_engine(url, connect_args={"connect_timeout": 3})
    try:
        with engine.connect():
            return None
    except Exception as error:  # noqa: BLE001 - whatever the driver raises
        return str(getattr(error, "orig", error)).strip().split("\n")[0]
    finally:
        engine.dispose()


@contextmanager
def fresh_database(name: str, directory: Path, *, is_durable: bool = True) -> Iterator[URL]:
    """A new, empty database, dropped afterwards; its URL names the synchronous driver.

    Args:
        name: The kind of database.
        directory: Where a file of SQLite is to be.
        is_durable: Whether PostgreSQL waits for the disk at each commit, which only a crash of the
            server makes a difference to.
    """
    label = f"zos_{os.getpid()}_{time.time_ns() % 10**9}"
    if name == "sqlite":
        yield make_url(f"sqlite:///{directory / label}.db")
        return
    administrator = create_engine(SERVERS[name], isolation_level="AUTOCOMMIT")
    with administrator.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {label}"))
        if name == "postgresql" and not is_durable:
            connection.execute(text(f"ALTER DATABASE {label} SET synchronous_commit = off"))
    try:
        yield SERVERS[name].set(database=label)
    finally:
        force = " WITH (FORCE)" if name == "postgresql" else ""
        with administrator.connect() as connection:
            connection.execute(text(f"DROP DATABASE {label}{force}"))
        administrator.dispose()


def kill_connections(url: URL) -> None:
    """Let the server close every other connection to a database."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        if url.get_backend_name() == "postgresql":
            connection.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            )
            return
        others = text(
            "SELECT id FROM information_schema.processlist "
            "WHERE db = database() AND id <> connection_id()"
        )
        for (number,) in connection.execute(others).all():
            connection.execute(text(f"KILL {number}"))


def clear_postgresql(url: URL) -> None:
    """Leave nothing in a database, which takes a tenth of the time of dropping and making one."""
    kill_connections(url)
    administrator = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with administrator.connect() as connection:
        schemas = "SELECT nspname FROM pg_namespace WHERE nspname !~ '^(pg_|information_schema)'"
        for schema in connection.scalars(text(schemas)).all():
            connection.execute(text(f'DROP SCHEMA "{schema}" CASCADE'))
        connection.execute(text("CREATE SCHEMA public"))
        connection.execute(text("GRANT USAGE ON SCHEMA public TO PUBLIC"))
