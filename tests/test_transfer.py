"""Taking over what the SDK's own stores have kept, and giving it back."""

from __future__ import annotations

import csv
import sqlite3
import stat

import pytest
from conftest import on_sqlite
from sdk_tokens import FULL, known, make_token
from sqlalchemy import create_engine, text
from zohocrmsdk.src.com.zoho.api.authenticator.store import DBStore, FileStore

from zoho_orm_store import ConfigurationError, InvalidTokenError, SQLAlchemyTokenStore, provision
from zoho_orm_store.transfer import FileStoreFile, TokenTable, export_tokens, import_tokens

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
        assert import_tokens(FileStoreFile(file), database) == (3, 0, 0, ())
        with SQLAlchemyTokenStore(database) as store:
            assert tokens_of(store) == theirs
            before = [token.get_id() for token in store.get_tokens()]
            assert import_tokens(FileStoreFile(file), database) == (0, 0, 3, ())
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
            assert import_tokens(FileStoreFile(file), database) == (2, 1, 0, ())
            assert store.find_token_by_id(mine.get_id()).get_refresh_token() == "r1"

    @on_sqlite
    def test_an_id_alone_proves_nothing_E5(self, file, database):
        with SQLAlchemyTokenStore(database) as store:
            stranger = make_token(id="1", user="stranger", refresh_token="mine")
            store.save_token(stranger)
            assert import_tokens(FileStoreFile(file), database).added == 3
            assert store.find_token_by_id("1").get_refresh_token() == "mine"
            assert len(store.get_tokens()) == 4

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

    @pytest.mark.parametrize("name", ["missing.txt", "."])
    def test_a_file_that_cannot_be_read(self, tmp_path, name):
        with pytest.raises(ConfigurationError, match="Cannot read"):
            import_tokens(FileStoreFile(tmp_path / name), "sqlite://")

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
        assert import_tokens(TokenTable(f"sqlite:///{path}"), database) == (2, 1, 0, ())
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
        assert import_tokens(TokenTable(database), first) == (0, 0, 3, ())

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
