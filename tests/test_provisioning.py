"""Provisioning as applications do it: in threads, in their own migrations, in other schemas."""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import alembic.context
import alembic.op
import pytest
from alembic.config import Config
from alembic.operations import Operations
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from conftest import on_empty_sqlite
from databases import SERVERS, fresh_database
from reliability import record
from sdk_tokens import known, make_token
from sqlalchemy import create_engine, inspect, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool
from zohocrmsdk.src.com.zoho.api.authenticator.store import DBStore

from zoho_orm_store import (
    ConfigurationError,
    DatabaseError,
    RefreshPolicy,
    SchemaError,
    SQLAlchemyTokenStore,
    TokenRecord,
    TokenRepository,
    ZohoOrmStoreError,
    metadata,
    provision,
)
from zoho_orm_store._schema import VERSION_TABLE, missing_privilege

ROOT = Path(__file__).parent.parent
OURS = {*metadata.tables, VERSION_TABLE}

SDK_DDL = (
    "CREATE TABLE {name} (id varchar(10) NOT NULL, user_name varchar(255), client_id varchar(255), "
    "client_secret varchar(255), refresh_token varchar(255), access_token varchar(255), "
    "grant_token varchar(255), expiry_time varchar(20), redirect_url varchar(255), "
    "api_domain varchar(255), primary key (id))"
)
SDK_ROW = "INSERT INTO {name} (id, user_name, access_token) VALUES ('1', '{user}', 'a')"

on_postgresql = pytest.mark.parametrize("empty_database", ["postgresql"], indirect=True)
on_mariadb = pytest.mark.parametrize("empty_database", ["mariadb"], indirect=True)


@pytest.fixture
def engine(empty_database):
    engine = create_engine(empty_database)
    yield engine
    engine.dispose()


@pytest.fixture
def sql(engine):
    """Run statements on the database behind the package's back, and return the last one's rows."""

    def run(*statements, **parameters):
        with engine.begin() as connection:
            for statement in statements:
                result = connection.execute(text(statement), parameters)
        return [tuple(row) for row in result] if result.returns_rows else []

    return run


def tables(bind, schema=None):
    return set(inspect(bind).get_table_names(schema=schema))


def tokens_of(bind):
    with SQLAlchemyTokenStore(bind, create_schema=False) as store:
        return {token.get_id(): known(token) for token in store.get_tokens()}


