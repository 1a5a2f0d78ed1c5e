"""The fence around one tenant's tokens: columns of a project's own model, and their values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zoho_orm_store.errors import ConfigurationError
from zoho_orm_store.models import StoredTokenMixin

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import FromClause

__all__ = ["EVERYTHING", "Scope", "scope_of"]


@dataclass(frozen=True)
class Scope:
    """The values that every row of a tenant has in certain columns.

    Attributes:
        values: The value of each column, in the order of the columns' names.
    """

    values: tuple[tuple[str, object], ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns."""
        return tuple(name for name, _ in self.values)

    @property
    def parts(self) -> tuple[str, ...]:
        """What is mixed into a digest, so that the digests of two tenants never meet."""
        return tuple(part for name, value in self.values for part in (name, str(value)))


EVERYTHING = Scope()
"""No fence."""


def scope_of(table: FromClause, given: Mapping[str, object] | None) -> Scope:
    """The scope that a store or a repository was given.

    Args:
        table: The table of its model.
        given: The columns that fence off a tenant, and their values.

    Raises:
        ConfigurationError: The table has no such column, it is one of this package's own, or
            its value is missing.
    """
    if given is None:
        return EVERYTHING
    for name, value in given.items():
        if name not in table.c:
            raise ConfigurationError(
                f"The table {table} has no column {name!r} to scope by. Add it to your model, "
                "migrate, and pass the model to the store."
            )
        if hasattr(StoredTokenMixin, name):
            raise ConfigurationError(
                f"The column {name!r} is the token's own. Scope by a column that your model adds."
            )
        if value is None or value == "":
            raise ConfigurationError(
                f"The scope's column {name!r} needs a value, not {value!r}: "
                "a store without one would see every tenant's tokens."
            )
    if not given:
        raise ConfigurationError("A scope needs a column and its value, or leave it out.")
    return Scope(tuple(sorted(given.items())))
