"""A thread with an event loop, in which synchronous code runs coroutines."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import selectors
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from zoho_orm_store._database.drivers import gevent_monkey
from zoho_orm_store._database.origin import is_raised_elsewhere
from zoho_orm_store.errors import ConfigurationError, DatabaseTimeoutError, StoreClosedError

if TYPE_CHECKING:
    from collections.abc import Coroutine

__all__ = ["LoopThread"]

T = TypeVar("T")

_LONGEST_STOP = 0.4
"""Seconds that `LoopThread.stop` waits. The thread may go on for a while."""

_FIRST_POLL = 0.0005
_POLL = 0.005

_CLEANUP = (2.5, 1.0)
"""Seconds that cancelled coroutines have to close connections, before they are cancelled again."""

_abandoned: list[asyncio.AbstractEventLoop] = []
"""Loops of a parent process, kept from being finalized in a child while it runs."""


class LoopThread:
    """Runs coroutines in a daemon thread of its own, which starts with the first one.

    It may be called from any thread, and inside a running event loop, where it blocks the caller.
    It never keeps the interpreter from exiting.
    """

    _lock: threading.Lock
    _thread: _Thread
    _running: set[concurrent.futures.Future[Any] | _PolledFuture]

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self.abandon()

    def run(self, coroutine: Coroutine[object, object, T], timeout: float | None) -> T:
        """Run a coroutine and wait for its result.

        Args:
            coroutine: The coroutine to run.
            timeout: The longest wait, in seconds; ``None`` sets no limit.

        Raises:
            DatabaseTimeoutError: The coroutine did not finish in time and was cancelled.
            StoreClosedError: `stop` was called meanwhile, or the interpreter is exiting.
            ConfigurationError: The caller runs in this thread itself.
        """
        try:
            loop = self._usable_loop()
        except BaseException:
            coroutine.close()
            raise
        future = _submit(coroutine, loop)
        self._running.add(future)
        try:
            result: T = future.result(timeout)
            return result
        except concurrent.futures.CancelledError:
            raise StoreClosedError from None
        except concurrent.futures.TimeoutError as error:
            # A signal handler may raise the same.
            if future.done() or is_raised_elsewhere(error):
                raise
        finally:
            future.cancel()
            self._running.discard(future)
        raise DatabaseTimeoutError("The database did not answer in time.")

    def begin(self, coroutine: Coroutine[object, object, object]) -> None:
        """Run a coroutine without waiting for it. Its errors are of no interest."""
        _submit(coroutine, self._usable_loop())

    def _usable_loop(self) -> asyncio.AbstractEventLoop:
        if self._thread.is_this_one():
            raise ConfigurationError(
                "The store was called from its own event loop, which would wait for itself."
            )
        if sys.is_finalizing():  # The loop's thread has been stopped for good.
            raise StoreClosedError("The interpreter is exiting, so the store cannot be used.")
        with self._lock:
            if self._loop is None:
                self._loop = _Loop(_selector())
                self._thread = _Thread(self._loop)
                self._thread.start()
            return self._loop

    def cancel(self) -> None:
        """Cancel what is running. Its callers get a `StoreClosedError` at once."""
        for future in list(self._running):
            future.cancel()

    def stop(self) -> None:
        """Cancel what is running, and end the thread. The next `run` starts another one."""
        self.cancel()
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is not None and not sys.is_finalizing():
            _submit(_end(loop), loop)
            self._thread.wait(_LONGEST_STOP)

    def abandon(self) -> None:
        """Forget the thread, in a forked child where it does not run."""
        if self._loop is not None:
            _abandoned.append(self._loop)
        self._loop = None
        self._thread = _Thread(None)
        self._lock = threading.Lock()
        self._running = set()


class _Thread:
    """A daemon thread that runs an event loop until it is stopped, and closes it.

    Under gevent it is a real thread all the same: asyncio allows a real thread one running loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self._loop = loop
        self._ident: int | None = None

    def start(self) -> None:
        if monkey := gevent_monkey():
            monkey.get_original("_thread", "start_new_thread")(self._run, ())
        else:
            threading.Thread(target=self._run, name="zoho-orm-store", daemon=True).start()

    def is_this_one(self) -> bool:
        return self._ident == threading.get_ident()

    def wait(self, seconds: float) -> None:
        """Wait until the loop is closed."""
        deadline = time.monotonic() + seconds
        while self._loop is not None and time.monotonic() < deadline:
            time.sleep(_POLL)

    def _run(self) -> None:
        loop = self._loop
        self._ident = threading.get_ident()
        try:
            if loop is not None:
                asyncio.set_event_loop(loop)
                loop.run_forever()
                loop.close()
        finally:
            self._loop = self._ident = None


