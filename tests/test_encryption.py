"""Encryption at rest: what is stored, what decrypts it, and what is said if nothing does."""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from copy import copy, deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from shutil import which
from threading import Event

import pytest
from conftest import CIPHER, empty, on_sqlite, operations
from cryptography.fernet import Fernet
from databases import DATABASES
from sdk_tokens import FULL, known, make_token
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine
from typer.testing import CliRunner

from zoho_orm_store import (
    AsyncTokenRepository,
    CipherError,
    ConfigurationError,
    DatabaseError,
    FernetCipher,
    MemoryTokenStore,
    SQLAlchemyTokenStore,
    TokenRecord,
    TokenRepository,
    UndecryptableTokenError,
    metadata,
    provision,
)
from zoho_orm_store._digests import Digests, Scope, digests_of
from zoho_orm_store._rotation import KeyRotation
from zoho_orm_store._sdk.conversion import SDKException
from zoho_orm_store._secrets import MARK, Secrets, key_id_of
from zoho_orm_store.cli import app
from zoho_orm_store.encryption import generate_key
from zoho_orm_store.records import FIELDS as ALL_FIELDS
from zoho_orm_store.records import SECRETS
from zoho_orm_store.transfer import TokenTable

RECORD = TokenRecord(
    id="1",
    user_name="ada@example.com:1",
    client_id="1000.C",
    client_secret="the-client-secret",
    refresh_token="1000.refresh",
    access_token="1000.access",
    grant_token="1000.grant",
    expiry_time=4102444800000,
)

KEY = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="


class ReversingCipher:
    """A cipher of somebody else's, with a key that has any name."""

    def __init__(self, key_id="projects/p/keys/k:1", failure=None):
        self.key_id = key_id
        self.failure = failure

    def encrypt(self, plaintext, key_id):
        if self.failure is not None:
            raise self.failure
        return plaintext.hex()[::-1]

    def decrypt(self, ciphertext, key_id):
        if self.failure is not None:
            raise self.failure
        if key_id != self.key_id:
            raise LookupError
        return bytes.fromhex(ciphertext[::-1])


@pytest.fixture
def connection(request, provisioned):
    """A connection to our tables, in memory unless a test names a database."""
    if hasattr(request, "param"):
        url = provisioned(request.param)
        empty(url)
        engine = create_engine(url)
    else:
        engine = create_engine("sqlite://")
        metadata.create_all(engine)
    with engine.begin() as connection:
        yield connection
    engine.dispose()


on_each_database = pytest.mark.parametrize("connection", DATABASES, indirect=True)


def encrypted(record, cipher):
    return replace(record, **Secrets(cipher).encrypted(record))


def decrypted(record, cipher):
    values = [getattr(record, name) for name in TokenRecord.__match_args__]
    return Secrets(cipher).decrypted(values)


def pass_time(monkeypatch, seconds):
    later = time.monotonic() + seconds
    monkeypatch.setattr("zoho_orm_store.encryption.monotonic", lambda: later)


def columns(connection, *names):
    selected = ", ".join(names or SECRETS)
    rows = connection.exec_driver_sql(f"SELECT {selected} FROM oauthtoken ORDER BY id")
    return [tuple(row) for row in rows]


