"""Surviving a fork: no fork in the middle of a call, and a new start in the child.

Python runs hooks around ``os.fork``, but a server written in C, such as uWSGI, forks without them.
A child therefore notices at its first call that it is another process. Only then does it start
again, because a server may switch to greenlets between the fork and that call.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from typing import Protocol

__all__ = ["Forkable", "begin_work", "end_work", "notice_fork", "tell_forked_children"]

_POLL = 0.001
"""Seconds between two looks. `time.sleep` is looked up at the call: gevent replaces it."""


class Forkable(Protocol):
    """Something with locks, threads or connections, which a fork copies without their owners."""

    def _forked(self) -> None:
        """Start again in the child, without touching what the parent still uses."""


_forkables: weakref.WeakSet[Forkable] = weakref.WeakSet()
_process = os.getpid()
_starting_again: dict[int, threading.Lock] = {}

_at_work: dict[object, tuple[int, float]] = {}
"""The calls under way: each one's thread, and the longest that a fork waits for it."""
_forking: dict[str, int] = {}
"""The thread that forks at present, under the key "thread"."""


def tell_forked_children(forkable: Forkable) -> None:
    """Call an object's ``_forked`` in each forked child, before the child's first call."""
    _forkables.add(forkable)


def notice_fork() -> None:
    """Start again if this process was forked after the last call.

    `begin_work` does the same.
    """
    if os.getpid() != _process:
        _start_again()


def _start_again() -> None:
    global _process
    process = os.getpid()
    # Locks of the parent may be held by threads that do not exist here, so each process has its
    # own. dict.setdefault is atomic.
    with _starting_again.setdefault(process, threading.Lock()):
        if process != _process:
            _forking.clear()
            _at_work.clear()
            for forkable in list(_forkables):
                forkable._forked()
            _process = process


def begin_work(longest_wait: float) -> object:
    """Let forks wait until `end_work` is called. If a fork is about to happen, wait for it.

    A fork in the middle of a call would copy what the call holds: in SQLite's memory the locks on
    the file, in OpenSSL and the C library the locks of whoever connects.

    Args:
        longest_wait: The longest that a fork waits, in seconds.

    Returns:
        What to pass to `end_work`.
    """
    if os.getpid() != _process:
        _start_again()
    thread = threading.get_ident()
    while _forking and _forking.get("thread") != thread:
        time.sleep(_POLL)
    work = object()
    _at_work[work] = (thread, longest_wait)
    return work


def end_work(work: object) -> None:
    """Let forks go on."""
    _at_work.pop(work, None)


def _before() -> None:
    thread, started = threading.get_ident(), time.monotonic()
    while _forking.setdefault("thread", thread) != thread:
        time.sleep(_POLL)
    while any(
        other != thread and time.monotonic() - started < longest_wait
        for other, longest_wait in list(_at_work.values())
    ):
        time.sleep(_POLL)


def _after_in_parent() -> None:
    _forking.clear()


def _after_in_child() -> None:
    _forking.clear()
    _at_work.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child
    )
