"""The gateway's metrics.  Events are counted as they happen; levels are read when asked for.

Every label's values come from the configuration or from an enum, never from a request, so the
number of series is bounded.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Set
from weakref import WeakKeyDictionary

import attrs
import trio
from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from citadel_gateway.io.record import Outcome, RequestRecord
from citadel_gateway.io.series import (
    Counters,
    Histograms,
    head,
    label_text,
    number,
)
from citadel_gateway.policy.circuit_breaker import State, Transition
from citadel_gateway.policy.endpoint import Endpoint
from citadel_gateway.policy.hedging import HedgeResult
from citadel_gateway.policy.watermarks import Level

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

_OVERHEAD = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
_FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 45.0, 60.0,
)  # fmt: skip
_DURATION = tuple(0.01 * 2**n for n in range(17))
_QUEUE = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_TOKENS = tuple(4.0**n for n in range(14))

_OTEL_MODEL = "gen_ai_request_model"  # OpenTelemetry's name of the label
_SLICE = 0.0004  # seconds that making a page may hold the event loop in one go
_REMEMBERED = 300.0  # seconds that an endpoint's counts outlive it

BREAKER_LEVEL = {State.CLOSED: 0, State.HALF_OPEN: 1, State.OPEN: 2}


@attrs.frozen
class OverloadLevel:
    """What is used of something that the process has only so much of."""

    resource: str
    level: Level
    used: float
    limit: float


@attrs.frozen(kw_only=True)
class Levels:
    """What is the case right now."""

    endpoints: tuple[Endpoint, ...]
    queue_depths: dict[tuple[str, str], int]  # by model and class
    queue_waits: dict[str, float]  # predicted, by model
    panics: dict[str, bool] = attrs.field(factory=dict)  # by model
    failing: dict[tuple[str, str], bool] = attrs.field(factory=dict)  # by model and kind of source
    in_flight: int
    connections: int
    tasks: int
    upstream_connections: int
    draining: bool
    log_lines_dropped: int
    now: float
    generation: int = 1
    generations: int = 1
    configured_at: float = 0.0
    is_refusing: bool = False
    overload: tuple[OverloadLevel, ...] = ()
    buffered: tuple[float, float] = (0, math.inf)  # bytes, and how many there may be
    store: StoreLevels | None = None


@attrs.frozen(kw_only=True)
class StoreLevels:
    """Of a store that several gateways share.

    :param is_up: it decides; else this gateway does by itself.
    :param members: gateways that share it.
    :param misses: requests whose rate limits this gateway decided by itself since the start.
    """

    is_up: bool
    members: int
    misses: int


class Metrics:
    """All metrics of one gateway.

    :param read: returns the levels; called once for each page, in the event loop.
    """

    def __init__(self, read: Callable[[], Levels]) -> None:
        self._read = read
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)
        GCCollector(registry=self._process)
        self._requests = Counters(
            "citadel_gateway_requests", "Requests that ended, by how they ended.",
            ["model", "endpoint", "outcome"],
        )  # fmt: skip
        self._attempts = Counters(
            "citadel_gateway_attempts", "Requests sent to endpoints.",
            ["model", "endpoint", "result"],
        )  # fmt: skip
        self._overheads = Histograms(
            "citadel_gateway_overhead_seconds",
            "Latency that the gateway itself added until its answer began.",
            buckets=_OVERHEAD,
        )  # fmt: skip
        self._overhead = self._overheads.labels()
        self._first_token = Histograms(
            "citadel_gateway_time_to_first_token_seconds",
            "Arrival of a request to the first content of its stream.",
            ["model"], buckets=_FIRST_TOKEN,
            also=("gen_ai_server_time_to_first_token_seconds", [_OTEL_MODEL]),
        )  # fmt: skip
        self._duration = Histograms(
            "citadel_gateway_request_duration_seconds", "Arrival of a request to its end.",
            ["model"], buckets=_DURATION,
            also=("gen_ai_server_request_duration_seconds", [_OTEL_MODEL]),
        )  # fmt: skip
        self._tokens = Counters(
            "citadel_gateway_tokens", "Tokens, as the engines count them.",
            ["model", "kind"],
        )  # fmt: skip
        self._token_usage = Histograms(
            "gen_ai_client_token_usage", "Tokens of one request (OpenTelemetry's name).",
            [_OTEL_MODEL, "gen_ai_token_type"], buckets=_TOKENS,
        )  # fmt: skip
        self._queue_wait = Histograms(
            "citadel_gateway_queue_wait_seconds", "Waiting for a slot, of requests that waited.",
            ["model", "priority"], buckets=_QUEUE,
        )  # fmt: skip
        self._turned_away = Counters(
            "citadel_gateway_queue_refusals", "Requests that got no slot for want of room or time.",
            ["model", "reason"],
        )  # fmt: skip
        self._cancellations = Counters(
            "citadel_gateway_cancellations", "Requests whose client left, by when it left.",
            ["phase"],
        )  # fmt: skip
        self._rejections = Counters(
            "citadel_gateway_limiter_rejections", "Requests refused by a rate limit.",
            ["limit"],
        )  # fmt: skip
        self._transitions = Counters(
            "citadel_gateway_breaker_transitions", "Changes of a breaker.",
            ["model", "endpoint", "to"],
        )  # fmt: skip
        self._timeouts = Counters(
            "citadel_gateway_timeouts", "Clocks that ran out, each time one did.",
            ["clock", "model"],
        )  # fmt: skip
        self._malformed = Counters(
            "citadel_gateway_malformed_events", "Events that were not JSON, dropped.",
            ["model"],
        )  # fmt: skip
        self._continuations = Counters(
            "citadel_gateway_continuations",
            "Streams that broke after their first token, by how another endpoint was to go on.",
            ["model", "way"],
        )  # fmt: skip
        self._hedges = Counters(
            "citadel_gateway_hedges",
            "Times that a stream's first token was late, by what came of asking a second endpoint.",
            ["model", "result"],
        )  # fmt: skip
        self._changes = Counters(
            "citadel_gateway_endpoint_changes",
            "Endpoints that have come or gone while the configuration stayed.",
            ["model", "change"],
        )  # fmt: skip
        self._crashes = Counters(
            "citadel_gateway_crashes", "Exceptions caught at a boundary: bugs.",
            ["where"],
        )  # fmt: skip
        self._reloads = Counters(
            "citadel_gateway_config_reloads",
            "Times that the configuration was read again: taken, refused or crashed.",
            ["result"],
        )
        self._overloaded = Counters(
            "citadel_gateway_overload_refusals",
            "Requests refused because the process is short of something.",
            ["resource"],
        )
        self.ended = 0
        """Requests that have ended, whatever came of them."""
        self._absent: dict[tuple[str, str], float] = {}
        self._labels: WeakKeyDictionary[Endpoint, str] = WeakKeyDictionary()
        self._making = trio.Lock()
        self._page = b""
        self._made_at = -math.inf

    def finished(self, record: RequestRecord) -> None:
        """Count a request that has ended; called once for each."""
        self.ended += 1
        outcome = record.outcome or Outcome.INTERNAL_ERROR
        model = record.model or "none"
        self._requests.labels(model, record.endpoint or "none", outcome.value).inc()
        self._duration.labels(model).observe(record.ended - record.began)
        if outcome is Outcome.CLIENT_CLOSED:
            self._cancellations.labels(record.phase.value).inc()
        if record.attempts and record.overhead is not None:
            self._overhead.observe(record.overhead)
        if record.stream and record.status == 200 and record.committed is not None:
            self._first_token.labels(model).observe(record.committed - record.began)
        if record.queue_wait:
            self._queue_wait.labels(model, record.priority).observe(record.queue_wait)
        if prompt := record.prompt_tokens:
            self._tokens.labels(model, "prompt").inc(prompt)
            self._token_usage.labels(model, "input").observe(prompt)
        if completion := record.completion_tokens:
            self._tokens.labels(model, "completion").inc(completion)
            self._token_usage.labels(model, "output").observe(completion)

    def attempted(self, endpoint: Endpoint, result: str) -> None:
        """Count an attempt.

        *result* is ``ok``, ``cancelled``, ``lost`` (another endpoint's first token came sooner), a
        finding of ours or a status.
        """
        self._attempts.labels(endpoint.model, endpoint.url, result).inc()

    def rejected(self, limit: str) -> None:
        self._rejections.labels(limit).inc()

    def turned_away(self, model: str, reason: str) -> None:
        """Count a request that a queue refused.

        *reason* is ``full``, ``displaced`` (by somebody with fewer waiting), ``too_long`` (so it
        was refused at once) or ``timeout`` (it waited).
        """
        self._turned_away.labels(model, reason).inc()

    def timed_out(self, clock: str, model: str = "none") -> None:
        """Count a clock that ran out.

        *clock* is one of the upstream's (``connect``, ``headers``, ``first_token``, ``idle``,
        ``total``), ``queue``, or one of a client's (``client_header``, ``client_body``,
        ``client_write``), which run while nobody knows its model.
        """
        self._timeouts.labels(clock, model).inc()

    def overloaded(self, resource: str) -> None:
        """Count a refusal for want of ``memory``, ``descriptors``, or room for its ``buffers``."""
        self._overloaded.labels(resource).inc()

    def changed(self, endpoint: Endpoint, transition: Transition) -> None:
        self._transitions.labels(endpoint.model, endpoint.url, transition.after.value).inc()

    def arrived(self, endpoint: Endpoint, *, has_come: bool) -> None:
        self._changes.labels(endpoint.model, "added" if has_come else "removed").inc()

    def malformed(self, model: str, count: int) -> None:
        self._malformed.labels(model).inc(count)

    def continued(self, model: str, way: str) -> None:
        """Count a broken stream; *way* is ``resume``, ``replay``, or ``none``."""
        self._continuations.labels(model, way).inc()

    def hedged(self, model: str, result: HedgeResult) -> None:
        self._hedges.labels(model, result.value).inc()

    def crashed(self, where: str) -> None:
        self._crashes.labels(where).inc()

    def reloaded(self, result: str) -> None:
        self._reloads.labels(result).inc()

    def forget_absent(self, endpoints: Set[str], models: Set[str], now: float) -> None:
        """Drop what was counted of endpoints and models that have been no longer known for a while.

        Not at once: their last events have to be scraped, too.
        """
        absent: dict[tuple[str, str], float] = {}
        for label, known in (("endpoint", endpoints), ("model", models), (_OTEL_MODEL, models)):
            families = [family for family in self._families if label in family.label_names]
            seen = set().union(*(family.values_of(label) for family in families))
            for value in seen - known - {"none"}:
                since = absent[label, value] = self._absent.get((label, value), now)
                if now - since >= _REMEMBERED:
                    for family in families:
                        family.forget(label, value)
        self._absent = absent

    async def render(self) -> bytes:
        """The page that Prometheus scrapes.

        It is made in slices, so that no stream waits for it longer than for any other task; who
        asks while one is being made gets that one.
        """
        asked_at = time.perf_counter()
        async with self._making:
            if self._made_at <= asked_at:
                self._page = await _in_slices(self._pieces(self._read()))
                self._made_at = time.perf_counter()
            page = self._page
            if not self._making.statistics().tasks_waiting:
                self._page = b""  # it may be large
            return page

    async def render_own(self) -> bytes:
        """The same without what the process itself is asked for, which is half of the work."""
        return await _in_slices(self._own_pieces(self._read()))

    def _pieces(self, levels: Levels) -> Iterator[str]:
        yield from self._own_pieces(levels)
        yield generate_latest(self._process).decode()

    def _own_pieces(self, levels: Levels) -> Iterator[str]:
        yield from self._endpoint_gauges(levels)
        yield from _other_gauges(levels)
        yield from _overload_gauges(levels)
        if levels.store is not None:
            yield from _store_gauges(levels.store)
        for family in self._families:
            yield from family.pieces()

    def _endpoint_gauges(self, levels: Levels) -> Iterator[str]:
        gauges: list[tuple[str, str, Callable[[Endpoint], float]]] = [
            ("endpoint_healthy", "1 if it passes its probes.", lambda e: e.health.healthy),
            (
                "breaker_state",
                "0 closed, 1 half-open, 2 open.",
                lambda e: BREAKER_LEVEL[e.breaker.state(levels.now)],
            ),
            ("in_flight", "Requests with this endpoint.", lambda e: e.in_flight),
            ("endpoint_max_concurrent", "The most it may have.", lambda e: e.max_concurrent),
            (
                "endpoint_limit",
                "The most it may have now: less while it starts slowly, or adapts.",
                lambda e: e.limit,
            ),
            (
                "endpoint_slow_start_share",
                "Part of its share that it gets: below 1 while it starts slowly.",
                lambda e: e.warmth,
            ),
            ("endpoint_cordoned", "1 if it gets nothing new, by command.", lambda e: e.cordoned),
            ("endpoint_latency_seconds", "Peak EWMA of its latency.", lambda e: e.latency.value),
        ]
        for name, doc, value in gauges:
            full = f"citadel_gateway_{name}"
            yield head(full, doc, "gauge")
            for endpoint in levels.endpoints:
                yield f"{full}{self._label(endpoint)} {number(value(endpoint))}\n"

    def _label(self, endpoint: Endpoint) -> str:
        text = self._labels.get(endpoint)
        if text is None:
            text = label_text(("model", "endpoint"), (endpoint.model, endpoint.url))
            self._labels[endpoint] = text
        return text

    @property
    def _families(self) -> tuple[Counters | Histograms, ...]:
        return (
            self._requests, self._attempts, self._overheads, self._first_token, self._duration,
            self._tokens, self._token_usage, self._queue_wait, self._turned_away,
            self._cancellations, self._rejections, self._transitions, self._timeouts,
            self._changes, self._malformed, self._continuations, self._hedges, self._crashes,
            self._reloads, self._overloaded,
        )  # fmt: skip


async def _in_slices(pieces: Iterator[str]) -> bytes:
    done: list[bytes] = []
    slice_: list[str] = []
    until = time.perf_counter() + _SLICE
    for piece in pieces:
        slice_.append(piece)
        if time.perf_counter() >= until:
            done.append("".join(slice_).encode())
            slice_.clear()
            await trio.lowlevel.checkpoint()
            until = time.perf_counter() + _SLICE
    done.append("".join(slice_).encode())
    await trio.lowlevel.checkpoint()
    return b"".join(done)


def _store_gauges(store: StoreLevels) -> Iterator[str]:
    for what, doc, kind, value in (
        (
            "up",
            "0 while the store cannot be asked, so that local limits apply.",
            "gauge",
            store.is_up,
        ),
        ("members", "Gateways that share the store.", "gauge", store.members),
        (
            "misses_total",
            "Requests whose limits were decided without the store, because it did not answer.",
            "counter",
            store.misses,
        ),
    ):
        yield head(f"citadel_gateway_store_{what}", doc, kind)
        yield f"citadel_gateway_store_{what} {number(value)}\n"


def _other_gauges(levels: Levels) -> Iterator[str]:
    name = "citadel_gateway_queue_depth"
    yield head(name, "Requests waiting for a slot.", "gauge")
    for labels, waiting in levels.queue_depths.items():
        yield f"{name}{label_text(('model', 'priority'), labels)} {number(waiting)}\n"
    name = "citadel_gateway_queue_predicted_wait_seconds"
    yield head(name, "Wait of a client that has nothing in the queue yet; 0 if unknown.", "gauge")
    for model, wait in levels.queue_waits.items():
        yield f"{name}{label_text(('model',), (model,))} {number(wait)}\n"
    name = "citadel_gateway_panic"
    yield head(name, "1 while too few endpoints are healthy, so that all are used.", "gauge")
    for model, panics in levels.panics.items():
        yield f"{name}{label_text(('model',), (model,))} {number(panics)}\n"
    name = "citadel_gateway_source_failing"
    yield head(name, "1 while what a source of endpoints said last is used.", "gauge")
    for labels, is_failing in levels.failing.items():
        yield f"{name}{label_text(('model', 'source'), labels)} {number(is_failing)}\n"
    for what, doc, value in (
        ("in_flight_requests", "Requests with an endpoint.", levels.in_flight),
        ("client_connections", "Open client connections.", levels.connections),
        ("tasks", "Tasks of the event loop: flat when the load is.", levels.tasks),
        (
            "upstream_connections",
            "Open connections to endpoints, idle ones included.",
            levels.upstream_connections,
        ),
        ("draining", "1 while shutting down.", levels.draining),
        (
            "log_lines_dropped",
            "Log lines lost since the start because they could not be written fast enough.",
            levels.log_lines_dropped,
        ),
        ("config_generation", "Number of the configuration in use.", levels.generation),
        (
            "config_generations",
            "Configurations that have requests, the one in use included.",
            levels.generations,
        ),
        (
            "config_timestamp_seconds",
            "When the configuration was taken into use, since 1970.",
            levels.configured_at,
        ),
        ("config_refused", "1 if the file was refused when last read.", levels.is_refusing),
    ):
        yield head(f"citadel_gateway_{what}", doc, "gauge")
        yield f"citadel_gateway_{what} {number(value)}\n"


def _overload_gauges(levels: Levels) -> Iterator[str]:
    gauges: list[tuple[str, str, Callable[[OverloadLevel], float]]] = [
        (
            "level",
            "0 calm, 1 connections end with their answers, 2 requests are refused, 3 connections "
            "wait.",
            lambda each: each.level,
        ),
        ("used", "Bytes of memory, or descriptors.", lambda each: each.used),
        ("limit", "The most there may be of them.", lambda each: each.limit),
    ]
    for what, doc, value in gauges:
        name = f"citadel_gateway_overload_{what}"
        yield head(name, doc, "gauge")
        for each in levels.overload:
            yield f"{name}{label_text(('resource',), (each.resource,))} {number(value(each))}\n"
    used, limit = levels.buffered
    for what, doc, size in (
        ("buffered_bytes", "Large bodies and whole answers in memory.", used),
        ("buffered_bytes_limit", "The most there may be of them.", limit),
    ):
        yield head(f"citadel_gateway_{what}", doc, "gauge")
        yield f"citadel_gateway_{what} {number(size)}\n"
