"""No lookup reads the whole table: what each database plans to do with each statement."""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

import pytest
from databases import DATABASES, fresh_database
from sqlalchemy import create_engine, event, insert, text

from zoho_orm_store import FernetCipher, StoredToken, TokenRecord, generate_key, provision
from zoho_orm_store._adding import NewTokens
from zoho_orm_store._matching import Lookup
from zoho_orm_store._rotation import KeyRotation
from zoho_orm_store._tokens import Filters, TokenOperations
from zoho_orm_store.records import utc_now

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from sqlalchemy import Connection

ROWS = 3000
KEYS = (generate_key(), generate_key())
CIPHERS = {"plain": None, "encrypted": FernetCipher([*KEYS])}


def token(number: int, **values: Any) -> TokenRecord:
    now = utc_now()
    known = {
        "id": f"{number:032x}",
        "user_name": f"u{number}",
        "client_id": f"c{number % 3}",
        "client_secret": "s",
        "refresh_token": f"r{number}",
        "access_token": f"a{number}",
        "grant_token": f"g{number}",
        "expiry_time": 1_900_000_000_000,
        "created_at": now,
        "updated_at": now,
    }
    if number % 100 == 7:  # Known by its access token alone.
        known |= {"user_name": None, "refresh_token": None, "grant_token": None}
    return TokenRecord(**(known | values))


class Statement(NamedTuple):
    """A statement with a condition, and what the database plans.

    Attributes:
        sql: The statement.
        steps: The steps of the plan.
        indexes: The indexes that it uses.
        scans: The steps that read the whole table.
    """

    sql: str
    steps: Sequence[str]
    indexes: set[str]
    scans: Sequence[str]


@dataclass
class Planner:
    """Explains the statements of operations on a table of some thousand tokens."""

    connection: Connection
    operations: TokenOperations

    def plans_of(self, call: Callable[[TokenOperations, Connection], object]) -> list[Statement]:
        """Each statement on our table that a call executes, with its plan."""
        executed: list[tuple[str, Any]] = []

        def remember(connection, cursor, statement, parameters, context, executemany):
            if " oauthtoken" in statement and " WHERE " in " ".join(statement.split()):
                executed.append((statement, parameters[0] if executemany else parameters))

        event.listen(self.connection.engine, "before_cursor_execute", remember)
        try:
            with self.connection.begin_nested() as savepoint:
                call(self.operations, self.connection)
                savepoint.rollback()
        finally:
            event.remove(self.connection.engine, "before_cursor_execute", remember)
        return [self._explain(statement, parameters) for statement, parameters in executed]

    def _explain(self, sql: str, parameters: Any) -> Statement:
        read = {"sqlite": read_sqlite, "postgresql": read_postgresql}
        dialect = self.connection.dialect.name
        explain = {"sqlite": "EXPLAIN QUERY PLAN", "postgresql": "EXPLAIN (FORMAT JSON)"}
        prefix = explain.get(dialect, "EXPLAIN")
        rows = self.connection.exec_driver_sql(f"{prefix} {sql}", parameters).mappings().all()
        return Statement(sql, *read.get(dialect, read_mysql)(rows))


def read_sqlite(rows) -> tuple[list[str], set[str], list[str]]:
    steps = [row["detail"] for row in rows]
    names = {step.partition("INDEX ")[2].partition(" ")[0] for step in steps if "INDEX " in step}
    # The page goes through the index of the ids, from where the last one ended.
    return steps, names, [step for step in steps if step.startswith("SCAN oauthtoken")]


def read_postgresql(rows) -> tuple[list[str], set[str], list[str]]:
    [plan] = rows[0]["QUERY PLAN"]
    nodes = [*nodes_of(plan["Plan"])]
    steps = [f"{node['Node Type']} {node.get('Index Name', '')}" for node in nodes]
    names = {node["Index Name"] for node in nodes if "Index Name" in node}
    return steps, names, [step for step in steps if "Seq Scan" in step]


def nodes_of(plan) -> Iterator[dict[str, Any]]:
    yield plan
    for inner in plan.get("Plans", ()):
        yield from nodes_of(inner)


