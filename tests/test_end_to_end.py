"""The real SDK on our stores, with a loopback Zoho at the other end."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sdk_process
from conftest import BY_DATABASE, MEMORY, ROUTES, Route, on_empty_sqlite, on_sqlite, open_store
from sdk_process import last_names, whoami
from sdk_releases import KNOWS_NO_USER, RETURNS_NONE, REVOKES, SDK, fails_before, user_of_token
from sqlalchemy import create_engine, text
from zohocrmsdk.src.com.zoho.api.authenticator.oauth_token import OAuthToken
from zohocrmsdk.src.com.zoho.api.authenticator.store import DBStore, FileStore
from zohocrmsdk.src.com.zoho.crm.api.exception import SDKException
from zohocrmsdk.src.com.zoho.crm.api.initializer import Initializer

from zoho_orm_store import MemoryTokenStore, SQLAlchemyTokenStore
from zoho_orm_store._sdk.conversion import record_from
from zoho_orm_store.testing import DEFAULT_USER, Counts
from zoho_orm_store.transfer import (
    SDK_COLUMNS,
    FileStoreFile,
    TokenTable,
    export_tokens,
    import_tokens,
)

ADA = "ada@example.com"
BOB = "bob@example.com"
ASYNC_DRIVERS = ("sqlite+aiosqlite", "postgresql+asyncpg", "mysql+asyncmy")
LEADS = ["Byron", "Murray", "O'Brien"]


@pytest.fixture
def store(database):
    route = Route("", database.drivername, "url")
    with open_store(route, database, create_schema=False) as store:
        yield store


@pytest.fixture
def rows(query):
    """The stored tokens as they stand in the database, by user name."""

    def read():
        found = query(f"SELECT {', '.join(SDK_COLUMNS)} FROM oauthtoken ORDER BY created_at, id")
        stored = [dict(zip(SDK_COLUMNS, row, strict=True)) for row in found]
        return {row["user_name"]: row for row in stored}

    return read


@pytest.fixture
def expire(query):
    """Let the hour of every stored access token be over."""
    return lambda: query("UPDATE oauthtoken SET expiry_time = 1")


@pytest.fixture(autouse=True)
def errors():
    """What the SDK or the store logs as an error, which must be nothing unless a test takes it."""

    collected = []

    def collect(record):
        """Take errors before any handler: the SDK's messages have no place for their arguments."""
        if record.levelno < logging.ERROR:
            return True
        collected.append((record.name, record.msg, record.args))
        return False

    loggers = [logging.getLogger(name) for name in ("SDKLogger", "zoho_orm_store")]
    for logger in loggers:
        logger.addFilter(collect)
    yield collected
    for logger in loggers:
        logger.removeFilter(collect)
    assert collected == []


