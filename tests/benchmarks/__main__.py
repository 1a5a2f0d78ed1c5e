"""Measure the budgets: ``python tests/benchmarks [NAME ...] [--rows N]``.

Ends with 1 if a budget is not met, with 0 otherwise. What needs a server that does not answer is
shown as not measured. The whole takes some minutes, most of them to fill the largest table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))

import budgets
from databases import SERVERS, why_unreachable
from sdk_processes import stop_processes

BENCHMARKS = {
    "lookup": (budgets.sqlite_lookup, ()),
    "encrypted": (budgets.encrypted, ()),
    "cached": (budgets.cached, ()),
    "coordinated": (budgets.coordinated, ()),
    "herd": (budgets.herd, ("postgresql", "mariadb")),
    "ahead": (budgets.ahead, ("postgresql", "mariadb")),
    "flat": (budgets.flat, ()),
    "sdk": (budgets.sdk_store, ("mariadb",)),
    "postgresql": (budgets.postgresql_lookup, ("postgresql",)),
    "save": (budgets.sqlite_save, ()),
    "listing": (budgets.listing, ()),
    "import": (budgets.imports, ()),
    "threads": (budgets.threads, ("postgresql", "mariadb")),
}


def main() -> int:
    parser = argparse.ArgumentParser("python tests/benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the largest table")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(BENCHMARKS):
        parser.error(f"There is no benchmark {', '.join(sorted(unknown))}.")

    table = Table("what", "takes", "against", "takes", "ratio", "budget", "")
    console, all_met = Console(), True
    for name in arguments.names or BENCHMARKS:
        run, servers = BENCHMARKS[name]
        if absent := [server for server in servers if why_unreachable(SERVERS[server])]:
            table.add_row(name, f"[yellow]not measured: no {' and no '.join(absent)}")
            continue
        with console.status(name), TemporaryDirectory() as directory:
            for result in run(Path(directory), arguments.rows):
                all_met = all_met and result.is_met
                table.add_row(
                    result.what,
                    f"{result.measured:,.1f} µs",
                    result.against,
                    f"{result.yardstick:,.1f} µs",
                    f"{result.ratio:.3f}",
                    f"{result.budget:.3g}",
                    "[green]met" if result.is_met else "[bold red]over",
                )
    stop_processes()
    console.print(table)
    return 0 if all_met else 1


if __name__ == "__main__":
    sys.exit(main())
