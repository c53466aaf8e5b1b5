"""When to take less on, by how much of something is used up.

Theory of operation.  A process that runs out of memory or descriptors takes everybody's requests
with it, so it gives up the cheapest things first, each at a mark of its own: keeping idle
connections, then new requests, then new connections.  What is running goes on at every level.  A
level is left only clearly below the mark at which it was entered, as what is given up at the mark
brings the use down, and would be taken up again at once.
"""

from __future__ import annotations

import enum

import attrs


class Level(enum.IntEnum):
    """What is given up; each level includes the ones below."""

    CALM = 0
    CLOSING = 1
    """Connections end with their answers."""
    REFUSING = 2
    """New inference requests are refused, and readiness is red."""
    SHUT = 3
    """New connections have to wait."""


_MARKS = {Level.CLOSING: 0.80, Level.REFUSING: 0.90, Level.SHUT: 0.95}
_CLEARLY = 0.03  # of the limit, below the mark

SOONEST, LATEST = 1.0, 5.0
"""Seconds in which to come again: nobody knows when there is room, so they had better not all
come at once."""


@attrs.frozen
class Use:
    """How much of something is used, in whatever unit *limit* has."""

    used: float
    limit: float

    @property
    def share(self) -> float:
        return self.used / self.limit


@attrs.define(eq=False)
class Watermark:
    """The level of one resource."""

    level: Level = Level.CALM

    def observe(self, share: float) -> bool:
        """Feed the share that is in use; true if :attr:`level` has changed."""
        before = self.level
        self.level = max(_reached(share), min(before, _reached(share + _CLEARLY)))
        return self.level is not before


def _reached(share: float) -> Level:
    return max((level for level, mark in _MARKS.items() if share >= mark), default=Level.CALM)


def is_near(share: float) -> bool:
    """Whether *share* is above the first mark, or not clearly below it."""
    return share >= _MARKS[Level.CLOSING] - _CLEARLY


def come_again_in(chance: float) -> float:
    """Seconds after which to come again, for a *chance* from 0 to 1."""
    return SOONEST + (LATEST - SOONEST) * chance
