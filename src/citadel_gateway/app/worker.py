"""One of several processes that are the gateway together, from its own side.

It is started with the listening sockets and with one end of a channel, over which the supervisor
says first what it is to be.  When the supervisor is gone, for whatever reason, it drains and ends.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import attrs
import trio

from citadel_gateway.app.host_report import merged_endpoints, merged_status
from citadel_gateway.app.operations import Order
from citadel_gateway.app.service import UnifiedAPIGatewayService
from citadel_gateway.config.loader import ConfigError, load_text
from citadel_gateway.config.share import has_store, portion_of, share_of
from citadel_gateway.errors import GatewayError, workers_unavailable
from citadel_gateway.io.channel import Channel, NoAnswer, first_news
from citadel_gateway.io.crowd import Crowd, Turns
from citadel_gateway.io.heap import keep_collections_short
from citadel_gateway.io.listening import Inherited
from citadel_gateway.io.logs import JsonLog
from citadel_gateway.io.ticks import sleep_until_tick
from citadel_gateway.io.workers import (
    CROWD_DESCRIPTOR,
    NOT_FOR_WORKERS,
    SUPERVISOR_DESCRIPTOR,
    Orders,
    Said,
)

_BEAT = 1.0  # seconds between two signs of life, and pages of metrics that nobody has asked for
_PAGE_IDLE = 10.0  # while no request ends: what else there is to count is not worth one a second
_PAGES_COST = 0.005  # of a core, at most
_ANSWERS_WITHIN = 3.0
_LAST_WORDS = 1.0

Json = dict[str, Any]


def make_worker(environ: Mapping[str, str]) -> Worker:
    """What the supervisor wants us to be.  Raises ``ConfigError``."""
    for number in NOT_FOR_WORKERS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, NOT_FOR_WORKERS)
    descriptors = [int(environ[name]) for name in (SUPERVISOR_DESCRIPTOR, CROWD_DESCRIPTOR)]
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    sock = socket.socket(fileno=descriptors[0])
    orders = Orders(**first_news(sock))
    config = load_text(orders.text, source=orders.source, environ=os.environ)
    service = UnifiedAPIGatewayService(
        share_of(config, orders.number - 1, orders.workers),
        log=JsonLog(always={"worker": orders.number}),
        workers=orders.workers,
    )
    generation = service.generation
    generation.number, generation.digest = orders.generation, orders.digest
    service.discovery.portion = portion_of(config, orders.number - 1, orders.workers)
    service.operations.restore((model, url) for model, url in orders.cordons)
    service.operations.restore_added((model, url, said) for model, url, said in orders.added)
    return Worker(orders, service, Turns(Crowd(descriptors[1]), orders.place), sock)


@attrs.define(eq=False)
class Worker:
    """The service, and its way to the supervisor."""

    orders: Orders
    service: UnifiedAPIGatewayService
    turns: Turns
    sock: socket.socket
    channel: Channel = attrs.field(init=False)
    _news: Json = attrs.field(init=False)
    _served: trio.Event = attrs.field(factory=trio.Event, init=False)
    _paging: trio.Lock = attrs.field(factory=trio.Lock, init=False)
    _pages: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        self.channel = Channel(self.sock, self._hear, self._answer)
        self.service.host = self
        counts = {"ready": 0, "of": self.orders.workers}
        self._news = {"counts": counts, "refused": None}  # until we hear more

    async def run(self, inherited: Sequence[Inherited]) -> None:
        """Serve until the supervisor has said that it is enough.  Raises ``CannotListen``."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._mind_sigterm)
            nursery.start_soon(self._listen_to_supervisor)
            await nursery.start(partial(self._serve, inherited))
            keep_collections_short()
            self.channel.tell(Said.READY)
            nursery.start_soon(self._show_life)
            await self._served.wait()
            self.channel.tell(Said.PAGE, await self._page())
            with trio.move_on_after(_LAST_WORDS):
                await self.channel.finish()
            nursery.cancel_scope.cancel()

    async def _serve(
        self,
        inherited: Sequence[Inherited],
        task_status: trio.TaskStatus[Any] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        await self.service.run(
            handle_signals=False, inherited=inherited, turns=self.turns, task_status=task_status
        )
        self._served.set()

    async def _mind_sigterm(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM) as arriving:
            async for _ in arriving:
                self.channel.tell(Said.LEAVING)
                self.service.drain()

    async def _listen_to_supervisor(self) -> None:
        await self.channel.run()
        self.service.drain(last=not self.orders.sockets_stay)  # it has gone

    async def _show_life(self) -> None:
        metrics = self.service.metrics
        page_at = old_at = 0.0
        told = -1
        while True:
            levels = self.service.load()
            self.channel.tell(Said.BEAT, levels)
            began = trio.current_time()
            if began >= page_at and (metrics.ended != told or began >= old_at):
                told = metrics.ended
                self.channel.tell(Said.PAGE, await self._page(is_whole=False))
                now = trio.current_time()
                page_at = now + (now - began) / _PAGES_COST
                old_at = now + _PAGE_IDLE
            await sleep_until_tick(_BEAT)

    async def _page(self, *, is_whole: bool = True) -> Json:
        """Numbered, because an answer may overtake what was not asked for."""
        async with self._paging:
            render = self.service.metrics.render if is_whole else self.service.metrics.render_own
            text = (await render()).decode()
            self._pages += 1
            return {"made": self._pages, "text": text, "is_whole": is_whole}

    def _hear(self, what: str, body: Any) -> None:
        match what:
            case Said.NEWS:
                self._news = body
            case Said.DRAIN:
                self.service.drain(last=body)
            case Said.CUT:
                self.service.give_up()
            case Said.ORDER:
                peers = self.service.peers
                if peers is None or not peers.membership.is_good():  # else it has been heard there
                    self.service.operations.catch_up(body["what"], Order(**body["order"]))

    async def _answer(self, what: str, body: Any) -> Any:
        match what:
            case Said.PAGE:
                return await self._page()
            case Said.REPORT:
                report = self.service.reports.status(trio.current_time(), None)
                return {"report": report, "load": self.service.load()}
            case Said.ENDPOINTS:
                return self.service.operations.show()
            case Said.ORDER:
                return await self._obey(body)
            case Said.ADOPT:
                return await self._adopt(body)

    async def _obey(self, body: Any) -> Any:
        operations = self.service.operations
        try:
            report = await operations.carry_out(body["what"], Order(**body["order"]))
        except GatewayError:
            return None  # an endpoint that only others know, as yet
        return {"report": report, "cordons": operations.cordoned(), "added": operations.added()}

    async def _adopt(self, body: Any) -> list[str]:
        """The problems, if it is not taken."""
        self.orders = orders = attrs.evolve(self.orders, **body)
        try:
            config = await trio.to_thread.run_sync(
                lambda: load_text(orders.text, source=orders.source, environ=os.environ)
            )
            await self.service.adopt(
                share_of(config, orders.number - 1, orders.workers), orders.digest
            )
        except ConfigError as exc:
            return exc.problems
        except Exception as exc:
            self.service.note_crash("reload", exc)
            return ["an internal error; see the log"]
        return []

    # As the host of its own routes.

    async def metrics(self) -> bytes:
        page: str = await self._ask(Said.PAGE)
        return page.encode()

    def health(self, own: Json) -> Json:
        return {**own, "workers": self._news["counts"]}

    async def status(self, own: Json) -> Json:
        found = await self._ask(Said.REPORT, self.service.load())
        merged = merged_status(own, found["reports"], has_store=has_store(self.service.config))
        merged["configuration"] = {**own["configuration"], "refused": self._news["refused"]}
        return {**merged, "workers": found["workers"]}

    async def endpoints(self) -> Json:
        return merged_endpoints(await self._ask(Said.ENDPOINTS))

    async def order(self, what: str, order: Order) -> Json:
        self.service.operations.check(what, order)
        body = {"what": what, "order": attrs.asdict(order)}
        return merged_endpoints(await self._ask(Said.ORDER, body, order.within))

    async def _ask(self, what: str, body: Any = None, more: float = 0.0) -> Any:
        try:
            return await self.channel.ask(what, body, within=_ANSWERS_WITHIN + more)
        except NoAnswer:
            raise workers_unavailable() from None
