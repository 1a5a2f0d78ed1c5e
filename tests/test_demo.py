"""The demo: it does what it says, says it when it does not, and leaves nothing behind."""

import os
import re
import resource
import subprocess
import sys

import pytest
from sqlalchemy import create_engine

from zoho_orm_store import ConfigurationError, TokenRecord, TokenRepository, provision
from zoho_orm_store.cli import demo_steps
from zoho_orm_store.testing import LoopbackZoho

SCRIPT = "from zoho_orm_store.cli import main; main()"
TOKEN = re.compile(r"1000\.[0-9a-f]{32}\.[0-9a-f]{32}")


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'tokens.db'}"


def run_script(*args, cwd, **env):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, "demo", *args],
        cwd=cwd,
        env=os.environ | {"PYTHONUTF8": "1"} | env,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    (folder / "cwd").mkdir()
    (folder / "tmp").mkdir()
    return folder


@pytest.fixture(scope="module")
def seconds_and_result(folder):
    """The demo, in an environment with an application's database and a company's proxy."""
    environment = {
        "TMPDIR": str(folder / "tmp"),
        "ZOHO_ORM_STORE_URL": f"sqlite:///{folder / 'application.db'}",
        "http_proxy": "http://127.0.0.1:9",
        "HTTP_PROXY": "http://127.0.0.1:9",
        "no_proxy": "example.com",
    }
    before = seconds_of_children()
    result = run_script(cwd=folder / "cwd", **environment)
    return seconds_of_children() - before, result


def seconds_of_children():
    """What the processes started here have worked, however busy the machine was with others."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def tokens(url):
    engine = create_engine(url)
    with engine.connect() as connection:
        records = TokenRepository(connection).list()
    engine.dispose()
    return records


def save(url, record):
    engine = create_engine(url)
    with engine.begin() as connection:
        TokenRepository(connection).save(record)
    engine.dispose()


class TestScript:
    @pytest.fixture
    def result(self, seconds_and_result):
        return seconds_and_result[1]

    def test_it_takes_less_than_ten_seconds(self, seconds_and_result):
        assert seconds_and_result[0] < 10

    def test_it_plays_every_step(self, result):
        assert (result.returncode, result.stderr) == (0, "")
        lines = result.stdout.splitlines()
        titles = [f"{number}. {title}" for number, (title, _) in enumerate(demo_steps.STEPS, 1)]
        assert [line for line in lines if re.match(r"\d+\. ", line)] == titles
        assert lines[-1] == demo_steps.SUCCESS

    def test_it_shows_no_secret(self, result):
        assert re.search(r"client_secret +…", result.stdout)
        assert not TOKEN.search(result.stdout)

    def test_it_leaves_no_file_and_the_application_s_database_alone(self, folder, result):
        assert {path.name for path in folder.rglob("*")} == {"cwd", "tmp"}

    def test_a_terminal_that_cannot_show_a_name_is_no_reason_to_fail(self, tmp_path):
        result = run_script(cwd=tmp_path, PYTHONIOENCODING="ascii")
        assert result.returncode == 0
        assert result.stdout.splitlines()[-1] == demo_steps.SUCCESS

    def test_a_failure_is_told_and_is_no_success(self, tmp_path, url):
        provision.upgrade(url)
        save(url, TokenRecord(user_name="ada", refresh_token="1000.refresh"))
        result = run_script("--url", url, cwd=tmp_path)
        assert result.returncode == 1
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1
        assert demo_steps.SUCCESS not in result.stdout


def replace_steps(functions):
    """The demo's steps, with others at these numbers."""
    steps = enumerate(demo_steps.STEPS, 1)
    return [(title, functions.get(number, function)) for number, (title, function) in steps]


def do_nothing(*args, **kwargs):
    """What a part of the demo does that does not do its part."""


@pytest.fixture
def in_one_process(monkeypatch):
    """Leave out the second process, which takes most of the time."""
    monkeypatch.setattr(demo_steps, "STEPS", replace_steps({5: do_nothing}))


