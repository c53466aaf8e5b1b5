"""When to stop asking an endpoint, and when to ask again.

Theory of operation.  A breaker is *closed* while its endpoint does its job.  It *opens* after a
number of failures in a row, or at a failure with which too large a share of a sliding window has
failed, and then refuses everything for a while; a success never opens it.  When that while is
over it is *half-open*: exactly one request, the probe, is let through, and its result closes or
re-opens the breaker.  OPEN to HALF_OPEN is a fact about time, not an event, so nothing has to run
for it and there is no timer to leak.

Every transition starts a new *era*.  A permit carries the era it was given in, so a straggler
from before the last transition says nothing about the endpoint as it is now.  A request that
was cancelled reports NO_OPINION: the probe slot comes back and nothing is learnt.  Breakers
without that verdict stay half-open for ever when the probing client hangs up.

Pure: no clock, no I/O, no logging.  Every method takes ``now`` and returns what happened.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable

import attrs

from citadel_gateway.policy.sliding_window import Window

_STEADY = 10  # successes in a row after which earlier trips are forgotten
_LONGEST = 5  # times the first rest


class Verdict(enum.Enum):
    """What a request says about the endpoint, as opposed to about itself."""

    GOOD = "good"
    BAD = "bad"
    NO_OPINION = "none"


class State(enum.Enum):
    CLOSED = "closed"
    HALF_OPEN = "half_open"
    OPEN = "open"


@attrs.frozen(kw_only=True)
class BreakerPolicy:
    """Numbers of a breaker; durations are seconds."""

    threshold: int = 5
    rest: float = 60.0
    failure_ratio: float = 0.5
    window: float = 30.0
    min_requests: int = 20


@attrs.frozen
class Permit:
    """Leave to send one request; give it back with :meth:`CircuitBreaker.settle`, once."""

    era: int
    probe: bool


@attrs.frozen
class Transition:
    before: State
    after: State
    why: str


@attrs.define
class CircuitBreaker:
    """One endpoint's breaker.

    :param jitter: returns a number from 0 to 1; spreads rests by +-10 %.
    :param may_try: whether it is up to us to send the probe; else to another gateway, whose
        breaker this one follows.
    """

    policy: BreakerPolicy
    jitter: Callable[[], float]
    may_try: bool = attrs.field(default=True, init=False)
    _state: State = attrs.field(default=State.CLOSED, init=False)
    _era: int = attrs.field(default=0, init=False)
    _failures: int = attrs.field(default=0, init=False)
    _successes: int = attrs.field(default=0, init=False)
    _trips: int = attrs.field(default=0, init=False)
    _open_until: float = attrs.field(default=-math.inf, init=False)
    _probe_out: bool = attrs.field(default=False, init=False)
    _window: Window = attrs.field(init=False)
    _permit: Permit = attrs.field(default=Permit(0, probe=False), init=False)  # of this era

    def __attrs_post_init__(self) -> None:
        self._window = Window(self.policy.window)

    def renew(self, policy: BreakerPolicy) -> None:
        """Go by other numbers from now on; what was learnt stays."""
        if policy.window != self.policy.window:
            self._window = Window(policy.window)
        self.policy = policy

    def state(self, now: float) -> State:
        if self._state is State.OPEN and now >= self._open_until:
            return State.HALF_OPEN
        return self._state

    def would_admit(self, now: float) -> bool:
        """Whether :meth:`admit` would give a permit; changes nothing."""
        if self._state is State.CLOSED:
            return True
        return self.may_try and not self._probe_out and self.state(now) is State.HALF_OPEN

    def admit(self, now: float) -> Permit | None:
        """Leave to send one request, or ``None``; :meth:`retry_after` says for how long."""
        if self._state is State.CLOSED:
            return self._permit
        if not self.would_admit(now):
            return None
        self._probe_out = True
        return Permit(self._era, probe=True)

    def retry_after(self, now: float) -> float:
        """Seconds until a request may be let through.

        1 while a probe is out or up to others, 0 when closed.
        """
        match self.state(now):
            case State.CLOSED:
                return 0.0
            case State.OPEN:
                return self._open_until - now
            case State.HALF_OPEN:
                return 0.0 if self.may_try and not self._probe_out else 1.0

    def settle(self, permit: Permit, verdict: Verdict, now: float) -> Transition | None:
        """Record how the permitted request went."""
        if permit.era != self._era:
            return None  # a straggler from before the last transition
        if permit.probe:
            self._probe_out = False
        match verdict:
            case Verdict.NO_OPINION:
                return None
            case Verdict.GOOD:
                return self._good(permit, now)
            case Verdict.BAD:
                return self._bad(permit, now)

    def ripen(self, now: float) -> Transition | None:
        """Note that a rest is over, for whoever reports transitions; changes no decision."""
        if self._state is State.OPEN and now >= self._open_until:
            self._state = State.HALF_OPEN
            return Transition(State.OPEN, State.HALF_OPEN, "rest is over")
        return None

    @property
    def trips(self) -> int:
        """How often it has opened without a long good time in between."""
        return self._trips

    @property
    def is_trying(self) -> bool:
        """Whether a probe is out."""
        return self._probe_out

    def follow_open(self, until: float, trips: int, now: float) -> Transition | None:
        """Another gateway has found that the endpoint fails."""
        if self._state is State.OPEN and self._open_until >= until:
            return None
        is_news = self._state is not State.OPEN
        change = self._move(State.OPEN, "another gateway's finding", now)
        self._open_until, self._trips, self._successes = until, trips, 0
        return change if is_news else None

    def follow_closed(self, now: float) -> Transition | None:
        """Another gateway's probe went well."""
        if self._state is State.CLOSED:
            return None
        return self._move(State.CLOSED, "another gateway's finding", now)

    def opens_again_at(self) -> float | None:
        """When the current rest ends, if it has not been noted yet."""
        return self._open_until if self._state is State.OPEN else None

    def _good(self, permit: Permit, now: float) -> Transition | None:
        self._failures = 0
        self._successes += 1
        if self._successes >= _STEADY:
            self._trips = 0
        if permit.probe:
            return self._move(State.CLOSED, "probe succeeded", now)
        self._window.add(now, failed=False)
        return None

    def _bad(self, permit: Permit, now: float) -> Transition | None:
        self._failures += 1
        self._successes = 0
        if permit.probe:
            return self._trip("probe failed", now)
        if self._failures >= self.policy.threshold:
            return self._trip("consecutive failures", now)
        total, bad = self._window.add(now, failed=True)
        if total >= self.policy.min_requests and bad >= total * self.policy.failure_ratio:
            return self._trip("failure ratio", now)
        return None

    def _trip(self, why: str, now: float) -> Transition:
        rest = self.policy.rest * min(2**self._trips, _LONGEST)
        self._trips += 1
        self._successes = 0
        change = self._move(State.OPEN, why, now)
        self._open_until = now + rest * (0.9 + 0.2 * self.jitter())
        return change

    def _move(self, after: State, why: str, now: float) -> Transition:
        change = Transition(self.state(now), after, why)
        self._state = after
        self._era += 1
        self._permit = Permit(self._era, probe=False)
        self._failures = 0
        self._probe_out = False
        self._window.clear()
        return change
