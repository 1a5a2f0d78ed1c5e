"""Worker processes with the real SDK, for tests and benchmarks of many at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from conftest import make_token

from zoho_orm_store import SQLAlchemyTokenStore

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import URL

    from zoho_orm_store.testing import LoopbackZoho

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {
    "NO_PROXY": "127.0.0.1",
    "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
}


class Process:
    """A worker process; see `sdk_worker.Worker` for what it is given."""

    def __init__(self, given):
        self._popen = subprocess.Popen(
            [sys.executable, str(HERE / "sdk_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        self.tell(json.dumps(given))

    def tell(self, line):
        self._popen.stdin.write(f"{line}\n")
        self._popen.stdin.flush()

    def wait_until_ready(self):
        assert self._popen.stdout.readline() == "READY\n", self._popen.stderr.read()

    def go(self):
        self.tell("GO")

    def signal(self, number):
        self._popen.send_signal(number)

    def result(self, timeout=60):
        out, errors = self._popen.communicate(timeout=timeout)
        assert self._popen.returncode == 0, errors
        return json.loads(out)

    def kill(self):
        self._popen.kill()
        self._popen.communicate()


@contextmanager
def processes(
    number: int, url: URL, zoho: LoopbackZoho, folder: Path, token: dict[str, str], **given: object
) -> Iterator[list[Process]]:
    """So many worker processes, all of them ready to go."""
    given |= {
        "url": url.render_as_string(hide_password=False),
        "port": int(zoho.url.rpartition(":")[2]),
        "folder": str(folder),
        "token": token,
    }
    made = [Process(given) for _ in range(number)]
    try:
        for each in made:
            each.wait_until_ready()
        yield made
    finally:
        for each in made:
            each.kill()


def store_expired(url: URL, zoho: LoopbackZoho) -> str:
    """Store a token that has expired, and return its id."""
    token = make_token(
        user=zoho.user_name(),
        client_id=zoho.client_id,
        client_secret=zoho.client_secret,
        refresh_token=zoho.issue_refresh_token(),
        access_token="1000.expired",
        expires_in="1",
    )
    with SQLAlchemyTokenStore(url, create_schema=False) as store:
        store.save_token(token)
    return token.get_id()


def run(processes, timeout=60):
    for process in processes:
        process.go()
    results = [process.result(timeout) for process in processes]
    return results, [failure for result in results for failure in result["failures"]]


def calls_of(results):
    return [call for result in results for call in result["calls"]]


def total(results, name):
    return sum(result["stats"][name] for result in results)
