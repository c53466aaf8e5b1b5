"""Parks tasks until the waitroom calls them; the waitroom decides, this waits."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import trio

from citadel_gateway.policy.circuit_breaker import Transition, Verdict
from citadel_gateway.policy.endpoint import Endpoint, Slot
from citadel_gateway.policy.waitroom import Ticket, Waitroom


@attrs.define(eq=False)
class Admission:
    """The waitroom, for tasks.

    :param on_transition: told of every change of a breaker.
    :param on_wait: told that somebody has to wait.
    :param on_room: told that a request has given back what it had.
    """

    waitroom: Waitroom
    on_transition: Callable[[Endpoint, Transition], None]
    on_wait: Callable[[], None] | None = attrs.field(default=None, init=False)
    on_room: Callable[[], None] | None = attrs.field(default=None, init=False)
    _calls: dict[Ticket, trio.Event] = attrs.field(factory=dict, init=False)

    def enter(self, ticket: Ticket) -> None:
        """Take a place or queue for one.  Raises ``Refused``.  Follow with :meth:`wait`."""
        waitroom = self.waitroom
        waitroom.enter(ticket, trio.current_time())
        if waitroom.displaced:
            self.pump()

    async def wait(self, ticket: Ticket, within: float) -> None:
        """Wait until the ticket's outcome is known.  Raises ``trio.TooSlowError``."""
        if ticket.outcome is not None:
            return  # the usual case costs nothing; the caller goes on to wait for an upstream
        if self.on_wait is not None:
            self.on_wait()
        self._calls[ticket] = trio.Event()
        try:
            with trio.fail_after(within):
                await self._calls[ticket].wait()
        finally:
            del self._calls[ticket]

    def spare(self, ticket: Ticket) -> Slot | None:
        """Take a slot that is free now, for a second attempt; :meth:`leave` it afterwards."""
        return self.waitroom.spare(ticket, trio.current_time())

    def move(self, ticket: Ticket, verdict: Verdict) -> None:
        """Give up the slot for another; follow with :meth:`wait`.

        Raises ``Refused`` if it has to queue and never had a slot.
        """
        self._settle(ticket, self.waitroom.move, verdict)

    def step_out(self, ticket: Ticket, verdict: Verdict) -> None:
        """Give up the slot for a while, holding nothing; follow with :meth:`come_back`."""
        self._settle(ticket, self.waitroom.step_out, verdict)

    def come_back(self, ticket: Ticket) -> None:
        """Want another slot after :meth:`step_out`; follow with :meth:`wait`."""
        self.waitroom.come_back(ticket, trio.current_time())

    def leave(self, ticket: Ticket, verdict: Verdict) -> None:
        """Give up everything.  Total: right in every state that a ticket can be in."""
        self._settle(ticket, self.waitroom.leave, verdict)

    def pump(self) -> None:
        """Something may have become free: call whoever can be placed."""
        if not self.waitroom.is_anybody_waiting():
            return
        for ticket in self.waitroom.pump(trio.current_time()):
            if ticket in self._calls:
                self._calls[ticket].set()

    def _settle(
        self,
        ticket: Ticket,
        settle: Callable[[Ticket, Verdict, float], Transition | None],
        verdict: Verdict,
    ) -> None:
        slot = ticket.outcome
        transition = settle(ticket, verdict, trio.current_time())
        if transition is not None and isinstance(slot, Slot):
            self.on_transition(slot.endpoint, transition)
        if self.on_room is not None:
            self.on_room()
        self.pump()
