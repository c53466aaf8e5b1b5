"""Pickers that go by a key, such as a session's: what has the same key goes to the same endpoint.

Theory of operation.  Affinity is for the sake of what an endpoint still knows of a conversation,
and it must never be a trap.  So a key says where a request would best go, and not where it has to:
an endpoint that is down, resting, cordoned, full or was *tried* is passed over, and so is one that
is *busy*, having more than its part of the requests under way (consistent hashing with bounded
loads: Mirrokni, Thorup and Zadimoghaddam, 2018).  However many requests have the same key, no
endpoint has more than a quarter above the mean, or a few if there is little to do.

``consistent_hash`` remembers nothing.  A key is with the first in its order that takes it.

``session_affinity`` promises more: a session stays where its first request was sent, as long as
that endpoint can be used, and does not go back when a better one returns.  It begins at home, too,
and not with whoever has least to do: then all workers and hosts know where nearly every session is
without asking anybody, and what an even distribution would be worth more, the bound on loads gives
as well.  Only what is elsewhere has to be told to others; see :mod:`.sessions`.  An endpoint that
is merely busy, or full, loses that request and not the session, which has its past there; to be so
busy, it has to have twice the mean.  Of the sessions whose home another one has become, because it
has joined, a request may be sent there that comes to a gateway which has not seen its session, and
before it was told of it: a lookup for every request would be needed to rule that out.

Without a key, a request goes anywhere that is not busy.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Container

import attrs

from citadel_gateway.policy.endpoint import Endpoint
from citadel_gateway.policy.picker import Fits
from citadel_gateway.policy.ring import Ring
from citadel_gateway.policy.sessions import Sessions

_STEPS = 128  # points that are looked at; who is not found by then is one of few
_ENTERS, _STAYS = 1.25, 2.0  # of its part, what an endpoint may have, to be given more
_LITTLE = 4  # requests at once that keep nobody busy: engines work on them together
_SCALE = 1_000_000  # parts become whole numbers, so that what is taken out leaves nothing behind


@attrs.frozen(kw_only=True)
class Affinity:
    """What a picker that goes by keys has to know of its group.

    :param heaviest: the largest weight, of endpoints that are not there yet, too.
    :param salt: makes a session another one in each group: it may have a place in several.
    """

    heaviest: float = 1.0
    salt: int = 0
    sessions: Sessions = attrs.field(factory=Sessions)


@attrs.define(eq=False)
class ConsistentHash:
    """The first that takes it, in the key's own order.

    :param share: an endpoint's part of the keys, as one of what the largest has.
    :param strength: its part of the requests under way, among all others'.
    """

    rng: random.Random
    share: Callable[[Endpoint], float]
    strength: Callable[[Endpoint], float]
    _ring: Ring = attrs.field(factory=Ring, init=False)
    # Of those in line: what they had when last looked at, and their parts.
    _line: dict[Endpoint, int] = attrs.field(factory=dict, init=False)
    _parts: dict[Endpoint, int] = attrs.field(factory=dict, init=False)
    _load: int = attrs.field(default=0, init=False)
    _whole: int = attrs.field(default=0, init=False)

    def join(self, endpoint: Endpoint, _: float = 0.5, /) -> None:
        if endpoint not in self._ring:
            self._ring.add(endpoint, self.share(endpoint))
        self._line[endpoint] = 0
        self._parts[endpoint] = 0
        self.reweigh(endpoint)
        self.eased(endpoint)

    def leave(self, endpoint: Endpoint) -> None:
        if endpoint in self._line:
            self._load -= self._line.pop(endpoint)
            self._whole -= self._parts.pop(endpoint)

    def forget(self, endpoint: Endpoint) -> None:
        self.leave(endpoint)
        self._ring.remove(endpoint)

    def eased(self, endpoint: Endpoint) -> None:
        if endpoint in self._line:
            self._note(endpoint, endpoint.in_flight)

    def reweigh(self, endpoint: Endpoint) -> None:
        """Where keys are at home does not change with how warm it is."""
        if endpoint in self._parts:
            part = round(self.strength(endpoint) * _SCALE) or 1
            self._whole += part - self._parts[endpoint]
            self._parts[endpoint] = part

    def in_order(self) -> list[Endpoint]:
        return [*self._line]

    def pick(self, tried: Container[Endpoint], fits: Fits) -> Endpoint | None:
        return self._nearest(self.rng.getrandbits(64), tried, fits)

    def pick_for(
        self, key: int, tried: Container[Endpoint], fits: Fits, _now: float, /
    ) -> Endpoint | None:
        return self._nearest(key, tried, fits)

    def _nearest(self, key: int, tried: Container[Endpoint], fits: Fits) -> Endpoint | None:
        line = self._line
        if not line:
            return None
        for endpoint in self._ring.walk(key, _STEPS):
            if (
                endpoint in line
                and endpoint not in tried
                and not self._is_busy(endpoint, _ENTERS)
                and fits(endpoint)
            ):
                return self._take(endpoint)
        return self._any(key, tried, fits)

    def _any(self, key: int, tried: Container[Endpoint], fits: Fits) -> Endpoint | None:
        """One of those that are left, as long as there is one, and rather one that is not busy."""

        def order(endpoint: Endpoint) -> tuple[bool, int]:
            return self._is_busy(endpoint, _ENTERS), self._ring.distance(key, endpoint)

        for endpoint in self._line:
            self._note(
                endpoint, endpoint.in_flight
            )  # so that who is busy is known, and not guessed
        left = [endpoint for endpoint in self._line if endpoint not in tried]
        for endpoint in sorted(left, key=order):
            if fits(endpoint):
                return self._take(endpoint)
        return None

    def _is_busy(self, endpoint: Endpoint, most: float) -> bool:
        has = endpoint.in_flight
        if has < _LITTLE * endpoint.warmth:
            return False
        self._note(endpoint, has)
        return has * self._whole >= most * (self._load + 1) * self._parts[endpoint]

    def _take(self, endpoint: Endpoint) -> Endpoint:
        self._note(endpoint, endpoint.in_flight + 1)
        return endpoint

    def _note(self, endpoint: Endpoint, in_flight: int) -> None:
        self._load += in_flight - self._line[endpoint]
        self._line[endpoint] = in_flight


@attrs.define(eq=False)
class SessionAffinity(ConsistentHash):
    """Where the session was before; a new one where its key is at home."""

    sessions: Sessions
    salt: int

    def pick_for(
        self, key: int, tried: Container[Endpoint], fits: Fits, now: float, /
    ) -> Endpoint | None:
        name, sessions, ring = key ^ self.salt, self.sessions, self._ring
        session = sessions.find(name, now)
        place = None if session is None else session.place()
        if session is None or place is None or place not in ring:
            picked = self._nearest(key, tried, fits)
            if picked is not None:
                sessions.begin(name, picked, now, at_home=picked is ring.home(key))
            return picked
        if (
            place in self._line
            and place not in tried
            and not self._is_busy(place, _STAYS)
            and fits(place)
        ):
            if place is not ring.home(key):
                sessions.stay(name, session, now)
            return self._take(place)
        picked = self._nearest(key, tried, fits)
        if picked is not None and (place in tried or not place.is_available(now)):
            sessions.move(name, session, picked, now)
        return picked
