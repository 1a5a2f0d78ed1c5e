"""The README and the pages in docs/: their Python runs, their links and names lead somewhere.

Every block of Python on a page is run, in the order of the page and as one module in a process of
its own, in an empty folder. What a page needs besides, or wants checked, it has in comments that
its readers do not see:

    <!-- python
    assert store.get_tokens()
    -->

`SETTING` is what all pages find: a running `LoopbackZoho` named ``zoho``, reached through each of
the SDK's data centres, and a client and tokens of its own in the environment. A page that defines
tests is run by pytest.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
from preloaded import Interpreter

import zoho_orm_store

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]

SETTING = """
import builtins, os
from zohocrmsdk.src.com.zoho.crm.api import dc
from zoho_orm_store.testing import LoopbackZoho

builtins.zoho = zoho = LoopbackZoho().start()
for region in ("US", "EU", "IN", "AU", "JP", "SA", "CN", "CA"):
    getattr(dc, region + "DataCenter").PRODUCTION = staticmethod(zoho.environment)
os.environ |= {
    "ZOHO_CLIENT_ID": zoho.client_id,
    "ZOHO_CLIENT_SECRET": zoho.client_secret,
    "ZOHO_GRANT_TOKEN": zoho.issue_grant_token(),
    "ZOHO_REFRESH_TOKEN": zoho.issue_refresh_token(),
    "no_proxy": "127.0.0.1",
}
"""

WARNINGS = ("error", "ignore::DeprecationWarning", "ignore::SyntaxWarning")

FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<language>[^\n]*)\n(?P<code>.*?)^ *(?P=fence)[ \t]*$"
    r"|^<!-- python\n(?P<hidden>.*?)^-->",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")
FILE = re.compile(r"`(?P<name>[\w./-]+\.(?:py|md|toml|yml|txt\.mako)|[\w.-]+/[\w./-]*)`")
READERS_OWN = {"env.py"}
"""Files of the readers' own projects."""
READERS_OWN_NAMES = {"Base", "INSTALLED_APPS"}
"""What a reader's own file already has, to which a block is added."""
SECRET_IN_URL = re.compile(
    r"\w://[^\s/:@]+:[^\s/@]+@|[?&](?:\w*token|code|\w*secret|\w*password|\w*key)="
)
COMMAND = re.compile(r"zoho-orm-store(?P<arguments>(?: +[\w-][^\s`'\"]*)+)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def module_of(page: Path) -> str:
    """The page with everything blanked out that is no Python, so that line numbers stay."""
    text = page.read_text(encoding="utf-8")
    lines = [""] * (text.count("\n") + 1)
    for block in FENCE.finditer(text):
        group = "hidden" if block["hidden"] is not None else "code"
        if group == "code" and block["language"].strip() != "python":
            continue
        first = text.count("\n", 0, block.start(group))
        for number, line in enumerate(dedent(block[group]).splitlines(), first):
            lines[number] = line
    return "\n".join(lines).rstrip("\n")


PAGES_WITH_PYTHON = [page for page in PAGES if module_of(page)]


PRELOADED = (
    *("alembic.command", "cryptography.fernet", "http.server", "pytest", "sqlalchemy.ext.asyncio"),
    *(f"zohocrmsdk.src.com.zoho.{name}" for name in ("crm.api", "crm.api.dc", "crm.api.record")),
)
"""What most pages import of others. The package itself each of them imports anew."""


@pytest.fixture(scope="module")
def python():
    options = [item for action in WARNINGS for item in ("-W", action)]
    # The options of this run, such as -n, are not the page's.
    own = {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", "PYTEST_ADDOPTS": ""}
    python = Interpreter(*PRELOADED, options=options, **own)
    yield python
    python.close()


@pytest.mark.parametrize("page", PAGES_WITH_PYTHON, ids=name_of)
def test_the_python_on_a_page_runs(page, tmp_path, python):
    module = module_of(page)
    (tmp_path / "conftest.py").write_text(SETTING, encoding="utf-8")
    (tmp_path / "page.py").write_text(module + "\n", encoding="utf-8")
    if re.search(r"^(async )?def test_", module, re.MULTILINE):
        warnings = [item for action in WARNINGS for item in ("-W", action)]
        options = ["-q", "-p", "no:cacheprovider", "--rootdir=.", *warnings]
        program = ["-m", "pytest", *options, "page.py"]
    else:
        program = ["-c", "import conftest, runpy; runpy.run_path('page.py', None, '__main__')"]
    done = python.run(*program, cwd=tmp_path)
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"page.py is {name_of(page)}, line by line:\n{output}"
    assert "A token was not saved" not in output


def test_the_pages_that_show_the_package_at_work_have_python():
    names = {page.name for page in PAGES_WITH_PYTHON}
    expected = {"README.md", "index.md", "getting-started.md", "behaviour.md", "databases.md"}
    assert expected | {"async.md", "provisioning.md", "testing.md"} <= names


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_block_is_left_out(page):
    """Neither a fence that the tests do not see, nor Python under another name."""
    text = page.read_text(encoding="utf-8")
    blocks = list(FENCE.finditer(text))
    languages = {block["language"].strip() for block in blocks if block["hidden"] is None}
    assert languages <= {"python", "bash", "ini", "sql", "text"}
    fences = re.findall(r"^ *(?:`{3,}|~{3,})", text, re.MULTILINE)
    assert len(fences) == 2 * len([block for block in blocks if block["hidden"] is None])
    assert text.count("<!-- python") == len([b for b in blocks if b["hidden"] is not None])


@pytest.mark.parametrize("page", PAGES_WITH_PYTHON, ids=name_of)
def test_what_a_block_uses_is_on_the_page_for_its_readers(page):
    """In the block or in one before it, and not in a comment."""
    text = page.read_text(encoding="utf-8")
    blocks = [b for b in FENCE.finditer(text) if (b["language"] or "").strip() == "python"]
    shown = "\n".join(dedent(block["code"]) for block in blocks)
    ruff = (sys.executable, "-m", "ruff", "check", "--isolated", "--select=F821", "-")
    done = subprocess.run(ruff, input=shown, capture_output=True, encoding="utf-8")
    undefined = set(re.findall(r"Undefined name `(\w+)`", done.stdout))
    assert undefined <= READERS_OWN_NAMES


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_url_has_a_secret(page):
    text = re.sub(r"^<!-- python\n.*?^-->", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert SECRET_IN_URL.search(text) is None


def test_the_wheel_that_is_to_be_installed_has_this_version():
    page = (ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8")
    assert f"dist/zoho_orm_store-{zoho_orm_store.__version__}-py3-none-any.whl" in page


def prose_of(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors_of(page: Path) -> set[str]:
    """The ids that both GitHub and MkDocs give to a page's headings."""
    text = prose_of(page)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    slugs = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"\s", "-", slug) for slug in slugs}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page):
    for link in LINK.finditer(prose_of(page)):
        target, _, anchor = link["target"].partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        linked = (page.parent / target).resolve() if target else page
        assert linked.is_file(), link["target"]
        assert not anchor or anchor in anchors_of(linked), link["target"]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_exist(page):
    folders = (ROOT, ROOT / "zoho_orm_store", page.parent)
    for name in {match["name"] for match in FILE.finditer(prose_of(page))} - READERS_OWN:
        assert any((folder / name).exists() for folder in folders), name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_that_are_named_exist(page):
    from typer.main import get_command

    from zoho_orm_store.cli import app

    commands = get_command(app).commands
    for named in COMMAND.finditer(page.read_text(encoding="utf-8")):
        command, *arguments = named["arguments"].split()
        assert command in commands, named[0]
        options = {option for param in commands[command].params for option in param.opts}
        given = {argument for argument in arguments if argument.startswith("-")}
        assert given <= options, named[0]


def test_the_reference_has_every_public_name():
    reference = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^::: zoho_orm_store\.(\w+)$", reference, re.MULTILINE))
    assert documented >= set(zoho_orm_store.__all__)


def test_the_changelog_knows_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(zoho_orm_store.__version__)}\b", changelog, re.MULTILINE)
