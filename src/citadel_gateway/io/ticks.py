"""When those look who look every so often: all at the same moments.

An idle process pays for waking up, not for what it wakes up to do: its code and data have left the
caches meanwhile.  So whoever looks every half second does it at whole multiples of half a second,
where everybody else in the process is awake, too.
"""

from __future__ import annotations

import math
from contextvars import ContextVar

import trio

PHASE: ContextVar[float] = ContextVar("PHASE", default=0.0)
"""Seconds by which ticks are late.  Trio's clock begins anywhere in every process, so that no two
of them look at the same time; in a simulation of several in one it does not.
"""


def next_tick(period: float, about: float = 0.0) -> float:
    """The first multiple of *period* to come by Trio's clock, or the one nearest to *about* seconds
    from now.
    """
    phase, now = PHASE.get(), trio.current_time()
    since = now - phase
    number = max(math.floor(since / period) + 1, round((since + about) / period))
    tick = phase + number * period
    return tick if tick > now else tick + period  # a quotient may be rounded down


async def sleep_until_tick(period: float) -> None:
    """Sleep for *period* seconds at most, as :func:`next_tick` has it."""
    await trio.sleep_until(next_tick(period))
