"""A PostgreSQL server of our own and its synchronous standby."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
from programs import PG_CTL, free_port, running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OTHER_USER = {"user": "postgres", "group": "postgres", "extra_groups": []}
"""PostgreSQL refuses to run as root."""


@dataclass
class Pair:
    """Two servers. Whatever the primary has acknowledged, the standby has as well."""

    primary_port: int
    standby_port: int
    kill_primary: Callable[[], None]
    promote_standby: Callable[[], None]


@contextmanager
def primary_and_standby() -> Iterator[Pair]:
    """Run a primary and a standby that replicates every commit before it is acknowledged."""
    options = OTHER_USER if os.geteuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="standby"))
    if options:
        shutil.chown(folder, "postgres", "postgres")

    def run(program: str, *arguments: object) -> None:
        subprocess.run(
            [str(PG_CTL.with_name(program)), *map(str, arguments)],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            cwd=folder,
            **options,
        )

    def server(name: str, port: int) -> object:
        settings = {
            "port": port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "fsync": "off",
        }
        command = [PG_CTL.with_name("postgres"), "-D", folder / name]
        command += [f"--{setting}={value}" for setting, value in settings.items()]
        return running(command, port, end_by=signal.SIGINT, cwd=folder, **options)

    ports = free_port(), free_port()
    try:
        run("initdb", "-D", folder / "primary", "-A", "trust", "-U", "postgres", "--no-sync")
        with ExitStack() as stack:
            stack.enter_context(server("primary", ports[0]))
            run(
                *("pg_basebackup", "-h", "127.0.0.1", "-p", ports[0], "-U", "postgres"),
                *("-D", folder / "standby", "--write-recovery-conf", "--checkpoint=fast"),
            )
            stack.enter_context(server("standby", ports[1]))
            address = f"host=127.0.0.1 port={ports[0]} user=postgres dbname=postgres"
            with psycopg.connect(address, autocommit=True) as connection:
                connection.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
                connection.execute("SELECT pg_reload_conf()")
            yield Pair(
                *ports,
                lambda: run("pg_ctl", "stop", "-D", folder / "primary", "--mode=immediate"),
                lambda: run("pg_ctl", "promote", "-D", folder / "standby", "--wait"),
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
