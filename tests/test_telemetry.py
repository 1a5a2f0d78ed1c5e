"""A store's metrics and spans, by the SDK of OpenTelemetry."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from conftest import on_sqlite
from leaks import found_in, texts_of
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client import CollectorRegistry, generate_latest
from sdk_tokens import known, make_token
from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from zohocrmsdk.src.com.zoho.crm.api.exception import SDKException
from zohocrmsdk.src.com.zoho.crm.api.initializer import Initializer

from zoho_orm_store import (
    ConfigurationError,
    MemoryTokenStore,
    MissingDependencyError,
    RefreshPolicy,
    RefreshStats,
    SQLAlchemyTokenStore,
    StoredTokenMixin,
)
from zoho_orm_store.telemetry import instrument
from zoho_orm_store.testing import LoopbackZoho

SECRETS = {
    "user": "SECRET-user@example.com",
    "client_id": "SECRET-client-id",
    "client_secret": "SECRET-client-secret",
    "refresh_token": "SECRET-refresh-token",
    "access_token": "SECRET-access-token",
    "id": "SECRET-token-id",
}


@dataclass
class Collected:
    """What a store reports to providers of its own."""

    exporter: InMemorySpanExporter = field(default_factory=InMemorySpanExporter)
    reader: InMemoryMetricReader = field(default_factory=InMemoryMetricReader)

    def __post_init__(self):
        self.tracer_provider = TracerProvider()
        self.tracer_provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.meter_provider = MeterProvider([self.reader])
        self.providers = {
            "tracer_provider": self.tracer_provider,
            "meter_provider": self.meter_provider,
        }

    @property
    def spans(self):
        return self.exporter.get_finished_spans()

    def span(self, operation):
        [found] = [span for span in self.spans if span.name.split()[0] == operation]
        return found

    @property
    def metrics(self):
        data = self.reader.get_metrics_data()
        resources = [] if data is None else data.resource_metrics
        return {
            metric.name: metric
            for resource in resources
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }

    def counters(self):
        """The counters of `RefreshStats` that are not 0, summed up over all attributes."""
        values = Counter()
        for name, metric in self.metrics.items():
            prefix, _, name = name.rpartition(".")
            if prefix == "zoho_orm_store.refresh":
                values[name] += sum(point.value for point in metric.data.data_points)
        return {name: value for name, value in values.items() if value}

    def durations(self):
        """How many calls of each operation were measured, and those that failed by their error."""
        points = self.metrics["db.client.operation.duration"].data.data_points
        return {
            (of["db.operation.name"], of.get("error.type")): point.count
            for point in points
            if (of := point.attributes)
        }


@pytest.fixture
def collected():
    collected = Collected()
    yield collected
    collected.meter_provider.shutdown()
    collected.tracer_provider.shutdown()


@pytest.fixture
def store(database, collected):
    with SQLAlchemyTokenStore(database, refresh=RefreshPolicy(lease=5, wait=0.4)) as store:
        instrument(store, **collected.providers)
        yield store


def token(seconds=3600, **values):
    """A token that ends in some seconds."""
    expires_in = str(int((time.time() + seconds) * 1000))
    values = {"id": "1", "user": "ada", "refresh_token": "1000.r", **values}
    return make_token(**{"access_token": "1000.a", "expires_in": expires_in, **values})


def in_thread(function):
    """Run a function in a thread, and return the thread."""
    thread = threading.Thread(target=function)
    thread.start()
    return thread


class TestSpans:
    def test_each_call_is_one_and_is_measured(self, database, store, collected):
        saved = token()
        store.save_token(saved)
        assert known(store.find_token_by_id("1")) == known(saved)
        assert store.find_token(make_token(user="ada")).get_id() == "1"
        assert len(store.get_tokens()) == 1
        assert store.expire("1")
        store.delete_token("1")
        store.delete_tokens()
        operations = ["save_token", "find_token_by_id", "find_token", "get_tokens"]
        operations += ["expire", "delete_token", "delete_tokens"]
        assert [span.name for span in collected.spans] == [
            f"{each} oauthtoken" for each in operations
        ]
        assert collected.durations() == {(each, None): 1 for each in operations}
        for span, operation in zip(collected.spans, operations, strict=True):
            assert span.kind is SpanKind.CLIENT
            assert span.status.status_code is StatusCode.UNSET
            assert span.instrumentation_scope.name == "zoho_orm_store"
            expected = {
                "db.system.name": database.get_backend_name(),
                "db.collection.name": "oauthtoken",
                "db.operation.name": operation,
            }
            if database.host:
                expected |= {"server.address": database.host, "server.port": database.port}
                expected |= {"db.namespace": database.database}
            assert span.attributes == expected

    def test_durations_are_seconds_in_the_buckets_of_the_conventions(self, store, collected):
        store.get_tokens()
        metric = collected.metrics["db.client.operation.duration"]
        [point] = metric.data.data_points
        assert metric.unit == "s"
        assert point.explicit_bounds == (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)
        [span] = collected.spans
        assert point.sum == pytest.approx((span.end_time - span.start_time) / 1e9, abs=0.05)

    @on_sqlite
    def test_they_are_children_of_the_callers_span(self, store, collected):
        with collected.tracer_provider.get_tracer("test").start_as_current_span("request") as span:
            store.get_tokens()
        assert collected.span("get_tokens").parent.span_id == span.get_span_context().span_id

    @on_sqlite
    def test_a_failure_is_named_by_the_type_of_its_cause(self, store, collected):
        with pytest.raises(SDKException) as raised:
            store.save_token(make_token(user="nobody"))
        kind = type(raised.value.__cause__).__name__
        span = collected.span("save_token")
        assert span.attributes["error.type"] == kind == "InvalidTokenError"
        assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, None)
        assert span.events == ()
        assert collected.durations() == {("save_token", kind): 1}

    @on_sqlite
    def test_an_exception_of_the_applications_goes_through(self, database, collected, monkeypatch):
        class SoftTimeLimitExceeded(BaseException):
            pass

        def interrupted(*_):
            raise SoftTimeLimitExceeded

        with SQLAlchemyTokenStore(database) as store:
            instrument(store, **collected.providers)
            monkeypatch.setattr(store, "_get", interrupted)
            with pytest.raises(SoftTimeLimitExceeded):
                store.find_token_by_id("1")
        span = collected.span("find_token_by_id")
        assert span.attributes["error.type"] == SoftTimeLimitExceeded.__qualname__


class TestWaits:
    """One caller has the lease; the store is asked by another one, in another thread."""

    @pytest.fixture
    def expired(self, store, collected):
        store.save_token(token(-1))
        in_thread(lambda: store.find_token_by_id("1")).join()
        assert store.refresh_stats.acquired == 1
        collected.exporter.clear()

    def test_a_wait_is_a_child_of_the_find(self, store, collected):
        store.save_token(token(-1))
        has_lease, others_wait = threading.Event(), threading.Event()

        def refresh():
            found = store.find_token_by_id("1")
            has_lease.set()
            assert others_wait.wait(5)
            time.sleep(0.1)
            found.set_access_token("1000.new")
            found.set_expires_in(str(int((time.time() + 3600) * 1000)))
            store.save_token(found)

        refreshing = in_thread(refresh)
        assert has_lease.wait(5)
        collected.exporter.clear()
        others_wait.set()
        assert store.find_token_by_id("1").get_access_token() == "1000.new"
        refreshing.join()
        find, wait = collected.span("find_token_by_id"), collected.span("wait_for_refresh")
        assert wait.parent.span_id == find.context.span_id
        assert wait.attributes == {"zoho_orm_store.refresh.outcome": "waited"}
        assert wait.status.status_code is StatusCode.UNSET
        counters = collected.counters()
        assert counters.pop("wait_time") == pytest.approx(store.refresh_stats.seconds_waited)
        assert counters == {"acquired": 1, "waited": 1}

    @on_sqlite
    def test_one_that_times_out_is_no_error(self, store, collected, expired):
        assert store.find_token_by_id("1") is not None
        wait = collected.span("wait_for_refresh")
        assert wait.attributes == {"zoho_orm_store.refresh.outcome": "timed_out"}
        assert wait.status.status_code is StatusCode.UNSET
        assert (wait.end_time - wait.start_time) / 1e9 >= 0.3
        assert collected.counters()["timed_out"] == 1

    @on_sqlite
    def test_one_that_fails_names_the_error(self, store, collected, expired, query):
        store._coordinator._policy = RefreshPolicy(lease=5, wait=5)

        def fail():
            time.sleep(0.2)
            query(
                "UPDATE oauthtoken_refresh_lease SET owner = '', failures = 2, expires_at = :now",
                now=int(time.time() * 1000),
            )

        failing = in_thread(fail)
        with pytest.raises(SDKException):
            store.find_token_by_id("1")
        failing.join()
        for name in ("wait_for_refresh", "find_token_by_id"):
            span = collected.span(name)
            assert span.attributes["error.type"] == "RefreshFailedError"
            assert span.status.status_code is StatusCode.ERROR
            assert span.events == ()
        assert (
            collected.span("wait_for_refresh").attributes["zoho_orm_store.refresh.outcome"]
            == "skipped"
        )
        assert collected.counters()["skipped"] == 1

    @on_sqlite
    def test_one_that_ends_with_the_lease_says_so(self, database, collected):
        with SQLAlchemyTokenStore(database, refresh=RefreshPolicy(lease=0.3, wait=5)) as store:
            instrument(store, **collected.providers)
            store.save_token(token(-1))
            in_thread(lambda: store.find_token_by_id("1")).join()
            collected.exporter.clear()
            store.find_token_by_id("1")
        wait = collected.span("wait_for_refresh")
        assert wait.attributes == {"zoho_orm_store.refresh.outcome": "acquired"}
        assert collected.counters() == {"acquired": 2, "taken_over": 1}

    @on_sqlite
    def test_a_live_token_has_none(self, store, collected):
        store.save_token(token())
        store.find_token_by_id("1")
        assert [span.name.split()[0] for span in collected.spans] == [
            "save_token",
            "find_token_by_id",
        ]


class TestCounters:
    @on_sqlite
    def test_there_is_one_for_each_field_of_the_stats(self, store, collected):
        stats = RefreshStats(*range(1, len(RefreshStats._fields) + 1))
        store._coordinator.stats = stats
        expected = stats._asdict() | {"wait_time": stats.seconds_waited}
        del expected["seconds_waited"]
        assert collected.counters() == expected
        for name, metric in collected.metrics.items():
            assert metric.data.is_monotonic
            assert metric.unit == ("s" if name.endswith("wait_time") else metric.unit)
            assert metric.unit in ("s", "{refresh}", "{caller}")

    def test_several_stores_are_added_up(self, tmp_path, collected):
        urls = [f"sqlite:///{tmp_path / name}.db" for name in "abc"]
        stores = [SQLAlchemyTokenStore(url) for url in urls]
        for number, store in enumerate(stores):
            instrument(store, **collected.providers)
            store._coordinator.stats = RefreshStats(acquired=10**number)
        assert collected.counters() == {"acquired": 111}
        stores[0].close()
        del stores[0], store
        gc.collect()
        assert collected.counters() == {"acquired": 110}

    @on_sqlite
    def test_without_coordination_there_are_none(self, database, collected):
        with SQLAlchemyTokenStore(database, refresh=None) as store:
            instrument(store, **collected.providers)
            store.get_tokens()
        assert [*collected.metrics] == ["db.client.operation.duration"]

    @on_sqlite
    def test_a_forked_child_begins_at_0(self, store, collected, in_child):
        store.save_token(token(-1))
        store.find_token_by_id("1")
        assert collected.counters() == {"acquired": 1}

        def child():
            assert collected.counters() == {}
            assert store.refresh_stats == RefreshStats()
            store.find_token_by_id("1")
            assert collected.span("wait_for_refresh").attributes
            assert collected.counters()["timed_out"] == 1
            assert "acquired" not in collected.counters()

        in_child(child)
        assert collected.counters() == {"acquired": 1}

    def test_the_global_providers_may_be_set_after_a_fork(self, tmp_path):
        program = f"""
