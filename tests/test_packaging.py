"""What a release uploads: the wheel, the sdist, their metadata, and the README that both show."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
from email import message_from_string
from pathlib import Path
from zipfile import ZipFile

import pytest
from test_docs import SETTING, module_of

import zoho_orm_store

ROOT = Path(__file__).parent.parent
EPOCH = "1767225600"
"""The time in the files of all archives, as SOURCE_DATE_EPOCH: seconds since 1970."""


def run(*command, cwd=None, **environment):
    done = subprocess.run(
        [str(each) for each in command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        encoding="utf-8",
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def build(folder, *options):
    """Build in a folder, and return what is there: the paths by their suffixes."""
    command = (sys.executable, "-m", "build", "-q", "--no-isolation", "--outdir", folder, *options)
    run(*command, ROOT, SOURCE_DATE_EPOCH=EPOCH)
    return {path.suffix: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """The sdist, and the wheel that is built from it."""
    return build(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def wheel(release):
    return release[".whl"]


@pytest.fixture(scope="module")
def metadata(wheel):
    with ZipFile(wheel) as archive:
        (name,) = [each for each in archive.namelist() if each.endswith(".dist-info/METADATA")]
        return message_from_string(archive.read(name).decode())


def test_the_wheel_has_the_package_and_nothing_else(wheel):
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "zoho_orm_store").rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"zoho_orm_store-{zoho_orm_store.__version__}.dist-info"
    assert {name for name in names if not name.startswith(info)} == expected
    versions = (ROOT / "zoho_orm_store" / "migrations" / "versions").glob("*.py")
    assert {path.relative_to(ROOT).as_posix() for path in versions} < names
    assert "zoho_orm_store/py.typed" in names
    files = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    assert names - expected == {f"{info}/{name}" for name in files}


def test_the_sdist_has_what_its_tests_and_its_documentation_need(release):
    with tarfile.open(release[".gz"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    top = {name.partition("/")[0] for name in names}
    assert top == {
        *("PKG-INFO", ".gitignore", "pyproject.toml", "noxfile.py", "mkdocs.yml"),
        *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE"),
        *("alembic", "docs", "tests", "zoho_orm_store"),
    }
    assert not [name for name in names if name.endswith((".db", ".pyc", ".log"))]


def test_the_same_commit_builds_the_same_bytes(release, tmp_path):
    again = build(tmp_path)
    for suffix, path in release.items():
        assert again[suffix].read_bytes() == path.read_bytes(), path.name


def test_the_sdist_builds_the_wheel_that_the_checkout_builds(wheel, tmp_path):
    assert build(tmp_path, "--wheel")[".whl"].read_bytes() == wheel.read_bytes()


def test_an_index_accepts_the_metadata_and_renders_the_readme(release):
    checked = run(
        sys.executable, "-m", "twine", "--no-color", "check", "--strict", *release.values()
    )
    assert checked.count("PASSED") == 2


def test_the_metadata_says_what_the_package_is(metadata):
    assert metadata["Name"] == "zoho-orm-store"
    assert metadata["Version"] == zoho_orm_store.__version__
    assert metadata["License-Expression"] == "Apache-2.0"


def test_an_index_shows_the_readme_and_what_is_new_without_links_to_other_files(metadata):
    shown = metadata.get_payload()
    targets = re.findall(r"\]\(([^)]+)\)", shown)
    assert [each for each in targets if not each.startswith("https://")] == []
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    linked = re.findall(r"\]\(((?:docs/)?[^):#]+)\)", readme)
    assert linked
    assert [each for each in linked if f"(`{each}`)" not in shown] == []
    headings = re.findall(r"^#+ .*", readme, re.MULTILINE)
    assert [each for each in headings if each not in shown] == []
    assert f"\n## {zoho_orm_store.__version__}" in shown
    assert "\n## 0.1.0" not in shown


def test_the_addresses_in_the_metadata_are_the_indexs_own(metadata):
    """Until the project has a public home, the index is where its releases are found."""
    assert set(metadata.get_all("Project-URL")) == {
        f"{label}, https://pypi.org/project/{metadata['Name']}/{anchor}"
        for label, anchor in (("Homepage", ""), ("History", "#history"), ("Downloads", "#files"))
    }


def test_the_classifiers_are_the_pythons_that_are_tested(metadata):
    assignments = {
        node.targets[0].id: node.value
        for node in ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    tested = ast.literal_eval(assignments["PYTHONS"])
    python = "Programming Language :: Python :: "
    classifiers = metadata.get_all("Classifier")
    named = [each.removeprefix(python) for each in classifiers if re.search(r":: 3\.\d+$", each)]
    assert named == tested
    assert metadata["Requires-Python"] == f">={tested[0]}"


def test_a_new_environment_installs_the_wheel_and_runs_the_readme(wheel, tmp_path):
    python = tmp_path / "venv" / "bin" / "python"
    uv = (sys.executable, "-m", "uv", "-q")  # It takes seconds, and pip half a minute.
    run(*uv, "venv", "--python", sys.executable, tmp_path / "venv")
    run(*uv, "pip", "install", "--python", python, f"{wheel}[sdk,cli,encryption]")
    where = tmp_path / "application"
    where.mkdir()
    (where / "setting.py").write_text(SETTING, encoding="utf-8")
    (where / "readme.py").write_text(module_of(ROOT / "README.md") + "\n", encoding="utf-8")
    program = "import setting, runpy; runpy.run_path('readme.py', None, '__main__')"
    run(python, "-W", "ignore", "-c", program, cwd=where, PYTHONPATH="", PYTHONUTF8="1")
    used = run(python, "-c", "import zoho_orm_store as z; print(z.__file__)", cwd=where)
    assert "site-packages" in used
