"""Taking over what the SDK's own stores have kept, and giving it back."""

from __future__ import annotations

import csv
import errno
import io
import itertools
import sqlite3
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic

import pytest
from conftest import on_sqlite
from databases import SERVERS
from sdk_tokens import FULL, known, make_token
from sqlalchemy import create_engine, text
from zohocrmsdk.src.com.zoho.api.authenticator.store import DBStore, FileStore

from zoho_orm_store import (
    ConfigurationError,
    DatabaseError,
    FernetCipher,
    InvalidTokenError,
    SQLAlchemyTokenStore,
    StoredToken,
    TokenRecord,
    generate_key,
    provision,
)
from zoho_orm_store._adding import NewTokens
from zoho_orm_store._tokens import Filters, TokenOperations
from zoho_orm_store.transfer import (
    FILE_HEADER,
    FileStoreFile,
    Found,
    TokenTable,
    _save_record,
    export_tokens,
    import_tokens,
)

USERS = ["u1@example.com:1", 'o\'brien, "the" one:2', "josé:3"]
SDK_DDL = (
    "CREATE TABLE {name} (id varchar(10) NOT NULL, user_name varchar(255), client_id varchar(255), "
    "client_secret varchar(255), refresh_token varchar(255), access_token varchar(255), "
    "grant_token varchar(255), expiry_time varchar(20), redirect_url varchar(255), "
    "api_domain varchar(255), primary key (id))"
)


def tokens_of(store):
    return sorted((known(token) for token in store.get_tokens()), key=str)


def sdk_tokens():
    for number, user in enumerate(USERS, 1):
        yield make_token(
            **FULL
            | {
                "id": str(number),
                "user": user,
                "refresh_token": f"r{number}",
                "access_token": f"a{number}",
                "grant_token": None,
                "expires_in": "1900000000000",
            }
        )


@pytest.fixture
def file(tmp_path):
    """A file that the SDK's own FileStore has written."""
    path = tmp_path / "sdk_tokens.txt"
    store = FileStore(str(path))
    for token in sdk_tokens():
        store.save_token(token)
    return path


