"""Programs that fork in ways that a test's own process must not: python forking.py MODE ARGUMENTS.

Each prints a line for everything that went wrong, and "DONE" at the end.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from itertools import product

from sdk_tokens import known, make_token
from sqlalchemy import create_engine, make_url
from sqlalchemy.ext.asyncio import create_async_engine

from zoho_orm_store import RefreshPolicy, SQLAlchemyTokenStore

fork_in_c = ctypes.PyDLL(None).fork
"""As servers that are written in C fork: Python's hooks do not run."""

LONGEST = 10
"""Seconds after which a child is killed."""


def after_forks_in_c(*urls: str) -> None:
    """Use a store before a fork, and then in the parent and the child at once."""
    for url in urls:
        for kind in ("url", "engine"):
            with store_of(url, kind) as store:
                go_on_after_a_fork_in_c(f"{make_url(url).drivername} by {kind}", store)


def store_of(url: str, kind: str) -> SQLAlchemyTokenStore:
    bind: object = url
    if kind == "engine":
        is_async = make_url(url).get_dialect().is_async
        bind = create_async_engine(url) if is_async else create_engine(url)
    return SQLAlchemyTokenStore(bind, create_schema=False, timeout=LONGEST / 2)


def go_on_after_a_fork_in_c(name: str, store: SQLAlchemyTokenStore) -> None:
    for user in ("parent", "child"):
        work(store, user, 1)
    pid = fork_in_c()
    if pid == 0:
        in_child(lambda: work(store, "child", 10), f"{name}, child")
    attempt(lambda: work(store, "parent", 10), f"{name}, parent")
    wait_for(pid, f"{name}, child")
    attempt(lambda: work(store, "parent", 3), f"{name}, parent after its child")


def work(store: SQLAlchemyTokenStore, user: str, rounds: int) -> None:
    """Save and find a user's token."""
    for number in range(rounds):
        store.save_token(make_token(id=user, user=user, access_token=f"{user} {number}"))
        for found in (store.find_token_by_id(user), store.find_token(make_token(user=user))):
            expected = {"user_name": user, "access_token": f"{user} {number}"}
            assert known(found) == expected, f"{known(found)} for {expected}"


def with_a_lease_of_the_parent(url: str) -> None:
    """Let a child that was forked in C look up what its parent is about to refresh."""
    policy = RefreshPolicy(wait=0.3)
    with SQLAlchemyTokenStore(url, refresh=policy) as store:
        token = make_token(user="u", client_id="c", refresh_token="r", access_token="a")
        token.set_expires_in("1")
        store.save_token(token)
        store.find_token_by_id(token.get_id())
        assert store.refresh_stats.acquired == 1
        pid = fork_in_c()
        if pid == 0:

            def look_up() -> None:
                store.find_token_by_id(token.get_id())
                stats = store.refresh_stats
                assert (stats.acquired, stats.timed_out) == (0, 1), f"the child has {stats}"

            in_child(look_up, "child")
        wait_for(pid, "child")


def whose_children_exit(*urls: str) -> None:
    """Fork children that end as a program does, with all that the interpreter finalizes."""
    stores = {
        f"{make_url(url).drivername} by {kind}": store_of(url, kind)
        for url, kind in product(urls, ("url", "engine"))
    }
    for store in stores.values():
        work(store, "parent", 2)
    for child_uses_them in (False, True):
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(LONGEST)
            if child_uses_them:
                for store in stores.values():
                    work(store, "child", 1)
            sys.exit(0)
        wait_for(pid, "the child")
        for name, store in stores.items():
            started = time.monotonic()
            attempt(lambda store=store: work(store, "parent", 1), name)
            seconds = time.monotonic() - started
            if seconds > 2:
                print(f"{name}: the parent's next call took {seconds:.1f} s")


def in_threads(url: str, threads: str, children: str) -> None:
    """Fork in several threads at once while other threads save."""
    with SQLAlchemyTokenStore(url) as store:
        work(store, "first", 1)
        stopped = threading.Event()

        def keep_saving(user: str) -> None:
            while not stopped.is_set():
                attempt(lambda: work(store, user, 1), user)

        def keep_forking(number: int) -> None:
            for n in range(int(children) // int(threads)):
                name = f"child {number}.{n}"
                pid = os.fork()
                if pid == 0:
                    in_child(lambda name=name: work(store, name, 1), name)
                wait_for(pid, name)

        saving = [threading.Thread(target=keep_saving, args=(f"saver {n}",)) for n in range(2)]
        forking = [threading.Thread(target=keep_forking, args=(n,)) for n in range(int(threads))]
        for thread in (*saving, *forking):
            thread.start()
        for thread in forking:
            thread.join()
        stopped.set()
        for thread in saving:
            thread.join()
        stored = {known(token)["user_name"] for token in store.get_tokens()}
        expected = int(children) // int(threads) * int(threads) + 3
        if len(stored) != expected:
            print(f"{len(stored)} tokens are stored, and not {expected}")


def in_child(do: object, name: str) -> None:
    """Do something in a forked child, and end it."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(LONGEST)
    attempt(do, name)
    sys.stdout.flush()
    os._exit(0)


def wait_for(pid: int, name: str) -> None:
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        print(f"{name}: hung or crashed, signal {os.WTERMSIG(status)}", flush=True)
    elif status:
        print(f"{name}: ended with {os.WEXITSTATUS(status)}", flush=True)


def attempt(do: object, name: str) -> None:
    try:
        do()
    except Exception as error:  # noqa: BLE001 - reported, whatever it is
        print(f"{name}: {type(error).__name__} {error!s:.300}", flush=True)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    print("DONE", flush=True)
