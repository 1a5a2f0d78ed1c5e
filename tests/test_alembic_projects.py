"""The three ways to take the schema into a project that `alembic init` has made."""

from __future__ import annotations

import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from databases import DATABASES
from preloaded import Interpreter
from sdk_tokens import make_token
from sqlalchemy import MetaData, create_engine, inspect, text
from test_migrations import SAMPLE_DDL

from zoho_orm_store import SQLAlchemyTokenStore, metadata, provision

ROOT = Path(__file__).parent.parent

DRIVERS = {
    "generic": {"sqlite": "sqlite", "postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql"},
    "async": {
        "sqlite": "sqlite+aiosqlite",
        "postgresql": "postgresql+asyncpg",
        "mysql": "mysql+asyncmy",
    },
}

MODELS = """
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

class Base(DeclarativeBase):
    pass

class Thing(Base):
    __tablename__ = "thing"
    id: Mapped[int] = mapped_column(primary_key=True)
"""

OURS = {"oauthtoken", "oauthtoken_refresh_lease"}


@pytest.fixture(autouse=True)
def nothing_is_written_into_the_package(request):
    """Alembic puts a new revision beside its parent, which may be one of ours."""
    yield
    if "installed" in request.fixturenames:
        found = revision_files(request.getfixturevalue("installed"))
        assert found == revision_files(ROOT)


def revision_files(folder):
    return {path.name for path in (folder / "zoho_orm_store/migrations/versions").glob("*.py")}


PRELOADED = (
    *("alembic.command", "alembic.config", "logging.config", "sqlalchemy.ext.asyncio"),
    *(f"sqlalchemy.dialects.{name}" for name in ("sqlite", "postgresql", "mysql")),
    *("psycopg", "pymysql"),
)


@contextmanager
def interpreter(packages, *modules, **options):
    """Python with the package of a folder, which each program imports anew."""
    python = Interpreter(*PRELOADED, *modules, PYTHONPATH=str(packages), **options)
    try:
        yield python
    finally:
        python.close()


@pytest.fixture(scope="module")
def python(installed):
    with interpreter(installed) as python:
        yield python


class Project:
    """A project with models and an Alembic environment of its own."""

    def __init__(self, folder, template, url, python):
        self.folder = folder
        self.url = url
        self.python = python
        self.alembic("init", "-t", template, "migrations")
        (folder / "app_models.py").write_text(MODELS)
        address = url.set(drivername=DRIVERS[template][url.get_backend_name()])
        shown = address.render_as_string(hide_password=False).replace("%", "%%")
        self.edit("alembic.ini", r"^sqlalchemy.url = .*$", f"sqlalchemy.url = {shown}")

    def alembic(self, *arguments, fails=False):
        return self.run("alembic", *arguments, fails=fails)

    def run(self, *command, fails=False, **environment):
        done = self.python.run("-m", *command, cwd=self.folder, **environment)
        output = done.stdout + done.stderr
        assert (done.returncode != 0) == fails, output
        return output

    def edit(self, name, pattern, replacement):
        path = self.folder / name
        text, number = re.subn(pattern, lambda _: replacement, path.read_text(), flags=re.MULTILINE)
        assert number, f"{name} has no {pattern}"
        path.write_text(text)

    def target(self, metadata, *, helper=None):
        self.edit(
            "migrations/env.py",
            "^target_metadata = None$",
            f"import zoho_orm_store\nfrom app_models import Base\ntarget_metadata = {metadata}",
        )
        if helper:
            self.edit(
                "migrations/env.py",
                "target_metadata=target_metadata",
                f"target_metadata=target_metadata, {helper}=zoho_orm_store.provision.{helper}",
            )

    def paths(self):
        return [*(self.folder / "migrations" / "versions").glob("*.py")]

    def revisions(self):
        return [path.name for path in self.paths()]

    def tables(self):
        engine = create_engine(self.url)
        names = set(inspect(engine).get_table_names())
        engine.dispose()
        return names


@pytest.fixture
def project(template, empty_database, tmp_path, python):
    return Project(tmp_path, template, empty_database, python)


def on_each_database(asynchronous):
    """A way's test on each database, and once more with an asynchronous engine on one of them.

    The templates differ in how they connect, whatever a project takes in.
    """
    pairs = [("generic", name) for name in DATABASES] + [("async", asynchronous)]
    return pytest.mark.parametrize(
        ("template", "empty_database"), pairs, indirect=["empty_database"]
    )