class TestInThreads:
    def test_five_databases_are_upgraded_at_once(self, tmp_path):
        names = ["sqlite", "sqlite", "sqlite", *SERVERS]
        with ExitStack() as stack, ThreadPoolExecutor(len(names)) as pool:
            urls = [stack.enter_context(fresh_database(name, tmp_path)) for name in names]
            for _ in range(4):
                for done in [pool.submit(provision.upgrade, url) for url in urls]:
                    done.result()
                for url in urls:
                    provision.check(url)
                for done in [pool.submit(provision.downgrade, url) for url in urls]:
                    done.result()
                assert [provision.current(url) for url in urls] == [None] * len(urls)
        for url in urls:
            record("threads migrate several databases at once", url, 8, "all complete")

    @pytest.mark.parametrize("runs", [1, pytest.param(30, marks=pytest.mark.soak)])
    def test_stores_make_their_tables_at_first_use(self, tmp_path, runs):
        """In a new process, where the first use also imports Alembic."""
        program = (
            "import sys, threading\n"
            "from zoho_orm_store import SQLAlchemyTokenStore\n"
            "stores = [SQLAlchemyTokenStore(f'sqlite:///{sys.argv[1]}/{n % 4}.db') for n in range(12)]\n"
            "together = threading.Barrier(12)\n"
            "failed = []\n"
            "def use(store):\n"
            "    together.wait()\n"
            "    try:\n"
            "        assert store.get_tokens() == []\n"
            "    except BaseException as error:\n"
            "        failed.append(error)\n"
            "threads = [threading.Thread(target=use, args=[store]) for store in stores]\n"
            "[thread.start() for thread in threads]\n"
            "[thread.join() for thread in threads]\n"
            "sys.exit(repr(failed) if failed else 0)\n"
        )
        for run in range(runs):
            folder = tmp_path / str(run)
            folder.mkdir()
            done = subprocess.run(
                [sys.executable, "-c", program, str(folder)],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            for file in folder.glob("*.db"):
                provision.check(f"sqlite:///{file}")


PROJECT_MIGRATION = """
from alembic import context, op
import sqlalchemy as sa
from zoho_orm_store import provision

revision = "1"
down_revision = None

def upgrade():
    op.create_table("before", sa.Column("id", sa.Integer, primary_key=True))
    provision.upgrade(op.get_bind())
    assert not context.is_offline_mode() and context.config is not None
    op.create_table("after", sa.Column("id", sa.Integer, primary_key=True))
    provision.check(op.get_bind())

def downgrade():
    provision.downgrade(op.get_bind())
    op.drop_table("before")
    op.drop_table("after")
"""

PROJECT_ENVIRONMENT = """
from alembic import context

def run(**options):
    context.configure(**options)
    with context.begin_transaction():
        context.run_migrations()

if context.is_offline_mode():
    run(dialect_name=context.config.attributes["dialect"])
else:
    run(connection=context.config.attributes["connection"])
"""


class TestInsideAProjectsOwnMigration:
    @pytest.fixture
    def project(self, tmp_path):
        (tmp_path / "scripts" / "versions").mkdir(parents=True)
        (tmp_path / "scripts" / "env.py").write_text(PROJECT_ENVIRONMENT)
        (tmp_path / "scripts" / "script.py.mako").write_text("")
        (tmp_path / "scripts" / "versions" / "1.py").write_text(PROJECT_MIGRATION)
        config = Config()
        config.set_main_option("script_location", str(tmp_path / "scripts"))
        return config

    def test_its_own_operations_go_on_afterwards(self, engine, project):
        from alembic import command

        for move, expected in (
            (command.upgrade, {*OURS, "before", "after", "alembic_version"}),
            (command.downgrade, {VERSION_TABLE, "alembic_version"}),
            (command.upgrade, {*OURS, "before", "after", "alembic_version"}),
        ):
            with engine.begin() as connection:
                project.attributes["connection"] = connection
                move(project, "head" if move is command.upgrade else "base")
            assert tables(engine) == expected

    @pytest.mark.parametrize("dialect", ["postgresql", "mysql"])
    def test_a_script_without_a_database_says_what_to_do(self, project, dialect, capsys):
        from alembic import command

        project.attributes["dialect"] = dialect
        with pytest.raises(ConfigurationError, match=r"without --sql.* 'zoho-orm-store sql'"):
            command.upgrade(project, "head", sql=True)

    def test_other_threads_do_not_disturb_it(self, engine, project, tmp_path):
        """The environment of another thread's run is not replaced by ours."""
        from alembic import command

        urls = [f"sqlite:///{tmp_path / str(number)}.db" for number in range(8)]
        with ThreadPoolExecutor(4) as pool:
            others = [pool.submit(provision.upgrade, url) for url in urls]
            with engine.begin() as connection:
                project.attributes["connection"] = connection
                command.upgrade(project, "head")
            for other in others:
                other.result()
        assert tables(engine) == {*OURS, "before", "after", "alembic_version"}

    @on_empty_sqlite
    def test_the_proxies_stay_as_they_are(self, engine):
        with engine.begin() as connection:
            context = MigrationContext.configure(connection)
            scripts = ScriptDirectory(str(ROOT / "zoho_orm_store" / "migrations"))
            with (
                Operations.context(context) as operations,
                EnvironmentContext(Config(), scripts) as environment,
            ):
                provision.upgrade(connection)
                provision.downgrade(connection)
                assert alembic.op._proxy is operations
                assert alembic.context._proxy is environment

    async def test_an_async_connection_is_told_how(self, tmp_path):
        engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/some.db")
        async with engine.begin() as connection:
            with pytest.raises(ConfigurationError, match=r"run_sync\(provision.upgrade\)"):
                provision.upgrade(connection)
            await connection.run_sync(provision.upgrade)
        async with engine.connect() as connection:
            await connection.run_sync(provision.check)
        await engine.dispose()


@on_mariadb
class TestOldStorage:
    @pytest.mark.parametrize(
        "storage", ["ENGINE=MyISAM", "ENGINE=Aria", "ROW_FORMAT=COMPACT", "ROW_FORMAT=REDUNDANT"]
    )
    @pytest.mark.parametrize("charset", ["latin1", pytest.param("utf8mb4", marks=pytest.mark.soak)])
    def test_a_table_with_short_keys_is_converted(self, engine, sql, storage, charset):
        sql(f"{SDK_DDL.format(name='oauthtoken')} {storage} DEFAULT CHARSET={charset}")
        sql(SDK_ROW.format(name="oauthtoken", user="josé"))
        provision.upgrade(engine)
        provision.check(engine)
        assert storage_of(sql) == {("InnoDB", "Dynamic")}
        assert tokens_of(engine) == {"1": {"user_name": "josé", "access_token": "a"}}

    def test_new_tables_do_not_follow_the_servers_defaults(self, empty_database):
        engine = create_engine(
            empty_database,
            connect_args={"init_command": "SET default_storage_engine = MyISAM"},
        )
        provision.upgrade(engine)
        with engine.connect() as connection:
            assert storage_of(lambda query: map(tuple, connection.execute(text(query)))) == {
                ("InnoDB", "Dynamic")
            }
        engine.dispose()


def storage_of(sql):
    return set(
        sql(
            "SELECT engine, row_format FROM information_schema.tables WHERE table_schema = "
            "database() AND table_name IN ('oauthtoken', 'oauthtoken_refresh_lease')"
        )
    )


FIRST_GENERATION = {
    "sqlite": "id integer primary key autoincrement",
    "postgresql": "id serial primary key",
    "mysql": "id int(11) not null auto_increment primary key",
}


class TestTablesOfOlderSDKs:
    """The first generation (zcrmsdk 3) has numbers as ids, users by mail, and seven columns."""

    def fill(self, sql, id_column, more=""):
        sql(
            f"create table oauthtoken ({id_column}, user_mail varchar(255) not null, "
            f"client_id varchar(255), {more} refresh_token varchar(255), "
            "access_token varchar(255), grant_token varchar(255), expiry_time varchar(20))"
        )
        for user in ("one@x", "two@x", ""):
            sql(
                "INSERT INTO oauthtoken (user_mail, client_id, refresh_token, expiry_time) "
                "VALUES (:user, 'c', :refresh, '1700000000000')",
                user=user,
                refresh=f"r-{user}",
            )

    def expected(self):
        common = {"client_id": "c", "expiry_time": 1700000000000}
        return {
            "1": common | {"user_name": "one@x", "refresh_token": "r-one@x"},
            "2": common | {"user_name": "two@x", "refresh_token": "r-two@x"},
            "3": common | {"refresh_token": "r-"},
        }

    def test_the_first_generation_is_taken_over(self, engine, sql):
        self.fill(sql, FIRST_GENERATION[engine.dialect.name])
        provision.upgrade(engine)
        provision.check(engine)
        assert tokens_of(engine) == self.expected()
        with SQLAlchemyTokenStore(engine) as store:
            token = make_token(user="one@x", client_id="c", client_secret="s", access_token="a")
            store.save_token(token)
            assert token.get_id() == "1"
            store.save_token(make_token(user="new", access_token="a"))
        with engine.connect() as connection:
            context = MigrationContext.configure(connection)
            from alembic.autogenerate import compare_metadata

            differences = compare_metadata(context, metadata)
            assert [each[0] for each in differences] == ["remove_table"], differences
        provision.downgrade(engine)
        columns = [column["name"] for column in inspect(engine).get_columns("oauthtoken")]
        ours = [column.name for column in metadata.tables["oauthtoken"].columns][:10]
        assert sorted(columns) == sorted(ours)
        if engine.dialect.name != "postgresql":
            assert columns == ours, "the SDK reads by position"

    @on_postgresql
    def test_an_identity_column_is_taken_over(self, engine, sql):
        self.fill(sql, "id int generated always as identity primary key")
        provision.upgrade(engine)
        assert tokens_of(engine) == self.expected()

    def test_a_later_one_that_still_says_user_mail(self, engine, sql):
        sql(
            SDK_DDL.format(name="oauthtoken")
            .replace("user_name", "user_mail")
            .replace("api_domain varchar(255), ", "")
        )
        sql("INSERT INTO oauthtoken (id, user_mail, client_secret) VALUES ('5', 'u', 's')")
        provision.upgrade(engine)
        assert tokens_of(engine) == {"5": {"user_name": "u", "client_secret": "s"}}

    def test_columns_that_must_not_be_empty_may_be_so_afterwards(self, engine, sql):
        sql(
            SDK_DDL.format(name="oauthtoken").replace(
                "user_name varchar(255)", "user_name varchar(255) NOT NULL"
            )
        )
        sql(SDK_ROW.format(name="oauthtoken", user=""))
        provision.upgrade(engine)
        assert tokens_of(engine) == {"1": {"access_token": "a"}}


def at(url, search_path):
    return url.update_query_dict({"options": f"-csearch_path={search_path}"})


@on_postgresql
class TestTheSearchPath:
    def test_another_schemas_table_is_left_alone(self, empty_database, sql):
        sql(SDK_DDL.format(name="public.oauthtoken"), "CREATE SCHEMA tenant")
        sql(SDK_ROW.format(name="public.oauthtoken", user="public"))
        url = at(empty_database, "tenant,public")
        assert not provision.is_current(url)
        with pytest.raises(SchemaError, match="has no tables"):
            provision.check(url)
        provision.upgrade(url)
        provision.check(url)
        assert tables(create_engine(empty_database, poolclass=NullPool)) == {"oauthtoken"}
        assert sql(
            "SELECT count(*) FROM information_schema.columns WHERE table_name = 'oauthtoken' AND table_schema = 'public'"
        ) == [(10,)]
        with SQLAlchemyTokenStore(url) as store:
            assert store.get_tokens() == []
            store.save_token(make_token(user="tenant", access_token="a"))
        assert sql("SELECT user_name FROM tenant.oauthtoken") == [("tenant",)]
        assert sql("SELECT version_num FROM tenant.zoho_orm_store_version") == [(provision.head(),)]
        provision.downgrade(url)
        assert sql("SELECT user_name FROM public.oauthtoken") == [("public",)]

    def test_each_schema_has_its_own_revision(self, empty_database, engine, sql):
        sql("CREATE SCHEMA tenant")
        provision.upgrade(empty_database)
        url = at(empty_database, "tenant,public")
        assert provision.current(url) is None
        provision.upgrade(url, "zoho_orm_store_0001")
        assert provision.current(url) == "zoho_orm_store_0001"
        assert provision.current(empty_database) == provision.head()
        provision.upgrade(url)
        assert tables(engine, "tenant") == tables(engine, "public") == OURS

    def test_a_store_does_not_serve_another_schemas_tokens(self, empty_database, sql):
        sql("CREATE SCHEMA tenant")
        provision.upgrade(empty_database)
        with SQLAlchemyTokenStore(empty_database) as store:
            store.save_token(make_token(user="public", access_token="a"))
        url = at(empty_database, "tenant,public")
        with SQLAlchemyTokenStore(url) as store:
            with pytest.raises(
                Exception, match=r"missing in the schema 'tenant'.* one in 'public'"
            ):
                store.get_tokens()
            provision.upgrade(url)
            assert store.get_tokens() == []

    @pytest.mark.parametrize("path", ["tenant,public", '"$user",tenant,public', '"ten ant",public'])
    def test_a_first_schema_that_is_missing_is_named(self, empty_database, sql, path):
        sql(SDK_DDL.format(name="oauthtoken"))
        url = at(empty_database, path.replace(" ", r"\ "))
        with pytest.raises(SchemaError, match=r"'ten ?ant' does not exist"):
            provision.upgrade(url)
        assert (
            len(sql("SELECT * FROM information_schema.columns WHERE table_name = 'oauthtoken'"))
            == 10
        )

    @pytest.mark.parametrize(
        "path", ['"$user",public', "public", "PUBLIC,pg_temp", '"Ten, ant",public']
    )
    def test_paths_that_postgresql_understands(self, empty_database, sql, path):
        sql('CREATE SCHEMA "Ten, ant"')
        url = at(empty_database, path.replace(" ", r"\ "))
        provision.upgrade(url)
        provision.check(url)
        assert tokens_of(url) == {}


class TestASchemaTranslateMap:
    @pytest.fixture
    def other(self, engine, sql, tmp_path):
        """The name of a second schema, and the application's engine that is mapped to it."""
        if engine.dialect.name == "sqlite":
            from sqlalchemy import event

            @event.listens_for(engine, "connect")
            def attach(connection, record):
                connection.execute(f"ATTACH '{tmp_path / 'tenant.db'}' AS tenant")

            engine.dispose()
            yield "tenant", engine.execution_options(schema_translate_map={None: "tenant"})
            return
        name = f"{engine.url.database}_tenant"
        sql(f"CREATE SCHEMA {name}")
        yield name, engine.execution_options(schema_translate_map={None: name})
        if engine.dialect.name == "mysql":
            sql(f"DROP SCHEMA {name}")

    def test_provisioning_acts_in_its_schema(self, engine, sql, other):
        name, mapped = other
        sql(SDK_DDL.format(name="oauthtoken"), SDK_ROW.format(name="oauthtoken", user="mine"))
        sql(
            SDK_DDL.format(name=f"{name}.oauthtoken"),
            SDK_ROW.format(name=f"{name}.oauthtoken", user="theirs"),
        )
        assert not provision.is_current(mapped)
        provision.upgrade(mapped)
        provision.check(mapped)
        assert provision.current(mapped) == provision.head()
        assert provision.current(engine) is None
        assert tables(engine) == {"oauthtoken"}
        assert tables(engine, name) == OURS
        assert tokens_of(mapped) == {"1": {"user_name": "theirs", "access_token": "a"}}
        provision.downgrade(mapped)
        assert tables(engine, name) == {"oauthtoken", VERSION_TABLE}
        assert sql("SELECT user_name FROM oauthtoken") == [("mine",)]

    def test_a_store_sees_the_revision_in_its_schema(self, engine, other):
        _, mapped = other
        provision.upgrade(engine)
        provision.upgrade(mapped, "zoho_orm_store_0001")
        with SQLAlchemyTokenStore(mapped) as store:
            with pytest.raises(Exception, match="at revision zoho_orm_store_0001, but"):
                store.get_tokens()
            provision.upgrade(mapped)
            assert store.get_tokens() == []

    def test_the_connection_keeps_its_map(self, engine, other):
        name, mapped = other
        with mapped.begin() as connection:
            provision.upgrade(connection)
            options = connection.get_execution_options()
            assert options["schema_translate_map"][None] == name


class TestViews:
    VIEW = "CREATE VIEW report AS SELECT user_name, expiry_time FROM oauthtoken"

    def test_a_view_on_an_adopted_table(self, engine, sql):
        sql(SDK_DDL.format(name="oauthtoken"), SDK_ROW.format(name="oauthtoken", user="u"))
        sql(self.VIEW, "CREATE VIEW second_report AS SELECT user_name FROM report")
        if engine.dialect.name == "postgresql":
            sql(
                "CREATE MATERIALIZED VIEW third AS SELECT id FROM oauthtoken",
                "CREATE POLICY mine ON oauthtoken USING (user_name = current_user)",
            )
            for revision in ("head", "zoho_orm_store_0001"):
                with pytest.raises(SchemaError) as raised:
                    provision.upgrade(engine, revision)
                for name in ("view report", "materialized view third", "policy mine on table"):
                    assert name in str(raised.value)
                assert "Save their definitions, drop them, run this again" in str(raised.value)
                assert provision.current(engine) is None
            assert sql("SELECT * FROM report") == [("u", None)]
            assert len(inspect(engine).get_columns("oauthtoken")) == 10
            sql("DROP VIEW report CASCADE", "DROP MATERIALIZED VIEW third")
            sql("DROP POLICY mine ON oauthtoken")
        provision.upgrade(engine)
        provision.check(engine)
        if engine.dialect.name != "postgresql":
            assert sql("SELECT * FROM second_report") == [("u",)]
        assert tokens_of(engine) == {"1": {"user_name": "u", "access_token": "a"}}

    def test_a_view_on_our_table_and_the_way_back(self, engine, sql):
        provision.upgrade(engine)
        with SQLAlchemyTokenStore(engine) as store:
            store.save_token(make_token(user="u", access_token="a"))
        sql(self.VIEW)
        if engine.dialect.name == "postgresql":
            with pytest.raises(SchemaError, match="view report"):
                provision.downgrade(engine)
            assert provision.current(engine) == provision.head()
            sql("DROP VIEW report")
        provision.downgrade(engine)
        if engine.dialect.name != "postgresql":
            assert sql("SELECT user_name FROM report") == [("u",)]

    def test_a_view_in_the_tables_place_is_refused(self, engine, sql):
        sql(SDK_DDL.format(name="tokens"), "CREATE VIEW oauthtoken AS SELECT * FROM tokens")
        with pytest.raises(SchemaError, match="'oauthtoken' is a view"):
            provision.upgrade(engine)


def documented_grants(heading):
    """The lines to copy in the documentation, by what they are for."""
    page = (ROOT / "docs" / "databases.md").read_text()
    section = page.split(f"### {heading}\n")[1].split("\n### ")[0]
    blocks = re.findall(r"```sql\n-- (.*)\n([^`]*)```", section)
    return {title: [line for line in body.split(";\n") if line] for title, body in blocks}


class TestPermissions:
    """With exactly the rights that the documentation lists."""

    @pytest.fixture
    def users(self, empty_database, sql):
        """The URLs of the two users, and a function that runs the lines of the documentation."""
        is_postgresql = empty_database.get_backend_name() == "postgresql"
        names = {
            f"zoho_{role}": f"zos_{role}_{empty_database.database[-12:]}"
            for role in ("migrations", "application")
        }

        def grant(line):
            for role, name in names.items():
                line = line.replace(role, name if is_postgresql else f"{name}@'%'")
            sql(line.replace("zohooauth.", f"{empty_database.database}."))

        for name in names.values():
            if is_postgresql:
                sql(f"CREATE ROLE {name} LOGIN")
            else:
                sql(f"CREATE USER {name}@'%'")
        yield [empty_database.set(username=name) for name in names.values()], grant
        for name in names.values():
            if is_postgresql:
                sql(f"DROP OWNED BY {name} CASCADE", f"DROP ROLE {name}")
            else:
                sql(f"DROP USER {name}@'%'")

    @pytest.mark.parametrize("is_adopted", [False, True])
    @pytest.mark.parametrize("empty_database", [*SERVERS], indirect=True)
    def test_the_documented_rights_are_enough(self, empty_database, sql, users, is_adopted):
        (migrations, application), grant = users
        is_postgresql = empty_database.get_backend_name() == "postgresql"
        grants = documented_grants("PostgreSQL" if is_postgresql else "MariaDB and MySQL")
        first, second = grants.values()
        if is_adopted:
            sql(SDK_DDL.format(name="oauthtoken"), SDK_ROW.format(name="oauthtoken", user="u"))
            if is_postgresql:
                grant("ALTER TABLE oauthtoken OWNER TO zoho_migrations")
        for line in first:
            grant(line)
        provision.upgrade(migrations)
        for line in second:
            grant(line)
        provision.check(application)
        use_everything(application)
        provision.downgrade(migrations)
        provision.upgrade(migrations)
        provision.check(migrations)

    @pytest.mark.parametrize("empty_database", [*SERVERS], indirect=True)
    def test_each_documented_right_is_needed(self, empty_database, sql, users):
        """And what a missing one is called by the database is what the advice expects."""
        (_, application), grant = users
        is_postgresql = empty_database.get_backend_name() == "postgresql"
        title = "PostgreSQL" if is_postgresql else "MariaDB and MySQL"
        *_, lines = documented_grants(title).values()
        provision.upgrade(empty_database)
        if is_postgresql:
            grant("GRANT USAGE ON SCHEMA public TO zoho_application")
        for line in lines:
            grant(line)
        use_everything(application)
        for table in OURS:
            needed = (
                ("SELECT",) if table == VERSION_TABLE else ("SELECT", "INSERT", "UPDATE", "DELETE")
            )
            for right in needed:
                name = table if is_postgresql else f"zohooauth.{table}"
                grant(f"REVOKE {right} ON {name} FROM zoho_application")
                with pytest.raises(Exception, match=f"(?i)denied.*{table}") as raised:
                    provoke(application, table, right)
                advice = missing_privilege("db", str(raised.value.orig))
                assert re.search(rf"GRANT [A-Z, ]*{right}[A-Z, ]* ON {table} TO", advice)
                grant(f"GRANT {right} ON {name} TO zoho_application")

    @pytest.mark.parametrize(
        "reported",
        [
            "must be owner of table oauthtoken",
            "permission denied for schema public",
            "ALTER command denied to user 'a'@'b' for table `db`.`oauthtoken`",
            "CREATE command denied to user 'a'@'b' for table `db`.`zoho_orm_store_version`",
            "Access denied for user 'a'@'b' to database 'db'",
        ],
    )
    def test_a_right_that_only_an_upgrade_needs(self, reported):
        advice = missing_privilege("db", reported)
        assert reported in advice
        assert "Run the upgrade as a user who may change the tables" in advice

    @pytest.mark.parametrize(
        "reported",
        [
            "permission denied for table my_oauthtoken",
            "SELECT command denied to user 'a'@'b' for table `db`.`my_oauthtoken`",
            "SELECT command denied to user 'a'@'b' for table 'my_oauthtoken'",
            "UPDATE command denied to user 'a'@'b' for column 'id' in table 'my_oauthtoken'",
        ],
    )
    def test_a_right_on_a_projects_own_table(self, reported):
        advice = missing_privilege("db", reported)
        assert "GRANT SELECT, INSERT, UPDATE, DELETE ON my_oauthtoken TO <user>" in advice
        assert VERSION_TABLE not in advice

    def test_a_schema_that_must_not_be_used(self):
        advice = missing_privilege("db", "permission denied for schema tenant")
        assert "GRANT USAGE ON SCHEMA tenant TO <user>" in advice

    def test_a_row_level_policy_is_not_taken_for_a_missing_right(self):
        reported = 'new row violates row-level security policy for table "oauthtoken"'
        assert "GRANT" not in missing_privilege("db", reported)


def provoke(url, table, right):
    """Use one right on a table."""
    column = {"oauthtoken": "id", VERSION_TABLE: "version_num"}.get(table, "owner")
    statement = {
        "SELECT": f"SELECT {column} FROM {table}",
        "INSERT": f"INSERT INTO {table} ({column}) VALUES ('x')",
        "UPDATE": f"UPDATE {table} SET {column} = 'x'",
        "DELETE": f"DELETE FROM {table}",
    }[right]
    engine = create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text(statement))