async def _end(loop: asyncio.AbstractEventLoop) -> None:
    for seconds in _CLEANUP:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            await asyncio.wait(others, timeout=seconds)
        for task in others:
            task.cancel()
    loop.stop()


def _submit(
    coroutine: Coroutine[object, object, Any], loop: asyncio.AbstractEventLoop
) -> concurrent.futures.Future[Any] | _PolledFuture:
    """Run a coroutine in a loop of another thread."""
    if gevent_monkey():
        return _PolledFuture(coroutine, loop)
    return asyncio.run_coroutine_threadsafe(coroutine, loop)


class _PolledFuture:
    """A ``concurrent.futures.Future`` for greenlets.

    gevent's locks, which it would use, are not made to be shared with a real thread.
    """

    def __init__(
        self, coroutine: Coroutine[object, object, Any], loop: asyncio.AbstractEventLoop
    ) -> None:
        self._coroutine = coroutine
        self._loop = loop
        self._task: asyncio.Task[None] | None = None
        self._outcomes: list[tuple[Any, BaseException | None]] = []
        loop.call_soon_threadsafe(self._start)

    def done(self) -> bool:
        return bool(self._outcomes)

    def result(self, timeout: float | None) -> Any:  # noqa: ANN401
        deadline = None if timeout is None else time.monotonic() + timeout
        pause = _FIRST_POLL
        while not self._outcomes:
            if deadline is not None and time.monotonic() >= deadline:
                raise concurrent.futures.TimeoutError
            time.sleep(pause)
            pause = min(2 * pause, _POLL)
        result, error = self._outcomes[0]
        if error is not None:
            raise error
        return result

    def cancel(self) -> None:
        if not self._outcomes:
            self._outcomes.append((None, concurrent.futures.CancelledError()))
            with suppress(RuntimeError):  # The loop is closed.
                self._loop.call_soon_threadsafe(self._cancel_task)

    def _start(self) -> None:
        self._task = self._loop.create_task(self._run())

    def _cancel_task(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        try:
            self._outcomes.append((await self._coroutine, None))
        except BaseException as error:  # noqa: BLE001 - the caller raises it
            self._outcomes.append((None, error))


class _Loop(asyncio.SelectorEventLoop):
    async def getaddrinfo(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Look a host up. asyncio uses a further thread, which gevent would make a greenlet."""
        if monkey := gevent_monkey():
            return monkey.get_original("socket", "getaddrinfo")(*args, **kwargs)
        return await super().getaddrinfo(*args, **kwargs)


class _OfOneProcess(selectors.BaseSelector):
    """A selector that a forked child cannot change.

    The kernel's part of a selector is shared by parent and child. When the child exits, its copy
    of the loop is finalized and would remove the parent's sockets from it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._process = os.getpid()

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:  # noqa: ANN401
        if os.getpid() == self._process:
            return super().unregister(fileobj)
        return self.get_key(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:  # noqa: ANN401
        if os.getpid() == self._process:
            return super().modify(fileobj, events, data)
        return self.get_key(fileobj)


def _selector() -> selectors.BaseSelector:
    default: Any = selectors.DefaultSelector
    if monkey := gevent_monkey():
        default = monkey.get_original("selectors", "DefaultSelector")
    kind = type("Selector", (_OfOneProcess, default), {})
    selector: selectors.BaseSelector = kind()
    return selector