def read_mysql(rows) -> tuple[list[str], set[str], list[str]]:
    steps = [json.dumps(dict(row), default=str) for row in rows]
    names = {name for row in rows for name in re.split("[,|]", row["key"] or "") if name}
    # Without a table, the server has found at once that there is no such row.
    scans = [
        step
        for row, step in zip(rows, steps, strict=True)
        if row["table"] and row["type"] in ("ALL", "index")
    ]
    return steps, names, scans


@contextmanager
def filled(name: str, directory, cipher) -> Iterator[Planner]:
    with fresh_database(name, directory) as url:
        engine = create_engine(url)
        provision.upgrade(engine)
        operations = TokenOperations(StoredToken.__table__, cipher=cipher)
        with engine.begin() as connection:
            rows = [operations.row_values(token(number)) for number in range(ROWS)]
            connection.execute(insert(StoredToken), rows)
        with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            is_mysql = connection.dialect.name == "mysql"
            connection.execute(text(f"ANALYZE {'TABLE ' if is_mysql else ''}oauthtoken"))
        with engine.connect() as connection:
            yield Planner(connection, operations)
        engine.dispose()


PRIMARY_KEY = {
    "sqlite": "sqlite_autoindex_oauthtoken_1",
    "postgresql": "oauthtoken_pkey",
    "mariadb": "PRIMARY",
    "mysql": "PRIMARY",
}
SOME, NAMELESS, ABSENT_ID = token(1234), token(1207), "x" * 32


@pytest.fixture(scope="module", params=[(n, c) for n in DATABASES for c in CIPHERS], ids="-".join)
def planned(request, tmp_path_factory):
    name, cipher = request.param
    with filled(name, tmp_path_factory.mktemp(name), CIPHERS[cipher]) as planner:
        yield planner, PRIMARY_KEY[name]


def asked(*names: str, known: TokenRecord = SOME, **values: str) -> TokenRecord:
    return TokenRecord(**({name: getattr(known, name) for name in names} | values))


LOOKUPS = {
    "user": (Lookup.USER, asked("user_name")),
    "user and client": (Lookup.USER, asked("user_name", "client_id")),
    "access token": (Lookup.ACCESS, asked("access_token")),
    "access token and client": (Lookup.ACCESS, asked("access_token", "client_id")),
    "grant token": (Lookup.GRANT, asked("grant_token")),
    "grant token, user and client": (Lookup.GRANT, asked("grant_token", "user_name", "client_id")),
    "refresh token": (Lookup.REFRESH, asked("refresh_token")),
    "refresh token and client": (Lookup.REFRESH, asked("refresh_token", "client_id")),
    "identity": (Lookup.IDENTITY, asked("access_token", "client_id", known=NAMELESS)),
}
INDEX_OF = {
    Lookup.USER: "ix_oauthtoken_user_digest",
    Lookup.ACCESS: "ix_oauthtoken_access_digest",
    Lookup.GRANT: "ix_oauthtoken_grant_digest",
    Lookup.REFRESH: "ix_oauthtoken_refresh_digest",
    Lookup.IDENTITY: "ix_oauthtoken_identity",
}
NEXT_DIGEST = "ix_oauthtoken_identity"
"""Before a token counts as not stored, the keys of the identities are looked at."""


def test_by_id(planned):
    planner, primary_key = planned
    for id_ in (SOME.id, ABSENT_ID):
        [by_id] = planner.plans_of(lambda tokens, connection, id_=id_: tokens.get(connection, id_))
        assert not by_id.scans, by_id
        assert id_ == ABSENT_ID or by_id.indexes == {primary_key}, by_id


@pytest.mark.parametrize("name", LOOKUPS)
def test_each_lookup_uses_the_index_of_its_digest(planned, name):
    planner, _ = planned
    lookup, record = LOOKUPS[name]
    found = []

    def look_up(tokens, connection):
        found.append(tokens.match(connection, record, (lookup,)))

    statements = planner.plans_of(look_up)
    expected = NAMELESS if lookup is Lookup.IDENTITY else SOME
    assert [each.id for each in found] == [expected.id]
    [statement] = statements
    assert not statement.scans, statement
    # Where the user is known too, the database may choose between two that find one row.
    chosen = {INDEX_OF[lookup]} | ({INDEX_OF[Lookup.USER]} if record.user_name else set())
    assert statement.indexes, statement
    assert statement.indexes <= chosen, statement


