"""One run: a gateway, its engines and its clients, from the first probe to the last goodbye."""

from __future__ import annotations

import random
import re
import traceback
from collections.abc import Mapping
from contextlib import ExitStack, closing, suppress
from functools import partial
from typing import Any, NoReturn
from unittest import mock

import attrs
import orjson
import trio
from trio.testing import MockClock

from citadel_gateway.app import service as service_module
from citadel_gateway.app.service import UnifiedAPIGatewayService
from citadel_gateway.config.schema import GatewayConfigSchema
from citadel_gateway.config.structure import make_converter
from citadel_gateway.io.logs import JsonLog
from citadel_gateway.io.metrics import Levels
from citadel_gateway.io.resolver import Resolver
from citadel_gateway.policy.circuit_breaker import State
from tests.sim.clients import Client, Seen
from tests.sim.draw import AskPlan, ClientPlan, Habit, Scenario, draw
from tests.sim.engines import Engine, Fleet
from tests.sim.history import History, task_tree
from tests.sim.waiting import WaitWatch
from tests.sim.wires import Door
from tests.support.gateway import Meter, repeatable
from tests.support.raw_client import NoResponseError, RawClient

_LAST_MISCHIEF = 4.2  # seconds: engines' last, and until no connection from before is kept
SETTLES = 0.25  # seconds after which nothing of the traffic may be left
_MOST_TURNS = 5_000  # of the scheduler, in one instant
_CONVERTER = make_converter({})  # making one takes longer than a whole run

MetricName = tuple[str, frozenset[tuple[str, str]]]


@attrs.define(eq=False)
class SimLog(JsonLog):
    """Keeps the lines, with their time, and tells the history; writes nothing."""

    history: History = attrs.field(factory=History)
    lines: list[tuple[float, dict[str, Any]]] = attrs.field(factory=list, init=False)

    def write(self, fields: Mapping[str, Any]) -> None:
        line = orjson.loads(orjson.dumps(dict(fields)))
        self.lines.append((trio.current_time(), line))
        self.history.note("gateway", _in_words(line))

    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()

    async def flush_for_ever(self) -> NoReturn:
        await trio.sleep_forever()


@attrs.frozen(kw_only=True)
class Rest:
    """What there was when all clients had gone."""

    tasks: int
    in_flight: dict[str, int]
    queued: int
    seats: int
    client_connections: int
    upstream_connections: int
    open_at_engines: int
    working: tuple[str, ...]


@attrs.define(eq=False)
class Run:
    """What is known about a run when it is over."""

    scenario: Scenario
    history: History = attrs.field(factory=History)
    seen: list[Seen] = attrs.field(factory=list)
    fleet: Fleet = attrs.field(factory=lambda: Fleet({}))
    lines: list[tuple[float, dict[str, Any]]] = attrs.field(factory=list)
    metrics: dict[MetricName, float] = attrs.field(factory=dict)
    tasks_before: int = 0
    rest: Rest | None = None
    healed_at: float | None = None
    unavailable: tuple[str, ...] = ()  # endpoints that did not come back in time
    to_be_probed: bool = False  # some had yet to prove themselves then
    unused: tuple[str, ...] = ()  # endpoints that got nothing though all others were full
    still_half_open: tuple[str, ...] = ()  # endpoints whose breakers did not close even then
    open_at_end: int = 0
    stopped: bool = False
    drained_at: float | None = None
    stopped_at: float | None = None
    reports: list[tuple[str, int]] = attrs.field(factory=list)  # asked for, and the status
    waited_in_vain: list[str] = attrs.field(factory=list)
    problems: list[str] = attrs.field(factory=list)

    @property
    def config(self) -> dict[str, Any]:
        return self.scenario.config


def _in_words(line: dict[str, Any]) -> str:
    if "outcome" not in line:
        told = {key: value for key, value in line.items() if key not in {"level", "event"}}
        return " ".join([f"{line['event']}:", *(f"{key}={value}" for key, value in told.items())])
    return " ".join(
        [
            f"ends {line['request_id']}: {line['outcome']} {line['status']}",
            f"after {line['duration_ms']} ms and {line['attempts']} attempts",
            *([f"at {line['endpoint']}"] if "endpoint" in line else []),
            *([f"({line['error']})"] if "error" in line else []),
        ]
    )