@on_each_database(asynchronous="sqlite")
def test_our_metadata_among_the_autogenerate_targets(project):
    project.target("[Base.metadata, zoho_orm_store.metadata]")
    project.alembic("revision", "--autogenerate", "-m", "tables")
    project.alembic("upgrade", "head")
    assert project.tables() == {*OURS, "thing", "alembic_version"}
    project.alembic("check")
    provision.check(project.url)
    with SQLAlchemyTokenStore(project.url) as store:
        assert store.get_tokens() == []
    assert "zoho_orm_store_version" not in project.tables()
    project.alembic("downgrade", "base")
    assert project.tables() == {"alembic_version"}


OWN_MODELS = """
from zoho_orm_store import RefreshLeaseMixin, StoredTokenMixin

class ZohoToken(StoredTokenMixin, Base):
    __tablename__ = "zoho_token"

class ZohoLease(RefreshLeaseMixin, Base):
    __tablename__ = "zoho_lease"
"""


@pytest.mark.parametrize("template", ["generic"])
def test_the_types_of_mysql_are_left_out_of_the_revisions_for_another_database(project):
    (project.folder / "app_models.py").write_text(MODELS + OWN_MODELS)
    project.target("[Base.metadata, zoho_orm_store.metadata]", helper="render_item")
    project.alembic("revision", "--autogenerate", "-m", "tables")
    (path,) = project.paths()
    assert path.read_text().count("op.create_table(") == 5
    is_mysql = project.url.get_backend_name() == "mysql"
    assert ("mysql" in path.read_text()) == is_mysql
    project.alembic("upgrade", "head")
    project.alembic("check")
    provision.check(project.url)
    # To a revision with the types of both, there would be nothing to add.
    project.edit("migrations/env.py", ", render_item=zoho_orm_store.provision.render_item", "")
    project.alembic("check")


def documented_lines(which):
    """The lines for alembic.ini on the page about provisioning, for a kind of project."""
    page = (ROOT / "docs" / "provisioning.md").read_text()
    (block,) = re.findall(rf"```ini\n; {which}[^\n]*\n(.*?)```", page, re.DOTALL)
    return block


def use_our_lineage(project, separator="newline"):
    project.edit("alembic.ini", "^path_separator = os\n", "")
    lines = documented_lines("alembic").replace("= newline", f"= {separator}")
    project.edit("alembic.ini", r"^\[alembic\]\n", f"[alembic]\n{lines}")


@on_each_database(asynchronous="postgresql")
@pytest.mark.parametrize("has_revision", [pytest.param(True, marks=pytest.mark.soak), False])
def test_our_lineage_in_its_version_locations(project, has_revision):
    project.target("Base.metadata", helper="include_name")
    if has_revision:
        project.alembic("revision", "--autogenerate", "-m", "things")
    else:
        project.alembic("revision", "-m", "start")
    use_our_lineage(project)
    project.alembic("merge", "heads", "-m", "add the token store")
    project.alembic("upgrade", "head")
    if not has_revision:
        project.alembic("revision", "--autogenerate", "-m", "things")
        project.alembic("upgrade", "head")
    assert project.tables() == {*OURS, "thing", "alembic_version"}
    project.alembic("check")
    provision.check(project.url)
    assert len(project.revisions()) == 3 - has_revision
    project.alembic("downgrade", "base")
    assert project.tables() == {"alembic_version"}


LATER_RELEASE = """
from zoho_orm_store.migrations.support import op, revision_step
import sqlalchemy as sa
revision = "zoho_orm_store_0004"
down_revision = "zoho_orm_store_0003"
branch_labels = depends_on = None

@revision_step
def upgrade():
    present = sa.inspect(op.get_bind()).get_columns("oauthtoken")
    if "later" not in [column["name"] for column in present]:
        op.add_column("oauthtoken", sa.Column("later", sa.String(10)))

@revision_step
def downgrade():
    op.drop_column("oauthtoken", "later")
"""


@pytest.fixture
def packages(installed, tmp_path):
    """The package in a folder that the test may write into."""
    return shutil.copytree(installed, tmp_path / "packages")


@pytest.fixture
def python_of_packages(packages):
    with interpreter(packages) as python:
        yield python


