"""A worker's part of what the configuration allows the whole host.

Rates and concurrency are the store's to divide, see :mod:`..io.store`.  What a process has alone
is divided here, for good: memory, connections, the queue.  So is all of it where the configuration
wants no store; a limit that is smaller than the number of workers then leaves each with one,
because an endpoint with room for nothing is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import attrs

from citadel_gateway.config.schema import (
    ApiKeyConfig,
    EndpointConfig,
    GatewayConfigSchema,
    LoadBalancerConfig,
    ModelConfig,
    PerformanceConfig,
)
from citadel_gateway.config.values import Count, Rate, Room, StoreKind, Weight

BURST_SECONDS = 5.0
"""A burst holds so many seconds' worth of its rate, unless the configuration says otherwise."""


def burst_of(rate: float, burst: int | None) -> int:
    """How many requests may come at once."""
    return burst if burst is not None else max(1, math.ceil(rate * BURST_SECONDS))


def has_store(config: GatewayConfigSchema) -> bool:
    """Whether several workers share their limits, so that each has the whole of them."""
    return config.store.kind is not StoreKind.MEMORY


def share_of(config: GatewayConfigSchema, place: int, workers: int) -> GatewayConfigSchema:
    """The configuration of worker *place*, from 0 on, of *workers*."""
    part, service = _Part(place, workers), config.service
    own = attrs.evolve(
        config,
        service=attrs.evolve(service, max_connections=part.count(service.max_connections)),
        performance=part.process(config.performance),
        load_balancer=part.load_balancer(config.load_balancer),
    )
    if has_store(config):
        # Requests wait in the queue for their share of a cap, too.
        room = max(1, own.load_balancer.queue_size)
        balancing = attrs.evolve(own.load_balancer, queue_size=Room(room))
        return attrs.evolve(own, load_balancer=balancing)
    return attrs.evolve(
        own,
        performance=part.limits(own.performance),
        models={name: part.model(model) for name, model in config.models.items()},
        security=attrs.evolve(
            config.security, api_keys=tuple(map(part.key, config.security.api_keys))
        ),
    )


def portion_of(
    config: GatewayConfigSchema, place: int, workers: int
) -> Callable[[EndpointConfig], EndpointConfig]:
    """The same for an endpoint that is not in the configuration."""
    return (lambda endpoint: endpoint) if has_store(config) else _Part(place, workers).endpoint


@attrs.frozen
class _Part:
    place: int
    workers: int

    def limits(self, whole: PerformanceConfig) -> PerformanceConfig:
        rate, burst = self.limit(whole.rate_limit_rps, whole.rate_limit_burst)
        client = whole.client_rate_limit_rps
        if client is not None:
            client_rate, client_burst = self.limit(client, whole.client_rate_limit_burst)
            whole = attrs.evolve(
                whole, client_rate_limit_rps=client_rate, client_rate_limit_burst=client_burst
            )
        return attrs.evolve(
            whole,
            rate_limit_rps=rate,
            rate_limit_burst=burst,
            max_concurrent_requests=self.count(whole.max_concurrent_requests),
        )

    def process(self, whole: PerformanceConfig) -> PerformanceConfig:
        return attrs.evolve(
            whole,
            memory_limit_gb=Weight(whole.memory_limit_gb / self.workers),
            max_buffered_bytes=self.buffers(whole),
        )

    def buffers(self, whole: PerformanceConfig) -> Count | None:
        """A body of the largest size has room in any case."""
        share = self.perhaps(whole.max_buffered_bytes)
        return None if share is None else max(share, whole.max_body_bytes)

    def load_balancer(self, whole: LoadBalancerConfig) -> LoadBalancerConfig:
        return attrs.evolve(
            whole,
            queue_size=Room(self.room(whole.queue_size)),
            retry_budget_floor=Rate(whole.retry_budget_floor / self.workers),
        )

    def model(self, whole: ModelConfig) -> ModelConfig:
        return attrs.evolve(
            whole,
            max_concurrent=self.count(whole.max_concurrent),
            min_concurrent=self.perhaps(whole.min_concurrent),
            endpoints=tuple(map(self.endpoint, whole.endpoints)),
        )

    def endpoint(self, whole: EndpointConfig) -> EndpointConfig:
        return attrs.evolve(
            whole,
            max_concurrent=self.perhaps(whole.max_concurrent),
            min_concurrent=self.perhaps(whole.min_concurrent),
        )

    def key(self, whole: ApiKeyConfig) -> ApiKeyConfig:
        if whole.rate_limit_rps is None:
            return whole
        rate, burst = self.limit(whole.rate_limit_rps, whole.rate_limit_burst)
        return attrs.evolve(whole, rate_limit_rps=rate, rate_limit_burst=burst)

    def limit(self, rate: Rate, burst: Count | None) -> tuple[Rate, Count]:
        return Rate(rate / self.workers), self.count(burst_of(rate, burst))

    def room(self, whole: int) -> int:
        """What is left over when it is divided goes to the first workers."""
        each, over = divmod(whole, self.workers)
        return each + (self.place < over)

    def count(self, whole: int) -> Count:
        return Count(max(1, self.room(whole)))

    def perhaps(self, whole: Count | None) -> Count | None:
        return None if whole is None else self.count(whole)