def simulate(seed: int) -> Run:
    """Play the run that *seed* means, in its own event loop and in virtual time."""
    return simulate_scenario(draw(seed))


def simulate_scenario(scenario: Scenario) -> Run:
    run = Run(scenario)
    door = Door(scenario.send_buffer)
    with repeatable(scenario.seed), ExitStack() as stack:
        stack.enter_context(mock.patch.object(service_module, "Server", door.server_class()))
        if not scenario.reports:  # making Quart's application takes as long as half a run
            stack.enter_context(mock.patch.object(service_module, "make_quart_app", _no_reports))
        try:
            trio.run(_World(run, door).play, clock=MockClock(autojump_threshold=0))
        except Exception:
            run.problems.append("the run has crashed:\n" + traceback.format_exc())
    return run


def _no_reports(_: object) -> Any:
    async def refuse(*_: object) -> NoReturn:
        await trio.lowlevel.checkpoint()
        raise RuntimeError("nobody asks for reports in this run")

    return refuse


@attrs.define(eq=False)
class _World:
    run: Run
    door: Door
    _task: trio.lowlevel.Task | None = attrs.field(default=None, init=False)
    _over: trio.Event = attrs.field(factory=trio.Event, init=False)

    async def play(self) -> None:
        scenario, run = self.run.scenario, self.run
        async with trio.open_nursery() as everything:
            everything.start_soon(self._watch, everything.cancel_scope)
            async with trio.open_nursery() as engines:
                run.fleet = self._make_fleet(engines)
                service = self._make_service()
                trio.lowlevel.add_instrument(WaitWatch(service, run.waited_in_vain))
                await engines.start(self._serve, service)
                await trio.sleep(0.01)
                run.tasks_before = self._count_tasks()
                with trio.CancelScope() as living:
                    async with trio.open_nursery() as lives:
                        for engine in run.fleet:
                            lives.start_soon(engine.live)
                        if scenario.drains_at is not None:
                            lives.start_soon(self._drain_later, service, scenario.drains_at)
                        if scenario.reports:
                            lives.start_soon(self._ask_for_reports)
                        await self._play_clients(scenario.clients)
                        if scenario.drains_at is not None:
                            await self._over.wait()
                        living.cancel()
                run.fleet.each(Engine.heal)
                run.healed_at = trio.current_time()
                if scenario.drains_at is None:
                    await trio.sleep(_LAST_MISCHIEF)
                    await self._recover(service)
                    await trio.sleep(SETTLES)
                    self._take_stock(service.levels())
                    self._drain(service)
                    await self._over.wait()
                run.open_at_end = sum(engine.open_connections for engine in run.fleet)
                page = (await service.metrics.render()).decode()
                run.metrics = parse_metrics(page)
                engines.cancel_scope.cancel()
            everything.cancel_scope.cancel()
        run.stopped = True

    def _make_fleet(self, nursery: trio.Nursery) -> Fleet:
        scenario = self.run.scenario
        models = scenario.config["models"]
        return Fleet(
            {
                plan.host: Engine(
                    plan,
                    models[plan.model]["upstream_model"],
                    scenario.seed,
                    self.run.history,
                    nursery,
                )
                for plan in scenario.hosts
            }
        )

    def _make_service(self) -> UnifiedAPIGatewayService:
        scenario = self.run.scenario
        log = SimLog(history=self.run.history)
        self.run.lines = log.lines
        return UnifiedAPIGatewayService(
            _CONVERTER.structure(scenario.config, GatewayConfigSchema),
            connect=self.run.fleet.connect,
            resolver=Resolver(lookup=_no_names),
            rng=random.Random(scenario.seed),
            log=log,
            sensors=Meter().sensors(),
        )

    async def _serve(
        self,
        service: UnifiedAPIGatewayService,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        self._task = trio.lowlevel.current_task()
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(service.run, handle_signals=False))
            task_status.started()
        self.run.stopped_at = trio.current_time()
        self._over.set()

    async def _play_clients(self, plans: tuple[ClientPlan, ...]) -> None:
        run = self.run
        async with trio.open_nursery() as crowd:
            for plan in plans:
                client = Client(plan, self.door.knock, run.seen, run.history)
                crowd.start_soon(client.run)

    async def _ask_for_reports(self) -> None:
        """Somebody who looks at the gateway now and then, until it is stopped."""
        keys = self.run.config["security"]["api_keys"]
        shown = [("authorization", f"Bearer sk-{keys[0]['id'][3:]}")] if keys else []
        while True:
            await trio.sleep(0.7)
            for path in ("/health", "/models/status", "/v1/models"):
                try:
                    wire = self.door.knock()
                except OSError:
                    return
                with closing(wire), suppress(NoResponseError, trio.BrokenResourceError):
                    headers = [*shown, ("x-request-id", f"report-{len(self.run.reports)}")]
                    response = await RawClient(wire).request("GET", path, None, headers)
                    self.run.reports.append((path, response.status))

    def _drain(self, service: UnifiedAPIGatewayService) -> None:
        self.run.drained_at = trio.current_time()
        self.run.history.note("operator", "stops the gateway")
        service.draining.set()

    async def _drain_later(self, service: UnifiedAPIGatewayService, at: float) -> None:
        await trio.sleep(at)
        self._drain(service)

    # After the traffic.

    async def _recover(self, service: UnifiedAPIGatewayService) -> None:
        """All faults are over: every endpoint has to come back into use, in its time."""
        run, began = self.run, trio.current_time()
        until = began + self._slowest_recovery()
        while trio.current_time() < until:
            if not _unavailable(service.levels()):
                break
            await trio.sleep(0.5)
        levels = service.levels()
        run.unavailable = _unavailable(levels)
        run.to_be_probed = bool(_in_state(State.HALF_OPEN, levels))
        before = {engine.plan.host: len(engine.jobs) for engine in run.fleet}
        hosts, plans = self._crowd_that_fills_all()
        await self._play_clients(plans)
        run.unused = tuple(
            host for host in hosts if len(run.fleet.engines[host].jobs) == before[host]
        )
        used = {run.scenario.endpoint(host) for host in hosts}
        run.still_half_open = tuple(
            url for url in _in_state(State.HALF_OPEN, service.levels()) if url in used
        )

    def _slowest_recovery(self) -> float:
        balancing = self.run.config["load_balancer"]
        rest = 5 * 1.1 * balancing["circuit_breaker_timeout"]
        probes = balancing["healthy_after"] + 1
        probed = probes * (1.1 * 5.0 + balancing["health_check_timeout"])
        longest: float = max(rest, _LONGEST_COOL_DOWN) + probed + 1.0
        return longest

    def _crowd_that_fills_all(self) -> tuple[list[str], tuple[ClientPlan, ...]]:
        """Clients that leave no endpoint without work, and who is to get some.

        Where a limit stands in the way, one request for each model is all that can be asked.
        """
        config = self.run.config
        hosts = self.run.scenario.hosts
        names = list(config["models"])
        if not config["gateway"]["model_routing_enabled"]:
            names = names[:1]
        capacity = sum(host.max_concurrent for host in hosts)
        limited = config["performance"]["rate_limiting_enabled"]
        keys = [key for key in config["security"]["api_keys"] if not key.get("allowed_models")]
        if config["security"]["api_keys"] and not keys:
            return [], ()
        fills = not limited and capacity <= config["performance"]["max_concurrent_requests"]
        fills = fills and capacity < config["service"]["max_connections"]
        plans = []
        for name in names:
            room = sum(host.max_concurrent for host in hosts if host.model == name)
            for n in range(room if fills else 1):
                key = f"sk-{keys[0]['id'][3:]}" if keys else None
                plans.append(_plain_client(f"after-{name}-{n}", name, key))
        used = [host.host for host in hosts if host.model in names] if fills else []
        return used, tuple(plans)

    def _take_stock(self, levels: Levels) -> None:
        fleet = self.run.fleet
        self.run.rest = Rest(
            tasks=self._count_tasks(),
            in_flight={e.url: e.in_flight for e in levels.endpoints if e.in_flight},
            queued=sum(levels.queue_depths.values()),
            seats=levels.in_flight,
            client_connections=levels.connections,
            upstream_connections=levels.upstream_connections,
            open_at_engines=sum(engine.open_connections for engine in fleet),
            working=tuple(job.name for job in fleet.jobs if job.end is None),
        )

    def _count_tasks(self) -> int:
        """The tasks of the gateway."""

        def count(task: trio.lowlevel.Task) -> int:
            children = (child for n in task.child_nurseries for child in n.child_tasks)
            return 1 + sum(map(count, children))

        return count(self._task) if self._task is not None else 0

    async def _watch(self, everything: trio.CancelScope) -> None:
        """No run may last for ever, neither in virtual time nor within one instant."""
        turns = _TurnCounter(everything)
        trio.lowlevel.add_instrument(turns)
        try:
            await trio.sleep(self._longest())
        finally:
            trio.lowlevel.remove_instrument(turns)
            if turns.tree:
                self.run.problems.append(f"an instant that does not end; the tasks:\n{turns.tree}")
        self.run.problems.append(
            f"not over after {trio.current_time():g} s of virtual time; the tasks:\n{task_tree()}"
        )
        everything.cancel()

    def _longest(self) -> float:
        """Everything that a client may have to wait for, one after the other, and then some."""
        config, scenario = self.run.config, self.run.scenario
        clock = config["performance"]["request_timeout_seconds"]
        stream = 60.0  # two dozen events, at the pace of the slowest engine or client
        one = clock + stream + 60.0  # the longest Retry-After that the gateway gives
        asks = max(len(client.asks) for client in scenario.clients)
        drain = config["service"]["drain_timeout"] + 10.0
        longest: float = asks * 3 * one + 2 * self._slowest_recovery() + drain
        return scenario.length + longest


