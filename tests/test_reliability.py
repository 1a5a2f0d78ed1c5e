"""The table in docs/reliability.md is what test runs write."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import reliability
from sqlalchemy import make_url

PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"


def test_records_become_rows_of_a_page(tmp_path, monkeypatch):
    results, page = tmp_path / "results.jsonl", tmp_path / "page.md"
    monkeypatch.setenv(reliability.VARIABLE, str(results))
    for where, rounds in (("postgresql+psycopg", 1000), ("asyncpg", 234), ("asyncpg", 1)):
        reliability.record("a fork", where, rounds, "0 lost")
    reliability.record("a crash", make_url("mysql+pymysql://u:secret@host/x"), 1, "0 lost")
    page.write_text(f"Before.\n{reliability.BEGIN}\nold\n{reliability.END}\nAfter.\n")
    for _ in range(2):
        reliability.write_table(results, page)
    assert page.read_text() == (
        f"Before.\n{reliability.BEGIN}\n\n"
        "| fault | database or driver | rounds | outcome |\n"
        "| --- | --- | --- | --- |\n"
        "| a crash | MariaDB | 1 | 0 lost |\n"
        "| a fork | asyncpg, psycopg | 1,235 | 0 lost |\n"
        f"\n{reliability.END}\nAfter.\n"
    )


def test_the_names_of_a_group_are_one_name():
    names = {*reliability.GROUPS["all drivers"], "psycopg2"}
    assert reliability.grouped(names) == ["all drivers", "psycopg2"]
    assert reliability.grouped({*reliability.OF_SERVERS}) == ["all drivers of servers"]
    assert reliability.grouped({"pymysql", "asyncpg"}) == ["asyncpg", "pymysql"]


def test_without_the_variable_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(reliability.VARIABLE, raising=False)
    reliability.record("a fork", "asyncpg", 1, "0 lost")
    assert [*tmp_path.iterdir()] == []


def test_a_page_without_a_place_for_the_table_is_refused(tmp_path):
    results, page = tmp_path / "results.jsonl", tmp_path / "page.md"
    results.touch()
    page.write_text("No table.")
    with pytest.raises(SystemExit, match="lacks the lines"):
        reliability.write_table(results, page)
    assert page.read_text() == "No table."


def test_the_page_has_a_table_of_a_run():
    table = PAGE.read_text(encoding="utf-8").partition(reliability.BEGIN)[2]
    rows = re.findall(r"^\| (.+) \| (.+) \| [\d,]+ \| (.+) \|$", table, re.MULTILINE)
    assert len(rows) > 20
    assert len({row[0] for row in rows}) > 15
