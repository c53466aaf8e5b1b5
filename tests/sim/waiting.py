"""Whether anybody waits beside an endpoint that could take the request.

Between two instants of virtual time nothing runs: whoever waits then, though there is room, has not
been called, and it does not show from outside by what.  So this one looks into the waitroom, each
time that the gateway has done all it can do for now.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

import attrs
import trio

from citadel_gateway.app.group import Group
from citadel_gateway.app.service import UnifiedAPIGatewayService
from citadel_gateway.policy.endpoint import Endpoint

AT_ONCE = 1e-6  # seconds within which whoever waits is called when there is room


@attrs.define(eq=False)
class WaitWatch(trio.abc.Instrument):
    """Notes in *complaints* who waited too long beside which endpoint."""

    service: UnifiedAPIGatewayService
    complaints: list[str] = attrs.field(factory=list)
    _now: float = attrs.field(default=-math.inf, init=False)
    _asleep: int = attrs.field(default=0, init=False)
    _open: dict[Hashable, tuple[float, Endpoint]] = attrs.field(factory=dict, init=False)

    def after_io_wait(self, timeout: float) -> None:
        """Time may pass now, if nothing more is to be done."""
        waitroom, calls = self.service.admission.waitroom, self.service.admission._calls
        self._asleep = sum(t.outcome is not None and not e.is_set() for t, e in calls.items())
        if not (waitroom._lines or self._open or self._asleep):
            return
        self._now = now = trio.current_time()
        before, self._open = self._open, {}
        if waitroom.taken >= waitroom.seats:
            return
        for key in waitroom._lines:
            if (chance := _chance(key, now)) is not None:
                at, endpoint = chance
                since, same = before.get(key, chance)
                is_old = same is endpoint and at <= now  # else there was room, and it is taken
                self._open[key] = (min(since, at) if is_old else at, endpoint)

    def before_io_wait(self, timeout: float) -> None:
        """If time has passed, nothing was done meanwhile."""
        if not (self._open or self._asleep):
            return
        now = trio.current_time()
        if now == self._now:
            return
        if self._asleep:
            self.complaints.append(f"{self._asleep} have their places at {now:g}, and sleep on")
        for since, endpoint in self._open.values():
            if now - since > AT_ONCE:
                self.complaints.append(
                    f"somebody waits at {self._now:g}, and is not told until {now:g} that "
                    f"{endpoint.url} has had room since {since:g}"
                )
        self._open.clear()


def _chance(key: Hashable, now: float) -> tuple[float, Endpoint] | None:
    """When a request of the group *key* can be taken, if nothing happens before, and by whom."""
    group, others = key if isinstance(key, tuple) else (key, frozenset())
    if not (isinstance(group, Group) and isinstance(others, frozenset)):
        return None  # it has to finish where it was
    found = [
        (at, endpoint)
        for endpoint in group.upstreams
        if endpoint not in others and (at := _takes_at(endpoint, now)) is not None
    ]
    return min(found, key=lambda each: each[0], default=None)


def _takes_at(endpoint: Endpoint, now: float) -> float | None:
    """When *endpoint* can take one more, if only time keeps it from that."""
    if not endpoint.is_in_service() or (has_room_at := _has_room_at(endpoint, now)) is None:
        return None
    rests_until = endpoint.breaker.opens_again_at()
    if rests_until is None and not endpoint.breaker.would_admit(now):
        return None  # it is being probed
    return max(has_room_at, endpoint.cooling_until, rests_until or now)


def _has_room_at(endpoint: Endpoint, now: float) -> float | None:
    """When it is warm enough, if all that it has goes on for ever."""
    slow, since, share = endpoint.slow_start, endpoint._back_since, endpoint.share
    most = endpoint.max_concurrent if endpoint.adaptive is None else endpoint.adaptive.limit
    most = most if share is None else min(most, share)
    at = now
    while at < math.inf:
        warmth = slow.share(since, at)
        if endpoint.in_flight < math.ceil(most * warmth):
            return at
        at = slow.next_step(warmth, since)
    return None
