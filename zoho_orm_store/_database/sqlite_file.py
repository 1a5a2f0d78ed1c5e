"""Noticing that the file of a SQLite database was replaced or deleted.

An open connection goes on with the file that it has opened, even if a restored backup has taken
the file's place. What it saves would be lost.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sqlalchemy import event, exc

from zoho_orm_store._database.drivers import sqlite_file
from zoho_orm_store.errors import DatabaseError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection, Engine
    from sqlalchemy.engine import ExceptionContext
    from sqlalchemy.pool import ConnectionPoolEntry

__all__ = [
    "check_not_replaced",
    "is_of_present_file",
    "is_watched",
    "reconnect_when_replaced",
]

_OPENED = "zoho_orm_store_opened_file"


def reconnect_when_replaced(engine: Engine) -> None:
    """Let an engine of a SQLite database open its file again after the file was replaced.

    An idle connection is replaced before it is used again. If a statement fails because its file
    is gone, the connection counts as lost, so that its work can be run again. Engines of other
    databases are left alone.

    Args:
        engine: An engine that nobody else uses; of an ``AsyncEngine``, its ``sync_engine``.
    """
    if engine.dialect.name == "sqlite":
        watch = _Watch()
        event.listen(engine, "do_connect", watch.connecting)
        event.listen(engine, "checkout", watch.checked_out)
        event.listen(engine, "handle_error", watch.failing)


def check_not_replaced(connection: Connection) -> None:
    """Refuse to commit a transaction into a file that was replaced meanwhile.

    Raises:
        DatabaseError: The file was replaced or deleted. It is retryable.
    """
    if (opened := _opened_by(connection)) is not None and opened.is_gone():
        raise DatabaseError(
            f"The file {opened.path} was replaced or deleted during the transaction, which was "
            "rolled back.",
            retryable=True,
        )


def is_watched(connection: Connection) -> bool:
    """Whether a connection is of an engine that was passed to `reconnect_when_replaced`."""
    return _opened_by(connection) is not None


def is_of_present_file(connection: Connection) -> bool:
    """Whether the file that a connection has opened is still in its place, if it has opened one.

    A connection that was kept out of the pool is asked so before each use, as the pool does.
    """
    opened: _Opened | None = connection.connection.info.get(_OPENED)
    return opened is None or not opened.is_gone_before_use()


class _Opened:
    """The file that a connection has opened.

    Attributes:
        path: The absolute path.
        identity: The file's identity, taken just before it was opened, so that a file that
            replaces it in this moment is noticed as well.
        is_new: Whether the connection was not used yet.
        changed_at: When the file was last changed, as far as is known.
        looks_for_log: How many more times to look whether there is a write-ahead log.
    """

    __slots__ = ("_watch", "changed_at", "identity", "is_new", "looks_for_log", "path")

    def __init__(self, path: str, watch: _Watch) -> None:
        self._watch = watch
        self.path = path
        self.identity = _identity(path)
        self.is_new = True
        self.changed_at = 0
        self.looks_for_log = 0

    def is_gone(self) -> bool:
        """Whether another file, or none, is in the file's place."""
        try:
            status = os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:
            return False  # Nothing is known of the file, but the connection may work.
        if status.st_mtime_ns != self.changed_at:
            # If the file now has a log, the next use of the connection opens it.
            self.changed_at, self.looks_for_log = status.st_mtime_ns, 2
        return (status.st_dev, status.st_ino) != self.identity

    def is_gone_before_use(self) -> bool:
        """Ask `is_gone`, and note the file's log before the connection is used."""
        if self.is_gone():
            return True
        if self.looks_for_log:
            self.looks_for_log -= 1
            self._watch.note_log(self)
        return False


class _Watch:
    """Watches the file of one engine's connections."""

    def __init__(self) -> None:
        self._log: object = None
        self._logs_file: object = None

    def connecting(
        self,
        dialect: object,
        record: ConnectionPoolEntry,
        arguments: Sequence[Any],
        options: object,
    ) -> None:
        path = sqlite_file(str(arguments[0]))
        if path is not None:
            record.info[_OPENED] = opened = _Opened(os.path.abspath(path), self)
            self._refuse_log_of_another(opened)

    def checked_out(
        self, dbapi_connection: object, record: ConnectionPoolEntry, proxy: object
    ) -> None:
        opened: _Opened | None = record.info.get(_OPENED)
        if opened is None:
            return
        if opened.is_new:
            # SQLAlchemy would give up if the connection that it has just made were refused.
            opened.is_new = False
        elif opened.is_gone_before_use():
            raise exc.DisconnectionError("The database file was replaced.")

    def failing(self, context: ExceptionContext) -> None:
        if context.connection is not None and not context.connection.invalidated:
            opened = _opened_by(context.connection)
            if opened is not None and opened.is_gone():
                context.is_disconnect = True

    def note_log(self, opened: _Opened) -> None:
        if log := _identity(_log_of(opened.path)):
            self._log, self._logs_file = log, opened.identity

    def _refuse_log_of_another(self, opened: _Opened) -> None:
        """Refuse a new file beside which the write-ahead log of the file before it was left.

        SQLite would take the log's pages for the new file's, and damage it.
        """
        path = _log_of(opened.path)
        log = _identity(path)
        if log is None:
            self._log = None
        elif log == self._log and opened.identity != self._logs_file and os.path.getsize(path):
            raise DatabaseError(
                f"The file {opened.path} was replaced, but the write-ahead log of the file before "
                f"it is still there, and would damage the new one. Stop all programs that use the "
                f"file, delete {path} and {opened.path}-shm, and start again."
            )


def _opened_by(connection: Connection) -> _Opened | None:
    return connection.connection.info.get(_OPENED)


def _identity(path: str) -> tuple[int, int] | None:
    with suppress(OSError):
        status = os.stat(path)
        return status.st_dev, status.st_ino
    return None


def _log_of(path: str) -> str:
    return f"{os.path.realpath(path)}-wal"