class TestFileStore:
    def test_every_token_is_taken_over_and_a_second_time_nothing_changes(self, file, database):
        theirs = sorted((known(token) for token in FileStore(str(file)).get_tokens()), key=str)
        assert import_tokens(FileStoreFile(file), database) == (3, 0, 0, (), ())
        with SQLAlchemyTokenStore(database) as store:
            assert tokens_of(store) == theirs
            before = [token.get_id() for token in store.get_tokens()]
            assert import_tokens(FileStoreFile(file), database) == (0, 0, 3, (), ())
            assert [token.get_id() for token in store.get_tokens()] == before

    @on_sqlite
    def test_an_older_file_of_nine_columns(self, tmp_path, database):
        path = tmp_path / "old.txt"
        path.write_text(
            "id,user_name,client_id,client_secret,refresh_token,access_token,grant_token,"
            "expiry_time,redirect_uri\n1,u,c,s,r,a,,5,\n"
        )
        assert import_tokens(FileStoreFile(path), database).added == 1
        with SQLAlchemyTokenStore(database) as store:
            (token,) = store.get_tokens()
        assert (token.get_refresh_token(), token.get_api_domain()) == ("r", None)

    @on_sqlite
    def test_a_file_of_the_first_generation(self, tmp_path, database):
        path = tmp_path / "first.txt"
        path.write_text(
            "user_mail,client_id,refresh_token,access_token,grant_token,expiry_time\n"
            "one@x,c,r1,a1,,5\ntwo@x,c,r2,,g2,\nbroken,c,r3\n"
        )
        summary = import_tokens(FileStoreFile(path), database)
        assert summary[:3] == (2, 0, 0)
        assert summary.refused == ("line 4: It has 3 columns instead of six.",)
        with SQLAlchemyTokenStore(database, refresh=None) as store:
            one, two = tokens_of(store)
        expected = {"user_name": "one@x", "client_id": "c", "refresh_token": "r1"}
        assert one.items() >= (expected | {"access_token": "a1", "expiry_time": 5}).items()
        assert (two["user_name"], two["grant_token"]) == ("two@x", "g2")

    def test_a_known_user_is_updated_and_keeps_its_id(self, file, database):
        with SQLAlchemyTokenStore(database) as store:
            mine = make_token(user=USERS[0], client_id=FULL["client_id"], refresh_token="old")
            store.save_token(mine)
            summary = import_tokens(FileStoreFile(file), database)
            assert summary == (2, 1, 0, (), (("1", mine.get_id()),))
            assert store.find_token_by_id(mine.get_id()).get_refresh_token() == "r1"

    @on_sqlite
    def test_an_id_alone_proves_nothing_and_a_changed_one_is_reported_E5_F5(self, file, database):
        with SQLAlchemyTokenStore(database) as store:
            stranger = make_token(id="1", user="stranger", refresh_token="mine")
            store.save_token(stranger)
            tried = import_tokens(FileStoreFile(file), database, dry_run=True)
            summary = import_tokens(FileStoreFile(file), database)
            assert tried == summary
            assert summary.added == 3
            ((old, new),) = summary.renumbered
            assert old == "1"
            assert store.find_token_by_id("1").get_refresh_token() == "mine"
            assert store.find_token_by_id(new).get_refresh_token() == "r1"
            assert len(store.get_tokens()) == 4
            again = import_tokens(FileStoreFile(file), database)
            assert again == (0, 0, 3, (), (("1", new),))

    @on_sqlite
    @pytest.mark.parametrize(
        ("first", "expected"),
        [
            ("1,id,c,s,r,a,,5,,https://x", ("id", 5)),
            ("1,,c,s,r,a,,,,", (None, None)),
            ("1,u,c,s,r,a,,5,", ("u", 5)),
            ("u,c,r,a,,5", ("u", 5)),
            ("user_name,client_id,r,,,", ("user_name", None)),
        ],
    )
    def test_no_token_is_taken_for_the_header(self, tmp_path, database, first, expected):
        second = {10: "2,v,c,s,r2,,,,,", 9: "2,v,c,s,r2,,,,", 6: "v,c,r2,,,"}
        path = tmp_path / "headerless.txt"
        path.write_text(f"{first}\n{second[first.count(',') + 1]}\n")
        assert import_tokens(FileStoreFile(path), database).added == 2
        with SQLAlchemyTokenStore(database, refresh=None) as store, store.transaction() as tokens:
            found = {record.refresh_token: record for record in tokens.list()}
        assert (found["r"].user_name, found["r"].expiry_time) == expected

    @on_sqlite
    @pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r\r\n"])
    def test_headers_of_any_release_and_editor(self, tmp_path, database, line_end):
        ten = [",".join(FILE_HEADER), "1,u,c,s,r,a,,5,,", ""]
        for beginning in ("", "\ufeff", line_end):
            path = tmp_path / "edited.txt"
            path.write_bytes((beginning + line_end.join(ten)).encode())
            assert [found.record.id for found in FileStoreFile(path)] == ["1"]

    @on_sqlite
    def test_a_later_access_token_that_is_stored_already_is_kept_C2(self, file, database):
        with SQLAlchemyTokenStore(database) as store:
            store.save_token(
                make_token(
                    user=USERS[0],
                    client_id=FULL["client_id"],
                    refresh_token="r1",
                    access_token="later",
                    expires_in="1900000000001",
                )
            )
            import_tokens(FileStoreFile(file), database)
            found = store.find_token(make_token(user=USERS[0], client_id=FULL["client_id"]))
        assert (found.get_access_token(), found.get_expires_in()) == ("later", "1900000000001")

    @on_sqlite
    def test_a_dry_run_tells_and_changes_nothing(self, file, database):
        assert import_tokens(FileStoreFile(file), database, dry_run=True).added == 3
        with SQLAlchemyTokenStore(database) as store:
            assert store.get_tokens() == []

    @on_sqlite
    def test_a_broken_line_is_named_and_the_others_go_in(self, file, database):
        with file.open("a", newline="") as opened:
            lines = csv.writer(opened)
            lines.writerow(["4", "u4"])
            lines.writerow(["5", "u5", "c", "s3cret", "r5", "a5", "", "soon", "", ""])
            lines.writerow(["6", "u6", "c", "s3cret", "", "", "", "", "", ""])
            lines.writerow(["7", "u7", "c", "s3cret", "r" * 5000, "", "", "", "", ""])
            lines.writerow(["8", "u8", "c", "s", "r8", "", "", "", "", ""])
        summary = import_tokens(FileStoreFile(file), database)
        assert summary.added == 4
        assert [problem.partition(":")[0] for problem in summary.refused] == [
            "line 5",
            "line 6",
            "line 7",
            "line 8",
        ]
        assert "s3cret" not in "".join(summary.refused)

    def test_or_nothing_goes_in_when_strict(self, file, database):
        with file.open("a") as opened:
            opened.write("4,u4\n")
        with pytest.raises(InvalidTokenError, match="Nothing was imported, because of line 5: It"):
            import_tokens(FileStoreFile(file), database, strict=True)
        with SQLAlchemyTokenStore(database) as store:
            assert store.get_tokens() == []

    @pytest.mark.parametrize("name", ["missing.txt", ".", "a\0b"])
    def test_a_file_that_cannot_be_read(self, tmp_path, name):
        with pytest.raises(ConfigurationError, match="Cannot read"):
            import_tokens(FileStoreFile(tmp_path / name), "sqlite://")

    @pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="only Linux has such a file")
    def test_a_file_whose_reading_fails(self):
        with pytest.raises(
            ConfigurationError, match="Cannot read /proc/self/mem: Input/output error"
        ):
            import_tokens(FileStoreFile("/proc/self/mem"), "sqlite://")

    @on_sqlite
    def test_a_disk_that_fails_in_the_middle(self, file, database, monkeypatch):
        class Failing(io.StringIO):
            def readline(self, size=-1):
                if self.tell() > 200:
                    raise OSError(errno.EIO, "Input/output error")
                return super().readline(size)

        text = file.read_text()
        monkeypatch.setattr(Path, "open", lambda *_, **__: Failing(text))
        with pytest.raises(ConfigurationError, match=r"Cannot read .*: Input/output error"):
            import_tokens(FileStoreFile(file), database)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"name,mail\nx,y\n", "number of columns in its first line is 2 instead of"),
            (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0", "number of columns in its first line is 1 "),
            (b"\0" * 5000, "its first line"),
            (b"SQLite format 3\0" + b"\0" * 5000, "its first line"),
            (",".join(FILE_HEADER).encode("utf-16"), "its first line"),
            (b"x" * 3_000_000, "a line is longer than"),
            (
                b"id,name,mail,a,b,c,d,e,f,g\n1,n,m,a,b,c,d,e,f,g\n",
                "neither the header nor a token",
            ),
            (b'{"access_token": "s3cret"}', "number of columns in its first line is 1 "),
        ],
    )
    def test_a_file_of_something_else_is_named_in_one_line(self, tmp_path, content, reason):
        path = tmp_path / "other"
        path.write_bytes(content)
        with pytest.raises(ConfigurationError, match="not a file of the SDK's FileStore") as raised:
            import_tokens(FileStoreFile(path), "sqlite://")
        assert reason in str(raised.value)
        assert "\n" not in str(raised.value)
        assert "s3cret" not in str(raised.value)

    @on_sqlite
    def test_bytes_that_are_not_utf_8_cost_their_line_alone(self, file, database):
        with file.open("ab") as opened:
            opened.write(
                b"8,jos\xe9,c,s,r8,a,,,,\r\n9,z\0ro,c,s,r9,a,,,,\r\n10,u10,c,s,r10,a,,,,\r\n"
            )
            opened.write(b"\0" * 4096)
        summary = import_tokens(FileStoreFile(file), database)
        assert summary.added == 4
        assert [problem.partition(":")[0] for problem in summary.refused] == [
            "line 5",
            "line 6",
            "line 8",
        ]

    @on_sqlite
    @pytest.mark.parametrize("mode", ["", "dry_run", "strict"])
    def test_reading_stops_after_a_thousand_broken_lines(self, tmp_path, database, mode):
        read = []

        class Endless(FileStoreFile):
            def _bounded_lines(self, file):
                yield ",".join(FILE_HEADER) + "\n"
                for number in itertools.count():
                    read.append(number)
                    yield "1,u,c,s,r,a,,5,,\n" if number < 1 else "broken,line\n"

        path = tmp_path / "broken.txt"
        path.touch()
        expected = {
            "": "number 1001, because 1000 tokens cannot be imported. Tokens imported before that: 1.",
            "dry_run": "because 1000 tokens cannot be imported. A dry run imports nothing. The first",
            "strict": "Nothing was imported, because of line 3: It has 2 columns",
        }[mode]
        with pytest.raises(InvalidTokenError) as raised:
            import_tokens(Endless(path), database, **{mode: True} if mode else {})
        assert expected in str(raised.value)
        assert "\n" not in str(raised.value)
        assert len(read) < 1600

    @on_sqlite
    def test_progress_is_told_and_batches_are_bounded(self, tmp_path, database):
        path, told = tmp_path / "many.txt", []
        with path.open("w", newline="") as opened:
            lines = csv.writer(opened)
            lines.writerow(["id"] * 10)
            lines.writerows(
                [n, f"u{n}", "c", "s", f"r{n}", "", "", "", "", ""] for n in range(1200)
            )
        summary = import_tokens(FileStoreFile(path), database, on_progress=told.append)
        assert summary.added == 1200
        assert told == [500, 1000, 1200]
        told.clear()
        import_tokens(FileStoreFile(path), database, dry_run=True, on_progress=told.append)
        assert told == [500, 1000, 1200]


