"""What the revisions share. They are frozen, so what is here keeps its meaning for ever."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, cast

import alembic.op
from sqlalchemy import table as table_clause

from zoho_orm_store._database.errors import our_errors
from zoho_orm_store._schema import fixed_schema
from zoho_orm_store._sql.dialects import convert_old_storage, dependent_objects, views_ignored
from zoho_orm_store.errors import SchemaError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from alembic.operations import BatchOperations, Operations

__all__ = [
    "INNODB",
    "Report",
    "alter_table",
    "altered",
    "is_offline",
    "op",
    "refuse_dependent_objects",
    "report",
    "revision_step",
    "running",
    "table_schema",
    "use_innodb",
]

INNODB: dict[str, Any] = {
    f"{dialect}_{option}": value
    for dialect in ("mysql", "mariadb")
    for option, value in (("engine", "InnoDB"), ("row_format", "DYNAMIC"))
}
"""Options of a new table, so that a server's own defaults do not matter."""

_operations: ContextVar[Operations | None] = ContextVar("zoho_orm_store_operations", default=None)


class _CurrentOperations:
    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(_operations.get() or alembic.op, name)


op = cast("Operations", _CurrentOperations())
"""The operations of this run: those given to `running`, or else those of Alembic's environment.

``alembic.op`` is one object for all threads, so two runs at once would use each other's.
"""


@dataclass
class Report:
    """What the revisions of one run did to tokens.

    Attributes:
        adopted: How many tokens of the SDK's table were adopted.
        renumbered: The ids that were changed, and what they became.
        planned: The revisions on the way. A revision need not do what the next one undoes.
        on_step: Called with what is about to be done, if it may take long.
    """

    adopted: int = 0
    renumbered: dict[str, str] = field(default_factory=dict)
    planned: frozenset[str] = frozenset()
    on_step: Callable[[str], object] = lambda step: None


_report: ContextVar[Report | None] = ContextVar("zoho_orm_store_report", default=None)


def report() -> Report:
    """The report of this run. In Alembic's own environment nobody reads it."""
    return _report.get() or Report()


@contextmanager
def running(operations: Operations, on_step: Callable[[str], object]) -> Iterator[Report]:
    """Let the revisions that run inside the ``with`` block use these operations.

    Args:
        operations: The operations.
        on_step: See `Report`.

    Yields:
        What the revisions report.
    """
    result = Report(on_step=on_step)
    token, report_token = _operations.set(operations), _report.set(result)
    try:
        yield result
    finally:
        _operations.reset(token)
        _report.reset(report_token)


def revision_step(step: Callable[[], None]) -> Callable[[], None]:
    """Make a revision's ``upgrade`` or ``downgrade`` work in one schema, and show no values.

    Statements on a table without a schema work in `table_schema`.
    """

    @our_errors
    @wraps(step)
    def run() -> None:
        if is_offline():
            step()
        else:
            with fixed_schema(op.get_bind()):
                step()

    return run


def is_offline() -> bool:
    """Whether the run writes an SQL script, without a database."""
    return op.get_context().as_sql


def table_schema() -> str | None:
    """The schema of the tables; ``None`` in a script, and where there is only one."""
    if is_offline():
        return None
    translated = op.get_bind().get_execution_options().get("schema_translate_map") or {}
    schema: str | None = translated.get(None)
    return schema


@contextmanager
def altered(table: str, recreate: Literal["auto", "always"] = "auto") -> Iterator[BatchOperations]:
    """Collect changes of a table, and make them at the end of the ``with`` block."""
    views = nullcontext() if is_offline() else views_ignored(op.get_bind())
    with views, op.batch_alter_table(table, schema=table_schema(), recreate=recreate) as batch:
        yield batch


def alter_table(table: str, changes: Iterable[str]) -> None:
    """Make several changes of a table in one statement, which SQLite cannot."""
    preparer = op.get_context().dialect.identifier_preparer
    name = preparer.format_table(table_clause(table, schema=table_schema()))
    op.execute(f"ALTER TABLE {name} {', '.join(changes)}")


def refuse_dependent_objects(table: str, columns: Iterable[str]) -> None:
    """Stop before PostgreSQL refuses to change columns on which other objects depend.

    Raises:
        SchemaError: The message names the objects.
    """
    if not is_offline() and (
        found := dependent_objects(op.get_bind(), table, table_schema(), columns)
    ):
        raise SchemaError(
            f"PostgreSQL does not allow changes of the table {table!r} while these depend on its "
            f"columns: {', '.join(found)}. Nothing was changed. Save their definitions, drop them, "
            "run this again, and then create them again."
        )


def use_innodb(table: str) -> None:
    """On MySQL and MariaDB, convert a table that cannot have our indexes or transactions."""
    convert_old_storage(op.get_bind(), table, table_schema())