class TestWhatIsStored:
    @on_each_database
    def test_secrets_and_the_user_are_encrypted_and_the_rest_is_not(self, connection):
        TokenRepository(connection, cipher=CIPHER).save(RECORD)
        [encrypted] = columns(connection, "user_name", *SECRETS)
        assert {key_id_of(value) for value in encrypted} == {CIPHER.key_id}
        assert columns(connection, "id", "client_id", "expiry_time") == [
            ("1", RECORD.client_id, RECORD.expiry_time)
        ]

    def test_the_same_secret_is_never_encrypted_to_the_same_text(self, connection):
        repository = TokenRepository(connection, cipher=CIPHER)
        same = dict.fromkeys(SECRETS, "the same")
        repository.save(replace(RECORD, **same))
        repository.save(replace(RECORD, **same, id="2", user_name="bob"))
        assert len({value for row in columns(connection) for value in row}) == 8

    @on_each_database
    def test_the_longest_values_can_be_stored(self, connection):
        longest = {name: "\U0001f511" * ALL_FIELDS[name].max_length for name in SECRETS}
        repository = TokenRepository(connection, cipher=CIPHER)
        saved = repository.save(replace(RECORD, **longest))
        assert saved == repository.get("1")
        assert {name: getattr(saved, name) for name in SECRETS} == longest

    @pytest.mark.parametrize("cipher", [None, CIPHER], ids=["plain", "encrypted"])
    @on_each_database
    def test_a_plain_value_that_looks_encrypted_comes_back_exactly_A2(self, connection, cipher):
        repository = TokenRepository(connection, cipher=cipher)
        for number, value in enumerate((MARK, f"{MARK}$", f"{MARK}{CIPHER.key_id}$x", "$zos")):
            lookalike = replace(RECORD, id=str(number), user_name=value, access_token=value)
            assert repository.save(lookalike).access_token == value
            assert repository.get(str(number)).access_token == value
            assert repository.find(TokenRecord(access_token=value)).id == str(number)

    @on_each_database
    def test_plain_and_encrypted_rows_stand_side_by_side(self, connection):
        plain, encrypting = (
            TokenRepository(connection),
            TokenRepository(connection, cipher=CIPHER),
        )
        plain.save(RECORD)
        encrypting.save(replace(RECORD, id="2", user_name="bob", refresh_token="1000.other"))
        assert [each.client_secret for each in encrypting.list()] == [RECORD.client_secret] * 2
        assert encrypting.find(TokenRecord(refresh_token="1000.refresh")).id == "1"
        encrypting.save(TokenRecord(id="1", access_token="1000.newer"))
        assert KeyRotation(operations(CIPHER)).count_by_key(connection) == {CIPHER.key_id: 2}

    def test_a_cipher_that_only_decrypts_leaves_new_values_plain(self, connection):
        keys = generate_key()
        TokenRepository(connection, cipher=FernetCipher(keys)).save(RECORD)
        only_decrypts = FernetCipher(keys, encrypts=False)
        repository = TokenRepository(connection, cipher=only_decrypts)
        assert repository.get("1").refresh_token == RECORD.refresh_token
        repository.save(TokenRecord(id="1", access_token="1000.newer"))
        assert columns(connection, "access_token", "refresh_token") == [
            ("1000.newer", "1000.refresh")
        ]

    def test_a_cipher_of_ones_own(self, connection):
        repository = TokenRepository(connection, cipher=ReversingCipher())
        assert repository.save(RECORD).client_secret == RECORD.client_secret
        assert repository.get("1").client_secret == RECORD.client_secret
        assert KeyRotation(operations(ReversingCipher())).count_by_key(connection) == {
            "projects/p/keys/k:1": 1
        }

    async def test_the_async_repository_encrypts_too(self, database):
        drivers = {"sqlite": "sqlite+aiosqlite", "mysql": "mysql+asyncmy"}
        driver = drivers.get(database.get_backend_name(), "postgresql+asyncpg")
        engine = create_async_engine(database.set(drivername=driver))
        async with engine.begin() as connection:
            repository = AsyncTokenRepository(connection, cipher=CIPHER)
            await repository.save(RECORD)
            assert (await repository.get("1")).grant_token == RECORD.grant_token
            tokens = operations(CIPHER)
            assert await connection.run_sync(KeyRotation(tokens).count_by_key) == {CIPHER.key_id: 1}
            left = partial(KeyRotation(tokens).count_left, plain_text=True)
            assert await connection.run_sync(left) == 0
            rotate = partial(KeyRotation(tokens).batch, after="", limit=100, plain_text=True)
            assert (await connection.run_sync(rotate)).rotated == 0
            broken: list[UndecryptableTokenError] = []
            without = AsyncTokenRepository(connection)
            assert await without.list(on_undecryptable=broken.append) == []
            assert [each async for each in without.stream(on_undecryptable=broken.append)] == []
            assert [error.id for error in broken] == ["1", "1"]
        await engine.dispose()


