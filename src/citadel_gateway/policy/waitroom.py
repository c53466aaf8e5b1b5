"""Who is served now, who waits, and who is turned away.

A request needs two things at once: a seat under the global cap and a slot on an endpoint.  Both
are taken in one step, so nobody holds the one while waiting for the other.  Requests that would
accept the same endpoints form a group and are served in order of arrival; across groups, the
oldest that can be placed goes first, so a full model never blocks a free one.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Hashable
from typing import TypeAlias

import attrs

from citadel_gateway.policy.circuit_breaker import Transition, Verdict
from citadel_gateway.policy.endpoint import Endpoint, Slot


class Full(Exception):
    """No slot, and no room to wait for one."""


@attrs.frozen
class Nobody:
    """No endpoint will take the request soon; the earliest chance is in *retry_after* seconds."""

    retry_after: float


Choice: TypeAlias = "Endpoint | Nobody | None"
"""An endpoint, or that there is none, or (``None``) that waiting may help."""


@attrs.define(eq=False)
class Ticket:
    """One request's place, from its arrival to its end.

    :param choose: asked for an endpoint whenever one may have become free; takes ``now``.
    :param queue: bounds and names the queue it waits in: the model asked for.
    :param group: tickets of one group would accept the same endpoints.
    """

    queue: str
    group: Hashable
    choose: Callable[[float], Choice]
    serial: int = attrs.field(default=0, init=False)
    outcome: Slot | Nobody | None = attrs.field(default=None, init=False)
    seated: bool = attrs.field(default=False, init=False)


@attrs.define(eq=False)
class Waitroom:
    """*seats* requests at once with all endpoints together; *room* may wait for each model."""

    seats: int
    room: int
    taken: int = attrs.field(default=0, init=False)
    _groups: dict[Hashable, deque[Ticket]] = attrs.field(factory=dict, init=False)
    _depths: dict[str, int] = attrs.field(factory=dict, init=False)
    _serial: int = attrs.field(default=0, init=False)
    _paces: dict[str, Pace] = attrs.field(factory=dict, init=False)

    def enter(self, ticket: Ticket, now: float) -> None:
        """Place *ticket*, or queue it; its ``outcome`` tells which.  Raises :class:`Full`."""
        self._serial += 1
        ticket.serial = self._serial
        if self.taken < self.seats and ticket.group not in self._groups:
            ticket.outcome = self._place(ticket, now)
            if ticket.outcome is not None:
                return
        if self.depth(ticket.queue) >= self.room:
            raise Full
        self._enqueue(ticket)

    def move(self, ticket: Ticket, verdict: Verdict, now: float) -> Transition | None:
        """Leave the slot for another one, as ``choose`` now says; the seat is kept if possible.

        A request that failed over keeps its age: it does not queue behind those that came later.
        """
        slot = ticket.outcome
        transition = slot.close(verdict, now) if isinstance(slot, Slot) else None
        ticket.outcome = None
        if ticket.seated:
            self.taken -= 1
            ticket.seated = False
        ticket.outcome = self._place(ticket, now) if self.taken < self.seats else None
        if ticket.outcome is None:
            self._enqueue(ticket)
        return transition

    def leave(self, ticket: Ticket, verdict: Verdict, now: float) -> Transition | None:
        """Give up whatever *ticket* holds, in whatever state it is.  :meth:`pump` afterwards."""
        slot = ticket.outcome
        if slot is None:
            self._dequeue(ticket)
            return None
        if ticket.seated:
            ticket.seated = False
            self.taken -= 1
            self._pace(ticket.queue).departed(now, somebody_waits=self.depth(ticket.queue) > 0)
        return slot.close(verdict, now) if isinstance(slot, Slot) else None

    def pump(self, now: float) -> list[Ticket]:
        """Place whoever can be placed; returns those whose ``outcome`` is now known."""
        called: list[Ticket] = []
        if not self._groups:
            return called
        while ticket := self._next(now):
            self._dequeue(ticket)
            called.append(ticket)
        return called

    def depth(self, queue: str) -> int:
        return self._depths.get(queue, 0)

    def retry_after(self, queue: str) -> float:
        """Seconds until somebody at the end of *queue* would be served, at the present pace."""
        return min(60.0, max(1.0, (self.depth(queue) + 1) * self._pace(queue).seconds))

    def _pace(self, queue: str) -> Pace:
        return self._paces.setdefault(queue, Pace())

    def _next(self, now: float) -> Ticket | None:
        if self.taken >= self.seats:
            return None
        for ticket in sorted((q[0] for q in self._groups.values()), key=lambda t: t.serial):
            ticket.outcome = self._place(ticket, now)
            if ticket.outcome is not None:
                return ticket
        return None

    def _place(self, ticket: Ticket, now: float) -> Slot | Nobody | None:
        match ticket.choose(now):
            case Endpoint() as endpoint:
                slot = Slot.take(endpoint, now)
                self.taken += 1
                ticket.seated = True
                return slot
            case nobody:
                return nobody

    def _enqueue(self, ticket: Ticket) -> None:
        # By age, not at the end: see `move`.
        insort(self._groups.setdefault(ticket.group, deque()), ticket, key=lambda t: t.serial)
        self._depths[ticket.queue] = self.depth(ticket.queue) + 1

    def _dequeue(self, ticket: Ticket) -> None:
        waiting = self._groups.get(ticket.group)
        if waiting is None or ticket not in waiting:
            return
        waiting.remove(ticket)
        if not waiting:
            del self._groups[ticket.group]
        self._depths[ticket.queue] -= 1


@attrs.define
class Pace:
    """How fast a queue drains: seconds between two departures, while somebody waits for them.

    Gaps in which nobody waited say nothing, so a new busy period begins with the old average.
    """

    seconds: float = 0.1
    _measured: bool = attrs.field(default=False, init=False)
    _last: float | None = attrs.field(default=None, init=False)

    def departed(self, now: float, *, somebody_waits: bool) -> None:
        if self._last is not None:
            gap = min(60.0, now - self._last)
            self.seconds += (0.1 if self._measured else 1.0) * (gap - self.seconds)
            self._measured = True
        self._last = now if somebody_waits else None
