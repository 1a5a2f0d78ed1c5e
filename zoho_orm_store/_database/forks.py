"""Surviving ``os.fork``: no fork in the middle of SQLite work, and a new start in the child."""

from __future__ import annotations

import os
import weakref
from threading import Lock
from time import monotonic
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from _thread import LockType

__all__ = ["Forkable", "hold_while_forking", "tell_forked_children"]

_LONGEST_WAIT = 1.0


class Forkable(Protocol):
    """Something with locks, threads or connections, which a fork copies without their owners."""

    def _forked(self) -> None:
        """Start again in the child, without touching what the parent still uses."""


_forkables: weakref.WeakSet[Forkable] = weakref.WeakSet()
_to_hold: weakref.WeakSet[LockType] = weakref.WeakSet()
_held: list[LockType] = []
_one_fork_at_a_time = Lock()


def tell_forked_children(forkable: Forkable) -> None:
    """Call an object's ``_forked`` in every child that is forked while the object lives."""
    _forkables.add(forkable)


def hold_while_forking(lock: LockType) -> None:
    """Let a fork wait for a lock, and hold it meanwhile.

    SQLite keeps the locks that a process holds on a file in the process's memory. Copied in the
    middle of a transaction, they would be held in the child for ever.
    """
    _to_hold.add(lock)


def _before() -> None:
    _one_fork_at_a_time.acquire()
    deadline = monotonic() + _LONGEST_WAIT
    for lock in list(_to_hold):
        if lock.acquire(timeout=max(0, deadline - monotonic())):
            _held.append(lock)


def _after_in_parent() -> None:
    while _held:
        _held.pop().release()
    _one_fork_at_a_time.release()


def _after_in_child() -> None:
    global _one_fork_at_a_time
    _one_fork_at_a_time = Lock()
    _held.clear()
    for forkable in list(_forkables):
        forkable._forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child
    )
