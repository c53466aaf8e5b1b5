"""Whether a failed request may be sent again, and what its failure says about the endpoint.

A request that provably was not executed may always go elsewhere.  One that may have been, only
once, and only if it leaves nothing behind at the engine.  Retries and fallbacks share a budget in
proportion to the traffic, so that an outage is not multiplied by its own retries.
"""

from __future__ import annotations

import enum

import attrs

from citadel_gateway.policy.circuit_breaker import Verdict

_SPAN = 10  # seconds of traffic that the budget looks back on


class Retry(enum.Enum):
    """Whether another endpoint may be asked."""

    SAFE = "safe"  # provably not executed
    AMBIGUOUS = "ambiguous"  # may have been executed
    NEVER = "never"  # the request itself is at fault, or bytes reached the client


@attrs.frozen
class Judgement:
    retry: Retry
    verdict: Verdict


def judge_status(status: int, *, has_retry_after: bool) -> Judgement:
    """What an upstream's complete answer with an error *status* means.

    A status is judged about the upstream, not about the request: other 4xx are the caller's.
    """
    match status:
        case 429:
            return Judgement(Retry.SAFE, Verdict.NO_OPINION)
        case 503 if has_retry_after:
            return Judgement(Retry.SAFE, Verdict.NO_OPINION)
        case 503:
            return Judgement(Retry.SAFE, Verdict.BAD)
        case 401 | 403 | 404 | 408:
            # Our key or our model name is wrong there, or it was too slow to read what we sent;
            # another endpoint may do better.  A 4xx never counts against the breaker.
            return Judgement(Retry.SAFE, Verdict.NO_OPINION)
        case _ if status >= 500:
            return Judgement(Retry.AMBIGUOUS, Verdict.BAD)
        case _:
            return Judgement(Retry.NEVER, Verdict.NO_OPINION)


@attrs.define
class RetryBudget:
    """Retries allowed: *ratio* of the requests of the last ten seconds, and *floor* a second."""

    ratio: float
    floor: float
    _requests: list[int] = attrs.field(factory=lambda: [0] * _SPAN, init=False)
    _retries: list[int] = attrs.field(factory=lambda: [0] * _SPAN, init=False)
    _newest: int = attrs.field(default=0, init=False)

    def deposit(self, now: float) -> None:
        """A request has arrived."""
        self._requests[self._advance(now)] += 1

    def withdraw(self, now: float) -> bool:
        """Spend one retry; false when the budget is empty."""
        slot = self._advance(now)
        if sum(self._retries) >= self.ratio * sum(self._requests) + self.floor * _SPAN:
            return False
        self._retries[slot] += 1
        return True

    def _advance(self, now: float) -> int:
        current = int(now)
        for stale in range(max(self._newest + 1, current - _SPAN + 1), current + 1):
            self._requests[stale % _SPAN] = self._retries[stale % _SPAN] = 0
        self._newest = max(self._newest, current)
        return current % _SPAN
