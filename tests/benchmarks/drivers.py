"""A lookup by id through each driver for MariaDB that is installed: in all, and computing."""

from __future__ import annotations

import importlib
from contextlib import ExitStack
from time import perf_counter, thread_time
from typing import TYPE_CHECKING, Any, NamedTuple

from budgets import SELECT, filled
from measure import in_turns
from tokens import any_of

from zoho_orm_store import SQLAlchemyTokenStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sqlalchemy import URL

_ROWS = 1000
_DRIVERS = {
    "pymysql": ("mysql+pymysql", "%s"),
    "MySQLdb": ("mysql+mysqldb", "%s"),
    "mariadb": ("mariadb+mariadbconnector", "?"),
    "mysql.connector": ("mysql+mysqlconnector", "%s"),
}
"""The modules of the drivers, with SQLAlchemy's name and the mark of a parameter."""


class Lookup(NamedTuple):
    """How long a lookup by id takes, in microseconds.

    Attributes:
        driver: The driver's module.
        what: The store, or the driver alone on an open connection in autocommit.
        wall: In all.
        computing: Of it, what this process computes.
    """

    driver: str
    what: str
    wall: float
    computing: float


def drivers(directory: Path) -> Iterator[Lookup]:
    """Measure each driver in turn with the others."""
    number = any_of(_ROWS)

    def id_() -> str:
        return f"{number():032x}"

    with ExitStack() as stack:
        _, url = stack.enter_context(filled("mariadb", directory, _ROWS))
        calls: dict[tuple[str, str], Callable[[], object]] = {}
        for module, (name, mark) in _DRIVERS.items():
            try:
                connection = _connect(module, url)
            except ImportError:
                continue
            stack.callback(connection.close)

            def raw(connection: Any = connection, query: str = SELECT + mark) -> object:
                cursor = connection.cursor()
                cursor.execute(query, (id_(),))
                row = cursor.fetchone()
                cursor.close()
                return row

            store = SQLAlchemyTokenStore(url.set(drivername=name))
            stack.enter_context(store)
            calls[module, "the driver"] = raw
            calls[module, "the store"] = lambda store=store: store.find_token_by_id(id_())
        wall, computing = (in_turns(*calls.values(), clock=c) for c in (perf_counter, thread_time))
        for (module, what), *times in zip(calls, wall, computing, strict=True):
            yield Lookup(module, what, *times)


def _connect(module: str, url: URL) -> Any:
    connection = importlib.import_module(module).connect(
        host=url.host, port=url.port, user=url.username, database=url.database
    )
    set_autocommit = connection.autocommit
    if callable(set_autocommit):
        set_autocommit(True)
    else:
        connection.autocommit = True
    return connection
