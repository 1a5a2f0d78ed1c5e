"""The command line on a project's own tables, and the settings in pyproject.toml."""

from __future__ import annotations

import json
import os
import sys
from textwrap import dedent

import pytest
from sqlalchemy import create_engine, text
from typer.testing import CliRunner

from zoho_orm_store import FernetCipher, TokenRecord, TokenRepository, provision
from zoho_orm_store._digests import Scope
from zoho_orm_store._refresh.rules import REFUSED, lease_key
from zoho_orm_store.cli import app
from zoho_orm_store.encryption import generate_key

PROJECT = """
    import datetime, enum, uuid

    from sqlalchemy import String
    from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

    from zoho_orm_store import RefreshLeaseMixin, StoredTokenMixin


    class Plan(enum.Enum):
        free = 1
        paid = 2


    class Base(DeclarativeBase):
        pass


    class ZohoToken(StoredTokenMixin, Base):
        __tablename__ = "zoho_token"

        tenant_id: Mapped[int]
        region: Mapped[str | None] = mapped_column(String(20))
        active: Mapped[bool | None]
        since: Mapped[datetime.date | None]
        account: Mapped[uuid.UUID | None]
        plan: Mapped[Plan | None]


    class ZohoLease(RefreshLeaseMixin, Base):
        __tablename__ = "zoho_lease"
"""

MODEL = ("--model", "shop.models:ZohoToken")
LEASES = ("--lease-model", "shop.models:ZohoLease")
TENANT = ("--scope", "tenant_id=7")

VARIABLES = ("URL", "MODEL", "LEASE_MODEL", "SCOPE", "TABLE", "SCHEMA", "KEYS")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project in the current folder, with a package that only this folder makes importable."""
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "__init__.py").touch()
    (tmp_path / "shop" / "models.py").write_text(dedent(PROJECT))
    (tmp_path / "shop" / "broken.py").write_text(
        "raise RuntimeError('no postgresql://u:s3cret@h/d\\nhere')"
    )
    (tmp_path / "shop" / "needy.py").write_text("import nonesuch_of_the_project")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in VARIABLES:
        monkeypatch.delenv(f"ZOHO_ORM_STORE_{name}", raising=False)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "shop"]:
        del sys.modules[name]


@pytest.fixture
def run(project, monkeypatch):
    """Run the command line in the project's folder, on its database."""
    monkeypatch.setenv("ZOHO_ORM_STORE_URL", "sqlite:///shop.db")
    return lambda *args, **options: CliRunner().invoke(app, args, **options)


@pytest.fixture
def query(run):
    """Run SQL on the project's database."""
    engine = create_engine("sqlite:///shop.db")

    def query(sql):
        with engine.begin() as connection:
            result = connection.execute(text(sql))
            return result.all() if result.returns_rows else None

    yield query
    engine.dispose()


@pytest.fixture
def stored(project):
    """A token of each of two tenants, in the project's own table."""
    fill(project)


def fill(project, cipher=None):
    sys.path.insert(0, str(project))
    from shop import models

    engine = create_engine("sqlite:///shop.db")
    models.Base.metadata.create_all(engine)
    with engine.begin() as connection:
        for tenant, id_ in ((7, "a"), (8, "b")):
            TokenRepository(
                connection, model=models.ZohoToken, scope={"tenant_id": tenant}, cipher=cipher
            ).save(
                TokenRecord(
                    id=id_,
                    user_name="ada",
                    client_id="c",
                    refresh_token=f"1000.refresh-{tenant}",
                    access_token="1000.access",
                    expiry_time=2**42,
                )
            )
    engine.dispose()
    sys.path.remove(str(project))


def ids(result):
    assert result.exit_code == 0, result.output
    return [json.loads(line)["id"] for line in result.stdout.splitlines()]


