"""The whole gateway in memory: its clients, its engines, its log and its metrics in one hand."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import anyio.abc
import attrs
import orjson
import trio
import trio.testing

from citadel_gateway.app.overload import Sensors
from citadel_gateway.app.service import UnifiedAPIGatewayService
from citadel_gateway.config.loader import parse
from citadel_gateway.io.departures import Departures
from citadel_gateway.io.dial import Origin
from citadel_gateway.io.http1_server import ConnectionLimits, HttpConnection
from citadel_gateway.io.logs import JsonLog
from citadel_gateway.io.resolver import Resolver
from citadel_gateway.policy.endpoint import Endpoint
from citadel_gateway.policy.watermarks import Use
from tests.support.ledger import Metrics, parse_metrics
from tests.support.memory_net import MemoryNet
from tests.support.raw_client import Headers, RawClient, RawResponse, http_request
from tests.support.scripted_engine import LedgerEntry, ScriptedEngine

CHAT = "/v1/chat/completions"
PORT = 8000
CLIENT = ("192.0.2.7", 40000)
_SETTLES = 0.1  # seconds: an engine that lingers behind its [DONE] is given half of that
_HI = [{"role": "user", "content": "hi"}]


def endpoint(host: str) -> str:
    """The URL under which the gateway knows the engine on *host*."""
    return f"http://{host}:{PORT}"


def fleet(models: Mapping[str, Mapping[str, Any] | Iterable[str]], **sections: Any) -> Any:
    """A configuration for *models*: each a list of its engines' hosts, or options of its own.

    A model with options but no endpoints has one engine, on a host of its own name.  Nothing is
    rate limited unless *sections* say so.
    """
    raw: dict[str, Any] = {"performance": {"rate_limiting_enabled": False}, "models": {}}
    for name, options in models.items():
        if isinstance(options, Mapping):
            options = {**options}
            if "endpoints" not in options:
                options.setdefault("endpoint", endpoint(name))
        else:
            options = {"endpoints": [{"url": endpoint(host)} for host in options]}
        raw["models"][name] = options
    for section, options in sections.items():
        raw[section] = {**raw.get(section, {}), **options}
    return raw


def chat(model: str | None = None, **fields: Any) -> dict[str, Any]:
    """The body of a small chat request."""
    return {**({} if model is None else {"model": model}), "messages": _HI, **fields}


def events(response: RawResponse) -> list[Any]:
    """The data of each server-sent event: parsed, unless it is [DONE]."""
    lines = [part for part in response.body.split(b"\n\n") if part]
    found = [line.removeprefix(b"data: ") for line in lines]
    return ["[DONE]" if data == b"[DONE]" else orjson.loads(data) for data in found]


def words(response: RawResponse) -> str:
    """The text that a stream has delivered, whole or cut."""
    return "".join(
        choice["delta"].get("content", "")
        for event in events(response)
        if isinstance(event, dict)
        for choice in event.get("choices", [])
    )


@attrs.define(eq=False)
class CapturedLog(JsonLog):
    """Keeps the lines instead of writing them, and needs no thread, whose time is not virtual."""

    lines: list[dict[str, Any]] = attrs.field(factory=list, init=False)

    def write(self, fields: Mapping[str, Any]) -> None:
        self.lines.append(orjson.loads(orjson.dumps(dict(fields))))

    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()


@attrs.define(eq=False)
class Meter:
    """What the gateway is told that it uses: bytes of memory, and a share of its descriptors.

    :param garbage: bytes of the memory that can be given back.
    """

    memory: int = 0
    descriptors: float = 0.0
    garbage: int = 0

    def sensors(self) -> Sensors:
        return Sensors(
            resident=lambda: self.memory,
            cgroups=list,
            descriptors=lambda: Use(self.descriptors, 1.0),
            give_back=self._give_back,
        )

    def _give_back(self) -> None:
        self.memory -= self.garbage
        self.garbage = 0


@attrs.define(eq=False)
class World:
    """A running gateway and everything around it.

    :param engines: by the host of their endpoint.
    :param crashes: what the application let escape to the server; nothing, when all is well.
    """

    service: UnifiedAPIGatewayService
    net: MemoryNet
    log: CapturedLog
    engines: dict[str, ScriptedEngine]
    nursery: trio.Nursery
    meter: Meter = attrs.field(factory=Meter)
    crashes: list[Exception] = attrs.field(factory=list, init=False)

    def client(self) -> RawClient:
        """A new connection to the gateway."""
        ours, theirs = trio.testing.memory_stream_pair()
        departures = Departures()
        departures.close()  # there is no socket to watch
        connection = HttpConnection(
            self.service.app,
            theirs,
            ConnectionLimits(),
            self.service.deadlines,
            departures,
            self.crashes.append,
            client=CLIENT,
            on_timeout=self.service.metrics.timed_out,
        )
        self.nursery.start_soon(connection.run)
        return RawClient(ours)

    async def send(
        self, method: str, path: str, json: object = None, headers: Headers = ()
    ) -> RawResponse:
        """One request over a connection of its own."""
        async with self.client() as client:
            return await client.request(method, path, json, headers)

    async def send_body(self, body: bytes, path: str = CHAT, headers: Headers = ()) -> RawResponse:
        """POST *body* as it is, over a connection of its own."""
        async with self.client() as client:
            await client.send(http_request("POST", path, None, headers, body=body))
            return await client.read_response("POST")

    async def get(self, path: str, headers: Headers = ()) -> RawResponse:
        return await self.send("GET", path, None, headers)

    async def ask(
        self, model: str | None = None, headers: Headers = (), **fields: Any
    ) -> RawResponse:
        """One chat request over a connection of its own."""
        return await self.send("POST", CHAT, chat(model, **fields), headers)

    def endpoint(self, host: str) -> Endpoint:
        """What the gateway knows about the engine on *host*."""
        return next(
            upstream.endpoint
            for upstream in self.service.balancer.upstreams
            if upstream.endpoint.url == endpoint(host)
        )

    @property
    def access_log(self) -> list[dict[str, Any]]:
        return [line for line in self.log.lines if line["event"] == "request"]

    @property
    def posts(self) -> list[LedgerEntry]:
        """What all engines together were asked."""
        return [entry for engine in self.engines.values() for entry in engine.posts]

    async def metrics_page(self) -> str:
        """The text of ``/metrics``, once all has happened that can happen now."""
        await trio.testing.wait_all_tasks_blocked()
        return (await self.service.metrics.render()).decode()

    async def metrics(self) -> Metrics:
        return parse_metrics(await self.metrics_page())

    def assert_at_rest(self) -> None:
        """Everything was given back, and nothing has gone wrong that nobody was told of."""
        service = self.service
        waitroom = service.admission.waitroom
        queues = [*service.balancer.models, "auto"]
        in_flight = {
            u.endpoint.url: u.endpoint.in_flight
            for u in service.balancer.upstreams
            if u.endpoint.in_flight
        }
        assert in_flight == {}
        assert waitroom.taken == 0
        assert {name: waitroom.depth(name) for name in queues} == dict.fromkeys(queues, 0)
        assert service.overload.buffers.used == 0
        assert service.pool.open_count == service.pool.idle_count == self.net.connections
        assert self.crashes == []
        assert [line for line in self.log.lines if line["event"] == "crash"] == []


@contextmanager
def repeatable(seed: int) -> Iterator[None]:
    """Trio shuffles the tasks that are ready; here it does so in the same way each time.

    These are the names that Trio made for Hypothesis, which has no public way to them either.
    """
    core, before = trio._core._run, trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING
    core._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc]
    core._r.seed(seed)
    try:
        yield
    finally:
        core._ALLOW_DETERMINISTIC_SCHEDULING = before  # type: ignore[misc]


@asynccontextmanager
async def running_gateway(
    config: Mapping[str, Any],
    *,
    seed: int = 0,
    addresses: Mapping[str, list[str]] | None = None,
    hosts: Iterable[str] = (),
) -> AsyncIterator[World]:
    """A gateway with a scripted engine behind each of its endpoints, all of them healthy.

    Once the body is done, everything that it began must have been given back.  The same *seed*
    gives the same run, down to which of several tasks goes first.

    :param addresses: what the name server says; change it to move engines.
    :param hosts: addresses at which there are engines, whoever may name them.
    """
    known = {} if addresses is None else addresses

    async def lookup(host: str) -> list[str]:
        await trio.lowlevel.checkpoint()
        if host not in known:
            raise OSError("no such name")
        return known[host]

    with repeatable(seed):
        async with trio.open_nursery() as nursery:
            net, log, meter = MemoryNet(nursery), CapturedLog(), Meter()

            async def connect(origin: Origin) -> anyio.abc.ByteStream:
                return await net.connect(origin.address or origin.host, origin.port)

            service = UnifiedAPIGatewayService(
                parse(dict(config), source="test"),
                connect=connect,
                resolver=Resolver(lookup=lookup),
                rng=random.Random(seed),
                log=log,
                sensors=meter.sensors(),
            )
            service.discovery.files.in_thread = _inline
            engines = {}
            named = [upstream.target.origin.host for upstream in service.balancer.upstreams]
            for host in (*named, *hosts):
                engines[host] = ScriptedEngine()
                net.listen(host, PORT, engines[host].serve)
            async with service.open(), trio.open_nursery() as connections:
                world = World(service, net, log, engines, connections, meter)
                yield world
                await trio.sleep(_SETTLES)
                world.assert_at_rest()
                connections.cancel_scope.cancel()
            nursery.cancel_scope.cancel()


async def _inline(work: Callable[[], bool]) -> bool:
    """What a thread would do, whose time is not virtual."""
    await trio.lowlevel.checkpoint()
    return work()


async def gather(*calls: Any) -> list[Any]:
    """The results of all *calls*, which are asynchronous functions without arguments."""
    results: list[Any] = [None] * len(calls)

    async def run(place: int, call: Any) -> None:
        results[place] = await call()

    async with trio.open_nursery() as nursery:
        for place, call in enumerate(calls):
            nursery.start_soon(partial(run, place, call))
    return results
