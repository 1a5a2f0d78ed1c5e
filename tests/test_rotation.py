"""Changing the key that tokens are encrypted under, while workers go on."""

from __future__ import annotations

import json
import re
import signal
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from conftest import CIPHER, empty, on_sqlite, operations
from databases import SERVERS
from reliability import record
from sdk_processes import PYTHON
from sqlalchemy import create_engine, event, insert, make_url, text
from test_concurrency import WORKER
from test_encryption import RECORD
from typer.testing import CliRunner

from zoho_orm_store import (
    FernetCipher,
    SQLAlchemyTokenStore,
    StoredToken,
    TokenRecord,
    TokenRepository,
    provision,
)
from zoho_orm_store._digests import Digests
from zoho_orm_store._rotation import KeyRotation
from zoho_orm_store._secrets import Secrets
from zoho_orm_store.cli import app
from zoho_orm_store.encryption import generate_key
from zoho_orm_store.records import utc_now
from zoho_orm_store.rotation import RotationSummary, rotate_keys

OLD, NEW = generate_key(), generate_key()
ROTATION_WORKER = str(Path(__file__).parent / "rotation_worker.py")
WORKERS = 8
DOES_NOT_ENCRYPT, HAS_THE_OLD_KEY_FIRST = 6, 7
"""One worker does not encrypt yet, and learns its tokens' users; another has the old key first."""


def fill(url, rows, cipher, user=lambda number: f"user {number}"):
    """Store so many tokens, encrypted under a cipher, faster than one by one."""
    secrets, now = Secrets(cipher), utc_now()
    digests = Digests(keys=secrets.digest_keys)
    engine = create_engine(url)
    values = []
    for number in range(rows):
        record = replace(
            RECORD,
            id=f"{number:032x}",
            user_name=user(number),
            refresh_token=f"1000.r{number}",
            access_token=f"1000.a{number}",
            grant_token=None,
            created_at=now,
            updated_at=now,
        )
        row = {name: getattr(record, name) for name in TokenRecord.__match_args__}
        values.append(row | secrets.encrypted(record) | digests.of(record))
    with engine.begin() as connection:
        connection.execute(insert(StoredToken), values)
    engine.dispose()


def read(url, work):
    engine = create_engine(url)
    with engine.connect() as connection:
        result = work(connection)
    engine.dispose()
    return result


def tokens_of(url, cipher):
    """A repository, each of whose methods works on a connection of its own."""

    class Tokens:
        def __getattr__(self, name):
            return lambda *args: read(
                url,
                lambda connection: getattr(TokenRepository(connection, cipher=cipher), name)(*args),
            )

    return Tokens()


def save_record(store, record):
    with store.transaction() as tokens:
        tokens.save(record)


def start(program, url, *arguments, keys):
    address = url.render_as_string(hide_password=False)
    return PYTHON.start(*program, address, *arguments, ZOHO_ORM_STORE_KEYS=",".join(keys))


def by_key(url):
    return read(url, KeyRotation(operations()).count_by_key)


