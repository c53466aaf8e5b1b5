"""How fast a queue moves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from citadel_gateway.policy.ticket import Ticket

_RECENT = 1 / 32  # weight of the newest service time
_ENOUGH = 5  # service times that a prediction needs


@attrs.define(eq=False)
class Pace:
    """How long requests for one queue's model hold their slots, and how many do now.

    By Little's law, ``busy`` requests that take ``seconds`` each end at a rate of
    ``busy / seconds``.  So the rate is known before anybody has had to wait, and a burst of
    arrivals or of departures does not upset it.

    :param unbilled: those that hold a slot and were never charged, as nobody was waiting.
    """

    busy: int = 0
    seconds: float = 0.0
    unbilled: dict[Ticket, None] = attrs.field(factory=dict, init=False)
    _count: int = attrs.field(default=0, init=False)

    def ended(self, held: float) -> None:
        """A request gave back the slot that it *held* for so many seconds."""
        self.busy -= 1
        self._count += 1
        weight = _RECENT if self._count > 32 else 1 / self._count
        self.seconds += weight * (held - self.seconds)

    def interval(self) -> float | None:
        """Seconds between two ends, if there is enough to tell from."""
        if self._count < _ENOUGH or not self.busy:
            return None
        return self.seconds / self.busy
