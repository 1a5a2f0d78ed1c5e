"""The tests on every version that is supported: `nox` runs all of it, `nox -s sdk` a part.

The suites that tell versions apart are the contract and the real SDK from end to end. Each session
builds a virtual environment of its own. A Python that is not installed is skipped, and named; with
`--error-on-missing-interpreters` that is an error. Arguments after `--` replace those of pytest:
`nox -s "sdk(7.0)" -- tests/test_acting.py -x`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import nox

PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]

SDKS = {
    "5.0": "zohocrmsdk5-0",
    "6.0": "zohocrmsdk6-0",
    "7.0": "zohocrmsdk7-0",
    "8.0-first": "zohocrmsdk8-0==1.0.0",
    "8.0-newest": "zohocrmsdk8-0",
}
NEWEST_SDK = SDKS["8.0-newest"]

SQLALCHEMIES = {
    "2.0-first": "sqlalchemy[asyncio]==2.0.46",
    "2.0-newest": "sqlalchemy[asyncio]>=2.0.46,<2.1",
    "2.1-newest": "sqlalchemy[asyncio]>=2.1,<2.2",
}

SUITES = [
    "tests/test_contract.py",
    "tests/test_end_to_end.py",
    "tests/test_new_login.py",
    "tests/test_used_grants.py",
    "tests/test_acting.py",
    "tests/test_many_workers.py",
]
"""What depends on versions: the contract, and the real SDK from end to end."""

TOOLS = re.compile(r"pytest|pytest-(asyncio|timeout|xdist)|aiomysql|mysql-connector-python")
"""The packages of the extra "dev" that these suites need."""

EXTRAS = ("postgresql", "mysql", "encryption", "cli")
"""What a user may install. The SDK comes from each session."""

WHAT_IS_INSTALLED = """
import sys
from importlib.metadata import distributions
print(sys.version)
print(*sorted(f"{each.name}=={each.version}" for each in distributions()))
"""

PROJECT = nox.project.load_toml("pyproject.toml")["project"]

nox.options.sessions = ["sdk", "sqlalchemy", "python", "lowest", "newest"]
nox.options.default_venv_backend = "uv|venv"
nox.options.download_python = "never"

if shutil.which("pyenv") and "PYENV_VERSION" not in os.environ:
    # Let all that pyenv has installed start by their names, and not only those it has switched to.
    found = subprocess.run(["pyenv", "versions", "--bare"], capture_output=True, text=True)  # noqa: S607
    os.environ["PYENV_VERSION"] = ":".join(reversed(found.stdout.split()))


@cache
def newest_at_hand() -> str:
    """The newest of the supported Pythons that starts here."""
    for version in reversed(PYTHONS):
        try:
            subprocess.run([f"python{version}", "-V"], check=True, capture_output=True)  # noqa: S603
        except (OSError, subprocess.CalledProcessError):
            continue
        return version
    return PYTHONS[0]  # It is skipped, with its name.


def requirements(*extras: str) -> list[str]:
    """The package's requirements, and those of some extras, as pyproject.toml has them."""
    optional = PROJECT["optional-dependencies"]
    return [*PROJECT["dependencies"], *(each for extra in extras for each in optional[extra])]


def name_of(requirement: str) -> str:
    """The name in a requirement: ``"psycopg"`` for ``"psycopg[binary]>=3.2"``."""
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


def run_suites(session: nox.Session, *chosen: str, suites: list[str] = SUITES) -> None:
    """Install chosen versions and the newest of all else, and run the suites.

    Args:
        session: The session. Its arguments replace the suites.
        chosen: The requirements that the session is about, and an SDK.
        suites: The arguments of pytest.
    """
    names = {name_of(each) for each in chosen}
    others = [each for each in requirements(*EXTRAS) if name_of(each) not in names]
    tools = [each for each in requirements("dev") if TOOLS.fullmatch(name_of(each))]
    session.install(*chosen, *others, *tools)
    session.install("--no-deps", "-e", ".")
    session.run("python", "-c", WHAT_IS_INSTALLED)
    session.run("python", "-m", "pytest", "-q", "-n", "2", *(session.posargs or suites))


@nox.session
@nox.parametrize("version", list(SDKS), ids=list(SDKS))
def sdk(session: nox.Session, version: str) -> None:
    """The suites on one SDK, which sees no database: SQLite and the memory will do."""
    run_suites(
        session, SDKS[version], suites=[*SUITES, "-k", "not (postgresql or mariadb or mysql)"]
    )


@nox.session
@nox.parametrize("version", list(SQLALCHEMIES), ids=list(SQLALCHEMIES))
def sqlalchemy(session: nox.Session, version: str) -> None:
    """The suites on one SQLAlchemy."""
    run_suites(session, SQLALCHEMIES[version], NEWEST_SDK)


@nox.session(python=PYTHONS)
def python(session: nox.Session) -> None:
    """The suites on one Python."""
    run_suites(session, NEWEST_SDK)


@nox.session(python=sorted({PYTHONS[0], newest_at_hand()}))
def lowest(session: nox.Session) -> None:
    """The suites on the lowest version of everything that pyproject.toml allows."""
    run_suites(session, *(each.replace(">=", "==") for each in requirements(*EXTRAS, "sdk")))


@nox.session(python=newest_at_hand())
def newest(session: nox.Session) -> None:
    """The suites on the newest version of everything."""
    run_suites(session, NEWEST_SDK)


@nox.session
def tests(session: nox.Session) -> None:
    """All tests, on the versions that a new installation gets."""
    session.install("-e", ".[dev]")
    session.run("python", "-m", "pytest", "-q", "-n", "auto", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff and mypy."""
    session.install("-e", ".[dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation as a site, in site/."""
    session.install("-e", ".[docs]")
    session.run("mkdocs", "build", "--strict", env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def build(session: nox.Session) -> None:
    """The sdist and the wheel, in dist/, checked as for a release."""
    session.install("build", "twine")
    shutil.rmtree("dist", ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", "dist")
    session.run("twine", "check", "--strict", *map(str, Path("dist").iterdir()))