@pytest.mark.parametrize("template", ["generic"])
@pytest.mark.parametrize("empty_database", ["sqlite"], indirect=True)
def test_a_later_release_brings_another_revision(
    template, empty_database, tmp_path, installed, packages, python_of_packages
):
    project = Project(tmp_path, template, empty_database, python_of_packages)
    project.target("Base.metadata", helper="include_name")
    project.alembic("revision", "--autogenerate", "-m", "things")
    use_our_lineage(project)
    project.alembic("merge", "heads", "-m", "add the token store")
    project.alembic("upgrade", "head")
    old, before = project.paths(), project.alembic("current").split(" (head)")[0].split("\n")[-1]
    ours = packages / "zoho_orm_store/migrations/versions"
    (ours / "zoho_orm_store_0003_later.py").write_text(LATER_RELEASE)
    assert "Multiple head revisions" in project.alembic("upgrade", "head", fails=True)
    project.alembic("merge", "heads", "-m", "the token store's next release")
    project.alembic("upgrade", "head")
    project.alembic("revision", "-m", "something else")
    assert len(project.revisions()) == 4
    assert revision_files(packages) == revision_files(installed) | {"zoho_orm_store_0003_later.py"}
    engine = create_engine(project.url)
    assert "later" in {column["name"] for column in inspect(engine).get_columns("oauthtoken")}
    engine.dispose()
    # Back to the release before, whose store works with the column that it does not know.
    project.alembic("stamp", "--purge", before)
    (ours / "zoho_orm_store_0003_later.py").rename(tmp_path / "later")
    kept = {path: path.rename(tmp_path / path.name) for path in project.paths() if path not in old}
    with SQLAlchemyTokenStore(project.url) as store:
        store.save_token(make_token(user="u", access_token="a"))
    provision.check(project.url)
    project.alembic("upgrade", "head")
    assert before in project.alembic("current")
    # And forward again.
    (tmp_path / "later").rename(ours / "zoho_orm_store_0003_later.py")
    for path, moved in kept.items():
        moved.rename(path)
    project.alembic("upgrade", "head")


FLASK_APP = """
from flask import Flask
from flask_migrate import Migrate
from flask_sqlalchemy import SQLAlchemy
from zoho_orm_store import include_name

app = Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = {url!r}
db = SQLAlchemy()

class Thing(db.Model):
    id = db.Column(db.Integer, primary_key=True)

db.init_app(app)
Migrate(app, db, include_name=include_name)
"""


class FlaskProject(Project):
    """A project of Flask-Migrate, whose alembic.ini lies beside env.py."""

    def __init__(self, folder, url, python):
        self.folder = folder
        self.url = url
        self.python = python
        address = url.set(drivername=DRIVERS["generic"][url.get_backend_name()])
        shown = address.render_as_string(hide_password=False)
        (folder / "flask_app.py").write_text(FLASK_APP.format(url=shown))
        self.flask("init")

    def flask(self, *arguments, fails=False):
        return self.run("flask", "db", *arguments, fails=fails, FLASK_APP="flask_app")


@pytest.fixture(scope="module")
def python_for_flask(installed):
    with interpreter(
        installed, "flask_migrate", "flask_sqlalchemy", options=("-W", "ignore")
    ) as python:
        yield python


@pytest.mark.parametrize("has_revision", [True, pytest.param(False, marks=pytest.mark.soak)])
def test_our_lineage_in_a_project_of_flask_migrate(
    empty_database, tmp_path, installed, python_for_flask, has_revision
):
    project = FlaskProject(tmp_path, empty_database, python_for_flask)
    project.flask(*(["migrate", "-m", "things"] if has_revision else ["revision", "-m", "start"]))
    lines = documented_lines("migrations/alembic.ini")
    project.edit("migrations/alembic.ini", r"^\[alembic\]\n", f"[alembic]\n{lines}")
    project.flask("merge", "-m", "add the token store", "heads")
    project.flask("upgrade")
    if not has_revision:
        project.flask("migrate", "-m", "things")
        project.flask("upgrade")
    assert project.tables() == {*OURS, "thing", "alembic_version"}
    project.flask("check")
    provision.check(project.url)
    assert len(project.revisions()) == 3 - has_revision
    project.flask("downgrade", "base")
    assert project.tables() == {"alembic_version"}


@on_each_database(asynchronous="mariadb")
def test_ours_beside_its_own(project):
    project.target("Base.metadata", helper="include_name")
    provision.upgrade(project.url)
    project.alembic("revision", "--autogenerate", "-m", "things")
    project.alembic("upgrade", "head")
    assert project.tables() == {*OURS, "thing", "alembic_version", "zoho_orm_store_version"}
    project.alembic("check")
    project.alembic("downgrade", "base")
    assert project.tables() > OURS
    provision.downgrade(project.url)
    assert project.tables() == {"alembic_version", "zoho_orm_store_version"}


