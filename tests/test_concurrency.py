"""Many writers at once, and writers that are killed: rules E6, E7 and H1, on real databases."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sdk_tokens import known, make_token

from zoho_orm_store import SQLAlchemyTokenStore

WORKER = str(Path(__file__).parent / "worker.py")
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), str(Path(__file__).parent)])
}


def start(mode, url, *arguments):
    address = url.render_as_string(hide_password=False)
    return subprocess.Popen(
        [sys.executable, WORKER, mode, address, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def save_from_four_processes(url, mode):
    processes = [start("save_at_once", url, str(n), "50", mode) for n in range(4)]
    lines = [line for p in processes for line in p.communicate(timeout=110)[0].splitlines()]
    assert [line for line in lines if line.startswith("FAILED")] == []
    assert all(process.returncode == 0 for process in processes)
    return [line.removeprefix("ID ") for line in lines]


def open_stored(url):
    with SQLAlchemyTokenStore(url, create_schema=False) as store:
        return store.get_tokens()


def test_200_threads_in_4_processes_save_one_new_identity_E7(database):
    ids = save_from_four_processes(database, "same")
    tokens = open_stored(database)
    assert len(ids) == 200
    assert {token.get_id() for token in tokens} == set(ids)
    assert len(tokens) == 1
    values = known(tokens[0])
    worker, number = values["access_token"].removeprefix("a ").split(".")
    assert values["redirect_url"] == values["access_token"], "values of two saves in one row"
    assert values["expiry_time"] == int(worker) * 1000 + int(number)


def test_200_threads_in_4_processes_save_200_identities_E7(database):
    ids = save_from_four_processes(database, "different")
    tokens = open_stored(database)
    assert len(set(ids)) == len(tokens) == 200
    assert {known(token)["user_name"] for token in tokens} == {
        f"{worker}.{number}" for worker in range(4) for number in range(50)
    }


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


def test_rows_are_tied_together_from_both_sides_at_once_E4_E7(database):
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
            store.save_token(
                make_token(user="u", client_id="c", refresh_token="r2", access_token="x")
            )
            store.save_token(
                make_token(user="u", client_id="c", refresh_token="r", access_token="last")
            )
            tokens = store.get_tokens()
            assert [known(token)["access_token"] for token in tokens] == ["last"]


def test_a_killed_writer_leaves_the_old_row_or_the_new_one_E6(database):
    randomness = random.Random(7)
    for _ in range(4):
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
