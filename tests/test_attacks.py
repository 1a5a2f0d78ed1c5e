"""What somebody with one foot in the door gets: rules J2 and J3, and what a dump tells."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from conftest import CIPHER, empty, on_sqlite, operations
from databases import SERVERS
from sdk_tokens import make_token
from sqlalchemy import create_engine, event, insert, make_url, select, text, update
from test_encryption import RECORD, ReversingCipher
from test_migrations import SAMPLE_DDL
from typer.testing import CliRunner
from zohocrmsdk.src.com.zoho.crm.api.exception import SDKException

from zoho_orm_store import (
    ConfigurationError,
    FernetCipher,
    SQLAlchemyTokenStore,
    StoredToken,
    TokenRecord,
    TokenRepository,
    UndecryptableTokenError,
    generate_key,
    provision,
    rotate_keys,
)
from zoho_orm_store._digests import digests_of
from zoho_orm_store.cli import app
from zoho_orm_store.errors import CipherError
from zoho_orm_store.records import SECRETS, utc_now

OLD, NEW = generate_key(), generate_key()

TABLE = StoredToken.__table__


def execute(url, statement, *parameters):
    engine = create_engine(url)
    with engine.begin() as connection:
        result = connection.execute(statement, *parameters)
        rows = result.all() if result.returns_rows else None
    engine.dispose()
    return rows


def plant(url, record):
    """Insert a row in plain text, as somebody does who knows this package and has no key."""
    now = utc_now()
    values = {name: getattr(record, name) for name in TokenRecord.__match_args__}
    values |= digests_of(record) | {"created_at": now, "updated_at": now}
    execute(url, insert(TABLE).values(values))


def columns_of(url, *names):
    return [tuple(row) for row in execute(url, select(*(TABLE.c[name] for name in names)))]


@pytest.fixture
def strict(database):
    with SQLAlchemyTokenStore(database, cipher=CIPHER, require_encryption=True) as store:
        yield store


class TestPlantedPlainText:
    """Somebody can write to the table, and has no key."""

    def test_a_planted_row_is_an_error_that_names_it_J2(self, database, strict):
        plant(database, replace(RECORD, id="planted", user_name="ada", client_id=None))
        for use in (
            lambda: strict.find_token_by_id("planted"),
            lambda: strict.find_token(make_token(user="ada")),
            lambda: strict.find_token(make_token(refresh_token=RECORD.refresh_token)),
            lambda: strict.save_token(make_token(user="ada", access_token="1000.new")),
            strict.get_tokens,
        ):
            with pytest.raises(SDKException, match="id 'planted' is in plain text") as raised:
                use()
            assert isinstance(raised.value.__cause__, UndecryptableTokenError)
            assert RECORD.refresh_token not in str(raised.value)
        strict.delete_token("planted")
        assert strict.get_tokens() == []

    @pytest.mark.parametrize("value", ["1000.eves", "$zos1$$1000.eves"])
    @pytest.mark.parametrize("column", SECRETS)
    @on_sqlite
    def test_a_planted_value_is_too_J2(self, database, strict, column, value):
        with strict.transaction() as tokens:
            tokens.save(RECORD)
        execute(database, update(TABLE).values({column: value}))
        with pytest.raises(SDKException, match=f"The {column} of the token with id '1' is in pl"):
            strict.find_token_by_id("1")

    @on_sqlite
    def test_a_planted_user_name_is_bound_to_the_secrets(self, database, strict):
        with strict.transaction() as tokens:
            tokens.save(RECORD)
        execute(database, update(TABLE).values(user_name="eve"))
        with pytest.raises(SDKException, match="changed by other means"):
            strict.find_token_by_id("1")

    def test_another_users_name_is_not_moved_to_a_row(self, database, strict):
        for id_, user in (("1", "ada"), ("2", "eve")):
            with strict.transaction() as tokens:
                tokens.save(replace(RECORD, id=id_, user_name=user, refresh_token=f"1000.{user}"))
        names = dict(columns_of(database, "id", "user_name"))
        digests = dict(columns_of(database, "id", "user_digest"))
        swap = update(TABLE).where(TABLE.c.id == "2")
        execute(database, swap.values(user_name=names["1"], user_digest=digests["1"]))
        with pytest.raises(SDKException, match="user_name of the token with id '2'"):
            strict.find_token_by_id("2")

    @on_sqlite
    def test_a_rotation_does_not_launder(self, database):
        with SQLAlchemyTokenStore(database, cipher=FernetCipher(OLD)) as store:
            store.save_token(make_token(id="genuine", user="ada", refresh_token="1000.adas"))
        plant(database, replace(RECORD, id="planted", user_name="eve"))
        summary = rotate_keys(database, FernetCipher([NEW, OLD]))
        assert summary == (1, 0, (), 1)
        assert ("planted", RECORD.refresh_token) in columns_of(database, "id", "refresh_token")

    @on_sqlite
    def test_turning_encryption_on_does_not_launder_part_of_a_row(self, database, strict):
        with strict.transaction() as tokens:
            tokens.save(RECORD)
        execute(database, update(TABLE).values(refresh_token="1000.eves"))
        summary = rotate_keys(database, CIPHER, encrypt_plain_text=True)
        (error,) = summary.undecryptable
        assert "id '1' has secrets in plain text beside encrypted ones" in str(error)
        assert columns_of(database, "refresh_token") == [("1000.eves",)]

    def test_the_repositories_refuse_it_too(self, database):
        plant(database, RECORD)
        engine = create_engine(database)
        with engine.connect() as connection:
            strict = TokenRepository(connection, cipher=CIPHER, require_encryption=True)
            with pytest.raises(UndecryptableTokenError, match="in plain text"):
                strict.get("1")
            errors = []
            assert strict.list(on_undecryptable=errors.append) == []
            assert [error.id for error in errors] == ["1"]
            assert TokenRepository(connection, cipher=CIPHER).get("1") is not None
        engine.dispose()

    def test_it_needs_a_cipher_that_encrypts(self, database):
        with pytest.raises(ConfigurationError, match="needs a cipher"):
            SQLAlchemyTokenStore(database, require_encryption=True)
        reads = FernetCipher(OLD, encrypts=False)
        with (
            SQLAlchemyTokenStore(database, cipher=reads, require_encryption=True) as store,
            pytest.raises(SDKException, match="only decrypts"),
        ):
            store.save_token(make_token(refresh_token="1000.r"))

    @pytest.mark.parametrize("copied", [False, True], ids=["empty", "a copy"])
    def test_a_planted_digest_keeps_nobody_from_logging_in(self, database, strict, copied):
        strict.save_token(make_token(id="1", user="ada", refresh_token="1000.r"))
        columns = [column.name for column in TABLE.columns]
        (row,) = columns_of(database, *columns)
        planted = dict(zip(columns, row, strict=True)) | {"id": "p", "identity": "k" + "0" * 63}
        if not copied:
            planted |= dict.fromkeys(("user_name", *SECRETS))
        execute(database, insert(TABLE).values(planted))
        strict.save_token(make_token(user="bob", refresh_token="1000.b"))
        assert strict.find_token(make_token(user="bob")) is not None
        with pytest.raises(SDKException, match="token with id 'p'"):
            strict.find_token_by_id("p")
        with pytest.raises(SDKException, match="token with id 'p'"):
            strict.get_tokens()

    def test_a_planted_row_under_a_key_of_the_attackers_is_named(self, database, strict):
        with SQLAlchemyTokenStore(database, cipher=FernetCipher(NEW)) as attacker:
            attacker.save_token(make_token(id="p", user="eve", refresh_token="1000.eve"))
        with pytest.raises(SDKException, match="zoho-orm-store delete 'p'"):
            strict.save_token(make_token(user="bob", refresh_token="1000.b"))

    @on_sqlite
    def test_the_doctor_names_a_row_with_anothers_identity(self, database, monkeypatch):
        monkeypatch.setenv("ZOHO_ORM_STORE_URL", str(database))
        monkeypatch.setenv("ZOHO_ORM_STORE_KEYS", OLD)
        with SQLAlchemyTokenStore(database, cipher=FernetCipher(OLD)) as store:
            store.save_token(make_token(id="1", user="ada", refresh_token="1000.r"))
        assert CliRunner().invoke(app, ["doctor"]).exit_code == 0
        execute(database, update(TABLE).values(identity="k" + "0" * 63))
        examined = CliRunner().invoke(app, ["doctor"])
        assert examined.exit_code == 1
        assert "planted or changed: The identity of the token with id '1'" in examined.output

    @on_sqlite
    def test_the_commands_say_whether_it_can_be_required(self, database, monkeypatch):
        monkeypatch.setenv("ZOHO_ORM_STORE_URL", str(database))
        monkeypatch.setenv("ZOHO_ORM_STORE_KEYS", OLD)

        def run(*arguments, answer=None):
            return CliRunner().invoke(app, arguments, input=answer).output

        plant(database, RECORD)
        assert "plain text                  1  zoho-orm-store encrypt" in run("keys", "status")
        assert "zoho-orm-store encrypt" in run("doctor")
        asked = run("encrypt", answer="n\n")
        assert "1 token is in plain text. Encrypt under the key" in asked
        assert columns_of(database, "refresh_token") == [(RECORD.refresh_token,)]
        assert "Tokens changed: 1." in run("encrypt", answer="y\n")
        assert "plain text                  0  a store may be given req" in run("keys", "status")
        assert "give the store require_encryption=True" in run("doctor")
        assert "No token is in plain text." in run("encrypt")


class TestWhatDigestsTell:
    def test_nothing_to_somebody_with_a_list_of_users(self, database, strict):
        strict.save_token(make_token(user="ada", client_id="1000.C", refresh_token="1000.r"))
        names = ("identity", "user_digest", "client_digest", "refresh_digest")
        (stored,) = columns_of(database, *names)
        record = TokenRecord(user_name="ada", client_id="1000.C", refresh_token="1000.r")
        assert not {*stored} & {*digests_of(record).values()}
        for other_key in (None, FernetCipher(NEW)):
            if other_key is not None:
                assert not {*stored} & {*operations(other_key).digests.of(record).values()}

    def test_rows_that_were_saved_without_keys_are_found_and_moved(self, database):
        with SQLAlchemyTokenStore(database) as plain:
            plain.save_token(make_token(user="ada", refresh_token="1000.r"))
        with SQLAlchemyTokenStore(database, cipher=CIPHER) as store:
            found = store.find_token(make_token(user="ada"))
            assert found.get_refresh_token() == "1000.r"
            store.save_token(make_token(user="ada", access_token="1000.a"))
            assert len(store.get_tokens()) == 1
        ((identity, user),) = columns_of(database, "identity", "user_name")
        assert identity.startswith("k")
        assert user.startswith("$zos1$")

    def test_each_known_key_finds_and_a_rotation_moves(self, database):
        old_first, new_first = FernetCipher([OLD, NEW]), FernetCipher([NEW, OLD])
        with SQLAlchemyTokenStore(database, cipher=old_first, refresh=None) as store:
            store.save_token(make_token(user="ada", client_id="c", refresh_token="1000.r"))
        with SQLAlchemyTokenStore(database, cipher=new_first, refresh=None) as store:
            for asked in ({"user": "ada"}, {"refresh_token": "1000.r"}):
                assert store.find_token(make_token(**asked)) is not None
            with store.transaction() as tokens:
                assert tokens.count(user_name="ada", client_id="c") == 1
            assert rotate_keys(database, new_first).rotated == 1
        with SQLAlchemyTokenStore(database, cipher=FernetCipher(NEW), refresh=None) as store:
            assert store.find_token(make_token(user="ada")) is not None
        assert rotate_keys(database, FernetCipher(NEW, encrypts=False)).rotated == 1
        with SQLAlchemyTokenStore(database, refresh=None) as store:
            assert store.find_token(make_token(user="ada")).get_refresh_token() == "1000.r"

    def test_a_token_under_an_unknown_key_is_not_taken_for_missing(self, database):
        """Otherwise a worker with a wrong key would make a second row of each user."""
        with SQLAlchemyTokenStore(database, cipher=FernetCipher(OLD)) as store:
            store.save_token(make_token(user="ada", refresh_token="1000.r"))
        for cipher in (None, FernetCipher(NEW)):
            with SQLAlchemyTokenStore(database, cipher=cipher) as mistaken:
                for use in (mistaken.find_token, mistaken.save_token):
                    message = f"under the key '{FernetCipher(OLD).key_id}', which is not among"
                    with pytest.raises(SDKException, match=message):
                        use(make_token(user="ada", refresh_token="1000.new"))
                with mistaken.transaction() as tokens:
                    for use in (tokens.list, tokens.count):
                        with pytest.raises(CipherError, match="which is not among those given"):
                            use(user_name="ada")
        assert len(columns_of(database, "id")) == 1

    @pytest.mark.parametrize("name", SERVERS)  # SQLite has one writer at a time.
    def test_first_saves_under_two_keys_are_one_row_E7(self, name, provisioned):
        """While a key is being changed, one worker has the old key first, another the new one."""
        url = provisioned(name)
        empty(url)
        ciphers = [FernetCipher([OLD, NEW]), FernetCipher([NEW, OLD])]
        stores = [SQLAlchemyTokenStore(url, cipher=cipher) for cipher in ciphers]
        for round_ in range(10):
            barrier, errors = threading.Barrier(2), []

            def save(number, store, round_=round_, barrier=barrier, errors=errors):
                token = make_token(user=f"user {round_}", refresh_token=f"1000.{round_}.{number}")
                barrier.wait()
                try:
                    store.save_token(token)
                except SDKException as error:
                    errors.append(error)

            threads = [threading.Thread(target=save, args=each) for each in enumerate(stores)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert errors == []
        assert len(columns_of(url, "id")) == 10
        for store in stores:
            store.close()

    def test_two_rows_of_one_token_become_one_in_a_rotation(self, database):
        """A worker that had no keys yet has saved a user a second time."""
        plant(database, replace(RECORD, id="plain", access_token="1000.older"))
        with SQLAlchemyTokenStore(database, cipher=CIPHER) as store:
            with store.transaction() as tokens:
                tokens.save(replace(RECORD, id="other", user_name="bob", refresh_token="1000.b"))
            values = operations(CIPHER).row_values(
                replace(RECORD, id="new", created_at=utc_now(), updated_at=utc_now())
            )
            execute(database, insert(TABLE).values(values))
            summary = rotate_keys(database, CIPHER, encrypt_plain_text=True)
            assert (summary.left, summary.plain_text, summary.undecryptable) == (0, 0, ())
            tokens = {token.get_id(): token for token in store.get_tokens()}
        assert len(tokens) == 2
        (merged,) = {*tokens} - {"other"}
        assert tokens[merged].get_access_token() == RECORD.access_token

    def test_a_cipher_of_ones_own_brings_keys_for_digests(self, database):
        class WithDigests(ReversingCipher):
            def digest_keys(self):
                return {self.key_id: b"x" * 32}

        class WithoutTheKey(ReversingCipher):
            def digest_keys(self):
                return {}

        class Failing(ReversingCipher):
            def digest_keys(self):
                raise KeyError("1000.secret")

        with SQLAlchemyTokenStore(database, cipher=WithDigests()) as store:
            store.save_token(make_token(user="ada", refresh_token="1000.r"))
            assert store.find_token(make_token(user="ada")) is not None
        ((identity,),) = columns_of(database, "identity")
        assert identity.startswith("k")
        engine = create_engine(database)
        with engine.connect() as connection:
            with pytest.raises(ConfigurationError, match="lacks a key for"):
                TokenRepository(connection, cipher=WithoutTheKey()).find(replace(RECORD, id=None))
            with pytest.raises(CipherError, match="failed with KeyError") as raised:
                TokenRepository(connection, cipher=Failing()).find(replace(RECORD, id=None))
            assert "1000.secret" not in str(raised.value)
        engine.dispose()


class TestContext:
    @on_sqlite
    def test_a_cipher_is_told_the_place_of_each_value(self, database):
        seen = []

        class Auditing(ReversingCipher):
            def encrypt(self, plaintext, key_id, *, context):
                seen.append(("encrypt", context))
                return super().encrypt(plaintext, key_id)

            def decrypt(self, ciphertext, key_id, *, context):
                seen.append(("decrypt", context))
                return super().decrypt(ciphertext, key_id)

        with SQLAlchemyTokenStore(database, cipher=Auditing()) as store:
            store.save_token(make_token(id="1", user="ada", client_id="c", refresh_token="r"))
            encrypted = [context for kind, context in seen if kind == "encrypt"]
            assert encrypted == [
                {"column": "user_name", "id": "1", "client_id": "c"},
                {"column": "refresh_token", "id": "1", "user_name": "ada", "client_id": "c"},
            ]
            del seen[:]
            assert store.find_token_by_id("1").get_refresh_token() == "r"
            assert [context for kind, context in seen if kind == "decrypt"][:2] == encrypted


@pytest.mark.parametrize("journal", ["DELETE", "PERSIST", "WAL"])
def test_no_secret_of_an_adopted_file_is_left_J3(tmp_path, journal):
    """Whatever SQLite was compiled with: Debian's overwrites what it deletes, upstream's not."""
    path = tmp_path / "tokens.db"
    engine = create_engine(f"sqlite:///{path}")

    @event.listens_for(engine, "connect")
    def set_up(connection, record):
        connection.execute(f"PRAGMA journal_mode = {journal}")
        connection.execute("PRAGMA secure_delete = OFF")

    secrets = [f"1000.{kind}.{number:060}" for number in range(200) for kind in ("r", "a", "s")]
    with engine.begin() as connection:
        connection.execute(text(SAMPLE_DDL))
        for number in range(200):
            refresh, access, secret = secrets[3 * number : 3 * number + 3]
            connection.execute(
                text("INSERT INTO oauthtoken VALUES (:i, :u, 'c', :s, :r, :a, NULL, 1, NULL, 'd')"),
                {"i": number, "u": f"user {number}", "s": secret, "r": refresh, "a": access},
            )
    # What the sample deleted long ago.
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM oauthtoken WHERE CAST(id AS INTEGER) >= 150"))
    provision.upgrade(engine)

    def left():
        content = b"".join(file.read_bytes() for file in tmp_path.iterdir())
        return [secret for secret in secrets if secret.encode() in content]

    assert len(left()) >= 450
    assert rotate_keys(engine, CIPHER, encrypt_plain_text=True).rotated == 150
    engine.dispose()
    assert left() == []
    with SQLAlchemyTokenStore(make_url(f"sqlite:///{path}"), cipher=CIPHER) as store:
        assert len(store.get_tokens()) == 150
