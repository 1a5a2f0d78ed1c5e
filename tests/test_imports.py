"""What importing loads, which layer imports which, and what a missing package says."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import zoho_orm_store

PACKAGE = Path(zoho_orm_store.__file__).parent

LAYERS = [
    {"errors", "forks", "hashing"},
    {"record", "revisions"},
    {"matching", "cipher"},
    {
        "digests",
        "models",
        "statements",
        "dialects",
        "loop",
        "engines",
        "binding",
        "scopes",
    },
    {"repository", "lease", "refresh"},
    {"migrations", "provision", "importers", "keys"},
    {"sdk", "adapter", "memory", "store"},
    {"testing", "demo", "cli"},
]
"""Each imports only what stands above it here, or in its own row."""

WITH_THE_SDK = {"sdk", "testing", "demo"}


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(PACKAGE.parent)},
    ).stdout


def layer_of(module):
    return next(number for number, layer in enumerate(LAYERS) if module in layer)


def imports_of(path):
    """The modules that a module imports, other than for type checking."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


MODULES = [
    path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts != ("__init__.py",)
]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_what_stands_below_it(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imports_of(path):
        root, _, rest = name.partition(".")
        if root == "zohocrmsdk":
            assert own in WITH_THE_SDK, f"{own} imports the SDK"
        if root == "zoho_orm_store" and rest and rest.partition(".")[0] != "__version__":
            imported = rest.partition(".")[0]
            if (PACKAGE / imported).is_dir() or (PACKAGE / f"{imported}.py").is_file():
                assert layer_of(imported) <= layer_of(own), f"{own} imports {imported}"


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import zoho_orm_store", {"sqlalchemy", "alembic", "zohocrmsdk", "cryptography"}),
        (
            "from zoho_orm_store import AsyncTokenRepository, StoredToken",
            {"alembic", "zohocrmsdk", "cryptography", "aiosqlite"},
        ),
        ("from zoho_orm_store import provision", {"zohocrmsdk", "cryptography", "typer"}),
        ("from zoho_orm_store import SQLAlchemyTokenStore", {"alembic", "cryptography", "rich"}),
    ],
)
def test_importing_loads_no_more_than_is_used(statement, absent):
    code = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    assert not absent & set(run(code).split())


def test_every_public_name_is_there():
    for name in zoho_orm_store.__all__:
        assert getattr(zoho_orm_store, name) is not None
    assert set(zoho_orm_store.__all__) <= set(dir(zoho_orm_store))
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        zoho_orm_store.nonesuch  # noqa: B018


def test_a_default_driver_that_no_extra_brings_is_named_with_another_G2():
    code = (
        "import sys; sys.modules['MySQLdb'] = None\n"
        "import zoho_orm_store as z\n"
        "try: z.SQLAlchemyTokenStore('mysql://u@h/d')\n"
        "except z.MissingDependencyError as error: print(error)"
    )
    said = run(code)
    assert "pip install 'zoho-orm-store[mysql]' and begin the URL with mysql+pymysql://" in said


@pytest.mark.parametrize(
    ("package", "url", "extra"),
    [
        ("psycopg", "postgresql+psycopg://u@h/d", "postgresql"),
        ("asyncpg", "postgresql+asyncpg://u@h/d", "postgresql"),
        ("pymysql", "mysql+pymysql://u@h/d", "mysql"),
        ("asyncmy", "mysql+asyncmy://u@h/d", "mysql"),
        ("aiomysql", "mysql+aiomysql://u@h/d", "mysql"),
    ],
)
def test_a_missing_driver_is_named_with_its_extra_G2(package, url, extra):
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "import zoho_orm_store as z\n"
        f"try: z.SQLAlchemyTokenStore({url!r})\n"
        "except z.MissingDependencyError as error: print(error)"
    )
    assert f"pip install 'zoho-orm-store[{extra}]'" in run(code)