class TestBoundToItsAssociatedData:
    def test_what_is_where_it_was_encrypted_is_decrypted(self):
        assert decrypted(encrypted(RECORD, CIPHER), CIPHER) == RECORD

    @pytest.mark.parametrize("column", SECRETS)
    def test_a_value_of_another_row_is_not(self, connection, column):
        repository = TokenRepository(connection, cipher=CIPHER)
        repository.save(RECORD)
        repository.save(replace(RECORD, id="2", user_name="eve", refresh_token="1000.eves"))
        [(stolen,), _] = columns(connection, column)
        update = f"UPDATE oauthtoken SET {column} = '{stolen}' WHERE id = '2'"
        connection.exec_driver_sql(update)
        assert repository.get("1") is not None
        with pytest.raises(UndecryptableTokenError, match=f"{column} of the token with id '2'"):
            repository.get("2")

    def test_a_value_of_another_column_is_not(self, connection):
        repository = TokenRepository(connection, cipher=CIPHER)
        repository.save(RECORD)
        connection.exec_driver_sql("UPDATE oauthtoken SET access_token = refresh_token")
        with pytest.raises(UndecryptableTokenError, match="access_token"):
            repository.get("1")

    @pytest.mark.parametrize("column", ["id", "user_name", "client_id"])
    def test_a_row_that_is_given_another_id_user_or_client_is_not(self, connection, column):
        repository = TokenRepository(connection, cipher=CIPHER)
        repository.save(RECORD)
        connection.exec_driver_sql(f"UPDATE oauthtoken SET {column} = 'eve'")
        with pytest.raises(UndecryptableTokenError, match="changed by other means"):
            repository.get("eve" if column == "id" else "1")

    def test_a_value_of_another_tenant_is_not(self):
        seven, eight = (Secrets(CIPHER, Scope((("tenant_id", number),))) for number in (7, 8))
        record = replace(RECORD, **seven.encrypted(RECORD))
        values = [getattr(record, name) for name in TokenRecord.__match_args__]
        assert seven.decrypted(values) == RECORD
        with pytest.raises(UndecryptableTokenError):
            eight.decrypted(values)

    @pytest.mark.parametrize("cipher", [None, CIPHER], ids=["plain", "encrypted"])
    @on_each_database
    def test_a_row_that_is_given_anothers_identity_is_not_merged(self, connection, cipher):
        repository = TokenRepository(connection, cipher=cipher)
        repository.save(RECORD)
        eves = TokenRecord(user_name="eve", client_id=RECORD.client_id, access_token="1000.eve")
        update = "UPDATE oauthtoken SET identity = '{}'"
        digests = Digests(keys=Secrets(cipher).digest_keys)
        connection.exec_driver_sql(update.format(digests.of(eves)["identity"]))
        with pytest.raises(DatabaseError, match=r"id '1' .* changed by other means") as raised:
            repository.save(eves)
        assert not raised.value.retryable
        assert repository.get("1").user_name == RECORD.user_name
        assert repository.count() == 1

    @on_each_database
    def test_a_save_that_learns_the_user_encrypts_the_row_again(self, connection):
        repository = TokenRepository(connection, cipher=CIPHER)
        saved = repository.save(replace(RECORD, id=None, user_name=None))
        repository.save(replace(RECORD, id=saved.id))
        assert repository.get(saved.id).user_name == RECORD.user_name