class TestOwnModel:
    def test_a_list_of_all_tenants_and_of_one(self, run, stored):
        assert ids(run("list", "--json", *MODEL)) == ["a", "b"]
        assert ids(run("list", "--json", *MODEL, *TENANT)) == ["a"]
        assert ids(run("list", "--json", "--table", "zoho_token")) == ["a", "b"]

    def test_one_token(self, run, stored):
        assert "ada" in run("show", "a", *MODEL, *TENANT).stdout
        assert run("show", "b", *MODEL, *TENANT).exit_code == 1
        assert run("expire", "b", *MODEL, *TENANT).exit_code == 1
        assert run("expire", "a", *MODEL, *TENANT).exit_code == 0
        assert run("delete", "a", "--yes", *MODEL, *TENANT).exit_code == 0
        assert ids(run("list", "--json", *MODEL)) == ["b"]

    def test_only_the_tokens_of_a_tenant_are_deleted(self, run, stored, query):
        query("UPDATE zoho_token SET updated_at = '2020-01-01 00:00:00'")
        dry = run("purge", "--idle", "1d", "--dry-run", *MODEL, *TENANT)
        assert dry.stdout == "Would delete 1 token.\n"
        assert "Deleted 1 token." in run("purge", "--idle", "1d", "-y", *MODEL, *TENANT).stdout
        assert "Deleted 1 token." in run("clear", "-y", *MODEL, "--scope", "tenant_id=8").stdout

    def test_the_question_says_that_all_tenants_are_meant(self, run, stored):
        refused = run("clear", *MODEL, input="n\n")
        assert "all 2 tokens in the table zoho_token of sqlite:///shop.db" in refused.stderr
        assert "whatever their scope" in refused.stderr
        assert "scope" not in run("clear", *MODEL, *TENANT, input="n\n").stderr

    def test_an_export_and_an_import_into_another_tenant(self, run, stored, project):
        assert run("export", "tokens.txt", *MODEL, *TENANT).exit_code == 0
        nine = (*MODEL, "--scope", "tenant_id=9")
        assert "Added: 1" in run("import", "tokens.txt", *nine).stdout
        assert len(ids(run("list", "--json", *nine))) == 1
        assert len(ids(run("list", "--json", *MODEL))) == 3

    def test_the_table_of_an_imports_source(self, run, stored, project):
        provision.upgrade("sqlite:///other.db")
        source = ("sqlite:///shop.db", "--from-table", "zoho_token")
        assert "Added: 1" in run("import", *source, "--url", "sqlite:///other.db").stdout
        missing = run("import", "sqlite:///none.db", *MODEL, *TENANT)
        assert missing.stderr == "Error: The file none.db does not exist.\n"
        assert not (project / "none.db").exists()

    def test_keys(self, run, stored):
        tenant = {"env": {"ZOHO_ORM_STORE_KEYS": generate_key()}}
        assert "Tokens changed: 1" in run("encrypt", "--yes", *MODEL, *TENANT, **tenant).stdout
        counted = run("keys", "status", "--json", *MODEL, *TENANT, **tenant)
        lines = [json.loads(line) for line in counted.stdout.splitlines()]
        assert [(each["what"][:3], each["tokens"]) for each in lines] == [("key", 1), ("pla", 0)]
        assert "plain text                  1" in run("keys", "status", *MODEL, **tenant).stdout
        revealed = run("show", "a", "--reveal", *MODEL, *TENANT, **tenant)
        assert "1000.refresh-7" in revealed.stdout
        assert "Tokens changed: 1" in run("decrypt", "-y", *MODEL, *TENANT, **tenant).stdout

    def test_the_doctor(self, run, stored):
        result = run("doctor", *MODEL, *LEASES, *TENANT)
        assert result.exit_code == 0, result.stdout
        assert "the table zoho_token has all columns and indexes" in result.stdout
        assert "in zoho_token and zoho_lease" in result.stdout
        assert "1 token, of which 0" in result.stdout
        assert "--lease-model" in run("doctor", *MODEL).stdout

    def test_whose_refresh_zoho_has_refused(self, run, stored, query):
        key = lease_key("refresh_token", "1000.refresh-7", "ada", Scope((("tenant_id", 7),)).parts)
        query(f"INSERT INTO zoho_lease VALUES ('{key}', '{REFUSED}', 1, 1)")
        known = run("list", *MODEL, *LEASES, *TENANT)
        assert "new login" in known.stdout
        assert known.stderr == "1 token\n1 of them needs a new login\n"
        assert "has refused to refresh 1 token" in run("doctor", *MODEL, *LEASES, *TENANT).stdout
        for unknown in (TENANT, LEASES):
            assert "new login" not in run("list", *MODEL, *unknown).stdout
        query("DROP TABLE zoho_lease")
        result = run("list", *MODEL, *LEASES)
        assert (result.exit_code, result.stdout) == (1, "")
        assert "The table 'zoho_lease' does not exist." in result.stderr

    @pytest.mark.parametrize(
        ("change", "lacking"),
        [
            ("DROP INDEX ix_zoho_token_identity", "'zoho_token' lacks the index on identity."),
            ("DROP INDEX ix_zoho_token_user_digest", "lacks the index on user_digest."),
            ("ALTER TABLE zoho_token DROP COLUMN api_domain", "lacks the column api_domain."),
            ("DROP TABLE zoho_token", "The table 'zoho_token' does not exist."),
            ("ALTER TABLE zoho_lease DROP COLUMN failures", "'zoho_lease' lacks the column"),
            ("DROP TABLE zoho_lease", "The table 'zoho_lease' does not exist."),
        ],
    )
    def test_what_a_table_lacks(self, run, stored, query, change, lacking):
        assert run("check", *MODEL, *LEASES).stdout == "The table zoho_token is complete.\n"
        query(change)
        for command in ("doctor", "check"):
            result = run(command, *MODEL, *LEASES)
            assert result.exit_code == 1
            assert lacking in result.output
            assert "alembic upgrade head" in result.output

    def test_a_missing_column_is_named_by_every_command(self, run, stored, query):
        query("ALTER TABLE zoho_token DROP COLUMN api_domain")
        assert "lacks the column api_domain" in run("list", *MODEL).stderr

    @pytest.mark.parametrize("command", ["upgrade", "downgrade", "current"])
    def test_what_only_works_on_our_own_tables(self, run, stored, command):
        for tokens in (MODEL, ("--table", "zoho_token")):
            result = run(command, *tokens)
            assert (result.exit_code, result.stdout) == (1, "")
            assert result.stderr.startswith(f"Error: '{command}' works only on this package's own")
            assert result.stderr.count("\n") == 1

    def test_our_own_model_is_no_other_table(self, run):
        own = ("--model", "zoho_orm_store:StoredToken")
        assert run("upgrade", *own).exit_code == 0
        assert run("check", "--table", "oauthtoken").exit_code == 0

    def test_a_new_file(self, run, project):
        result = run("list", *MODEL)
        assert "create it with your project's migrations" in result.stderr
        assert not (project / "shop.db").exists()


