"""Those who wait for the same endpoints: who is next, and who has to go when there is no room."""

from __future__ import annotations

from bisect import insort
from heapq import heapify, heappop, heappush
from typing import TypeAlias

import attrs

from citadel_gateway.policy.fair_queue import FairQueue
from citadel_gateway.policy.priority import Party
from citadel_gateway.policy.ticket import Bill, Ticket
from citadel_gateway.policy.virtual_tokens import Account

Bid: TypeAlias = "tuple[int, bool, float, int, int, Line, Ticket]"

_DUE = 1 - 1e-9  # a turn; tenths of it do not add up to one exactly


@attrs.define(eq=False)
class ByAge:
    """Tickets that had a slot before and lost it, oldest first."""

    _tickets: dict[int, Ticket] = attrs.field(factory=dict, init=False)  # by serial
    _heap: list[int] = attrs.field(factory=list, init=False)  # serials of some who left, too

    def __len__(self) -> int:
        return len(self._tickets)

    def push(self, ticket: Ticket) -> None:
        self._tickets[ticket.serial] = ticket
        if len(self._heap) > 2 * len(self._tickets) + 64:
            self._heap = list(self._tickets)
            heapify(self._heap)
        else:
            heappush(self._heap, ticket.serial)

    def first(self) -> Ticket:
        while (serial := self._heap[0]) not in self._tickets:
            heappop(self._heap)
        return self._tickets[serial]

    def remove(self, ticket: Ticket) -> None:
        del self._tickets[ticket.serial]


@attrs.define(eq=False)
class Lane:
    """One class of a line.

    :param owed: turns of higher classes that it is due, 1 at most.
    """

    fresh: FairQueue[Ticket] = attrs.field(factory=FairQueue, init=False)
    returning: ByAge = attrs.field(factory=ByAge, init=False)
    owed: float = attrs.field(default=0.0, init=False)

    @property
    def depth(self) -> int:
        return self.fresh.depth + len(self.returning)

    def first(self) -> Ticket:
        return self.returning.first() if self.returning else self.fresh.first()[1]


