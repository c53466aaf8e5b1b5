"""Which of the endpoints that could take a request gets it."""

from __future__ import annotations

import random
from collections.abc import Callable, Container, Iterable
from heapq import heapify, heappop, heappush, heapreplace
from typing import TypeAlias

import attrs

from citadel_gateway.policy.affinity import Affinity, ConsistentHash, SessionAffinity
from citadel_gateway.policy.drawing import PowerOfTwo, Urn, WeightedRandom
from citadel_gateway.policy.endpoint import Endpoint
from citadel_gateway.policy.picker import Fits, Picker, Score

Share: TypeAlias = Callable[[Endpoint], float]
"""A factor on the weight, from cost optimisation."""

_SCALE = 10**12  # turns are whole numbers of this part of one: floats would drift


@attrs.define(eq=False)
class RoundRobin:
    """Turns in proportion to the weights, spread evenly.

    Stride scheduling (Waldspurger and Weihl, 1995): a turn is due every ``1 / weight``, and the
    one that is due first is next.  First turns are spread over the middle of a round, so that
    equals do not come in a bunch; over every whole round the shares are exact.
    """

    weigh: Callable[[Endpoint], float]
    _clock: int = attrs.field(default=0, init=False)
    _serial: int = attrs.field(default=0, init=False)
    _strides: dict[Endpoint, int] = attrs.field(factory=dict, init=False)
    _turns: dict[Endpoint, tuple[int, int, Endpoint]] = attrs.field(factory=dict, init=False)
    _line: list[tuple[int, int, Endpoint]] = attrs.field(factory=list, init=False)
    _left: dict[Endpoint, int] = attrs.field(factory=dict, init=False)  # when they were due

    def join(self, endpoint: Endpoint, place: float = 0.5, /) -> None:
        stride = self._strides.get(endpoint)
        if stride is None:
            stride = self._strides[endpoint] = round(_SCALE / self.weigh(endpoint)) or 1
            due = self._clock + round(stride * (1 + place) / 3)
        else:
            due = max(self._clock, self._left.pop(endpoint, 0))  # missed turns are lost
        self._stand(endpoint, due)

    def leave(self, endpoint: Endpoint) -> None:
        if turn := self._turns.pop(endpoint, None):
            self._left[endpoint] = turn[0]

    def forget(self, endpoint: Endpoint) -> None:
        self.leave(endpoint)
        self._left.pop(endpoint, None)
        self._strides.pop(endpoint, None)

    def eased(self, endpoint: Endpoint) -> None:
        """Whose turn it is has nothing to do with load."""

    def reweigh(self, endpoint: Endpoint) -> None:
        if endpoint not in self._strides:
            return
        stride = self._strides[endpoint] = round(_SCALE / self.weigh(endpoint)) or 1
        soonest = self._clock + stride  # it need not wait for the end of a longer one
        if endpoint in self._left:
            self._left[endpoint] = min(self._left[endpoint], soonest)
        elif self._turns[endpoint][0] > soonest:
            self._stand(endpoint, soonest)

    def in_order(self) -> list[Endpoint]:
        return [endpoint for _, _, endpoint in sorted(self._turns.values())]

    def pick(self, tried: Container[Endpoint], fits: Fits) -> Endpoint | None:
        line, turns, aside, picked = self._line, self._turns, [], None
        while line:
            turn = line[0]
            endpoint = turn[2]
            if turns.get(endpoint) is not turn:
                heappop(line)  # of somebody who has left since
            elif endpoint in tried:
                aside.append(heappop(line))
            elif fits(endpoint):
                self._clock = max(self._clock, turn[0])
                self._serial += 1
                following = (turn[0] + self._strides[endpoint], self._serial, endpoint)
                turns[endpoint] = following
                heapreplace(line, following)
                picked = endpoint
                break
        for turn in aside:
            heappush(line, turn)
        return picked

    def _stand(self, endpoint: Endpoint, due: int) -> None:
        self._serial += 1
        turn = self._turns[endpoint] = (due, self._serial, endpoint)
        heappush(self._line, turn)


_Entry: TypeAlias = tuple[Score, int, int, Endpoint]


