"""Endpoints that would do equally well, and where a request may go."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Hashable, Sequence, Set

import attrs

from citadel_gateway.app.upstreams import Model, Upstream
from citadel_gateway.policy.endpoint import Endpoint, nobody_asks
from citadel_gateway.policy.picker import Picker
from citadel_gateway.policy.roster import Roster
from citadel_gateway.policy.selection import Share, evenly
from citadel_gateway.policy.waitroom import Choice, Nobody

_NEXT_PROBE = 5.0  # seconds: when an endpoint that is down may be known to be up again


@attrs.define(eq=False)
class Group:
    """Endpoints that would do equally well, and whose turn it is among them.

    It outlives the configuration that it was made for, as do those who wait for it.

    :param basis: what the picker goes by, besides what is written on the endpoints.
    :param on_room: told that an endpoint takes more than those who wait in other groups know.
    """

    name: str
    models: tuple[Model, ...]
    picker: Picker
    share: Share = evenly
    basis: Hashable = None
    on_room: Callable[[], None] = nobody_asks
    upstreams: dict[Endpoint, Upstream] = attrs.field(factory=dict, init=False)
    _roster: Roster = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._roster = Roster(self.picker)

    def begin(self) -> None:
        """Take in the endpoints of the models."""
        self.add([upstream for model in self.models for upstream in model.upstreams])

    def add(self, upstreams: Sequence[Upstream]) -> None:
        self.upstreams |= {upstream.endpoint: upstream for upstream in upstreams}
        self._roster.add(upstream.endpoint for upstream in upstreams)

    def replace(self, upstream: Upstream) -> None:
        """Speak to an endpoint that is here in another way, and give it another share."""
        self.upstreams[upstream.endpoint] = upstream
        self._roster.reweigh(upstream.endpoint)

    def retire(self, upstream: Upstream) -> None:
        """Give it nothing new; who is with it already still finds it here."""
        endpoint = upstream.endpoint
        self._roster.remove(endpoint)
        endpoint.watchers.append(self._forget_when_idle)
        self._forget_when_idle(endpoint)

    def _forget_when_idle(self, endpoint: Endpoint) -> None:
        has_returned = endpoint in self._roster
        if has_returned or endpoint.in_flight == 0:
            endpoint.unwatch(self._forget_when_idle)
            if not has_returned:
                self.upstreams.pop(endpoint, None)

    def renew(self, other: Group, reweighed: Set[Endpoint]) -> None:
        """Become what *other* is, which has not begun; turns are kept, and so is who waits.

        :param reweighed: endpoints whose share of the load is not what it was.
        """
        wanted = {u.endpoint: u for model in other.models for u in model.upstreams}
        for endpoint, upstream in list(self.upstreams.items()):
            if endpoint in self._roster and endpoint not in wanted:
                self.retire(upstream)
        new = [u for u in wanted.values() if u.endpoint not in self._roster]
        self.models, self.share = other.models, other.share
        self.upstreams |= wanted
        if other.basis != self.basis or not reweighed.isdisjoint(wanted):
            self.basis, self.picker = other.basis, other.picker
            self._roster.reorder(self.picker)
        self.add(new)

    def dissolve(self) -> None:
        """Nobody will ask it any more: be told nothing, either."""
        self.models = ()
        for endpoint in self.upstreams:
            self._roster.remove(endpoint)
            endpoint.unwatch(self._forget_when_idle)

    def choose(self, tried: Container[Endpoint], now: float, key: int | None = None) -> Choice:
        """An endpoint that was not *tried*; ``None`` while all that could take it are full.

        :param key: of what the request belongs to, if that matters.
        """
        endpoint = self._roster.choose(tried, now, key)
        if endpoint is None and self._roster.hurry(now):
            self.on_room()
            endpoint = self._roster.choose(tried, now, key)
        if endpoint is not None:
            return endpoint
        if self._roster.is_any_full(tried, now):
            return None
        return Nobody(self.next_chance(now))

    def spare(self, model: str, tried: Set[Endpoint], now: float) -> Endpoint | None:
        """One more endpoint of *model* with room right now; nobody is hurried for it."""
        if len(self.models) > 1:
            tried = tried | {endpoint for endpoint in self.upstreams if endpoint.model != model}
        return self._roster.choose(tried, now)

    def choose_any(self, now: float) -> Choice:
        """The same while none was tried."""
        return self.choose((), now)

    def preview(self, now: float, key: int | None = None) -> Endpoint | None:
        """Who would be chosen now, asked of a copy, so that nobody's turn is used up."""
        shared = {id(endpoint): endpoint for endpoint in self.upstreams}
        return copy.deepcopy(self._roster, shared).choose((), now, key)

    def is_any_left(self, tried: Container[Endpoint], now: float) -> bool:
        """Whether an endpoint that was not *tried* is available, with room or without."""
        return self._roster.is_any_left(tried, now)

    def has_room(self, tried: Container[Endpoint], now: float) -> bool:
        """Whether one that was not *tried* can take a request right now."""
        return self._roster.has_room(tried, now)

    def next_chance(self, now: float) -> float:
        """Seconds until an endpoint may be available again, as far as can be known."""
        return self._roster.next_chance(now, _NEXT_PROBE)

    def is_cordoned(self) -> bool:
        """Whether it is by command that there is nobody."""
        return bool(self.upstreams) and all(endpoint.cordoned for endpoint in self.upstreams)


@attrs.frozen
class Plan:
    """Where a request may go: the groups in order of preference, and why the first one."""

    groups: tuple[Group, ...]
    reason: str