class TestWhatCannotBeDecrypted:
    def test_without_a_cipher(self, connection):
        TokenRepository(connection, cipher=CIPHER).save(RECORD)
        with pytest.raises(UndecryptableTokenError) as raised:
            TokenRepository(connection).get("1")
        assert str(raised.value) == (
            f"The user_name of the token with id '1' is encrypted under the key "
            f"'{CIPHER.key_id}'. Pass cipher=FernetCipher(keys); on the command line, set "
            "ZOHO_ORM_STORE_KEYS."
        )
        assert raised.value.id == "1"
        assert raised.value.record.client_id == RECORD.client_id
        assert raised.value.record.user_name is raised.value.record.client_secret is None

    def test_without_the_key(self, connection):
        TokenRepository(connection, cipher=CIPHER).save(RECORD)
        other = TokenRepository(connection, cipher=FernetCipher(generate_key()))
        for use in (
            lambda: other.get("1"),
            lambda: other.save(RECORD),
            other.list,
            lambda: [*other.stream()],
        ):
            with pytest.raises(UndecryptableTokenError, match="Add that key after the first one"):
                use()
        for mistaken in (other, TokenRepository(connection)):
            for use in (mistaken.find, mistaken.save):
                with pytest.raises(CipherError, match=f"key '{CIPHER.key_id}', which is not"):
                    use(TokenRecord(user_name=RECORD.user_name, refresh_token="1000.new"))
        assert TokenRepository(connection, cipher=CIPHER).get("1").grant_token is not None

    @pytest.mark.parametrize(
        "garbled",
        [
            MARK,
            f"{MARK}k",
            f"{MARK}\n$x",
            "{whole}x",
            "{whole:.60}",
            "$zos1${key}$",
            "$zos1${key}$é",
        ],
    )
    def test_garbled(self, connection, garbled):
        repository = TokenRepository(connection, cipher=CIPHER)
        repository.save(RECORD)
        [(whole,)] = columns(connection, "access_token")
        value = garbled.format(whole=whole, key=CIPHER.key_id)
        table = repository._operations.table
        connection.execute(table.update().values(access_token=value))
        with pytest.raises(UndecryptableTokenError, match="access_token of the token with id '1'"):
            repository.get("1")

    @on_each_database
    def test_one_such_row_does_not_hide_the_others(self, connection):
        repository = TokenRepository(connection, cipher=CIPHER)
        for number in range(5):
            repository.save(replace(RECORD, id=str(number), user_name=str(number)))
        connection.exec_driver_sql("UPDATE oauthtoken SET grant_token = '$zos1$' WHERE id = '2'")
        for listing in (repository.list, repository.stream):
            broken: list[UndecryptableTokenError] = []
            readable = [record.id for record in listing(on_undecryptable=broken.append)]
            assert readable == ["0", "1", "3", "4"]
            assert [(error.id, error.record.user_name) for error in broken] == [("2", "2")]
        assert repository.count() == 5
        assert repository.delete("2")
        assert len(repository.list()) == 4

    @on_sqlite
    def test_the_store_says_so_in_the_sdks_exception_G1(self, database):
        with SQLAlchemyTokenStore(database, cipher=CIPHER) as store:
            store.save_token(make_token(id="1", **FULL))
            assert known(store.find_token_by_id("1"))["client_secret"] == FULL["client_secret"]
        with SQLAlchemyTokenStore(database) as store:
            for use in (
                lambda: store.find_token_by_id("1"),
                lambda: store.find_token(make_token(id="1")),
                lambda: store.save_token(make_token(id="1", access_token="1000.new")),
                store.get_tokens,
            ):
                with pytest.raises(SDKException, match="id '1' is encrypted under the key") as e:
                    use()
                assert isinstance(e.value.__cause__, UndecryptableTokenError)
            store.delete_token("1")
            assert store.get_tokens() == []

    @pytest.mark.parametrize("failure", [RuntimeError("1000.secret"), KeyError("1000.secret")])
    def test_a_cipher_that_fails_is_named_and_its_message_is_not_shown_G3(
        self, connection, failure
    ):
        TokenRepository(connection, cipher=ReversingCipher()).save(RECORD)
        repository = TokenRepository(connection, cipher=ReversingCipher(failure=failure))
        for use in (lambda: repository.get("1"), lambda: repository.save(RECORD)):
            with pytest.raises(CipherError) as raised:
                use()
            assert "1000.secret" not in str(raised.value)
            assert raised.value.__cause__ is raised.value.__context__ is None

    def test_a_key_id_that_cannot_be_stored(self, connection):
        with pytest.raises(ConfigurationError, match="cannot be stored"):
            TokenRepository(connection, cipher=ReversingCipher("a$b")).save(RECORD)

    @pytest.mark.parametrize("key_id", [7, b"k", ["k"]])
    def test_a_key_id_that_is_not_text(self, connection, key_id):
        repository = TokenRepository(connection, cipher=ReversingCipher(key_id))
        tokens = operations(ReversingCipher(key_id))
        TokenRepository(connection).save(RECORD)
        for use in (
            lambda: repository.save(RECORD),
            lambda: KeyRotation(tokens).batch(connection, "", 100, plain_text=True),
            lambda: KeyRotation(tokens).count_left(connection, plain_text=True),
        ):
            with pytest.raises(CipherError, match="failed with TypeError when asked to name its"):
                use()

    @pytest.mark.parametrize("made", [None, b"bytes", 7, "", "é", "\udc80", "x" * 65_465])
    def test_what_encrypt_returns_and_cannot_be_stored(self, connection, made):
        cipher = ReversingCipher()
        cipher.encrypt = lambda plaintext, key_id: made
        repository = TokenRepository(connection, cipher=cipher)
        with pytest.raises(CipherError, match=r"ReversingCipher.* user_name"):
            repository.save(RECORD)
        assert repository.count() == 0

    @on_each_database
    def test_the_longest_that_encrypt_may_return(self, connection):
        cipher = ReversingCipher("k" * 64)
        cipher.encrypt = lambda plaintext, key_id: "x" * 65_464
        repository = TokenRepository(connection, cipher=cipher)
        with pytest.raises(UndecryptableTokenError):  # which it is, once it is stored
            repository.save(TokenRecord(id="1", access_token="a"))
        assert [len(value) for value in columns(connection, "access_token")[0]] == [65_535]

    @pytest.mark.parametrize("made", [bytes.hex, lambda text: text[:32] + b"\xff", list, len])
    def test_what_decrypt_returns_and_is_not_text(self, connection, made):
        TokenRepository(connection, cipher=ReversingCipher()).save(RECORD)
        cipher = ReversingCipher()
        genuine = cipher.decrypt
        cipher.decrypt = lambda ciphertext, key_id: made(genuine(ciphertext, key_id))
        with pytest.raises(CipherError, match="user_name of the token with id '1'") as raised:
            TokenRepository(connection, cipher=cipher).get("1")
        assert not isinstance(raised.value, UndecryptableTokenError)

    def test_a_ciphertext_that_is_cut_short_hides_no_other(self, connection):
        """An envelope's base64 then raises a ValueError, as bytes.fromhex does here."""
        repository = TokenRepository(connection, cipher=ReversingCipher())
        for number in range(3):
            repository.save(replace(RECORD, id=str(number), user_name=str(number)))
        cut = "UPDATE oauthtoken SET access_token = substr(access_token, 1, 40) WHERE id = '1'"
        connection.exec_driver_sql(cut)
        broken: list[UndecryptableTokenError] = []
        assert [each.id for each in repository.list(on_undecryptable=broken.append)] == ["0", "2"]
        assert "access_token of the token with id '1' is garbled" in str(broken[0])
        tokens = operations(ReversingCipher("another:key"))
        batch = KeyRotation(tokens).batch(connection, "", 100, plain_text=False)
        assert [error.id for error in batch.undecryptable] == ["0", "1", "2"]

    def test_a_key_service_that_is_down_is_not_a_garbled_row(self, connection):
        TokenRepository(connection, cipher=ReversingCipher()).save(RECORD)
        down = ReversingCipher(failure=ConnectionError("1000.secret"))
        repository = TokenRepository(connection, cipher=down)
        for use in (lambda: repository.get("1"), lambda: repository.list(on_undecryptable=print)):
            with pytest.raises(CipherError, match="user_name of the token with id '1'") as e:
                use()
            assert not isinstance(e.value, UndecryptableTokenError)
            assert "ConnectionError" in str(e.value)

    def test_the_error_survives_pickling_without_the_record(self):
        error = UndecryptableTokenError("text", "1", RECORD)
        again = pickle.loads(pickle.dumps(error))
        assert (str(again), again.id, again.record) == ("text", "1", None)


