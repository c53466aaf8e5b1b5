"""How long somebody would wait, who had better not, and when to come again."""

from __future__ import annotations

import attrs

from citadel_gateway.policy.line import Line
from citadel_gateway.policy.pace import Pace
from citadel_gateway.policy.priority import Party

_SOONEST, _LATEST = 1.0, 60.0  # seconds that somebody may be told to come again in


class Refused(Exception):
    """There is no use in waiting.

    :param retry_after: seconds until the same request would be let in, as far as can be told.
    """

    def __init__(self, retry_after: float) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


class Full(Refused):
    """No slot, and no room to wait for one."""


class TooLong(Refused):
    """Its turn would come too late: about *wait* seconds from now."""

    def __init__(self, retry_after: float, wait: float) -> None:
        super().__init__(retry_after)
        self.wait = wait


@attrs.define(eq=False)
class Forecast:
    """Predicts waits from how fast each queue moves, and from places in line.

    A place is that of a tenant among the others, not that at the end of the line: who floods a
    queue waits long, and who comes now and then does not.

    :param room: how many may wait in each line.
    """

    room: int
    _paces: dict[str, Pace] = attrs.field(factory=dict, init=False)  # by queue

    def pace(self, queue: str) -> Pace:
        pace = self._paces.get(queue)
        if pace is None:
            pace = self._paces[queue] = Pace()
        return pace

    def wait(self, line: Line, party: Party) -> float | None:
        """Seconds until one more request of *party* would have its turn; ``None``: unknown.

        The next turn is half an interval away: those who hold the slots are half done.
        """
        interval = self.pace(line.queue).interval()
        return None if interval is None else interval * (line.places_to(party) - 0.5)

    def again(self, line: Line, party: Party, within: float) -> float:
        """Seconds until *party* would be let in, if nobody else comes.

        By then one of its own must have gone, if it has so many that there was no room for
        more, and its turn must be near enough.
        """
        interval = self.pace(line.queue).interval()
        if interval is None:
            return _SOONEST
        has_room = interval * line.rivals_of(party) if line.depth >= self.room else 0.0
        is_near = interval * line.places_to(party) - within
        return min(_LATEST, max(_SOONEST, has_room, is_near))

    def refusal(self, line: Line, party: Party, within: float) -> Refused | None:
        """Why one more request of *party*, which can wait so long, should not; ``None``: it may."""
        if line.depth >= self.room and line.newest_unfair(party) is None:
            return Full(self.again(line, party, within))
        wait = self.wait(line, party)
        if wait is not None and wait > within:
            return TooLong(self.again(line, party, within), wait)
        return None