@attrs.define(eq=False)
class Line:
    """The queue of one group of tickets.

    Higher classes go first, but of the turns that pass over lower ones those get *lower_share*.
    Within a class a request that already had a slot, and lost it through no fault of its own, goes
    ahead of those that never had one; among these turns are fair by tenant.

    :param owed: turns of other lines that it is due, 1 at most.
    """

    queue: str
    lower_share: float
    depth: int = attrs.field(default=0, init=False)
    owed: float = attrs.field(default=0.0, init=False)
    _lanes: dict[int, Lane] = attrs.field(factory=dict, init=False)  # by rank
    _ranks: list[int] = attrs.field(factory=list, init=False)  # of those in which somebody waits

    def bill(self, ticket: Ticket, house: Account) -> None:
        """Charge a request that has its slot already, now that others wait for it.

        :param house: the tenant's account in all lines.
        """
        account = self._lane(ticket.party.rank).fresh.counters.account(ticket.party)
        ticket.bill = Bill(account, house, ticket.party.weight)
        ticket.charge()

    def push(self, ticket: Ticket, house: Account | None) -> None:
        """*house* is the tenant's account in all lines; none for a ticket that is returning."""
        lane = self._lane(ticket.party.rank)
        if not lane.depth:
            insort(self._ranks, ticket.party.rank)
        if house is None:
            lane.returning.push(ticket)
        else:
            account = lane.fresh.push(ticket.party, ticket)
            ticket.bill = Bill(account, house, ticket.party.weight)
        ticket.line = self
        self.depth += 1

    def first(self) -> Ticket:
        """Whose turn it is; somebody must be waiting."""
        ranks, lanes = self._ranks, self._lanes
        if len(ranks) > 1:
            for rank in ranks[1:]:
                if lanes[rank].owed >= _DUE:
                    return lanes[rank].first()
        return lanes[ranks[0]].first()

    def urgency(self) -> int:
        """The rank with which it competes with other lines; the lower, the sooner its turn."""
        return -1 if self.owed >= _DUE else self._ranks[0]

    def serve(self, ticket: Ticket) -> None:
        """*ticket* has its turn; it is charged what it may cost."""
        rank = ticket.party.rank
        lane = self._lanes[rank]
        if self.owed >= _DUE:
            self.owed = 0.0
        if rank != self._ranks[0]:
            lane.owed = 0.0
        if passed := [self._lanes[r] for r in self._ranks if r > rank]:
            for lower in passed:
                lower.owed = min(1.0, lower.owed + self.lower_share / len(passed))
        if ticket.returning or ticket.bill is None:
            lane.returning.remove(ticket)
        else:
            lane.fresh.serve(ticket.bill.account, ticket)
            ticket.charge()
        self._left(ticket, lane)

    def remove(self, ticket: Ticket) -> None:
        """*ticket* waits no more, and had no turn."""
        lane = self._lanes[ticket.party.rank]
        if ticket.returning or ticket.bill is None:
            lane.returning.remove(ticket)
        else:
            lane.fresh.remove(ticket.bill.account, ticket)
        self._left(ticket, lane)

    def passed_over(self, rank: float) -> None:
        """A ticket of another line, of class *rank*, had what it may have wanted."""
        if rank < self._ranks[0]:
            self.owed = min(1.0, self.owed + self.lower_share)

    def places_to(self, party: Party) -> float:
        """About how many turns until one more request of *party* would have its own."""
        higher = sum(self._lanes[rank].depth for rank in self._ranks if rank < party.rank)
        lane = self._lanes.get(party.rank)
        own = 1 if lane is None else len(lane.returning) + lane.fresh.ahead_of(party) + 1
        if higher and self.lower_share:
            others = sum(rank > self._ranks[0] and rank != party.rank for rank in self._ranks)
            return min(higher + own, own * (others + 1) / self.lower_share)
        return higher + own

    def rivals_of(self, party: Party) -> int:
        """How many turns pass until one of *party*'s own waiting requests has had one."""
        lane = self._lanes.get(party.rank)
        if lane is None or not lane.fresh.length_of(party.tenant):
            return 1
        return lane.fresh.tenants()

    def newest_unfair(self, party: Party) -> Ticket | None:
        """The one who would have to go if *party* came and there were no room; ``None``: nobody.

        The last request of the lowest class, if that is lower than the party's own, or else of
        a tenant with at least two more of them: the queue is shared out as turns are.
        """
        for rank in reversed(self._ranks):
            queue = self._lanes[rank].fresh
            if rank < party.rank:
                break
            if queue.depth and (
                rank > party.rank or queue.longest() >= queue.length_of(party.tenant) + 2
            ):
                return queue.newest_of_longest()
        return None

    def depth_of(self, rank: int) -> int:
        lane = self._lanes.get(rank)
        return 0 if lane is None else lane.depth

    def keeps_accounts(self) -> bool:
        """Whether it has anything to remember once it is empty."""
        return any(len(lane.fresh.counters) for lane in self._lanes.values())

    def _lane(self, rank: int) -> Lane:
        lane = self._lanes.get(rank)
        if lane is None:
            lane = self._lanes[rank] = Lane()
        return lane

    def _left(self, ticket: Ticket, lane: Lane) -> None:
        ticket.line = None
        self.depth -= 1
        if not lane.depth:
            lane.owed = 0.0
            self._ranks.remove(ticket.party.rank)


def bid_of(line: Line) -> Bid:
    """How the head of *line* compares with others; the lowest goes first."""
    ticket, urgency = line.first(), line.urgency()
    if ticket.returning or ticket.bill is None:
        return urgency, False, 0.0, 0, ticket.serial, line, ticket
    house = ticket.bill.house
    return urgency, True, house.counter, house.turn, ticket.serial, line, ticket