class TestRights:
    """A user who may not read one of the project's tables."""

    @pytest.mark.parametrize("database", ["postgresql", "mariadb"], indirect=True)
    @pytest.mark.parametrize("table", ["zoho_token", "zoho_lease"])
    def test_the_table_and_the_grant_are_named(self, project, database, table):
        sys.path.insert(0, str(project))
        from shop import models

        user = f"zos_rights_{os.getpid()}"  # roles are shared by all databases of a server
        is_postgresql = database.get_backend_name() == "postgresql"
        grantee = user if is_postgresql else f"'{user}'@'%'"
        (other,) = {"zoho_token", "zoho_lease"} - {table}
        engine = create_engine(database)
        models.Base.metadata.create_all(engine)
        try:
            with engine.begin() as connection:
                how = "PASSWORD" if is_postgresql else "IDENTIFIED BY"
                connection.execute(text(f"CREATE USER {grantee} {how} 'p'"))
                rights = "SELECT, INSERT, UPDATE, DELETE"
                connection.execute(text(f"GRANT {rights} ON {other} TO {grantee}"))
            url = database.set(username=user, password="p")
            shown = url.render_as_string(hide_password=False)
            result = CliRunner().invoke(app, ["doctor", *MODEL, *LEASES, "--url", shown])
        finally:
            with engine.begin() as connection:
                if is_postgresql:
                    connection.execute(text(f"DROP OWNED BY {user}"))
                connection.execute(text(f"DROP USER {grantee}"))
            models.Base.metadata.drop_all(engine)
            engine.dispose()
        assert result.exit_code == 1
        wrong = result.stdout.splitlines()[-1]
        assert f"GRANT SELECT, INSERT, UPDATE, DELETE ON {table} TO <user>" in wrong, wrong
        assert "zoho_orm_store_version" not in wrong


