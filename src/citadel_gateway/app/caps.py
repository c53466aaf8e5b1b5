"""The concurrency caps of several gateways together: each uses its share, and asks for more.

A request that finds room within the share costs nothing.  One that does not waits in the queue like
any other while the store is asked; and while others wait for what this gateway has, or there is
little to spare for whoever will, it reports whenever a request ends.  The more gateways there are,
the more seldom each of them reports, so that a store has no more to do for a hundred that wait than
for ten.  Without the store each gateway goes by its even part of every cap, once all can have
noticed; until then by what it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NoReturn

import attrs
import trio

from citadel_gateway.app.group import Group
from citadel_gateway.io.admission import Admission
from citadel_gateway.io.store.base import StoreUnavailable
from citadel_gateway.io.store.membership import Membership
from citadel_gateway.io.ticks import next_tick
from citadel_gateway.policy.endpoint import Endpoint
from citadel_gateway.policy.shares import Need

ALL = "all"
_MOST = 50  # caps in one report: a millisecond's work, with few gateways
_MOST_SHARES = 1000  # of all gateways, that one report has a store look at
_SOONEST = 0.002  # seconds between two reports, however urgent
_WAITING = 0.02  # while somebody waits for what others have
_LITTLE = 8  # the part of what is needed up to which what there is to spare is little
_MOST_URGENT = 2500.0  # reports a second of all gateways together, however urgent
_MOST_WAITING = 500.0  # while somebody waits at each of them


@attrs.define(eq=False)
class _Share:
    """Of one cap.

    :param endpoint: whose cap it is; ``None`` for the one over all.
    :param limit: what we go by; ``None`` before the first report.
    :param is_owed: the store holds more for us, which others could have.
    :param is_short: there was little to spare for us, and so for others.
    :param good_until: when others may have what the store has given us.
    :param missed_at: the first report since then that the store did not answer.
    """

    cap: int
    endpoint: Endpoint | None
    limit: int | None = None
    is_owed: bool = False
    is_contended: bool = False
    is_short: bool = False
    wants: int = 0
    reported_at: float = -float("inf")
    good_until: float = -float("inf")
    missed_at: float = float("inf")


@attrs.define(eq=False)
class Caps:
    """Of one gateway.

    :param seats: what the configuration says of all endpoints together.
    :param endpoints: all that may have requests.
    :param name: of an endpoint, for every gateway the same.
    """

    membership: Membership
    admission: Admission
    seats: Callable[[], int]
    endpoints: Callable[[], Iterable[Endpoint]]
    name: Callable[[Endpoint], str]
    begun: trio.Event = attrs.field(factory=trio.Event, init=False)  # it may use something
    _shares: dict[str, _Share] = attrs.field(factory=dict, init=False)
    _hurry: trio.Event = attrs.field(factory=trio.Event, init=False)
    _is_contended: bool = attrs.field(default=False, init=False)
    _is_short: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        self.admission.waitroom.seats = 0  # until the first report
        self.admission.on_wait = self.hurry
        self.admission.on_room = self._note_room

    def hurry(self) -> None:
        """Report at once: somebody waits, or there are other caps."""
        self._hurry.set()

    async def run(self) -> NoReturn:
        """Report for ever."""
        while True:
            await self.report()
            self.begun.set()
            members, shares = self.membership.members, self._shares.values()
            soonest = trio.current_time() + max(_SOONEST, members / _MOST_URGENT)
            if not any(share.is_owed for share in shares):
                with trio.move_on_at(self._next_report()):
                    await self._hurry.wait()
            if trio.current_time() < soonest:
                await trio.sleep_until(soonest)
            self._hurry = trio.Event()

    async def report(self) -> None:
        """Say what is used and wanted, and use what may be used from now on."""
        self._survey()
        now = trio.current_time()
        due = [
            name
            for name, share in self._shares.items()
            if share.wants
            or share.is_contended
            or (share.is_short and (share.limit or 0) > self._used(share))
            or now - share.reported_at >= self._every()
        ]
        most = max(1, min(_MOST, _MOST_SHARES // self.membership.members))
        for start in range(0, len(due), most):
            await self._report_some(due[start : start + most])
        self._is_contended = any(share.is_contended for share in self._shares.values())
        self._is_short = any(share.is_short for share in self._shares.values())

    async def leave(self) -> None:
        """Give back everything.  For a shielded, bounded scope."""
        try:
            await self.membership.store.leave(self.membership.name, list(self._shares))
        except StoreUnavailable:
            return

    def _next_report(self) -> float:
        """When there is something to report, if nothing happens before."""
        now, members = trio.current_time(), self.membership.members
        if self._is_contended or any(share.wants for share in self._shares.values()):
            return now + max(_WAITING, members / _MOST_WAITING)
        every = self.membership.store.every
        if self._is_short:
            return next_tick(every)
        oldest = min((share.reported_at for share in self._shares.values()), default=now)
        # With the meetings, so that caps are reported together and nobody wakes up for one alone.
        return next_tick(every, about=max(0.0, oldest + self._every() - now))

    def _every(self) -> float:
        """Seconds between two reports of a cap of which there is nothing to say."""
        return self.membership.lease / 4

    def _note_room(self) -> None:
        if self._is_contended or self._is_short:
            self._hurry.set()

    def _survey(self) -> None:
        """What caps there are now, and who waits for them."""
        known, self._shares = self._shares, {}
        self._keep(known, ALL, self.seats(), None)
        for endpoint in self.endpoints():
            self._keep(known, self.name(endpoint), endpoint.max_concurrent, endpoint)
        everybody, wants = 0, dict[Endpoint, int]()
        for key, depth in self.admission.waitroom.waiting():
            everybody += depth
            group = key if isinstance(key, Group) else key[0] if isinstance(key, tuple) else None
            for endpoint in group.upstreams if isinstance(group, Group) else ():
                wants[endpoint] = wants.get(endpoint, 0) + depth
        for share in self._shares.values():
            share.wants = everybody if share.endpoint is None else wants.get(share.endpoint, 0)

    def _keep(
        self, known: dict[str, _Share], name: str, cap: int, endpoint: Endpoint | None
    ) -> None:
        share = known.get(name)
        if share is None or share.endpoint is not endpoint:
            share = _Share(cap, endpoint)
        elif share.cap != cap:
            share.cap, share.reported_at = cap, -float("inf")
        self._shares[name] = share

    def _used(self, share: _Share) -> int:
        if share.endpoint is None:
            return self.admission.waitroom.taken
        return share.endpoint.in_flight

    async def _report_some(self, names: list[str]) -> None:
        began, member = trio.current_time(), self.membership
        needs = {
            name: Need(share.cap, share.limit, self._used(share), share.wants)
            for name in names
            for share in [self._shares[name]]
        }
        try:
            grants = await member.store.report(member.name, member.lease, needs)
        except StoreUnavailable:
            for name in names:
                self._go_alone(self._shares[name], began)
        else:
            for name, grant in grants.items():
                share = self._shares[name]
                share.limit, share.is_contended = grant.limit, grant.is_contended
                is_too_much = grant.held > max(grant.limit, needs[name].used)
                share.is_owed = is_too_much and grant.is_contended
                need = needs[name].used + needs[name].wants
                share.is_short = grant.limit - need <= need // _LITTLE
                share.reported_at, share.good_until = began, began + member.lease
                share.missed_at = float("inf")
        has_more = [name for name in names if self._apply(self._shares[name])]
        if has_more:
            self.admission.pump()

    def _go_alone(self, share: _Share, now: float) -> None:
        """Go by the even part, unless what the store said is still good.

        Others may have heard from it until we did not, and go by that for as long as a lease.
        """
        share.is_contended = share.is_owed = share.is_short = False
        share.missed_at = min(share.missed_at, now)
        if now >= share.good_until:
            even = max(1, share.cap // self.membership.members)
            if share.limit is None or now >= share.missed_at + self.membership.lease:
                share.limit = even
            else:
                share.limit = min(share.limit, even)

    def _apply(self, share: _Share) -> bool:
        """True if more may be used than before."""
        limit = share.limit or 0
        if share.endpoint is None:
            waitroom = self.admission.waitroom
            before, waitroom.seats = waitroom.seats, limit
            return waitroom.seats > before
        before = share.endpoint.limit
        share.endpoint.set_share(limit)
        return share.endpoint.limit > before