import os
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from zoho_orm_store import SQLAlchemyTokenStore
from zoho_orm_store.telemetry import instrument

first, second = (SQLAlchemyTokenStore("sqlite:///{tmp_path}/" + name) for name in "ab")
instrument(first)
first.get_tokens()
if os.fork() == 0:
    reader = InMemoryMetricReader()
    metrics.set_meter_provider(MeterProvider([reader]))
    instrument(second, meter_provider=metrics.get_meter_provider())
    for store in (first, second):
        store.get_tokens()
        store._coordinator._count(acquired=1)
    [resource] = reader.get_metrics_data().resource_metrics
    found = dict((m.name, m.data.data_points[0]) for m in resource.scope_metrics[0].metrics)
    print(found["zoho_orm_store.refresh.acquired"].value)
    print(found["db.client.operation.duration"].count, flush=True)
    os._exit(0)
print(os.wait()[1])
"""
        arguments = [sys.executable, "-W", "error", "-c", program]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
        assert (done.stdout.split(), done.stderr) == (["2", "2", "0"], "")


class Base(DeclarativeBase):
    pass


class TenantToken(StoredTokenMixin, Base):
    __tablename__ = "tenant_token"
    tenant: Mapped[str] = mapped_column(String(20))


OF_TENANTS = {"model": TenantToken, "scope": {"tenant": "one"}, "refresh": None}


class TestWhatIsInstrumented:
    def test_the_stores_of_tenants_are_and_find_their_own(self, tmp_path, collected):
        url = f"sqlite:///{tmp_path / 'tenants.db'}"
        with SQLAlchemyTokenStore(url, **OF_TENANTS) as one:
            with one._database.transaction() as run:
                run(Base.metadata.create_all)
            undo = instrument(one, **collected.providers)
            two = one.scoped(tenant="two")
            for store, user in ((one, "ada"), (two, "bob"), (two.scoped(tenant="three"), "eve")):
                store.save_token(token(id=user, user=user, refresh_token=user))
                [found] = store.get_tokens()
                assert found.get_id() == user
            assert two.find_token_by_id("ada") is None
            assert len(collected.spans) == 7
            undo()
            assert two.find_token_by_id("bob") is not None
            assert len(collected.spans) == 7

    @on_sqlite
    def test_it_is_undone(self, store, collected, database):
        with SQLAlchemyTokenStore(database) as other:
            undo = instrument(other, **collected.providers)
            other._coordinator._count(acquired=1)
            assert collected.counters() == {"acquired": 1}
            undo()
            assert type(other) is SQLAlchemyTokenStore
            assert other._coordinator.observe_wait is None
            assert collected.counters() == {}
            again = instrument(other, **collected.providers)
            undo()
            assert other._coordinator.observe_wait is not None, "the first one is over"
            again()

    @on_sqlite
    def test_a_store_keeps_its_name_and_kind(self, store):
        class Own(SQLAlchemyTokenStore):
            pass

        assert isinstance(store, SQLAlchemyTokenStore)
        assert type(store).__name__ == SQLAlchemyTokenStore.__name__
        assert type(store).find_token.__doc__ == SQLAlchemyTokenStore.find_token.__doc__
        with Own("sqlite://") as own:
            instrument(own)
            assert isinstance(own, Own)
            assert own.get_tokens() == []

    @on_sqlite
    def test_other_stores_know_nothing_of_it(self, store, database, collected):
        """The path of a store that is not instrumented has no check in it."""
        with SQLAlchemyTokenStore(database) as other:
            assert type(other).find_token_by_id is SQLAlchemyTokenStore.__mro__[1].find_token_by_id
            other.get_tokens()
        assert collected.spans == ()

    @on_sqlite
    def test_what_it_cannot_is_refused(self, store):
        with pytest.raises(ConfigurationError, match="instrumented already"):
            instrument(store)
        other = SQLAlchemyTokenStore("sqlite://", **OF_TENANTS)
        with pytest.raises(ConfigurationError, match=r"whose scoped\(\) returned this one"):
            instrument(other.scoped(tenant="two"))
        with pytest.raises(ConfigurationError, match="not MemoryTokenStore"):
            instrument(MemoryTokenStore())


class TestLeaks:
    def everything(self, collected):
        yield from (span.to_json() for span in collected.spans)
        yield collected.reader.get_metrics_data().to_json()

    def test_spans_and_metrics_show_no_secret_user_or_id(self, store, collected):
        secrets = tuple(SECRETS.values())
        errors = []
        store.save_token(token(-1, **SECRETS))
        in_thread(lambda: store.find_token_by_id(SECRETS["id"])).join()
        store.find_token_by_id(SECRETS["id"])
        store.find_token(make_token(user=SECRETS["user"]))
        for fail in (
            lambda: store.save_token(token(**SECRETS | {"user": "another"})),
            lambda: store.find_token_by_id(SECRETS["id"] + "\0"),
            lambda: store.find_token(SECRETS["access_token"]),
            lambda: store.delete_token(SECRETS["id"] * 1000),
        ):
            try:
                fail()
            except SDKException as error:
                errors.append(error)
        assert errors
        assert {span.status.status_code for span in collected.spans} == {
            StatusCode.UNSET,
            StatusCode.ERROR,
        }
        assert {span.name for span in collected.spans} >= {"wait_for_refresh"}
        assert found_in(self.everything(collected), secrets) == []
        for error in errors:
            shown = [text.partition("test_telemetry.py")[0] for text in texts_of(error)]
            hidden = tuple(SECRETS[name] for name in ("client_secret", "refresh_token"))
            assert found_in(shown, hidden) == []

    @on_sqlite
    def test_the_frame_of_a_span_shows_no_token_in_a_traceback(self, store):
        """Which the tools that print local variables would show."""
        with pytest.raises(SDKException) as raised:
            store.save_token(token(**SECRETS | {"id": "x" * 1000}))
        frame = raised.value.__traceback__
        while frame is not None:
            if frame.tb_frame.f_globals["__name__"] == "zoho_orm_store.telemetry":
                assert "args" not in frame.tb_frame.f_locals
            frame = frame.tb_next


@on_sqlite
class TestTheSDK:
    """With the real SDK, and a stand-in for Zoho."""

    @pytest.fixture
    def zoho(self, monkeypatch):
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(Initializer, "initializer", None)
        with LoopbackZoho() as zoho:
            zoho.delay = 0.15
            yield zoho
        Initializer.LOCAL.init = None

    @pytest.fixture
    def call(self, database, collected, zoho, tmp_path):
        """Ask for an access token in several threads at once, when it has expired."""
        client = {"client_id": zoho.client_id, "client_secret": zoho.client_secret}
        with SQLAlchemyTokenStore(database) as store:
            store.save_token(token(-1, refresh_token=zoho.issue_refresh_token(), **client))
            instrument(store, **collected.providers)
            store.initialize_sdk(zoho.environment(), resource_path=str(tmp_path))

            def get_token():
                with store.acting_as("1") as acting:
                    return acting.get_token()

            def call(threads):
                with ThreadPoolExecutor(threads) as pool:
                    return [pool.submit(get_token) for _ in range(threads)]

            yield call

    def test_one_refresh_for_several_callers(self, call, collected, zoho):
        assert len({future.result() for future in call(3)}) == 1
        assert zoho.counts.refreshes == 1
        counters = collected.counters()
        assert counters.pop("wait_time") > 0.1
        assert counters == {"acquired": 1, "waited": 2}
        names = {span.context.span_id: span.name.split()[0] for span in collected.spans}
        waits = [span for span in collected.spans if span.name == "wait_for_refresh"]
        assert len(waits) == 2
        assert {names[span.parent.span_id] for span in waits} <= {"find_token", "find_token_by_id"}

    def test_a_refresh_that_fails(self, call, collected, zoho):
        zoho.fail()
        [future] = call(1)
        assert isinstance(future.exception(), SDKException)
        assert collected.counters() == {"acquired": 1, "failed": 1}


class TestThePage:
    """docs/monitoring.md: what it names is what Prometheus gets."""

    page = (Path(__file__).parent.parent / "docs" / "monitoring.md").read_text(encoding="utf-8")

    @on_sqlite
    def test_the_tables_have_every_name(self, store, collected):
        store.save_token(token(-1))
        in_thread(lambda: store.find_token_by_id("1")).join()
        store.find_token_by_id("1")
        names = {*collected.metrics} | {span.name.split()[0] for span in collected.spans}
        names |= {name for span in collected.spans for name in span.attributes}
        missing = [name for name in names if f"`{name}" not in self.page]
        assert missing == []

    @on_sqlite
    def test_the_queries_use_what_there_is(self, database):
        registry = CollectorRegistry()
        provider = MeterProvider([PrometheusMetricReader(registry=registry)])
        with SQLAlchemyTokenStore(database) as store:
            instrument(store, meter_provider=provider)
            with pytest.raises(SDKException):
                store.save_token(make_token())
            served = generate_latest(registry).decode()
            provider.shutdown()
        there = {*re.findall(r"[a-z_]+", served)}
        named = {*re.findall(r"\b(?:zoho_orm_store_refresh|db_client|db_op|error)_\w+", self.page)}
        assert len(named) > 10
        assert named <= there

    def test_the_alerts_are_rules_and_each_has_its_advice(self):
        [rules] = re.findall(r"```text\n(groups:.*?)```", self.page, re.DOTALL)
        [group] = yaml.safe_load(rules)["groups"]
        alerts = [rule["alert"] for rule in group["rules"]]
        assert [*re.findall(r"^\| `(Zoho\w+)` \|", self.page, re.MULTILINE)] == alerts
        for rule in group["rules"]:
            assert rule["expr"].count("(") == rule["expr"].count(")")


class TestWithoutTheExtra:
    def test_importing_the_package_does_not_load_opentelemetry(self):
        code = (
            "import sys\nfrom zoho_orm_store import SQLAlchemyTokenStore as Store\n"
            "Store('sqlite://').get_tokens()\n"
            "print([name for name in sys.modules if name.startswith('opentelemetry')])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.strip() == "[]"

    def test_what_is_missing_is_named(self):
        code = "import sys\nsys.modules['opentelemetry'] = None\nimport zoho_orm_store.telemetry"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert MissingDependencyError.__name__ in done.stderr
        assert "pip install 'zoho-orm-store[opentelemetry]'" in done.stderr