def use_everything(url):
    """What an application does with its tokens, an expired one and its refresh among them."""
    with SQLAlchemyTokenStore(url, create_schema=False, refresh=RefreshPolicy()) as store:
        store.delete_tokens()
        old = {"user": "u", "client_id": "c", "client_secret": "s", "refresh_token": "r"}
        store.save_token(make_token(**old, access_token="a", expires_in="1"))
        asked = store.find_token(make_token(user="u", client_id="c", client_secret="s"))
        assert asked is not None
        store.save_token(make_token(**old, access_token="b", expires_in="9900000000000"))
        assert store.refresh_stats.acquired == 1
        assert [token.get_access_token() for token in store.get_tokens()] == ["b"]
        assert store.find_token_by_id(asked.get_id()).get_access_token() == "b"
        store.delete_token(asked.get_id())
        store.save_token(make_token(**old))
        store.delete_tokens()
    engine = create_engine(url)
    with engine.begin() as connection:
        repository = TokenRepository(connection)
        repository.save(TokenRecord(user_name="v", access_token="a"))
        assert repository.count() == 1
        assert repository.delete_all() == 1
    engine.dispose()


def save_with_ids(bind, ids):
    """Save one token for each id, the oldest first; None lets the store choose."""
    with SQLAlchemyTokenStore(bind, create_schema=False) as store:
        tokens = [
            make_token(id=id_, user=f"u{n}", client_id="c", access_token=f"a{n}")
            for n, id_ in enumerate(ids)
        ]
        for token in tokens:
            store.save_token(token)
    return [token.get_id() for token in tokens]


