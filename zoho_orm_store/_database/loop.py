"""A thread with an event loop, in which synchronous code runs coroutines."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from typing import TYPE_CHECKING, TypeVar

from zoho_orm_store.errors import ConfigurationError, DatabaseTimeoutError

if TYPE_CHECKING:
    from collections.abc import Coroutine

__all__ = ["LoopThread"]

T = TypeVar("T")

_abandoned: list[asyncio.AbstractEventLoop] = []
"""Loops of a parent process. Finalizing one in a child would disturb the shared selector."""


class LoopThread:
    """Runs coroutines in a daemon thread of its own, which starts with the first one.

    It may be called from any thread, and inside a running event loop, where it blocks the caller.
    It never keeps the interpreter from exiting.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def run(self, coroutine: Coroutine[object, object, T], timeout: float | None) -> T:
        """Run a coroutine and wait for its result.

        Args:
            coroutine: The coroutine to run.
            timeout: The longest wait, in seconds; ``None`` sets no limit.

        Raises:
            DatabaseTimeoutError: The coroutine did not finish in time and was cancelled.
            ConfigurationError: The caller runs in this thread itself.
        """
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise ConfigurationError(
                "The store was called from its own event loop, which would wait for itself."
            )
        future = asyncio.run_coroutine_threadsafe(coroutine, self._started())
        try:
            return future.result(timeout)
        except concurrent.futures.TimeoutError:
            if future.done():
                raise
        finally:
            future.cancel()
        raise DatabaseTimeoutError("The database did not answer in time.")

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._loop.run_forever, name="zoho-orm-store", daemon=True
                )
                self._thread.start()
            return self._loop

    def stop(self) -> None:
        """Stop the loop and wait for its thread to end; the next `run` starts another."""
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is None or thread is None:
            return
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

    def abandon(self) -> None:
        """Forget the thread, in a forked child where it does not run."""
        self._lock = threading.Lock()
        if self._loop is not None:
            _abandoned.append(self._loop)
        self._loop = self._thread = None
