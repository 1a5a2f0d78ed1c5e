"""Telling long-lived objects that they are in a forked child now."""

from __future__ import annotations

import os
import weakref
from typing import Protocol

__all__ = ["Forkable", "tell_forked_children"]


class Forkable(Protocol):
    """Something with locks, threads or connections, which a fork copies without their owners."""

    def forked(self) -> None:
        """Start anew in the child, without touching what the parent goes on using."""


_forkables: weakref.WeakSet[Forkable] = weakref.WeakSet()


def tell_forked_children(forkable: Forkable) -> None:
    """Call an object's ``forked`` in every child that is forked while the object lives."""
    _forkables.add(forkable)


def _tell() -> None:
    for forkable in list(_forkables):
        forkable.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_tell)