_LONGEST_COOL_DOWN = 3.0  # of what engines ask for


@attrs.define(eq=False)
class _TurnCounter(trio.abc.Instrument):
    """Notices that tasks go round in circles without any time passing."""

    scope: trio.CancelScope
    tree: str = ""
    _turns: int = 0
    _now: float = -1.0

    def before_io_wait(self, timeout: float) -> None:
        now = trio.current_time()
        if now != self._now:
            self._now, self._turns = now, 0
        self._turns += 1
        if self._turns == _MOST_TURNS:
            self.tree = task_tree()
            self.scope.cancel()


def _unavailable(levels: Levels) -> tuple[str, ...]:
    return tuple(e.url for e in levels.endpoints if not e.is_available(levels.now))


def _in_state(state: State, levels: Levels) -> list[str]:
    return [e.url for e in levels.endpoints if e.breaker.state(levels.now) is state]


def _plain_client(name: str, model: str, key: str | None) -> ClientPlan:
    body = {"model": model, "messages": [{"role": "user", "content": f"say {name};"}]}
    ask = AskPlan(
        id=name, path="/v1/chat/completions", body=body, habit=Habit.PATIENT, after=0.0,
        pause=0.0, timeout=None, key=key, returns=2,
    )  # fmt: skip
    return ClientPlan(name=name, at=0.0, asks=(ask,), pipelines=False)


async def _no_names(host: str) -> list[str]:
    await trio.lowlevel.checkpoint()
    raise OSError(f"no name server knows {host}")


_SAMPLE = re.compile(r"^(citadel_gateway_\w+?)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


def parse_metrics(page: str) -> dict[MetricName, float]:
    """The gateway's counters and gauges, without histograms' buckets."""
    return {
        (name, frozenset(_LABEL.findall(labels or ""))): float(value)
        for name, labels, value in _SAMPLE.findall(page)
        if not name.endswith("_bucket")
    }
