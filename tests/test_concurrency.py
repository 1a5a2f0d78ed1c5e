"""Many writers at once, and writers that are killed: rules E6, E7 and H1, on real databases."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from reliability import record
from sdk_processes import ENVIRONMENT, PYTHON
from sdk_tokens import known, make_token
from sqlalchemy import create_engine, event

from zoho_orm_store import SQLAlchemyTokenStore

WORKER = str(Path(__file__).parent / "worker.py")


def start(mode, url, *arguments):
    return PYTHON.start(WORKER, mode, url.render_as_string(hide_password=False), *arguments)


SIZES = [
    pytest.param(2, 25, id="50 threads in 2 processes"),
    pytest.param(4, 50, id="200 threads in 4 processes", marks=pytest.mark.soak),
]


def save_from_processes(url, mode, number, threads):
    processes = [start("save_at_once", url, str(n), str(threads), mode) for n in range(number)]
    lines = [line for p in processes for line in p.communicate(timeout=110)[0].splitlines()]
    assert [line for line in lines if line.startswith("FAILED")] == []
    assert all(process.returncode == 0 for process in processes)
    return [line.removeprefix("ID ") for line in lines]


def open_stored(url):
    with SQLAlchemyTokenStore(url, create_schema=False) as store:
        return store.get_tokens()


@pytest.mark.parametrize(("processes", "threads"), SIZES)
def test_processes_save_one_new_identity_at_once_E7(database, processes, threads):
    ids = save_from_processes(database, "same", processes, threads)
    tokens = open_stored(database)
    assert len(ids) == processes * threads
    assert {token.get_id() for token in tokens} == set(ids)
    assert len(tokens) == 1
    values = known(tokens[0])
    worker, number = values["access_token"].removeprefix("a ").split(".")
    assert values["redirect_url"] == values["access_token"], "values of two saves in one row"
    assert values["expiry_time"] == int(worker) * 1000 + int(number)
    record("many processes save one new user at once", database, len(ids), "one row, of one save")


# Elsewhere the first one locks the id that is not there yet, so that no other is faster.
@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_of_two_first_saves_with_one_id_the_later_one_is_not_lost_E7(database):
    engine = create_engine(database)
    fields = {"id": "own", "user": "ada", "client_id": "c"}
    due = [make_token(**fields, access_token="theirs", api_domain="theirs")]

    @event.listens_for(engine, "before_cursor_execute")
    def another_is_faster(connection, cursor, statement, *_):
        if statement.startswith("INSERT INTO oauthtoken ") and due:
            with SQLAlchemyTokenStore(database, create_schema=False) as other:
                other.save_token(due.pop())

    with SQLAlchemyTokenStore(engine) as store:
        store.save_token(make_token(**fields, access_token="ours"))
        assert due == []
        [token] = store.get_tokens()
    assert (token.get_access_token(), token.get_api_domain()) == ("ours", "theirs")
    engine.dispose()


@pytest.mark.parametrize(("processes", "threads"), SIZES)
def test_processes_save_an_identity_for_each_thread_at_once_E7(database, processes, threads):
    ids = save_from_processes(database, "different", processes, threads)
    tokens = open_stored(database)
    assert len(set(ids)) == len(tokens) == processes * threads
    assert {known(token)["user_name"] for token in tokens} == {
        f"{worker}.{number}" for worker in range(processes) for number in range(threads)
    }
    record("many processes save different users at once", database, len(ids), "0 saves lost")


def test_a_row_is_saved_deleted_and_found_at_once_E7(database):
    with SQLAlchemyTokenStore(database, create_schema=False, timeout=60) as store:

        def work(number):
            for n in range(25):
                token = make_token(user="u", refresh_token="r", access_token=f"a{number}.{n}")
                if number % 4 == 0 and n % 5 == 0:
                    store.delete_tokens()
                elif number % 2:
                    store.save_token(token)
                else:
                    store.find_token(token)

        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(work, number) for number in range(8)]:
                done.result()
        assert len(store.get_tokens()) <= 1


def test_threads_save_a_token_with_and_without_its_user_at_once_E4_E7(database):
    with SQLAlchemyTokenStore(database, create_schema=False, timeout=60) as store:

        def save(number):
            fields = {"client_id": "c", "refresh_token": "r", "access_token": f"a{number}"}
            if number % 2:
                fields["user"] = "u"
            store.save_token(make_token(**fields))

        for _ in range(5):
            store.delete_tokens()
            with ThreadPoolExecutor(8) as pool:
                for done in [pool.submit(save, number) for number in range(16)]:
                    done.result()
            assert [known(token)["user_name"] for token in store.get_tokens()] == ["u"]


def test_a_writer_that_is_killed_before_it_commits_leaves_the_old_row_E6(database):
    with start("save_and_be_killed", database) as writer:
        assert writer.stdout.read() == "SAVED\nWRITTEN\n"
    assert writer.returncode == -signal.SIGKILL
    (token,) = open_stored(database)
    expected = {"access_token": "a1", "refresh_token": "r1", "redirect_url": "u1", "expiry_time": 1}
    assert known(token) == {"user_name": "u", "client_id": "c", **expected}
    record("a writer is killed before it commits", database, 1, "the old row stayed")


@pytest.mark.soak
def test_a_killed_writer_leaves_the_old_row_or_the_new_one_E6(database):
    randomness = random.Random(7)
    for _ in range(20):
        with start("save_until_killed", database) as writer:
            assert writer.stdout.readline()
            time.sleep(randomness.uniform(0.01, 0.2))
            writer.kill()
            reported = [int(line) for line in writer.stdout.read().splitlines()]
        tokens = open_stored(database)
        assert len(tokens) == 1
        values = known(tokens[0])
        number = values["expiry_time"]
        assert values["access_token"] == f"a{number}"
        assert values["refresh_token"] == f"r{number}"
        assert values["redirect_url"] == f"u{number}"
        assert number >= max(reported, default=1), "a save that was reported is lost"
    record("a writer is killed at any time", database, 20, "the old row or the new one, 0 lost")


@pytest.mark.parametrize("driver", ["sqlite", "sqlite+aiosqlite"])
def test_a_store_that_is_not_closed_does_not_keep_the_interpreter_H2(driver, tmp_path):
    result = subprocess.run(
        [sys.executable, WORKER, "not_closed", f"{driver}:///{tmp_path / 'tokens.db'}"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert result.stdout == "done\n"
    assert result.returncode == 0
