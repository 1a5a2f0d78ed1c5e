"""A MariaDB Galera cluster of a test's own: three nodes on this machine, each of which may be killed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from programs import GALERA, MARIADBD, free_port, running
from sqlalchemy import URL, create_engine, exc, text
from sqlalchemy.pool import NullPool

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

OPTIONS = {"user": "mysql", "group": "mysql", "extra_groups": []} if os.geteuid() == 0 else {}
"""MariaDB refuses to run as root."""

SETTINGS = {
    "bind-address": "127.0.0.1",
    "binlog-format": "ROW",
    "innodb-autoinc-lock-mode": 2,
    "innodb-buffer-pool-size": "64M",
    "innodb-flush-log-at-trx-commit": 0,  # The machine does not crash, only a node.
    "innodb-log-file-size": "16M",
    "max-connections": 300,
    "wsrep-on": "ON",
    "wsrep-provider": GALERA,
    "wsrep-node-address": "127.0.0.1",
    "wsrep-sst-method": "rsync",
}


class Node:
    """A server of the cluster.

    Attributes:
        url: The URL of the database ``test`` on this server.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self._folder = folder / f"node{number}"
        self._port, self.group_port, self._ist_port, self._sst_port = free_ports(4)
        self._stack = ExitStack()
        self._server = URL.create("mysql+pymysql", "root", host="127.0.0.1", port=self._port)
        self.url = self._server.set(database="test")

    def start(self, cluster: Sequence[Node], *, is_first: bool = False) -> None:
        """Start the server and wait until it has joined the cluster."""
        members = ",".join(f"127.0.0.1:{node.group_port}" for node in cluster)
        provider = f"base_port={self.group_port};ist.recv_addr=127.0.0.1:{self._ist_port}"
        settings = SETTINGS | {
            "datadir": self._folder,
            "port": self._port,
            "socket": self._folder / "server.sock",
            "pid-file": self._folder / "server.pid",
            "wsrep-cluster-address": f"gcomm://{members}",
            "wsrep-provider-options": f"{provider};gcache.size=16M",
            "wsrep-sst-receive-address": f"127.0.0.1:{self._sst_port}",
        }
        command = [MARIADBD, "--no-defaults", *(f"--{key}={settings[key]}" for key in settings)]
        if is_first:
            command.append("--wsrep-new-cluster")
        self._stack.enter_context(
            running(command, self._port, seconds=120, cwd=self._folder, **OPTIONS)
        )
        self._wait_until_synchronized()

    def kill(self) -> None:
        """End the server by SIGKILL."""
        self._stack.close()

    def execute(self, statement: str) -> list[tuple[object, ...]]:
        """Execute a statement outside of any database and transaction."""
        engine = create_engine(self._server, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        with engine.connect() as connection:
            result = connection.execute(text(statement))
            return [tuple(row) for row in result] if result.returns_rows else []

    def _wait_until_synchronized(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                state = self.execute("SHOW STATUS LIKE 'wsrep_local_state_comment'")
            except exc.DBAPIError as error:
                state = [(str(error), "")]
            if state and state[0][1] == "Synced":
                return
            assert time.monotonic() < deadline, f"the node has not joined the cluster: {state}"
            time.sleep(0.1)


@contextmanager
def galera_cluster() -> Iterator[list[Node]]:
    """Three running nodes with an empty database ``test``."""
    # Not pytest's own folder: others may not enter it.
    with tempfile.TemporaryDirectory(prefix="galera") as name, ExitStack() as stack:
        folder = Path(name)
        nodes = [Node(folder, number) for number in range(3)]
        data = folder / "node0"
        command = [shutil.which("mariadb-install-db"), "--no-defaults", f"--datadir={data}"]
        command += ["--auth-root-authentication-method=normal", "--skip-test-db"]
        if OPTIONS:
            shutil.chown(folder, "mysql", "mysql")
            command.append("--user=mysql")
        subprocess.run(command, check=True, capture_output=True)
        for number in (1, 2):
            subprocess.run(["cp", "-a", data, folder / f"node{number}"], check=True)
        for node in nodes:
            stack.callback(node.kill)
            node.start(nodes, is_first=node is nodes[0])
        nodes[0].execute("CREATE DATABASE test")
        yield nodes


def free_ports(number: int) -> list[int]:
    ports: set[int] = set()
    while len(ports) < number:
        ports.add(free_port())
    return [*ports]
