"""A configuration at work, from its first request to the end of its last one.

Theory of operation.  A request looks up the current generation once, when it begins, and ends with
the configuration that it began with.  A new configuration becomes a generation beside the current
one, which serves nobody until it is ready; then one assignment makes it the current one.  What
belongs to the endpoints (their health, their breakers, what they are working on, who waits for
them) belongs to no generation: the same objects serve on.

All that runs for a generation runs in its nursery, and that ends when its last request has: nothing
can be forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import attrs
import trio

from citadel_gateway.app.cors import Cors
from citadel_gateway.app.gateway_orchestrator import GatewayOrchestrator
from citadel_gateway.app.guard import Doorkeeper
from citadel_gateway.app.load_balancer import LoadBalancer
from citadel_gateway.app.relay import Relay
from citadel_gateway.app.reports import Reports
from citadel_gateway.app.watch import Watch
from citadel_gateway.config.schema import GatewayConfigSchema
from citadel_gateway.io.supervisor import supervise


@attrs.define(eq=False, kw_only=True)
class Generation:
    """All that is made from one configuration.

    :param number: counts from 1.
    :param since: seconds since 1970.
    :param digest: SHA-256 of the file, in hexadecimal; empty if there is none.
    :param unlogged: paths that are asked for too often to be worth a log line each.
    """

    number: int
    since: float
    digest: str
    config: GatewayConfigSchema
    balancer: LoadBalancer
    watch: Watch
    doorkeeper: Doorkeeper
    orchestrator: GatewayOrchestrator
    relay: Relay
    reports: Reports
    cors: Cors
    unlogged: frozenset[str]
    _ended: trio.Event = attrs.field(factory=trio.Event, init=False)

    @property
    def has_ended(self) -> bool:
        return self._ended.is_set()

    def take_over(self, previous: Generation, now: float) -> None:
        """Go on where *previous* is.  Waits for nobody, and there is no way back."""
        self.balancer.take_over(previous.balancer, now)
        self.watch.take_over(previous.watch)
        self.doorkeeper.limiter.take_over(previous.doorkeeper.limiter, now)
        balancing = self.config.load_balancer
        budget = self.orchestrator.retrying.budget = previous.orchestrator.retrying.budget
        budget.ratio, budget.floor = balancing.retry_budget_ratio, balancing.retry_budget_floor

    async def run(self, on_crash: Callable[[str, Exception], None]) -> None:
        """Watch over the endpoints until the last request has ended after :meth:`retire`."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(supervise, self.watch.run, name="watch", on_crash=on_crash))
            await self._ended.wait()
            nursery.cancel_scope.cancel(reason="this configuration serves nobody any more")

    def retire(self) -> None:
        """Requests that begin now have another one."""
        self.relay.retire(self._ended.set)

    def dissolve(self, living: Iterable[Generation]) -> None:
        """Let go of what none of the *living* ones uses."""
        used = {group for generation in living for group in generation.balancer.groups}
        for group in self.balancer.groups:
            if group not in used:
                group.dissolve()