class TestWhatCannotBeUsed:
    @pytest.mark.parametrize(
        ("options", "exit_code", "reason"),
        [
            (["--model", "shop.models"], 2, "Did you mean 'shop:models'?"),
            (["--model", "shop.models.ZohoToken"], 2, "Did you mean 'shop.models:ZohoToken'?"),
            (["--model", "shp.models:ZohoToken"], 2, "Did you mean 'shop.models:ZohoToken'?"),
            (["--model", "shop.modles:ZohoToken"], 2, "Did you mean 'shop.models:ZohoToken'?"),
            (["--model", "qqq:X"], 2, "There is no module 'qqq' in the current folder"),
            (["--model", "shop.models:ZohoTokn"], 2, "Did you mean 'shop.models:ZohoToken'?"),
            (["--model", "shop.models:X"], 2, "Its models are ZohoToken, ZohoLease."),
            (["--model", "shop.models:Plan"], 1, "a mapped class with a table of its own"),
            (["--model", "shop.models:ZohoLease"], 1, "lacks the columns"),
            (["--model", "shop.broken:X"], 1, "RuntimeError: no postgresql://***@h/d here"),
            (["--model", "shop.needy:X"], 1, "'nonesuch_of_the_project', which is not installed"),
            ([*MODEL, "--table", "t"], 2, "Give either the model"),
            ([*MODEL, "--scope", "tenant_id"], 2, "--scope takes COLUMN=VALUE"),
            ([*MODEL, "--scope", "tenant_id=x"], 2, "values of the type int, and 'x' is not one"),
            ([*MODEL, "--scope", "tenat_id=7"], 1, "Did you mean 'tenant_id'?"),
            ([*MODEL, "--scope", "user_name=x"], 1, "is the token's own"),
            ([*MODEL, "--scope", "region="], 1, "needs a value"),
            (list(TENANT), 2, "Name it with --model MODULE:CLASS"),
            (["--schema", "x"], 2, "SQLite has no schemas"),
        ],
    )
    def test_it_is_one_line(self, run, options, exit_code, reason):
        result = run("list", *options)
        assert (result.exit_code, result.stdout) == (exit_code, "")
        assert result.stderr.count("\n") == 1
        assert reason in result.stderr
        assert "s3cret" not in result.stderr

    @pytest.mark.parametrize(
        ("column", "right", "wrong"),
        [
            ("region", "eu=1", None),
            ("active", "true", "perhaps"),
            ("since", "2026-11-24", "yesterday"),
            ("account", "12345678-1234-5678-1234-567812345678", "1"),
            ("plan", "paid", "gold"),
        ],
    )
    def test_a_scopes_value_has_the_columns_type(self, run, stored, query, column, right, wrong):
        assert ids(run("list", "--json", *MODEL, "--scope", f"{column}={right}")) == []
        if wrong:
            result = run("list", *MODEL, "--scope", f"{column}={wrong}")
            assert result.exit_code == 2
            assert f"and {wrong!r} is not one" in result.stderr


