"""Where the time of a lookup by id goes: what each layer adds to the driver."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from budgets import filled
from growth import Raw
from measure import in_turns
from tokens import any_of

from zoho_orm_store import StoredToken
from zoho_orm_store._sql.tokens import token_statements

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_ROWS = 1000


class Layer(NamedTuple):
    """How long a lookup takes up to a layer.

    Attributes:
        database: The database.
        what: The layer.
        microseconds: How long the lookup takes, with the layers below.
    """

    database: str
    what: str
    microseconds: float


def layers(name: str, directory: Path) -> Iterator[Layer]:
    """Measure the layers of one database in turn."""
    number = any_of(_ROWS)

    def id_() -> str:
        return f"{number():032x}"

    statement = token_statements(StoredToken.__table__, (), keyed=False).by_id
    with filled(name, directory, _ROWS) as (store, url):
        raw, engine = Raw(url), store._database._engines.reading
        with engine.connect() as connection:

            def on_open_connection() -> object:
                return connection.execute(statement, {"row_id": id_()}).first()

            def from_the_pool() -> object:
                with engine.connect() as pooled:
                    return pooled.execute(statement, {"row_id": id_()}).first()

            works = {
                "the driver, on an open connection": lambda: raw.find("id", id_()),
                "SQLAlchemy Core, on an open connection": on_open_connection,
                "SQLAlchemy Core, a connection from the pool": from_the_pool,
                "find_token_by_id": lambda: store.find_token_by_id(id_()),
            }
            times = in_turns(*works.values())
        raw.close()
    for what, microseconds in zip(works, times, strict=True):
        yield Layer(name, what, microseconds)
