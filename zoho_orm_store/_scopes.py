"""Checking which tenant a store or a repository is for."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING

from zoho_orm_store._digests import UNSCOPED, Scope
from zoho_orm_store.errors import ConfigurationError
from zoho_orm_store.models import StoredTokenMixin

if TYPE_CHECKING:
    from sqlalchemy import Table

__all__ = ["scope_for"]


def scope_for(table: Table, given: Mapping[str, object] | None) -> Scope:
    """The scope that a store or a repository was given.

    Args:
        table: The table of its model.
        given: The columns that tell tenants apart, and their values.

    Raises:
        ConfigurationError: It is not a mapping, the table has no such column, the column is one of
            this package's own, or its value is missing or of another type.
    """
    if given is None:
        return UNSCOPED
    if not isinstance(given, Mapping):
        raise ConfigurationError(
            f"A scope is a mapping such as {{'tenant_id': 7}}, not {type(given).__name__}."
        )
    if not given:
        raise ConfigurationError("A scope needs a column and its value, or leave it out.")
    for name, value in given.items():
        _check_scope(table, name, value)
    return Scope(tuple(sorted(given.items())))


def _check_scope(table: Table, name: str, value: object) -> None:
    if name not in table.c:
        own = [each.key for each in table.c if not hasattr(StoredTokenMixin, each.key)]
        guess = get_close_matches(str(name), own, 1)
        raise ConfigurationError(
            f"The table {table} has no column {name!r} to scope by. "
            + (
                f"Did you mean {guess[0]!r}?"
                if guess
                else "Add it to your model, migrate, and pass the model to the store."
            )
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
    try:
        wanted = table.c[name].type.python_type
    except NotImplementedError:  # A type of the project's own.
        return
    # True is an integer in Python, and a database may take the text "7" for the number.
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise ConfigurationError(
            f"The scope's column {name!r} needs a value of the type {wanted.__name__}, not "
            f"{type(value).__name__}: another type may be taken for another tenant's value."
        )
