"""Where keys are at home: a ring on which every endpoint has its points.

Consistent hashing (Karger et al., 1997).  A key belongs to the endpoint whose point is the next one
on the ring, and if that endpoint cannot be used, to the one after it, and so on: every key has an
order of its own.  The points come from the names of the endpoints and from nothing else, so all who
know the same endpoints agree without a word; when one comes or goes, only its part of the keys has
another home than before.
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect
from collections.abc import Iterator
from hashlib import shake_128

import attrs

from citadel_gateway.policy.endpoint import Endpoint

_SPOTS = 128  # points of an endpoint with a whole share; one sigma of its part is a tenth of it
_NUMBER = (1 << 20) - 1  # the bits of a point that say whose it is
_MIX = 0x9E3779B97F4A7C15
_64_BITS = (1 << 64) - 1


@attrs.define(eq=False)
class Ring:
    """Points of 64 bits, as keys are; their lowest bits are the number of the endpoint."""

    _points: array[int] = attrs.field(factory=lambda: array("Q"), init=False)
    _members: list[Endpoint | None] = attrs.field(factory=list, init=False)  # by number
    _numbers: dict[Endpoint, int] = attrs.field(factory=dict, init=False)
    _marks: dict[Endpoint, int] = attrs.field(factory=dict, init=False)
    _vacant: list[int] = attrs.field(factory=list, init=False)
    # What is not on the ring yet, and whose points are still there: many may come at once.
    _coming: list[int] = attrs.field(factory=list, init=False)
    _going: set[int] = attrs.field(factory=set, init=False)

    def __contains__(self, endpoint: Endpoint) -> bool:
        return endpoint in self._numbers

    def add(self, endpoint: Endpoint, share: float) -> None:
        """:param share: of what the largest may have, from 0 to 1."""
        if self._vacant:
            number = self._vacant.pop()
            self._members[number] = endpoint
        else:
            number = len(self._members)
            self._members.append(endpoint)
        self._numbers[endpoint] = number
        count = max(1, round(_SPOTS * min(1.0, share)))
        digest = shake_128(f"{endpoint.model} {endpoint.url}".encode()).digest(8 * count)
        spots = struct.unpack(f"<{count}Q", digest)
        self._marks[endpoint] = spots[0]
        self._coming += [(spot & ~_NUMBER) | number for spot in spots]

    def remove(self, endpoint: Endpoint) -> None:
        if (number := self._numbers.pop(endpoint, None)) is not None:
            del self._marks[endpoint]
            self._members[number] = None
            self._going.add(number)

    def home(self, key: int) -> Endpoint:
        """Whose *key* is while everybody is well; there must be somebody."""
        return next(self.walk(key, 1))

    def walk(self, key: int, steps: int) -> Iterator[Endpoint]:
        """The owners of the next *steps* points from *key* on, however often one comes."""
        if self._coming or self._going:
            self._settle()
        points, members = self._points, self._members
        at, count = bisect(points, key), len(points)
        for place in range(at, at + min(steps, count)):
            endpoint = members[points[place % count] & _NUMBER]
            if endpoint is not None:
                yield endpoint

    def distance(self, key: int, endpoint: Endpoint) -> int:
        """Another order of the endpoints that every key has: the lowest comes first.

        For a few of many, whose points are too far apart to be looked for: the highest random
        weight (Thaler and Ravishankar, 1998), and so as consistent as the ring is.
        """
        return (self._marks[endpoint] ^ key) * _MIX & _64_BITS

    def _settle(self) -> None:
        going = self._going
        kept = [p for p in self._points if p & _NUMBER not in going] if going else [*self._points]
        kept += [p for p in self._coming if p & _NUMBER not in going]
        self._vacant += going
        kept.sort()
        self._points = array("Q", kept)
        self._coming, self._going = [], set()
