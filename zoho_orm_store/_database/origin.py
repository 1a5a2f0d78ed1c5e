"""Where an exception comes from: the database's side of a call, or the application.

A signal handler (Ctrl-C, Celery's soft time limit) runs in the middle of whatever the main thread
does, so its exception comes out of a driver. It concerns the application, and must reach it. The
same holds for the application's listeners.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from zoho_orm_store._database.drivers import EXTRAS
from zoho_orm_store.errors import ZohoOrmStoreError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["DATABASE_SIDE", "interruption_in", "is_driver_error", "is_raised_elsewhere"]

_DRIVERS = frozenset({*EXTRAS, "psycopg_binary", "psycopg_c", "mysql", "mariadb", "aiosqlite"})
DATABASE_SIDE = frozenset({"zoho_orm_store", "sqlalchemy", "alembic", *_DRIVERS})
"""The packages that work for a call, in whose frames a traceback may show secrets."""

_THEIR_FOUNDATION = frozenset({*sys.stdlib_module_names, "greenlet", "gevent", "cryptography"})


def is_driver_error(error: BaseException | None) -> bool:
    """Whether an exception has a class of a driver's, or says that a connection is lost."""
    if isinstance(error, ZohoOrmStoreError):
        return False
    return isinstance(error, ConnectionError) or _root(type(error).__module__) in _DRIVERS


def is_raised_elsewhere(error: BaseException) -> bool:
    """Whether the class of an exception, or the code that raised it, is the application's.

    A driver's exception never is, whoever raised it.
    """
    if is_driver_error(error):
        return False
    modules = [*_modules(error)]
    ends = {_root(type(error).__module__), *modules[-1:]}
    return not ends <= DATABASE_SIDE | _THEIR_FOUNDATION


def interruption_in(error: BaseException | None) -> BaseException | None:
    """The application's exception that a driver or SQLAlchemy turned into this one, if any.

    PyMySQL, for one, takes a ``TimeoutError`` of a signal handler for one of its socket's.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        original = getattr(error, "orig", None)
        error = original if isinstance(original, BaseException) else _before(error)
        if error is not None and _was_caught_by_us(error) and is_raised_elsewhere(error):
            return error
    return None


def _before(error: BaseException) -> BaseException | None:
    return error.__cause__ or error.__context__


def _was_caught_by_us(error: BaseException) -> bool:
    """Whether a traceback begins on the database's side.

    It does not if the application was handling the exception already when it called us.
    """
    return next(_modules(error), None) in DATABASE_SIDE


def _modules(error: BaseException) -> Iterator[str]:
    """The top-level packages of the frames in a traceback, outermost first."""
    traceback = error.__traceback__
    while traceback is not None:
        yield _root(traceback.tb_frame.f_globals.get("__name__", ""))
        traceback = traceback.tb_next


def _root(module: str) -> str:
    # Alembic loads our revisions as modules with names of their own.
    return "zoho_orm_store" if module.startswith("zoho_orm_store") else module.partition(".")[0]
