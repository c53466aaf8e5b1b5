"""Units of a rate limit that a gateway takes in advance, so that it need not ask for each.

Theory of operation.  Where a store keeps the buckets of several gateways, each of them may take
some units ahead along with the one that it needs, and has them for a moment: a *lease*.  While it
lasts, its requests spend from it and ask nobody.

No limit gets any wider by that.  What is taken ahead is spent at once, as if at the end of the
lease: a bucket that fills up meanwhile has no room for what is leased, so what it holds and all
that is leased from it are together never more than its burst.  What has not been used by the end
is lost, which is a part of one lease and therefore little:

- a gateway asks for one less than it expects to need in half of a lease, by what it needed in that
  time or since it asked last; so two requests that follow each other by chance cost nothing, and it
  begins with little;
- the upper half of a bucket is all that is leased, an eighth of what is left of that at a time, so
  close to the limit every request is decided by itself and nobody is refused for what others have;
- a lease lasts a hundredth of the time in which the bucket fills up, and never long.
"""

from __future__ import annotations

import math

import attrs

_LONGEST = 0.05  # seconds
_PART = 0.01  # of the bucket's time to fill up
_EXPECTED = 0.5  # of a lease, that what is asked for should suffice for
_CHANCE = 1  # of what is expected, which may be chance


def length_of(depth: float) -> float:
    """Seconds that a lease from a bucket lasts which fills up in *depth* seconds."""
    return min(_LONGEST, depth * _PART)


def units_ahead(wanted: int, tat: float, now: float, step: float, depth: float) -> int:
    """How many may be leased of a bucket that is full at *tat*."""
    start = max(tat, now + length_of(depth))
    return max(0, min(wanted, math.floor((now + depth / 2 - start) / step / 8)))


@attrs.define(eq=False)
class TokenLease:
    """What one gateway has taken ahead of one bucket.  Its time is the gateway's own.

    :param left: units that it has not used.
    :param until: when they are lost.
    :param used: requests that were let through in half a lease, or since it last asked for units.
    """

    _began: float  # when what is used is counted from
    left: int = attrs.field(default=0, init=False)
    until: float = attrs.field(default=-math.inf, init=False)
    used: int = attrs.field(default=0, init=False)
    _is_asking: bool = attrs.field(default=False, init=False)

    def spend(self, now: float) -> bool:
        """Use a unit, if there is one."""
        if not self.left:
            return False
        if now >= self.until:
            self.left = 0
            return False
        self.left -= 1
        self.used += 1
        return True

    def give_back(self, until: float) -> None:
        """A unit that was not needed after all, if it is still good."""
        self.used -= 1
        if until == self.until:
            self.left += 1

    def ask(self, now: float, length: float) -> int:
        """How many units to take ahead; until :meth:`receive`, nobody asks for more."""
        if self._is_asking:
            return 0
        lasted, within = now - self._began, length * _EXPECTED
        expected = self.used * within / max(lasted, within)
        if lasted >= within:
            self._began, self.used = now, 0  # else the next time tells of this time, too
        wanted = max(0, int(expected) - _CHANCE)
        self._is_asking = wanted > 0
        return wanted

    def receive(self, units: int, until: float) -> None:
        """What was asked for, or nothing."""
        self._is_asking = False
        if units:
            self.left, self.until = units, until
