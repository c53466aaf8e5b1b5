"""What a scenario is: two engines and what is wrong with them, requests, and a judge."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import attrs

from tests.scenarios.client import Told, ask
from tests.scenarios.engines import Engine, Mortal, MortalEngine, Upstream
from tests.scenarios.judging import Verdict, served, worst
from tests.scenarios.speech import Behaviour, speaks

_MOST_TRIES = 12
_GRACE = 0.5  # real seconds on top of a shrunk time limit, for what a pace does not shrink


@attrs.frozen(kw_only=True)
class Clocks:
    """What every gateway is given, in the benchmark's seconds, where it has such a thing.

    :param request: for a whole answer, or a first token, with everything that is tried for it.
    :param silence: for an engine to say something: the head, the first token, the next one.
    :param failures: in a row, after which an endpoint is to be left alone.
    :param rest: for which it is then left alone.
    :param health: between two probes.
    :param patience: of the client.
    """

    request: float = 30.0
    silence: float = 10.0
    failures: int = 3
    rest: float = 15.0
    health: float = 10.0
    retries: int = 2
    patience: float = 130.0


CLOCKS = Clocks()


class Shape(enum.Enum):
    WHOLE = "whole"
    STREAMED = "streamed"


BOTH = (Shape.WHOLE, Shape.STREAMED)
STREAMED = (Shape.STREAMED,)


@attrs.define(eq=False, kw_only=True)
class Stage:
    """One scenario being played in one shape: two engines, a gateway between, and both ledgers.

    :param pace: real seconds for each of the benchmark's.
    :param primary: the engine with the fault.
    :param backup: the one that could help: a second endpoint of the model, or its fallback's.
    """

    scenario: Scenario
    shape: Shape
    pace: float
    primary: Upstream
    backup: Upstream | None
    port: int = 0
    key: str = ""
    told: list[Told] = attrs.field(factory=list)

    @property
    def model(self) -> str:
        return f"{self.scenario.id}-{self.shape.value}".lower()

    @property
    def attempts(self) -> int:
        """What the engines were asked together."""
        return len(self.primary.posts) + (len(self.backup.posts) if self.backup else 0)

    @property
    def served(self) -> Verdict:
        """Whether every client got the whole answer."""
        return worst(served(told) for told in self.told)

    @property
    def last(self) -> Told:
        return self.told[-1]

    def seconds(self, benchmarks: float) -> float:
        """Real seconds for so many of the benchmark's."""
        return benchmarks * self.pace

    def in_time(self, verdict: Verdict, limit: float = CLOCKS.request) -> Verdict:
        """*verdict*, if every answer came within *limit* of the benchmark's seconds."""
        slowest = max(told.seconds for told in self.told)
        soon = slowest <= self.seconds(limit) + _GRACE
        return verdict.unless(soon, f"took {slowest / self.pace:.0f} s")

    def few_attempts(self, verdict: Verdict, most: int = CLOCKS.retries + 1) -> Verdict:
        """*verdict*, if the primary was asked no more than *most* times."""
        asked = len(self.primary.posts)
        return verdict.unless(asked <= most, f"{asked} attempts at it")

    def body(self, **fields: Any) -> dict[str, Any]:
        streamed = self.shape is Shape.STREAMED
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": "Say your sixty words."}],
            "temperature": 0,
            "seed": 1,
            "max_tokens": 200,
            "stream": streamed,
            **({"stream_options": {"include_usage": True}} if streamed else {}),
            **fields,
        }

    async def ask(self, fields: dict[str, Any] | None = None, **how: Any) -> Told:
        """One request; what it came to is kept, too.  *how* is as :func:`client.ask` takes it."""
        told = await ask(
            self.port,
            self.body(**(fields or {})),
            key=self.key,
            patience=self.seconds(CLOCKS.patience),
            **how,
        )
        self.told.append(told)
        return told

    async def ask_until_met(self, **how: Any) -> None:
        """Ask until the primary has had a request: who spreads the load may take a few."""
        for _ in range(_MOST_TRIES):
            await self.ask(**how)
            if self.primary.posts:
                return

    @property
    def engine(self) -> Engine:
        """The primary, where it runs beside the clients."""
        assert isinstance(self.primary, Engine)
        return self.primary

    @property
    def mortal(self) -> MortalEngine:
        """The primary, where it is there to be killed."""
        assert isinstance(self.primary, MortalEngine)
        return self.primary


Play = Callable[[Stage], Awaitable[object]]
Judge = Callable[[Stage], Verdict]


@attrs.frozen(kw_only=True)
class Scenario:
    """:param id: S01 to S16 are the benchmark's; others begin with X.
    :param passes: what counts as passing, in words.
    :param together: both engines serve the one model; else the backup serves its fallback.
    :param alone: may use up what a gateway's models share, so it gets a gateway of its own.
    """

    id: str
    title: str
    passes: str
    primary: Behaviour | Mortal
    backup: Behaviour | None
    together: bool
    shapes: tuple[Shape, ...]
    alone: bool
    play: Play
    judge: Judge

    def decide(self, stage: Stage) -> Verdict:
        verdict = self.judge(stage)
        return verdict.unless(bool(stage.primary.posts), "the faulty engine was not asked")


SCENARIOS: dict[str, Scenario] = {}


async def ask_until_met(stage: Stage) -> None:
    await stage.ask_until_met()


def scenario(
    name: str,
    title: str,
    *,
    primary: Behaviour | Mortal,
    backup: Behaviour | None = speaks,
    together: bool = False,
    shapes: tuple[Shape, ...] = BOTH,
    alone: bool = False,
    play: Play = ask_until_met,
) -> Callable[[Judge], Judge]:
    """Makes a judge a scenario; its docstring says what counts as passing."""

    def register(judge: Judge) -> Judge:
        SCENARIOS[name] = Scenario(
            id=name,
            title=title,
            passes=" ".join((inspect.getdoc(judge) or "").split()),
            primary=primary,
            backup=backup,
            together=together,
            shapes=shapes,
            alone=alone,
            play=play,
            judge=judge,
        )
        return judge

    return register
