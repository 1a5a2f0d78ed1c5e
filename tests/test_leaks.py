"""Rule G3: nothing that comes out of a failure shows a secret, on any database."""

from __future__ import annotations

import asyncio
import logging
import pickle
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import sdk_process
from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from billiard.exceptions import SoftTimeLimitExceeded
from conftest import empty, on_sqlite
from databases import SERVERS
from leaks import found_in, logs_kept, texts_of
from rich.pretty import pretty_repr
from sdk_tokens import make_token
from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from test_signals import raised_by_a_signal
from zohocrmsdk.src.com.zoho.api.authenticator.oauth_token import OAuthToken
from zohocrmsdk.src.com.zoho.crm.api.initializer import Initializer

from zoho_orm_store import (
    AsyncTokenRepository,
    FernetCipher,
    MemoryTokenStore,
    SQLAlchemyTokenStore,
    StoredToken,
    TokenRecord,
    TokenRepository,
    ZohoOrmStoreError,
    provision,
    rotate_keys,
)
from zoho_orm_store._sdk.conversion import SDKException
from zoho_orm_store.encryption import generate_key
from zoho_orm_store.testing import LoopbackZoho
from zoho_orm_store.transfer import (
    FILE_HEADER,
    SDK_COLUMNS,
    FileStoreFile,
    TokenTable,
    export_tokens,
    import_tokens,
)

CLIENT_SECRET = "SECRET-client-0123456789abcdef"
REFRESH = "SECRET-refresh-0123456789abcdef"
ACCESS = "SECRET-access-0123456789abcdef"
GRANT = "SECRET-grant-0123456789abcdef"
PASSWORD = "SECRET-password-0123456789abcdef"
KEY = generate_key()
SECRETS = (CLIENT_SECRET, REFRESH, ACCESS, GRANT, PASSWORD, KEY)
CIPHER = FernetCipher(KEY)
FIELDS = {
    "client_secret": CLIENT_SECRET,
    "refresh_token": REFRESH,
    "access_token": ACCESS,
    "grant_token": GRANT,
}


WAIT_A_SECOND = {
    "sqlite": {"timeout": 1},
    "mysql": {"init_command": "SET innodb_lock_wait_timeout = 1"},
}
"""For locks. A store's own time limit does not end what an engine of the application's waits for."""

ADDRESSES = []
"""Where no local variable of a test shows them."""

ISSUED = []
"""The same for what the stand-in for Zoho has issued."""

SPOILED = (
    lambda secret: secret * 500,
    lambda secret: f"{secret}\0",
    lambda secret: f"{secret}\ud800",
    lambda secret: secret.encode(),
    lambda secret: [secret],
)
"""Values that cannot be stored."""


def raise_runtime_error(result):
    raise RuntimeError(f"what to do with {result!r}, or with {ACCESS}?")


def raise_value_error(result):
    raise ValueError(f"what to do with {result!r}, or with {ACCESS}?")


FAULTS = [
    *(("key_id", spoil) for spoil in (raise_runtime_error, len, str.encode)),
    *(("encrypt", spoil) for spoil in (raise_runtime_error, bytes.fromhex, len)),
    *(
        ("encrypt", lambda result, text=text: f"{bytes.fromhex(result)[32:].decode()}{text}")
        for text in ("é", "\udc80", "x" * 65_536)
    ),
    *(("decrypt", spoil) for spoil in (raise_runtime_error, raise_value_error, bytes.hex, len)),
    ("decrypt", lambda result: result + b"\xff"),
    ("decrypt", lambda result: result[32:]),
]
"""Members of a cipher, and what each makes of its right result."""


def token(**other):
    return make_token(**{"user": "ada", "client_id": "1000.C", **FIELDS, **other})


def record(**other):
    return TokenRecord(**{"user_name": "ada", "client_id": "1000.C", **FIELDS, **other})


