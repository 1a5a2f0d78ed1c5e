"""Worker processes with the real SDK, for tests and benchmarks of many at once."""

from __future__ import annotations

import atexit
import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preloaded import Interpreter
from sdk_tokens import make_token

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

PYTHON = Interpreter(
    *("cryptography.fernet", "psycopg", "pymysql", "sqlalchemy.ext.asyncio"),
    "zohocrmsdk.src.com.zoho.crm.api.initializer",
    **ENVIRONMENT,
)
"""Has what all workers import, but for the package itself."""
atexit.register(PYTHON.close)

_idle: list[Process] = []
"""Processes that have done their work."""


class Process:
    """A worker process; see `sdk_worker.Worker` for what it is given."""

    def __init__(self) -> None:
        self.is_idle = True
        self._program = PYTHON.start(str(HERE / "sdk_worker.py"))

    def prepare(self, given: dict[str, object]) -> None:
        self.is_idle = False
        self._tell(json.dumps(given))

    def wait_until_ready(self) -> None:
        assert self._program.stdout.readline() == "READY\n"

    def go(self) -> None:
        self._tell("GO")

    def signal(self, number: int) -> None:
        self._program.send_signal(number)

    def result(self) -> dict[str, Any]:
        result = json.loads(self._program.stdout.readline())
        self.is_idle = True
        return result

    def kill(self) -> None:
        self._program.kill()
        self._program.communicate()

    def _tell(self, line: str) -> None:
        self._program.stdin.write(f"{line}\n")
        self._program.stdin.flush()


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
    chosen = [_idle.pop() if _idle else Process() for _ in range(number)]
    try:
        for each in chosen:
            each.prepare(given)
        for each in chosen:
            each.wait_until_ready()
        yield chosen
    finally:
        for each in chosen:
            if each.is_idle:
                _idle.append(each)
            else:
                each.kill()


def stop_processes() -> None:
    """End the processes that are kept for later."""
    while _idle:
        _idle.pop().kill()


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


def run(processes):
    for process in processes:
        process.go()
    results = [process.result() for process in processes]
    return results, [failure for result in results for failure in result["failures"]]


def calls_of(results):
    return [call for result in results for call in result["calls"]]


def total(results, name):
    return sum(result["stats"][name] for result in results)
