"""Who of a group is in line for requests, and who stands aside.

Theory of operation.  An endpoint is *in line* until somebody looks at it and finds that it cannot
take a request.  Then it stands aside: as *full* if it only has no room, else as *away*.  It comes
back when it says that it may be able to take more (a request ended, a probe went well), or when
the time has come at which a rest or a cool-down ends.  Whoever is in line is looked at before it
is given anything, so being there promises nothing, and the fact is never kept twice.

An endpoint that is warming up may have more with every step that time makes; it is looked at when
one is due, and not before.

So a choice costs what it costs to look at the few that come first, however many there are, also
when nearly all of them are down or full.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from heapq import heapify, heappop, heappush
from typing import TypeAlias

import attrs

from citadel_gateway.policy.endpoint import Endpoint
from citadel_gateway.policy.picker import KeyedPicker, Picker

_Entry: TypeAlias = tuple[float, int, Endpoint]  # when, and in which order at the same time


@attrs.define(eq=False)
class Roster:
    """The endpoints of a group, and the picker that orders them."""

    picker: Picker
    _keyed: KeyedPicker | None = attrs.field(default=None, init=False)  # the same, if it is one
    _ready: dict[Endpoint, None] = attrs.field(factory=dict, init=False)
    _full: dict[Endpoint, None] = attrs.field(factory=dict, init=False)
    _away: dict[Endpoint, None] = attrs.field(factory=dict, init=False)
    _returns: list[_Entry] = attrs.field(factory=list, init=False)
    _steps: list[_Entry] = attrs.field(factory=list, init=False)
    _warming: dict[Endpoint, None] = attrs.field(factory=dict, init=False)
    _serial: int = attrs.field(default=0, init=False)
    _now: float = attrs.field(default=0.0, init=False)

    def __attrs_post_init__(self) -> None:
        self._order_by(self.picker)

    def _order_by(self, picker: Picker) -> None:
        self.picker, self._keyed = picker, picker if isinstance(picker, KeyedPicker) else None

    def add(self, endpoints: Iterable[Endpoint]) -> None:
        """Take them in; they get their first turns in the order given."""
        joining = list(endpoints)
        for i, endpoint in enumerate(joining):
            self._ready[endpoint] = None
            self.picker.join(endpoint, i / len(joining))
            endpoint.watchers.append(self.eased)
            if endpoint.warmth < 1.0:
                self.eased(endpoint)

    def __contains__(self, endpoint: Endpoint) -> bool:
        return endpoint in self._ready or endpoint in self._full or endpoint in self._away

    def reorder(self, picker: Picker) -> None:
        """Let *picker* order them from now on, those first who would have come first before."""
        line = [endpoint for endpoint in self.picker.in_order() if endpoint in self._ready]
        self._order_by(picker)
        for i, endpoint in enumerate(line):
            picker.join(endpoint, i / len(line))
        self._steps.clear()  # they may be due at other times, too
        for endpoint in self._warming:
            self._weigh_anew(endpoint)

    def reweigh(self, endpoint: Endpoint) -> None:
        """Its weight is another than before."""
        self.picker.reweigh(endpoint)

    def remove(self, endpoint: Endpoint) -> None:
        """Give it nothing any more."""
        for place in (self._ready, self._full, self._away):
            place.pop(endpoint, None)
        self._warming.pop(endpoint, None)
        self._returns = _without(endpoint, self._returns)
        self._steps = _without(endpoint, self._steps)
        self.picker.forget(endpoint)
        endpoint.unwatch(self.eased)

    def choose(
        self, tried: Container[Endpoint], now: float, key: int | None = None
    ) -> Endpoint | None:
        """One that was not *tried*, is available and has room; the right one for *key*."""
        self._now = now
        if self._returns and self._returns[0][0] <= now:
            self._return(now)
        if self._steps and self._steps[0][0] <= now:
            self._step(now)
        if key is not None and self._keyed is not None:
            return self._keyed.pick_for(key, tried, self._fits, now)
        return self.picker.pick(tried, self._fits)

    def hurry(self, now: float) -> bool:
        """Let those that are warming up take all they can, if no other is left to wait for.

        Returns whether that makes room.
        """
        if not self._warming or any(
            endpoint not in self._warming and endpoint.is_available(now)
            for place in (self._ready, self._full)
            for endpoint in place
        ):
            return False
        for endpoint in list(self._warming):
            endpoint.be_warm()
            endpoint.eased()
        return True

    def is_any_left(self, tried: Container[Endpoint], now: float) -> bool:
        """Whether one that was not *tried* is available, with room or without."""
        if self._returns and self._returns[0][0] <= now:
            self._return(now)
        return self._is_any(self._ready, tried, now) or self._is_any(self._full, tried, now)

    def has_room(self, tried: Container[Endpoint], now: float) -> bool:
        """Whether one that was not *tried* is available and has room, as of the last look."""
        return any(e not in tried and e.has_room() and e.is_available(now) for e in self._ready)

    def is_any_full(self, tried: Container[Endpoint], now: float) -> bool:
        """Whether one that was not *tried* is available but for room, as of the last choice."""
        return self._is_any(self._full, tried, now)

    def next_chance(self, now: float, next_probe: float) -> float:
        """Seconds until one may be available again, as far as can be known.

        :param next_probe: when one that is down may be known to be up again.
        """

        def chance(endpoint: Endpoint) -> float:
            unknown = 0.0 if endpoint.is_in_service() else next_probe
            return max(endpoint.available_in(now), unknown)

        soonest = min(map(chance, (*self._ready, *self._full)), default=math.inf)
        returns = self._returns
        while returns and not (returns[0][2] in self._away and returns[0][2].is_in_service()):
            heappop(returns)
        if returns:
            soonest = min(soonest, max(0.0, returns[0][0] - now))
        for endpoint in self._away:
            if soonest <= next_probe:
                break  # no other can be sooner: those in service are among the returns
            soonest = min(soonest, chance(endpoint))
        return soonest if soonest < math.inf else next_probe

    def eased(self, endpoint: Endpoint) -> None:
        """It may be able to take more than it could."""
        if endpoint.warmth < 1.0:
            if endpoint not in self._warming:
                self._warming[endpoint] = None
                self._weigh_anew(endpoint)
        elif self._warming and endpoint in self._warming:
            del self._warming[endpoint]
            self.picker.reweigh(endpoint)
        if endpoint in self._ready:
            self.picker.eased(endpoint)
        elif endpoint in self._full or endpoint in self._away:
            self._full.pop(endpoint, None)
            self._away.pop(endpoint, None)
            self._ready[endpoint] = None
            self.picker.join(endpoint)

    def _fits(self, endpoint: Endpoint) -> bool:
        if not endpoint.is_available(self._now):
            self._ready.pop(endpoint, None)
            self._send_away(endpoint, self._now)
        elif endpoint.in_flight >= endpoint.limit:
            self._ready.pop(endpoint, None)
            self._full[endpoint] = None
        else:
            return True
        self.picker.leave(endpoint)
        return False

    def _is_any(self, place: dict[Endpoint, None], tried: Container[Endpoint], now: float) -> bool:
        gone: list[Endpoint] = []
        found = False
        for endpoint in place:
            if endpoint in tried:
                continue
            if endpoint.is_available(now):
                found = True
                break
            gone.append(endpoint)
        for endpoint in gone:
            del place[endpoint]
            self.picker.leave(endpoint)
            self._send_away(endpoint, now)
        return found

    def _send_away(self, endpoint: Endpoint, now: float) -> None:
        self._away[endpoint] = None
        if endpoint.is_in_service():  # else a probe or an operator will tell
            self._serial += 1
            heappush(self._returns, (endpoint.available_at(now), self._serial, endpoint))

    def _return(self, now: float) -> None:
        while self._returns and self._returns[0][0] <= now:
            endpoint = heappop(self._returns)[2]
            if endpoint in self._away:
                self.eased(endpoint)

    def _step(self, now: float) -> None:
        """Those whose time it is get more."""
        while self._steps and self._steps[0][0] <= now:
            endpoint = heappop(self._steps)[2]
            if endpoint in self._warming:
                endpoint.warm_up(now)
                self.eased(endpoint)
                if endpoint in self._warming:
                    self._weigh_anew(endpoint)

    def _weigh_anew(self, endpoint: Endpoint) -> None:
        self.picker.reweigh(endpoint)
        self._serial += 1
        heappush(self._steps, (endpoint.warmer_at(), self._serial, endpoint))


def _without(endpoint: Endpoint, heap: list[_Entry]) -> list[_Entry]:
    left = [entry for entry in heap if entry[2] is not endpoint]
    heapify(left)
    return left
