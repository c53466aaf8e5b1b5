"""Who runs and who waits: a batch of fixed size with a bounded queue, first come first served.

A place belongs to a ``with`` block, so a client that leaves gives it back at once wherever it
stood; the next in the queue is called in the same step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import attrs
import trio


class QueueFull(Exception):
    """The batch is full and so is the queue."""


@attrs.define(eq=False)
class Ticket:
    """A place in the batch or in the queue.

    :param tokens: what the request holds of the KV cache at this moment.
    """

    tokens: int = 0
    _called: trio.Event = attrs.field(factory=trio.Event, init=False)

    async def wait_called(self) -> None:
        await self._called.wait()

    def call(self) -> None:
        self._called.set()


@attrs.define(eq=False)
class Scheduler:
    max_batch: int
    max_queue: int
    finished: int = attrs.field(default=0, init=False)
    aborted: int = attrs.field(default=0, init=False)
    rejected: int = attrs.field(default=0, init=False)
    _running: set[Ticket] = attrs.field(factory=set, init=False)
    _waiting: deque[Ticket] = attrs.field(factory=deque, init=False)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def held_tokens(self) -> int:
        return sum(ticket.tokens for ticket in self._running)

    @contextmanager
    def place(self) -> Iterator[Ticket]:
        """Stand in line for the body; run once the ticket is called.

        Raises `QueueFull` on entry.  A cancelled body counts as aborted.
        """
        ticket = self._enter()
        try:
            yield ticket
            self.finished += 1
        except trio.Cancelled:
            self.aborted += 1
            raise
        finally:
            self._leave(ticket)

    def _enter(self) -> Ticket:
        ticket = Ticket()
        if self.running < self.max_batch:  # then nobody waits: leaving calls the next
            self._run(ticket)
        elif self.waiting < self.max_queue:
            self._waiting.append(ticket)
        else:
            self.rejected += 1
            raise QueueFull
        return ticket

    def _leave(self, ticket: Ticket) -> None:
        if ticket not in self._running:
            self._waiting.remove(ticket)
            return
        self._running.remove(ticket)
        if self._waiting:
            self._run(self._waiting.popleft())

    def _run(self, ticket: Ticket) -> None:
        self._running.add(ticket)
        ticket.call()