class TestTheWayBack:
    """The SDK's own stores compute the next id from the last, as text, plus one."""

    @pytest.mark.parametrize(
        ("ids", "expected"),
        [
            (["1", "2", "3"], {}),
            (["7", "x", "3", "-1"], {"x": "8", "-1": "9000000000"}),
            (["007", " 7", "7 ", "٣"], {" 7": "8", "7 ": "9", "٣": "9000000000"}),
            (["a" * 255, "9" * 9], {"a" * 255: "9" * 9 + "0"}),
            (["x", "9000000000"], {"x": "9000000001"}),
            (["a" * 255, "9" * 10], {"a" * 255: "9" * 10 + "0"}),
            # Here the DBStore would take "9" for the last id, and "10" for the next one.
            ([str(n) for n in range(1, 11)], {"9": "9000000000"}),
            ([str(n) for n in range(1, 10)] + ["x"], {"x": "9000000000"}),
            (["9" * 12, "1" + "0" * 12], {"9" * 12: "9" * 12 + "0"}),
        ],
    )
    def test_every_id_is_a_whole_number_F4(self, engine, ids, expected, caplog):
        provision.upgrade(engine)
        save_with_ids(engine, ids)
        assert dict(provision.downgrade(engine)) == expected
        with engine.connect() as connection:
            stored = connection.execute(text("SELECT id, access_token FROM oauthtoken")).all()
        assert {token: id_ for id_, token in stored} == {
            f"a{n}": expected.get(id_, id_) for n, id_ in enumerate(ids)
        }
        last = max(id_ for id_, _ in stored)
        assert str(int(last) + 1) not in {id_ for id_, _ in stored}
        for old, new in expected.items():
            assert f"{old!r} is now {new!r}" in caplog.text

    def test_ids_that_a_store_made(self, engine, caplog):
        provision.upgrade(engine)
        made = save_with_ids(engine, [None] * 250)
        renumbered = provision.downgrade(engine)
        assert [old for old, _ in renumbered] == made, "the oldest first"
        numbers = [new for _, new in renumbered]
        assert numbers[:249] == [str(n) for n in range(1, 250)]
        assert numbers[249] == "9900000000"
        warnings = [each for each in caplog.records if "got new ids" in each.getMessage()]
        assert len(warnings) == 3
        assert provision.upgrade(engine) == 250
        assert set(tokens_of(engine)) == set(numbers)
        assert provision.downgrade(engine) == ()

    def test_the_first_revision_is_the_sdks_table_too(self, engine):
        provision.upgrade(engine)
        (made,) = save_with_ids(engine, [None])
        assert provision.downgrade(engine, "zoho_orm_store_0001") == ((made, "1000000000"),)

    @on_mariadb
    @pytest.mark.parametrize("ids", [[None], [None] * 12, ["1", "10", "9"], ["8", None]])
    def test_the_sdks_dbstore_saves_the_next_logins(self, empty_database, engine, sql, ids):
        provision.upgrade(engine)
        made = save_with_ids(engine, ids)
        now = dict(provision.downgrade(engine))
        theirs = DBStore(
            host=empty_database.host,
            database_name=empty_database.database,
            user_name=empty_database.username,
            password=empty_database.password or "",
            port_number=str(empty_database.port),
            table_name="oauthtoken",
        )
        for name in ("first", "second", "third"):
            token = make_token(
                user=name, client_id="c", client_secret="s", refresh_token=name, access_token=name
            )
            theirs.save_token(token)
            assert theirs.find_token_by_id(str(token.get_id())).get_access_token() == name
        assert len(theirs.get_tokens()) == len(ids) + 3
        for number, id_ in enumerate(made):
            found = theirs.find_token_by_id(now.get(id_, id_))
            assert found.get_access_token() == f"a{number}"
        again = make_token(user="u0", client_id="c", access_token="again", expires_in="5")
        theirs.save_token(again)
        assert sql("SELECT expiry_time FROM oauthtoken WHERE user_name = 'u0'") == [("5",)]
        assert provision.upgrade(engine) == len(ids) + 3


