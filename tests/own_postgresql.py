"""A PostgreSQL server of a test's own, which the test may stop and kill."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from programs import PG_CTL, free_port, running
from sqlalchemy import URL

if TYPE_CHECKING:
    from collections.abc import Iterator

OPTIONS = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
"""PostgreSQL refuses to run as root."""


class Outage:
    """When nobody could use the server, in epoch seconds."""

    def __init__(self) -> None:
        self.began = time.time()
        self.ended = float("inf")


class OwnPostgreSQL:
    """A running server in a folder, on a port of its own.

    Attributes:
        url: The URL of the administrator's database.
        outages: When the server was down.
    """

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._port = free_port()
        self.url = URL.create(
            "postgresql+psycopg", "postgres", host="127.0.0.1", port=self._port, database="postgres"
        )
        self.outages: list[Outage] = []
        self._run("initdb", "-A", "trust", "-U", "postgres", "--no-sync")
        self._start()

    def restart(self, mode: str, seconds: float) -> None:
        """Stop the server, and start it again after some seconds.

        It is started by the caller's thread and ends with it: call this in the main thread.

        Args:
            mode: ``"fast"`` ends all sessions; ``"immediate"`` stops as in a crash.
            seconds: How long it stays down.
        """
        outage = Outage()
        self.outages.append(outage)
        self._run("pg_ctl", "stop", f"--mode={mode}")
        time.sleep(seconds)
        self._start()
        outage.ended = time.time()

    def _start(self) -> None:
        settings = {
            "port": self._port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": self._folder,
            "fsync": "off",  # The machine does not crash, only the server.
        }
        command = [PG_CTL.with_name("postgres"), "-D", self._data]
        command += [f"--{name}={value}" for name, value in settings.items()]
        self._stack.enter_context(running(command, self._port, cwd=self._folder, **OPTIONS))
        # It listens a little before it accepts connections.
        while not self._accepts():
            time.sleep(0.02)

    def _accepts(self) -> bool:
        ready = [PG_CTL.with_name("pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self._port)]
        return subprocess.run(ready, check=False).returncode == 0

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [PG_CTL.with_name(program), *arguments, "-D", self._data],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            cwd=self._folder,
            **OPTIONS,
        )


@contextmanager
def own_postgresql() -> Iterator[OwnPostgreSQL]:
    """Run a server, and remove it with everything in it."""
    folder = Path(tempfile.mkdtemp(prefix="postgresql"))
    if OPTIONS:
        shutil.chown(folder, OPTIONS["user"], OPTIONS["group"])
    try:
        with ExitStack() as stack:
            yield OwnPostgreSQL(folder, stack)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
