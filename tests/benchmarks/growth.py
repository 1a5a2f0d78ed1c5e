"""How long each operation takes as a table grows, against other ways to keep the same tokens."""

from __future__ import annotations

import csv
import sqlite3
from contextlib import ExitStack, closing
from itertools import count
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import psycopg
import pymysql
from budgets import COLUMNS, copy_for_the_sdk
from databases import fresh_database
from measure import in_turns
from sqlalchemy import create_engine, text
from tokens import any_of, fill, record, row_of, sdk_token
from zohocrmsdk.src.com.zoho.api.authenticator.store.db_store import DBStore
from zohocrmsdk.src.com.zoho.api.authenticator.store.file_store import FileStore

from zoho_orm_store import SQLAlchemyTokenStore
from zoho_orm_store._digests import digests_of
from zoho_orm_store._sdk.conversion import OAuthToken, UserSignature

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sqlalchemy import URL

OURS, RAW = "zoho_orm_store", "the bare driver"
OPERATIONS = ("by id", "by user", "by refresh token", "save", "all, a row")

_MOST_OF_FILE = 10_000
_MOST_OF_DBSTORE = 100_000
_MOST_IN_MEMORY = 100_000


class Point(NamedTuple):
    """How long one operation takes.

    Attributes:
        database: The database.
        store: What keeps the tokens.
        operation: One of `OPERATIONS`.
        rows: How many tokens there are.
        microseconds: How long one call takes.
    """

    database: str
    store: str
    operation: str
    rows: int
    microseconds: float


class Raw:
    """The driver on an open connection in autocommit, with the statements written by hand."""

    def __init__(self, url: URL) -> None:
        self._mark = "?" if url.get_backend_name() == "sqlite" else "%s"
        if url.get_backend_name() == "sqlite":
            self._connection = sqlite3.connect(url.database or "", isolation_level=None)
        elif url.get_backend_name() == "postgresql":
            address = url.set(drivername="postgresql").render_as_string(hide_password=False)
            self._connection = psycopg.connect(address, autocommit=True)
        else:
            self._connection = pymysql.connect(
                host=url.host,
                port=url.port or 3306,
                user=url.username,
                password=url.password or "",
                database=url.database,
                autocommit=True,
            )

    def close(self) -> None:
        self._connection.close()

    def find(self, column: str, value: str) -> object:
        cursor = self._connection.cursor()
        cursor.execute(f"SELECT {COLUMNS} FROM oauthtoken WHERE {column} = {self._mark}", (value,))
        return cursor.fetchone()

    def save(self, values: dict[str, object]) -> None:
        changes = ", ".join(f"{name} = {self._mark}" for name in values)
        given = [str(v) if name.endswith("_at") else v for name, v in values.items()]
        cursor = self._connection.cursor()
        cursor.execute(
            f"UPDATE oauthtoken SET {changes} WHERE id = {self._mark}", (*given, values["id"])
        )

    def all(self) -> object:
        cursor = self._connection.cursor()
        cursor.execute(f"SELECT {COLUMNS} FROM oauthtoken")
        return cursor.fetchall()


