"""The engine's /metrics, under vLLM's names: events are counted, levels are read."""

from __future__ import annotations

import attrs
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from citadel_gateway.sim.profile import EngineProfile
from citadel_gateway.sim.scheduler import Scheduler

_FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0
)  # fmt: skip


@attrs.define(eq=False)
class EngineMetrics:
    """One per engine, with its own registry: four engines in a process do not collide."""

    profile: EngineProfile
    scheduler: Scheduler
    registry: CollectorRegistry = attrs.field(factory=CollectorRegistry, init=False)
    _success: Counter = attrs.field(init=False)
    _first_token: Histogram = attrs.field(init=False)
    _tokens: dict[str, Counter] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._success = Counter(
            "vllm:request_success",
            "Requests by the reason they ended.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._first_token = Histogram(
            "vllm:time_to_first_token_seconds",
            "Time to the first token.",
            ["model_name"],
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=self.registry,
        ).labels(self.profile.model)
        self._tokens = {
            "prompt": self._counter("vllm:prompt_tokens", "Prompt tokens read or found cached."),
            "completion": self._counter("vllm:generation_tokens", "Tokens made."),
            "queries": self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up."),
            "hits": self._counter("vllm:prefix_cache_hits", "Prompt tokens found cached."),
        }
        self._add_levels()

    def prompt_read(self, tokens: int, cached: int, *, looked_up: bool = True) -> None:
        self._tokens["prompt"].inc(tokens)
        if looked_up:
            self._tokens["queries"].inc(tokens)
            self._tokens["hits"].inc(cached)

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def tokens_made(self, count: int) -> None:
        self._tokens["completion"].inc(count)

    def ended(self, reason: str) -> None:
        """*reason* is one of stop, length, abort."""
        self._success.labels(self.profile.model, reason).inc()

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def _counter(self, name: str, doc: str) -> Counter:
        family = Counter(name, doc, ["model_name"], registry=self.registry)
        return family.labels(self.profile.model)

    def _add_levels(self) -> None:
        def usage() -> float:
            return min(1.0, self.scheduler.held_tokens / self.profile.kv_tokens)

        for name, doc, read in (
            ("num_requests_running", "Requests in the batch.", lambda: self.scheduler.running),
            ("num_requests_waiting", "Requests in the queue.", lambda: self.scheduler.waiting),
            ("kv_cache_usage_perc", "Share of the KV cache in use; 1 is all of it.", usage),
        ):
            family = Gauge(f"vllm:{name}", doc, ["model_name"], registry=self.registry)
            family.labels(self.profile.model).set_function(read)
