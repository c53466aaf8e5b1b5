"""Endpoints, made as a configuration says."""

from __future__ import annotations

import random
from weakref import WeakValueDictionary

import attrs

from citadel_gateway.app.upstreams import Model, Numbers, Place, Upstream
from citadel_gateway.config.schema import LoadBalancerConfig, ModelConfig
from citadel_gateway.io.health_monitoring import Probe
from citadel_gateway.io.target import Target, split_url
from citadel_gateway.policy.circuit_breaker import BreakerPolicy, CircuitBreaker
from citadel_gateway.policy.cordons import Cordons
from citadel_gateway.policy.endpoint import Endpoint
from citadel_gateway.policy.health_tracker import HealthTracker
from citadel_gateway.policy.slow_start import SlowStart

_FLOOR = 4  # requests at once that an endpoint may always have, unless it is told otherwise


@attrs.define(eq=False, kw_only=True)
class UpstreamMaker:
    """Makes endpoints, and lets those that there are go by this configuration.

    :param share: what new endpoints may take of their caps to begin with; ``None`` for all.
    :param endpoints: every one that anybody still has to do with, by model and URL, so that there
        is never a second one.
    """

    balancing: LoadBalancerConfig
    cordons: Cordons
    rng: random.Random
    share: int | None
    endpoints: WeakValueDictionary[tuple[str, str], Endpoint]

    def make(self, model: Model, place: Place) -> Upstream:
        """The endpoint of *model* at *place*, which may be there already."""
        config = place.config
        origin, _ = split_url(config.url)
        tls = config.tls if origin.scheme == "https" else None
        origin = attrs.evolve(origin, address=place.address, tls=tls)
        engine = config.engine or model.config.engine
        numbers = Numbers(
            weight=config.weight or model.config.weight,
            max_concurrent=config.max_concurrent or model.config.max_concurrent,
            cost=cost_of(model.config),
            floor=(config.min_concurrent or _FLOOR) if config.adaptive_concurrency else None,
        )
        endpoint = self.endpoints.get((model.id, place.name))
        if endpoint is None:
            endpoint = self.endpoints[model.id, place.name] = Endpoint(
                model=model.id,
                url=place.name,
                weight=numbers.weight,
                max_concurrent=numbers.max_concurrent,
                cost=numbers.cost,
                breaker=CircuitBreaker(self._breaker_policy(), self.rng.random),
                health=self.unknown_health(),
                share=self.share,
            )
            self._resize(endpoint, numbers)
            self.cordons.apply(endpoint)
        return Upstream(
            place=place,
            endpoint=endpoint,
            target=Target.of(config.url, config.api_key, origin),
            probe=Probe.of(config.url, engine.value, config.api_key, origin),
            numbers=numbers,
            engine=engine,
            hedging=model.hedging,
        )

    def configure(self, upstream: Upstream) -> bool:
        """Let the endpoint go by this configuration; true if its share is not what it was."""
        endpoint, numbers, balancing = upstream.endpoint, upstream.numbers, self.balancing
        before = (endpoint.weight, endpoint.cost, endpoint.slow_start)
        endpoint.weight, endpoint.cost = numbers.weight, numbers.cost
        endpoint.is_stood_in_for = upstream.place.is_stood_in_for
        self._resize(endpoint, numbers)
        endpoint.breaker.renew(self._breaker_policy())
        endpoint.health.rise = balancing.healthy_after
        endpoint.health.fall = balancing.unhealthy_after
        return before != (endpoint.weight, endpoint.cost, endpoint.slow_start)

    def _resize(self, endpoint: Endpoint, numbers: Numbers) -> None:
        slow_start = SlowStart(self.balancing.slow_start)
        endpoint.resize(numbers.max_concurrent, numbers.floor, slow_start)

    def _breaker_policy(self) -> BreakerPolicy:
        balancing = self.balancing
        return BreakerPolicy(
            threshold=balancing.circuit_breaker_threshold,
            rest=balancing.circuit_breaker_timeout,
            failure_ratio=balancing.circuit_breaker_failure_ratio,
            window=balancing.circuit_breaker_window,
            min_requests=balancing.circuit_breaker_min_requests,
        )

    def unknown_health(self) -> HealthTracker:
        """Of an endpoint that is to be probed before it is used."""
        balancing = self.balancing
        return HealthTracker(rise=balancing.healthy_after, fall=balancing.unhealthy_after)


def cost_of(model: ModelConfig) -> float | None:
    return model.cost_per_hour if model.cost_per_request is None else model.cost_per_request