class TestKeys:
    def test_the_first_key_encrypts_and_all_decrypt(self):
        old, new = generate_key(), generate_key()
        cipher = FernetCipher([new, old])
        assert cipher.key_ids == (FernetCipher(new).key_id, FernetCipher(old).key_id)
        assert key_id_of(encrypted(RECORD, cipher).access_token) == FernetCipher(new).key_id
        assert decrypted(encrypted(RECORD, FernetCipher(old)), cipher) == RECORD
        assert decrypted(encrypted(RECORD, cipher), FernetCipher([old, new])) == RECORD

    @pytest.mark.parametrize("separator", [",", " ", ", ", "\n", ",\n "])
    def test_from_the_environment(self, monkeypatch, separator):
        keys = [generate_key(), generate_key()]
        monkeypatch.setenv("ZOHO_ORM_STORE_KEYS", f" {separator.join(keys)}\n")
        assert FernetCipher().key_ids == FernetCipher(keys).key_ids

    def test_as_bytes(self):
        key = Fernet.generate_key()
        for given in (key, key + b"\n", [key]):
            assert FernetCipher(given).key_ids == FernetCipher([key.decode()]).key_ids
        assert len(FernetCipher(key + b", " + Fernet.generate_key()).key_ids) == 2

    def test_from_a_function_which_is_asked_again_for_an_unknown_key(self, monkeypatch):
        old, new = generate_key(), generate_key()
        keys, calls = [old], []
        cipher = FernetCipher(lambda: (calls.append(1), keys)[1])
        keys = [new, old]
        record = encrypted(RECORD, FernetCipher(new))
        with pytest.raises(UndecryptableTokenError):
            decrypted(record, cipher)
        assert len(calls) == 1, "asked again too soon"
        pass_time(monkeypatch, 1.1)
        assert decrypted(record, cipher) == RECORD
        assert cipher.key_id == FernetCipher(new).key_id
        assert len(calls) == 2

    def test_those_who_need_a_key_that_is_being_fetched_wait_for_it(self, monkeypatch):
        old, new = generate_key(), generate_key()
        calls = []

        def keys():
            calls.append(1)
            if len(calls) > 1:
                time.sleep(0.2)
            return [new, old][-len(calls) :]

        cipher = FernetCipher(keys)
        record = encrypted(RECORD, FernetCipher(new))
        pass_time(monkeypatch, 1.1)
        with ThreadPoolExecutor(8) as pool:
            found = [*pool.map(lambda _: decrypted(record, cipher), range(8))]
        assert found == [RECORD] * 8
        assert len(calls) == 2

    def test_a_child_forked_while_a_key_is_being_fetched_does_not_wait_for_ever(self, monkeypatch):
        new, fetching, go_on = generate_key(), Event(), Event()
        answers = [lambda: generate_key(), lambda: (fetching.set(), go_on.wait(20))[0] or new]
        cipher = FernetCipher(lambda: (answers.pop(0) if answers else lambda: new)())
        record = encrypted(RECORD, FernetCipher(new))
        pass_time(monkeypatch, 1.1)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(decrypted, record, cipher)
            assert fetching.wait(20)
            child = os.fork()
            if child == 0:
                signal.alarm(10)
                os._exit(decrypted(record, cipher) != RECORD)
            assert os.waitpid(child, 0)[1] == 0
            go_on.set()
            assert waiting.result() == RECORD

    @pytest.mark.parametrize(
        ("again", "reason"),
        [
            (lambda: 1 / 0, "It raised ZeroDivisionError"),
            (lambda: {}["1000.secret"], "It raised KeyError"),
            (lambda: "1000.secret", "The key is not a Fernet key"),
            (lambda: None, "There is no key"),
        ],
    )
    def test_a_function_that_fails_is_not_a_missing_key(
        self, connection, monkeypatch, caplog, again, reason
    ):
        key = generate_key()
        TokenRepository(connection, cipher=FernetCipher(generate_key())).save(RECORD)
        answers, calls = [lambda: key], []
        cipher = FernetCipher(lambda: (calls.append(1), answers.pop() if answers else again)[1]())
        repository = TokenRepository(connection, cipher=cipher)
        pass_time(monkeypatch, 61)
        with pytest.raises(CipherError, match=f"token with id '1'.*function.*{reason}") as raised:
            repository.get("1")
        assert not isinstance(raised.value, UndecryptableTokenError)
        assert raised.value.__cause__ is raised.value.__context__ is None
        # Everybody is told so for a second, before the function is asked again.
        with pytest.raises(CipherError, match=reason):
            repository.get("1")
        assert len(calls) == 2
        # What is saved goes on under the key that is known, with a warning a minute.
        pass_time(monkeypatch, 200)
        assert encrypted(RECORD, cipher) != encrypted(RECORD, cipher)
        assert cipher.key_id == FernetCipher(key).key_id
        [warning] = [each.getMessage() for each in caplog.records]
        assert reason in warning
        assert "1000.secret" not in str(raised.value) + warning

    def test_a_worker_that_only_saves_learns_of_a_new_first_key(self, monkeypatch):
        old, new = generate_key(), generate_key()
        keys, calls = [old], []
        cipher = FernetCipher(lambda: (calls.append(1), keys)[1])
        keys = [new, old]
        assert key_id_of(encrypted(RECORD, cipher).access_token) == FernetCipher(old).key_id
        pass_time(monkeypatch, 61)
        assert key_id_of(encrypted(RECORD, cipher).access_token) == FernetCipher(new).key_id
        assert len(calls) == 2
        assert decrypted(encrypted(RECORD, FernetCipher(old)), cipher) == RECORD

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ("", "There is no key"),
            ([], "There is no key"),
            (None, "There is no key. Pass keys, or set ZOHO_ORM_STORE_KEYS"),
            ("short", "The key is not a Fernet key"),
            (["x" * 44], "The key is not a Fernet key"),
            ([KEY, "x" * 43], "Key 2 of 2 is not a Fernet key"),
            ([KEY, ""], "Key 2 of 2 is not a Fernet key"),
            ([None], "There is no key"),
            ([7], "The key is not a Fernet key"),
            (7, "The key is not a Fernet key"),
            (lambda: None, "There is no key"),
            (lambda: "short", "The key is not a Fernet key"),
            (KEY[:-2] + "é=", "The key is not a Fernet key"),
        ],
    )
    def test_a_malformed_key_is_refused_at_construction(self, monkeypatch, keys, message):
        monkeypatch.delenv("ZOHO_ORM_STORE_KEYS", raising=False)
        with pytest.raises(ConfigurationError, match=f"^{re.escape(message)}") as raised:
            FernetCipher(keys)
        assert "zoho-orm-store keys generate" in str(raised.value)

    def test_the_repr_shows_key_ids_alone(self):
        key = generate_key()
        assert repr(FernetCipher(key)) == f"FernetCipher(<keys {FernetCipher(key).key_id}>)"
        assert key[:8] not in repr(FernetCipher(key, encrypts=False))

    def test_the_repr_of_one_that_is_half_made(self):
        with pytest.raises(ZeroDivisionError) as raised:
            FernetCipher(lambda: 1 / 0)
        shown = traceback.TracebackException.from_exception(raised.value, capture_locals=True)
        assert "zoho_orm_store/encryption.py" not in "".join(shown.format()), (
            "it would show the keys"
        )


