"""Gateways that come, go and die, and the requests that they get: all but the bytes is real.

Each gateway is a whole service with its background tasks: the prober, the rest timers, its
meetings and its reports.  Requests pass its rate limits and its waiting room; what stands between
those two, HTTP and JSON, has nothing to do with other gateways and is left out.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.abc
import attrs
import trio
from tests.support.gateway import repeatable

from bench.fleet.far_store import FarStore, Server
from citadel_gateway.app.guard import Visitor
from citadel_gateway.app.overload import Sensors
from citadel_gateway.app.service import UnifiedAPIGatewayService
from citadel_gateway.config.loader import parse
from citadel_gateway.errors import GatewayError
from citadel_gateway.io.dial import Origin
from citadel_gateway.io.logs import JsonLog
from citadel_gateway.io.store.membership import Membership
from citadel_gateway.io.ticks import PHASE
from citadel_gateway.policy.circuit_breaker import State, Verdict
from citadel_gateway.policy.endpoint import Endpoint, Slot
from citadel_gateway.policy.waitroom import Refused, Ticket
from citadel_gateway.policy.watermarks import Use
from citadel_gateway.wire.openai_request import Kind, parse_request

MODEL = "m"
_ASK = b'{"model": "m", "messages": [{"role": "user", "content": "hi"}]}'
_HEALTHY = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
_PLENTY = Sensors(
    resident=lambda: 0,
    cgroups=list,
    descriptors=lambda: Use(0.0, 1.0),
    give_back=lambda: None,
)


class QuietLog(JsonLog):
    """Of a hundred gateways nobody reads the lines."""

    def write(self, fields: Mapping[str, Any]) -> None:
        pass

    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()


@attrs.define(eq=False)
class Engines:
    """What all endpoints together really work on, and how long somebody waited beside room.

    :param cap: requests at once.
    :param unused: seconds of places that were free while somebody waited for one.
    :param wanted: seconds of places, used or not, while somebody waited.
    """

    cap: int = 0
    probes: Counter[str] = attrs.field(factory=Counter, init=False)
    in_flight: int = attrs.field(default=0, init=False)
    waiting: int = attrs.field(default=0, init=False)
    most: int = attrs.field(default=0, init=False)
    unused: float = attrs.field(default=0.0, init=False)
    wanted: float = attrs.field(default=0.0, init=False)
    over: float = attrs.field(default=0.0, init=False)
    _since: float = attrs.field(factory=trio.current_time, init=False)

    def note(self, working: int, waiting: int) -> None:
        """So many more, or fewer, are working and waiting from now on."""
        now = trio.current_time()
        passed, self._since = now - self._since, now
        self.over += passed * max(0, self.in_flight - self.cap)
        if self.waiting:
            self.unused += passed * min(self.waiting, max(0, self.cap - self.in_flight))
            self.wanted += passed * self.cap
        self.in_flight += working
        self.waiting += waiting
        self.most = max(self.most, self.in_flight)

    def forget(self) -> None:
        """Begin to count anew."""
        self.note(0, 0)
        self.unused = self.wanted = self.over = 0.0
        self.most = self.in_flight
        self.probes.clear()


class ProbeStream(anyio.abc.ByteStream):
    """A connection to an endpoint that is well, and does not have to think about it."""

    def __init__(self, engines: Engines, host: str) -> None:
        self._engines, self._host, self._due = engines, host, b""

    async def send(self, item: bytes) -> None:
        await trio.lowlevel.checkpoint()
        if item.startswith(b"GET /health"):
            self._engines.probes[self._host] += 1
        self._due = _HEALTHY

    async def receive(self, max_bytes: int = 65536) -> bytes:  # noqa: ARG002
        await trio.lowlevel.checkpoint()
        if not self._due:
            await trio.sleep_forever()
        due, self._due = self._due, b""
        return due

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


@attrs.define(eq=False)
class Gateway:
    """One of them, in a task of its own.

    :param bears: of the load, compared to the others.
    """

    service: UnifiedAPIGatewayService
    store: FarStore
    engines: Engines
    bears: float = 1.0
    is_paused: bool = False
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)
    requests: trio.Nursery = attrs.field(init=False)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        PHASE.set(trio.current_time())
        with self.scope:
            async with self.service.open(), trio.open_nursery() as self.requests:
                task_status.started()
                await trio.sleep_forever()

    def die(self) -> None:
        """As by ``kill -9``: its connections end, and it says good-bye to nobody."""
        self.store.is_cut = True
        self.scope.cancel()

    @property
    def membership(self) -> Membership:
        if self.service.membership is None:
            raise RuntimeError("it shares nothing")
        return self.service.membership

    @property
    def endpoint(self) -> Endpoint:
        return next(iter(self.service.watch))

    def state(self) -> State:
        return self.endpoint.breaker.state(trio.current_time())

    async def is_let_in(self, client: str) -> bool:
        """Whether the rate limits let a request of *client* through."""
        try:
            doorkeeper, visitor = self.service.doorkeeper, Visitor(client, None)
            if doorkeeper.admit(visitor, trio.current_time()) is None:
                await doorkeeper.admit_far(visitor)
        except GatewayError:
            return False
        return True

    async def work(self, seconds: float, verdict: Verdict = Verdict.GOOD) -> bool:
        """Have a request worked on; false if it was refused a place."""
        admission, engines = self.service.admission, self.engines
        group = self.service.balancer.plan(parse_request(Kind.CHAT, _ASK)).groups[0]
        ticket = Ticket(group.name, group, group.choose_any)
        working = 0
        engines.note(0, 1)
        try:
            admission.enter(ticket)
            await admission.wait(ticket, 1000.0)
            if isinstance(ticket.outcome, Slot):
                working = 1
                engines.note(1, -1)
                await trio.sleep(seconds)
        except Refused:
            pass
        finally:
            engines.note(-working, working - 1)
            admission.leave(ticket, verdict if working else Verdict.NO_OPINION)
        return bool(working)


@attrs.define(eq=False)
class Fleet:
    """All of them, and what they share."""

    config: Any
    server: Server
    engines: Engines
    rng: random.Random
    nursery: trio.Nursery
    gateways: list[Gateway] = attrs.field(factory=list, init=False)
    _made: int = attrs.field(default=0, init=False)

    async def start(self) -> Gateway:
        """One more."""
        engines, timeout = self.engines, parse(self.config, source="fleet").store.timeout

        async def connect(origin: Origin) -> anyio.abc.ByteStream:
            await trio.lowlevel.checkpoint()
            return ProbeStream(engines, origin.host)

        store = FarStore(self.server, timeout)
        service = UnifiedAPIGatewayService(
            parse(self.config, source="fleet"),
            connect=connect,
            rng=random.Random(self.rng.random()),
            log=QuietLog(),
            sensors=_PLENTY,
            store=store,
        )
        gateway = Gateway(service, store, engines)
        self._made += 1
        gateway.membership.name = f"gateway-{self._made}"  # not by chance: a seed is to say all
        await self.nursery.start(gateway.run)
        self.gateways.append(gateway)
        return gateway

    async def stop(self, gateway: Gateway) -> None:
        self.gateways.remove(gateway)
        gateway.scope.cancel()
        await trio.lowlevel.checkpoint()

    def kill(self, gateway: Gateway) -> None:
        self.gateways.remove(gateway)
        gateway.die()


@asynccontextmanager
async def open_fleet(config: Any, count: int, seed: int, cap: int = 0) -> AsyncIterator[Fleet]:
    """*count* gateways that came within the same seconds, as in a deployment."""
    with repeatable(seed):
        rng = random.Random(seed)
        async with trio.open_nursery() as nursery:
            fleet = Fleet(config, Server(rng), Engines(cap), rng, nursery)

            async def start_later(after: float) -> None:
                await trio.sleep(after)
                await fleet.start()

            async with trio.open_nursery() as starting:
                for _ in range(count):
                    starting.start_soon(start_later, rng.uniform(0, 2))
            yield fleet
            for gateway in fleet.gateways:
                gateway.store.is_cut = True
            nursery.cancel_scope.cancel()
