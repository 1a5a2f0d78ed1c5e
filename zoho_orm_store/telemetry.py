"""OpenTelemetry for a store: metrics, and spans of calls and waits.

Names follow OpenTelemetry's semantic conventions for database clients. A span tells of a token that
it was looked up or saved, and never which one: attributes hold no secret, user name, id or scope.
"""

from __future__ import annotations

import threading
import weakref
from contextlib import contextmanager
from functools import partial, wraps
from time import perf_counter
from types import new_class
from typing import TYPE_CHECKING, Any

from zoho_orm_store import __version__
from zoho_orm_store._database.forks import notice_fork
from zoho_orm_store.errors import ConfigurationError, MissingDependencyError, ZohoOrmStoreError
from zoho_orm_store.store import SQLAlchemyTokenStore

try:
    from opentelemetry import metrics, trace
except ImportError:
    raise MissingDependencyError("opentelemetry-api", "opentelemetry") from None

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation
    from opentelemetry.trace import Span, Tracer, TracerProvider

    from zoho_orm_store._refresh.coordinator import RefreshCoordinator, Wait

__all__ = ["instrument"]

_SCHEMA = "https://opentelemetry.io/schemas/1.33.0"
"""The first version in which the conventions for database clients are stable."""

_METHODS = (
    "find_token",
    "find_token_by_id",
    "save_token",
    "delete_token",
    "delete_tokens",
    "get_tokens",
    "expire",
)

_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)
"""Seconds, as the conventions give them for this histogram."""


_COUNTERS = {
    "acquired": ("acquired", "{refresh}", "Refreshes that began."),
    "taken_over": ("taken_over", "{refresh}", "Refreshes that replaced a caller's unfinished one."),
    "ahead": ("ahead", "{refresh}", "Refreshes of tokens that had not expired yet."),
    "failed": ("failed", "{refresh}", "Refreshes that failed."),
    "waited": ("waited", "{caller}", "Callers that waited and got a live token."),
    "seconds_waited": ("wait_time", "s", "How long all callers have waited, in total."),
    "timed_out": ("timed_out", "{caller}", "Callers that waited in vain."),
    "skipped": ("skipped", "{caller}", "Callers that gave up, because others' refreshes failed."),
}
"""The name, unit and description of the instrument for each field of `RefreshStats`."""

_Attributes = dict[str, "str | int"]


def instrument(
    store: SQLAlchemyTokenStore,
    *,
    tracer_provider: TracerProvider | None = None,
    meter_provider: MeterProvider | None = None,
) -> Callable[[], None]:
    """Report a store's calls, waits and refreshes to OpenTelemetry.

    The stores that its ``scoped()`` returns from then on are included. It may be called before a
    fork, and before the global providers are set. Without it, a store does not know of
    OpenTelemetry, and its calls cost nothing more.

    Args:
        store: The store, before other threads use it.
        tracer_provider: Makes the spans; ``None`` stands for the global one.
        meter_provider: Collects the metrics; ``None`` stands for the global one.

    Returns:
        A function that undoes it.

    Raises:
        ConfigurationError: It is another kind of store, it is instrumented already, or another
            store's ``scoped()`` returned it.
    """
    if not isinstance(store, SQLAlchemyTokenStore):
        raise ConfigurationError(
            f"Only a SQLAlchemyTokenStore can be instrumented, not {type(store).__name__}."
        )
    if isinstance(store, _Instrumented):
        raise ConfigurationError(
            "This store is instrumented already. To change the providers, first call the function "
            "that instrument() returned."
        )
    if not store._owns_database:
        raise ConfigurationError(
            "Instrument the store whose scoped() returned this one, before you call scoped()."
        )
    tracer = trace.get_tracer("zoho_orm_store", __version__, tracer_provider, _SCHEMA)
    return _Telemetry(store, tracer, _instruments_of(meter_provider)).remove


class _Instrumented:
    """Marks the classes of instrumented stores."""

    __slots__ = ()


