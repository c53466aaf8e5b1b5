"""A simulated engine as an ASGI application: what answers under which path.

It behaves like a vLLM server that has one model: it queues, batches, streams, remembers prefixes
and forgets a client the moment it leaves.  It says of every answer that it is simulated.  All its
time is Trio's, so under a `MockClock` it is exact.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import attrs
import trio

from citadel_gateway.sim.control import Control
from citadel_gateway.sim.engine import Engine
from citadel_gateway.sim.exchange import Exchange, Handler, Message, Receive, Refusal, Send
from citadel_gateway.sim.faults import WORK_PATHS, AbortConnection, Fault, Faults, FaultStruck
from citadel_gateway.sim.ledger import Ledger
from citadel_gateway.sim.metrics import EngineMetrics
from citadel_gateway.sim.prefix_cache import PrefixCache
from citadel_gateway.sim.profile import EngineProfile
from citadel_gateway.sim.requests import check_model
from citadel_gateway.sim.scheduler import Scheduler
from citadel_gateway.sim.work import Work, strike_early

_MODELS = "/v1/models/"
_METRICS_TYPE = b"text/plain; version=0.0.4; charset=utf-8"


@attrs.define(eq=False)
class SimulatedEngine:
    """The ASGI callable.  Tests read ``scheduler`` and ``ledger`` and set ``faults``."""

    profile: EngineProfile
    scheduler: Scheduler
    ledger: Ledger
    faults: Faults
    metrics: EngineMetrics
    _work: Work
    _control: Control
    _rng: random.Random

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        match scope["type"]:
            case "lifespan":
                await _lifespan(receive, send)
            case "http":
                await self._http(Exchange(scope, receive, send))
            case other:
                raise ValueError(f"a simulated engine does not speak {other}")

    async def _http(self, exchange: Exchange) -> None:
        exchange.request_id = exchange.header(b"x-request-id") or f"{self._rng.getrandbits(64):x}"
        body = await exchange.read_body()
        if body is not None:
            await exchange.while_connected(partial(self._answer, exchange, body))

    async def _answer(self, exchange: Exchange, body: bytes) -> None:
        try:
            handler = self._find(exchange)
            if exchange.path not in WORK_PATHS and (fault := self.faults.choose(exchange.path)):
                await strike_early(exchange, fault)  # work chooses its own, by its model
            await handler(exchange, body)
        except Refusal as refusal:
            await exchange.refuse(refusal)
        except AbortConnection:
            raise
        except FaultStruck:
            return

    def _find(self, exchange: Exchange) -> Handler:
        path, method = exchange.path, exchange.method
        if path.startswith(_MODELS):
            handlers: dict[str, Handler] = {"GET": self._model}
        elif path in WORK_PATHS:
            handlers = {"POST": self._work.handle}
        else:
            handlers = self._table().get(path, {})
        if not handlers:
            raise Refusal(f"There is nothing at {path}.", 404, "NotFoundError")
        if method not in handlers:
            allow = (b"allow", ", ".join(handlers).encode("ascii"))
            raise Refusal(f"{path} does not take {method}.", 405, headers=(allow,))
        return handlers[method]

    def _table(self) -> dict[str, dict[str, Handler]]:
        return {
            "/health": {"GET": self._health},
            "/version": {"GET": self._version},
            "/metrics": {"GET": self._metrics},
            "/v1/models": {"GET": self._models},
            **self._control.routes(),
        }

    async def _health(self, exchange: Exchange, _: bytes) -> None:
        await exchange.send_whole(200, b"text/plain", b"")

    async def _version(self, exchange: Exchange, _: bytes) -> None:
        await exchange.send_json({"version": "citadel-sim"})

    async def _metrics(self, exchange: Exchange, _: bytes) -> None:
        await exchange.send_whole(200, _METRICS_TYPE, self.metrics.render())

    async def _models(self, exchange: Exchange, _: bytes) -> None:
        await exchange.send_json({"object": "list", "data": [self._card()]})

    async def _model(self, exchange: Exchange, _: bytes) -> None:
        check_model(exchange.path.removeprefix(_MODELS), self.profile)
        await exchange.send_json(self._card())

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.profile.model,
            "object": "model",
            "created": int(self._work.wall()),
            "owned_by": "citadel-sim",
            "max_model_len": self.profile.context_window,
        }


def create_engine_app(
    profile: EngineProfile,
    *,
    seed: int = 0,
    faults: Iterable[Fault] = (),
    wall: Callable[[], float] = trio.current_time,
) -> SimulatedEngine:
    """An engine of its own: nothing is shared with another one.

    :param seed: of jitter, of made-up request ids, and of which requests a fault's rate hits.
    :param wall: where ``created`` comes from; pass ``time.time`` where people look at it.
    """
    scheduler, ledger = Scheduler(profile.max_batch, profile.max_queue), Ledger()
    metrics = EngineMetrics(profile, scheduler)
    book = Faults(random.Random(f"faults {seed}"), list(faults))
    cache = PrefixCache(profile.prefix_cache_tokens)
    engine = Engine(profile, scheduler, cache, metrics, random.Random(f"jitter {seed}"))
    work = Work(engine, book, ledger, wall)
    control = Control(scheduler, ledger, book)
    ids = random.Random(f"ids {seed}")
    return SimulatedEngine(profile, scheduler, ledger, book, metrics, work, control, ids)


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
