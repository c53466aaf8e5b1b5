"""Which of two decisions came later, where several gateways decide and tell each other.

A stamp is a time in milliseconds, and below it some bits of who decided, so that no two are the
same.  It is later than any that is known, also where clocks differ, or go back (Lamport, "Time,
clocks, and the ordering of events in a distributed system", 1978).
"""

from __future__ import annotations

from zlib import crc32

import attrs

_WHO = 16  # bits


@attrs.define
class Stamps:
    """Of one who decides."""

    _latest: int = attrs.field(default=0, init=False)  # milliseconds

    def make(self, who: str, now: float) -> int:
        """:param now: seconds, by a clock that all share, more or less."""
        self._latest = max(int(now * 1000), self._latest + 1)
        return self._latest << _WHO | crc32(who.encode()) % (1 << _WHO)

    def see(self, stamp: int) -> None:
        """Another one has decided something."""
        self._latest = max(self._latest, stamp >> _WHO)