class TestWhatIsNotACipher:
    @pytest.mark.parametrize("given", [KEY, 7, FernetCipher, Fernet(KEY), object()])
    def test_it_is_refused_at_construction(self, given):
        for make in (
            lambda: SQLAlchemyTokenStore("sqlite://", cipher=given),
            lambda: TokenRepository(None, cipher=given),
            lambda: AsyncTokenRepository(None, cipher=given),
            lambda: TokenTable("sqlite://", cipher=given),
        ):
            message = "must be an object with key_id, encrypt, dec"
            with pytest.raises(ConfigurationError, match=message):
                make()

    def test_a_key_id_that_fails_is_not_asked_for_yet(self):
        class Slow(ReversingCipher):
            key_id = property(lambda self: 1 / 0)

            def __init__(self):
                pass

        SQLAlchemyTokenStore("sqlite://", cipher=Slow()).close()


class TestPickles:
    def test_nothing_that_holds_secrets_is_pickled(self):
        store, table = SQLAlchemyTokenStore("sqlite://"), TokenTable("sqlite://")
        for held in (RECORD, CIPHER, MemoryTokenStore(), store, table):
            with pytest.raises(TypeError, match="cannot be pickled"):
                pickle.dumps(held)

    def test_a_record_is_its_own_copy(self):
        assert copy(RECORD) is deepcopy(RECORD) is RECORD