class _Telemetry:
    """What one store and its scoped siblings report.

    The store gets a subclass of its class. Unlike functions in the store's own dictionary, which
    `scoped` copies, a class cannot make a sibling call the store of another tenant.
    """

    def __init__(self, store: SQLAlchemyTokenStore, tracer: Tracer, metrics: _Instruments) -> None:
        self._tracer = tracer
        self._metrics = metrics
        self._attributes = _attributes_of(store)
        self._kind = type(store)
        self._coordinator = store._coordinator
        self._stores = weakref.WeakSet([store])
        store.__class__ = self._instrumented_class()
        if self._coordinator is not None:
            metrics.add(self._coordinator, self._attributes)
            self._coordinator.observe_wait = self._wait

    def remove(self) -> None:
        """Let the stores be as they were before."""
        if self._stores and self._coordinator is not None:
            self._coordinator.observe_wait = None
            self._metrics.remove(self._coordinator)
        for store in tuple(self._stores):
            store.__class__ = self._kind
        self._stores.clear()

    def _instrumented_class(self) -> type[SQLAlchemyTokenStore]:
        kind = self._kind

        @wraps(kind.scoped)
        def scoped(store: SQLAlchemyTokenStore, /, **scope: object) -> SQLAlchemyTokenStore:
            sibling = kind.scoped(store, **scope)
            self._stores.add(sibling)
            return sibling

        # The SDK's exceptions name the store's class, so it keeps its name.
        names = ("__doc__", "__module__", "__qualname__")
        members: dict[str, object] = {name: getattr(kind, name) for name in names}
        members |= {name: self._with_span(name, getattr(kind, name)) for name in _METHODS}
        members["scoped"] = scoped
        # Its class comes first: only then may an object change from one to the other.
        return new_class(
            kind.__name__, (kind, _Instrumented), exec_body=lambda of: of.update(members)
        )

    def _with_span(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(store: SQLAlchemyTokenStore, /, *args: object, **kwargs: object) -> object:
            with self._span(name):
                try:
                    return method(store, *args, **kwargs)
                except BaseException:
                    del args, kwargs  # A traceback with local variables would show the token.
                    raise

        return call

    @contextmanager
    def _span(self, operation: str) -> Iterator[None]:
        attributes: _Attributes = {**self._attributes, "db.operation.name": operation}
        started = perf_counter()
        with self._tracer.start_as_current_span(
            f"{operation} {attributes['db.collection.name']}",
            kind=trace.SpanKind.CLIENT,
            attributes=attributes,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield
            except BaseException as error:
                attributes["error.type"] = _note_error(span, error)
                raise
            finally:
                self._metrics.duration.record(perf_counter() - started, attributes)

    @contextmanager
    def _wait(self, wait: Wait) -> Iterator[None]:
        with self._tracer.start_as_current_span(
            "wait_for_refresh", record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                yield
            except BaseException as error:
                _note_error(span, error)
                raise
            finally:
                if wait.outcome is not None:
                    span.set_attribute("zoho_orm_store.refresh.outcome", wait.outcome)


class _Instruments:
    """The instruments of one meter provider, for all stores that report to it."""

    def __init__(self, provider: MeterProvider | None) -> None:
        self._coordinators: tuple[tuple[weakref.ref[RefreshCoordinator], _Attributes], ...] = ()
        """Replaced as a whole: a lock could be held by another thread when a process forks."""
        meter = metrics.get_meter("zoho_orm_store", __version__, provider, _SCHEMA)
        self.duration = meter.create_histogram(
            "db.client.operation.duration",
            unit="s",
            description="Duration of database client operations.",
            explicit_bucket_boundaries_advisory=_BUCKETS,
        )
        for field, (name, unit, description) in _COUNTERS.items():
            observe = partial(self._observe, field)
            meter.create_observable_counter(
                f"zoho_orm_store.refresh.{name}", [observe], unit, description
            )

    def add(self, coordinator: RefreshCoordinator, attributes: _Attributes) -> None:
        self.remove(coordinator)
        self._coordinators = (*self._coordinators, (weakref.ref(coordinator), attributes))

    def remove(self, coordinator: RefreshCoordinator) -> None:
        gone = (None, coordinator)
        self._coordinators = tuple(each for each in self._coordinators if each[0]() not in gone)

    def _observe(self, field: str, options: CallbackOptions) -> Iterable[Observation]:
        """Add up the stores with the same attributes, which are one series."""
        notice_fork()  # A child begins at 0, also before its first call.
        totals: dict[frozenset[tuple[str, str | int]], float] = {}
        for reference, attributes in self._coordinators:
            coordinator = reference()
            if coordinator is not None:
                series = frozenset(attributes.items())
                totals[series] = totals.get(series, 0) + getattr(coordinator.stats, field)
        return [metrics.Observation(total, dict(series)) for series, total in totals.items()]


_instruments: weakref.WeakKeyDictionary[object, _Instruments] = weakref.WeakKeyDictionary()
"""By meter provider, because a meter ignores the callbacks of an instrument that it has already."""

_making_instruments = threading.Lock()


def _instruments_of(provider: MeterProvider | None) -> _Instruments:
    if provider is metrics.get_meter_provider():
        provider = None
    # The global provider may be set later. Until then, its instruments are only placeholders.
    key = metrics if provider is None else provider
    with _making_instruments:
        if key not in _instruments:
            _instruments[key] = _Instruments(provider)
        return _instruments[key]


def _attributes_of(store: SQLAlchemyTokenStore) -> _Attributes:
    """What all spans and metrics of a store have."""
    url = store._database.url
    attributes: _Attributes = {
        "db.system.name": store._database.dialect_name,
        "db.collection.name": store._table.fullname,
    }
    if url.host:
        attributes["server.address"] = url.host
        if url.port:
            attributes["server.port"] = url.port
    # A SQLite file's path would be a series for each host, and may name its owner.
    if url.database and store._database.dialect_name != "sqlite":
        attributes["db.namespace"] = url.database
    return attributes


def _note_error(span: Span, error: BaseException) -> str:
    """Mark a span as failed, and return the error's type.

    Only the type is kept. `Span.record_exception` would put the message into an event, and a
    message may name a user or a token's id.
    """
    cause = error.__cause__
    kind = type(cause if isinstance(cause, ZohoOrmStoreError) else error).__qualname__
    span.set_attribute("error.type", kind)
    span.set_status(trace.StatusCode.ERROR)
    return kind
