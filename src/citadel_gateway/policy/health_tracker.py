"""Whether an endpoint passes its probes: flips only after several results in a row."""

from __future__ import annotations

import attrs


@attrs.define
class HealthTracker:
    """Healthy after *rise* good probes in a row, unhealthy after *fall* bad ones.

    The very first probe decides alone: at start there is no earlier state to defend.
    """

    rise: int = 1
    fall: int = 3
    healthy: bool = False
    last_error: str | None = None
    observed_at: float | None = None
    _streak: int = attrs.field(default=0, init=False)
    _seen: bool = attrs.field(default=False, init=False)

    def observe(self, error: str | None, now: float) -> bool:
        """Feed one probe's result, ``None`` when it was good; true if :attr:`healthy` flipped."""
        good, self.last_error, self.observed_at = error is None, error, now
        first, self._seen = not self._seen, True
        if good == self.healthy:
            self._streak = 0
            return False
        self._streak += 1
        if not first and self._streak < (self.rise if good else self.fall):
            return False
        self.healthy, self._streak = good, 0
        return True

    def adopt(self, error: str | None, healthy: bool, now: float) -> bool:
        """Take over what somebody else who observes it has come to; true if that is a flip."""
        self.last_error, self.observed_at, self._seen, self._streak = error, now, True, 0
        flipped, self.healthy = healthy != self.healthy, healthy
        return flipped

    def in_doubt(self) -> bool:
        """Down, or on the way there: worth probing sooner than the interval says."""
        return not self.healthy or self._streak > 0