class TestRotating:
    def test_every_token_comes_under_the_first_key(self, database):
        with SQLAlchemyTokenStore(database) as plain:
            save_record(plain, replace(RECORD, id="plain"))
        fill(database, 250, FernetCipher(OLD))
        before = tokens_of(database, FernetCipher(OLD)).list()
        progress = []
        cipher = FernetCipher([NEW, OLD])
        summary = rotate_keys(
            database,
            cipher,
            encrypt_plain_text=True,
            on_progress=lambda *done: progress.append(done),
        )
        assert summary == (251, 0, (), 0)
        assert progress[-1] == (251, 251)
        assert by_key(database) == {cipher.key_id: 251}
        after = tokens_of(database, FernetCipher(NEW)).list()
        assert after == before, "a token has changed, or the time when it was saved"
        assert rotate_keys(database, cipher) == (0, 0, (), 0)

    @on_sqlite
    def test_back_to_plain_text(self, database):
        fill(database, 150, FernetCipher(OLD))
        summary = rotate_keys(database, FernetCipher(OLD, encrypts=False))
        assert summary == (150, 0, (), 150)
        assert by_key(database) == {None: 150}
        assert tokens_of(database, None).get(f"{7:032x}").refresh_token

    @on_sqlite
    def test_what_no_key_decrypts_is_left_as_it_is_and_named(self, database):
        fill(database, 120, FernetCipher(OLD))
        engine = create_engine(database)
        with engine.begin() as connection:
            connection.execute(
                text("UPDATE oauthtoken SET access_token = '$zos1$x$' WHERE id = :id"),
                {"id": f"{7:032x}"},
            )
        engine.dispose()
        summary = rotate_keys(database, FernetCipher([NEW, OLD]))
        assert (summary.rotated, summary.left) == (119, 1)
        assert [error.id for error in summary.undecryptable] == [f"{7:032x}"]
        assert by_key(database)[FernetCipher(OLD).key_id] == 1

    def test_empty_strings_of_other_tools_do_not_keep_it_from_ending_A1(self, database):
        fill(database, 3, None)
        engine = create_engine(database)
        with engine.begin() as connection:
            connection.execute(text("UPDATE oauthtoken SET grant_token = ''"))
        engine.dispose()
        assert rotate_keys(database, CIPHER, encrypt_plain_text=True) == (3, 0, (), 0)

    @pytest.mark.parametrize("name", SERVERS)  # SQLite has one writer at a time.
    def test_a_token_that_is_saved_after_it_was_read_is_not_overwritten(self, name, provisioned):
        url = provisioned(name)
        empty(url)
        fill(url, 5, FernetCipher(OLD))
        cipher = FernetCipher([NEW, OLD])
        engine = create_engine(url)
        saved = TokenRecord(id=f"{2:032x}", access_token="1000.meanwhile")
        meanwhile = saved_before_the_update(engine, url, FernetCipher(OLD), saved)
        with meanwhile, engine.begin() as connection:
            batch = KeyRotation(operations(cipher)).batch(connection, "", 100, plain_text=False)
            assert batch.rotated == 4
        engine.dispose()
        assert by_key(url) == {cipher.key_id: 4, FernetCipher(OLD).key_id: 1}
        assert rotate_keys(url, cipher) == (1, 0, (), 0)
        found = tokens_of(url, cipher).get(saved.id)
        assert found.access_token == "1000.meanwhile"

    @pytest.mark.parametrize("name", SERVERS)
    @pytest.mark.parametrize(
        ("learned", "other"),
        [
            ({"user_name": "ada"}, None),
            ({"client_id": "1000.D"}, FernetCipher(OLD, encrypts=False)),
            ({"access_token": "1000.a0 "}, None),
        ],
        ids=["user", "client", "trailing blank"],
    )
    def test_what_a_worker_learns_that_keeps_plain_text(self, name, learned, other, provisioned):
        url = provisioned(name)
        empty(url)
        plain = replace(RECORD, user_name=None, client_id=None, access_token="1000.a0")
        with SQLAlchemyTokenStore(url) as store:
            save_record(store, plain)
        engine = create_engine(url)
        cipher = FernetCipher(OLD)
        meanwhile = saved_before_the_update(engine, url, other, TokenRecord(id="1", **learned))
        with meanwhile, engine.begin() as connection:
            KeyRotation(operations(cipher)).batch(connection, "", 100, plain_text=True)
        engine.dispose()
        assert by_key(url) == {None: 1}
        assert rotate_keys(url, cipher, encrypt_plain_text=True) == (1, 0, (), 0)
        found = tokens_of(url, cipher).get("1")
        assert found.refresh_token == RECORD.refresh_token
        assert {name: getattr(found, name) for name in learned} == learned


@pytest.mark.parametrize("journal", ["DELETE", "WAL"])
def test_no_plain_text_stays_in_a_sqlite_file(tmp_path, journal):
    path = tmp_path / "tokens.db"
    url = make_url(f"sqlite:///{path}")
    provision.upgrade(url)
    fill(url, 500, None)
    engine = create_engine(url)

    @event.listens_for(engine, "connect")
    def set_up(connection, record):
        connection.execute(f"PRAGMA journal_mode = {journal}")
        connection.execute("PRAGMA secure_delete = OFF")

    def files():
        return b"".join(file.read_bytes() for file in tmp_path.iterdir())

    with engine.connect() as other:
        assert other.exec_driver_sql("PRAGMA secure_delete").scalar() == 0
        other.rollback()
        assert b"1000.r499" in files()
        rotate_keys(engine, CIPHER, encrypt_plain_text=True)
        assert b"1000." not in files().replace(RECORD.client_id.encode(), b"")
        assert RECORD.client_secret.encode() not in files()
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA secure_delete").scalar() == 0
    engine.dispose()


