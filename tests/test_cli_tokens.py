"""The commands that look at tokens, and take them in and out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from datetime import timedelta

import pytest
from conftest import on_sqlite
from rich.cells import cell_len
from sdk_process import whoami
from sdk_tokens import FULL, make_token
from sqlalchemy import create_engine, insert, text
from typer.testing import CliRunner
from zohocrmsdk.src.com.zoho.api.authenticator.store import FileStore
from zohocrmsdk.src.com.zoho.api.logger import Logger
from zohocrmsdk.src.com.zoho.crm.api.exception import SDKException
from zohocrmsdk.src.com.zoho.crm.api.initializer import Initializer

from zoho_orm_store import SQLAlchemyTokenStore, StoredToken, TokenRecord, TokenRepository
from zoho_orm_store._database.database import open_database
from zoho_orm_store._digests import digests_of
from zoho_orm_store.cli import app
from zoho_orm_store.encryption import generate_key
from zoho_orm_store.records import utc_now
from zoho_orm_store.testing import ACCESS_DENIED, LoopbackZoho

SECRET = "1000.0123456789abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def run(database, monkeypatch):
    monkeypatch.setenv("ZOHO_ORM_STORE_URL", database.render_as_string(hide_password=False))
    monkeypatch.setenv("COLUMNS", "140")
    return lambda *args, **options: CliRunner().invoke(app, args, **options)


@pytest.fixture
def stored(database):
    """Ids, users and ages of tokens, in the database."""
    engine = create_engine(database)
    now = int(time.time() * 1000)
    with engine.begin() as connection:
        repository = TokenRepository(connection)
        for id_, user, expiry, refresh_token in (
            ("1", "ada@example.com:1", now + 3_000_000, SECRET),
            ("2", "evil\x1b[31m", now - 1, None),
            ("x' or '1'='1", "o'brien", None, "r"),
        ):
            repository.save(
                TokenRecord(
                    id=id_,
                    user_name=user,
                    client_id="1000.C",
                    client_secret=SECRET,
                    refresh_token=refresh_token,
                    access_token=f"{SECRET}{id_}",
                    expiry_time=expiry,
                    api_domain="https://www.zohoapis.eu",
                )
            )
        connection.execute(
            text("UPDATE oauthtoken SET updated_at = '2026-01-01 00:00:00' WHERE id = '1'")
        )
    yield lambda: ids(engine)
    engine.dispose()


def ids(engine):
    with engine.connect() as connection:
        return sorted(connection.scalars(text("SELECT id FROM oauthtoken")))


class TestListing:
    def test_a_line_per_token_without_secrets_or_control_characters_G3(self, run, stored):
        result = run("list")
        assert result.exit_code == 0
        heading, *lines = result.stdout.splitlines()
        assert heading.split() == ["ID", "USER", "CLIENT", "DC", "LIVES", "SAVED"]
        assert len(lines) == 3
        assert lines[0].split()[:6] == ["1", "ada@example.com:1", "1000.C", "eu", "49", "min"]
        assert "new login" in lines[1]
        assert "unknown" in lines[2]
        assert lines[2].endswith(" s ago")
        assert result.stderr == "3 tokens\n1 of them needs a new login\n"
        assert "\x1b" not in result.stdout
        assert SECRET[:20] not in result.stdout

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (["--user", "o'brien"], ["x' or '1'='1"]),
            (["--client", "1000.c"], []),
            (["--expired"], ["2"]),
            (["--live"], ["1", "x' or '1'='1"]),
        ],
    )
    @on_sqlite
    def test_filters(self, run, stored, options, expected):
        lines = run("list", "--json", *options).stdout.splitlines()
        assert [json.loads(line)["id"] for line in lines] == expected

    @pytest.mark.parametrize("columns", [80, 200])
    @on_sqlite
    def test_it_fits_the_terminal(self, run, stored, query, columns):
        query("UPDATE oauthtoken SET user_name = :wide WHERE id = '2'", wide="東京" * 100)
        lines = run("list", env={"COLUMNS": str(columns)}).stdout.splitlines()
        assert max(map(cell_len, lines)) <= columns
        assert ("CLIENT" in lines[0]) == (columns == 200)
        assert lines[0].index("SAVED") == columns - 11

    @pytest.mark.parametrize(
        ("options", "expected", "total"),
        [
            (["--sort", "user"], ["1", "2", "x' or '1'='1"], "3 tokens"),
            (["--sort", "expiry"], ["2", "1", "x' or '1'='1"], "3 tokens"),
            (["--sort", "saved"], ["x' or '1'='1", "2", "1"], "3 tokens"),
            (["--limit", "2"], ["1", "2"], "2 of 3 tokens"),
            (["--limit", "3"], ["1", "2", "x' or '1'='1"], "3 tokens"),
            (["--sort", "expiry", "--limit", "1"], ["2"], "1 of 3 tokens"),
            (["--expired", "--limit", "1"], ["2"], "1 token"),
        ],
    )
    @on_sqlite
    def test_order_limit_and_total(self, run, stored, options, expected, total):
        result = run("list", *options)
        lines = result.stdout.splitlines()[1:]
        assert [line[:12].rstrip() for line in lines] == expected
        to_log_in = "1 of them needs a new login\n" if "2" in expected else ""
        assert result.stderr == f"{total}\n{to_log_in}"

    @on_sqlite
    def test_secrets_are_shown_only_when_asked_for(self, run, stored):
        for command in (["list", "--json"], ["show", "1"], ["show", "1", "--json"]):
            assert SECRET not in run(*command).stdout
            assert SECRET in run(*command, "--reveal").stdout

    @on_sqlite
    def test_one_token(self, run, stored):
        result = run("show", "x' or '1'='1")
        assert "user_name      o'brien" in result.stdout
        in_json = json.loads(run("show", "x' or '1'='1", "--json").stdout)
        assert in_json["user_name"] == "o'brien"
        missing = run("show", "nonesuch")
        assert (missing.exit_code, missing.stdout) == (1, "")
        assert "no token with the id 'nonesuch'" in missing.stderr

    @on_sqlite
    def test_times_are_for_people(self, run, stored, query, monkeypatch):
        monkeypatch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        query("UPDATE oauthtoken SET updated_at = :at", at=utc_now() - timedelta(hours=3))
        shown = run("show", "1").stdout
        monkeypatch.undo()
        time.tzset()
        assert re.search(r"^expiry_time    20[\d-]+ [\d:]+ JST \(in 49 minutes\)$", shown, re.M)
        assert re.search(r"^updated_at     20[\d-]+ [\d:]+ JST \(3 hours ago\)$", shown, re.M)

    @on_sqlite
    def test_a_time_that_is_none(self, run, stored, query):
        query("UPDATE oauthtoken SET expiry_time = :at", at=2**63 - 1)
        assert f"expiry_time    {float(2**63):.0f}"[:20] in run("show", "1").stdout
        assert run("list").exit_code == 0


class TestNewLogins:
    """With the real SDK, to which Zoho refuses a refresh."""

    @pytest.fixture
    def zoho(self, monkeypatch):
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(Initializer, "initializer", None)
        Initializer.LOCAL.init = None
        with LoopbackZoho(max_refreshes=1) as zoho:
            yield zoho
        Initializer.LOCAL.init = None

    @pytest.fixture
    def refused(self, zoho, database, tmp_path):
        """A store in which Zoho refuses to refresh one user's token for good, one's just now."""
        with SQLAlchemyTokenStore(database) as store:
            logger = Logger.get_instance(Logger.Levels.NOTSET)
            store.initialize_sdk(zoho.environment(), resource_path=str(tmp_path), logger=logger)
            for user in ("ada", "bob", "cyd"):
                refresh_token = zoho.issue_refresh_token(f"{user}@example.com")
                fields = {"user": zoho.user_name(f"{user}@example.com"), "expires_in": "1"}
                fields |= {"client_id": zoho.client_id, "client_secret": zoho.client_secret}
                token = make_token(id=user, refresh_token=refresh_token, access_token="a", **fields)
                store.save_token(token)
                if user == "ada":
                    zoho.revoke(refresh_token)
                if user == "bob":
                    zoho.fail(ACCESS_DENIED)
                if user != "cyd":
                    with pytest.raises(SDKException), store.acting_as(user):
                        whoami()
            yield store

    def test_a_token_that_zoho_has_revoked_and_none_that_may_be_refreshed(self, run, refused):
        result = run("list")
        assert "new login" in result.stdout.splitlines()[1]
        assert result.stdout.count("new login") == 1
        assert result.stderr == "3 tokens\n1 of them needs a new login\n"
        marked = [json.loads(line) for line in run("list", "--json").stdout.splitlines()]
        assert [token.get("needs_new_login") for token in marked] == [True, None, None]
        shown = run("show", "ada").stdout
        assert "new login      needed: Zoho has refused to refresh the token" in shown
        assert json.loads(run("show", "ada", "--json").stdout)["needs_new_login"] is True
        assert "new login" not in run("show", "bob").stdout
        doctor = run("doctor").stdout
        assert "3 tokens, of which 2 will be refreshed" in doctor
        assert "hint   Zoho has refused to refresh 1 token, whose users have to log in" in doctor

    @on_sqlite
    def test_it_is_known_for_longer_than_a_failure(self, run, refused, database, query):
        query("UPDATE oauthtoken_refresh_lease SET expires_at = expires_at - 3600000")
        with SQLAlchemyTokenStore(database) as another:
            another.find_token_by_id("cyd")  # Whoever takes a lease sweeps the old ones.
        failed = query("SELECT owner FROM oauthtoken_refresh_lease WHERE failures > 0")
        assert failed == [("refused",)]
        assert run("list").stdout.count("new login") == 1

    @on_sqlite
    def test_the_new_login_ends_it(self, run, refused, zoho):
        again = make_token(
            client_id=zoho.client_id,
            client_secret=zoho.client_secret,
            grant_token=zoho.issue_grant_token("ada@example.com"),
            redirect_url=zoho.redirect_url,
        )
        with refused.acting_as(again):
            assert whoami() == "ada@example.com"
        assert "new login" not in run("list").stdout
        assert run("list").stderr == "3 tokens\n"


class TestExpiring:
    def test_the_next_user_refreshes_it(self, run, stored):
        result = run("expire", "1")
        assert (result.exit_code, result.stderr) == (0, "")
        expired = run("list", "--json", "--expired").stdout.splitlines()
        assert [json.loads(line)["id"] for line in expired] == ["1", "2"]

    @on_sqlite
    def test_no_such_token(self, run, stored):
        result = run("expire", "nonesuch")
        assert result.exit_code == 1
        assert result.stderr == "Error: There is no token with the id 'nonesuch'.\n"


class TestDeleting:
    @on_sqlite
    def test_one_token_after_a_question(self, run, stored):
        assert run("delete", "1", input="n\n").exit_code == 1
        assert len(stored()) == 3
        assert run("delete", "1", input="y\n").exit_code == 0
        assert stored() == ["2", "x' or '1'='1"]
        assert run("delete", "1", "--yes").exit_code == 1

    def test_every_token_after_a_question(self, run, stored):
        assert "all 3 tokens" in run("clear", input="n\n").stderr
        assert len(stored()) == 3
        assert "Deleted 3 tokens" in run("clear", "--yes").stdout
        assert stored() == []

    def test_what_is_of_no_more_use(self, run, stored):
        assert run("purge", "--stranded", "--dry-run").stdout == "Would delete 1 token.\n"
        refused = run("purge", "--stranded", "--idle", "90d", input="n\n")
        assert "Delete 2 tokens?" in refused.stderr
        assert len(stored()) == 3
        assert "Deleted 1 token." in run("purge", "--stranded", "--yes").stdout
        assert stored() == ["1", "x' or '1'='1"]
        assert "Deleted 1 token." in run("purge", "--idle", "90d", input="y\n").stdout
        assert stored() == ["x' or '1'='1"]
        assert run("purge", "--idle", "90d").stdout == "Nothing to delete.\n"

    @pytest.mark.parametrize("options", [[], ["--idle", "soon"], ["--idle", "90"]])
    @on_sqlite
    def test_a_purge_that_says_too_little(self, run, stored, options):
        result = run("purge", "--yes", *options)
        assert result.exit_code == 2
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1
        assert len(stored()) == 3

    @on_sqlite
    def test_the_repository_refuses_it_as_well(self, database):
        engine = create_engine(database)
        with engine.connect() as connection:
            repository = TokenRepository(connection)
            with pytest.raises(Exception, match="what to purge"):
                repository.purge()
            with pytest.raises(Exception, match="negative"):
                repository.purge(idle=timedelta(-1))
        engine.dispose()


class TestImportAndExport:
    @pytest.fixture
    def file(self, tmp_path):
        store = FileStore(str(tmp_path / "sdk_tokens.txt"))
        store.save_token(make_token(**FULL | {"id": "1"}))
        return tmp_path / "sdk_tokens.txt"

    def test_there_and_back(self, run, file, database, tmp_path):
        assert "Would be added: 1" in run("import", str(file), "--dry-run").stdout
        assert "Added: 1" in run("import", str(file)).stdout
        again = json.loads(run("import", str(file), "--json").stdout)
        assert (again["added"], again["unchanged"]) == (0, 1)
        assert "Wrote 1 token," in run("export", str(tmp_path / "out.txt")).stdout
        (token,) = FileStore(str(tmp_path / "out.txt")).get_tokens()
        assert token.get_refresh_token() == FULL["refresh_token"]
        assert run("export", str(tmp_path / "out.txt")).exit_code == 1

    @on_sqlite
    def test_an_id_that_had_to_change(self, run, file, database, stored):
        would = run("import", str(file), "--dry-run")
        assert re.search(r"^The id '1' would become '\w{32}'\.$", would.stderr, re.M)
        done = run("import", str(file))
        assert re.search(r"^The id '1' is now '\w{32}'\.$", done.stderr, re.M)
        assert json.loads(run("import", str(file), "--json").stdout)["renumbered"] != []

    @on_sqlite
    def test_a_broken_line(self, run, file, database):
        with file.open("a") as opened:
            opened.write("2,u\n")
        strict = run("import", str(file), "--strict")
        assert (strict.exit_code, strict.stdout) == (1, "")
        assert "Nothing was imported, because of line 3" in strict.stderr
        result = run("import", str(file))
        assert result.exit_code == 1
        assert "Refused: line 3: It has 2 columns" in result.stderr
        assert "Added: 1" in result.stdout

    @on_sqlite
    def test_from_a_sqlite_file_and_from_a_url(self, run, file, database, tmp_path):
        path = tmp_path / "zohooauth.db"
        with SQLAlchemyTokenStore(f"sqlite:///{path}") as store:
            store.save_token(make_token(**FULL))
        assert "Added: 1" in run("import", str(path)).stdout
        assert "unchanged: 1" in run("import", f"sqlite:///{path}").stdout


class TestDoctor:
    def test_all_is_well(self, run, stored, database):
        result = run("doctor")
        assert result.exit_code == 0, result.stdout
        lines = result.stdout.splitlines()
        assert all(line.startswith(("ok ", "hint ")) for line in lines)
        name = {"sqlite": "SQLite", "postgresql": "PostgreSQL", "mysql": "(MariaDB|MySQL)"}
        assert re.search(f": {name[database.get_backend_name()]} ", lines[1])
        assert "may SELECT, INSERT, UPDATE and DELETE in oauthtoken and" in result.stdout
        assert "3 tokens, of which 0 will be refreshed" in result.stdout
        assert "hint   1 token expired and cannot be refreshed" in result.stdout
        assert "hint   secrets are stored as plain text" in result.stdout

    @on_sqlite
    def test_as_json(self, run, stored, query):
        query("UPDATE oauthtoken SET expiry_time = 1")
        found = [json.loads(line) for line in run("doctor", "--json").stdout.splitlines()]
        assert {each["level"] for each in found} == {"ok", "hint"}
        assert "3 tokens, of which 2 will be refreshed" in found[-4]["text"]

    @on_sqlite
    def test_a_cipher_and_plain_text(self, run, stored):
        result = run("doctor", env={"ZOHO_ORM_STORE_KEYS": generate_key()})
        assert "zoho-orm-store encrypt" in result.stdout.splitlines()[-1]
        assert "stored as plain text" not in result.stdout

    def test_what_is_wrong_and_what_to_do(self, tmp_path, monkeypatch):
        url = f"sqlite:///{tmp_path / 'empty.db'}"
        (tmp_path / "empty.db").touch()
        monkeypatch.setenv("ZOHO_ORM_STORE_URL", url)
        result = CliRunner().invoke(app, ["doctor"])
        assert result.exit_code == 1
        assert f"WRONG  {url} has no tables of this package, or" in result.stdout
        assert "zoho-orm-store upgrade" in result.stdout

    @on_sqlite
    def test_a_large_table_may_take_its_time(self, run, stored, monkeypatch):
        limits = []

        def bind(url, *, timeout, **options):
            limits.append(timeout)
            return open_database(url, timeout=timeout, **options)

        def stream(self, **filters):
            limits.append("stream")
            return iter(())

        monkeypatch.setattr("zoho_orm_store._database.database.open_database", bind)
        monkeypatch.setattr(TokenRepository, "stream", stream)
        assert run("doctor").exit_code == 0
        assert limits == [15.0, None, "stream"]

    @pytest.mark.parametrize(
        ("table", "right"),
        [
            ("oauthtoken", "SELECT"),
            ("oauthtoken", "DELETE"),
            ("oauthtoken_refresh_lease", "INSERT"),
            ("oauthtoken_refresh_lease", "UPDATE"),
            ("zoho_orm_store_version", "SELECT"),
        ],
    )
    @pytest.mark.parametrize("database", ["postgresql", "mariadb"], indirect=True)
    def test_a_right_that_is_missing(self, run, database, query, table, right):
        user = f"zos_doctor_{os.getpid()}"  # roles are shared by all databases of a server
        is_postgresql = database.get_backend_name() == "postgresql"
        grantee = user if is_postgresql else f"'{user}'@'%'"
        rights = {
            "oauthtoken": {"SELECT", "INSERT", "UPDATE", "DELETE"},
            "oauthtoken_refresh_lease": {"SELECT", "INSERT", "UPDATE", "DELETE"},
            "zoho_orm_store_version": {"SELECT"},
        }
        rights[table] -= {right}
        query(f"CREATE USER {grantee} {'PASSWORD' if is_postgresql else 'IDENTIFIED BY'} 'p'")
        try:
            for name, given in rights.items():
                if given:
                    query(f"GRANT {', '.join(sorted(given))} ON {name} TO {grantee}")
            url = database.set(username=user, password="p")
            result = run("doctor", "--url", url.render_as_string(hide_password=False))
        finally:
            query(f"DROP OWNED BY {user}" if is_postgresql else "SELECT 1")
            query(f"DROP USER {grantee}")
        assert result.exit_code == 1
        wrong = result.stdout.splitlines()[-1]
        assert wrong.startswith("WRONG  ")
        assert "GRANT " in wrong
        assert f"ON {table} TO" in wrong

    @on_sqlite
    def test_nothing_is_changed(self, run, stored, query):
        before = query("SELECT * FROM oauthtoken")
        assert run("doctor").exit_code == 0
        assert query("SELECT * FROM oauthtoken") == before

    def test_no_server(self, monkeypatch):
        monkeypatch.setenv("ZOHO_ORM_STORE_URL", "postgresql+psycopg://u:s3cret@127.0.0.1:1/d")
        result = CliRunner().invoke(app, ["doctor"])
        assert result.exit_code == 1
        assert "WRONG  Cannot connect to postgresql+psycopg://u:***@127.0.0.1:1/d" in result.stdout
        assert "s3cret" not in result.output


def test_the_commands_that_need_tables_say_so(monkeypatch, tmp_path):
    (tmp_path / "empty.db").touch()
    monkeypatch.setenv("ZOHO_ORM_STORE_URL", f"sqlite:///{tmp_path / 'empty.db'}")
    for command in (["list"], ["show", "1"], ["clear", "-y"], ["import"], ["export", "x"]):
        result = CliRunner().invoke(app, command)
        assert (result.exit_code, result.stdout) == (1, "")
        assert "zoho-orm-store upgrade --url" in result.stderr


@pytest.mark.parametrize(
    ("number", "megabytes"),
    [(20_000, 6), pytest.param(100_000, 6, marks=pytest.mark.soak)],
)
def test_a_long_list_starts_at_once_and_is_not_held_in_memory(tmp_path, number, megabytes):
    """The first line comes soon after the start, and the rest takes little more memory."""
    url = f"sqlite:///{tmp_path / 'many.db'}"
    with SQLAlchemyTokenStore(url) as store:
        store.get_tokens()
    engine, now = create_engine(url), utc_now()
    with engine.begin() as connection:
        for start in range(0, number, 10_000):
            rows = []
            for n in range(start, start + 10_000):
                record = TokenRecord(id=f"{n}", user_name=f"u{n}", access_token=SECRET)
                values = {"id": record.id, "user_name": record.user_name, "access_token": SECRET}
                rows.append(values | digests_of(record) | {"created_at": now, "updated_at": now})
            connection.execute(insert(StoredToken), rows)
    engine.dispose()

    def peak_of(*command):
        code = (
            "import re, sys\n"
            "from zoho_orm_store.cli import app\n"
            "try: app()\n"
            "except SystemExit: pass\n"
            # getrusage would count what the process that started this one has used.
            "status = open('/proc/self/status').read()\n"
            "print(re.search(r'VmHWM:\\s+(\\d+)', status)[1], file=sys.stderr)"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started = time.monotonic()
        process.stdout.readline()
        process.stdout.readline()
        first = time.monotonic() - started
        rest = sum(1 for _ in process.stdout)
        peak = process.stderr.read().split()[-1]
        process.communicate()
        return first, rest, int(peak)

    command = [sys.executable, "-m", "zoho_orm_store", "list", "--url", url]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()  # as "| head -1" does
    assert (process.stderr.read(), process.wait()) == ("", 0)
    process.stderr.close()

    first, lines, peak = peak_of("list", "--url", url)
    soon, _, little = peak_of("list", "--url", url, "--user", "u1")
    assert lines == number - 1
    assert peak - little < megabytes * 1000
    assert first < 2 * soon + 1, f"the first line came after {first:.1f} s"