def store_uses(store, **other):
    """Every method of a store, with a token that holds secrets."""
    yield lambda: store.save_token(token(**other))
    yield lambda: store.find_token(token(access_token=None, **other))
    yield lambda: store.find_token(make_token(refresh_token=REFRESH))
    yield lambda: store.find_token_by_id("1")
    yield store.get_tokens


def repository_uses(repository, **other):
    yield lambda: repository.save(record(**other))
    yield lambda: repository.find(record(**other))
    yield lambda: repository.find(TokenRecord(refresh_token=REFRESH))
    yield lambda: repository.get("1")
    yield repository.list
    yield lambda: [*repository.stream()]


def rotate(bind, cipher):
    for error in rotate_keys(bind, cipher, encrypt_plain_text=True).undecryptable:
        raise error


def failure_of(use):
    """What a use raises. A traceback begins here, where no local variable holds a secret."""
    try:
        use()
    except (SDKException, ZohoOrmStoreError) as error:
        return error
    return None


def assert_nothing_leaks(uses, *, failures):
    with logs_kept() as logs, logs_kept("SDKLogger") as sdk_logs:
        failed = [error for error in map(failure_of, uses) if error is not None]
    assert len(failed) >= failures, "the failures that this test is about did not happen"
    for error in failed:
        assert found_in([*texts_of(error)], SECRETS) == []
    assert found_in([*logs, *sdk_logs], SECRETS) == []


@contextmanager
def application_engine(url):
    """An engine of the application's, which shows parameters in its errors."""
    engine = create_engine(url, connect_args=WAIT_A_SECOND.get(url.get_backend_name(), {}))
    assert not engine.hide_parameters
    try:
        yield engine
    finally:
        engine.dispose()


@contextmanager
def bound_as(kind, url):
    """A database as a URL, or as an engine that shows parameters; and its URL."""
    if kind == "url":
        yield url, url
    else:
        with application_engine(url) as engine:
            yield engine, url


@pytest.fixture(params=["engine-plain", "url-encrypted"])
def way(request):
    """An engine that shows its parameters, which are plain text; and a URL, with a key to show."""
    return request.param


@pytest.fixture
def cipher(way):
    return CIPHER if "encrypted" in way else None


@pytest.fixture
def bound(way, database):
    """A database with our tables."""
    with bound_as(way.partition("-")[0], database) as bound:
        yield bound


@pytest.fixture
def bound_to_change(way, empty_database):
    """One with our tables, which a test may change."""
    provision.upgrade(empty_database)
    with bound_as(way.partition("-")[0], empty_database) as bound:
        yield bound


only_engines = pytest.mark.parametrize("way", ["engine-plain"])
"""For tests that do not depend on how a store is bound."""


def run_sql(url, *statements):
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()


def make_table_of_the_sdks(url):
    columns = ", ".join(f"{name} varchar(255)" for name in SDK_COLUMNS[1:])
    run_sql(
        url,
        f"CREATE TABLE oauthtoken (id varchar(10) PRIMARY KEY, {columns})",
        "INSERT INTO oauthtoken VALUES "
        f"('1', 'ada', 'c', '{CLIENT_SECRET}', '{REFRESH}', '{ACCESS}', '', '5', '', '')",
    )


def fail_at_updates(engine):
    """Let the database refuse every change of a row, at the moment of the change."""
    refuse = {
        "sqlite": "PRAGMA query_only = ON",
        "postgresql": "SET TRANSACTION READ ONLY",
        "mysql": "SET max_statement_time = 0.000001",
    }[engine.dialect.name]

    def before(connection, cursor, statement, *_):
        if re.match(r"UPDATE (public\.)?oauthtoken\b", statement) and "identity=" in statement:
            cursor.execute(refuse)

    event.listen(engine, "before_cursor_execute", before)


def on_the_connection(engine):
    with engine.begin() as connection:
        provision.upgrade(connection)


def by_alembic(engine):
    """As a project does it that has our revisions among its own."""
    scripts = ScriptDirectory(str(Path(provision.__file__).parent / "migrations"))

    def steps(heads, context):
        return scripts._upgrade_revs("head", heads)

    with engine.begin() as connection, EnvironmentContext(Config(), scripts, fn=steps) as project:
        project.configure(connection=connection)
        project.run_migrations()