class TestSettings:
    @pytest.fixture
    def configure(self, project):
        def configure(section):
            (project / "pyproject.toml").write_text(f"[tool.zoho_orm_store]\n{dedent(section)}")

        return configure

    def test_they_come_from_pyproject(self, run, stored, configure, monkeypatch):
        monkeypatch.delenv("ZOHO_ORM_STORE_URL")
        configure("""
            url = "sqlite:///shop.db"
            model = "shop.models:ZohoToken"
            lease-model = "shop.models:ZohoLease"
            scope = { tenant_id = 7 }
        """)
        assert ids(run("list", "--json")) == ["a"]
        assert "in zoho_token and zoho_lease" in run("doctor").stdout
        assert "plain text                  1" in run("keys", "status").stdout
        assert "'upgrade' works only on" in run("upgrade").stderr

    def test_an_option_beats_the_environment_and_that_the_file(self, run, stored, configure):
        configure("""
            url = "sqlite:///nowhere.db"
            model = "shop.models:ZohoToken"
            scope = ["tenant_id=6"]
        """)
        environment = {"env": {"ZOHO_ORM_STORE_SCOPE": "tenant_id=7"}}
        assert ids(run("list", "--json")) == []
        assert ids(run("list", "--json", **environment)) == ["a"]
        assert ids(run("list", "--json", "--scope", "tenant_id=8", **environment)) == ["b"]

    def test_the_environment_names_all_of_them(self, run, stored):
        environment = {
            "ZOHO_ORM_STORE_MODEL": "shop.models:ZohoToken",
            "ZOHO_ORM_STORE_LEASE_MODEL": "shop.models:ZohoLease",
            "ZOHO_ORM_STORE_SCOPE": "tenant_id=7",
        }
        assert "in zoho_token and zoho_lease" in run("doctor", env=environment).stdout
        table = {"ZOHO_ORM_STORE_TABLE": "zoho_token"}
        assert ids(run("list", "--json", env=table)) == ["a", "b"]

    def test_a_password_does_not_belong_there(self, run, configure):
        configure('url = "postgresql://me:s3cret@host/db"')
        result = run("current", "--url", "sqlite:///x.db")
        assert result.stdout == "none\n"
        assert "Warning: the url in pyproject.toml holds a password" in result.stderr
        assert "s3cret" not in result.output

    @pytest.mark.parametrize(
        ("section", "reason"),
        [
            ('modle = "x:y"', "has no key 'modle'. Did you mean 'model'?"),
            ('zzz = "x"', "Its keys: url, model"),
            ("url = 7", "'url' in [tool.zoho_orm_store] of pyproject.toml must be a string"),
            ("scope = 7", "must be a table such as { tenant_id = 7 }"),
            ("url = ", "pyproject.toml cannot be read"),
        ],
    )
    def test_a_mistake_is_one_line(self, run, configure, section, reason):
        configure(section)
        result = run("current")
        assert (result.exit_code, result.stdout) == (1, "")
        assert reason in result.stderr
        assert result.stderr.count("\n") == 1

    def test_another_projects_file_is_of_no_interest(self, run, project):
        (project / "pyproject.toml").write_text("[project]\nname = 'shop'\n[broken")
        assert run("current").stdout == "none\n"

    def test_the_demo_does_not_look_at_them(self, run, configure):
        configure('url = "sqlite://"')
        assert "--url" in run("demo", "--help").stdout


class TestSchema:
    @pytest.mark.parametrize("database", ["postgresql"], indirect=True)
    @pytest.mark.parametrize("driver", ["postgresql+psycopg", "postgresql+asyncpg"])
    def test_tables_in_another_schema(self, database, project, driver, query_server):
        url = database.set(drivername=driver).render_as_string(hide_password=False)
        query_server("CREATE SCHEMA tenant_x")
        try:

            def run(*args):
                options = ("--url", url, "--schema", "tenant_x")
                return CliRunner().invoke(app, [*args, *options])

            assert "no tables of this package" in run("list").stderr
            assert run("upgrade").exit_code == 0
            assert run("check").exit_code == 0
            engine = create_engine(database)
            in_schema = engine.execution_options(schema_translate_map={None: "tenant_x"})
            with in_schema.begin() as connection:
                TokenRepository(connection).save(TokenRecord(id="1", refresh_token="r"))
            engine.dispose()
            assert ids(run("list", "--json")) == ["1"]
            assert run("export", "tokens.txt").exit_code == 0
            assert "unchanged: 1" in run("import", "tokens.txt", "--dry-run").stdout
            assert "1 token, of which 1 will be refreshed" in run("doctor").stdout
            assert query_server("SELECT count(*) FROM public.oauthtoken") == [(0,)]
        finally:
            query_server("DROP SCHEMA tenant_x CASCADE")

    @pytest.fixture
    def query_server(self, database):
        engine = create_engine(database)

        def query(sql):
            with engine.begin() as connection:
                result = connection.execute(text(sql))
                return [tuple(row) for row in result] if result.returns_rows else None

        yield query
        engine.dispose()


def test_an_encrypted_tokens_scope_must_be_named(run, project):
    key = generate_key()
    fill(project, FernetCipher(key))
    keys = {"env": {"ZOHO_ORM_STORE_KEYS": key}}
    assert run("list", *MODEL, **keys).exit_code == 1
    assert ids(run("list", "--json", *MODEL, *TENANT, **keys)) == ["a"]
