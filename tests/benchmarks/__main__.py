"""Measure the budgets: ``python tests/benchmarks [NAME ...] [--rows N]``.

Ends with 1 if a budget is not met, with 0 otherwise. What needs a server that does not answer is
shown as not measured. The whole takes some minutes, most of them to fill the largest table.

``python tests/benchmarks scale`` shows instead what each command for a whole table takes, in
minutes and megabytes. ``python tests/benchmarks --plots DIRECTORY`` measures every operation on
growing tables, writes images, and prints the figures as Markdown; it needs the extra "benchmarks".
``python tests/benchmarks drivers`` compares the drivers for MariaDB that are installed, and
``python tests/benchmarks layers`` shows where the time of a lookup goes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))

import budgets
from databases import DATABASES, SERVERS, why_unreachable
from drivers import drivers
from layers import layers
from scale import scale
from sdk_processes import stop_processes

if TYPE_CHECKING:
    from growth import Point

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

SCALE, DRIVERS, LAYERS = "scale", "drivers", "layers"
_SIZES = (1, 100, 1000, 10_000, 100_000, 1_000_000)


def main() -> int:
    parser = argparse.ArgumentParser("python tests/benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=", ".join((*BENCHMARKS, SCALE, DRIVERS, LAYERS))
    )
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the largest table")
    parser.add_argument(
        "--one-by-one",
        type=int,
        help="scale: how many tokens to import and encrypt, which takes longest; by default all",
    )
    parser.add_argument(
        "--on", action="append", choices=DATABASES, help="scale and plots: only this database"
    )
    parser.add_argument("--plots", type=Path, metavar="DIRECTORY", help="write images there")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - {*BENCHMARKS, SCALE, DRIVERS, LAYERS}:
        parser.error(f"There is no benchmark {', '.join(sorted(unknown))}.")
    # Where the output goes into a file, its lines are not cut.
    console = Console(width=None if sys.stdout.isatty() else 160)
    names = [name for name in arguments.on or DATABASES if not _is_absent(name)]
    if arguments.plots is not None:
        _measure_growth(names, arguments.rows, arguments.plots)
        return 0
    if SCALE in arguments.names:
        _measure_scale(console, names, arguments.rows, arguments.one_by_one or arguments.rows)
        return 0
    if DRIVERS in arguments.names:
        _measure_drivers(console)
        return 0
    if LAYERS in arguments.names:
        _measure_layers(console, names)
        return 0
    all_met = _measure_budgets(console, arguments.names or [*BENCHMARKS], arguments.rows)
    return 0 if all_met else 1


def _is_absent(name: str) -> bool:
    return name in SERVERS and why_unreachable(SERVERS[name]) is not None


def _measure_budgets(console: Console, names: list[str], rows: int) -> bool:
    table = Table("what", "takes", "against", "takes", "ratio", "budget", "")
    all_met = True
    for name in names:
        run, servers = BENCHMARKS[name]
        if absent := [server for server in servers if _is_absent(server)]:
            table.add_row(name, f"[yellow]not measured: no {' and no '.join(absent)}")
            continue
        with console.status(name), TemporaryDirectory() as directory:
            for result in run(Path(directory), rows):
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
    return all_met


def _measure_scale(console: Console, names: list[str], rows: int, one_by_one: int) -> None:
    table = Table("database", "command", "tokens", "minutes", "megabytes")
    for name in names:
        with console.status(f"{SCALE} on {name}"), TemporaryDirectory() as directory:
            for cost in scale(name, Path(directory), rows, one_by_one):
                minutes, megabytes = f"{cost.seconds / 60:.2f}", f"{cost.megabytes:.0f}"
                table.add_row(name, cost.what, f"{cost.rows:,}", minutes, megabytes)
    console.print(table)


def _measure_drivers(console: Console) -> None:
    table = Table("driver", "what", "takes", "of it, computing")
    with console.status(DRIVERS), TemporaryDirectory() as directory:
        for driver, what, *times in drivers(Path(directory)):
            table.add_row(driver, what, *(f"{microseconds:,.0f} µs" for microseconds in times))
    console.print(table)


def _measure_layers(console: Console, names: list[str]) -> None:
    table = Table("database", "a lookup by id", "takes")
    for name in names:
        with console.status(f"{LAYERS} on {name}"), TemporaryDirectory() as directory:
            for database, what, microseconds in layers(name, Path(directory)):
                table.add_row(database, what, f"{microseconds:,.0f} µs")
    console.print(table)


def _measure_growth(names: list[str], rows: int, directory: Path) -> None:
    from growth import as_markdown, growth, plot

    sizes = tuple(size for size in _SIZES if size <= rows)
    points: list[Point] = []
    for name in names:
        with TemporaryDirectory() as files:
            points += growth(name, Path(files), sizes)
    plot(points, directory)
    print(as_markdown(points))


if __name__ == "__main__":
    sys.exit(main())