REFUSING_TRIGGERS = {
    "postgresql": (
        "CREATE FUNCTION refuse() RETURNS trigger AS $$ BEGIN "
        "RAISE EXCEPTION 'no % here', NEW.redirect_url; END $$ LANGUAGE plpgsql",
        "CREATE TRIGGER refuse BEFORE INSERT ON oauthtoken FOR EACH ROW EXECUTE FUNCTION refuse()",
    ),
    "mariadb": (
        "CREATE TRIGGER refuse BEFORE INSERT ON oauthtoken FOR EACH ROW BEGIN "
        "DECLARE what VARCHAR(100) DEFAULT CONCAT('no ', NEW.redirect_url); "
        "SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = what; END",
    ),
}
REFUSING_TRIGGERS["mysql"] = REFUSING_TRIGGERS["mariadb"]


@contextmanager
def store_on(bind, **options):
    with SQLAlchemyTokenStore(bind, create_schema=False, **options) as store:
        yield store


class TestFailures:
    def test_a_table_that_is_missing(self, bound_to_change, cipher):
        bind, url = bound_to_change
        run_sql(url, "DROP TABLE oauthtoken")
        with store_on(bind, cipher=cipher) as store:
            assert_nothing_leaks(store_uses(store), failures=5)

    def test_a_column_that_is_missing(self, bound_to_change, cipher):
        bind, url = bound_to_change
        run_sql(url, "ALTER TABLE oauthtoken DROP COLUMN redirect_url")
        with store_on(bind, cipher=cipher) as store:
            assert_nothing_leaks(store_uses(store), failures=5)

    def test_a_row_that_the_database_refuses(self, bound_to_change, cipher):
        bind, url = bound_to_change
        # PostgreSQL's error shows the whole row, SQLAlchemy's all parameters.
        run_sql(url, "ALTER TABLE oauthtoken ADD COLUMN required INTEGER NOT NULL DEFAULT 1")
        if url.get_backend_name() == "sqlite":
            trigger = "BEFORE INSERT ON oauthtoken BEGIN SELECT RAISE(ABORT, 'no: '); END"
            run_sql(url, f"CREATE TRIGGER refuse {trigger}")
        else:
            run_sql(url, "ALTER TABLE oauthtoken ADD CONSTRAINT no_rows CHECK (required > 1)")
        with store_on(bind, cipher=cipher) as store:
            assert_nothing_leaks([lambda: store.save_token(token())], failures=1)

    @pytest.mark.parametrize("empty_database", SERVERS, indirect=True)
    def test_a_row_that_a_trigger_refuses_with_its_values(self, empty_database, request, cipher):
        provision.upgrade(empty_database)
        name = request.node.callspec.params["empty_database"]
        run_sql(empty_database, *REFUSING_TRIGGERS[name])
        with store_on(empty_database, cipher=cipher) as store:
            save = [lambda: store.save_token(token(redirect_url=ACCESS))]
            assert_nothing_leaks(save, failures=1)

    @only_engines
    def test_rows_of_the_applications_that_its_session_flushes(self, bound):
        _, url = bound
        with application_engine(url) as engine, Session(engine) as session:
            session.add(StoredToken(id="1", **FIELDS))  # without what must not be NULL
            repository = TokenRepository(session)
            assert_nothing_leaks([repository.count], failures=1)

    def test_a_value_that_the_column_cannot_hold(self, bound_to_change, cipher):
        bind, url = bound_to_change
        if url.get_backend_name() == "sqlite":
            run_sql(
                url,
                "CREATE TRIGGER refuse BEFORE INSERT ON oauthtoken "
                "BEGIN SELECT RAISE(ABORT, 'too long'); END",
            )
        else:
            statement = "ALTER TABLE oauthtoken MODIFY refresh_token VARCHAR(8)"
            if url.get_backend_name() == "postgresql":
                statement = "ALTER TABLE oauthtoken ALTER refresh_token TYPE VARCHAR(8)"
            run_sql(url, statement)
        with store_on(bind, cipher=cipher) as store:
            assert_nothing_leaks([lambda: store.save_token(token())], failures=1)

    def test_a_row_that_another_connection_keeps_locked(self, bound, cipher):
        bind, url = bound
        with store_on(url, cipher=cipher) as store:
            store.save_token(token(id="1"))
        with application_engine(url) as other, other.connect() as blocker:
            blocker.execute(text("UPDATE oauthtoken SET expiry_time = 1"))
            with store_on(bind, cipher=cipher, timeout=0.3) as store:
                save = [lambda: store.save_token(token(id="1", expires_in="5"))]
                assert_nothing_leaks(save, failures=1)
            blocker.rollback()

    def test_tokens_that_cannot_be_stored(self, bound, cipher):
        bind, _ = bound
        with store_on(bind, cipher=cipher) as store:
            store.save_token(token(id="1"))

            def uses():
                for name in FIELDS:
                    for spoil in SPOILED:
                        yield lambda name=name, spoil=spoil: store.save_token(
                            token(**{name: spoil(FIELDS[name])})
                        )
                yield lambda: store.save_token(token(expires_in=ACCESS))
                yield lambda: store.save_token(token(id="1", user="eve"))
                yield lambda: store.find_token(REFRESH)
                yield lambda: store.find_token_by_id(ACCESS.encode())

            assert_nothing_leaks(uses(), failures=len(FIELDS) * len(SPOILED) + 4)

    def test_rows_that_no_key_decrypts(self, bound):
        bind, url = bound
        with store_on(url, cipher=CIPHER) as store:
            store.save_token(token(id="1"))
            store.save_token(token(id="2", user="eve", **{"refresh_token": f"2{REFRESH}"}))
        for other in (None, FernetCipher(generate_key())):
            with store_on(bind, cipher=other) as store:
                assert_nothing_leaks(store_uses(store, id="1"), failures=5)
        run_sql(url, "UPDATE oauthtoken SET access_token = refresh_token")
        with store_on(bind, cipher=CIPHER) as store:
            assert_nothing_leaks(store_uses(store, id="1"), failures=5)

    @pytest.mark.parametrize(("member", "spoil"), FAULTS)
    @on_sqlite  # The cipher fails before anything reaches a database.
    @only_engines
    def test_a_cipher_that_fails(self, bound, member, spoil):
        self.assert_a_faulty_cipher_shows_nothing(bound, member, spoil)

    @pytest.mark.parametrize("member", ["key_id", "encrypt", "decrypt"])
    @pytest.mark.parametrize("way", ["url"])
    def test_a_cipher_that_raises_on_each_database(self, bound, member):
        self.assert_a_faulty_cipher_shows_nothing(bound, member, raise_runtime_error)

    def assert_a_faulty_cipher_shows_nothing(self, bound, member, spoil):
        bind, url = bound
        with store_on(url, cipher=FaultyCipher()) as store:
            store.save_token(token(id="1"))
        with store_on(url, cipher=FaultyCipher("key_id", lambda _: "old")) as store:
            store.save_token(token(id="2", user="eve", refresh_token=f"2{REFRESH}"))
        cipher = FaultyCipher(member, spoil)
        with store_on(bind, cipher=cipher) as store:
            assert_nothing_leaks(store_uses(store, id="1"), failures=1)
        with application_engine(url) as engine, engine.connect() as connection:
            repository = TokenRepository(connection, cipher=cipher)
            assert_nothing_leaks(repository_uses(repository, id="1"), failures=1)
        assert_nothing_leaks([lambda: rotate(bind, cipher)], failures=1)

    def test_the_repositories_in_a_session_of_the_applications(self, bound_to_change, cipher):
        _, url = bound_to_change
        run_sql(url, "DROP TABLE oauthtoken")
        with application_engine(url) as engine:
            for make in (lambda: Session(engine), engine.connect):

                def uses(make=make):
                    for number in range(6):
                        with make() as session:
                            repository = TokenRepository(session, cipher=cipher)
                            yield [*repository_uses(repository)][number]

                assert_nothing_leaks(uses(), failures=6)
            assert_nothing_leaks([lambda: rotate(engine, cipher or CIPHER)], failures=1)

    @pytest.mark.parametrize("way", ["engine-plain", "engine-encrypted"])
    def test_the_async_repository(self, bound_to_change, cipher):
        _, url = bound_to_change
        run_sql(url, "DROP TABLE oauthtoken")
        drivers = {"sqlite": "sqlite+aiosqlite", "mysql": "mysql+aiomysql"}
        driver = drivers.get(url.get_backend_name(), "postgresql+asyncpg")

        async def save():
            engine = create_async_engine(url.set(drivername=driver))
            try:
                async with AsyncSession(engine) as session:
                    await AsyncTokenRepository(session, cipher=cipher).save(record())
            finally:
                await engine.dispose()

        assert_nothing_leaks([lambda: asyncio.run(save())], failures=1)

    def test_a_store_on_an_async_driver(self, empty_database, cipher, way):
        drivers = {"sqlite": "sqlite+aiosqlite", "mysql": "mysql+asyncmy"}
        driver = drivers.get(empty_database.get_backend_name(), "postgresql+asyncpg")
        bind = url = empty_database.set(drivername=driver)
        provision.upgrade(url)
        if "engine" in way:
            bind = create_async_engine(url)
        with store_on(bind, cipher=cipher) as store:
            store.save_token(token(id="1"))
            assert_nothing_leaks([lambda: store.save_token(token(id="1", user="eve"))], failures=1)
            run_sql(empty_database, "ALTER TABLE oauthtoken DROP COLUMN redirect_url")
            assert_nothing_leaks(store_uses(store), failures=5)
            run_sql(empty_database, "DROP TABLE oauthtoken")
            assert_nothing_leaks(store_uses(store), failures=5)

    def test_imports_and_exports(self, bound, cipher, tmp_path):
        bind, url = bound
        path = tmp_path / "sdk_tokens.txt"
        line = f"1,ada,1000.C,{CLIENT_SECRET},{REFRESH},{ACCESS},{GRANT},soon,x,y\n"
        lines = f"{line}{line.replace('soon', ACCESS)}{line[:-20] * 3}"
        path.write_text(f"{','.join(FILE_HEADER)}\n{lines}")
        with logs_kept() as logs:
            summary = import_tokens(FileStoreFile(path), bind, cipher=cipher)
        assert len(summary.refused) == 3
        assert found_in([*summary.refused, repr(summary), *logs], SECRETS) == []
        with store_on(url, cipher=CIPHER) as store:
            store.save_token(token(id="1"))
        assert_nothing_leaks(
            [
                lambda: import_tokens(FileStoreFile(path), bind, strict=True),
                lambda: import_tokens(TokenTable(url, "nothing"), bind),
                lambda: export_tokens(bind, tmp_path / "out.txt"),
                lambda: export_tokens(bind, path),
            ],
            failures=4,
        )

    @pytest.mark.parametrize("run", [on_the_connection, by_alembic], ids=["connection", "alembic"])
    def test_a_migration_in_a_transaction_of_the_applications(self, empty_database, run):
        make_table_of_the_sdks(empty_database)
        with application_engine(empty_database) as engine:
            fail_at_updates(engine)
            assert_nothing_leaks([lambda: run(engine)], failures=1)

    def test_looking_at_the_schema_on_a_connection(self, empty_database):
        uses = (provision.current, provision.check, provision.is_current, provision.downgrade)
        with application_engine(empty_database) as engine:
            for use in uses:
                with engine.connect() as connection:
                    connection.close()
                    assert_nothing_leaks([lambda: use(connection)], failures=1)  # noqa: B023

    def test_databases_that_cannot_be_reached(self, empty_database, tmp_path, monkeypatch):
        monkeypatch.setattr("zoho_orm_store.provision._PATIENCE", 2.0)  # for a server that starts
        url = empty_database
        if url.get_backend_name() == "sqlite":
            unreachable = [f"sqlite:///{tmp_path}/no/such/folder.db"]
        else:
            unreachable = [
                url.set(username=f"u{n}", password=PASSWORD, port=port, database=database)
                for n, (port, database) in enumerate([(1, "x"), (url.port, "no_such_database")])
            ]
        for each in unreachable:
            with store_on(each, timeout=2) as store:
                assert_nothing_leaks(store_uses(store), failures=5)
                ADDRESSES.append(str(each).replace("***", PASSWORD))
                assert_nothing_leaks([lambda: provision.upgrade(ADDRESSES[-1])], failures=1)
                assert PASSWORD not in repr(store) + pretty_repr(store)

    def test_arguments_that_cannot_be_used(self):
        uses = [
            lambda: FernetCipher(KEY[:-3]),
            lambda: FernetCipher([KEY, f"{KEY[:-2]}!="]),
            lambda: FernetCipher(lambda: KEY[:-3]),
            lambda: SQLAlchemyTokenStore(f"nonsense://u:{PASSWORD}@host/x"),
            lambda: SQLAlchemyTokenStore(f"postgresql://u:{PASSWORD}@host:port/x"),
            lambda: SQLAlchemyTokenStore(f"u:{PASSWORD}@host"),
            lambda: SQLAlchemyTokenStore("sqlite://", timeout=-1),
            lambda: SQLAlchemyTokenStore(f"sqlite:///x?timeout={PASSWORD}"),
            lambda: [*TokenTable(f"sqlite:///x?timeout={PASSWORD}")],
            lambda: [*TokenTable(f"nonsense://u:{PASSWORD}@host/x")],
            lambda: [*TokenTable(f"postgresql+psycopg://u:{PASSWORD}@127.0.0.1:1/x")],
            lambda: SQLAlchemyTokenStore("sqlite://", cipher=KEY),
            lambda: TokenRepository(None, cipher=KEY),
            lambda: AsyncTokenRepository(None, cipher=KEY),
            lambda: TokenTable("sqlite://", cipher=KEY),
        ]
        assert_nothing_leaks(uses, failures=15)

    def test_keys_without_the_package_that_uses_them(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "cryptography.fernet", None)
        monkeypatch.setenv("ZOHO_ORM_STORE_KEYS", KEY)
        uses = [
            lambda: FernetCipher(KEY),
            lambda: FernetCipher([KEY]),
            lambda: FernetCipher(lambda: KEY),
            FernetCipher,
        ]
        assert_nothing_leaks(uses, failures=4)

    def test_the_memory_store(self):
        store = MemoryTokenStore()
        uses = [
            lambda: store.save_token(token(access_token=ACCESS * 500)),
            lambda: store.save_token(token(access_token=f"{ACCESS}\0")),
            lambda: store.find_token(ACCESS),
            lambda: store.save_token(token(expires_in=ACCESS)),
        ]
        assert_nothing_leaks(uses, failures=4)