def test_what_is_not_stored_is_known_by_the_indexes(planned):
    planner, _ = planned
    record = asked(user_name="nobody")
    statements = planner.plans_of(lambda tokens, c: tokens.match(c, record, (Lookup.USER,)))
    assert not any(statement.scans for statement in statements), statements
    *_, next_digest = statements
    assert "identity >" in next_digest.sql
    assert next_digest.indexes == {NEXT_DIGEST}, next_digest


@pytest.mark.parametrize("is_new", [True, False], ids=["a new token", "a known one"])
def test_a_save_reads_what_it_writes(planned, is_new):
    planner, _ = planned
    values = {"user_name": "new", "access_token": "new", "refresh_token": "new"} if is_new else {}
    record = token(1234, id="new" if is_new else SOME.id, grant_token=None, **values)
    statements = planner.plans_of(lambda tokens, connection: tokens.save(connection, record))
    assert statements
    assert not any(statement.scans for statement in statements), statements


def test_expire_and_delete_use_the_primary_key(planned):
    planner, primary_key = planned

    def change(tokens, connection):
        tokens.expire(connection, SOME.id)
        tokens.delete(connection, SOME.id)

    statements = planner.plans_of(change)
    assert [(each.scans, each.indexes) for each in statements] == [([], {primary_key})] * 2


@pytest.mark.parametrize(
    ("filters", "other_index"),
    [
        (Filters(), None),
        (Filters(expired=False), None),
        (Filters(client_id="c1"), None),
        (Filters(user_name="u1234"), "ix_oauthtoken_user_digest"),
    ],
    ids=["all", "live", "of a client", "of a user"],
)
def test_a_page_begins_where_the_last_one_ended(planned, filters, other_index):
    planner, primary_key = planned
    after = token(ROWS * 9 // 10).id
    *_, page = planner.plans_of(lambda tokens, c: tokens.page(c, filters, after, 100))
    assert not page.scans, page
    assert page.indexes & {primary_key, other_index}, page
    [ids] = planner.plans_of(lambda tokens, connection: tokens.ids(connection, after, 100))
    assert (ids.scans, ids.indexes) == ([], {primary_key}), ids


def test_a_batch_to_rotate_begins_where_the_last_one_ended(planned):
    planner, primary_key = planned
    cipher = FernetCipher([generate_key(), *KEYS])
    rotating = Planner(planner.connection, TokenOperations(StoredToken.__table__, cipher=cipher))
    after = token(ROWS * 9 // 10).id
    statements = rotating.plans_of(
        lambda tokens, connection: KeyRotation(tokens).batch(connection, after, 10, plain_text=True)
    )
    assert not any(statement.scans for statement in statements), statements
    assert primary_key in statements[0].indexes, statements[0]


def test_a_batch_to_import_is_looked_up_by_the_indexes(planned):
    planner, primary_key = planned
    records = [token(number) for number in range(ROWS, ROWS + 20)]
    statements = planner.plans_of(
        lambda tokens, connection: NewTokens(tokens).add(connection, records)
    )
    used = set().union(*(statement.indexes for statement in statements))
    assert not any(statement.scans for statement in statements), statements
    assert {primary_key, INDEX_OF[Lookup.USER], INDEX_OF[Lookup.REFRESH]} <= used


def test_a_purge_of_stranded_tokens_uses_the_index_of_the_refresh_tokens(planned):
    planner, _ = planned
    [purge] = planner.plans_of(lambda tokens, connection: tokens.purge(connection, None, True))
    assert (purge.scans, purge.indexes) == ([], {INDEX_OF[Lookup.REFRESH]}), purge


def test_a_purge_of_idle_tokens_reads_the_table_once(planned):
    """No index is kept for it: each save would have to change it."""
    planner, _ = planned
    [purge] = planner.plans_of(
        lambda tokens, connection: tokens.purge(connection, timedelta(1), True)
    )
    assert len(purge.scans) == 1, purge
