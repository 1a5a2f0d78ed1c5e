"""A long run of many workers, while the server and workers die: rules E6, E7, H1, H2 and G1.

The soak takes ten minutes, or as many as ZOHO_ORM_STORE_SOAK_MINUTES says.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

import pytest
from own_postgresql import own_postgresql
from reliability import record
from sdk_processes import ENVIRONMENT, HERE
from sdk_tokens import known, make_token
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from zoho_orm_store import SQLAlchemyTokenStore, provision
from zoho_orm_store.testing import LoopbackZoho

NEEDS = {"pg_ctl"}

DRIVERS = ("postgresql+psycopg", "postgresql+asyncpg", "postgresql+psycopg_async")

UNUSABLE = 5
"""How many seconds before its end the SDK takes a token for expired."""

MARGIN = 1.5
"""Seconds that a busy machine may add to what has a limit."""

CONNECTIONS = 6
"""The most that one store opens: three to read, and three to write."""


@dataclass(frozen=True)
class Plan:
    """How long a run takes, who takes part, and what happens when.

    Attributes:
        seconds: How long the workers work.
        processes: How many workers there are.
        threads: How many threads each of them has.
        users: How many users have a token, which all workers use.
        usable: For how many seconds the SDK uses an access token.
        pause: Seconds between two calls of a thread, on the average.
        timeout: The store's.
        warm_up: The age in seconds from which a worker is watched for growth.
        memory: How many MB a worker may grow after that.
        files: How many files and connections more it may have. The pools fill in the first seconds.
        events: What happens after which part of the time: a worker's number is that of one to kill,
            and a text is a way to stop the server.
        down: Seconds for which the server stays down.
    """

    seconds: float
    processes: int
    threads: int
    users: int
    usable: float
    pause: float
    timeout: float
    warm_up: float
    memory: float
    files: int
    events: dict[float, int | str]
    down: float

    @property
    def longest_call(self):
        return self.timeout + MARGIN


IN_GATE = Plan(
    seconds=12,
    processes=2,
    threads=4,
    users=3,
    usable=2,
    pause=0.15,
    timeout=6,
    warm_up=2.5,
    memory=8,
    files=CONNECTIONS,
    events={0.25: 0, 0.55: "fast"},
    down=0.7,
)
SOAK = Plan(
    seconds=60 * float(os.environ.get("ZOHO_ORM_STORE_SOAK_MINUTES", "10")),
    processes=4,
    threads=8,
    users=6,
    usable=5,
    pause=0.5,
    timeout=10,
    warm_up=60 * min(1, float(os.environ.get("ZOHO_ORM_STORE_SOAK_MINUTES", "10")) / 10),
    memory=5,
    files=2,
    events={0.2: 0, 0.4: "fast", 0.55: 1, 0.7: "immediate"},
    down=3,
)


class Sample(NamedTuple):
    """What a worker uses at some time."""

    age: float
    memory: float
    threads: int
    files: int
    connections: int


@dataclass
class Running:
    """A worker process, and what was seen of it."""

    number: int
    popen: subprocess.Popen
    started: float
    samples: list[Sample] = field(default_factory=list)

    def look(self, connections):
        """Take a sample. A process that has just been killed has none."""
        with suppress(OSError, KeyError):
            process = Path("/proc", str(self.popen.pid))
            status = dict(
                line.split(":", 1) for line in (process / "status").read_text().splitlines()
            )
            self.samples.append(
                Sample(
                    time.monotonic() - self.started,
                    int(status["VmRSS"].split()[0]) / 1024,
                    int(status["Threads"]),
                    len([*(process / "fd").iterdir()]),
                    connections,
                )
            )


class Run:
    """A run of a plan: the server, Zoho, the workers, and what became of them."""

    def __init__(self, plan, server, zoho, folder):
        self.plan, self.server, self.zoho, self.folder = plan, server, zoho, folder
        self.workers = {}
        self.ended = []
        self.kills = []
        self.last_words = []
        self._engine = create_engine(server.url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        with self._engine.connect() as connection:
            for number in range(plan.processes):
                connection.execute(text(f"CREATE ROLE worker_{number} LOGIN SUPERUSER"))
        provision.upgrade(server.url)
        self.users = dict(self._log_in(number) for number in range(plan.users))
        self.notes = [f"note {number}" for number in range(4)]

    def _log_in(self, number):
        """Store an expired token of a user."""
        email = f"user{number}@example.com"
        token = make_token(
            user=self.zoho.user_name(email),
            client_id=self.zoho.client_id,
            client_secret=self.zoho.client_secret,
            refresh_token=self.zoho.issue_refresh_token(email),
            access_token="1000.expired",
            expires_in="1",
        )
        with SQLAlchemyTokenStore(self.server.url) as store:
            store.save_token(token)
        return token.get_id(), self.zoho.user_name(email)

    def start(self, number):
        url = self.server.url.set(
            drivername=DRIVERS[number % len(DRIVERS)], username=f"worker_{number}"
        )
        given = {
            "name": f"worker {number}.{len(self.ended)}",
            "url": url.render_as_string(hide_password=False),
            "port": self.zoho.port,
            "folder": str(self.folder),
            "journal": str(self.folder / f"{number}.{len(self.ended)}.journal"),
            "users": self.users,
            "notes": self.notes,
            "threads": self.plan.threads,
            "pause": self.plan.pause,
            "timeout": self.plan.timeout,
            "policy": {"lease": 3, "wait": 5},
            "patience": 3 * self.plan.timeout,
        }
        with (self.folder / f"{number}.log").open("a") as log:
            popen = subprocess.Popen(
                [sys.executable, HERE / "soak_worker.py"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,  # The SDK logs each save that has failed.
                text=True,
                env=ENVIRONMENT,
            )
        self.workers[number] = Running(number, popen, time.monotonic())
        popen.stdin.write(json.dumps(given) + "\n")
        popen.stdin.flush()

    def go(self, number):
        popen = self.workers[number].popen
        assert popen.stdout.readline() == "READY\n", (self.folder / f"{number}.log").read_text()
        popen.stdin.write("GO\n")
        popen.stdin.flush()

    def kill(self, number):
        """Kill a worker, and start another one instead."""
        self.kills.append(time.time())
        killed = self.workers.pop(number)
        killed.popen.kill()
        killed.popen.communicate()
        self.ended.append(killed)
        self.start(number)
        self.go(number)

    def carry_out(self):
        for number in range(self.plan.processes):
            self.start(number)
        for number in range(self.plan.processes):
            self.go(number)
        began = time.monotonic()
        events = sorted(self.plan.events.items())
        while (elapsed := time.monotonic() - began) < self.plan.seconds:
            if events and elapsed > events[0][0] * self.plan.seconds:
                _, event = events.pop(0)
                if isinstance(event, int):
                    self.kill(event)
                else:
                    self.server.restart(event, self.plan.down)
            self.look()
            time.sleep(0.25)
        self.stop()

    def look(self):
        connections = self.connections()
        for number, worker in self.workers.items():
            worker.look(connections.get(f"worker_{number}", 0))

    def connections(self):
        statement = "SELECT usename, count(*) FROM pg_stat_activity GROUP BY usename"
        with self._engine.connect() as connection:
            return dict(connection.execute(text(statement)).all())

    def stop(self):
        for worker in self.workers.values():
            worker.popen.stdin.close()
        for number, worker in self.workers.items():
            with worker.popen.stdout as stdout:
                line = stdout.readline()
            log = self.folder / f"{number}.log"
            assert worker.popen.wait(30) == 0, log.read_text()[-3000:]
            self.last_words.append(json.loads(line))
            self.ended.append(worker)
        self.workers.clear()

    def kill_all(self):
        for worker in self.workers.values():
            worker.popen.kill()
            for stream in (worker.popen.stdin, worker.popen.stdout):
                stream.close()
            worker.popen.wait()

    # -- What became of it -----------------------------------------------------------------------

    def journal(self):
        """Everything that all workers have written, by its kind."""
        entries = defaultdict(list)
        for path in self.folder.glob("*.journal"):
            # A worker may have been killed in the middle of its last line.
            lines = path.read_text().split("\n")[:-1]
            for entry in map(json.loads, lines):
                entries[entry.pop("kind")].append(entry)
        return entries

    def is_excused(self, began, ended):
        """Whether the server was down, or had just come back, during a call."""
        return any(
            began < outage.ended + MARGIN and ended > outage.began for outage in self.server.outages
        )

    def lost(self, saving, saved):
        """The rows whose value is not that of a save, or of one that others have replaced."""
        began = {each["value"]: each["at"] for each in saving}
        ended = {each["value"]: each["at"] for each in saved}
        of_row = defaultdict(list)
        for each in saving:
            of_row[each["row"]].append(each["value"])
        with SQLAlchemyTokenStore(self.server.url) as store:
            tokens = [known(token) for token in store.get_tokens()]
        stored = {token["user_name"]: token.get("grant_token") for token in tokens}
        assert len(stored) == len(tokens) == len(of_row) + len(self.users)
        lost = []
        for row, values in of_row.items():
            value = stored.get(row)
            until = ended.get(value, float("inf"))
            newer = [each for each in values if each in ended and began[each] > until]
            if value not in values or newer:
                lost.append((row, value, newer))
        return lost

    def refreshed_too_often(self):
        """The users whose token was refreshed twice in its life, while nothing had gone wrong."""
        troubled = [*self.kills, *(outage.began for outage in self.server.outages)]
        troubled += [outage.ended for outage in self.server.outages]
        at = defaultdict(list)
        for request in self.zoho.requests:
            if request.kind == "refresh":
                at[request.user].append(request.at)
        return [
            (user, later - earlier)
            for user, times in at.items()
            for earlier, later in pairwise(times)
            if later - earlier < self.plan.usable - 0.5
            and not any(abs(later - trouble) < 10 for trouble in troubled)
        ]

    def growth(self, name):
        """By how much each worker has grown that lived to the end, as medians."""
        grown = {}
        for worker in self.ended:
            age = worker.samples[-1].age
            warm = self.plan.warm_up
            first = [
                getattr(s, name) for s in worker.samples if warm <= s.age < warm + max(warm, 2)
            ]
            last = [getattr(s, name) for s in worker.samples if s.age > age - max(warm, 2)]
            if age > 3 * warm and first:
                grown[worker.popen.pid] = round(median(last) - median(first), 1)
        assert len(grown) >= self.plan.processes - 1
        return grown

    def most(self, name):
        return max(getattr(sample, name) for worker in self.ended for sample in worker.samples)


@contextmanager
def prepared(plan, folder):
    limits = {"max_refreshes": None, "max_access_tokens": None}
    lifetime = plan.usable + UNUSABLE
    with (
        LoopbackZoho(access_token_lifetime=lifetime, delay=0.1, **limits) as zoho,
        own_postgresql() as server,
    ):
        run = Run(plan, server, zoho, folder)
        try:
            yield run
        finally:
            run.kill_all()


@pytest.mark.timeout(SOAK.seconds + 180)
@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(IN_GATE, id="8 callers for 12 seconds"),
        pytest.param(SOAK, id="32 callers for minutes", marks=pytest.mark.soak),
    ],
)
def test_nothing_is_lost_mixed_up_or_left_behind(plan, tmp_path, capsys):
    with prepared(plan, tmp_path) as run:
        run.carry_out()
        entries = run.journal()
        calls = [each for kind in ("find", "save", "list") for each in entries[kind]]
        failed = [each for each in calls if "error" in each]
        lost = run.lost(entries["saving"], entries["saved"])
        checks = {
            "another user's token": entries["wrong"],
            "saves that were lost": lost,
            "calls that took too long": [
                each for each in calls if each["seconds"] > plan.longest_call
            ],
            "calls that failed while the server was up": [
                each
                for each in failed
                if not run.is_excused(each["start"], each["start"] + each["seconds"])
            ],
            "work that failed for good": entries["gave up"],
            "refreshes of a token that was still good": run.refreshed_too_often(),
            "refreshes that Zoho refused": [run.zoho.counts.refused]
            * bool(run.zoho.counts.refused),
            "threads that were left behind": [
                each for each in run.last_words if each["threads"] != 1
            ],
            "connections that were left behind": [
                each for each in run.connections() if str(each).startswith("worker_")
            ],
        }
        grown = {name: run.growth(name) for name in ("memory", "threads", "files", "connections")}
        most = run.most("connections")
    figures = [
        *(f"{what}: {len(found)}" for what, found in checks.items()),
        *(f"growth of {name}: {[*growth.values()]}" for name, growth in grown.items()),
        f"connections of a worker: {most}",
        f"calls: {len(calls)}, the longest {max(each['seconds'] for each in calls):.2f} s, "
        f"{len(failed)} failed during {len(run.server.outages)} outages",
        f"saves: {len(entries['saved'])}; refreshes: {run.zoho.counts.refreshes}; "
        f"calls of the API: {run.zoho.counts.api_calls}; workers killed: {len(run.kills)}",
    ]
    with capsys.disabled():
        print("", *figures, sep="\n  ")
    assert {what: found[:3] for what, found in checks.items() if found} == {}
    assert max(grown["memory"].values()) <= plan.memory
    assert max(grown["threads"].values()) <= 1
    assert max(grown["files"].values()) <= plan.files
    assert max(grown["connections"].values()) <= plan.files
    assert most <= CONNECTIONS
    record(
        "the server restarts or crashes and workers are killed, under load",
        "PostgreSQL",
        len(calls),
        "0 lost, 0 mixed up, 0 failed for good, nothing left behind",
    )
