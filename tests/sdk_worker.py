"""A worker process that uses the real SDK in several threads: python sdk_worker.py.

What it is to do comes as a line of JSON on stdin. It prints READY, does it when another line comes,
and prints what happened as a line of JSON; and so on, until stdin ends.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from threading import Barrier, Thread

import sdk_process
from sdk_process import OAuthToken, whoami
from zohocrmsdk.src.com.zoho.crm.api.initializer import Initializer

from zoho_orm_store import MemoryTokenStore, RefreshPolicy, SQLAlchemyTokenStore
from zoho_orm_store.testing import LoopbackZoho


class Worker:
    """Threads that each are a caller.

    Args:
        given: ``url``, ``port`` (of the running `LoopbackZoho`), ``folder``, ``token`` (arguments
            of an ``OAuthToken``), ``threads``, ``policy`` (arguments of a `RefreshPolicy`),
            ``seconds`` (0 for one call), ``pause`` (between two calls, on the average) and
            ``warm_up`` (seconds after which lookups are timed).
    """

    def __init__(self, given):
        self.given = given
        self.zoho = LoopbackZoho(port=given["port"])  # never started: it knows where the other is
        policy = given.get("policy", {})
        self.store = SQLAlchemyTokenStore(
            given["url"],
            create_schema=False,
            refresh=None if policy is None else RefreshPolicy(**policy),
        )
        self.failures = []
        self.calls = []
        self.lookups = []
        self.timed_from = 0.0

    def start(self):
        """Make the SDK ready without a call to the store."""
        idle = OAuthToken(client_id="c", client_secret="s", access_token="a", refresh_token="r")
        idle.set_expires_in(str(int(time.time() * 1000) + 3_600_000))
        sdk_process.start(self.zoho, idle, MemoryTokenStore(), self.given["folder"])
        Initializer.initializer.store = self.store
        self.barrier = Barrier(self.given["threads"])
        find = self.store.find_token_by_id

        def find_and_time(id):
            started = time.perf_counter()
            token = find(id)
            seconds = time.perf_counter() - started
            # Who is to refresh it is handed an expired pair. The others are not to wait for that.
            is_to_refresh = token is not None and "refresh_access_token" in vars(token)
            if token is not None and not is_to_refresh and started > self.timed_from:
                has_ended = int(token.get_expires_in()) <= time.time() * 1000
                self.lookups.append((seconds, has_ended))
            return token

        self.store.find_token_by_id = find_and_time

    def call(self):
        """Be a caller: become the user, and ask the CRM who that is."""
        started = time.perf_counter()
        try:
            token = OAuthToken(**self.given["token"])
            Initializer.switch_user(token=token)
            self.calls.append((time.perf_counter() - started, token.get_id()))
            whoami()
        except Exception as error:  # noqa: BLE001 - reported, whatever it is
            self.failures.append((time.perf_counter() - started, f"{error!s:.300}"))

    def be_called(self):
        self.barrier.wait()
        until = time.monotonic() + self.given.get("seconds", 0)
        self.timed_from = time.perf_counter() + self.given.get("warm_up", 0)
        self.call()
        while time.monotonic() < until:
            time.sleep(random.uniform(0, 2 * self.given["pause"]))
            self.call()

    def run(self):
        threads = [Thread(target=self.be_called) for _ in range(self.given["threads"])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {
            "pid": os.getpid(),
            "calls": self.calls,
            "failures": self.failures,
            "lookups": self.lookups,
            "stats": self.store.refresh_stats._asdict(),
        }


def main() -> None:
    for line in sys.stdin:
        worker = Worker(json.loads(line))
        worker.start()
        print("READY", flush=True)
        sys.stdin.readline()
        print(json.dumps(worker.run()), flush=True)
        worker.store.close()
        assert threading.active_count() == 1


if __name__ == "__main__":
    main()
