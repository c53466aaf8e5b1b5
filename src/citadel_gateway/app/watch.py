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

    def note_change(self, _host: str) -> None:
        """A name has other addresses than before."""
        self._news.set()

    async def look_at_new(self, previous: Watch, within: float) -> None:
        """Probe those that *previous* does not know, as far as can be known *within* that time."""
        with trio.move_on_after(within):
            await self.balancer.discover()
            checkers = [self._add(upstream) for upstream in self.balancer.upstreams]
            new = [c for c in checkers if c.endpoint not in previous._checkers]
            for checker in new:
                checker.endpoint.health = self.balancer.maker.unknown_health()
                checker.endpoint.is_newcomer = True
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
            while True:
                self._news = trio.Event()
                for source in self.balancer.sources:
                    new, gone = self.balancer.update(source)
                    for upstream in gone:
                        self._remove(upstream.endpoint)
                    for upstream in new:
                        self.on_arrival(upstream.endpoint, True)
                        checker = self._add(upstream)
                        checker.suspect()
                        self._start(watching, checker)
                await self._news.wait()

    def _add(self, upstream: Upstream) -> HealthChecker:
        checker = self._checkers.get(upstream.endpoint)
        if checker is None:
            checker = self.balancer.make_checker(upstream, self.client, self.on_flip)
            checker.sharing = self.sharing
            self._checkers[upstream.endpoint] = checker
        return checker

    def _remove(self, endpoint: Endpoint) -> None:
        self._checkers.pop(endpoint, None)
        if scope := self._scopes.pop(endpoint, None):
            scope.cancel()
        self.on_arrival(endpoint, False)

    def _start(self, watching: trio.Nursery, checker: HealthChecker) -> None:
        scope = self._scopes[checker.endpoint] = trio.CancelScope()
        watching.start_soon(self._watch, checker, scope)

    async def _watch(self, checker: HealthChecker, scope: trio.CancelScope) -> None:
        name = f"health of {checker.endpoint.url}"
        with scope:
            await supervise(checker.watch, name=name, on_crash=self.on_crash)
