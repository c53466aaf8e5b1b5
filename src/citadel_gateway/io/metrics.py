"""The gateway's metrics.  Events are counted as they happen; levels are read when asked for.

Every label's values come from the configuration or from an enum, never from a request, so the
number of series is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import attrs
import trio
from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from citadel_gateway.io.record import Outcome, RequestRecord
from citadel_gateway.io.tallies import Counts, Distributions
from citadel_gateway.policy.circuit_breaker import State, Transition
from citadel_gateway.policy.endpoint import Endpoint

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

_OVERHEAD = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
_FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 45.0, 60.0,
)  # fmt: skip
_DURATION = tuple(0.01 * 2**n for n in range(17))
_QUEUE = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_TOKENS = tuple(4.0**n for n in range(14))

BREAKER_LEVEL = {State.CLOSED: 0, State.HALF_OPEN: 1, State.OPEN: 2}


@attrs.frozen(kw_only=True)
class Levels:
    """What is the case right now."""

    endpoints: tuple[Endpoint, ...]
    queue_depths: dict[str, int]
    in_flight: int
    connections: int
    upstream_connections: int
    draining: bool
    log_lines_dropped: int
    now: float


class Metrics:
    """All metrics of one gateway, with a registry of their own.

    :param read: returns the levels; called once for each scrape, in the event loop.
    """

    def __init__(self, read: Callable[[], Levels]) -> None:
        self._read = read
        self.registry = r = CollectorRegistry()
        self._levels = _LevelCollector(read())
        r.register(self._levels)
        ProcessCollector(registry=r)
        GCCollector(registry=r)
        self._requests = Counts(
            "citadel_gateway_requests", "Requests that ended, by how they ended.",
            ("model", "endpoint", "outcome"),
        )  # fmt: skip
        self._attempts = Counts(
            "citadel_gateway_attempts", "Requests sent to endpoints.",
            ("model", "endpoint", "result"),
        )  # fmt: skip
        self._overhead = Distributions(
            "citadel_gateway_overhead_seconds",
            "Latency that the gateway itself added until its answer began.", _OVERHEAD,
        )  # fmt: skip
        self._first_token = Distributions(
            "citadel_gateway_time_to_first_token_seconds",
            "Arrival of a request to the first content of its stream.", _FIRST_TOKEN, ("model",),
        )  # fmt: skip
        self._duration = Distributions(
            "citadel_gateway_request_duration_seconds", "Arrival of a request to its end.",
            _DURATION, ("model",),
        )  # fmt: skip
        self._tokens = Counts(
            "citadel_gateway_tokens", "Tokens, as the engines count them.", ("model", "kind"),
        )  # fmt: skip
        self._token_usage = Distributions(
            "gen_ai_client_token_usage", "Tokens of one request (OpenTelemetry's name).",
            _TOKENS, ("gen_ai_request_model", "gen_ai_token_type"),
        )  # fmt: skip
        self._queue_wait = Distributions(
            "citadel_gateway_queue_wait_seconds", "Waiting for a slot, of requests that waited.",
            _QUEUE, ("model",),
        )  # fmt: skip
        self._cancellations = Counts(
            "citadel_gateway_cancellations", "Requests whose client left, by when it left.",
            ("phase",),
        )  # fmt: skip
        self._rejections = Counts(
            "citadel_gateway_limiter_rejections", "Requests refused by a rate limit.", ("limit",),
        )  # fmt: skip
        self._transitions = Counts(
            "citadel_gateway_breaker_transitions", "Changes of a breaker.",
            ("model", "endpoint", "to"),
        )  # fmt: skip
        self._malformed = Counts(
            "citadel_gateway_malformed_events", "Events that were not JSON, dropped.", ("model",),
        )  # fmt: skip
        self._crashes = Counts(
            "citadel_gateway_crashes", "Exceptions caught at a boundary: bugs.", ("where",),
        )  # fmt: skip
        for family in (
            self._requests, self._attempts, self._overhead, self._first_token, self._duration,
            self._tokens, self._token_usage, self._queue_wait, self._cancellations,
            self._rejections, self._transitions, self._malformed, self._crashes,
        ):  # fmt: skip
            r.register(family)
        r.register(_Renamed(self._duration, "gen_ai_server_request_duration_seconds"))
        r.register(_Renamed(self._first_token, "gen_ai_server_time_to_first_token_seconds"))

    def finished(self, record: RequestRecord) -> None:
        """Count a request that has ended; called once for each."""
        outcome = record.outcome or Outcome.INTERNAL_ERROR
        model = record.model or "none"
        of_model = (model,)
        self._requests.add((model, record.endpoint or "none", outcome.value))
        self._duration.observe(of_model, record.ended - record.began)
        if outcome is Outcome.CLIENT_CLOSED:
            self._cancellations.add((record.phase.value,))
        if record.attempts and record.overhead is not None:
            self._overhead.observe((), record.overhead)
        if record.stream and record.status == 200 and record.committed is not None:
            self._first_token.observe(of_model, record.committed - record.began)
        if record.queue_wait:
            self._queue_wait.observe(of_model, record.queue_wait)
        if prompt := record.prompt_tokens:
            self._tokens.add((model, "prompt"), prompt)
            self._token_usage.observe((model, "input"), prompt)
        if completion := record.completion_tokens:
            self._tokens.add((model, "completion"), completion)
            self._token_usage.observe((model, "output"), completion)

    def attempted(self, endpoint: Endpoint, result: str) -> None:
        """Count an attempt; *result* is ``ok``, ``cancelled``, a finding of ours or a status."""
        self._attempts.add((endpoint.model, endpoint.url, result))

    def rejected(self, limit: str) -> None:
        self._rejections.add((limit,))

    def changed(self, endpoint: Endpoint, transition: Transition) -> None:
        self._transitions.add((endpoint.model, endpoint.url, transition.after.value))

    def malformed(self, model: str, count: int) -> None:
        self._malformed.add((model,), count)

    def crashed(self, where: str) -> None:
        self._crashes.add((where,))

    async def render(self) -> bytes:
        """The page that Prometheus scrapes.  Levels are read here, text is made in a thread."""
        self._levels.levels = self._read()
        return await trio.to_thread.run_sync(generate_latest, self.registry)


@attrs.define(eq=False)
class _LevelCollector(Collector):
    levels: Levels

    def collect(self) -> Iterable[Metric]:
        levels = self.levels
        yield from self._endpoint_gauges(levels)
        depth = GaugeMetricFamily(
            "citadel_gateway_queue_depth", "Requests waiting for a slot.", labels=["model"]
        )
        for model, waiting in levels.queue_depths.items():
            depth.add_metric([model], waiting)
        yield depth
        yield GaugeMetricFamily(
            "citadel_gateway_in_flight_requests", "Requests with an endpoint.", levels.in_flight
        )
        yield GaugeMetricFamily(
            "citadel_gateway_client_connections", "Open client connections.", levels.connections
        )
        yield GaugeMetricFamily(
            "citadel_gateway_upstream_connections",
            "Open connections to endpoints, idle ones included.",
            levels.upstream_connections,
        )
        yield GaugeMetricFamily(
            "citadel_gateway_draining", "1 while shutting down.", float(levels.draining)
        )
        yield GaugeMetricFamily(
            "citadel_gateway_log_lines_dropped",
            "Log lines lost since the start because they could not be written fast enough.",
            levels.log_lines_dropped,
        )

    @staticmethod
    def _endpoint_gauges(levels: Levels) -> Iterator[Metric]:
        gauges: list[tuple[str, str, Callable[[Endpoint], float]]] = [
            ("endpoint_healthy", "1 if it passes its probes.", lambda e: e.health.healthy),
            (
                "breaker_state",
                "0 closed, 1 half-open, 2 open.",
                lambda e: BREAKER_LEVEL[e.breaker.state(levels.now)],
            ),
            ("in_flight", "Requests with this endpoint.", lambda e: e.in_flight),
            ("endpoint_max_concurrent", "The most it may have.", lambda e: e.max_concurrent),
            ("endpoint_latency_seconds", "Peak EWMA of its latency.", lambda e: e.latency.value),
        ]
        for name, doc, value in gauges:
            family = GaugeMetricFamily(f"citadel_gateway_{name}", doc, labels=["model", "endpoint"])
            for endpoint in levels.endpoints:
                family.add_metric([endpoint.model, endpoint.url], float(value(endpoint)))
            yield family


@attrs.define(eq=False)
class _Renamed(Collector):
    """A histogram under OpenTelemetry's name as well, at no cost until somebody scrapes it."""

    histogram: Distributions
    name: str

    def collect(self) -> Iterable[Metric]:
        for metric in self.histogram.collect():
            doc = f"{metric.documentation} (OpenTelemetry's name)"
            renamed = Metric(self.name, doc, "histogram")
            for sample in metric.samples:
                labels = dict(sample.labels)
                labels["gen_ai_request_model"] = labels.pop("model")
                suffix = sample.name.removeprefix(metric.name)
                renamed.add_sample(self.name + suffix, labels, sample.value)
            yield renamed
