"""Deadlines that move at every step, at the price of an attribute.

Moving the deadline of a Trio cancel scope re-orders a heap each time, and a request moves its
deadlines half a dozen times without ever reaching one.  Here a deadline is a number that somebody
looks at when the earliest of all that were set has come: most have moved on by then.  They ring
exactly on time all the same, because nobody sleeps for longer than until the earliest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NoReturn

import attrs
import trio


@attrs.define(eq=False)
class Deadline:
    """A moment in Trio's time at which *ring* is called, once; infinity means never.

    Made by :meth:`Deadlines.add`, and to be discarded by its maker.
    """

    ring: Callable[[], None]
    due: float = math.inf


@attrs.define(eq=False)
class Deadlines:
    """All deadlines of one event loop; :meth:`run` watches them."""

    # A dict, for its order: those due at the same time ring as they were made.
    _pending: dict[Deadline, None] = attrs.field(factory=dict, init=False)
    _next: float = attrs.field(default=math.inf, init=False)  # not later than any deadline
    _sleep: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)

    def add(self, ring: Callable[[], None]) -> Deadline:
        deadline = Deadline(ring)
        self._pending[deadline] = None
        return deadline

    def discard(self, deadline: Deadline) -> None:
        self._pending.pop(deadline, None)

    def move(self, deadline: Deadline, due: float) -> None:
        deadline.due = due
        if due < self._next:
            self._next = self._sleep.deadline = due

    async def run(self) -> NoReturn:
        while True:
            with trio.CancelScope(deadline=self._next) as self._sleep:
                await trio.sleep_forever()
            self._ring(trio.current_time())
            self._next = min((deadline.due for deadline in self._pending), default=math.inf)

    def _ring(self, now: float) -> None:
        for deadline in [d for d in self._pending if d.due <= now]:
            deadline.due = math.inf
            deadline.ring()