class TestErrors:
    @pytest.mark.parametrize(
        "revision",
        [
            "nothing",
            "",
            "+9",
            "-1",
            "head:base",
            "base:head",
            "@",
            "zoho_orm_store@",
            "é",
            "x" * 99,
            "%",
            None,
            7,
            b"head",
        ],
    )
    @pytest.mark.parametrize("move", [provision.upgrade, provision.downgrade])
    @on_empty_sqlite
    def test_a_revision_that_does_not_exist(self, engine, move, revision):
        if move is provision.downgrade:
            provision.upgrade(engine)
        if (move, revision) == (provision.downgrade, "-1"):
            return
        with pytest.raises(ConfigurationError, match="revision"):
            move(engine, revision)

    @on_empty_sqlite
    def test_a_version_table_with_strange_contents(self, engine, sql):
        provision.upgrade(engine)
        every = (provision.upgrade, provision.downgrade, provision.check)
        for change, message in (
            ("UPDATE zoho_orm_store_version SET version_num = 's3cret'", "not a revision"),
            ("UPDATE zoho_orm_store_version SET version_num = 'zoho_orm_store_0000'", "."),
            ("INSERT INTO zoho_orm_store_version VALUES ('s3cret2')", "2 rows instead of one"),
        ):
            sql(change)
            for call in every:
                with pytest.raises(SchemaError, match=message) as raised:
                    call(engine)
                assert "s3cret" not in str(raised.value)
        with pytest.raises(SchemaError, match="2 rows"):
            provision.current(engine)

    @on_empty_sqlite
    @pytest.mark.parametrize("error", [KeyError("s3cret"), AttributeError("s3cret"), TypeError()])
    def test_a_failure_inside_alembic_is_one_of_ours(self, engine, monkeypatch, error):
        def fail(*_, **__):
            raise error

        # As if Alembic's own code did: errors of the application pass unchanged.
        fail = type(fail)(
            fail.__code__,
            {"__name__": "alembic.ddl.impl", "error": error},
            closure=fail.__closure__,
        )
        monkeypatch.setattr(MigrationContext, "run_migrations", fail)
        for target in (engine, engine.connect()):
            with pytest.raises(DatabaseError) as raised:
                provision.upgrade(target)
            assert "s3cret" not in str(raised.value)
            assert raised.value.__cause__ is raised.value.__context__ is None
        target.close()

    def test_a_target_of_another_kind(self):
        for call in (provision.upgrade, provision.downgrade, provision.current, provision.check):
            for target in (None, 7, object(), "nothing"):
                with pytest.raises(ZohoOrmStoreError):
                    call(target)
        with pytest.raises(ConfigurationError):
            provision.sql("oracle")
