"""Plays scenarios against a gateway: engines, processes of the gateway, clients, verdicts."""

from __future__ import annotations

import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path

import attrs
import trio
from bench.peers import KEY, Unavailable
from bench.processes import Process, free_ports, running

from tests.scenarios import beyond, sixteen  # noqa: F401  # they fill SCENARIOS
from tests.scenarios.client import End, Told
from tests.scenarios.engines import Engine, Mortal, Upstream, mortal_engine
from tests.scenarios.gateways import Gateway, Place
from tests.scenarios.judging import Grade, Verdict, worst
from tests.scenarios.scenario import SCENARIOS, Scenario, Shape, Stage

PACE = 0.1
_STARTS_WITHIN = 120.0
_SETTLES = 0.2  # seconds, for what the last client has set off
_LONGEST = ("S15", "X10", "X03", "X09", "X04", "X05", "S06", "S09")  # begin with these


@attrs.frozen(kw_only=True)
class Played:
    """One scenario in one shape."""

    shape: Shape
    verdict: Verdict
    asked: tuple[int, int]  # the primary, and the backup
    told: list[Told]


@attrs.frozen(kw_only=True)
class Result:
    scenario: Scenario
    played: list[Played]

    @property
    def verdict(self) -> Verdict:
        return worst(played.verdict for played in self.played)


@attrs.frozen
class Example:
    """How a gateway was started for one scenario, without the paths of this machine."""

    command: str
    config: str


@attrs.define(kw_only=True)
class Card:
    """How one gateway did, and what it was."""

    gateway: Gateway
    version: str = ""
    problem: str = ""
    examples: list[Example] = attrs.field(factory=list)
    results: list[Result] = attrs.field(factory=list)
    seconds: float = 0.0

    def count(self, grade: Grade, *, prefix: str = "") -> int:
        """How many scenarios were graded so, of those whose id begins with *prefix*."""
        return sum(
            result.verdict.grade is grade
            for result in self.results
            if result.scenario.id.startswith(prefix)
        )