def dump(url):
    """What somebody gets who steals the database."""
    if url.get_backend_name() == "sqlite":
        files = [Path(f"{url.database}{suffix}") for suffix in ("", "-wal", "-shm")]
        return b"".join(path.read_bytes() for path in files)
    at = ["-h", url.host, "-U" if url.get_backend_name() == "postgresql" else "-u", url.username]
    if url.get_backend_name() == "postgresql":
        command = ["pg_dump", *at, "-p", str(url.port), url.database]
    else:
        program = which("mariadb-dump") or which("mysqldump")
        command = [program, *at, "-P", str(url.port), url.database]
    return subprocess.run(command, check=True, capture_output=True).stdout


@pytest.mark.parametrize("cipher", [None, CIPHER], ids=["plain", "encrypted"])
def test_a_stolen_database_holds_no_secret_and_no_user(empty_database, cipher):
    secrets = []
    is_sqlite = empty_database.get_backend_name() == "sqlite"
    with SQLAlchemyTokenStore(empty_database, cipher=cipher, create_schema=True) as store:
        if is_sqlite:
            store._database.read(lambda c: c.exec_driver_sql("PRAGMA journal_mode=WAL"))
        for number in range(50):
            values = {
                name: f"1000.{name}.{number:064x}"
                for name in ("client_secret", "refresh_token", "access_token", "grant_token")
            }
            secrets += values.values()
            store.save_token(make_token(user=f"user {number}", client_id="1000.C", **values))
        stolen = dump(empty_database)
        assert len(store.get_tokens()) == 50
    users = [f"user {number}" for number in range(50)]
    likely = [digests_of(TokenRecord(user_name=user))["user_digest"] for user in users]
    found = [each for each in (*secrets, *users, *likely) if each.encode() in stolen]
    assert found == ([] if cipher else [*secrets, *users, *likely]), "the search itself must work"