@pytest.mark.parametrize("number_of_keys", [0, 2])
def test_two_imports_at_once_beside_workers_end_with_one_row_each_E4_E7(
    tmp_path, database, number_of_keys
):
    """Some workers know a token by its refresh token alone, others by its user as well."""
    path, numbers = tmp_path / "many.txt", range(260)
    with path.open("w", newline="") as opened:
        lines = csv.writer(opened)
        lines.writerow(FILE_HEADER)
        lines.writerows([n, f"u{n}", "c", "s", f"r{n}", "", "", "", "", ""] for n in numbers)
    keys = [generate_key() for _ in range(number_of_keys)]
    # In the middle of a change of keys, processes encrypt under different ones.
    ciphers = [FernetCipher(keys), FernetCipher(keys[::-1])] if keys else [None, None]

    def save(cipher, *, knows_user):
        with SQLAlchemyTokenStore(database, cipher=cipher) as store:
            for n in numbers[::10]:
                user = f"u{n}" if knows_user else None
                token = make_token(
                    refresh_token=f"r{n}", access_token=f"a{n}", client_id="c", user=user
                )
                store.save_token(token)

    with ThreadPoolExecutor(4) as pool:
        work = [
            *(
                pool.submit(import_tokens, FileStoreFile(path), database, cipher=each)
                for each in ciphers
            ),
            pool.submit(save, ciphers[0], knows_user=True),
            pool.submit(save, ciphers[1], knows_user=False),
        ]
        summaries = [each.result() for each in work][:2]
    assert all(summary.refused == () for summary in summaries)
    with SQLAlchemyTokenStore(database, cipher=ciphers[0]) as store:
        tokens = store.get_tokens()
    assert len(tokens) == len(numbers)
    assert {(t.get_user_signature().get_name(), t.get_refresh_token()) for t in tokens} == {
        (f"u{n}", f"r{n}") for n in numbers
    }