class FaultyCipher:
    """A cipher of somebody else's, one of whose members goes wrong."""

    def __init__(self, member="", spoil=None):
        self._member = member
        self._spoil = spoil

    def _made(self, member, result):
        return self._spoil(result) if member == self._member else result

    @property
    def key_id(self):
        return self._made("key_id", "k")

    def encrypt(self, plaintext, key_id):
        return self._made("encrypt", plaintext.hex())

    def decrypt(self, ciphertext, key_id):
        return self._made("decrypt", bytes.fromhex(ciphertext))


def test_no_object_shows_a_secret(database):
    drivers = {"sqlite": "sqlite+aiosqlite", "mysql": "mysql+asyncmy"}
    driver = drivers.get(database.get_backend_name(), "postgresql+asyncpg")
    async_session = AsyncSession(create_async_engine(database.set(drivername=driver)))
    with SQLAlchemyTokenStore(database, cipher=CIPHER) as store:
        store.save_token(token(id="1"))
        with application_engine(database) as engine, Session(engine) as session:
            repository = TokenRepository(session, cipher=CIPHER)
            row = session.get(StoredToken, "1")
            memory = MemoryTokenStore()
            memory.save_token(token())
            found = repository.get("1")
            uses = (
                store, memory, repository, found, row, CIPHER, record(), [record()],
                TokenRecord(access_token=[ACCESS]), AsyncTokenRepository(async_session, cipher=CIPHER),
            )  # fmt: skip
            texts = [show(each) for each in uses for show in (repr, str, pretty_repr)]
    assert found_in(texts, SECRETS) == []
    assert "…cdef" in repr(found)


