"""The gateways that are to be one with this one: all that goes over the store they share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import attrs
import trio

from citadel_gateway.app.caps import Caps
from citadel_gateway.app.findings import Findings
from citadel_gateway.app.fleet_orders import FleetOrders
from citadel_gateway.app.load_balancer import LoadBalancer
from citadel_gateway.app.measure import all_upstreams
from citadel_gateway.app.operations import Operations
from citadel_gateway.app.presence import Presence
from citadel_gateway.app.session_news import SessionNews
from citadel_gateway.app.watch import Watch
from citadel_gateway.io.admission import Admission
from citadel_gateway.io.store.membership import Membership
from citadel_gateway.policy.circuit_breaker import Transition
from citadel_gateway.policy.endpoint import Endpoint

_PARTING = 1.0  # seconds to tell the others; if that fails they learn it from what expires


@attrs.define(eq=False, kw_only=True)
class Peers:
    """Of one process that shares a store: what it says to the others, and hears from them.

    :param workers: how many processes serve on this host.
    :param seats: what the configuration says of all endpoints together.
    :param on_transition: told of breakers that follow another gateway's.
    :param on_rest: told that an endpoint is to be left alone for a while.
    """

    membership: Membership
    admission: Admission
    workers: int
    balancer: Callable[[], LoadBalancer]
    watch: Callable[[], Watch]
    seats: Callable[[], int]
    on_transition: Callable[[Endpoint, Transition], None]
    on_rest: Callable[[], None]
    findings: Findings = attrs.field(init=False)
    presence: Presence = attrs.field(init=False)
    caps: Caps = attrs.field(init=False)
    orders: FleetOrders = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.findings = Findings(
            self.membership,
            watch=self.watch,
            on_transition=self.on_transition,
            on_rest=self.on_rest,
            on_room=self.admission.pump,
        )
        self.presence = Presence(self.membership, self.workers)
        self.caps = Caps(
            self.membership,
            self.admission,
            seats=self.seats,
            endpoints=lambda: (u.endpoint for u in all_upstreams(self.balancer())),
            name=self.findings.name,
        )

    def tell_sessions(self) -> None:
        """Share where sessions are, too, once there is a balancer that knows."""
        SessionNews(
            self.membership,
            self.balancer().sessions,
            endpoints=lambda: (u.endpoint for u in self.balancer().upstreams),
            name=self.findings.name,
        )

    def share_orders(self, operations: Operations) -> None:
        """What operators want here counts for all, and the other way round."""
        self.orders = FleetOrders(self.membership, operations, name_of=self.findings.name_of)

    def tasks(self) -> dict[str, Callable[[], Awaitable[Any]]]:
        """What is to run for as long as the gateway is open, besides the store itself."""
        return {
            "store": self.membership.run,
            "caps": self.caps.run,
            "presence": self.presence.run,
        }

    async def leave(self) -> None:
        """Give back what we hold.  Shielded, and bounded."""
        with trio.move_on_after(_PARTING, shield=True):
            await self.membership.leave()
            await self.caps.leave()