class SampleStore:
    """A store in the way of the published SQLite sample: it connects at each call.

    Its table has no index besides that of the ids.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def _execute(self, sql: str, values: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
        with closing(sqlite3.connect(self._path)) as connection:
            rows = connection.execute(sql, values).fetchall()
            connection.commit()
            return rows

    def find(self, column: str, value: str) -> OAuthToken | None:
        rows = self._execute(f"SELECT * FROM oauthtoken WHERE {column} = ?", (value,))
        return self._token(rows[0]) if rows else None

    def save(self, token: OAuthToken) -> None:
        values = (token.get_access_token(), token.get_expires_in(), token.get_id())
        self._execute(
            "UPDATE oauthtoken SET access_token = ?, expiry_time = ? WHERE id = ?", values
        )

    def all(self) -> list[OAuthToken]:
        return [self._token(row) for row in self._execute("SELECT * FROM oauthtoken")]

    def _token(self, row: tuple[object, ...]) -> OAuthToken:
        token = OAuthToken(
            id=row[0],
            user_signature=UserSignature(row[1]),
            client_id=row[2],
            client_secret=row[3],
            refresh_token=row[4],
            access_token=row[5],
            grant_token=row[6],
            redirect_url=row[8],
            api_domain=row[9],
        )
        token.set_expires_in(str(row[7]))
        return token


def growth(name: str, directory: Path, sizes: tuple[int, ...]) -> Iterator[Point]:
    """Measure every operation on tables of these sizes, each store in turn with the others."""
    with ExitStack() as stack:
        url = stack.enter_context(fresh_database(name, directory))
        store = stack.enter_context(SQLAlchemyTokenStore(url, create_schema=True))
        filled = 0
        for rows in sizes:
            fill(url, rows, start=filled)
            filled = rows
            _analyze(url)
            with ExitStack() as others:
                stores = {OURS: _ours(store, rows), RAW: _raw(others, url, rows)}
                if name == "sqlite" and rows <= _MOST_OF_FILE:
                    stores["the SDK's FileStore"] = _sdk(_file_store(directory, rows), rows)
                if name == "sqlite":
                    stores["as the SQLite sample"] = _sample(directory, url, rows)
                if name == "mariadb" and rows <= _MOST_OF_DBSTORE:
                    other = others.enter_context(fresh_database(name, directory))
                    stores["the SDK's DBStore"] = _sdk(_db_store(url, other), rows)
                for operation in OPERATIONS[:-1]:
                    times = in_turns(*(calls[operation] for calls in stores.values()))
                    for label, microseconds in zip(stores, times, strict=True):
                        yield Point(name, label, operation, rows, microseconds)
                if 100 <= rows <= _MOST_IN_MEMORY:
                    for label, calls in stores.items():
                        took = min(_seconds(calls["all, a row"]) for _ in range(3))
                        yield Point(name, label, "all, a row", rows, took / rows * 1e6)


def _seconds(work: Callable[[], object]) -> float:
    started = perf_counter()
    work()
    return perf_counter() - started


def _analyze(url: URL) -> None:
    """Let a server know how large the table is, as it does by itself after a while."""
    if url.get_backend_name() == "sqlite":
        return
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    kind = "TABLE " if url.get_backend_name() == "mysql" else ""
    with engine.connect() as connection:
        connection.execute(text(f"ANALYZE {kind}oauthtoken"))
    engine.dispose()


_refreshes = count()


def _refreshed(number: int) -> OAuthToken:
    token = sdk_token(number)
    token.set_access_token(f"1000.b{next(_refreshes):064x}")
    return token


def _by_user(number: int) -> OAuthToken:
    known = record(number)
    return OAuthToken(
        user_signature=UserSignature(known.user_name),
        client_id=known.client_id,
        access_token="unknown",
    )


def _by_refresh_token(number: int) -> OAuthToken:
    known = record(number)
    return OAuthToken(
        client_id=known.client_id, client_secret="s", refresh_token=known.refresh_token
    )


def _ours(store: SQLAlchemyTokenStore, rows: int) -> dict[str, Callable[[], object]]:
    return _sdk(store, rows)


def _sdk(store: SQLAlchemyTokenStore, rows: int) -> dict[str, Callable[[], object]]:
    number = any_of(rows)
    return {
        "by id": lambda: store.find_token_by_id(f"{number():032x}"),
        "by user": lambda: store.find_token(_by_user(number())),
        "by refresh token": lambda: store.find_token(_by_refresh_token(number())),
        "save": lambda: store.save_token(_refreshed(number())),
        "all, a row": store.get_tokens,
    }


def _raw(stack: ExitStack, url: URL, rows: int) -> dict[str, Callable[[], object]]:
    raw = stack.enter_context(closing(Raw(url)))
    number = any_of(rows)

    def digest(column: str) -> str:
        return str(digests_of(record(number()))[column])

    return {
        "by id": lambda: raw.find("id", f"{number():032x}"),
        "by user": lambda: raw.find("user_digest", digest("user_digest")),
        "by refresh token": lambda: raw.find("refresh_digest", digest("refresh_digest")),
        "save": lambda: raw.save(row_of(record(number()))),
        "all, a row": raw.all,
    }


def _sample(directory: Path, url: URL, rows: int) -> dict[str, Callable[[], object]]:
    path = directory / f"sample-{rows}.db"
    columns = "id, user_name, client_id, client_secret, refresh_token, access_token, grant_token, "
    columns += "expiry_time, redirect_url, api_domain"
    ddl = columns.replace(",", " varchar(255),").replace("id varchar(255)", "id varchar(60)", 1)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"CREATE TABLE oauthtoken ({ddl} varchar(255), PRIMARY KEY (id))")
        connection.execute("ATTACH ? AS ours", (url.database,))
        connection.execute(f"INSERT INTO oauthtoken SELECT {columns} FROM ours.oauthtoken")
        connection.commit()
    store, number = SampleStore(path), any_of(rows)
    return {
        "by id": lambda: store.find("id", f"{number():032x}"),
        "by user": lambda: store.find("user_name", str(record(number()).user_name)),
        "by refresh token": lambda: store.find(
            "refresh_token", str(record(number()).refresh_token)
        ),
        "save": lambda: store.save(_refreshed(number())),
        "all, a row": store.all,
    }


def _file_store(directory: Path, rows: int) -> FileStore:
    path = directory / f"tokens-{rows}.txt"
    store = FileStore(str(path))
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        for number in range(rows):
            known = row_of(record(number))
            writer.writerow(["" if known[name] is None else known[name] for name in _FILE_COLUMNS])
    return store


_FILE_COLUMNS = tuple(COLUMNS.split(", "))[:10]


def _db_store(url: URL, other: URL) -> DBStore:
    copy_for_the_sdk(url, other)
    return DBStore(
        host=other.host,
        database_name=other.database,
        user_name=other.username,
        password=other.password or "",
        port_number=str(other.port),
    )


def plot(points: list[Point], directory: Path) -> list[Path]:
    """One image for each database, with a panel for each operation."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    mpl.rcParams |= {"font.size": 9}
    directory.mkdir(parents=True, exist_ok=True)
    colours = dict(
        zip(
            (OURS, RAW, "the SDK's DBStore", "the SDK's FileStore", "as the SQLite sample"),
            ("#0072b2", "#999999", "#d55e00", "#cc79a7", "#009e73"),
            strict=True,
        )
    )
    paths = []
    for name in dict.fromkeys(point.database for point in points):
        here = [point for point in points if point.database == name]
        yardsticks = _yardsticks(here)
        figure, panels = plt.subplots(1, len(OPERATIONS), figsize=(13, 3.2), sharey=True)
        for panel, operation in zip(panels, OPERATIONS, strict=True):
            for store in dict.fromkeys(point.store for point in here):
                line = [p for p in here if (p.store, p.operation) == (store, operation)]
                panel.plot(
                    [point.rows for point in line],
                    [point.microseconds / yardsticks[point.rows, operation] for point in line],
                    marker=".",
                    color=colours[store],
                    label=store,
                )
            panel.set(xscale="log", yscale="log", title=operation, xlabel="tokens")
            panel.minorticks_off()
            panel.grid(alpha=0.3)
        panels[0].set_ylabel("times the bare driver")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=5, frameon=False)
        figure.tight_layout(rect=(0, 0, 1, 0.92))
        path = directory / f"performance-{name}.png"
        figure.savefig(path, dpi=72)
        plt.close(figure)
        paths.append(path)
    return paths


