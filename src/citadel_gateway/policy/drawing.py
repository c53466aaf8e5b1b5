"""Pickers that leave it to chance."""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Callable, Container
from itertools import accumulate

import attrs

from citadel_gateway.policy.endpoint import Endpoint
from citadel_gateway.policy.picker import Fits, Score

_DRAWS = 8  # misses after which it is cheaper to look at who is there


@attrs.define(eq=False)
class _Drawing:
    """Draws by chance among all, until somebody in line is drawn."""

    rng: random.Random
    weigh: Callable[[Endpoint], float] | None
    _everybody: list[Endpoint] = attrs.field(factory=list, init=False)
    _known: set[Endpoint] = attrs.field(factory=set, init=False)
    _ready: dict[Endpoint, None] = attrs.field(factory=dict, init=False)
    _sums: list[float] = attrs.field(factory=list, init=False)

    def join(self, endpoint: Endpoint, _: float = 0.5, /) -> None:
        self._ready[endpoint] = None
        if endpoint not in self._known:
            self._known.add(endpoint)
            self._everybody.append(endpoint)
            self._sums = []

    def leave(self, endpoint: Endpoint) -> None:
        self._ready.pop(endpoint, None)

    def forget(self, endpoint: Endpoint) -> None:
        self.leave(endpoint)
        if endpoint in self._known:
            self._known.remove(endpoint)
            self._everybody.remove(endpoint)
            self._sums = []

    def eased(self, endpoint: Endpoint) -> None:
        """Chance does not look at load."""

    def draw(self, tried: Container[Endpoint], fits: Fits) -> Endpoint | None:
        everybody, ready = self._everybody, self._ready
        if 2 * len(ready) >= len(everybody):
            for _ in range(_DRAWS):
                endpoint = everybody[self._place()]
                if endpoint in ready and endpoint not in tried and fits(endpoint):
                    return endpoint
        fitting = [e for e in list(ready) if e not in tried and fits(e)]
        if not fitting:
            return None
        weights = [self.weigh(e) for e in fitting] if self.weigh else None
        return self.rng.choices(fitting, weights)[0]

    def _place(self) -> int:
        if self.weigh is None:
            return int(self.rng.random() * len(self._everybody))
        if not self._sums:
            self._sums = list(accumulate(map(self.weigh, self._everybody)))
        sums = self._sums
        return bisect(sums, self.rng.random() * sums[-1], 0, len(sums) - 1)


@attrs.define(eq=False)
class WeightedRandom(_Drawing):
    """Chance in proportion to the weights."""

    def pick(self, tried: Container[Endpoint], fits: Fits) -> Endpoint | None:
        return self.draw(tried, fits)


@attrs.define(eq=False)
class PowerOfTwo(_Drawing):
    """The less loaded of two picked at random.

    Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001: nearly as even
    as asking everybody, and no herd runs to whoever was idle a moment ago.
    """

    load: Callable[[Endpoint], Score]

    def pick(self, tried: Container[Endpoint], fits: Fits) -> Endpoint | None:
        first = self.draw(tried, fits)
        if first is None:
            return None
        second = self.draw(_Both(tried, first), fits)
        return first if second is None or self.load(first) <= self.load(second) else second


@attrs.frozen
class _Both:
    tried: Container[Endpoint]
    first: Endpoint

    def __contains__(self, endpoint: object) -> bool:
        return endpoint is self.first or endpoint in self.tried
