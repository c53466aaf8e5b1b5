"""When a worker that has died is replaced: at once, unless its predecessors died young, too."""

from __future__ import annotations

import attrs


@attrs.define
class Respawn:
    """For one place among the workers.

    The first replacement waits for nothing; those of workers that live for less than *young*
    seconds wait for pauses that double from *pause* to *longest*.
    """

    pause: float = 0.5
    longest: float = 30.0
    young: float = 60.0
    _deaths: int = attrs.field(default=0, init=False)

    def died(self, lived: float) -> float:
        """Seconds to wait before the next one, after one that *lived* so long."""
        if lived >= self.young:
            self._deaths = 0
        self._deaths += 1
        if self._deaths == 1:
            return 0.0
        return min(self.pause * 2.0 ** min(self._deaths - 2, 16), self.longest)
