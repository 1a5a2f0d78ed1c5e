"""What a worker process of the concurrency tests does: python worker.py MODE URL ARGUMENTS."""

from __future__ import annotations

import sys
from threading import Barrier, Thread

from conftest import make_token

from zoho_orm_store import SQLAlchemyTokenStore


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


def save_until_killed(url: str) -> None:
    """Save over and over, each time a set of values that belong together."""
    store = SQLAlchemyTokenStore(url, create_schema=False)
    number = 0
    while True:
        number += 1
        store.save_token(
            make_token(
                user="u",
                client_id="c",
                refresh_token=f"r{number}",
                access_token=f"a{number}",
                expires_in=str(number),
                redirect_url=f"u{number}",
            )
        )
        print(number, flush=True)


def not_closed(url: str) -> None:
    """Use a store and leave it open; the interpreter must end all the same."""
    store = SQLAlchemyTokenStore(url)
    store.save_token(make_token(user="u", access_token="a"))
    globals()["kept"] = store
    print("done", flush=True)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