@pytest.fixture
def start(zoho, tmp_path, monkeypatch):
    """What starts the SDK with a token and a store; afterwards the process is as it was."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(Initializer, "initializer", None)
    yield lambda token, store: sdk_process.start(zoho, token, store, tmp_path)
    Initializer.LOCAL.init = None


def client_of(zoho):
    return {"client_id": zoho.client_id, "client_secret": zoho.client_secret}


def by_grant(zoho, user=DEFAULT_USER, **more):
    code = zoho.issue_grant_token(user)
    more |= {"grant_token": code, "redirect_url": zoho.redirect_url}
    return OAuthToken(**client_of(zoho), **user_of_token(zoho.user_name(user), **more))


def by_refresh(zoho, user=DEFAULT_USER, **more):
    more["refresh_token"] = zoho.issue_refresh_token(user)
    return OAuthToken(**client_of(zoho), **user_of_token(zoho.user_name(user), **more))


def again(token):
    """What a process knows that was told the refresh token of a login, and nothing else."""
    return OAuthToken(
        client_id=token.get_client_id(),
        client_secret=token.get_client_secret(),
        refresh_token=token.get_refresh_token(),
    )


def token_requests(zoho):
    return [each.kind for each in zoho.requests if each.kind != "api"]


def milliseconds_from_now(seconds):
    return pytest.approx((time.time() + seconds) * 1000, abs=20_000)


@pytest.fixture
def run_process(zoho, database, tmp_path):
    """Run an application in another process, on the same database."""

    def run(refresh_token):
        folder = tmp_path / "another process"
        folder.mkdir()
        given = {
            "url": database.render_as_string(hide_password=False),
            "port": int(zoho.url.rpartition(":")[2]),
            "token": client_of(zoho) | {"refresh_token": refresh_token},
            "folder": str(folder),
        }
        here = Path(__file__).parent
        process = subprocess.run(
            [sys.executable, sdk_process.__file__],
            input=json.dumps(given),
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])},
            timeout=60,
            check=True,
        )
        return json.loads(process.stdout)

    return run


@pytest.mark.parametrize(
    ("route", "find_user"),
    [
        *(pytest.param(route, True, id=f"{route}") for route in ROUTES),
        *(pytest.param(route, False, id=f"{route}-no user") for route in (MEMORY, *BY_DATABASE)),
    ],
)
def test_log_in_call_expire_and_refresh_on_every_route(route, route_url, zoho, start, find_user):
    with open_store(route, route_url) as store:
        token = by_grant(zoho, find_user=find_user)
        start(token, store)
        assert last_names() == LEADS
        first = record_from(store.find_token_by_id(token.get_id()))
        assert first.user_name == (zoho.user_name() if find_user else None)

        old = store.find_token_by_id(token.get_id())
        old.set_expires_in("1")
        store.save_token(old)
        assert last_names() == LEADS
        assert last_names() == LEADS
        assert token_requests(zoho) == ["exchange", "refresh"]

        (new,) = map(record_from, store.get_tokens())
        assert (new.id, new.refresh_token) == (first.id, first.refresh_token)
        assert new.access_token != first.access_token
        assert zoho.is_live(new.access_token)


@pytest.mark.parametrize("route", [r for r in ROUTES if r.driver in ASYNC_DRIVERS], ids=str)
async def test_the_sdk_works_inside_a_running_event_loop(route, route_url, zoho, start):
    with open_store(route, route_url) as store, ThreadPoolExecutor(1) as pool:
        token = by_refresh(zoho)
        start(token, store)
        assert await asyncio.get_running_loop().run_in_executor(pool, whoami) == DEFAULT_USER
        assert last_names() == LEADS
        (stored,) = store.get_tokens()
        assert stored.get_access_token() == token.get_access_token()
        assert token_requests(zoho) == ["refresh"]


class TestFlows:
    @fails_before((6, 0), KNOWS_NO_USER)
    def test_a_grant_token_becomes_one_complete_row(self, zoho, start, store, rows):
        token = by_grant(zoho, ADA)
        start(token, store)
        assert rows() == {
            zoho.user_name(ADA): {
                "id": token.get_id(),
                "user_name": zoho.user_name(ADA),
                **client_of(zoho),
                "refresh_token": token.get_refresh_token(),
                "access_token": token.get_access_token(),
                "grant_token": token.get_grant_token(),
                "expiry_time": milliseconds_from_now(3600),
                "redirect_url": zoho.redirect_url,
                "api_domain": zoho.url,
            }
        }
        assert zoho.is_live(token.get_access_token())
        assert zoho.is_live(token.get_refresh_token())
        assert zoho.counts == Counts(1, 0, 0, 0, api_calls=2)

    @on_sqlite
    def test_a_spent_grant_token_finds_its_row(self, zoho, start, store, rows):
        token = by_grant(zoho)
        code = token.get_grant_token()
        start(token, store)
        before = rows()
        zoho.reset_counts()
        start(OAuthToken(**client_of(zoho), grant_token=code), store)
        assert whoami() == DEFAULT_USER
        assert token_requests(zoho) == []
        assert rows() == before

    @fails_before((6, 0), KNOWS_NO_USER)
    @on_sqlite
    def test_a_refresh_token_becomes_one_row(self, zoho, start, store, rows):
        token = by_refresh(zoho, ADA)
        start(token, store)
        (row,) = rows().values()
        assert row["user_name"] == zoho.user_name(ADA)
        assert row["refresh_token"] == token.get_refresh_token()
        assert row["access_token"] == token.get_access_token()
        assert row["expiry_time"] == milliseconds_from_now(3600)
        assert zoho.is_live(row["access_token"])
        assert zoho.counts == Counts(0, 1, 0, 0, api_calls=2)

    @fails_before((6, 0), KNOWS_NO_USER)
    @on_sqlite
    def test_an_access_token_is_stored_with_its_user(self, zoho, start, store, rows):
        access_token = zoho.issue_access_token(zoho.issue_refresh_token(ADA))
        start(OAuthToken(access_token=access_token), store)
        assert whoami() == ADA
        (row,) = rows().values()
        assert row["user_name"] == zoho.user_name(ADA)
        assert row["access_token"] == access_token
        assert row["expiry_time"] is None
        assert token_requests(zoho) == []

    @on_sqlite
    def test_a_known_access_token_is_found(self, zoho, start, store, rows):
        access_token = zoho.issue_access_token(zoho.issue_refresh_token())
        start(OAuthToken(access_token=access_token), store)
        before = rows()
        zoho.reset_counts()
        start(OAuthToken(access_token=access_token), store)
        assert zoho.requests == []
        assert rows() == before

    @on_sqlite
    def test_an_id_is_enough(self, zoho, start, store, rows):
        ada, bob = by_refresh(zoho, ADA), by_refresh(zoho, BOB)
        start(ada, store)
        start(bob, store)
        before = rows()
        zoho.reset_counts()
        for known, user in ((ada, ADA), (bob, BOB)):
            start(OAuthToken(id=known.get_id()), store)
            assert whoami() == user
        assert last_names() == LEADS
        assert token_requests(zoho) == []
        assert rows() == before

    @on_sqlite
    def test_an_id_is_enough_to_refresh(self, zoho, start, store, rows, expire):
        token = by_refresh(zoho)
        start(token, store)
        expire()
        zoho.reset_counts()
        start(OAuthToken(id=token.get_id()), store)
        assert token_requests(zoho) == ["refresh"]
        (row,) = rows().values()
        assert row["id"] == token.get_id()
        assert row["access_token"] != token.get_access_token()
        assert zoho.is_live(row["access_token"])

    @fails_before((8, 7), RETURNS_NONE)
    @on_sqlite
    def test_an_unknown_id_is_the_sdks_error(self, zoho, start, store, rows):
        start(by_refresh(zoho), store)
        before = rows()
        with pytest.raises(SDKException, match="invalid_client"):
            start(OAuthToken(id="unknown"), store)
        assert rows() == before

    @on_sqlite
    def test_an_unknown_id_is_no_request_where_that_is_asked_for(self, zoho, start, database):
        with SQLAlchemyTokenStore(database, create_schema=False, missing_id="raise") as store:
            with pytest.raises(SDKException, match="Given Id is invalid"):
                start(OAuthToken(id="unknown"), store)
            assert zoho.requests == []

    @on_sqlite
    def test_the_user_need_not_be_found_out(self, zoho, start, store, rows):
        token = by_refresh(zoho, find_user=False)
        start(token, store)
        (row,) = rows().values()
        assert row["user_name"] is None
        assert row["access_token"] == token.get_access_token()
        assert zoho.counts == Counts(0, 1, 0, 0, api_calls=0)

    @on_sqlite
    def test_a_token_without_a_user_is_found_by_its_refresh_token(self, zoho, start, store, rows):
        token = by_refresh(zoho, find_user=False)
        start(token, store)
        before = rows()
        start(again(token), store)
        assert last_names() == LEADS
        assert token_requests(zoho) == ["refresh"]
        assert rows() == before

    @fails_before((6, 0), KNOWS_NO_USER)
    def test_a_user_found_out_later_is_the_same_row(self, zoho, start, store, rows, expire):
        token = by_refresh(zoho, ADA, find_user=False)
        start(token, store)
        expire()
        start(again(token), store)
        (row,) = rows().values()
        assert row["user_name"] == zoho.user_name(ADA)
        assert row["id"] == token.get_id()

    @on_sqlite
    def test_a_second_store_in_the_process_asks_for_no_token(self, zoho, start, database, rows):
        token = by_grant(zoho)
        with SQLAlchemyTokenStore(database, create_schema=False) as store:
            start(token, store)
        before = rows()
        with SQLAlchemyTokenStore(database, create_schema=False) as store:
            start(again(token), store)
            assert whoami() == DEFAULT_USER
        assert token_requests(zoho) == ["exchange"]
        assert rows() == before

    @on_sqlite
    def test_nothing_is_written_but_the_row(self, zoho, start, store, tmp_path, monkeypatch):
        here = tmp_path / "working directory"
        here.mkdir()
        monkeypatch.chdir(here)
        start(by_grant(zoho), store)
        assert last_names() == LEADS
        assert list(here.iterdir()) == []

    def test_no_secret_is_in_a_log_record(self, zoho, start, database, rows, expire, caplog):
        caplog.set_level(logging.DEBUG)
        caplog.set_level(logging.INFO, "sqlalchemy")  # at DEBUG it logs the rows it reads
        with SQLAlchemyTokenStore(database, create_schema=False) as store:
            start(by_grant(zoho), store)
            old = rows()
            expire()
            assert whoami() == DEFAULT_USER
        logged = "".join(
            record.getMessage() for record in caplog.records if record.name != "SDKLogger"
        )
        assert "INSERT INTO oauthtoken" in logged
        for stored in (old, rows()):
            (row,) = stored.values()
            for secret in ("client_secret", "refresh_token", "access_token", "grant_token"):
                assert row[secret] not in logged

    def test_a_new_login_of_a_user_renews_the_row(self, zoho, start, store, rows):
        first, second = by_grant(zoho), by_grant(zoho)
        start(first, store)
        start(second, store)
        (row,) = rows().values()
        assert row["id"] == first.get_id() == second.get_id()
        assert row["refresh_token"] == second.get_refresh_token()
        assert row["access_token"] == second.get_access_token()


class TestExpiry:
    def test_an_expired_token_is_refreshed_once_for_all_calls(
        self, zoho, start, store, rows, expire
    ):
        token = by_grant(zoho)
        start(token, store)
        (old,) = rows().values()
        expire()
        zoho.expire_tokens()
        zoho.reset_counts()
        assert [whoami(), whoami()] == [DEFAULT_USER] * 2
        assert last_names() == LEADS
        assert token_requests(zoho) == ["refresh"]
        (new,) = rows().values()
        assert zoho.is_live(new["access_token"])
        assert new["expiry_time"] == milliseconds_from_now(3600)
        renewed = ("access_token", "expiry_time")
        assert {k: v for k, v in new.items() if k not in renewed} == {
            k: v for k, v in old.items() if k not in renewed
        }

    @on_sqlite
    def test_a_token_without_a_user_is_refreshed_once_too(self, zoho, start, store, rows, expire):
        token = by_refresh(zoho, find_user=False)
        start(token, store)
        expire()
        zoho.reset_counts()
        assert [last_names(), last_names()] == [LEADS, LEADS]
        assert token_requests(zoho) == ["refresh"]
        (row,) = rows().values()
        assert row["access_token"] != token.get_access_token()


class TestSecondProcess:
    @on_sqlite
    def test_it_starts_with_the_refresh_token_alone_and_asks_for_no_token(
        self, zoho, start, store, rows, run_process
    ):
        token = by_grant(zoho, ADA)
        start(token, store)
        before = rows()
        zoho.reset_counts()
        answer = run_process(token.get_refresh_token())
        assert answer.pop("pid") != os.getpid()
        assert answer == {"id": token.get_id(), "user": ADA, "leads": LEADS}
        assert token_requests(zoho) == []
        assert rows() == before

    def test_what_it_refreshes_is_used_here(self, zoho, start, store, rows, expire, run_process):
        token = by_refresh(zoho)
        start(token, store)
        expire()
        zoho.expire_tokens()
        zoho.reset_counts()
        run_process(token.get_refresh_token())
        assert token_requests(zoho) == ["refresh"]
        assert whoami() == DEFAULT_USER
        assert token_requests(zoho) == ["refresh"]
        assert len(rows()) == 1


class TestUsers:
    @on_sqlite
    def test_switching_users_switches_tokens(self, zoho, start, store, rows):
        ada, bob = by_grant(zoho, ADA), by_refresh(zoho, BOB)
        start(ada, store)
        assert whoami() == ADA
        Initializer.switch_user(token=bob)
        assert whoami() == BOB
        Initializer.switch_user(token=ada)
        assert whoami() == ADA
        assert {user: row["access_token"] for user, row in rows().items()} == {
            zoho.user_name(ADA): ada.get_access_token(),
            zoho.user_name(BOB): bob.get_access_token(),
        }
        assert token_requests(zoho) == ["exchange", "refresh"]

    @on_sqlite
    def test_tokens_out_of_get_tokens_can_be_switched_to(self, zoho, start, store, rows):
        start(by_grant(zoho, ADA), store)
        start(by_refresh(zoho, BOB), store)
        before = rows()
        zoho.reset_counts()
        for token, user in zip(store.get_tokens(), (ADA, BOB), strict=True):
            Initializer.switch_user(token=token)
            assert whoami() == user
            assert last_names() == LEADS
        assert token_requests(zoho) == []
        assert rows() == before

    @on_sqlite
    def test_a_token_out_of_get_tokens_is_refreshed(self, zoho, start, store, rows, expire):
        start(by_grant(zoho, ADA), store)
        start(by_refresh(zoho, BOB), store)
        expire()
        before = rows()
        zoho.reset_counts()
        ada, _ = store.get_tokens()
        Initializer.switch_user(token=ada)
        assert whoami() == ADA
        assert token_requests(zoho) == ["refresh"]
        after = rows()
        assert zoho.is_live(after[zoho.user_name(ADA)]["access_token"])
        assert after[zoho.user_name(ADA)]["expiry_time"] == milliseconds_from_now(3600)
        assert after[zoho.user_name(BOB)] == before[zoho.user_name(BOB)]

    @on_sqlite
    def test_one_users_early_end_leaves_the_other_alone(self, zoho, start, store, query, rows):
        start(by_refresh(zoho, ADA), store)
        bob = by_refresh(zoho, BOB)
        start(bob, store)
        query("UPDATE oauthtoken SET expiry_time = 1 WHERE id = :id", id=bob.get_id())
        before = rows()
        assert whoami() == BOB
        after = rows()
        assert after[zoho.user_name(ADA)] == before[zoho.user_name(ADA)]
        assert after[zoho.user_name(BOB)] != before[zoho.user_name(BOB)]

    def test_every_thread_is_the_user_it_switched_to(self, zoho, start, store, rows):
        users = [f"user{number}@example.com" for number in range(16)]
        tokens = [by_refresh(zoho, user) for user in users]
        start(by_refresh(zoho, ADA), store)
        together = threading.Barrier(len(users), timeout=30)

        def work(token):
            together.wait()
            Initializer.switch_user(token=token)
            return [whoami() for _ in range(5)]

        with ThreadPoolExecutor(len(users)) as pool:
            seen = list(pool.map(work, tokens))
        assert seen == [[user] * 5 for user in users]
        stored = rows()
        assert stored.keys() == {zoho.user_name(user) for user in [ADA, *users]}
        for user, token in zip(users, tokens, strict=True):
            row = stored[zoho.user_name(user)]
            assert row["id"] == token.get_id()
            assert row["access_token"] == token.get_access_token()
            assert row["refresh_token"] == token.get_refresh_token()
        assert zoho.counts.refreshes == 17
        assert zoho.counts.refused == 0


class TestEnding:
    @fails_before((8, 7), REVOKES)
    @on_sqlite
    def test_a_token_is_revoked_and_then_deleted(self, zoho, start, store, rows):
        ada, bob = by_refresh(zoho, ADA), by_refresh(zoho, BOB)
        start(bob, store)
        start(ada, store)
        assert ada.revoke(ada.get_id()) is True
        assert zoho.counts.revokes == 1
        assert [zoho.is_live(each.get_refresh_token()) for each in (ada, bob)] == [False, True]
        assert len(rows()) == 2, "revoking leaves the row"
        store.delete_token(ada.get_id())
        assert rows().keys() == {zoho.user_name(BOB)}

    @fails_before((8, 7), REVOKES)
    @on_sqlite
    def test_any_stored_token_can_be_revoked_by_its_id(self, zoho, start, store):
        ada, bob = by_refresh(zoho, ADA), by_refresh(zoho, BOB)
        start(ada, store)
        start(bob, store)
        assert bob.revoke(ada.get_id()) is True
        assert [zoho.is_live(each.get_refresh_token()) for each in (ada, bob)] == [False, True]

    @fails_before((8, 7), REVOKES)
    @on_sqlite
    def test_revoking_an_unknown_id_revokes_nothing(self, zoho, start, store):
        token = by_refresh(zoho)
        start(token, store)
        assert token.revoke("unknown") is False
        assert zoho.counts.revokes == 0
        assert zoho.is_live(token.get_refresh_token())

    @on_sqlite
    def test_remove_deletes_the_row_and_leaves_zoho_alone(self, zoho, start, store, rows):
        ada, bob = by_refresh(zoho, ADA), by_refresh(zoho, BOB)
        start(bob, store)
        start(ada, store)
        zoho.reset_counts()
        assert ada.remove() is True
        assert rows().keys() == {zoho.user_name(BOB)}
        assert zoho.requests == []
        assert zoho.is_live(ada.get_refresh_token())


class TestWhatGoesWrong:
    @on_sqlite
    def test_a_used_grant_code_is_reported_and_nothing_is_lost(self, zoho, start, store, rows):
        start(by_grant(zoho, ADA), store)
        elsewhere = by_grant(zoho, BOB)
        code = elsewhere.get_grant_token()
        start(elsewhere, MemoryTokenStore())
        before = rows()
        with pytest.raises(SDKException, match="invalid_code"):
            start(OAuthToken(**client_of(zoho), grant_token=code), store)
        assert rows() == before
        assert zoho.counts.refused == 1

    @on_sqlite
    def test_a_revoked_refresh_token_is_reported_and_nothing_is_lost(
        self, zoho, start, store, rows, expire
    ):
        token = by_grant(zoho)
        start(token, store)
        expire()
        before = rows()
        zoho.revoke(token.get_refresh_token())
        with pytest.raises(SDKException, match="invalid_code"):
            whoami()
        assert rows() == before
        assert zoho.counts.refused == 1

    @on_sqlite
    def test_a_refresh_token_revoked_before_the_start_is_reported(self, zoho, start, store, rows):
        token = by_refresh(zoho)
        zoho.revoke(token.get_refresh_token())
        with pytest.raises(SDKException, match="invalid_code"):
            start(token, store)
        assert rows() == {}

    @on_sqlite
    def test_a_refused_refresh_can_be_tried_again(self, zoho, start, store, rows, expire):
        start(by_grant(zoho), store)
        expire()
        before = rows()
        zoho.fail()
        with pytest.raises(SDKException):
            whoami()
        assert rows() == before
        assert whoami() == DEFAULT_USER
        (row,) = rows().values()
        assert zoho.is_live(row["access_token"])

    @pytest.mark.skipif(SDK < (6, 0), reason="5.0 raises what a save raises")
    def test_a_failed_save_is_logged_and_the_call_goes_on(
        self, zoho, start, empty_database, errors
    ):
        engine = create_engine(empty_database)

        class LosesItsTable(SQLAlchemyTokenStore):
            def find_token(self, token):
                found = super().find_token(token)
                with engine.begin() as connection:
                    connection.execute(text("DROP TABLE oauthtoken"))
                return found

        token = by_refresh(zoho)
        with LosesItsTable(empty_database, create_schema=True) as store:
            start(token, store)
        engine.dispose()
        assert zoho.is_live(token.get_access_token())
        (ours, _, (reason,)), (sdks, message, (raised,)) = errors
        assert (ours, sdks) == ("zoho_orm_store", "SDKLogger")
        assert message == "Exception in saving tokens"
        assert isinstance(raised, SDKException)
        for said in (str(reason), str(raised)):
            assert "zoho-orm-store upgrade" in said
            assert token.get_refresh_token() not in said
            assert token.get_access_token() not in said
        errors.clear()

    @on_empty_sqlite
    def test_a_missing_table_is_reported_before_zoho_is_asked(self, zoho, start, empty_database):
        with (
            SQLAlchemyTokenStore(empty_database, create_schema=False) as store,
            pytest.raises(SDKException, match="zoho-orm-store upgrade"),
        ):
            start(by_grant(zoho), store)
        assert zoho.requests == []


class TestTakingOver:
    """What the SDK's own stores have kept goes on here, without one token request."""

    def log_in(self, zoho, start, theirs):
        start(by_grant(zoho), theirs)
        assert whoami() == DEFAULT_USER
        zoho.reset_counts()

    def go_on(self, zoho, start, store):
        Initializer.initializer = None
        (token,) = store.get_tokens()
        start(token, store)
        assert whoami() == DEFAULT_USER
        assert (zoho.counts.exchanges, zoho.counts.refreshes, zoho.counts.refused) == (0, 0, 0)
        assert zoho.counts.api_calls > 0

    def test_from_a_file_of_the_filestore_and_back(self, zoho, start, store, database, tmp_path):
        path = tmp_path / "sdk_tokens.txt"
        self.log_in(zoho, start, FileStore(str(path)))
        assert import_tokens(FileStoreFile(path), database).added == 1
        self.go_on(zoho, start, store)
        assert export_tokens(database, tmp_path / "back.txt") == 1
        (token,) = FileStore(str(tmp_path / "back.txt")).get_tokens()
        assert zoho.is_live(token.get_refresh_token())

    @pytest.mark.parametrize("database", ["mariadb"], indirect=True)
    def test_from_a_table_of_the_dbstore(self, zoho, start, store, database, query):
        ddl = [f"{name} varchar(255)" for name in SDK_COLUMNS[1:]]
        query(f"CREATE TABLE theirs (id varchar(10) PRIMARY KEY, {', '.join(ddl)})")
        theirs = DBStore(
            host=database.host,
            database_name=database.database,
            user_name=database.username,
            password=database.password or "",
            port_number=str(database.port),
            table_name="theirs",
        )
        try:
            self.log_in(zoho, start, theirs)
            assert import_tokens(TokenTable(database, "theirs"), database).added == 1
            self.go_on(zoho, start, store)
        finally:
            query("DROP TABLE theirs")