@pytest.mark.parametrize("database", SERVERS, indirect=True)
@pytest.mark.parametrize(("stored", "imported"), [(20, 10), (20, 500)])
def test_an_import_does_not_lock_the_rows_of_others(database, stored, imported):
    """MySQL and MariaDB lock every row that a statement reads."""
    operations = TokenOperations.of_model(StoredToken, None, None)
    new = [TokenRecord(user_name=f"new{n}", refresh_token=f"n{n}") for n in range(imported)]
    engine = create_engine(database)
    with SQLAlchemyTokenStore(database, timeout=5) as store:
        for n in range(stored):
            store.save_token(make_token(user=f"u{n}", refresh_token=f"r{n}"))
        with engine.connect() as connection:
            assert None not in NewTokens(operations).add(connection, new)
            store.save_token(make_token(user="u7", refresh_token="r7", access_token="changed"))
            connection.rollback()
        assert store.find_token(make_token(user="u7")).get_access_token() == "changed"
    engine.dispose()


@pytest.mark.parametrize("empty_database", SERVERS, indirect=True)
class TestConstraintsOfTheProjects:
    @pytest.fixture
    def constrained(self, empty_database):
        provision.upgrade(empty_database)
        engine = create_engine(empty_database)
        with engine.begin() as connection:
            connection.execute(
                text(
                    "ALTER TABLE oauthtoken ADD CONSTRAINT known "
                    "CHECK (user_name IS NOT NULL AND user_name <> 'u2@example.com')"
                )
            )
        engine.dispose()
        return empty_database

    def test_hold_for_what_an_import_writes_meanwhile(self, constrained):
        found = [Found("1", TokenRecord(user_name="u1@example.com", refresh_token="r1"))]
        assert import_tokens(found, constrained).added == 1

    def test_are_named_at_once_if_a_token_breaks_them(self, constrained):
        found = [Found("1", TokenRecord(user_name="u2@example.com", refresh_token="r1"))]
        started = monotonic()
        with pytest.raises(DatabaseError, match="known"):
            import_tokens(found, constrained)
        assert monotonic() - started < 5