def test_the_logs_of_a_life_show_no_secret(database):
    with logs_kept() as logs, SQLAlchemyTokenStore(database, cipher=CIPHER) as store:
        store.save_token(token(id="1"))
        store.find_token(token(id="1", access_token=None))
        store.save_token(token(id="1", access_token=f"{ACCESS}2"))
        store.get_tokens()
        store.delete_token("1")
    assert found_in(logs, SECRETS) == []


@contextmanager
def same_user_being_saved(url):
    """Let another first save of the user wait with its values in hand."""
    with application_engine(url) as engine, engine.connect() as connection:
        TokenRepository(connection).save(record(id="1"))
        yield


class TestInterrupted:
    """What passes through a call, plain text in hand, shows no more than what is raised in it."""

    @pytest.mark.parametrize("name", SERVERS)
    def test_an_async_save_that_is_cancelled(self, name, provisioned):
        url = provisioned(name)
        empty(url)
        driver = {"postgresql": "postgresql+asyncpg"}.get(name, "mysql+asyncmy")

        async def cancel_a_save():
            engine = create_async_engine(url.set(drivername=driver))
            try:
                with same_user_being_saved(url):
                    async with AsyncSession(engine) as session:
                        saving = AsyncTokenRepository(session).save(record(id="2"))
                        await asyncio.wait_for(saving, 0.3)
            finally:
                await engine.dispose()

        with pytest.raises(asyncio.TimeoutError) as raised:
            asyncio.run(cancel_a_save())
        assert found_in(texts_of(raised.value), SECRETS) == []

    @pytest.mark.parametrize("interruption", [SoftTimeLimitExceeded, KeyboardInterrupt])
    @pytest.mark.parametrize("name", SERVERS)
    def test_a_save_that_a_signal_ends(self, name, provisioned, interruption):
        url = provisioned(name)
        empty(url)
        with SQLAlchemyTokenStore(url, timeout=20) as store:
            error = interruption("too long")
            interrupted = raised_by_a_signal(error, 0.2)
            with pytest.raises(interruption) as raised, same_user_being_saved(url), interrupted:
                store.save_token(token(id="2"))
        assert raised.value is error
        assert found_in(texts_of(error), SECRETS) == []
        if name != "postgresql":  # psycopg removes all frames from some exceptions itself.
            assert raised.traceback[-1].name == "handle", "the application's own frames are kept"

    def test_a_transaction_that_the_application_ends(self, database):
        class ApplicationError(Exception):
            pass

        def end():
            raise ApplicationError

        engine = create_engine(database)

        @event.listens_for(engine, "after_cursor_execute")
        def fail(connection, cursor, statement, *_):
            if statement.startswith(("INSERT", "UPDATE")):
                end()

        with pytest.raises(ApplicationError) as raised, SQLAlchemyTokenStore(engine) as store:
            store.save_token(token(id="1"))
        *ours, listener, last = raised.traceback  # The listener was given the values.
        assert (listener.name, last.name) == ("fail", "end")
        modules = {each.frame.f_globals["__name__"].partition(".")[0] for each in ours}
        assert modules == {__name__, "zoho_orm_store"}
        engine.dispose()


