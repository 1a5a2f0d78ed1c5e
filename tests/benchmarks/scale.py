"""What whole tables cost: minutes and megabytes of each command on a table of many tokens.

Each command runs in a process of its own, whose largest resident memory the system reports.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import URL

_SERIES = {
    "sqlite": "(WITH RECURSIVE s(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < {rows}) "
    "SELECT n FROM s)",
    "postgresql": "(SELECT n FROM generate_series(1, {rows}) AS g(n))",
    "mysql": "(SELECT seq AS n FROM seq_1_to_{rows})",
}

_TABLE = """
    CREATE TABLE oauthtoken (id varchar(10) NOT NULL, user_name varchar(255),
    client_id varchar(255), client_secret varchar(255), refresh_token varchar(255),
    access_token varchar(255), grant_token varchar(255), expiry_time varchar(20),
    redirect_url varchar(255), api_domain varchar(255), primary key (id))
"""


class Cost(NamedTuple):
    """What one command takes.

    Attributes:
        database: The database.
        what: The command.
        rows: How many tokens it goes through.
        seconds: How long it takes.
        megabytes: The largest memory of its process.
    """

    database: str
    what: str
    rows: int
    seconds: float
    megabytes: float


def scale(name: str, directory: Path, rows: int, one_by_one: int) -> Iterator[Cost]:
    """Adopt a table of the SDK's, and then run each command for many tokens on it.

    Args:
        name: The database.
        directory: Where files are kept meanwhile.
        rows: How many tokens the table has.
        one_by_one: How many to import and to encrypt, each of which takes several statements.
    """
    from databases import fresh_database

    exported, part = directory / f"{name}.txt", directory / f"{name}-part.txt"
    with fresh_database(name, directory) as url:
        fill_for_the_sdk(url, rows)
        yield _run(name, "upgrade (adopts the SDK's table)", rows, url, "upgrade")
        yield _run(name, "list", rows, url, "list")
        yield _run(name, "export", rows, url, "export", str(exported))
        yield _run(name, "purge --stranded", rows, url, "purge", "--stranded", "--yes")
    with exported.open() as file, part.open("w") as short:
        short.writelines(islice(file, one_by_one + 1))
    with fresh_database(name, directory) as url:
        _run(name, "upgrade", 0, url, "upgrade")
        yield _run(name, "import", one_by_one, url, "import", str(part))
        yield _run(name, "import, nothing new", one_by_one, url, "import", str(part))
        keys = _cli("keys", "generate").stdout.strip()
        encrypt = ("encrypt", "--yes")
        yield _run(name, "encrypt", one_by_one, url, *encrypt, ZOHO_ORM_STORE_KEYS=keys)
        keys = f"{_cli('keys', 'generate').stdout.strip()},{keys}"
        rotate = ("keys", "rotate")
        yield _run(name, "keys rotate", one_by_one, url, *rotate, ZOHO_ORM_STORE_KEYS=keys)
    for path in (exported, part):
        with suppress(FileNotFoundError):
            path.unlink()


def fill_for_the_sdk(url: URL, rows: int) -> None:
    """Make the table that the SDK's DBStore has, and let the database itself fill it.

    Every tenth token has expired and has no refresh token.
    """
    from sqlalchemy import create_engine, text

    engine = create_engine(url)
    backend = url.get_backend_name()
    join = "concat({})" if backend == "mysql" else "{}"
    glue = ", " if backend == "mysql" else " || "

    def text_of(*parts: str) -> str:
        return join.format(glue.join(parts))

    number = "CAST(n AS CHAR(10))" if backend == "mysql" else "CAST(n AS VARCHAR(10))"
    zeros = f"'{60 * '0'}'"
    is_stranded = "n % 10 = 0"
    refresh_token = text_of("'1000.r'", zeros, number)
    values = (
        number,
        text_of("'user'", number, "'@example.com:'", number),
        f"'1000.{0:030d}'",
        f"'{0:042d}'",
        f"CASE WHEN {is_stranded} THEN NULL ELSE {refresh_token} END",
        text_of("'1000.a'", zeros, number),
        "NULL",
        f"CASE WHEN {is_stranded} THEN '1600000000000' ELSE '1900000000000' END",
        "'https://example.com/callback'",
        "'https://www.zohoapis.com'",
    )
    series = _SERIES[backend].format(rows=rows)
    with engine.begin() as connection:
        connection.execute(text(_TABLE))
        insert = f"INSERT INTO oauthtoken SELECT {', '.join(values)} FROM {series} AS numbers"
        connection.execute(text(insert))
    engine.dispose()


def _run(name: str, what: str, rows: int, url: URL, *arguments: str, **variables: str) -> Cost:
    variables["ZOHO_ORM_STORE_URL"] = url.render_as_string(hide_password=False)
    done = _cli(*arguments, **variables)
    if done.returncode:
        raise RuntimeError(f"{what} on {name}: {done.stderr[-2000:]}")
    measured = json.loads(done.stderr.splitlines()[-1])
    return Cost(name, what, rows, measured["seconds"], measured["megabytes"])


def _cli(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    with _output(arguments) as output:
        return subprocess.run(
            [sys.executable, __file__, *arguments],
            env=os.environ | variables,
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )


@contextmanager
def _output(arguments: tuple[str, ...]) -> Iterator[int]:
    """Where a command prints: a list is not kept."""
    if arguments[0] != "list":
        yield subprocess.PIPE
        return
    with Path(os.devnull).open("w") as nowhere:
        yield nowhere.fileno()


def _measured() -> None:
    """Run the command line, and print as the last line on stderr what it took."""
    started = perf_counter()
    from zoho_orm_store.cli import main

    try:
        main()
    finally:
        cost = {"seconds": perf_counter() - started, "megabytes": _peak_memory() / 1e6}
        print(json.dumps(cost), file=sys.stderr)


def _peak_memory() -> int:
    """The largest resident memory of this process, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # On Linux getrusage() also counts what the process was before it became another program.
        [peak] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(peak.split()[1]) * 1024
    peak_of_system = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_of_system * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    _measured()
