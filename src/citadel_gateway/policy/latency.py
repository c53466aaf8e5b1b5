"""How slow an endpoint is, remembered pessimistically.

Peak EWMA, as in Finagle's load balancers (Twitter, 2015): a slower answer replaces the average at
once, a faster one pulls it down gradually, so trouble is seen immediately and forgiven slowly.
"""

from __future__ import annotations

import math

import attrs


@attrs.define
class PeakEwma:
    """Seconds; 0.0 until something was observed, so that an unknown endpoint gets tried."""

    tau: float = 10.0
    value: float = attrs.field(default=0.0, init=False)
    _at: float = attrs.field(default=-math.inf, init=False)

    def observe(self, latency: float, now: float) -> None:
        if latency >= self.value or self._at == -math.inf:
            self.value = latency
        else:
            keep = math.exp(-max(0.0, now - self._at) / self.tau)
            self.value = self.value * keep + latency * (1 - keep)
        self._at = now

    def at_least(self, latency: float, now: float) -> None:
        """An answer that was not waited for had taken that long already."""
        if latency > self.value:
            self.observe(latency, now)
