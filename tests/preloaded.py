"""Programs that start with modules already imported: python preloaded.py SOCKET MODULE...

To import SQLAlchemy, Alembic or the SDK takes longer than most of what a test then does with them.
This interpreter imports them once, and forks a process for each program that it is told to run.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

LONGEST_MESSAGE = 100_000


class Program:
    """A running program, with what the tests need of ``subprocess.Popen``."""

    def __init__(self, interpreter: Interpreter, pid: int, files: list[IO[str]]) -> None:
        self._pid = pid
        self.returncode: int | None = None
        self.stdin, self.stdout, self._stderr = files
        self._interpreter = interpreter

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self._pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, input: str = "", timeout: float = 60) -> tuple[str, str]:
        """Write to its standard input, and return what it writes until it ends.

        If that takes longer, it is killed.
        """
        killer = threading.Timer(timeout, self.kill)
        killer.start()
        try:
            with suppress(BrokenPipeError), self.stdin:
                self.stdin.write(input)
            output = self.stdout.read()
            self.wait()
        finally:
            killer.cancel()
            self.stdout.close()
        with self._stderr:
            self._stderr.seek(0)
            return output, self._stderr.read()

    def wait(self) -> None:
        if self.returncode is None:
            self.returncode = self._interpreter.ask({"wait_for": self._pid})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.communicate()


class Interpreter:
    """Runs programs as Python's command line does, each in a process of its own."""

    def __init__(self, *modules: str, options: Sequence[str] = (), **environment: str) -> None:
        self._options = options
        self._modules = modules
        self._environment = os.environ | environment
        self._server: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str, cwd: Path | None = None, **environment: str) -> Program:
        """Start ``-m MODULE``, ``-c CODE`` or a file, with arguments."""
        stdin, to_stdin = os.pipe()
        from_stdout, stdout = os.pipe()
        stderr = os.memfd_create("stderr")
        program = {
            "arguments": arguments,
            "cwd": str(cwd or Path.cwd()),
            "environment": self._environment | environment,
        }
        pid = self.ask(program, [stdin, stdout, stderr])
        os.close(stdin)
        os.close(stdout)
        ours = ((to_stdin, "w"), (from_stdout, "r"), (stderr, "r"))
        files = [os.fdopen(number, mode, encoding="utf-8") for number, mode in ours]
        return Program(self, pid, files)

    def run(
        self, *arguments: str, cwd: Path, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end, with an empty standard input."""
        program = self.start(*arguments, cwd=cwd, **environment)
        output = program.communicate()
        return subprocess.CompletedProcess(arguments, program.returncode, *output)

    def ask(self, question: dict[str, object], files: Sequence[int] = ()) -> int:
        if self._server is None:
            self._start_server()
        try:
            socket.send_fds(self._socket, [json.dumps(question).encode()], files)
            return int(self._socket.recv(LONGEST_MESSAGE))
        except BaseException:
            # Its answer may be to come, and is not the one to the next question.
            self.close()
            raise

    def _start_server(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        number = theirs.fileno()
        self._server = subprocess.Popen(
            [sys.executable, *self._options, __file__, str(number), *self._modules],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            pass_fds=[number],
            start_new_session=True,
        )
        theirs.close()

    def close(self) -> None:
        """End the interpreter, and what it runs."""
        if self._server is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait()
            self._server = None
            self._socket.close()


def next_program(questions: socket.socket) -> dict[str, object]:
    """Answer questions, and return from this in a forked process that is to run a program."""
    while True:
        message, files, _, _ = socket.recv_fds(questions, LONGEST_MESSAGE, 3)
        if not message:
            sys.exit()
        question = json.loads(message)
        if "wait_for" in question:
            _, status = os.waitpid(question["wait_for"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if answer == 0:
                questions.close()
                for number, file in enumerate(files):
                    os.dup2(file, number)
            for file in files:
                os.close(file)
            if answer == 0:
                return question
        questions.send(str(answer).encode())


def become(program: dict[str, object]) -> None:
    os.environ.clear()
    os.environ.update(program["environment"])
    os.chdir(program["cwd"])
    what, *sys.argv = program["arguments"]
    if what == "-m":
        sys.path.insert(0, program["cwd"])
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif what == "-c":
        sys.path.insert(0, "")
        code, sys.argv[0] = sys.argv[0], what
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path.insert(0, str(Path(what).parent))
        sys.argv.insert(0, what)
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    # The programs do not see this folder.
    del sys.path[0]
    for name in sys.argv[2:]:
        importlib.import_module(name)
    # A program's last garbage collection would copy all that it shares with this process.
    gc.freeze()
    become(next_program(socket.socket(fileno=int(sys.argv[1]))))
