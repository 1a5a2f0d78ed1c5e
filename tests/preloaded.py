"""Programs that start with modules already imported: python preloaded.py MODULE...

To import SQLAlchemy, Alembic or the SDK takes longer than most of what a test then does with them.
This interpreter imports them once, and forks a process for each program that it is told to run.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class Interpreter:
    """Runs ``-m`` and ``-c`` as Python's command line does, each in a process of its own."""

    def __init__(self, *modules: str, options: Sequence[str] = (), **environment: str) -> None:
        self._command = [sys.executable, *options, __file__, *modules]
        self._environment = os.environ | environment
        self._server: subprocess.Popen[str] | None = None

    def run(
        self, *arguments: str, cwd: Path, timeout: float = 60, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end, with an empty standard input."""
        with tempfile.NamedTemporaryFile() as stdout, tempfile.NamedTemporaryFile() as stderr:
            program = {
                "arguments": arguments,
                "cwd": str(cwd),
                "environment": self._environment | environment,
                "files": [os.devnull, stdout.name, stderr.name],
            }
            try:
                code = self._ask(json.dumps(program), timeout)
            except BaseException:
                # Its answer may be to come, and is not the one to the next question.
                self.close()
                raise
            output = (Path(file.name).read_text("utf-8") for file in (stdout, stderr))
            return subprocess.CompletedProcess(arguments, code, *output)

    def _ask(self, question: str, timeout: float) -> int:
        if self._server is None:
            self._server = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        self._server.stdin.write(f"{question}\n")
        self._server.stdin.flush()
        if not select.select([self._server.stdout], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(question, timeout)
        return int(self._server.stdout.readline())

    def close(self) -> None:
        """End the interpreter, and what it runs."""
        if self._server is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._server.pid, signal.SIGKILL)
            self._server.communicate()
            self._server = None


def next_program() -> dict[str, object]:
    """Return, in a forked process, the program that it is to run."""
    while line := sys.stdin.readline():
        pid = os.fork()
        if pid == 0:
            return json.loads(line)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    sys.exit()


def become(program: dict[str, object]) -> None:
    for number, name in enumerate(program["files"]):
        file = os.open(name, os.O_RDWR)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(program["environment"])
    os.chdir(program["cwd"])
    sys.path.insert(0, program["cwd"])
    kind, what, *arguments = program["arguments"]
    sys.argv = [kind, *arguments]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    # The programs see neither this folder nor this module.
    del sys.path[0]
    for name in sys.argv[1:]:
        importlib.import_module(name)
    # A program's last garbage collection would copy all that it shares with this process.
    gc.freeze()
    become(next_program())