class TestFiles:
    @pytest.mark.parametrize(
        "url", ["sqlite:///{}", "sqlite+aiosqlite:///{}", "sqlite:///file:{}?uri=true"]
    )
    def test_a_new_sqlite_file_is_readable_by_its_owner_alone(self, tmp_path, url):
        path = tmp_path / "tokens.db"
        with SQLAlchemyTokenStore(url.format(path)) as store:
            store.save_token(make_token(**FULL))
            store._database.read(lambda c: c.exec_driver_sql("PRAGMA journal_mode=WAL"))
            store.save_token(make_token(**FULL))
            files = sorted(tmp_path.iterdir())
            assert [file.name for file in files] == ["tokens.db", "tokens.db-shm", "tokens.db-wal"]
            assert [oct(file.stat().st_mode & 0o777) for file in files] == ["0o600"] * 3

    def test_a_file_that_a_link_leads_to_is_too(self, tmp_path):
        (tmp_path / "link.db").symlink_to("tokens.db")
        with SQLAlchemyTokenStore(f"sqlite:///{tmp_path / 'link.db'}") as store:
            store.save_token(make_token(**FULL))
        assert (tmp_path / "tokens.db").stat().st_mode & 0o777 == 0o600

    def test_the_command_lines_too(self, tmp_path):
        path = tmp_path / "tokens.db"
        assert CliRunner().invoke(app, ["upgrade", "--url", f"sqlite:///{path}"]).exit_code == 0
        assert path.stat().st_mode & 0o777 == 0o600

    def test_a_file_that_is_there_keeps_its_permissions(self, tmp_path):
        path = tmp_path / "tokens.db"
        path.touch(0o640)
        path.chmod(0o640)
        provision.upgrade(f"sqlite:///{path}")
        assert path.stat().st_mode & 0o777 == 0o640
