"""Requests for a fleet, by chance and unevenly, and what one bucket would have let through."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

import attrs
import trio

from bench.fleet.world import Fleet, Gateway
from citadel_gateway.policy.rate_limit import TokenBucket

_SHIFTS = 5.0  # seconds: then others get most
_TAIL = 1.2  # of the Pareto distribution of loads: the busiest tenth gets half of the requests


def spread(fleet: Fleet, rng: random.Random) -> None:
    """Let some gateways have ten times as much to do as others, or more."""
    for gateway in fleet.gateways:
        gateway.bears = min(rng.paretovariate(_TAIL), 50.0)


async def arrive(
    fleet: Fleet,
    rate: float,
    seconds: float,
    rng: random.Random,
    each: Callable[[Gateway], Awaitable[None]],
) -> None:
    """*rate* requests a second, at random times, until all of them have ended."""
    end = trio.current_time() + seconds
    shifts_at = -float("inf")
    while (now := trio.current_time()) < end:
        if now >= shifts_at:
            spread(fleet, rng)
            shifts_at = now + _SHIFTS
        there = [gateway for gateway in fleet.gateways if not gateway.is_paused]
        [gateway] = rng.choices(there, [gateway.bears for gateway in there])
        gateway.requests.start_soon(each, gateway)
        await trio.sleep(rng.expovariate(rate))


@attrs.define
class Window:
    """One second's worth: of all requests, those let in, and those that one bucket lets in."""

    asked: int = 0
    admitted: int = 0
    exact: int = 0

    @property
    def off(self) -> float:
        """Per cent above (below) what is exact."""
        return 100.0 * (self.admitted - self.exact) / max(1, self.exact)


@attrs.define
class Audit:
    """Compares the fleet with one bucket that sees every request at once.

    :param excess: the most units, ever, that were spent and not there.
    """

    rate: float
    burst: float
    width: float = 1.0
    windows: dict[int, Window] = attrs.field(factory=dict, init=False)
    excess: float = attrs.field(default=0.0, init=False)
    _exact: TokenBucket = attrs.field(init=False)
    _spent: TokenBucket = attrs.field(init=False)
    began: float = attrs.field(factory=trio.current_time, init=False)

    def __attrs_post_init__(self) -> None:
        self._exact = TokenBucket(self.rate, self.burst)
        self._spent = TokenBucket(self.rate, self.burst)

    def asked(self) -> Window:
        now = trio.current_time()
        window = self.windows.setdefault(int((now - self.began) / self.width), Window())
        window.asked += 1
        if not self._exact.wait(now):
            self._exact.spend(now)
            window.exact += 1
        return window

    def admitted(self, window: Window) -> None:
        now = trio.current_time()
        window.admitted += 1
        self._spent.spend(now)
        self.excess = max(self.excess, (self._spent.tat - now) * self.rate - self.burst)

    def between(self, start: int, end: int) -> list[Window]:
        return [self.windows.get(place, Window()) for place in range(start, end)]


def whole(windows: list[Window]) -> Window:
    return Window(
        sum(w.asked for w in windows),
        sum(w.admitted for w in windows),
        sum(w.exact for w in windows),
    )
