"""The command line: what it does, what it says when it cannot, and how fast it is there."""

import os
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from sqlalchemy import create_engine, inspect
from typer.testing import CliRunner

import zoho_orm_store
from zoho_orm_store import TokenRecord, TokenRepository, provision
from zoho_orm_store.cli import app
from zoho_orm_store.cli.output import progress

COMMANDS = (
    *("upgrade", "downgrade", "current", "check", "sql"),
    *("list", "show", "expire", "delete", "clear", "purge", "import", "export"),
    *("decrypt", "doctor", "loopback", "demo"),
)


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'tokens.db'}"


@pytest.fixture
def run(monkeypatch):
    """Run the command line in this process, as if no database were named in the environment."""
    monkeypatch.delenv("ZOHO_ORM_STORE_URL", raising=False)
    return lambda *args, **options: CliRunner().invoke(app, args, **options)


def run_script(*args, before="", **env):
    """Run the command line as the installed script does, in a process of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "ZOHO_ORM_STORE_URL"}
    main = f"{before}\nfrom zoho_orm_store.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", main, *args],
        env=environment | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )


def save_token(url):
    engine = create_engine(url)
    with engine.begin() as connection:
        record = TokenRecord(user_name="ada", client_id="c", refresh_token="1000.refresh")
        TokenRepository(connection).save(record)
    engine.dispose()


def count_tokens(url):
    engine = create_engine(url)
    with engine.connect() as connection:
        count = TokenRepository(connection).count()
    engine.dispose()
    return count


def tables(url):
    engine = create_engine(url)
    names = set(inspect(engine).get_table_names())
    engine.dispose()
    return names


class TestHelp:
    def test_it_names_every_command(self, run):
        result = run("--help")
        assert result.exit_code == 0
        assert all(command in result.stdout for command in COMMANDS)

    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_command_has_its_own(self, run, command):
        result = run(command, "--help")
        assert result.exit_code == 0
        assert ("--url" in result.stdout) == (command not in ("sql", "loopback"))

    def test_it_is_shown_when_nothing_is_asked_for(self, run):
        assert "Commands" in run().output

    def test_the_version(self, run):
        result = run("--version")
        assert (result.exit_code, result.stdout) == (
            0,
            f"zoho-orm-store {zoho_orm_store.__version__}\n",
        )


class TestUpgrade:
    def test_it_makes_the_tables(self, run, url):
        result = run("upgrade", "--url", url)
        assert result.exit_code == 0
        assert result.stdout == f"The revision is now {provision.head()}; it was none.\n"
        provision.check(url)

    def test_the_url_may_stand_in_the_environment(self, run, url):
        assert run("upgrade", env={"ZOHO_ORM_STORE_URL": url}).exit_code == 0
        provision.check(url)

    def test_it_says_that_there_is_nothing_to_do(self, run, url):
        provision.upgrade(url)
        result = run("upgrade", "--url", url)
        assert result.exit_code == 0
        assert result.stdout == f"Nothing to do: the revision is {provision.head()} already.\n"

    def test_it_stops_at_a_revision(self, run, url):
        result = run("upgrade", "--url", url, "--revision", "zoho_orm_store_0001")
        assert result.exit_code == 0
        assert provision.current(url) == "zoho_orm_store_0001"


class TestDowngrade:
    def test_it_asks_first(self, run, url):
        provision.upgrade(url)
        result = run("downgrade", "--url", url, input="n\n")
        assert result.exit_code == 1
        assert f"from {provision.head()} back to base?" in result.stderr
        provision.check(url)

    def test_it_does_nothing_when_nobody_answers(self, url):
        provision.upgrade(url)
        result = run_script("downgrade", "--url", url)
        assert result.returncode == 1
        provision.check(url)

    @pytest.mark.parametrize("consent", [{"args": ["--yes"]}, {"input": "y\n"}])
    def test_it_takes_the_tables_away(self, run, url, consent):
        provision.upgrade(url)
        args = consent.pop("args", [])
        result = run("downgrade", "--url", url, *args, **consent)
        assert result.exit_code == 0
        assert "The revision is now none" in result.stdout
        assert not {"oauthtoken", "oauthtoken_refresh_lease"} & tables(url)

    def test_it_does_not_ask_where_there_is_nothing(self, run, url):
        result = run("downgrade", "--url", url)
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout.startswith("Nothing to do: the file ")

    def test_it_loses_no_token(self, run, url):
        provision.upgrade(url)
        save_token(url)
        assert run("downgrade", "--url", url, "--yes").exit_code == 0
        assert run("upgrade", "--url", url).exit_code == 0
        assert count_tokens(url) == 1

    def test_it_names_each_id_that_it_changes_once(self, url):
        provision.upgrade(url)
        save_token(url)
        result = run_script("downgrade", "--url", url, "--yes")
        assert re.fullmatch(r"The id '\w{32}' is now '\d+'\.\n", result.stderr)

    def test_it_advises_a_backup(self, run, url):
        provision.upgrade(url)
        refused = run("downgrade", "--url", url, input="n\n")
        assert refused.stderr.startswith(f"Back up the tables in {url} first. Take them from ")
        for command, words in (("upgrade", "Back it up first"), ("downgrade", "Back the tables")):
            assert words in " ".join(run(command, "--help").stdout.split())

    def test_it_stops_at_a_revision(self, run, url):
        provision.upgrade(url)
        assert run("downgrade", "--url", url, "--revision", "-1", "--yes").exit_code == 0
        assert provision.current(url) == "zoho_orm_store_0002"


class TestCurrentAndCheck:
    def test_current_prints_the_revision_and_nothing_else(self, run, url):
        assert run("current", "--url", url).stdout == "none\n"
        provision.upgrade(url)
        assert run("current", "--url", url).stdout == f"{provision.head()}\n"

    def test_check_passes_when_the_tables_are_up_to_date(self, run, url):
        provision.upgrade(url)
        result = run("check", "--url", url)
        assert result.exit_code == 0
        assert provision.head() in result.stdout

    @pytest.mark.parametrize("revision", ["base", "zoho_orm_store_0001"])
    def test_check_names_the_command_to_run(self, run, url, revision):
        provision.upgrade(url, revision)
        result = run("check", "--url", url)
        assert result.exit_code == 1
        assert f"zoho-orm-store upgrade --url '{url}'" in result.stderr


class TestErrors:
    @pytest.mark.parametrize(
        ("args", "reason"),
        [
            (["current", "--url", "tokens.db"], "Did you mean 'sqlite:///tokens.db'?"),
            (["current", "--url", "/a/b c.db"], "Did you mean 'sqlite:////a/b c.db'?"),
            (["current", "--url", "sqlite://tokens.db"], "Did you mean 'sqlite:///tokens.db'?"),
            (["current", "--url", "postgres://u@h/d"], "Did you mean 'postgresql+psycopg://…'?"),
            (["current", "--url", "mysql+pymsql://u@h/d"], "Did you mean 'mysql+pymysql://…'?"),
            (["current", "--url", "a:b"], "must be a URL such as"),
            (["current", "--url", "nosuch://host/name"], "'nosuch' is not supported"),
            (["check", "--url", "sqlite:////no/such/folder/tokens.db"], "does not exist"),
            (["upgrade", "--url", "sqlite:////no/such/folder/tokens.db"], "Cannot connect to"),
            (["upgrade", "--url", "sqlite://", "--revision", "9999"], "The revisions are"),
            (["downgrade", "-y", "--url", "sqlite://", "--revision", "9999"], "The revisions are"),
            (["demo", "--url", "sqlite://"], "cannot reach a database in memory"),
        ],
    )
    def test_they_are_one_line_on_stderr(self, run, args, reason):
        result = run(*args)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1
        assert reason in result.stderr

    def test_a_script_ends_without_a_traceback(self):
        result = run_script("current", "--url", "tokens.db")
        assert result.returncode == 1
        assert result.stderr.startswith("Error: ")
        assert "Traceback" not in result.stderr

    def test_a_misspelt_command_is_guessed(self, run):
        result = run("lst")
        assert result.exit_code == 2
        assert "Did you mean 'list'?" in result.stderr

    @pytest.mark.parametrize(
        "args", [["upgrade"], ["upgrade", "--ulr", "x"], ["nosuch"], ["upgrade", "--revision"]]
    )
    def test_what_is_not_understood_ends_with_2(self, run, args):
        assert run(*args).exit_code == 2

    @pytest.mark.parametrize(
        "args",
        [
            ["current", "--url", "URL"],
            ["demo", "--url", "URL"],
            ["current", "URL"],
            ["current", "--url", "sqlite://", "URL"],
            ["URL"],
            ["current", "--ulr=URL"],
        ],
    )
    def test_no_password_is_shown(self, run, args):
        for secret in (
            "postgresql+psycopg://me:s3cr:t@127.0.0.1:1/name",
            "postgresql+psycopg://me@127.0.0.1:1/name?password=s3cr:t",
            "postgresql+psycopg:/me:s3cr:t@127.0.0.1:1/name",
            "me:s3cr:t@127.0.0.1",
        ):
            result = run(*(arg.replace("URL", secret) for arg in args))
            assert result.exit_code in (1, 2)
            assert "s3cr" not in result.output

    def test_the_question_of_downgrade_shows_no_password(self, run, url):
        provision.upgrade(url)
        result = run("downgrade", "--url", f"{url}?cached_statements=7", input="n\n")
        assert url in result.stderr
        assert "?cached_statements" not in result.stderr


class TestReadersCreateNothing:
    @pytest.mark.parametrize(
        ("args", "exit_code"),
        [
            (["current"], 0),
            (["downgrade", "--yes"], 0),
            (["check"], 1),
            (["list"], 1),
            (["show", "1"], 1),
            (["export", "x"], 1),
            (["keys", "status"], 1),
            (["purge", "--stranded", "--dry-run"], 1),
            (["import", "--dry-run"], 1),
            (["doctor"], 1),
        ],
    )
    def test_not_even_the_file(self, run, url, tmp_path, args, exit_code):
        result = run(*args, "--url", url)
        assert result.exit_code == exit_code
        assert list(tmp_path.iterdir()) == []
        if exit_code:
            assert f"The file {tmp_path / 'tokens.db'} does not exist." in result.output
            assert f"zoho-orm-store upgrade --url '{url}'" in result.output


class TestScript:
    def test_it_runs_as_a_module(self):
        result = subprocess.run(
            [sys.executable, "-m", "zoho_orm_store", "--version"],
            capture_output=True,
            encoding="utf-8",
            timeout=60,
        )
        assert result.stdout == f"zoho-orm-store {zoho_orm_store.__version__}\n"

    def test_the_shell_completes_its_commands(self):
        completed = run_script(
            _ZOHO_ORM_STORE_COMPLETE="complete_bash",
            COMP_WORDS="zoho-orm-store pur",
            COMP_CWORD="1",
        )
        assert completed.stdout.split() == ["purge"]


class TestAlembic:
    """The commands of Alembic in a checkout."""

    @pytest.mark.parametrize(
        ("command", "url", "reason"),
        [
            (["current"], "", "Set ZOHO_ORM_STORE_URL to the URL of the database"),
            (["current"], "me:s3cret", "The database must be a URL"),
            (["upgrade", "nosuch"], "sqlite://", "Can't locate revision identified by 'nosuch'"),
        ],
    )
    def test_a_mistake_is_one_line(self, command, url, reason):
        result = subprocess.run(
            [sys.executable, "-m", "alembic", *command],
            cwd=Path(zoho_orm_store.__file__).parent.parent,
            env=os.environ | {"ZOHO_ORM_STORE_URL": url},
            capture_output=True,
            encoding="utf-8",
            timeout=60,
        )
        assert result.returncode != 0
        output = result.stdout + result.stderr
        assert output.count("\n") == 1
        assert reason in output
        assert "s3cret" not in output


class TestProgress:
    def test_a_bar_on_a_terminal(self, monkeypatch):
        class Terminal(StringIO):
            def isatty(self):
                return True

        monkeypatch.setattr("sys.stderr", Terminal())
        monkeypatch.setenv("TERM", "xterm")
        with progress("Importing", 1000) as on_progress:
            on_progress(500)
            on_progress(1000, 2000)
        assert "Importing" in sys.stderr.getvalue()

    def test_lines_elsewhere(self, capsys):
        with progress("Importing", 1000) as on_progress:
            for done in (500, 1000, 1500, 2200):
                on_progress(done)
        assert capsys.readouterr().err == "1000 tokens so far\n2200 tokens so far\n"


class TestPackages:
    def test_without_typer_it_names_the_extra(self):
        result = run_script("--help", before="import sys; sys.modules['typer'] = None")
        assert result.returncode == 1
        assert result.stderr.count("\n") == 1
        assert "pip install 'zoho-orm-store[cli]'" in result.stderr

    @pytest.mark.parametrize(
        ("module", "package"), [("zohocrmsdk", "zohocrmsdk8-0"), ("rich.padding", "rich")]
    )
    def test_what_only_the_demo_needs_is_missed_by_it_alone(self, url, module, package):
        before = f"import sys; sys.modules[{module!r}] = None"
        assert run_script("upgrade", "--url", url, before=before).returncode == 0
        result = run_script("demo", before=before)
        assert result.returncode == 1
        assert result.stderr.count("\n") == 1
        assert package in result.stderr
        assert "pip install 'zoho-orm-store[demo]'" in result.stderr

    def test_it_starts_without_what_it_does_not_need(self):
        slow = {"sqlalchemy", "alembic", "zohocrmsdk", "zoho_orm_store.cli.demo_steps"}
        before = (
            "import atexit, sys\n"
            f"atexit.register(lambda: print('loaded:', sorted({slow!r} & sys.modules.keys())))"
        )
        result = run_script("--help", before=before)
        assert result.stdout.splitlines()[-1] == "loaded: []"
