"""A worker that uses the real SDK in several threads until it is told to stop: python soak_worker.py.

What it is given comes as a line of JSON on stdin. It prints READY, begins at the next line, and stops
when stdin ends. Since it may be killed at any time, it writes everything that happens into a journal
at once, as lines of JSON, and prints nothing else but what it is like in the end.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from contextlib import contextmanager

import sdk_process
from sdk_process import OAuthToken, whoami
from sdk_tokens import make_token
from zohocrmsdk.src.com.zoho.crm.api.exception import SDKException
from zohocrmsdk.src.com.zoho.crm.api.initializer import Initializer

from zoho_orm_store import MemoryTokenStore, RefreshPolicy, SQLAlchemyTokenStore
from zoho_orm_store._sdk.conversion import record_from
from zoho_orm_store.testing import LoopbackZoho

RETRY_AFTER = 0.2
"""Seconds after which a worker tries again what has failed."""


class Journal:
    """What happened, on disk as soon as it has happened."""

    def __init__(self, path):
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, **entry):
        os.write(self._fd, (json.dumps(entry) + "\n").encode())


class WatchedStore:
    """The store that the SDK is given: what it answers is compared, and its calls are timed."""

    def __init__(self, store, journal, users):
        self._store, self._journal, self._users = store, journal, users

    def __getattr__(self, name):
        return getattr(self._store, name)

    @contextmanager
    def _timed(self, kind):
        entry = {"kind": kind, "start": time.time()}
        started = time.monotonic()
        try:
            yield
        except SDKException as error:
            entry["error"] = f"{error!s:.300}"
            raise
        finally:
            self._journal.write(**entry, seconds=time.monotonic() - started)

    def find_token_by_id(self, id):
        with self._timed("find"):
            token = self._store.find_token_by_id(id)
        found = record_from(token).user_name
        if found != self._users[id]:
            self._journal.write(kind="wrong", what=f"{found} instead of {self._users[id]}")
        return token

    def save_token(self, token):
        with self._timed("save"):
            self._store.save_token(token)

    def get_tokens(self):
        with self._timed("list"):
            tokens = self._store.get_tokens()
        for record in map(record_from, tokens):
            is_users = self._users.get(record.id) == record.user_name
            is_note = record.access_token == f"{record.user_name} {record.grant_token}"
            if not (is_users or is_note):
                self._journal.write(kind="wrong", what=f"{record.user_name} has the id {record.id}")
        return tokens


class Worker:
    """Threads that each are a caller.

    Args:
        given: ``name``, ``url``, ``port`` (of the running `LoopbackZoho`), ``folder``, ``journal``,
            ``users`` (user names by the ids of their tokens), ``notes`` (names of rows that all
            workers save), ``threads``, ``pause`` (seconds between two calls, on the average),
            ``timeout`` and ``policy`` (of the store), and ``patience`` (seconds after which a
            thread gives up what always fails).
    """

    def __init__(self, given):
        self.given = given
        self.journal = Journal(given["journal"])
        self.real_store = SQLAlchemyTokenStore(
            given["url"],
            create_schema=False,
            timeout=given["timeout"],
            refresh=RefreshPolicy(**given["policy"]),
        )
        self.store = WatchedStore(self.real_store, self.journal, given["users"])
        self.stopped = threading.Event()
        idle = OAuthToken(client_id="c", client_secret="s", access_token="a", refresh_token="r")
        idle.set_expires_in(str(int(time.time() * 1000) + 3_600_000))
        zoho = LoopbackZoho(port=given["port"])  # never started: it knows where the other is
        sdk_process.start(zoho, idle, MemoryTokenStore(), given["folder"])
        Initializer.initializer.store = self.store

    def call(self, thread, number):
        """Be a user, and ask the CRM who that is."""
        id = random.choice([*self.given["users"]])
        wanted = self.given["users"][id].partition(":")[0]
        Initializer.switch_user(token=OAuthToken(id=id))
        found = whoami()
        if found != wanted:
            self.journal.write(kind="wrong", what=f"the CRM takes {wanted} for {found}")

    def save(self, thread, number):
        """Save a new value into a row of this thread's own, or into one that everybody saves."""
        own = f"{self.given['name']} {thread}"
        row = random.choice([own, own, *self.given["notes"]])
        value = f"{own} {number} {time.time_ns()}"
        entry = {"row": row, "value": value}
        self.journal.write(kind="saving", at=time.time(), **entry)
        token = make_token(
            user=row, client_id="c", grant_token=value, access_token=f"{row} {value}"
        )
        self.store.save_token(token)
        self.journal.write(kind="saved", at=time.time(), **entry)

    def list(self, thread, number):
        self.store.get_tokens()

    def be_a_caller(self, thread):
        number = 0
        while not self.stopped.wait(random.uniform(0, 2 * self.given["pause"])):
            number += 1
            (do,) = random.choices([self.call, self.save, self.list], [16, 8, 1])
            began = time.time()
            try:
                while not self.succeeds(do, thread, number):
                    if time.time() - began > self.given["patience"]:
                        self.journal.write(kind="gave up", at=began, what=do.__name__)
                        break
                    time.sleep(RETRY_AFTER)
            except Exception as error:  # noqa: BLE001 - reported, whatever it is
                self.journal.write(kind="wrong", what=f"{type(error).__name__}: {error!s:.300}")

    def succeeds(self, do, thread, number):
        began = time.time()
        try:
            do(thread, number)
        except SDKException as error:
            self.journal.write(kind="failed", at=began, what=f"{do.__name__}: {error!s:.300}")
            return False
        return True

    def run(self):
        threads = [
            threading.Thread(target=self.be_a_caller, args=(number,))
            for number in range(self.given["threads"])
        ]
        for thread in threads:
            thread.start()
        sys.stdin.read()
        self.stopped.set()
        for thread in threads:
            thread.join()
        self.real_store.close()


def main() -> None:
    worker = Worker(json.loads(sys.stdin.readline()))
    print("READY", flush=True)
    sys.stdin.readline()
    worker.run()
    stats = worker.real_store.refresh_stats._asdict()
    print(json.dumps({"threads": threading.active_count(), "stats": stats}), flush=True)


if __name__ == "__main__":
    main()
