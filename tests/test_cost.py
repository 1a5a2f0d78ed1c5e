"""What one call costs in function calls of ours and in messages to a server: design.md's budgets."""

from __future__ import annotations

import socket
import sqlite3
import sys
import threading
from contextlib import closing, suppress
from itertools import count
from pathlib import Path

import pytest
from conftest import BY_DRIVER, ENGINES, on_routes, open_store, statements_counted
from sdk_tokens import FULL, known, make_token

import zoho_orm_store
from zoho_orm_store import SQLAlchemyTokenStore

PACKAGE = str(Path(zoho_orm_store.__file__).parent)


class TestOurOwnCalls:
    def calls_before_sql(self, call):
        """The functions of ours that a call enters until its first cursor executes.

        Returns:
            The name of each with the depth of its frame among ours, in the order of the calls.
        """
        calls = []
        is_over = False

        def depth_of(frame):
            depth = 0
            while frame is not None:
                depth += frame.f_code.co_filename.startswith(PACKAGE)
                frame = frame.f_back
            return depth

        def profile(frame, kind, argument):
            nonlocal is_over
            if kind == "c_call" and getattr(argument, "__name__", "") == "execute":
                is_over = is_over or isinstance(argument.__self__, sqlite3.Cursor)
            elif kind == "call" and not is_over and frame.f_code.co_filename.startswith(PACKAGE):
                calls.append((frame.f_code.co_qualname, depth_of(frame)))

        sys.setprofile(profile)
        try:
            call()
        finally:
            sys.setprofile(None)
        assert is_over, "no cursor has executed anything"
        return calls

    def test_at_most_14_lie_between_the_sdk_and_the_cursor(self, tmp_path):
        with SQLAlchemyTokenStore(f"sqlite:///{tmp_path / 'tokens.db'}") as store:
            saved = make_token(**FULL)
            store.save_token(saved)
            found = []

            def find():
                found.append(store.find_token_by_id(saved.get_id()))

            # The first calls after a save look for a write-ahead log.
            for _ in range(3):
                find()
            calls = self.calls_before_sql(find)
        assert [known(each) for each in found] == [known(saved)] * 4
        chain = "\n".join(f"{'  ' * depth}{name}" for name, depth in calls)
        assert len(calls) <= 14, f"{len(calls)} calls:\n{chain}"


class Relay:
    """Passes on what a client and a server send to each other, and counts the client's turns.

    A turn is all that the client sends before the server answers: what goes out together costs
    one round trip, in however many packets.
    """

    def __init__(self, server):
        self._server = server
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._lock = threading.Lock()
        self.turns = 0
        self._sockets = []
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def _accept(self):
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            server = socket.create_connection(self._server)
            self._sockets += [client, server]
            talk = {"is_clients_turn": False}
            for source, target, is_client in ((client, server, True), (server, client, False)):
                threading.Thread(
                    target=self._pass_on, args=(source, target, is_client, talk), daemon=True
                ).start()

    def _pass_on(self, source, target, is_client, talk):
        with suppress(OSError):
            while data := source.recv(65536):
                with self._lock:
                    self.turns += is_client and not talk["is_clients_turn"]
                    talk["is_clients_turn"] = is_client
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def close(self):
        self._listening.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        for each in (self._listening, *self._sockets):
            each.close()


COUNTED = (
    *(each for each in BY_DRIVER if each.database != "sqlite"),
    *(each for each in ENGINES if each.database != "sqlite"),
)


@pytest.fixture
def relay(route_url):
    with closing(Relay((route_url.host, route_url.port))) as relay:
        yield relay


@pytest.fixture
def through(route, route_url, relay):
    """A store whose connections go through the relay."""
    with open_store(route, route_url.set(host="127.0.0.1", port=relay.port)) as store:
        yield store


class TestRoundTrips:
    """BEGIN, COMMIT and what a pool resets are among them, whoever sends it."""

    def cost(self, relay, call):
        """The round trips and the statements of a call, once its statements are prepared."""
        call()
        call()
        before = relay.turns
        with statements_counted() as statements:
            call()
        return relay.turns - before, [each.partition(" ")[0] for each in statements]

    @on_routes(*COUNTED)
    def test_a_save_of_a_known_id_takes_at_most_4(self, through, relay):
        access_tokens = (f"a{number}" for number in count(1))

        def save():
            fields = FULL | {"access_token": next(access_tokens)}
            through.save_token(make_token(id="known", **fields))

        turns, statements = self.cost(relay, save)
        assert known(through.find_token_by_id("known"))["access_token"] == "a3"
        assert statements == ["SELECT", "UPDATE"]
        assert 3 <= turns <= 4

    @on_routes(*(each for each in COUNTED if each.kind == "url"))
    def test_a_lookup_by_id_takes_1(self, through, relay):
        through.save_token(make_token(id="known", **FULL))
        assert self.cost(relay, lambda: through.find_token_by_id("known")) == (1, ["SELECT"])
