"""A model of an engine with continuous batching, in virtual time and without any waiting.

As in Orca (Yu et al., OSDI 2022) and the engines after it: in each iteration every sequence of the
batch gets a token, requests that have arrived join the batch if it has room, and their prompts are
computed first.  An iteration takes longer, the more sequences and prompt tokens it has.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

import attrs

from citadel_gateway.policy.adaptive import AdaptiveLimit, Kind, Sample


@attrs.define
class Engine:
    """Times are seconds.

    :param slots: sequences that a batch may have; others wait inside the engine.
    :param base: of an iteration, however small.
    :param refuses_at: requests in all, from which on it answers 429.
    """

    slots: int = 32
    base: float = 0.025
    per_sequence: float = 0.0002
    per_prompt_token: float = 0.00004
    refuses_at: int | None = None

    def be_slower_by(self, factor: float) -> None:
        self.base *= factor
        self.per_sequence *= factor
        self.per_prompt_token *= factor

    def iteration(self, sequences: int, prompt_tokens: int) -> float:
        return self.base + self.per_sequence * sequences + self.per_prompt_token * prompt_tokens


@attrs.define(eq=False)
class Running:
    prompt: int
    answer: int
    left: int
    began: float
    in_flight: int
    is_new: bool = True


@attrs.define(eq=False)
class Trial:
    """Clients who ask again as soon as they are answered, as many as *offered* says.

    :param fixed: the limit, if it is not to adapt.
    :param whole: the answers are no streams.
    :param trace: the limit after every iteration, with its time.
    :param first_tokens: when there was one, and how long it had taken.
    """

    engine: Engine
    limit: AdaptiveLimit | None
    offered: Callable[[float], int]
    seed: int = 0
    fixed: int = 0
    whole: bool = False
    now: float = 0.0
    tokens: int = 0
    sent: int = 0
    refused: int = 0
    first_tokens: list[tuple[float, float]] = attrs.field(factory=list)
    trace: list[tuple[float, int]] = attrs.field(factory=list)
    _waiting: deque[Running] = attrs.field(factory=deque, init=False)
    _batch: list[Running] = attrs.field(factory=list, init=False)
    _rng: random.Random = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._rng = random.Random(self.seed)

    def run(self, until: float) -> Trial:
        while self.now < until:
            self._send()
            self._iterate()
            self.trace.append((self.now, self.limit.limit if self.limit else self.fixed))
        return self

    def mean_limit(self, since: float) -> float:
        limits = [limit for at, limit in self.trace if at >= since]
        return sum(limits) / len(limits)

    @property
    def in_flight(self) -> int:
        return len(self._waiting) + len(self._batch)

    def _send(self) -> None:
        refusals = 0
        while self.in_flight < min(
            self.limit.limit if self.limit else self.fixed, self.offered(self.now)
        ):
            if self.engine.refuses_at is not None and self.in_flight >= self.engine.refuses_at:
                self._learn(Kind.REFUSED, 0, self.now, self.in_flight + 1)
                self.refused += 1
                refusals += 1
                if refusals == 4:  # the others wait for a moment
                    break
                continue
            self.sent += 1
            prompt = min(4000, int(self._rng.lognormvariate(6, 0.8)))
            answer = 1 + int(self._rng.expovariate(1 / 150))
            self._waiting.append(Running(prompt, answer, answer, self.now, self.in_flight + 1))

    def _iterate(self) -> None:
        prompt_tokens = 0
        while self._waiting and len(self._batch) < self.engine.slots:
            joining = self._waiting.popleft()
            self._batch.append(joining)
            prompt_tokens += joining.prompt
        self.now += self.engine.iteration(len(self._batch), prompt_tokens)
        for each in self._batch:
            self.tokens += 1
            each.left -= 1
            if each.is_new:
                self.first_tokens.append((self.now, self.now - each.began))
            if each.is_new and not self.whole:
                self._learn(Kind.STREAM, each.prompt, each.began, each.in_flight)
            each.is_new = False
        if self.whole:
            for each in self._batch:
                if not each.left:
                    self._learn(Kind.WHOLE, each.answer, each.began, each.in_flight)
        self._batch = [each for each in self._batch if each.left]

    def _learn(self, kind: Kind, size: int, began: float, in_flight: int) -> None:
        if self.limit is not None:
            sample = Sample(
                kind=kind,
                size=size,
                seconds=self.now - began,
                began=began,
                in_flight=max(in_flight, self.in_flight),
            )
            self.limit.learn(sample, self.now)
