"""Which of the endpoints that could take a request gets it.

A picker is handed the endpoints that are available and have room, and returns one.  Pickers with
a memory (whose turn is it?) keep it themselves, so every group of endpoints has its own picker.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeAlias

import attrs

from citadel_gateway.policy.endpoint import Endpoint

Shares: TypeAlias = Mapping[Endpoint, float]
"""Factors on the weights, from cost optimisation; absent endpoints have 1."""

_SCALE = 1_000_000  # weights become integers: turns come out exact, floats would drift


class Picker(Protocol):
    def pick(self, candidates: Sequence[Endpoint], shares: Shares) -> Endpoint:
        """One of *candidates*, which is not empty."""
        ...


@attrs.define(eq=False)
class RoundRobin:
    """Turns in proportion to the weights, spread evenly.

    The smooth weighted round robin that nginx uses: everybody's credit grows by its weight, the
    richest is picked and pays the sum of all weights.
    """

    weigh: Callable[[Endpoint], float]
    _credit: dict[Endpoint, int] = attrs.field(factory=dict, init=False)

    def pick(self, candidates: Sequence[Endpoint], shares: Shares) -> Endpoint:
        total, best, best_credit = 0, candidates[0], None
        for endpoint in candidates:
            weight = round(self.weigh(endpoint) * shares.get(endpoint, 1.0) * _SCALE) or 1
            total += weight
            credit = self._credit[endpoint] = self._credit.get(endpoint, 0) + weight
            if best_credit is None or credit > best_credit:
                best, best_credit = endpoint, credit
        self._credit[best] -= total
        return best


@attrs.define(eq=False)
class WeightedRandom:
    """Chance in proportion to the weights."""

    rng: random.Random

    def pick(self, candidates: Sequence[Endpoint], shares: Shares) -> Endpoint:
        weights = [e.weight * shares.get(e, 1.0) for e in candidates]
        return self.rng.choices(candidates, weights)[0]


@attrs.define(eq=False)
class Least:
    """The lowest score; among equals, the one that has waited longest for its turn."""

    score: Callable[[Endpoint, float], tuple[float, ...]]
    _turn: dict[Endpoint, int] = attrs.field(factory=dict, init=False)
    _turns: int = attrs.field(default=0, init=False)

    def pick(self, candidates: Sequence[Endpoint], shares: Shares) -> Endpoint:
        best = min(
            candidates,
            key=lambda e: (self.score(e, shares.get(e, 1.0)), self._turn.get(e, 0)),
        )
        self._turns += 1
        self._turn[best] = self._turns
        return best


@attrs.define(eq=False)
class PowerOfTwo:
    """The less loaded of two picked at random.

    Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001: nearly as even
    as asking everybody, and no herd runs to whoever was idle a moment ago.
    """

    rng: random.Random

    def pick(self, candidates: Sequence[Endpoint], shares: Shares) -> Endpoint:
        pair = self.rng.sample(candidates, min(2, len(candidates)))
        return min(pair, key=lambda e: _load(e, shares.get(e, 1.0)))


def make_picker(algorithm: str, rng: random.Random) -> Picker:
    """A fresh picker for one group of endpoints; *algorithm* as named in the configuration."""
    match algorithm:
        case "round_robin":
            return RoundRobin(lambda _: 1.0)
        case "weighted_round_robin":
            return RoundRobin(lambda e: e.weight)
        case "random":
            return WeightedRandom(rng)
        case "least_connections":
            return Least(_load)
        case "power_of_two":
            return PowerOfTwo(rng)
        case "least_latency":
            return Least(_expected_latency)
        case "cost":
            return Least(lambda e, share: (e.cost or 0.0, *_load(e, share)))
    raise ValueError(f"unknown algorithm {algorithm!r}")


def cost_shares(endpoints: Sequence[Endpoint]) -> dict[Endpoint, float]:
    """How much of the load each endpoint should get for its price.

    The square root of the price ratio: an endpoint at a hundredth of the price gets ten times the
    share, so cheap ones are preferred and dear ones still see traffic.
    """
    prices = [e.cost for e in endpoints if e.cost]
    if not prices:
        return {}
    cheapest = min(prices)
    return {e: (cheapest / e.cost) ** 0.5 if e.cost else 1.0 for e in endpoints}


def _expected_latency(endpoint: Endpoint, share: float) -> tuple[float, ...]:
    """An unknown endpoint is tried first, but by one request, not by all until it has answered."""
    (load,) = _load(endpoint, share)
    latency = endpoint.latency.value
    is_being_tried = latency == 0 and endpoint.in_flight > 0
    return (is_being_tried, latency * load, load)


def _load(endpoint: Endpoint, share: float) -> tuple[float, ...]:
    return ((endpoint.in_flight + 1) / (endpoint.weight * share),)
