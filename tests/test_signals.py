"""Signals that interrupt a call, as an application's own time limits do."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from billiard.exceptions import SoftTimeLimitExceeded
from conftest import BY_DRIVER, on_empty_sqlite, on_routes, open_store
from databases import SERVERS
from reliability import record
from sdk_tokens import FULL, known, make_token
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from zoho_orm_store import TokenRecord

WAIT_DIFFERENTLY = ("+psycopg", "+pymysql", "+asyncpg")
"""In C code that lets signals through, in a socket's method, and in a loop's thread."""

INTERRUPTED = "the exception came out unchanged, and the next call worked"

ON_SERVERS = [route for route in BY_DRIVER if route.database in SERVERS]
ON_SQLITE = [route for route in BY_DRIVER if route.database == "sqlite"]


class RequestTimeout(Exception):  # noqa: N818 - as gunicorn's and others' are called
    """What an application raises when a request takes too long."""


INTERRUPTIONS = (
    RequestTimeout,
    TimeoutError,
    SoftTimeLimitExceeded,
    KeyboardInterrupt,
    SystemExit,
)


def on_each_route():
    """Each driver with what drivers are likeliest to take for an error of their own, and a few
    drivers with everything."""
    for interruption in INTERRUPTIONS:
        for route in BY_DRIVER:
            in_gate = interruption is TimeoutError or route.driver.endswith(WAIT_DIFFERENTLY)
            marks = () if in_gate else (pytest.mark.soak,)
            yield pytest.param(
                route, interruption, id=f"{route}-{interruption.__name__}", marks=marks
            )


@contextmanager
def row_locked(url, id_):
    """Keep a row, or all of a SQLite file, from being written."""
    if url.get_backend_name() == "sqlite":
        with closing(sqlite3.connect(url.database, isolation_level=None)) as connection:
            connection.execute("BEGIN EXCLUSIVE")
            yield
            connection.rollback()
        return
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        statement = "SELECT id FROM oauthtoken WHERE id = :id FOR UPDATE"
        connection.execute(text(statement), {"id": id_})
        yield


@contextmanager
def table_locked(url):
    """Keep the table from being read."""
    mode = "IN ACCESS EXCLUSIVE MODE" if url.get_backend_name() == "postgresql" else "WRITE"
    tables = "TABLE" if url.get_backend_name() == "postgresql" else "TABLES"
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        connection.execute(text(f"LOCK {tables} oauthtoken {mode}"))
        yield


def swallows_errors(frame):
    """Whether what is raised in a frame is lost.

    Python loses it in what the garbage collector calls, SQLAlchemy while it closes a cursor.
    """
    while frame is not None:
        if frame.f_code.co_name in ("_collection_gced", "__del__", "_safe_close_cursor"):
            return True
        frame = frame.f_back
    return False


@contextmanager
def raised_by_a_signal(error, seconds):
    """Raise an exception in the main thread by a signal, some seconds from now.

    Yields:
        A list with the time of the signal, once it was sent.
    """

    def handle(_, frame):
        if swallows_errors(frame):
            threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            return
        raise error

    sent = []

    def send():
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handle)
    timer = threading.Timer(seconds, send)
    timer.start()
    try:
        yield sent
    finally:
        timer.cancel()
        timer.join()
        signal.signal(signal.SIGUSR1, before)


@contextmanager
def interrupted(error, within=1.0):
    """Expect that a signal's exception ends the block, unchanged and in time."""
    with pytest.raises(type(error)) as raised, raised_by_a_signal(error, 0.15) as sent:
        yield
    assert raised.value is error
    assert time.monotonic() - sent[0] < within


@pytest.mark.parametrize(("route", "interruption"), [*on_each_route()])
def test_what_a_signal_handler_raises_comes_out_of_a_save_H8(route, route_url, interruption):
    # sqlite3 waits in C, where no handler runs, until its own timeout.
    timeout, within = (0.5, 1.5) if route.driver == "sqlite+pysqlite" else (20, 1)
    with open_store(route, route_url, gives_up=True, timeout=timeout) as store:
        saved = make_token(**FULL)
        store.save_token(saved)
        id_ = saved.get_id()
        with row_locked(route_url, id_), interrupted(interruption("too long"), within):
            store.save_token(make_token(id=id_, access_token="interrupted"))
        assert known(store.find_token_by_id(id_)) == known(saved)
        store.save_token(make_token(id=id_, access_token="later"))
        assert known(store.find_token_by_id(id_))["access_token"] == "later"
    record("a signal handler raises during a save", route.driver, 1, INTERRUPTED)


@on_routes(*ON_SERVERS)
def test_what_a_signal_handler_raises_comes_out_of_a_lookup_H8(route, route_url):
    with open_store(route, route_url, gives_up=True, timeout=20) as store:
        saved = make_token(**FULL)
        store.save_token(saved)
        with table_locked(route_url), interrupted(TimeoutError("too long")):
            store.find_token_by_id(saved.get_id())
        assert known(store.find_token_by_id(saved.get_id())) == known(saved)
    record("a signal handler raises during a lookup", route.driver, 1, INTERRUPTED)


@on_routes(*ON_SQLITE)
def test_it_comes_out_of_the_wait_for_other_threads_on_sqlite_H8(store):
    began, finish = threading.Event(), threading.Event()

    def keep_others_waiting():
        with store.transaction() as tokens:
            tokens.save(TokenRecord(user_name="u", access_token="first"))
            began.set()
            finish.wait()

    thread = threading.Thread(target=keep_others_waiting)
    thread.start()
    began.wait()
    try:
        with interrupted(RequestTimeout("too long")):
            store.save_token(make_token(user="u", access_token="interrupted"))
    finally:
        finish.set()
        thread.join()
    assert [known(token)["access_token"] for token in store.get_tokens()] == ["first"]
    store.save_token(make_token(user="u", access_token="later"))


@on_routes(*ON_SQLITE)
def test_it_comes_out_of_the_wait_for_another_callers_refresh_H8(store):
    expired = make_token(**FULL | {"expires_in": "1"})
    store.save_token(expired)
    refreshing = threading.Thread(target=store.find_token_by_id, args=(expired.get_id(),))
    refreshing.start()
    refreshing.join()
    with interrupted(RequestTimeout("too long")):
        store.find_token_by_id(expired.get_id())
    store.save_token(make_token(**FULL))
    assert known(store.find_token_by_id(expired.get_id())) == known(make_token(**FULL))


@on_empty_sqlite
def test_hundreds_of_interrupted_reads_leave_no_lock_behind_H8(empty_database):
    """A signal may come at any step, also when a lock was just taken."""
    program = Path(__file__).with_name("interrupted_reader.py")
    done = subprocess.run(
        [sys.executable, program, str(empty_database)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
