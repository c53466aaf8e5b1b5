"""The lines in which somebody waits, by what they wait for."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Iterator

from citadel_gateway.policy.line import Line
from citadel_gateway.policy.ticket import Ticket

_REMEMBERED = 60.0  # seconds that counters outlive the last one who waited
_MOST_RESTING = 256


class Lines(dict[Hashable, Line]):
    """Lines by group; those that have become empty are remembered for a while.

    :param lower_share: of the turns that pass over lower classes, what they get.
    """

    def __init__(self, lower_share: float) -> None:
        super().__init__()
        self._lower_share = lower_share
        self._resting: OrderedDict[Hashable, tuple[float, Line]] = OrderedDict()

    def share(self, lower: float) -> None:
        """Give lower classes another share from now on."""
        self._lower_share = lower
        for line in (*self.values(), *(line for _, line in self._resting.values())):
            line.lower_share = lower

    def of(self, ticket: Ticket, now: float) -> Line:
        """The line of its group; as it was before, if that was a short while ago."""
        line = self.get(ticket.group)
        if line is None:
            since, line = self._resting.pop(ticket.group, (-math.inf, None))
            if line is None or now - since > _REMEMBERED:
                line = Line(ticket.queue, self._lower_share)
            self[ticket.group] = line
        return line

    def like(self, ticket: Ticket) -> Line:
        """The same for a look at it: an empty one if there is none."""
        return self.get(ticket.group) or Line(ticket.queue, self._lower_share)

    def rest_if_empty(self, group: Hashable, now: float) -> None:
        line = self[group]
        if line.depth:
            return
        del self[group]
        line.owed = 0.0
        if line.keeps_accounts():
            self._resting[group] = (now, line)
            if len(self._resting) > _MOST_RESTING:
                self._resting.popitem(last=False)

    def named(self, queue: str) -> Iterator[Line]:
        """All of one queue."""
        return (line for line in self.values() if line.queue == queue)
