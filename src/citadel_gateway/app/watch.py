"""The watch over the fleet: probes for every endpoint, of those that come and go, too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NoReturn

import attrs
import httpx
import trio

from citadel_gateway.app.load_balancer import LoadBalancer
from citadel_gateway.app.upstreams import Upstream
from citadel_gateway.io.health_monitoring import HealthChecker, Sharing, check_all
from citadel_gateway.io.supervisor import supervise
from citadel_gateway.policy.endpoint import Endpoint


@attrs.define(eq=False)
class Watch:
    """Probes every endpoint, and keeps the fleet as the names' addresses are.

    An endpoint that has just come is probed at once, and gets nothing before that went well.  One
    whose address is gone is watched no longer.

    :param on_flip: told when an endpoint becomes well or ill.
    :param on_arrival: told of endpoints that have come (true) or go (false).
    :param sharing: the gateways with which the work is shared, if there are any.
    """

    balancer: LoadBalancer
    client: httpx.AsyncClient
    on_flip: Callable[[Endpoint], None]
    on_arrival: Callable[[Endpoint, bool], None]
    on_crash: Callable[[str, Exception], None]
    sharing: Sharing | None = None
    _checkers: dict[Endpoint, HealthChecker] = attrs.field(factory=dict, init=False)
    _scopes: dict[Endpoint, trio.CancelScope] = attrs.field(factory=dict, init=False)
    _watching: trio.Nursery | None = attrs.field(default=None, init=False)
    _news: trio.Event = attrs.field(factory=trio.Event, init=False)

    def __iter__(self) -> Iterator[Endpoint]:
        return iter([*self._checkers])

    @property
    def checkers(self) -> list[HealthChecker]:
        return list(self._checkers.values())

    def suspect(self, endpoint: Endpoint) -> None:
        """A request could not reach it: look at it now."""
        if checker := self._checkers.get(endpoint):
            checker.suspect()

    def note_change(self, _what: str) -> None:
        """A source lists others than before."""
        self._news.set()

    async def look_at_new(self, previous: Watch, within: float, *, joins: bool = True) -> None:
        """Probe those that *previous* does not know, as far as can be known *within* that time.

        :param joins: they find others at work, and start slowly.
        """
        with trio.move_on_after(within):
            await self.balancer.discover()
            checkers = [self._add(upstream) for upstream in self.balancer.upstreams]
            new = [c for c in checkers if c.endpoint not in previous._checkers]
            for checker in new:
                checker.endpoint.health = self.balancer.maker.unknown_health()
                checker.endpoint.is_newcomer = joins
            await check_all(new, within)

    def take_over(self, previous: Watch) -> None:
        """Probe when *previous* would have; it goes on with those that are not ours."""
        endpoints = {upstream.endpoint for upstream in self.balancer.upstreams}
        for endpoint in self._checkers.keys() - endpoints:
            del self._checkers[endpoint]  # its address has gone meanwhile
        for upstream in self.balancer.upstreams:
            checker = self._add(upstream)
            if before := previous._checkers.pop(checker.endpoint, None):
                checker.go_on_from(before)
            elif checker.endpoint.health.observed_at is None:
                checker.suspect()  # it had no time to answer yet
            if scope := previous._scopes.pop(checker.endpoint, None):
                scope.cancel(reason="another configuration watches it")

    async def look_once(self, within: float) -> None:
        """Probe every endpoint that there is, as far as can be known *within* that time."""
        if self.sharing is not None:
            await self.sharing.divide()  # others may know of endpoints that were added by order
        with trio.move_on_after(within):
            await self.balancer.discover()
        for upstream in self.balancer.upstreams:
            self._add(upstream)
        if self.sharing is not None:
            await self.sharing.divide()
        await check_all([c for c in self._checkers.values() if c.is_ours()], within)
        if self.sharing is not None:
            with trio.move_on_after(within):
                await self.sharing.wait_for(self._checkers)

    async def run(self) -> NoReturn:
        """Watch for ever those that there are, and those that come."""
        async with trio.open_nursery() as watching:
            for checker in self._checkers.values():
                self._start(watching, checker)
            self._watching = watching
            try:
                while True:
                    self._news = trio.Event()
                    self.follow()
                    await self._news.wait()
            finally:
                self._watching = None

    async def _ask_those_that_are_new(self) -> None:
        """What they say is news by itself."""
        async with trio.open_nursery() as asking:
            for model in self.balancer.models.values():
                asking.start_soon(self.balancer.discovery.look, model.id, model.config)

    def follow(self) -> None:
        """Have and watch the endpoints that the sources list now.  Waits for nobody."""
        if self._watching is None:
            self._news.set()
            return
        now = trio.current_time()
        for model in self.balancer.models.values():
            moves = self.balancer.update(model, now)
            for upstream in moves.gone:
                self._remove(upstream.endpoint)
                self.on_arrival(upstream.endpoint, False)
            for upstream in moves.come:
                self.on_arrival(upstream.endpoint, True)
                checker = self._add(upstream)
                checker.suspect()
                self._start(self._watching, checker)
            for upstream in moves.changed:
                self._watch_otherwise(self._watching, upstream)
        self._watching.start_soon(self._ask_those_that_are_new)

    def _watch_otherwise(self, watching: trio.Nursery, upstream: Upstream) -> None:
        before = self._remove(upstream.endpoint)
        checker = self._add(upstream)
        if before is not None:
            checker.go_on_from(before)
        self._start(watching, checker)

    def _add(self, upstream: Upstream) -> HealthChecker:
        checker = self._checkers.get(upstream.endpoint)
        if checker is None:
            checker = self.balancer.make_checker(upstream, self.client, self.on_flip)
            checker.sharing = self.sharing
            self._checkers[upstream.endpoint] = checker
        return checker

    def _remove(self, endpoint: Endpoint) -> HealthChecker | None:
        if scope := self._scopes.pop(endpoint, None):
            scope.cancel()
        return self._checkers.pop(endpoint, None)

    def _start(self, watching: trio.Nursery, checker: HealthChecker) -> None:
        scope = self._scopes[checker.endpoint] = trio.CancelScope()
        watching.start_soon(self._watch, checker, scope)

    async def _watch(self, checker: HealthChecker, scope: trio.CancelScope) -> None:
        name = f"health of {checker.endpoint.url}"
        with scope:
            await supervise(checker.watch, name=name, on_crash=self.on_crash)
