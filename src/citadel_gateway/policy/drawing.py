"""Pickers that leave it to chance."""

from __future__ import annotations

import random
from collections.abc import Callable, Container

import attrs

from citadel_gateway.policy.endpoint import Endpoint
from citadel_gateway.policy.picker import Fits, Score

_SCALE = 1_000_000  # weights become whole numbers, so that what is taken out leaves nothing behind


@attrs.define(eq=False)
class Urn:
    """Draws endpoints with a chance in proportion to their weights.

    A binary indexed tree (Fenwick, 1994) of the weights: to draw, to put in and to take out each
    take as many steps as the number of endpoints has binary digits.
    """

    rng: random.Random
    weigh: Callable[[Endpoint], float]
    _total: int = attrs.field(default=0, init=False)
    _inside: dict[Endpoint, int] = attrs.field(factory=dict, init=False)  # and their weights
    _places: dict[Endpoint, int] = attrs.field(factory=dict, init=False)
    _tree: list[int] = attrs.field(factory=lambda: [0], init=False)
    _owners: list[Endpoint | None] = attrs.field(factory=lambda: [None], init=False)
    _vacant: list[int] = attrs.field(factory=list, init=False)

    def put(self, endpoint: Endpoint) -> None:
        if endpoint not in self._inside:
            weight = self._inside[endpoint] = round(self.weigh(endpoint) * _SCALE) or 1
            self._change(self._place_of(endpoint), weight)

    def take(self, endpoint: Endpoint) -> None:
        weight = self._inside.pop(endpoint, 0)
        if weight:
            self._change(self._places[endpoint], -weight)

    def reweigh(self, endpoint: Endpoint) -> None:
        if endpoint in self._inside:
            self.take(endpoint)
            self.put(endpoint)

    def forget(self, endpoint: Endpoint) -> None:
        self.take(endpoint)
        place = self._places.pop(endpoint, 0)
        if place:
            self._owners[place] = None
            self._vacant.append(place)

    def inside(self) -> list[Endpoint]:
        return [*self._inside]

    def draw(self) -> Endpoint | None:
        """One of those inside; it stays there."""
        if not self._total:
            return None
        point, place, tree = int(self.rng.random() * self._total), 0, self._tree
        step = 1 << (len(tree) - 1).bit_length() - 1
        while step:
            beyond = place + step
            if beyond < len(tree) and tree[beyond] <= point:
                place = beyond
                point -= tree[beyond]
            step >>= 1
        return self._owners[place + 1]

    def _place_of(self, endpoint: Endpoint) -> int:
        place = self._places.get(endpoint)
        if place is None:
            place = self._vacant.pop() if self._vacant else self._append()
            self._places[endpoint] = place
            self._owners[place] = endpoint
        return place

    def _append(self) -> int:
        place = len(self._tree)
        total, below = 0, place - 1
        while below > place - (place & -place):
            total += self._tree[below]
            below -= below & -below
        self._tree.append(total)
        self._owners.append(None)
        return place

    def _change(self, place: int, by: int) -> None:
        self._total += by
        while place < len(self._tree):
            self._tree[place] += by
            place += place & -place


@attrs.define(eq=False)
class WeightedRandom:
    """Chance in proportion to the weights."""

    urn: Urn

    def join(self, endpoint: Endpoint, _: float = 0.5, /) -> None:
        self.urn.put(endpoint)

    def leave(self, endpoint: Endpoint) -> None:
        self.urn.take(endpoint)

    def forget(self, endpoint: Endpoint) -> None:
        self.urn.forget(endpoint)

    def eased(self, endpoint: Endpoint) -> None:
        """Chance does not look at load."""

    def reweigh(self, endpoint: Endpoint) -> None:
        self.urn.reweigh(endpoint)

    def in_order(self) -> list[Endpoint]:
        return self.urn.inside()

    def pick(self, tried: Container[Endpoint], fits: Fits) -> Endpoint | None:
        aside: list[Endpoint] = []
        picked = self._draw(tried, fits, aside)
        for endpoint in aside:
            self.urn.put(endpoint)
        return picked

    def _draw(
        self, tried: Container[Endpoint], fits: Fits, aside: list[Endpoint]
    ) -> Endpoint | None:
        """The first that fits; those that were *tried* are taken out on the way."""
        while (endpoint := self.urn.draw()) is not None:
            if endpoint in tried:
                self.urn.take(endpoint)
                aside.append(endpoint)
            elif fits(endpoint):
                return endpoint
        return None


@attrs.define(eq=False)
class PowerOfTwo(WeightedRandom):
    """The less loaded of two picked at random.

    Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001: nearly as even
    as asking everybody, and no herd runs to whoever was idle a moment ago.
    """

    load: Callable[[Endpoint], Score]

    def pick(self, tried: Container[Endpoint], fits: Fits) -> Endpoint | None:
        aside: list[Endpoint] = []
        first = second = self._draw(tried, fits, aside)
        if first is not None:
            self.urn.take(first)
            aside.append(first)
            second = self._draw(tried, fits, aside)
        for endpoint in aside:
            self.urn.put(endpoint)
        if first is None or second is None:
            return first
        return min(first, second, key=self.load)