@attrs.define(eq=False)
class Least:
    """The lowest score; among equals, the one that has waited longest for its turn."""

    score: Callable[[Endpoint], Score]
    _turn: dict[Endpoint, int] = attrs.field(factory=dict, init=False)
    _turns: int = attrs.field(default=0, init=False)
    _joined: int = attrs.field(default=0, init=False)
    _entries: dict[Endpoint, _Entry] = attrs.field(factory=dict, init=False)
    _line: list[_Entry] = attrs.field(factory=list, init=False)  # old entries of some, too

    def join(self, endpoint: Endpoint, _: float = 0.5, /) -> None:
        self._enter(endpoint, self.score(endpoint))

    def leave(self, endpoint: Endpoint) -> None:
        self._entries.pop(endpoint, None)

    def forget(self, endpoint: Endpoint) -> None:
        self.leave(endpoint)
        self._turn.pop(endpoint, None)

    def eased(self, endpoint: Endpoint) -> None:
        entry = self._entries.get(endpoint)
        if entry is not None and (score := self.score(endpoint)) < entry[0]:
            self._enter(endpoint, score)

    def reweigh(self, endpoint: Endpoint) -> None:
        """A lower weight is noticed when its turn comes, and of a higher one it is told."""

    def in_order(self) -> list[Endpoint]:
        return [entry[3] for entry in sorted(self._entries.values())]

    def pick(self, tried: Container[Endpoint], fits: Fits) -> Endpoint | None:
        line, entries, aside, picked = self._line, self._entries, [], None
        while line:
            entry = line[0]
            before, _, joined, endpoint = entry
            if entries.get(endpoint) is not entry:
                heappop(line)
            elif (score := self.score(endpoint)) > before:  # busier than when it was written down
                entries[endpoint] = entry = (score, entry[1], joined, endpoint)
                heapreplace(line, entry)
            elif endpoint in tried:
                aside.append(heappop(line))
            elif fits(endpoint):
                self._turns += 1
                self._turn[endpoint] = self._turns
                entries[endpoint] = entry = (score, self._turns, joined, endpoint)
                heapreplace(line, entry)
                picked = endpoint
                break
        for entry in aside:
            heappush(line, entry)
        return picked

    def _enter(self, endpoint: Endpoint, score: Score) -> None:
        self._joined += 1
        entry = (score, self._turn.get(endpoint, 0), self._joined, endpoint)
        self._entries[endpoint] = entry
        if len(self._line) > 2 * len(self._entries) + 64:
            self._line[:] = self._entries.values()
            heapify(self._line)
        else:
            heappush(self._line, entry)


def make_picker(
    algorithm: str,
    rng: random.Random,
    share: Share | None = None,
    affinity: Affinity | None = None,
) -> Picker:
    """A fresh picker for one group of endpoints; *algorithm* as named in the configuration."""
    share, affinity = share or evenly, affinity or Affinity()

    def turns(endpoint: Endpoint) -> float:
        return endpoint.warmth * share(endpoint)

    def weigh(endpoint: Endpoint) -> float:
        return endpoint.weight * endpoint.warmth * share(endpoint)

    def home(endpoint: Endpoint) -> float:
        return endpoint.weight * share(endpoint) / affinity.heaviest

    def load(endpoint: Endpoint) -> Score:
        weight = endpoint.weight * endpoint.warmth * share(endpoint)
        return ((endpoint.in_flight + 1) / weight,)

    def expected_latency(endpoint: Endpoint) -> Score:
        """An unknown endpoint is tried first, but by one request, not by all until it answers."""
        (busy,) = load(endpoint)
        latency = endpoint.latency.value
        is_being_tried = latency == 0 and endpoint.in_flight > 0
        return (is_being_tried, latency * busy, busy)

    match algorithm:
        case "round_robin":
            return RoundRobin(turns)
        case "weighted_round_robin":
            return RoundRobin(weigh)
        case "random":
            return WeightedRandom(Urn(rng, weigh))
        case "least_connections":
            return Least(load)
        case "power_of_two":
            return PowerOfTwo(Urn(rng, evenly), load)
        case "least_latency":
            return Least(expected_latency)
        case "cost":
            return Least(lambda e: (e.cost or 0.0, *load(e)))
        case "consistent_hash":
            return ConsistentHash(rng, home, weigh)
        case "session_affinity":
            return SessionAffinity(rng, home, weigh, affinity.sessions, affinity.salt)
    raise ValueError(f"unknown algorithm {algorithm!r}")


def evenly(_: Endpoint, /) -> float:
    """No endpoint has a larger share than its weight says."""
    return 1.0


def share_by_cost(prices: Iterable[float | None]) -> Share:
    """How much of the load an endpoint should get for its price, among others with *prices*.

    The square root of the price ratio: an endpoint at a hundredth of the price gets ten times the
    share, so cheap ones are preferred and dear ones still see traffic.
    """
    cheapest = min(filter(None, prices), default=None)
    if cheapest is None:
        return evenly
    return lambda e: (cheapest / e.cost) ** 0.5 if e.cost else 1.0
