"""Servers and proxies that tests start: which are installed, and how one is started and ended."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SCRIPTS = Path(sysconfig.get_path("scripts"))
"""Where the packages of the running interpreter put their programs."""

PGBOUNCER = shutil.which("pgbouncer", path=os.pathsep.join([os.defpath, "/usr/sbin", "/sbin"]))

PG_CTL = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"), reverse=True)), None)
"""The program that starts a PostgreSQL server, which is in no PATH on Debian."""


_SERVERS_PATH = os.pathsep.join([os.defpath, "/usr/sbin", "/sbin"])

MARIADBD = shutil.which("mariadbd", path=_SERVERS_PATH)

GALERA = Path("/usr/lib/galera/libgalera_smm.so")
"""The library that makes a MariaDB server a node of a cluster."""


def _why_absent() -> Iterator[tuple[str, str]]:
    if PGBOUNCER is None:
        yield "pgbouncer", "it is not installed (apt-get install pgbouncer)."
    if PG_CTL is None:
        yield "pg_ctl", "PostgreSQL is not installed on this machine (apt-get install postgresql)."
    if MARIADBD is None or not GALERA.exists() or shutil.which("rsync") is None:
        yield "galera", "it is not installed (apt-get install mariadb-server galera-4 rsync)."
    if not (SCRIPTS / "uwsgi").exists():
        yield "uwsgi", "it is not installed (pip install pyuwsgi)."
    if not (SCRIPTS / "gunicorn").exists() or importlib.util.find_spec("gevent") is None:
        yield "gunicorn-gevent", "it is not installed (pip install gunicorn gevent)."


ABSENT_PROGRAMS = dict(_why_absent())
"""What is not installed, and why. A test module names what it needs in ``NEEDS``."""


def free_port() -> int:
    """A port of 127.0.0.1 on which nothing listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


@contextmanager
def running(
    command: Sequence[object],
    port: int,
    *,
    seconds: float = 30,
    end_by: int = signal.SIGKILL,
    **options: object,
) -> Iterator[Output]:
    """Run a program in the foreground from the time at which it listens on a port.

    Args:
        command: The program and its arguments.
        port: The port of 127.0.0.1 on which it is going to listen.
        seconds: How long that may take.
        end_by: The signal that ends it. All processes of its group are killed after that.
        options: More arguments of ``subprocess.Popen``.
    """
    with tempfile.TemporaryFile() as file:
        process = subprocess.Popen(
            [str(each) for each in command],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_its_parent,
            **options,
        )
        output = Output(file)
        try:
            _wait_until_it_listens(process, port, seconds, output)
            yield output
        finally:
            process.send_signal(end_by)
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def _end_with_its_parent() -> None:
    """Have the kernel end this process when the tests are killed, which then clean up nothing."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Output:
    """What a program has written so far."""

    def __init__(self, file: object) -> None:
        self._fd = file.fileno()

    def __str__(self) -> str:
        return os.pread(self._fd, 1_000_000, 0).decode(errors="replace")


def _wait_until_it_listens(
    process: subprocess.Popen[bytes], port: int, seconds: float, output: Output
) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        assert process.poll() is None, f"it has ended:\n{output}"
        assert time.monotonic() < deadline, f"it does not listen:\n{output}"
        time.sleep(0.02)
