"""A PgBouncer in transaction mode before a PostgreSQL database."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from programs import PGBOUNCER, free_port, running

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import URL


@contextmanager
def pgbouncer(server: URL, **settings: object) -> Iterator[URL]:
    """Run a pooler with its own port and folder; yields the database's URL through it.

    Args:
        server: The database.
        settings: Settings of PgBouncer that differ from its defaults.
    """
    settings = {
        "listen_addr": "127.0.0.1",
        "listen_port": free_port(),
        "unix_socket_dir": "",
        "auth_type": "any",
        "pool_mode": "transaction",
        "default_pool_size": 4,
    } | settings
    password = f" password={server.password}" if server.password else ""
    lines = [
        "[databases]",
        f"{server.database} = host={server.host} port={server.port or 5432}"
        f" user={server.username}{password}",
        "[pgbouncer]",
        *(f"{name} = {value}" for name, value in settings.items()),
    ]
    with tempfile.TemporaryDirectory(prefix="pgbouncer") as folder:
        file = Path(folder, "pgbouncer.ini")
        file.write_text("\n".join(lines))
        # It refuses to run as root.
        other_user = {"user": "nobody", "group": "nogroup", "extra_groups": []}
        Path(folder).chmod(0o755)
        options = other_user if os.geteuid() == 0 else {}
        with running([PGBOUNCER, file], settings["listen_port"], cwd=folder, **options):
            yield server.set(host="127.0.0.1", port=settings["listen_port"])
