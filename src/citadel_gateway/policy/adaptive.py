"""How many requests an endpoint should have at once, found out by measuring.

Nobody knows the right ``max_concurrent`` of a machine: too low wastes it, too high makes everybody
wait inside the engine, where no queue of ours can be fair or give up.  A batching engine does more
work with every request until its batch is full or its processor is; beyond this knee requests
only wait for each other.

*Signal.*  The time to the first token of a stream: a request that has to wait in the engine waits
before its first token, however long its answer is going to be.  It grows with the prompt, so it is
compared with what prompts of about the same length (within a factor of two) took while little was
going on.  A whole answer is compared in the same way with answers of about the same length.  The
median of several such ratios is what counts, as single ones are noise: cached prefixes, a
neighbour's long prompt.  A refusal for want of room (429, 503) or a timeout needs no comparison.

*Aim.*  Throughput over delay is largest where the delay is twice that of the idle engine, for a
queue and for an engine whose steps grow with its batch alike (Kleinrock, "Power and Deterministic
Rules of Thumb for Probabilistic Problems in Computer Communications", 1979).  Three times is aimed
at, because the delay at rest is only an estimate: an aim too low leaves a machine half idle, one
too high costs some of the time to the first token.  Where a full batch makes the knee, the delay
rises so steeply that the difference is one or two requests.

*Control.*  Additive increase and multiplicative decrease (Chiu and Jain, 1989), the increase the
square root of the limit and the decrease by the gradient of the delay, as in Gradient2 of
Netflix's concurrency-limits (2018).  Unlike there, the delay at rest is learnt only while few
requests are under way, because an average that also learns under load makes the limit creep up.
What was sent before the last decrease says nothing about the limit after it.

*Trust.*  The limit says something only while it is reached: it grows only when nearly all of it
is in use, and shrinks for slow answers only when more than half of it is.  If a machine has become
much slower for good, the limit sinks to the floor; there few requests are under way, so what they
take is the new time at rest, and it grows again.  If it has become a little slower, the limit stays
lower than need be until few are under way anyhow.
"""

from __future__ import annotations

import enum
import math
from statistics import median_low

import attrs

_TOLERANCE = 3.0  # times the time at rest
_FASTER = 0.5  # times the time at rest: then that was another
_FEW, _SOME, _MANY = 4, 8, 32  # samples that make a decision: at first, at least, at most
_BACK_OFF = 0.85  # the limit's factor when it was too much
_IN_USE = 0.8  # of the limit, for it to grow
_HALF = 0.5
_QUIET = 0.125  # of the limit: so few are no load
_STRIDE = 1.1  # a time at rest goes towards a sample by this factor, so that it becomes a median
_SHORTEST = 0.001  # seconds


class Kind(enum.Enum):
    """What a sample is about."""

    STREAM = "first token of a stream"
    WHOLE = "whole answer"
    REFUSED = "refused for want of room"
    TIMED_OUT = "timed out"


@attrs.frozen(kw_only=True)
class Sample:
    """How it went for one request.

    :param size: tokens on which the time depends: the prompt's of a stream, else the answer's.
    :param seconds: the time it took.
    :param began: when it was sent.
    :param in_flight: the most requests that were with the endpoint then or now, itself included.
    """

    kind: Kind
    size: int = 0
    seconds: float = 0.0
    began: float
    in_flight: int


@attrs.define
class AdaptiveLimit:
    """The limit of one endpoint, always from *floor* to *ceiling*.  It begins at the floor.

    Until the first sign of congestion it grows by one with each good sample, afterwards by its
    square root with as many good samples as it counts.
    """

    floor: int
    ceiling: int
    limit: int = attrs.field(init=False)
    _exact: float = attrs.field(init=False)
    _at_rest: dict[tuple[Kind, int], float] = attrs.field(factory=dict, init=False)
    _ratios: list[float] = attrs.field(factory=list, init=False)
    _last: float = attrs.field(default=1.0, init=False)  # median
    _seeking: bool = attrs.field(default=True, init=False)
    _in_flight: int = attrs.field(default=0, init=False)  # of all samples together
    _cut_at: float = attrs.field(default=-math.inf, init=False)

    def __attrs_post_init__(self) -> None:
        self.floor = min(self.floor, self.ceiling)
        self._exact, self.limit = float(self.floor), self.floor

    def renew(self, floor: int, ceiling: int) -> None:
        """Stay within other bounds from now on; all that was learnt still holds."""
        self.floor, self.ceiling = min(floor, ceiling), ceiling
        self._exact = min(max(self._exact, self.floor), self.ceiling)
        self.limit = int(self._exact)

    def learn(self, sample: Sample, now: float) -> None:
        match sample.kind:
            case Kind.REFUSED | Kind.TIMED_OUT:
                self._too_much(sample, now)
            case _:
                self._compare(sample, now)

    def _too_much(self, sample: Sample, now: float) -> None:
        if sample.began >= self._cut_at:
            self._cut(min(self._exact, sample.in_flight) * _BACK_OFF, now)

    def _compare(self, sample: Sample, now: float) -> None:
        seconds = max(_SHORTEST, sample.seconds)
        size_class = (sample.kind, sample.size.bit_length())
        at_rest = self._at_rest.get(size_class)
        if at_rest is None:
            # Whoever is first of its size has the delay that everybody has at present.
            at_rest = seconds / max(1.0, self._last)
            self._at_rest[size_class] = at_rest
        if sample.in_flight <= max(self.floor, self._exact * _QUIET):
            is_longer = seconds > at_rest
            self._at_rest[size_class] = at_rest * (_STRIDE if is_longer else 1 / _STRIDE)
        if sample.began < self._cut_at:
            return
        self._ratios.append(seconds / at_rest)
        self._in_flight += sample.in_flight
        enough = _FEW if self._seeking else min(_MANY, max(_SOME, self.limit // 2))
        if len(self._ratios) >= enough:
            self._decide(now)

    def _decide(self, now: float) -> None:
        count = len(self._ratios)
        in_flight = self._in_flight / count
        ratio = self._last = median_low(self._ratios)
        self._begin_anew()
        if ratio < _FASTER or (ratio > _TOLERANCE and in_flight <= self.floor):
            self._rescale(ratio)  # it is another machine than before
        elif ratio > _TOLERANCE:
            if in_flight >= self._exact * _HALF:
                gradient = max(_BACK_OFF, _TOLERANCE / ratio)
                self._cut(min(self._exact, in_flight) * gradient, now)
        elif in_flight >= self._exact * _IN_USE:
            root = math.sqrt(self._exact)
            self._grow(min(count, self._exact) if self._seeking else min(count / root, root))

    def _rescale(self, ratio: float) -> None:
        for size_class in self._at_rest:
            self._at_rest[size_class] *= ratio
        self._last = 1.0

    def _grow(self, by: float) -> None:
        self._exact = min(self.ceiling, self._exact + by)
        self.limit = int(self._exact)

    def _cut(self, to: float, now: float) -> None:
        self._seeking = False
        self._exact = max(float(self.floor), min(self._exact, to))
        self.limit = int(self._exact)
        self._cut_at = now
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._ratios.clear()
        self._in_flight = 0
