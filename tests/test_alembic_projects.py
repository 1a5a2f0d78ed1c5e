"""The three ways to take the schema into a project that `alembic init` has made."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from databases import DATABASES
from sqlalchemy import create_engine, inspect, text
from test_migrations import SAMPLE_DDL

from zoho_orm_store import SQLAlchemyTokenStore, provision

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


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """A folder with the package as its wheel installs it."""
    folder = tmp_path_factory.mktemp("wheel")
    build = (sys.executable, "-m", "build", "-q", "--no-isolation", "--wheel")
    run(*build, "--outdir", str(folder), cwd=ROOT)
    (wheel,) = folder.glob("*.whl")
    pip = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-warn-conflicts")
    run(*pip, "--target", str(folder / "packages"), str(wheel))
    packages = folder / "packages"
    where = (sys.executable, "-c", "import zoho_orm_store; print(zoho_orm_store.__file__)")
    assert str(packages) in run(*where, cwd=folder, PYTHONPATH=str(packages))
    return packages


def run(*command, cwd=None, fails=False, **env):
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=False
    )
    output = done.stdout + done.stderr
    assert (done.returncode != 0) == fails, output
    return output


class Project:
    """A project with models and an Alembic environment of its own."""

    def __init__(self, folder, template, url, installed):
        self.folder = folder
        self.url = url
        self.env = {"PYTHONPATH": f"{installed}{os.pathsep}{folder}"}
        self.alembic("init", "-t", template, "migrations")
        (folder / "app_models.py").write_text(MODELS)
        address = url.set(drivername=DRIVERS[template][url.get_backend_name()])
        shown = address.render_as_string(hide_password=False).replace("%", "%%")
        self.edit("alembic.ini", r"^sqlalchemy.url = .*$", f"sqlalchemy.url = {shown}")

    def alembic(self, *arguments, fails=False):
        command = (sys.executable, "-m", "alembic", *arguments)
        return run(*command, cwd=self.folder, fails=fails, **self.env)

    def edit(self, name, pattern, replacement):
        path = self.folder / name
        text, number = re.subn(pattern, lambda _: replacement, path.read_text(), flags=re.MULTILINE)
        assert number, f"{name} has no {pattern}"
        path.write_text(text)

    def target(self, metadata, *, filter=None):
        self.edit(
            "migrations/env.py",
            "^target_metadata = None$",
            f"import zoho_orm_store\nfrom app_models import Base\ntarget_metadata = {metadata}",
        )
        if filter:
            self.edit(
                "migrations/env.py",
                "target_metadata=target_metadata",
                f"target_metadata=target_metadata, {filter}=zoho_orm_store.provision.{filter}",
            )

    def tables(self):
        engine = create_engine(self.url)
        names = set(inspect(engine).get_table_names())
        engine.dispose()
        return names


@pytest.fixture
def project(template, empty_database, tmp_path, installed):
    return Project(tmp_path, template, empty_database, installed)


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


def use_our_lineage(project, separator="newline"):
    project.edit("alembic.ini", "^path_separator = os$", f"path_separator = {separator}")
    project.edit(
        "alembic.ini",
        r"^# version_locations = .*$",
        "version_locations =\n    %(here)s/migrations/versions\n"
        "    zoho_orm_store:migrations/versions",
    )


@on_each_database(asynchronous="postgresql")
def test_our_lineage_in_its_version_locations(project):
    project.target("Base.metadata", filter="include_name")
    project.alembic("revision", "--autogenerate", "-m", "things")
    use_our_lineage(project)
    project.alembic("merge", "heads", "-m", "add the token store")
    project.alembic("upgrade", "head")
    assert project.tables() == {*OURS, "thing", "alembic_version"}
    project.alembic("check")
    provision.check(project.url)
    project.alembic("downgrade", "base")
    assert project.tables() == {"alembic_version"}


@on_each_database(asynchronous="mariadb")
def test_ours_beside_its_own(project):
    project.target("Base.metadata", filter="include_name")
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
    project.target("[Base.metadata, zoho_orm_store.metadata]", filter="include_object")
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

    def test_two_heads_are_named_by_alembic(self, project):
        project.target("Base.metadata", filter="include_name")
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


def test_the_databases_are_those_of_all_other_tests():
    assert len(DRIVERS["generic"]) == len(DATABASES)
