"""The servers that run `wsgi_app`, and their clients."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlencode
from urllib.request import ProxyHandler, build_opener

from programs import SCRIPTS, Output, free_port, running
from sdk_processes import ENVIRONMENT, HERE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from sqlalchemy import URL

    from zoho_orm_store.testing import LoopbackZoho

OPENER = build_opener(ProxyHandler({}))


class Answer(NamedTuple):
    """What a worker answered: a result or an error, and how long that took."""

    pid: int | None
    answer: Any
    error: str | None
    seconds: float


@dataclass
class Server:
    """A running server."""

    port: int
    output: Output

    def get(self, path: str, **query: object) -> Answer:
        """Send a request, and wait for the answer."""
        started = time.monotonic()
        url = f"http://127.0.0.1:{self.port}{path}?{urlencode(query)}"
        try:
            with OPENER.open(url, timeout=15) as response:
                content = json.load(response)
        except OSError as error:
            content = {"error": f"no answer: {error}"}
        seconds = time.monotonic() - started
        return Answer(content.get("pid"), content.get("answer"), content.get("error"), seconds)

    def get_at_once(self, requests: Iterable[tuple[str, Mapping[str, object]]]) -> list[Answer]:
        """Send requests at the same time, and wait for all answers."""
        requests = list(requests)
        with ThreadPoolExecutor(len(requests)) as pool:
            sent = [pool.submit(self.get, path, **query) for path, query in requests]
            return [each.result() for each in sent]


@contextmanager
def uwsgi(*options: str, zoho: LoopbackZoho, folder: Path, **given: object) -> Iterator[Server]:
    """Four processes that uWSGI forks, in C, after it has imported the application."""
    port = free_port()
    command = [
        SCRIPTS / "uwsgi",
        *("--http-socket", f"127.0.0.1:{port}"),
        *("--wsgi-file", HERE / "wsgi_app.py"),
        *("--processes", "4", "--master", "--need-app", "--die-on-term"),
        *options,
    ]
    with running(command, port, cwd=folder, env=environment(zoho, folder, given)) as output:
        yield Server(port, output)


@contextmanager
def gunicorn_with_gevent(
    *options: str, workers: int, zoho: LoopbackZoho, folder: Path, **given: object
) -> Iterator[Server]:
    """Processes of gunicorn in which each request is a greenlet."""
    port = free_port()
    command = [
        SCRIPTS / "gunicorn",
        *("--bind", f"127.0.0.1:{port}", "--worker-class", "gevent", "--workers", workers),
        *("--graceful-timeout", "1", *options, "wsgi_app"),
    ]
    # Newer releases make a socket for control there, which two servers would share.
    apart = {"HOME": str(folder), "XDG_RUNTIME_DIR": str(folder)}
    env = environment(zoho, folder, given) | apart
    with running(command, port, cwd=folder, env=env) as output:
        server = Server(port, output)
        deadline = time.monotonic() + 30
        ready = set()
        while len(ready) < workers:
            assert time.monotonic() < deadline, f"not all workers are ready:\n{output}"
            ready |= {answer.pid for answer in server.get_at_once([("/ping", {})] * 4)} - {None}
        yield server


def way_to(url: URL, driver: str, kind: str) -> dict[str, str]:
    """A store for the application, by URL or with an engine of its own."""
    url = url.set(drivername=f"{url.get_backend_name()}+{driver}")
    return {"url": url.render_as_string(hide_password=False), "kind": kind}


def environment(zoho: LoopbackZoho, folder: Path, given: Mapping[str, object]) -> dict[str, str]:
    port = int(zoho.url.rpartition(":")[2])
    return ENVIRONMENT | {"WSGI_APP": json.dumps({"port": port, "folder": str(folder), **given})}
