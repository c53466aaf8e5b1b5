"""Which of several workers on one listening socket accepts: the one with the fewest connections.

The kernel wakes every worker that waits for the socket, and who wakes first takes the connection.
That is the same one again and again, and kept connections stay where they are.  So each worker
writes down how many it holds, in memory that all of them share, and one that holds more than
another lets that one go first.  It does so for a moment only: who connects is never left waiting
for a worker that is busy, or gone.
"""

from __future__ import annotations

import mmap
import os

import attrs
import trio

PLACES = 512
_LETS_GO_FIRST = 0.003  # seconds, ten times what an idle worker needs to wake and accept


@attrs.define(eq=False)
class Crowd:
    """The counts of all workers, one place for each; 0 in it means that nobody accepts there.

    Aligned numbers of 64 bits are written and read whole, so there is no lock.

    :param descriptor: of the shared memory; from :meth:`make`, or inherited.
    """

    descriptor: int
    _page: memoryview = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        shared = mmap.mmap(self.descriptor, PLACES * 8)
        self._page = memoryview(shared).cast("q")

    @classmethod
    def make(cls) -> Crowd:
        descriptor = os.memfd_create("citadel-crowd")
        os.ftruncate(descriptor, PLACES * 8)
        return cls(descriptor)

    def note(self, place: int, connections: int) -> None:
        """The worker at *place* accepts, and holds so many."""
        self._page[place] = connections + 1

    def leave(self, place: int) -> None:
        """The worker at *place* accepts no more."""
        self._page[place] = 0

    def is_first(self, place: int) -> bool:
        """Whether no other worker holds fewer connections."""
        own = self._page[place]
        return not any(0 < other < own for other in self._page)


@attrs.frozen
class Turns:
    """One worker's place in the crowd."""

    crowd: Crowd
    place: int

    def note(self, connections: int) -> None:
        self.crowd.note(self.place, connections)

    def leave(self) -> None:
        self.crowd.leave(self.place)

    async def wait(self) -> None:
        """Let others accept first, if they hold fewer connections.  Waits for a moment at most."""
        if not self.crowd.is_first(self.place):
            await trio.sleep(_LETS_GO_FIRST)
