"""What importing loads, which layer imports which, and what a missing package says."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import zoho_orm_store

PACKAGE = Path(zoho_orm_store.__file__).parent
ARCHITECTURE = PACKAGE.parent / "docs" / "architecture.md"

LAYERS = [
    {
        "errors",
        "records",
        "_matching",
        "_digests",
        "encryption",
        "_secrets",
        "_cache",
        "_database.forks",
        "_database.drivers",
    },
    {"models", "_schema", "_sql", "_database"},
    {"repository", "refresh", "_refresh", "_tokens", "_scopes", "_adding", "_rotation"},
    {"provision", "migrations", "rotation", "transfer"},
    {"store", "memory", "_sdk", "telemetry"},
    {"__main__", "cli", "testing"},
]
"""The lowest first. A module imports only from its own layer and from those below it."""

PLAIN_PYTHON = LAYERS[0]

MAY_IMPORT = {
    "zohocrmsdk": {"_sdk", "store", "memory", "cli", "testing"},
    "alembic": {"provision", "migrations", "cli"},
    "sqlalchemy": set().union(*LAYERS[1:]),
    "opentelemetry": {"telemetry"},
}
"""Packages from outside, and the modules and packages of ours that may import them."""


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(PACKAGE.parent)},
    ).stdout


def loaded_by(statement):
    """The packages that are loaded after a statement in a new interpreter."""
    code = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(run(code).split())


def name_of(path):
    """The module's name within the package: ``"_database.forks"``."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name: path for path in sorted(PACKAGE.rglob("*.py")) if (name := name_of(path))}
"""The paths of all modules by name, but for the package itself, which imports each when it is asked for."""


def unit_of(module):
    """What the layers name: a module, or else the package that it is in."""
    return module if any(module in layer for layer in LAYERS) else module.partition(".")[0]


def layer_of(module):
    return next(number for number, layer in enumerate(LAYERS) if unit_of(module) in layer)


def imports_of(path):
    """What a module imports anywhere in its code, other than for type checking."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def our_imports_of(path):
    """The modules of this package that a module imports."""
    for name in imports_of(path):
        parts = name.split(".")
        if parts.pop(0) == "zoho_orm_store":
            while parts and ".".join(parts) not in MODULES:
                parts.pop()
            if parts:
                yield ".".join(parts)


def test_every_module_has_a_layer():
    for module in MODULES:
        layer_of(module)
    units = {unit_of(module) for module in MODULES}
    assert units == set().union(*LAYERS), "a layer names what is not there"


def test_the_documentation_draws_the_same_layers():
    [drawing] = re.findall(r"```text\n(6 .*?)```", ARCHITECTURE.read_text(), re.DOTALL)
    drawn = [
        {
            name.removesuffix(".py").removesuffix("/").replace("/", ".")
            for name in re.findall(r"\S+(?:\.py|/(?!\S))", layer)
        }
        for layer in re.split(r"^\d", drawing, flags=re.MULTILINE)[1:]
    ]
    assert drawn[::-1] == LAYERS


def test_a_module_imports_only_what_stands_below_it():
    wrong = [
        f"{module} imports {imported}"
        for module, path in MODULES.items()
        for imported in our_imports_of(path)
        if layer_of(imported) > layer_of(module)
    ]
    assert wrong == []


def test_there_are_no_import_cycles():
    graph = {module: {*our_imports_of(path)} - {module} for module, path in MODULES.items()}
    tuple(TopologicalSorter(graph).static_order())  # It raises CycleError, which names the cycle.


def test_a_foreign_package_is_imported_only_where_it_belongs():
    wrong = [
        f"{module} imports {name}"
        for module, path in MODULES.items()
        for name in imports_of(path)
        if (allowed := MAY_IMPORT.get(name.partition(".")[0])) is not None
        and unit_of(module) not in allowed
    ]
    assert wrong == []


@pytest.mark.parametrize("module", sorted(PLAIN_PYTHON))
def test_plain_python_loads_no_sqlalchemy_by_a_detour(module):
    loaded = loaded_by(f"import zoho_orm_store.{module}")
    assert "zoho_orm_store" in loaded
    assert not {"sqlalchemy", "alembic", "zohocrmsdk", "cryptography"} & loaded


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
    assert not absent & loaded_by(statement)


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
        ("aiomysql", "mysql+aiomysql://u@h/d", "mysql"),  # by another driver
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
