"""Living through ``os.fork``: pausing before it, and starting anew in the child."""

from __future__ import annotations

import os
import weakref
from threading import Condition
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Forkable", "Gate", "tell_forked_children"]

_LONGEST_PAUSE = 1.0


class Forkable(Protocol):
    """Something with locks, threads or connections, which a fork copies without their owners."""

    def _forked(self) -> None:
        """Start anew in the child, without touching what the parent goes on using."""


class Gate:
    """Lets any number of threads work, but none while the process forks.

    SQLite keeps the locks that a process holds on a file in the process's memory. Copied in the
    middle of a transaction, they are held for ever in the child.
    """

    def __init__(self) -> None:
        self._start()
        _gates.add(self)

    def _start(self) -> None:
        self._changed = Condition()
        self._inside = 0
        self._is_shut = False

    def __enter__(self) -> None:
        with self._changed:
            while self._is_shut:
                self._changed.wait()
            self._inside += 1

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._changed:
            self._inside -= 1
            if self._is_shut:
                self._changed.notify_all()

    def before_fork(self) -> None:
        """Shut the gate, and wait until nobody is inside, within reason."""
        with self._changed:
            self._is_shut = True
            self._changed.wait_for(lambda: self._inside == 0, _LONGEST_PAUSE)

    def after_fork(self) -> None:
        """Open the gate in the parent."""
        with self._changed:
            self._is_shut = False
            self._changed.notify_all()

    def _forked(self) -> None:
        """Open the gate in the child, where nobody is inside."""
        self._start()


_gates: weakref.WeakSet[Gate] = weakref.WeakSet()
_forkables: weakref.WeakSet[Forkable] = weakref.WeakSet()


def tell_forked_children(forkable: Forkable) -> None:
    """Call an object's ``_forked`` in every child that is forked while the object lives."""
    _forkables.add(forkable)


def _before() -> None:
    for gate in list(_gates):
        gate.before_fork()


def _after_in_parent() -> None:
    for gate in list(_gates):
        gate.after_fork()


def _after_in_child() -> None:
    for forkable in [*_gates, *_forkables]:
        forkable._forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child
    )
