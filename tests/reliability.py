"""The table of tested faults in docs/reliability.md.

A test records what it has put the package through. If ZOHO_ORM_STORE_RELIABILITY names a file, each
record is added to it as a line of JSON, whatever process of the test run it is from. Then the table
is written from the file:

    ZOHO_ORM_STORE_RELIABILITY=/tmp/results.jsonl python -m pytest -n auto
    python tests/reliability.py /tmp/results.jsonl docs/reliability.md
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import URL

VARIABLE = "ZOHO_ORM_STORE_RELIABILITY"

BEGIN = "<!-- tests/reliability.py writes this table -->"
END = "<!-- the end of the table -->"

DATABASES = {"sqlite": "SQLite", "postgresql": "PostgreSQL", "mysql": "MariaDB"}
DRIVERS = {"sqlite": "pysqlite", "list": "memory"}

OF_SERVERS = frozenset({"psycopg", "psycopg_async", "asyncpg", "pymysql", "asyncmy", "aiomysql"})
GROUPS = {
    "all databases": frozenset(DATABASES.values()),
    "all drivers": OF_SERVERS | {"pysqlite", "aiosqlite"},
    "all drivers of servers": OF_SERVERS,
}
"""What the table says for so many names."""


class Record(NamedTuple):
    """A fault that the package has lived through."""

    fault: str
    where: str
    rounds: int
    outcome: str


def record(fault: str, where: str | URL, rounds: int, outcome: str) -> None:
    """Note that the package has lived through a fault. Call it after a test's last assertion.

    Args:
        fault: What happened.
        where: A driver ("postgresql+psycopg" or "psycopg"), or the URL of a database.
        rounds: How often, or how many calls there were meanwhile.
        outcome: What came of it, without figures that differ from run to run.
    """
    path = os.environ.get(VARIABLE)
    if path:
        line = json.dumps(Record(fault, name_of(where), rounds, outcome)._asdict())
        # One write in append mode, so that the lines of several processes do not mix.
        with open(path, "ab", buffering=0) as file:
            file.write(f"{line}\n".encode())


def name_of(where: str | URL) -> str:
    """What the table calls a driver or a database."""
    if isinstance(where, URL):
        return DATABASES[where.get_backend_name()]
    name = where.rpartition("+")[2]
    return DRIVERS.get(name, name)


def grouped(names: set[str]) -> list[str]:
    """The names, of which those of a whole group have one name together."""
    for group, members in GROUPS.items():
        if names >= members:
            return [group, *grouped(names - members)]
    return sorted(names, key=str.lower)


def table_of(records: list[Record]) -> str:
    """A Markdown table with a row per fault and outcome."""
    places, rounds = defaultdict(set), defaultdict(int)
    for each in records:
        key = each.fault, each.outcome
        places[key].add(each.where)
        rounds[key] += each.rounds
    rows = [
        (key[0], ", ".join(grouped(places[key])), f"{rounds[key]:,}", key[1])
        for key in sorted(places, key=lambda key: [text.lower() for text in key])
    ]
    heading = ("fault", "database or driver", "rounds", "outcome")
    lines = [heading, ("---",) * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_table(results: Path, page: Path) -> None:
    """Replace the table of a page."""
    lines = results.read_text(encoding="utf-8").splitlines()
    records = [Record(**json.loads(line)) for line in lines]
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{page} lacks the lines {BEGIN!r} and {END!r}.")
    page.write_text(
        f"{before}{begin}\n\n{table_of(records)}\n\n{end}{after}", encoding="utf-8", newline="\n"
    )


if __name__ == "__main__":
    write_table(*map(Path, sys.argv[1:]))
