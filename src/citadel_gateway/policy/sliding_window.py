"""How many requests there were lately, and how many of them failed."""

from __future__ import annotations

import attrs

_BUCKETS = 10


@attrs.define
class Window:
    """Successes and failures of the last *span* seconds, exact to a tenth of it.

    Counted in buckets rather than as a moving average: an average never forgets, and so can
    neither say "20 requests" nor "half of them".
    """

    span: float
    _totals: list[int] = attrs.field(factory=lambda: [0] * _BUCKETS, init=False)
    _failed: list[int] = attrs.field(factory=lambda: [0] * _BUCKETS, init=False)
    _total: int = attrs.field(default=0, init=False)
    _bad: int = attrs.field(default=0, init=False)
    _newest: int = attrs.field(default=0, init=False)

    def add(self, now: float, *, failed: bool) -> tuple[int, int]:
        """Count one more; returns what :meth:`counts` would."""
        slot = self._advance(now)
        self._totals[slot] += 1
        self._total += 1
        if failed:
            self._failed[slot] += 1
            self._bad += 1
        return self._total, self._bad

    def counts(self, now: float) -> tuple[int, int]:
        """How many requests, and how many of them failed."""
        self._advance(now)
        return self._total, self._bad

    def clear(self) -> None:
        self._totals = [0] * _BUCKETS
        self._failed = [0] * _BUCKETS
        self._total = self._bad = 0

    def _advance(self, now: float) -> int:
        current = int(now * _BUCKETS / self.span)
        if current > self._newest:
            for stale in range(max(self._newest + 1, current - _BUCKETS + 1), current + 1):
                place = stale % _BUCKETS
                self._total -= self._totals[place]
                self._bad -= self._failed[place]
                self._totals[place] = self._failed[place] = 0
            self._newest = current
        return current % _BUCKETS