def run(
    gateway: Gateway,
    *,
    only: Iterable[str] = (),
    pace: float = PACE,
    folder: Path | None = None,
) -> Card:
    """Play the scenarios called *only*, all by default.  Logs are kept in *folder*, if given."""
    names = list(only) or sorted(SCENARIOS)
    began, card = time.monotonic(), Card(gateway=gateway)
    try:
        program, card.version = gateway.install(gateway.requirement)
    except Unavailable as problem:
        card.problem = str(problem)
        return card
    found: dict[str, list[Played]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as temporary:
        exam = _Exam(gateway, program, pace, folder or Path(temporary), card, found)
        try:
            trio.run(exam.run, [SCENARIOS[name] for name in names])
        except* Unavailable as problems:
            card.problem = _first(problems)
    for name in names:
        played = sorted(found[name], key=lambda played: played.shape.value, reverse=True)
        card.results.append(Result(scenario=SCENARIOS[name], played=played))
    card.seconds = time.monotonic() - began
    return card


@attrs.define(eq=False)
class _Exam:
    gateway: Gateway
    program: str
    pace: float
    folder: Path
    card: Card
    found: dict[str, list[Played]]
    _processes: int = attrs.field(default=0, init=False)

    async def run(self, scenarios: Sequence[Scenario]) -> None:
        scenarios = sorted(scenarios, key=lambda s: s.id not in _LONGEST)
        async with AsyncExitStack() as stack:
            engines = await stack.enter_async_context(trio.open_nursery())
            stages = [
                await self._set(scenario, shape, engines, stack)
                for scenario in scenarios
                for shape in scenario.shapes
            ]
            self._show_example(stages)
            limit = trio.CapacityLimiter(self.gateway.processes)
            async with trio.open_nursery() as nursery:
                for group in self._groups(stages):
                    nursery.start_soon(self._play_group, group, limit)
            engines.cancel_scope.cancel(reason="the scenarios are over")

    def _show_example(self, stages: Sequence[Stage]) -> None:
        """What one process would be given for a scenario with a fallback."""
        stage = next((s for s in stages if s.backup and not s.scenario.together), stages[0])
        place = Place(folder=self.folder, port=8000, metrics_port=9090)
        if self.gateway.launch is None:
            return
        launch = self.gateway.launch(self.program, place, [stage], self.pace)
        words = [Path(word).name if word.startswith("/") else word for word in launch.command]
        env = [f"{name}={value}" for name, value in launch.env.items()]
        self.card.examples.append(Example(" ".join([*env, *words]), launch.config))

    def _groups(self, stages: Sequence[Stage]) -> list[list[Stage]]:
        """One for each process: the lonely ones, and the others spread evenly."""
        lonely = [[stage] for stage in stages if stage.scenario.alone]
        others = [stage for stage in stages if not stage.scenario.alone]
        count = -(-len(others) // self.gateway.stages_each)
        return [*lonely, *(others[i::count] for i in range(count))]

    async def _set(
        self, scenario: Scenario, shape: Shape, nursery: trio.Nursery, stack: AsyncExitStack
    ) -> Stage:
        name = f"{scenario.id}-{shape.value}".lower()
        if isinstance(scenario.primary, Mortal):
            primary: Upstream = await stack.enter_async_context(
                mortal_engine(name, scenario.primary)
            )
        else:
            primary = engine = Engine(name, scenario.primary, self.pace)
            await engine.listen(nursery)
        backup: Engine | None = None
        if scenario.backup is not None:
            backup = Engine(f"{name}-backup", scenario.backup, self.pace)
            await backup.listen(nursery)
        return Stage(
            scenario=scenario, shape=shape, pace=self.pace, primary=primary, backup=backup, key=KEY
        )

    async def _play_group(self, group: Sequence[Stage], limit: trio.CapacityLimiter) -> None:
        at_once = trio.CapacityLimiter(self.gateway.at_once)
        async with limit, self._running(group), trio.open_nursery() as nursery:
            for stage in group:
                nursery.start_soon(self._play, stage, at_once)

    @asynccontextmanager
    async def _running(self, group: Sequence[Stage]) -> AsyncIterator[None]:
        """A process of the gateway in front of the engines of *group*, warm."""
        if self.gateway.inside is not None:
            async with trio.open_nursery() as nursery:
                for stage in group:
                    stage.port = await self.gateway.inside(stage, nursery)
                yield
                nursery.cancel_scope.cancel(reason="the scenarios are over")
            return
        assert self.gateway.launch is not None
        self._processes += 1
        own = self.folder / f"{self.gateway.name}-{self._processes}"
        own.mkdir()
        port, metrics_port = free_ports(2, 21000 + 20 * self._processes)
        place = Place(folder=own, port=port, metrics_port=metrics_port)
        launch = self.gateway.launch(self.program, place, group, self.pace)
        log = own / "output.log"
        with ExitStack() as stack:
            process = stack.enter_context(running(launch.command, env=launch.env, log=log))
            try:
                await self._start(group, place, log, process)
                yield
            finally:
                # Ending takes some programs seconds, in which others are still being played.
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(stack.close)

    async def _start(
        self, group: Sequence[Stage], place: Place, log: Path, process: Process
    ) -> None:
        """Wait until *process* listens and is warm.  Raises `Unavailable`."""
        with trio.move_on_after(_STARTS_WITHIN):
            port = await self._find_port(place, log, process)
            async with trio.open_nursery() as nursery:
                for stage in group:
                    stage.port = port
                    nursery.start_soon(_warm_up, stage, process, log)
            return
        raise Unavailable(f"{self.gateway.name} does not answer: {_last(log)}")

    async def _find_port(self, place: Place, log: Path, process: Process) -> int:
        while True:
            _check_runs(process, log)
            port = self.gateway.find_port(place, _written(log))
            if port is not None:
                return port
            await trio.sleep(0.02)

    async def _play(self, stage: Stage, at_once: trio.CapacityLimiter) -> None:
        async with at_once:
            stage.primary.begin()
            if stage.backup is not None:
                stage.backup.begin()
            await stage.scenario.play(stage)
        await trio.sleep(_SETTLES)
        asked = len(stage.primary.posts), stage.attempts - len(stage.primary.posts)
        self.found[stage.scenario.id].append(
            Played(
                shape=stage.shape,
                verdict=stage.scenario.decide(stage),
                asked=asked,
                told=stage.told,
            )
        )


async def _warm_up(stage: Stage, process: Process, log: Path) -> None:
    """Until the engine that will be at fault has answered well."""
    while True:
        _check_runs(process, log)
        told = await stage.ask()
        if told.end is End.WHOLE and stage.primary.posts:
            stage.told.clear()
            return
        await trio.sleep(0.05)


def _first(problems: BaseExceptionGroup[Unavailable]) -> str:
    problem: BaseException = problems
    while isinstance(problem, BaseExceptionGroup):
        problem = problem.exceptions[0]
    return str(problem)


def _check_runs(process: Process, log: Path) -> None:
    if process.poll() is not None:
        raise Unavailable(f"ended with code {process.returncode}: {_last(log)}")


def _written(log: Path) -> str:
    return log.read_text("utf-8", "replace")


def _last(log: Path) -> str:
    lines = _written(log).strip().splitlines()
    return lines[-1][:300] if lines else "it has said nothing"