@on_sqlite
@pytest.mark.parametrize("answer", ["refused", "none", "interrupted"])
def test_a_refresh_that_fails_shows_no_secret(database, answer, monkeypatch, tmp_path):
    """The commonest failure of all; the SDK's own frames hold what it sends."""
    monkeypatch.setattr(Initializer, "initializer", None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    class Interrupted(BaseException):
        pass

    def interrupt(url, data=None, **_):
        raise Interrupted

    with LoopbackZoho() as zoho, SQLAlchemyTokenStore(database) as store:
        ISSUED[:] = [zoho.client_secret, zoho.issue_refresh_token()]
        asked = OAuthToken(
            client_id=zoho.client_id, client_secret=ISSUED[0], refresh_token=ISSUED[1]
        )
        if answer == "refused":
            zoho.revoke(ISSUED[1])
        elif answer == "none":
            zoho.close()
        else:
            monkeypatch.setattr("requests.post", interrupt)
        expected = Interrupted if answer == "interrupted" else SDKException
        store.initialize_sdk(zoho.environment(), resource_path=str(tmp_path))
        with pytest.raises(expected) as raised, store.acting_as(asked):
            sdk_process.whoami()
    Initializer.LOCAL.init = None
    found = found_in(texts_of(raised.value), tuple(ISSUED))
    assert found == []


@pytest.mark.parametrize("way", ["echo", "debug", "levels"])
def test_sqlalchemys_logs_show_no_secret_of_a_stores_own_engine(database, way, capsys):
    options = {"echo": {"echo": True}, "debug": {"echo": "debug"}, "levels": None}[way]
    opened = SQLAlchemyTokenStore(database, engine_options=options)
    with logs_kept("sqlalchemy") as logs, opened as store:
        store.save_token(token(id="1"))
        store.save_token(token(id="1", access_token=f"{ACCESS}2"))
        store.find_token(token(refresh_token=REFRESH))
        assert store.find_token_by_id("1").get_refresh_token() == REFRESH
        assert len(store.get_tokens()) == 1
        with store.transaction() as tokens:
            assert tokens.list()
    shown = [*logs, *capsys.readouterr()]
    assert any("SELECT" in each for each in shown), "the search itself must see statements"
    assert found_in(shown, SECRETS) == []


class TestTheSearchItself:
    """It finds a secret that is planted on purpose, in one place of each kind."""

    @staticmethod
    def raised(raise_it):
        try:
            raise_it()
        except Exception as error:  # noqa: BLE001 - whatever is planted
            return found_in(texts_of(error), SECRETS)
        raise AssertionError

    def test_in_a_message(self):
        def plant():
            raise ZohoOrmStoreError(f"the token {ACCESS}")

        assert self.raised(plant)

    def test_in_a_cause(self):
        def plant():
            raise ZohoOrmStoreError("no") from ValueError(ACCESS)

        assert self.raised(plant)

    def test_in_a_context_that_is_suppressed(self):
        def plant():
            try:
                raise ValueError(ACCESS)
            except ValueError:
                raise ZohoOrmStoreError("no") from None

        assert self.raised(plant)

    def test_in_an_attribute(self):
        def plant():
            error = ZohoOrmStoreError("no")
            error.statement = ACCESS
            raise error

        assert self.raised(plant)

    def test_in_a_local_variable(self):
        def plant():
            planted = {"access_token": ACCESS}
            raise ZohoOrmStoreError(f"no {len(planted)}")

        assert self.raised(plant)

    def test_in_sqlalchemys_parameters(self):
        def plant():
            with create_engine("sqlite://").connect() as connection:
                connection.execute(text("SELECT :a FROM nothing"), {"a": ACCESS})

        with pytest.raises(SQLAlchemyError):
            plant()
        assert self.raised(plant)

    def test_in_a_log_record(self):
        with logs_kept() as logs:
            logging.getLogger("zoho_orm_store.anything").debug("saved %s", ACCESS)
        assert found_in(logs, SECRETS)

    def test_in_a_repr_and_in_a_pickle(self):
        planted = {"access_token": ACCESS}
        assert found_in([repr(planted)], SECRETS)
        assert ACCESS.encode() in pickle.dumps(planted)
