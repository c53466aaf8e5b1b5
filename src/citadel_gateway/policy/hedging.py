"""When a stream has waited so long for its first token that a second endpoint is asked, too.

After Dean and Barroso, "The Tail at Scale" (CACM, 2013): the second request goes out once the first
has taken longer than 95 % of the recent ones did, so about one in twenty is sent twice, however
slow or fast the model is.

What is measured is the first attempt of each request.  One that was overtaken has no time of its
own, and counts as slower than all that have.  Without it the slow ones would be missing, and the
quantile would sink with every hedge; with the time at which it was overtaken, an endpoint that
hangs would raise the quantile with every hedge.
"""

from __future__ import annotations

import enum
import math
from bisect import bisect_left, insort
from collections import deque

import attrs

_QUANTILE = 0.95
_ENOUGH = 20  # samples: below it the quantile would be the slowest
_MOST = 500
_SPAN = 300.0  # seconds that a sample counts
_FLOOR = 0.05  # seconds: no sooner, or all of a very fast model's hiccups would be hedged


class HedgeResult(enum.Enum):
    """What came of it when it was time for a hedge."""

    WON = "won"
    LOST = "lost"
    FAILED = "failed"
    CANCELLED = "cancelled"
    NO_ROOM = "no_room"
    NO_BUDGET = "no_budget"


@attrs.define(eq=False)
class FirstTokens:
    """Recent times to the first token, exactly; infinity is longer than could be measured."""

    _by_age: deque[tuple[float, float]] = attrs.field(factory=deque, init=False)
    _by_length: list[float] = attrs.field(factory=list, init=False)

    def add(self, seconds: float, now: float) -> None:
        if len(self._by_age) == _MOST:
            self._drop_oldest()
        self._by_age.append((now, seconds))
        insort(self._by_length, seconds)

    def quantile(self, now: float) -> float | None:
        """``None`` while there are too few to tell.

        Where so many were overtaken that it is beyond what was measured, the longest that was.
        """
        while self._by_age and self._by_age[0][0] <= now - _SPAN:
            self._drop_oldest()
        lengths = self._by_length
        if len(lengths) < _ENOUGH:
            return None
        measured = bisect_left(lengths, math.inf)
        place = min(math.ceil(_QUANTILE * len(lengths)), measured)
        return lengths[place - 1] if place else None

    def _drop_oldest(self) -> None:
        _, seconds = self._by_age.popleft()
        del self._by_length[bisect_left(self._by_length, seconds)]


@attrs.define(eq=False)
class Hedging:
    """When the requests of one model are hedged.

    :param fixed: after so many seconds, whatever was measured.
    """

    fixed: float | None = None
    _seen: FirstTokens = attrs.field(factory=FirstTokens, init=False)

    def take_over(self, previous: Hedging) -> None:
        """Go on with what *previous* has seen."""
        self._seen = previous._seen

    def after(self, now: float) -> float | None:
        """Seconds without a first token after which to hedge; ``None``: not yet known."""
        if self.fixed is not None:
            return self.fixed
        seconds = self._seen.quantile(now)
        return None if seconds is None else max(_FLOOR, seconds)

    def measured(self, seconds: float, now: float) -> None:
        """So long took the first token of an attempt that was a request's first."""
        self._seen.add(seconds, now)

    def overtaken(self, now: float) -> None:
        """It was too slow to be waited for."""
        self._seen.add(math.inf, now)