@pytest.mark.parametrize("template", ["generic"])
@pytest.mark.parametrize("is_adopted", [False, True])
def test_our_metadata_among_the_targets_and_the_tables_by_our_command(project, is_adopted):
    if is_adopted:
        engine = create_engine(project.url)
        with engine.begin() as connection:
            connection.execute(text(SAMPLE_DDL))
        engine.dispose()
    provision.upgrade(project.url)
    project.target("[Base.metadata, zoho_orm_store.metadata]", helper="include_object")
    project.alembic("revision", "--autogenerate", "-m", "things")
    (path,) = (project.folder / "migrations" / "versions").glob("*_things.py")
    assert not any(name in path.read_text() for name in (*OURS, "zoho_orm_store_version"))
    project.alembic("upgrade", "head")
    project.alembic("check")


@pytest.mark.parametrize("template", ["generic"])
@pytest.mark.parametrize("empty_database", ["sqlite"], indirect=True)
class TestWhatGoesWrong:
    def test_the_templates_path_separator_skips_our_revisions(self, project):
        """Alembic splits at the colon, and says nothing: hence the warning in the documentation."""
        use_our_lineage(project, separator="os")
        project.alembic("upgrade", "heads")
        assert not OURS & project.tables()
        provision_says = (
            f"has no tables of this package, or they lack something; revision {provision.head()}"
        )
        with pytest.raises(Exception, match=provision_says):
            provision.check(project.url)

    def test_without_a_revision_of_its_own_alembic_writes_beside_ours(self, project, installed):
        """Hence the first step in the documentation."""
        use_our_lineage(project)
        project.alembic("revision", "-m", "first")
        (path,) = (installed / "zoho_orm_store/migrations/versions").glob("*_first.py")
        path.unlink()
        assert project.revisions() == []

    def test_two_heads_are_named_by_alembic(self, project):
        project.target("Base.metadata", helper="include_name")
        project.alembic("revision", "--autogenerate", "-m", "things")
        use_our_lineage(project)
        assert "Multiple head revisions" in project.alembic("upgrade", "head", fails=True)
        project.alembic("upgrade", "heads")
        assert project.tables() >= OURS

    def test_without_the_helper_autogenerate_drops_our_tables(self, project):
        project.target("Base.metadata")
        provision.upgrade(project.url)
        project.alembic("revision", "--autogenerate", "-m", "dropping")
        (path,) = (project.folder / "migrations" / "versions").glob("*_dropping.py")
        assert "op.drop_table('oauthtoken')" in path.read_text()


@pytest.mark.parametrize("empty_database", ["sqlite", "postgresql"], indirect=True)
class TestSeveralSchemas:
    """With include_schemas=True, autogenerate looks at the tables of every schema."""

    @pytest.fixture
    def engine(self, empty_database, tmp_path):
        engine = create_engine(empty_database)
        if engine.dialect.name == "sqlite":
            from sqlalchemy import event

            @event.listens_for(engine, "connect")
            def attach(connection, record):
                connection.execute(f"ATTACH '{tmp_path / 'tenant.db'}' AS tenant")
        else:
            with engine.begin() as connection:
                connection.execute(text("CREATE SCHEMA tenant"))
        provision.upgrade(engine.execution_options(schema_translate_map={None: "tenant"}))
        yield engine
        engine.dispose()

    def differences(self, engine, target, **options):
        with engine.connect() as connection:
            options |= {"include_schemas": True}
            context = MigrationContext.configure(connection, opts=options)
            return [each[0] for each in compare_metadata(context, target)]

    def test_ours_in_another_schema_are_left_alone(self, engine):
        filters = (
            {"include_name": provision.include_name},
            {"include_object": provision.include_object},
        )
        for here_too in (False, True):
            if here_too:
                provision.upgrade(engine)
            for filter in filters:
                assert self.differences(engine, MetaData(), **filter) == []
        assert self.differences(engine, metadata, **filters[1]) == []
        assert set(self.differences(engine, MetaData())) >= {"remove_table"}

    def test_other_tables_in_that_schema_are_not(self, engine):
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE tenant.other (id integer primary key)"))
        for filter in ("include_name", "include_object"):
            given = {filter: getattr(provision, filter)}
            assert self.differences(engine, MetaData(), **given) == ["remove_table"]


def test_the_databases_are_those_of_all_other_tests():
    assert len(DRIVERS["generic"]) == len({*DATABASES} - {"mysql"})
