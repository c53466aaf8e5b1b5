"""What is known about one endpoint, and whether it can take a request now."""

from __future__ import annotations

import math
from collections.abc import Callable

import attrs

from citadel_gateway.policy.adaptive import AdaptiveLimit, Sample
from citadel_gateway.policy.circuit_breaker import (
    CircuitBreaker,
    Permit,
    State,
    Transition,
    Verdict,
)
from citadel_gateway.policy.health_tracker import HealthTracker
from citadel_gateway.policy.latency import PeakEwma
from citadel_gateway.policy.slow_start import NO_SLOW_START, SlowStart


def nobody_asks() -> None:
    """What there is to tell of an endpoint that belongs to nobody."""


@attrs.define(eq=False)
class Endpoint:
    """A server of one model: its limits, its load, its health, its breaker.

    Those who watch it are told when it may take more than before; that it can take less they see
    when they look.

    :param limit: requests it may have now: ``max_concurrent``, or less while it is warming up or
        because an :class:`AdaptiveLimit` says so.
    :param share: what this gateway may use of `max_concurrent`, if others use the rest.
    :param warmth: the part of its weight that it gets now; 1 but for a while after it came back.
    :param is_newcomer: it joins others that are at work already, so it starts slowly, too.
    :param is_needed: too few of its pool are healthy, so that it is used although it is not.
    :param is_stood_in_for: others are used because it and its like are down; so whether they are
        well is no sign of anything.
    :param on_standing: told when it has become well, ill, cordoned or not cordoned.
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
    engine: str | None = None  # what it has shown to be, empty if that did not tell
    adaptive: AdaptiveLimit | None = None
    slow_start: SlowStart = NO_SLOW_START
    is_newcomer: bool = False
    share: int | None = None
    cordoned: bool = attrs.field(default=False, init=False)
    is_needed: bool = attrs.field(default=False, init=False)
    is_stood_in_for: bool = attrs.field(default=False, init=False)
    limit: int = attrs.field(init=False)
    warmth: float = attrs.field(default=1.0, init=False)
    watchers: list[Callable[[Endpoint], None]] = attrs.field(factory=list, init=False, repr=False)
    on_standing: Callable[[], None] = attrs.field(default=nobody_asks, init=False, repr=False)
    _back_since: float = attrs.field(default=-math.inf, init=False)

    def __attrs_post_init__(self) -> None:
        self._refit()

    def probed(self, error: str | None, now: float) -> bool:
        """Learn a probe's result, ``None`` when it was good; true if it became well or ill."""
        return self._observed(lambda: self.health.observe(error, now), now)

    def told(self, error: str | None, healthy: bool, now: float) -> bool:
        """The same for what somebody else has found out about it."""
        return self._observed(lambda: self.health.adopt(error, healthy, now), now)

    def _observed(self, observe: Callable[[], bool], now: float) -> bool:
        is_first, was_used = self.health.observed_at is None, self.is_in_service()
        flipped = observe()
        if flipped and not was_used and (self.is_newcomer or not is_first):
            self.start_slowly(now)
        if flipped or is_first:
            self.on_standing()
        if flipped:
            if not self.health.healthy:
                self.engine = None  # it may come back as another one
            self.eased()
        return flipped

    def eased(self) -> None:
        """Tell those who watch that it may be able to take more."""
        for tell in self.watchers:
            tell(self)

    def unwatch(self, watcher: Callable[[Endpoint], None]) -> None:
        """Tell *watcher* no longer; also right in the middle of telling them all."""
        self.watchers = [each for each in self.watchers if each != watcher]

    def is_available(self, now: float) -> bool:
        """In service, not cooling down, and its breaker would let a request through."""
        return (
            (self.health.healthy or self.is_needed)
            and not self.cordoned
            and now >= self.cooling_until
            and self.breaker.would_admit(now)
        )

    def is_in_service(self) -> bool:
        """Whether it is used at all, so that nothing but time keeps it from taking requests."""
        return (self.health.healthy or self.is_needed) and not self.cordoned

    def is_out(self) -> bool:
        """Known to be ill, or out of service by command."""
        return self.cordoned or (self.health.observed_at is not None and not self.health.healthy)

    def resize(self, most: int, floor: int | None, slow_start: SlowStart) -> None:
        """Have other limits: *most* requests at once, and no less than *floor* if it adapts.

        Where it is on its way to its whole share, :meth:`warm_up` tells.
        """
        self.max_concurrent, self.slow_start = most, slow_start
        if floor is None:
            self.adaptive = None
        elif self.adaptive is None:
            self.adaptive = AdaptiveLimit(floor, most)
        else:
            self.adaptive.renew(floor, most)
        self._refit()

    def set_share(self, share: int) -> None:
        """Use so much of what it may have; others use the rest."""
        if share == self.share:
            return
        before, self.share = self.limit, share
        self._refit()
        if self.limit > before:
            self.eased()

    def has_room(self) -> bool:
        return self.in_flight < self.limit

    def cordon(self) -> None:
        """Give it nothing new from now on; what it has, it may finish."""
        if not self.cordoned:
            self.cordoned = True
            self.on_standing()
            self.eased()  # so that those who wait for it see that it is in vain

    def uncordon(self, now: float) -> None:
        if self.cordoned:
            self.cordoned = False
            self.start_slowly(now)
            self.on_standing()
            self.eased()

    def start_slowly(self, now: float) -> None:
        """It is back: its share and its concurrency grow from now on."""
        self._back_since = now
        self.warm_up(now)

    def warm_up(self, now: float) -> None:
        """Give it what it may have by *now*."""
        self.warmth = self.slow_start.share(self._back_since, now)
        self._refit()

    def warmer_at(self) -> float:
        """When it may have more than now, while it is warming up."""
        return self.slow_start.next_step(self.warmth, self._back_since)

    def be_warm(self) -> None:
        """There is nobody else: take all at once."""
        self._back_since = -math.inf
        self.warmth = 1.0
        self._refit()

    def measured(self, sample: Sample, now: float) -> bool:
        """Learn how long an answer took, or that it was too much; true if it may have more now."""
        before = self.limit
        if self.adaptive is not None:
            self.adaptive.learn(sample, now)
            self._refit()
            if self.limit > before:
                self.eased()
        return self.limit > before

    def _refit(self) -> None:
        most = self.max_concurrent if self.adaptive is None else self.adaptive.limit
        if self.share is not None:
            most = min(most, self.share)
        self.limit = most if self.warmth == 1.0 else math.ceil(most * self.warmth)

    def available_in(self, now: float) -> float:
        """Seconds until it may be available, as far as anybody can tell; 0 if it is."""
        return max(0.0, self.cooling_until - now, self.breaker.retry_after(now))

    def available_at(self, now: float) -> float:
        """The same as a point in time, exactly."""
        rest_ends = self.breaker.opens_again_at()
        if rest_ends is None or rest_ends <= now:
            rest_ends = now + self.breaker.retry_after(now)
        return max(self.cooling_until, rest_ends)

    def rest_ends_at(self, now: float) -> float:
        """When time alone lets it take requests again, at the soonest; infinity if it rests not."""
        breaker_ends = self.breaker.opens_again_at()
        ends = math.inf if breaker_ends is None else breaker_ends
        return min(ends, self.cooling_until) if self.cooling_until > now else ends

    def may_take_more_at(self, now: float) -> float:
        """When time alone lets it take more than now: its rest ends, or it gets warmer.

        At the soonest, and after *now*; infinity if time changes nothing.
        """
        ends = self.rest_ends_at(now)
        if self.warmth == 1.0:
            return ends
        share = self.slow_start.share(self._back_since, now)  # nobody may have asked since
        return min(ends, self.slow_start.next_step(share, self._back_since))

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
        if transition is not None and transition.after is State.CLOSED:
            endpoint.start_slowly(now)
        for tell in endpoint.watchers:
            tell(endpoint)
        return transition