def _yardsticks(points: list[Point]) -> dict[tuple[int, str], float]:
    """How long the bare driver takes, by the number of tokens and the operation.

    It was measured in turns with the others, so that a busy machine was busy for all of them. From
    one size to the next, it may have become more or less busy.
    """
    return {(p.rows, p.operation): p.microseconds for p in points if p.store == RAW}


def _number(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.1f}"


def as_markdown(points: list[Point]) -> str:
    """The points in times the bare driver: a line for each operation and store."""
    lines = []
    for name in dict.fromkeys(point.database for point in points):
        here = [point for point in points if point.database == name]
        sizes, yardsticks = sorted({point.rows for point in here}), _yardsticks(here)
        title = {"sqlite": "SQLite", "postgresql": "PostgreSQL", "mariadb": "MariaDB"}[name]
        lines += [f"### {title}", "", f"| | {' | '.join(f'{n:,}' for n in sizes)} |"]
        lines.append(f"|---|{'---:|' * len(sizes)}")
        for operation in OPERATIONS:
            for store in dict.fromkeys(point.store for point in here if point.store != RAW):
                known = {
                    p.rows: p.microseconds / yardsticks[p.rows, operation]
                    for p in here
                    if (p.operation, p.store) == (operation, store)
                }
                cells = (_number(known[n]) if n in known else "" for n in sizes)
                if known:
                    lines.append(f"| {operation}: {store} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)
