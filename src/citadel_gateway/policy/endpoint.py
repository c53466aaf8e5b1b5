"""What is known about one endpoint, and whether it can take a request now."""

from __future__ import annotations

import math
from collections.abc import Callable

import attrs

from citadel_gateway.policy.circuit_breaker import CircuitBreaker, Permit, Transition, Verdict
from citadel_gateway.policy.health_tracker import HealthTracker
from citadel_gateway.policy.latency import PeakEwma


@attrs.define(eq=False)
class Endpoint:
    """A server of one model: its limits, its load, its health, its breaker.

    Those who watch it are told when it may take more than before; that it can take less they see
    when they look.
    """

    model: str
    url: str
    weight: float
    max_concurrent: int
    cost: float | None
    breaker: CircuitBreaker
    health: HealthTracker
    latency: PeakEwma = attrs.field(factory=PeakEwma)
    in_flight: int = 0
    cooling_until: float = -math.inf
    server: str = ""  # what it says it is
    watchers: list[Callable[[Endpoint], None]] = attrs.field(factory=list, init=False, repr=False)

    def probed(self, error: str | None, now: float) -> bool:
        """Learn a probe's result, ``None`` when it was good; true if it became well or ill."""
        flipped = self.health.observe(error, now)
        if flipped:
            self.eased()
        return flipped

    def eased(self) -> None:
        """Tell those who watch that it may be able to take more."""
        for tell in self.watchers:
            tell(self)

    def is_available(self, now: float) -> bool:
        """Healthy, not cooling down, and its breaker would let a request through."""
        return self.health.healthy and now >= self.cooling_until and self.breaker.would_admit(now)

    def has_room(self) -> bool:
        return self.in_flight < self.max_concurrent

    def available_in(self, now: float) -> float:
        """Seconds until it may be available, as far as anybody can tell; 0 if it is."""
        return max(0.0, self.cooling_until - now, self.breaker.retry_after(now))

    def available_at(self, now: float) -> float:
        """The same as a point in time, exactly."""
        rest_ends = self.breaker.opens_again_at()
        if rest_ends is None or rest_ends <= now:
            rest_ends = now + self.breaker.retry_after(now)
        return max(self.cooling_until, rest_ends)

    def cool_down(self, seconds: float, now: float) -> None:
        """It asked to be left alone: pick others until then."""
        self.cooling_until = max(self.cooling_until, now + seconds)


@attrs.define(eq=False)
class Slot:
    """One request's place on an endpoint.  Closing it tells the breaker, once."""

    endpoint: Endpoint
    permit: Permit
    _open: bool = attrs.field(default=True, init=False)

    @classmethod
    def take(cls, endpoint: Endpoint, now: float) -> Slot:
        """The endpoint must be available and have room."""
        permit = endpoint.breaker.admit(now)
        if permit is None:
            raise RuntimeError(f"{endpoint.url} does not admit requests")
        endpoint.in_flight += 1
        return cls(endpoint, permit)

    def close(self, verdict: Verdict, now: float) -> Transition | None:
        if not self._open:
            return None
        self._open = False
        endpoint = self.endpoint
        endpoint.in_flight -= 1
        transition = endpoint.breaker.settle(self.permit, verdict, now)
        for tell in endpoint.watchers:
            tell(endpoint)
        return transition
