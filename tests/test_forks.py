"""Forks in C, in several threads, and of children that end as programs do: rules H2 and H4."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import BY_DRIVER
from databases import SERVERS
from reliability import record
from sdk_processes import ENVIRONMENT, HERE

from zoho_orm_store import provision

GOES_ON = "parent and child went on, each with its own connections"


def what_goes_wrong(mode, *arguments, timeout=60):
    """The lines that a program of forks has printed before its end."""
    result = subprocess.run(
        [sys.executable, str(HERE / "forking.py"), mode, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
        timeout=timeout,
    )
    *lines, last = result.stdout.splitlines() or [""]
    assert (last, result.returncode) == ("DONE", 0), result.stdout
    return lines


@pytest.fixture
def urls(request, database):
    """The database's URL with each of its drivers."""
    name = request.node.callspec.params["database"]
    return [
        database.set(drivername=route.driver).render_as_string(hide_password=False)
        for route in BY_DRIVER
        if route.database == name
    ]


@pytest.mark.parametrize(
    "database", [*SERVERS, pytest.param("sqlite", marks=pytest.mark.soak)], indirect=True
)
class TestChildren:
    def test_forked_in_c_use_nothing_of_the_parents_H4(self, urls):
        assert what_goes_wrong("after_forks_in_c", *urls) == []
        for url in urls:
            driver = url.partition(":")[0]
            record("a fork in C, then calls in parent and child at once", driver, 2, GOES_ON)

    def test_that_exit_leave_the_parents_connections_alone_H2(self, urls):
        assert what_goes_wrong("whose_children_exit", *urls) == []
        for url in urls:
            record("a forked child ends as a program does", url.partition(":")[0], 4, GOES_ON)


def test_a_child_forked_in_c_has_no_lease_of_its_parent_H4(tmp_path):
    url = f"sqlite:///{tmp_path / 'tokens.db'}"
    assert what_goes_wrong("with_a_lease_of_the_parent", url) == []


@pytest.mark.timeout(600)
@pytest.mark.parametrize("children", [40, pytest.param(400, marks=pytest.mark.soak)])
@pytest.mark.parametrize("driver", ["sqlite+pysqlite", "sqlite+aiosqlite"])
def test_no_child_hangs_when_threads_fork_at_once_while_others_save_H4(tmp_path, driver, children):
    url = f"{driver}:///{tmp_path / 'tokens.db'}"
    provision.upgrade(url)
    assert what_goes_wrong("in_threads", url, 4, children, timeout=500) == []
    record("four threads fork while others save", driver, children, "no child hung, 0 saves lost")