def test_tokens_are_listed_in_the_order_of_their_source(database):
    found = [
        Found(f"{n}", TokenRecord(id=f"{n}", user_name=f"u{n}", refresh_token=f"r{n}"))
        for n in range(1, 13)
    ]
    import_tokens(found, database)
    with SQLAlchemyTokenStore(database) as store:
        assert [token.get_id() for token in store.get_tokens()] == [f"{n}" for n in range(1, 13)]


@on_sqlite
def test_a_refused_line_is_refused_whatever_comes_after_it(database):
    found = [
        Found("line 1", TokenRecord(user_name="u")),
        Found("line 2", TokenRecord(user_name="u", refresh_token="r")),
    ]
    with pytest.raises(InvalidTokenError, match="line 1"):
        import_tokens(found, database, strict=True)
    summary = import_tokens(found, database)
    assert (summary.added, len(summary.refused), summary.renumbered) == (1, 1, ())


@pytest.mark.parametrize("database", SERVERS, indirect=True)
def test_a_token_that_a_worker_has_refreshed_since_the_import_began_is_kept_C2(database):
    """MySQL goes on reading what was there when the transaction began to read."""
    operations = TokenOperations.of_model(StoredToken, None, None)
    engine = create_engine(database)
    with SQLAlchemyTokenStore(database) as store, engine.begin() as connection:
        store.save_token(
            make_token(user="u", refresh_token="r", access_token="1", expires_in="100")
        )
        assert operations.count(connection, Filters()) == 1
        store.save_token(
            make_token(user="u", refresh_token="r", access_token="3", expires_in="300")
        )
        _save_record(
            connection,
            operations,
            TokenRecord(user_name="u", refresh_token="r", access_token="2", expiry_time=200),
        )
        connection.commit()
        found = store.find_token(make_token(user="u"))
    assert (found.get_access_token(), found.get_expires_in()) == ("3", "300")
    engine.dispose()


