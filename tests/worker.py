"""What a worker process of the concurrency tests does: python worker.py MODE URL ARGUMENTS."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from threading import Barrier, Event, Thread

from sdk_tokens import make_token
from sqlalchemy import Engine, event

from zoho_orm_store import FernetCipher, SQLAlchemyTokenStore
from zoho_orm_store._sdk.conversion import OAuthToken


def save_at_once(url: str, worker: str, threads: str, mode: str) -> None:
    """Save from many threads at the same moment; print the ids, or what went wrong."""
    store = SQLAlchemyTokenStore(url, create_schema=False, timeout=90)
    barrier = Barrier(int(threads))
    failures: list[str] = []
    ids: list[str] = []

    def save(number: int) -> None:
        name = f"{worker}.{number}"
        user = "the same" if mode == "same" else name
        token = make_token(
            user=user,
            client_id="c",
            refresh_token=f"r {user}",
            access_token=f"a {name}",
            expires_in=str(int(worker) * 1000 + number),
            redirect_url=f"a {name}",
        )
        barrier.wait()
        try:
            store.save_token(token)
            ids.append(token.get_id())
        except Exception as error:  # noqa: BLE001 - reported, whatever it is
            failures.append(str(error))

    workers = [Thread(target=save, args=(n,)) for n in range(int(threads))]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    store.close()
    for failure in failures:
        print("FAILED", failure)
    for id_ in ids:
        print("ID", id_)


def save_with_and_without_user(url: str, worker: str) -> None:
    """Save each token by its refresh token alone and with its user; odd workers the other way.

    Each line on stdin names another token, so that the processes save it at the same moment.
    """
    with SQLAlchemyTokenStore(url, create_schema=False, timeout=90) as store:
        store.get_tokens()
        print("READY", flush=True)
        for line in sys.stdin:
            name = line.strip()
            fields = {"client_id": "c", "refresh_token": f"r {name}"}
            tokens = [
                make_token(**fields, access_token=f"a {worker}"),
                make_token(**fields, access_token=f"a {worker} of u", user=f"u {name}"),
            ]
            try:
                for token in tokens if int(worker) % 2 == 0 else reversed(tokens):
                    store.save_token(token)
                print("SAVED", flush=True)
            except Exception as error:  # noqa: BLE001 - reported, whatever it is
                print("FAILED", error, flush=True)


def save_until_killed(url: str) -> None:
    """Save over and over, each time a set of values that belong together."""
    store = SQLAlchemyTokenStore(url, create_schema=False)
    number = 0
    while True:
        number += 1
        store.save_token(token_from(number))
        print(number, flush=True)


def save_and_be_killed(url: str) -> None:
    """Save a set of values, and another one that is written and never committed."""
    store = SQLAlchemyTokenStore(url, create_schema=False)
    store.save_token(token_from(1))
    print("SAVED", flush=True)

    def die(connection: object, cursor: object, statement: str, *_: object) -> None:
        if statement.startswith("UPDATE oauthtoken SET"):
            print("WRITTEN", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    event.listen(Engine, "after_cursor_execute", die)
    store.save_token(token_from(2))


def token_from(number: int) -> OAuthToken:
    """A set of values that belong together."""
    return make_token(
        user="u",
        client_id="c",
        refresh_token=f"r{number}",
        access_token=f"a{number}",
        expires_in=str(number),
        redirect_url=f"u{number}",
    )


def save_and_find(url: str, worker: str, rows: str, mode: str) -> None:
    """Save and find tokens of this worker's own until stdin ends; print the last saves."""
    cipher = FernetCipher(encrypts=mode != "plain")
    store = SQLAlchemyTokenStore(url, create_schema=False, cipher=cipher)
    chosen = random.Random(int(worker))
    last: dict[str, str] = {}
    stopped = Event()
    Thread(target=lambda: (sys.stdin.read(), stopped.set()), daemon=True).start()
    print("READY", flush=True)
    while not stopped.is_set():
        number = chosen.randrange(int(rows) // 8) * 8 + int(worker)
        id_ = f"{number:032x}"
        access_token = f"1000.{worker}.{len(last)}.{chosen.random()}"
        user = f"known {number}" if mode == "plain" else None
        store.save_token(make_token(id=id_, access_token=access_token, user=user))
        last[id_] = access_token
        for asked in (id_, chosen.choice([*last])):
            if store.find_token_by_id(asked).get_access_token() != last[asked]:
                print("LOST", asked, flush=True)
        # A save must also survive a batch that began before it.
        time.sleep(0.08)
    for id_, access_token in last.items():
        if store.find_token_by_id(id_).get_access_token() != access_token:
            print("LOST", id_)
    print("SAVED", len(last))


def not_closed(url: str) -> None:
    """Use a store and leave it open; the interpreter must end all the same."""
    store = SQLAlchemyTokenStore(url)
    store.save_token(make_token(user="u", access_token="a"))
    globals()["kept"] = store
    print("done", flush=True)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
