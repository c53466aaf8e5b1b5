"""Whether enough endpoints of a model are healthy for their probes to be believed.

When most of them fail their probes at once, the few that pass would be buried under the load of
all, and more often than not it is the probing that has gone wrong, or the engines are too busy to
answer it.  So below a share of healthy ones, health is ignored and all are used again, as in
Envoy's panic mode.  Which of them really are down, their breakers find out.  Those, and cool-downs,
are still obeyed: they speak of requests that failed, and to send more there would only lose them.

If none is healthy there is nobody to be spared, and that is no panic but an outage: fallbacks take
over, else requests are refused until a probe goes well, which is seconds.  To try all the same
would open every breaker, and keep the endpoints away long after they are back.

An endpoint that was not probed yet, is cordoned, or has stand-ins, is not counted, and is not used
either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import attrs

from citadel_gateway.policy.endpoint import Endpoint, nobody_asks


@attrs.define(eq=False)
class Quorum:
    """The endpoints of one model.

    :param threshold: the share of healthy ones below which it panics; 0 for never.
    :param on_change: told when panic begins (true) or ends.
    """

    threshold: float
    on_change: Callable[[bool], None]
    is_panicking: bool = attrs.field(default=False, init=False)
    _members: dict[Endpoint, None] = attrs.field(factory=dict, init=False)

    def add(self, endpoint: Endpoint) -> None:
        self._members[endpoint] = None
        endpoint.on_standing = self.review
        self.review()

    def remove(self, endpoint: Endpoint) -> None:
        self._members.pop(endpoint, None)
        endpoint.on_standing, endpoint.is_needed = nobody_asks, False
        self.review()

    def renew(self, other: Quorum, members: Iterable[Endpoint]) -> None:
        """Go by what *other*, which has none yet, goes by, and have these *members*.

        Those who come and those who go do so at once: the share in between is nobody's.
        """
        self.threshold, self.on_change = other.threshold, other.on_change
        before, self._members = self._members, dict.fromkeys(members)
        for endpoint in before.keys() - self._members.keys():
            endpoint.on_standing, endpoint.is_needed = nobody_asks, False
        for endpoint in self._members:
            endpoint.on_standing = self.review
        self.review()

    def review(self) -> None:
        """Count again: one has become well or ill, or is cordoned, or is not any more."""
        counted = [e for e in self._members if _counts(e)]
        healthy = sum(e.health.healthy for e in counted)
        before, self.is_panicking = self.is_panicking, 0 < healthy < self.threshold * len(counted)
        if self.is_panicking:
            for endpoint in counted:
                if not endpoint.is_needed:
                    endpoint.is_needed = True
                    endpoint.eased()
        elif before:
            for endpoint in self._members:
                endpoint.is_needed = False
        if self.is_panicking != before:
            self.on_change(self.is_panicking)


def _counts(endpoint: Endpoint) -> bool:
    is_known = endpoint.health.observed_at is not None
    return is_known and not endpoint.cordoned and not endpoint.is_stood_in_for