class TestOwnDatabase:
    def test_it_deletes_its_row_and_leaves_the_tables(self, url, capsys):
        demo_steps.run(url)
        assert tokens(url) == []
        provision.check(url)
        said = capsys.readouterr().out
        assert "The demo's row is deleted, and its tables stay." in said
        assert f"zoho-orm-store downgrade --url '{url}'" in said

    def test_it_runs_again_on_what_it_has_left(self, url, in_one_process, capsys):
        provision.upgrade(url)
        demo_steps.run(url)
        said = capsys.readouterr().out
        assert "The demo's row is deleted, and the tables stay." in said
        assert "downgrade" not in said

    def test_it_runs_through_an_async_driver(self, url, capsys):
        demo_steps.run(url.replace("sqlite:", "sqlite+aiosqlite:"))
        assert capsys.readouterr().out.splitlines()[-1] == demo_steps.SUCCESS

    def test_it_runs_beside_nobodys_tokens(self, url):
        provision.upgrade(url)
        save(url, TokenRecord(user_name="ada", refresh_token="1000.refresh"))
        before = tokens(url)
        with pytest.raises(ConfigurationError, match=r"already holds tokens \(1\)"):
            demo_steps.run(url)
        assert tokens(url) == before

    def test_it_refuses_a_database_in_memory(self):
        with pytest.raises(ConfigurationError, match="second process"):
            demo_steps.run("sqlite://")

    def test_the_process_is_left_as_it_was(self, url, in_one_process, monkeypatch):
        from zohocrmsdk.src.com.zoho.crm.api.initializer import Initializer

        monkeypatch.setenv("no_proxy", "example.com")
        monkeypatch.setattr(Initializer, "initializer", before := object())
        demo_steps.run(url)
        assert os.environ["no_proxy"] == "example.com"
        assert Initializer.initializer is before


def save_a_row_twice(stage):
    demo_steps.log_in(stage)
    other = TokenRecord(client_id=stage.zoho.client_id, refresh_token="1000.other")
    save(stage.url, other)


def end_tokens_at_zoho(stage):
    stage.zoho.expire_tokens()


class TestHonesty:
    """Each step fails when what it says is not so, and the demo cleans up all the same."""

    @pytest.mark.parametrize(
        ("step", "owner", "name", "sabotage", "said"),
        [
            (1, demo_steps.provision, "upgrade", do_nothing, "newest revision"),
            (2, demo_steps.SQLAlchemyTokenStore, "save_token", do_nothing, "gave it an id"),
            (2, LoopbackZoho, "issue_grant_token", lambda zoho: "used", "invalid_code"),
            (3, demo_steps, "STEPS", replace_steps({2: save_a_row_twice}), "not 2"),
            (4, demo_steps, "_read_leads", lambda: [], "asked for no token"),
            (5, demo_steps, "__name__", "zoho_orm_store.nosuch", "No module named"),
            (5, demo_steps, "STEPS", replace_steps({4: end_tokens_at_zoho}), "INVALID_TOKEN"),
            (6, LoopbackZoho, "expire_tokens", do_nothing, "refuses the old access token"),
            (
                7,
                demo_steps,
                "STEPS",
                replace_steps({5: do_nothing, 6: do_nothing}),
                "One login and one refresh",
            ),
        ],
    )
    def test_a_broken_step_is_named(self, url, monkeypatch, step, owner, name, sabotage, said):
        monkeypatch.setattr(owner, name, sabotage)
        with pytest.raises(demo_steps.DemoError, match=re.escape(said)) as caught:
            demo_steps.run(url)
        assert str(caught.value).startswith(f"Step {step} of the demo failed")
        monkeypatch.undo()
        if step > 1:
            assert tokens(url) == []

    def test_a_second_process_that_hangs_is_given_up(self, url, monkeypatch):
        def hurry(stage):
            monkeypatch.setattr(demo_steps, "TIMEOUT", 0.1)
            demo_steps.start_a_second_process(stage)

        monkeypatch.setattr(demo_steps, "STEPS", replace_steps({5: hurry}))
        with pytest.raises(demo_steps.DemoError, match="did not end within"):
            demo_steps.run(url)
