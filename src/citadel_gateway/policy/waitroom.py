"""Who is served now, who waits, and who is turned away.

A request needs two things at once: a seat under the global cap and a slot on an endpoint.  Both
are taken in one step, so nobody holds the one while waiting for the other.  Requests that would
accept the same endpoints form a group and wait in one line; see :mod:`.line` for the order.
Across lines the most urgent that can be placed goes first, and among equals the one whose tenant
had least, so a full model never blocks a free one.

Who comes and would not be served in time is told so at once, and when to come again.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from heapq import heapify, heappop, heapreplace

import attrs

from citadel_gateway.policy.circuit_breaker import Transition, Verdict
from citadel_gateway.policy.endpoint import Endpoint, Slot
from citadel_gateway.policy.forecast import Forecast, Full, Refused, TooLong
from citadel_gateway.policy.line import Line
from citadel_gateway.policy.lines import Lines
from citadel_gateway.policy.priority import Party
from citadel_gateway.policy.ticket import Choice, Displaced, Nobody, Ticket
from citadel_gateway.policy.virtual_tokens import Counters

__all__ = ["Choice", "Displaced", "Full", "Nobody", "Refused", "Ticket", "TooLong", "Waitroom"]


@attrs.define(eq=False)
class Waitroom:
    """*seats* requests at once with all endpoints together; *room* may wait in each line.

    :param patience: seconds that somebody may wait.
    :param lower_share: of the turns that pass over lower classes, what they get.
    :param displaced: those who lost their places since the last :meth:`pump`.
    """

    seats: int
    room: int
    patience: float = math.inf
    _lower_share: float = 0.1
    taken: int = attrs.field(default=0, init=False)
    displaced: list[Ticket] = attrs.field(factory=list, init=False)
    _lines: Lines = attrs.field(init=False)
    _house: Counters = attrs.field(factory=Counters, init=False)  # of all lines together
    _serial: int = attrs.field(default=0, init=False)
    _forecast: Forecast = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._forecast, self._lines = Forecast(self.room), Lines(self._lower_share)

    def resize(self, room: int, lower_share: float) -> None:
        """Let *room* wait in each line from now on; who waits already may stay."""
        self.room = self._forecast.room = room
        self._lines.share(lower_share)

    def enter(self, ticket: Ticket, now: float) -> None:
        """Place *ticket*, or queue it; its ``outcome`` tells which.  Raises :class:`Refused`."""
        self._serial += 1
        ticket.serial = self._serial
        if self.taken < self.seats and ticket.group not in self._lines:
            ticket.outcome = self._place(ticket, now)
            if ticket.outcome is not None:
                return
        self._queue(ticket, now)

    def move(self, ticket: Ticket, verdict: Verdict, now: float) -> Transition | None:
        """Leave the slot for another one, as ``choose`` now says; the seat is kept if possible.

        A request that failed over keeps its age: it does not queue behind those that came later.
        One that never had a slot is as good as new, and may be refused: raises :class:`Refused`.
        """
        transition = self.step_out(ticket, verdict, now)
        self.come_back(ticket, now)
        return transition

    def step_out(self, ticket: Ticket, verdict: Verdict, now: float) -> Transition | None:
        """Give up slot and seat, and stand in no line until :meth:`come_back`."""
        slot = ticket.outcome
        self._stand_up(ticket, now)
        ticket.outcome = None
        if not isinstance(slot, Slot):
            return None
        ticket.returning = True
        return slot.close(verdict, now)

    def come_back(self, ticket: Ticket, now: float) -> None:
        """Want another slot; raises as :meth:`move`."""
        if not ticket.returning:
            self.enter(ticket, now)
            return
        ticket.outcome = self._place(ticket, now) if self.taken < self.seats else None
        if ticket.outcome is None:
            self._lines.of(ticket, now).push(ticket, None)

    def leave(self, ticket: Ticket, verdict: Verdict, now: float) -> Transition | None:
        """Give up whatever *ticket* holds, in whatever state it is.  :meth:`pump` afterwards."""
        if (slot := ticket.outcome) is None:
            self._dequeue(ticket, now)
        self._stand_up(ticket, now)
        if ticket.bill is not None:
            ticket.bill.close()
        return slot.close(verdict, now) if isinstance(slot, Slot) else None

    def spare(self, ticket: Ticket, now: float) -> Slot | None:
        """Give *ticket* a slot that is free and that nobody waits for; it neither queues nor pays.

        For a second attempt beside the one that has its request's own ticket.
        """
        if self.taken >= self.seats or self.depth(ticket.queue):
            return None
        ticket.outcome = slot = self._place(ticket, now)
        if ticket.pace is not None:
            ticket.pace.unbilled.pop(ticket)
        return slot if isinstance(slot, Slot) else None

    def pump(self, now: float) -> list[Ticket]:
        """Place whoever can be placed; returns those whose ``outcome`` is now known."""
        called, self.displaced = self.displaced, []
        if not self._lines or self.taken >= self.seats:
            return called
        bids = [line.bid() for line in self._lines.values()]
        heapify(bids)
        stuck: list[Line] = []  # whom nobody can take
        rank = math.inf  # of the most urgent who was placed
        while bids and self.taken < self.seats:
            bid = bids[0]
            line, ticket = bid[-2:]
            ticket.outcome = self._place(ticket, now)
            if ticket.outcome is None:
                stuck.append(heappop(bids)[-2])
                continue
            called.append(ticket)
            if isinstance(ticket.outcome, Slot):
                rank = min(rank, ticket.party.rank)
                self._serve(ticket, line, now)
            else:
                self._dequeue(ticket, now)
            if line.depth:
                heapreplace(bids, line.bid())
            else:
                heappop(bids)
        for line in (*stuck, *(bid[-2] for bid in bids)):
            line.passed_over(rank)
        return called

    def is_anybody_waiting(self) -> bool:
        """Whether :meth:`pump` could have anything to do."""
        return bool(self._lines or self.displaced)

    def waiting(self) -> list[tuple[Hashable, int]]:
        """How many wait, by their groups."""
        return [(group, line.depth) for group, line in self._lines.items()]

    def depth(self, queue: str, rank: int | None = None) -> int:
        """How many wait in *queue*, of one class or of all."""
        lines = self._lines.named(queue)
        return sum(line.depth if rank is None else line.depth_of(rank) for line in lines)

    def retry_after(self, ticket: Ticket, now: float) -> float:
        """Seconds until a request like *ticket* would be let in, at the present pace."""
        line, within = self._lines.like(ticket), self._left(ticket.deadline, now)
        return self._forecast.again(line, ticket.party, within)

    def wait(self, queue: str, party: Party) -> float:
        """Seconds that *party* would wait in *queue*, in its longest line; 0 if unknown."""
        lines = self._lines.named(queue)
        return max((self._forecast.wait(line, party) or 0.0 for line in lines), default=0.0)

    def is_hopeless(
        self, groups: Iterable[Hashable], party: Party, deadline: float, now: float
    ) -> Refused | None:
        """Why *party* would be refused in every one of *groups*; ``None`` if one may take it.

        :param groups: all that a request could belong to.
        """
        within, soonest = self._left(deadline, now), None
        for group in groups:
            line = self._lines.get(group)
            if line is None:
                return None  # nobody waits, so there may be a slot
            refused = self._forecast.refusal(line, party, within)
            if refused is None:
                return None
            if soonest is None or refused.retry_after < soonest.retry_after:
                soonest = refused
        return soonest

    def _left(self, deadline: float, now: float) -> float:
        return min(self.patience, deadline - now)

    def _queue(self, ticket: Ticket, now: float) -> None:
        line, party = self._lines.of(ticket, now), ticket.party
        within = self._left(ticket.deadline, now)
        if refused := self._forecast.refusal(line, party, within):
            self._lines.rest_if_empty(ticket.group, now)
            raise refused
        victim = line.newest_unfair(party) if line.depth >= self.room else None
        pace = self._forecast.pace(ticket.queue)
        for holder in pace.unbilled:
            line.bill(holder, self._house.account(holder.party))
        pace.unbilled.clear()
        line.push(ticket, self._house.join(party))
        if victim is not None:
            self._dequeue(victim, now)
            victim.outcome = Displaced(self.retry_after(victim, now))
            self.displaced.append(victim)

    def _place(self, ticket: Ticket, now: float) -> Slot | Nobody | None:
        match ticket.choose(now):
            case Endpoint() as endpoint:
                slot = Slot.take(endpoint, now)
                self.taken += 1
                pace = self._forecast.pace(ticket.queue)
                pace.busy += 1
                if ticket.bill is None:
                    pace.unbilled[ticket] = None
                ticket.pace, ticket.since = pace, now
                return slot
            case nobody:
                return nobody

    def _stand_up(self, ticket: Ticket, now: float) -> None:
        if (pace := ticket.pace) is not None:
            pace.ended(now - ticket.since)
            pace.unbilled.pop(ticket, None)
            ticket.pace = None
            self.taken -= 1

    def _serve(self, ticket: Ticket, line: Line, now: float) -> None:
        if not ticket.returning and ticket.bill is not None:
            self._house.serve(ticket.bill.house)
        line.serve(ticket)
        self._lines.rest_if_empty(ticket.group, now)

    def _dequeue(self, ticket: Ticket, now: float) -> None:
        if (line := ticket.line) is None:
            return
        if not ticket.returning and ticket.bill is not None:
            self._house.quit(ticket.bill.house)
        line.remove(ticket)
        self._lines.rest_if_empty(ticket.group, now)
