"""How an endpoint that comes back gets its share again: a little at first, then more and more.

It may have to compile its kernels and to fill its caches, and the crowd that has been waiting for
it would find it cold.  The share of its weight and of its concurrency grows linearly over a
window, from a tenth, as in Envoy's slow start mode.  It grows in steps, so that between two of
them nothing changes: whoever keeps endpoints in order looks at one that is warming up ten times,
and whoever waits for it need be called no more often.
"""

from __future__ import annotations

import math

import attrs

_STEPS = 10


@attrs.frozen
class SlowStart:
    """:param window: seconds until an endpoint that came back has its whole share; 0 for none."""

    window: float

    def share(self, since: float, now: float) -> float:
        """What an endpoint that came back at *since* gets of its share, from 0.1 to 1."""
        step = 1
        while step < _STEPS and now >= self._reached(step + 1, since):
            step += 1
        return step / _STEPS

    def next_step(self, share: float, since: float) -> float:
        """When it gets more than *share*; infinity if that is all."""
        if share == 1.0:
            return math.inf
        return self._reached(round(share * _STEPS) + 1, since)

    def _reached(self, step: int, since: float) -> float:
        return since + self.window * step / _STEPS


NO_SLOW_START = SlowStart(0.0)
