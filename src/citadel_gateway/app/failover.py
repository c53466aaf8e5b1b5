"""Pauses between the attempts at a request, in which it holds nothing."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable

import attrs
import trio

from citadel_gateway.io.failures import UpstreamFailure
from citadel_gateway.policy import backoff
from citadel_gateway.policy.circuit_breaker import Verdict
from citadel_gateway.policy.endpoint import Endpoint
from citadel_gateway.policy.retry import Judgement, Retry

_REFUSED = Judgement(Retry.SAFE, Verdict.NO_OPINION)


@attrs.frozen(kw_only=True)
class Pause:
    """Time until the next attempt.

    :param until: in Trio's time.
    :param rests: endpoints that asked to be left alone, of which one is to be asked then.
    """

    until: float
    rests: tuple[Endpoint, ...] = ()

    async def take(self, deadline: float) -> None:
        """Wait until it is over, and longer if the endpoints ask for more meanwhile.

        Raises :class:`StillResting` once that would be too long.
        """
        until = self.until
        while True:
            await trio.sleep_until(until)
            now = trio.current_time()
            rest = _soonest(self.rests, now)
            if not rest:
                return
            if not backoff.is_worth_waiting(rest, deadline - now):
                raise StillResting(rest)
            until = now + rest


@attrs.define(eq=False)
class StillResting(Exception):
    """The endpoints that were waited for want *rest* seconds more."""

    rest: float


def pause(attempts: int, deadline: float, draw: Callable[[], float]) -> Pause | None:
    """Before another endpoint is asked; ``None`` for at once."""
    now = trio.current_time()
    seconds = backoff.pause(attempts, deadline - now, draw, same=False)
    return Pause(until=now + seconds) if seconds else None


def rest(
    failure: UpstreamFailure,
    tried: Iterable[Endpoint],
    group: Container[Endpoint],
    attempts: int,
    deadline: float,
    draw: Callable[[], float],
) -> Pause | None:
    """Until one of those in *group* may be asked again that was *tried* and asked to be left alone.

    For a request that *failure* refused when nobody else was left; ``None`` if that takes too long.
    """
    now = trio.current_time()
    rests = resting(failure, tried, group, now)
    if not rests:
        return None
    seconds, left = _soonest(rests, now), deadline - now
    if not backoff.is_worth_waiting(seconds, left):
        return None
    seconds += backoff.pause(attempts, left - seconds, draw, same=True)
    return Pause(until=now + seconds, rests=rests)


def resting(
    failure: UpstreamFailure, tried: Iterable[Endpoint], group: Container[Endpoint], now: float
) -> tuple[Endpoint, ...]:
    """Those in *group* that may be asked again later, if *failure* is such a refusal itself."""
    if failure.cool_down is None or failure.judgement != _REFUSED:
        return ()
    return tuple(e for e in tried if e in group and e.is_in_service() and now < e.cooling_until)


def _soonest(rests: Iterable[Endpoint], now: float) -> float:
    return min((endpoint.available_in(now) for endpoint in rests), default=0.0)