class TestTables:
    @on_sqlite
    def test_a_table_of_the_sample_store(self, tmp_path, database):
        path = tmp_path / "zohooauth.db"
        with sqlite3.connect(path) as connection:
            connection.execute(SDK_DDL.format(name="oauthtoken"))
            connection.executemany(
                f"INSERT INTO oauthtoken VALUES ({','.join('?' * 10)})",
                [
                    ("1", "u", "c", "s", "r", "a", None, "5", None, ""),
                    ("2", "u", "c", "s", "r", "b", None, "9", None, None),
                    ("10", "v", "c", "s", "rv", "", "", None, None, None),
                ],
            )
        connection.close()
        summary = import_tokens(TokenTable(f"sqlite:///{path}"), database)
        assert summary == (2, 1, 0, (), (("2", "1"),))
        with SQLAlchemyTokenStore(database) as store:
            found = store.find_token(make_token(user="u"))
        assert (found.get_access_token(), found.get_expires_in()) == ("b", "9")

    @pytest.mark.parametrize("name", ["mariadb"])
    def test_a_table_that_the_sdks_dbstore_has_filled(self, name, provisioned, tmp_path):
        url = provisioned(name)
        engine = create_engine(url)
        with engine.begin() as connection:
            connection.execute(text("DELETE FROM oauthtoken"))
            connection.execute(text(SDK_DDL.format(name="their_tokens")))
        theirs = DBStore(
            host=url.host,
            database_name=url.database,
            user_name=url.username,
            password=url.password or "",
            port_number=str(url.port),
            table_name="their_tokens",
        )
        for token in sdk_tokens():
            theirs.save_token(token)
        expected = sorted((known(token) for token in theirs.get_tokens()), key=str)
        assert import_tokens(TokenTable(url, "their_tokens"), url).added == 3
        with SQLAlchemyTokenStore(url) as store:
            assert tokens_of(store) == expected
        with engine.begin() as connection:
            connection.execute(text("DROP TABLE their_tokens"))
        engine.dispose()

    def test_from_one_database_of_ours_to_another(self, file, database, tmp_path):
        first = f"sqlite:///{tmp_path / 'first.db'}"
        provision.upgrade(first)
        import_tokens(FileStoreFile(file), first)
        assert import_tokens(TokenTable(first), database).added == 3
        assert import_tokens(TokenTable(database), first) == (0, 0, 3, (), ())

    def test_what_is_no_table_of_tokens(self, tmp_path, database):
        with pytest.raises(ConfigurationError, match="no table 'nowhere'"):
            import_tokens(TokenTable(database, "nowhere"), database)
        with pytest.raises(ConfigurationError, match="lacks the columns"):
            import_tokens(TokenTable(database, "oauthtoken_refresh_lease"), database)


class TestExport:
    def test_the_sdks_own_filestore_reads_every_token(self, file, database, tmp_path):
        import_tokens(FileStoreFile(file), database)
        path = tmp_path / "exported.txt"
        assert export_tokens(database, path) == 3
        theirs = sorted((known(token) for token in FileStore(str(path)).get_tokens()), key=str)
        assert theirs == sorted(map(known, sdk_tokens()), key=str)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def test_the_sdks_filestore_can_go_on_with_the_file_F4(self, database, tmp_path, caplog):
        with SQLAlchemyTokenStore(database) as store:
            for id_, user in ((None, "one"), ("7", "seven"), ("x y", "two"), ("10", "ten")):
                store.save_token(make_token(id=id_, user=user, access_token=f"a-{user}"))
            ids = {
                token.get_user_signature().get_name(): token.get_id()
                for token in store.get_tokens()
            }
        path, told = tmp_path / "exported.txt", {}
        assert export_tokens(database, path, on_renumbered=told.__setitem__) == 4
        theirs = FileStore(str(path))
        found = {token.get_user_signature().get_name(): token for token in theirs.get_tokens()}
        assert {user: found[user].get_id() for user in ("seven", "ten")} == {
            "seven": "7",
            "ten": "10",
        }
        assert told == {ids[user]: found[user].get_id() for user in ("one", "two")}
        assert sorted(told.values()) == ["11", "12"]
        assert all(f"{old!r} is now {new!r}" in caplog.text for old, new in told.items())
        assert "a-one" not in caplog.text
        new = make_token(user="new", access_token="a-new")
        theirs.save_token(new)
        assert new.get_id() == "13"
        again = make_token(user="one", access_token="again")
        theirs.save_token(again)
        assert theirs.find_token_by_id(found["one"].get_id()).get_access_token() == "again"
        assert len(theirs.get_tokens()) == 5

    @on_sqlite
    def test_ids_that_are_whole_numbers_stay_and_nothing_is_reported(
        self, file, database, tmp_path, caplog
    ):
        import_tokens(FileStoreFile(file), database)
        caplog.clear()
        export_tokens(database, tmp_path / "exported.txt", on_renumbered=pytest.fail)
        assert caplog.text == ""

    @on_sqlite
    def test_a_file_is_not_written_over(self, database, tmp_path):
        path = tmp_path / "there.txt"
        path.write_text("mine")
        with pytest.raises(ConfigurationError, match=r"Cannot write .*: File exists"):
            export_tokens(database, path)
        assert path.read_text() == "mine"

    def test_nothing_is_left_of_an_export_that_failed(self, tmp_path):
        path = tmp_path / "exported.txt"
        with pytest.raises(Exception, match="no such table"):
            export_tokens(f"sqlite:///{tmp_path / 'empty.db'}", path)
        assert not path.exists()