def test_a_reader_that_stays_does_not_keep_a_rotation_from_ending(tmp_path):
    url = make_url(f"sqlite:///{tmp_path / 'tokens.db'}?timeout=0.1")
    provision.upgrade(url)
    fill(url, 3, None)
    engine = create_engine(url)
    with engine.connect() as reader:
        reader.exec_driver_sql("PRAGMA journal_mode = WAL")
        reader.exec_driver_sql("BEGIN")
        reader.exec_driver_sql("SELECT * FROM oauthtoken").all()
        assert rotate_keys(url, CIPHER, encrypt_plain_text=True) == (3, 0, (), 0)
    engine.dispose()


@contextmanager
def saved_before_the_update(engine, url, cipher, record):
    """Save a token when another one's batch has read it, and not yet written it."""
    due = [record]

    def save_meanwhile(connection, cursor, statement, *_):
        if statement.startswith("UPDATE") and due:
            with SQLAlchemyTokenStore(url, cipher=cipher) as store:
                save_record(store, due.pop())

    event.listen(engine, "before_cursor_execute", save_meanwhile)
    yield
    assert due == []


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("rows", "workers", "rotations", "saves"),
    [
        pytest.param(400, (DOES_NOT_ENCRYPT, HAS_THE_OLD_KEY_FIRST), 1, 0, id="400 rows"),
        pytest.param(20_000, range(WORKERS), 3, 50, id="20000 rows", marks=pytest.mark.soak),
    ],
)
def test_a_killed_rotation_is_gone_on_with_beside_workers(
    database, rows, workers, rotations, saves
):
    def user(number):
        return None if number % WORKERS == DOES_NOT_ENCRYPT else f"user {number}"

    fill(database, rows, FernetCipher(OLD), user)
    keys = (NEW, OLD)
    running = [
        start(
            (WORKER, "save_and_find"),
            database,
            str(number),
            str(rows),
            "plain" if number == DOES_NOT_ENCRYPT else "encrypted",
            keys=keys[::-1] if number == HAS_THE_OLD_KEY_FIRST else keys,
        )
        for number in workers
    ]
    assert [worker.stdout.readline() for worker in running] == ["READY\n"] * len(running)

    killed = start([ROTATION_WORKER], database, str(rows // 4), keys=keys)
    killed.communicate(timeout=100)
    assert killed.returncode == -signal.SIGKILL
    count = partial(KeyRotation(operations(FernetCipher(keys))).count_left, plain_text=True)
    left = read(database, count)
    assert 0 < left < rows, "it was to be killed in the middle"

    for number in range(rotations):  # to the new key, and back, and so on
        cipher = FernetCipher(keys[::-1] if number % 2 else keys)
        summary = rotate_keys(database, cipher, encrypt_plain_text=True)
        assert summary.undecryptable == ()  # What two workers have saved behind it may be left.
    ended = [worker.communicate("") for worker in running]
    assert [error for _, error in ended if error] == []
    saved = [line for lines, _ in ended for line in lines.splitlines()]
    assert [line for line in saved if not line.startswith("SAVED ")] == []
    assert all(int(line.split()[1]) > saves for line in saved), saved
    summary = rotate_keys(database, FernetCipher(keys), encrypt_plain_text=True)
    assert (summary.left, summary.undecryptable) == (0, ())
    assert by_key(database) == {FernetCipher(NEW).key_id: rows}
    assert tokens_of(database, FernetCipher(NEW)).count() == rows
    record("a rotation of keys is killed beside workers that save", database, rows, "0 tokens lost")


class TestCommands:
    @pytest.fixture
    def run(self, database, monkeypatch):
        monkeypatch.setenv("ZOHO_ORM_STORE_URL", database.render_as_string(hide_password=False))
        monkeypatch.delenv("ZOHO_ORM_STORE_KEYS", raising=False)

        def run(*arguments, keys=()):
            environment = {"ZOHO_ORM_STORE_KEYS": ",".join(keys)}
            return CliRunner().invoke(app, arguments, env=environment)

        return run

    @on_sqlite
    def test_a_key_is_generated(self, run):
        key = run("keys", "generate").stdout.strip()
        assert FernetCipher(key).key_id != FernetCipher(run("keys", "generate").stdout).key_id

    def test_from_plain_text_to_a_key_to_another_and_back(self, run, database):
        fill(database, 3, None)
        assert run("keys", "status").stdout.split() == ["plain", "text", "3"]
        assert run("keys", "rotate", keys=[OLD]).stdout == (
            "Tokens changed: 0.\nLeft in plain text: 3. Encrypt them with: zoho-orm-store encrypt\n"
        )
        assert run("encrypt", "--yes", keys=[OLD]).stdout == "Tokens changed: 3.\n"
        assert f"key {FernetCipher(OLD).key_id}" in run("keys", "status").stdout
        assert "not in ZOHO_ORM_STORE_KEYS" in run("keys", "status", keys=[NEW]).stdout
        assert run("keys", "rotate", keys=[NEW, OLD]).exit_code == 0
        lines = run("keys", "status", keys=[NEW, OLD]).stdout.splitlines()
        assert [line.split()[2] for line in lines] == ["3", "0", "0"]
        assert "1000.r1" in run("show", f"{1:032x}", "--reveal", keys=[NEW]).stdout
        assert run("decrypt", "--yes", keys=[NEW]).stdout == "Tokens changed: 3.\n"
        assert run("keys", "status").stdout.split() == ["plain", "text", "3"]

    @on_sqlite
    def test_the_progress_of_a_number_that_is_not_round(self, run, database):
        fill(database, 2_050, FernetCipher(OLD))
        engine = create_engine(database)
        with engine.begin() as connection:
            spoil = "UPDATE oauthtoken SET access_token = '$zos1$x$' WHERE id = :id"
            connection.execute(text(spoil), {"id": f"{7:032x}"})
        engine.dispose()
        told = run("keys", "rotate", keys=[NEW, OLD]).stderr
        assert re.findall(r"(\d+) of 2050 tokens", told) == ["1099", "2049"]

    @on_sqlite
    def test_what_names_no_key_is_counted_as_garbled(self, run, database):
        fill(database, 3, FernetCipher(OLD))
        engine = create_engine(database)
        with engine.begin() as connection:
            spoil = text("UPDATE oauthtoken SET grant_token = :value WHERE id = :id")
            for number, value in enumerate(("$zos1$\x1b[2J$x", f"$zos1${'k' * 65}$", "$zos1$k")):
                connection.execute(spoil, {"id": f"{number:032x}", "value": value})
        engine.dispose()
        lines = run("keys", "status", keys=[OLD]).stdout.splitlines()
        assert lines[-1].split() == ["garbled", "3", "changed", "by", "other", "means"]
        assert len(lines) == 3

    @on_sqlite
    def test_what_is_left_by_workers_that_go_on_encrypting(self, run, monkeypatch):
        left = RotationSummary(0, 3, (), 0)
        monkeypatch.setattr("zoho_orm_store.rotation.rotate_keys", lambda *_, **__: left)
        told = run("decrypt", "--yes", keys=[OLD]).stderr
        assert told == (
            "3 tokens were saved meanwhile by workers that still encrypt. "
            "Restart those with encrypts=False, and run this again.\n"
        )
        assert "with the new keys" in run("keys", "rotate", keys=[OLD]).stderr

    @on_sqlite
    def test_a_wrong_key(self, run, database):
        fill(database, 30, FernetCipher(OLD))
        result = run("keys", "rotate", keys=[NEW])
        assert result.exit_code == 1
        assert "Tokens changed: 0." in result.stdout
        assert result.stderr.count("which is not among those given") == 10
        assert "20 more" in result.stderr
        assert by_key(database) == {FernetCipher(OLD).key_id: 30}

    @pytest.mark.parametrize("command", [("keys", "rotate"), ("decrypt", "--yes")])
    @on_sqlite
    def test_without_keys(self, run, command):
        result = run(*command)
        assert (result.exit_code, result.stderr) == (
            1,
            "Error: Set ZOHO_ORM_STORE_KEYS to the keys, separated by commas.\n",
        )

    @on_sqlite
    def test_decrypt_asks(self, run, database):
        fill(database, 1, FernetCipher(OLD))
        assert run("decrypt", keys=[OLD]).exit_code == 1
        assert by_key(database) == {FernetCipher(OLD).key_id: 1}

    @on_sqlite
    def test_a_malformed_key(self, run):
        result = run("list", keys=["nonsense"])
        assert result.exit_code == 1
        assert result.stderr.startswith("Error: The key is not a Fernet key")
        assert "nonsense" not in result.stderr

    @on_sqlite
    def test_list_and_show_and_delete_and_doctor_without_the_key(self, run, database):
        with SQLAlchemyTokenStore(database) as plain:
            save_record(plain, replace(RECORD, id="plain"))
        fill(database, 2, FernetCipher(OLD))
        listed = run("list")
        assert [line.split()[0] for line in listed.stdout.splitlines()[1:]] == [
            f"{0:032x}",
            f"{1:032x}",
            "plain",
        ]
        assert "2 of them cannot be decrypted" in listed.stderr
        assert listed.exit_code == 1
        as_json = run("list", "--json")
        assert as_json.exit_code == 1
        lines = [json.loads(line) for line in as_json.stdout.splitlines()]
        assert [line.get("undecryptable") for line in lines] == [True, True, None]
        assert run("list", "--json", keys=[OLD]).exit_code == 0
        shown = run("show", f"{1:032x}")
        assert shown.exit_code == 1
        assert RECORD.client_id in shown.stdout
        assert "is encrypted under the key" in shown.stderr
        examined = run("doctor")
        assert examined.exit_code == 1
        assert "WRONG  2 of 3 tokens cannot be decrypted." in examined.stdout
        healthy = run("doctor", keys=[OLD])
        assert healthy.exit_code == 0
        key_id = FernetCipher(OLD).key_id
        assert f"can be read: 2 under the key {key_id}, 1 in plain text" in healthy.stdout
        assert run("delete", f"{1:032x}", "--yes").exit_code == 0
        assert by_key(database) == {key_id: 1, None: 1}

    @on_sqlite
    def test_import_and_export_with_keys(self, run, database, tmp_path):
        path = tmp_path / "tokens.txt"
        fill(database, 3, FernetCipher(OLD))
        refused = run("export", str(path))
        assert (refused.exit_code, path.exists()) == (1, False)
        assert run("export", str(path), keys=[OLD]).exit_code == 0
        assert "1000.r2" in path.read_text()
        run("clear", "--yes")
        imported = run("import", str(path), keys=[NEW])
        assert "Added: 3" in imported.stdout
        assert by_key(database) == {FernetCipher(NEW).key_id: 3}

    @on_sqlite
    def test_import_from_an_encrypted_table(self, run, database, tmp_path):
        source = f"sqlite:///{tmp_path / 'other.db'}"
        provision.upgrade(source)
        fill(source, 3, FernetCipher(OLD))
        refused = run("import", source)
        assert "Added: 0" in refused.stdout
        assert refused.stderr.count("is encrypted under the key") == 3
        assert "Added: 3" in run("import", source, keys=[NEW, OLD]).stdout
        assert by_key(database) == {FernetCipher(NEW).key_id: 3}


def test_a_downgrade_gives_plain_text_back_that_looks_encrypted_A2(database):
    looks_encrypted = {"access_token": "$zos1$abc", "refresh_token": "$zos1$$", "grant_token": "$"}
    with SQLAlchemyTokenStore(database) as store:
        save_record(store, replace(RECORD, **looks_encrypted))
    provision.downgrade(database)
    engine = create_engine(database)
    with engine.connect() as connection:
        [row] = connection.execute(text("SELECT * FROM oauthtoken")).mappings()
        assert {name: row[name] for name in looks_encrypted} == looks_encrypted
        connection.rollback()
        with engine.begin() as other:
            other.execute(text("DELETE FROM oauthtoken"))
    engine.dispose()
    provision.upgrade(database)


@pytest.mark.parametrize("cipher", [None, FernetCipher(OLD)], ids=["plain", "encrypted"])
def test_a_table_that_was_restored_without_its_version_is_taken_as_it_is(database, cipher):
    fill(database, 3, cipher)
    before = tokens_of(database, cipher).list()
    engine = create_engine(database)
    with engine.begin() as connection:
        for table in ("zoho_orm_store_version", "oauthtoken_refresh_lease"):
            connection.execute(text(f"DROP TABLE {table}"))
    engine.dispose()
    provision.upgrade(database)
    provision.check(database)
    assert tokens_of(database, cipher).list() == before


def test_a_downgrade_refuses_encrypted_tokens_and_loses_none(database):
    fill(database, 3, FernetCipher(OLD))
    with pytest.raises(provision.SchemaError, match="3 tokens in the table oauthtoken are encr"):
        provision.downgrade(database)
    assert provision.current(database) == "zoho_orm_store_0003"
    assert by_key(database) == {FernetCipher(OLD).key_id: 3}
    rotate_keys(database, FernetCipher(OLD, encrypts=False))
    provision.downgrade(database)
    provision.upgrade(database)
    assert by_key(database) == {None: 3}
