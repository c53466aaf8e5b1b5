"""Several processes that are the gateway together, and the small one that keeps them so.

Theory of operation.  The supervisor opens the listening sockets, starts each worker as a program of
its own, with these sockets and one end of a channel, and serves nobody itself.  A worker that dies
is replaced; whoever waits in the sockets is accepted by the others meanwhile.  A worker that cannot
start in the first place is the end of the whole start, with its exit code, because the next one
could not either.

What is one for the host is here: the configuration that counts, what operators have taken out of
service, the sums of metrics, signals, and the conversation with the service manager.
"""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import attrs
import trio

from citadel_gateway.app.host_metrics import HostMetrics
from citadel_gateway.app.listeners import say_unused
from citadel_gateway.app.reload import Reloader
from citadel_gateway.app.reload_news import ReloadNews
from citadel_gateway.app.workers import State, Worker
from citadel_gateway.config.loader import ConfigError
from citadel_gateway.config.restart import keep_what_is_fixed
from citadel_gateway.config.schema import GatewayConfigSchema
from citadel_gateway.config.share import has_store
from citadel_gateway.io.channel import Channel, NoAnswer
from citadel_gateway.io.config_file import ConfigFile
from citadel_gateway.io.crowd import PLACES, Crowd
from citadel_gateway.io.listening import (
    API,
    MONITORING_LISTENER,
    Address,
    Inherited,
    Passed,
    open_listener,
)
from citadel_gateway.io.logs import JsonLog, redact
from citadel_gateway.io.spawn import CannotSpawn
from citadel_gateway.io.systemd import Notifier, feed_watchdog
from citadel_gateway.io.ticks import sleep_until_tick
from citadel_gateway.io.workers import Orders, Said, missed_orders, spawn_worker
from citadel_gateway.policy.respawn import Respawn

_READY_WITHIN = 60.0
_LOOKS = 1.0  # seconds between two looks at who is quiet
_KILLED_AFTER = 20.0  # seconds without a sign of life
_ASLEEP = 5.0  # a gap in our own time, in which nobody could be heard
_TAKES_CONFIG = 30.0
_ANSWERS = 1.0
_MARGIN = 8.0  # seconds that a drain may take on top of what it may wait for

Json = dict[str, Any]


class WorkerFailed(Exception):
    """A worker has ended before it served, or was not ready in time.

    :param code: what to exit with if it was the first one.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@attrs.define(eq=False)
class Supervisor:
    """Keeps as many workers serving as the configuration wants.

    :param file: loaded, and valid.
    :param command: starts this program again.
    """

    config: GatewayConfigSchema
    file: ConfigFile
    command: list[str]
    notifier: Notifier
    log: JsonLog = attrs.field(factory=JsonLog)
    metrics: HostMetrics = attrs.field(init=False)
    _orders: Orders = attrs.field(init=False)
    _workers: list[Worker] = attrs.field(factory=list, init=False)
    _current: dict[int, Worker] = attrs.field(factory=dict, init=False)
    _respawns: dict[int, Respawn] = attrs.field(init=False)
    _deaths: dict[int, int] = attrs.field(factory=dict, init=False)
    _being_replaced: set[int] = attrs.field(factory=set, init=False)
    _sockets: dict[str, socket.socket] = attrs.field(factory=dict, init=False)
    _crowd: Crowd = attrs.field(factory=Crowd.make, init=False)
    _reloader: Reloader = attrs.field(init=False)
    _is_rolling: bool = attrs.field(default=False, init=False)
    _stopping: trio.Event = attrs.field(factory=trio.Event, init=False)
    _nursery: trio.Nursery = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.metrics = HostMetrics(has_store(self.config))
        self._respawns = {n: Respawn() for n in range(1, self.config.workers + 1)}
        self._reloader = Reloader(
            self.file,
            adopt=self._adopt,
            watches=lambda: self.config.service.reload_on_change,
            observer=ReloadNews(
                log=self.log,
                metrics=self.metrics,
                notifier=lambda: self.notifier,
                on_crash=self._note_crash,
                on_end=self._note_reload,
            ),
        )
        self._orders = Orders(
            number=0,
            workers=self.config.workers,
            place=0,
            source=self.file.path,
            text=self.file.text,
            digest=self.file.digest,
            generation=1,
            cordons=(),
            added=(),
            sockets_stay=False,
        )

    async def run(self, inherited: list[Inherited], on_ready: Callable[[], None]) -> None:
        """Serve until SIGTERM or SIGINT; then drain and return.

        Raises ``CannotListen`` and :class:`WorkerFailed`.

        :param on_ready: called when all workers serve.
        """
        self._open_sockets(inherited)
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._mind_signals)
            nursery.start_soon(self.log.flush_for_ever)
            try:
                await self._start_all()
                if not self._stopping.is_set():
                    self._say_ready()
                    on_ready()
                    self.log.event(logging.INFO, "all workers serve", workers=self.config.workers)
                    nursery.start_soon(self._reloader.run)
                    nursery.start_soon(self._look_after_them)
                    nursery.start_soon(partial(feed_watchdog, self.notifier, alive=self.is_well))
                    await self._stopping.wait()
                self.notifier.stopping()
                await self._drain()
            finally:
                self._stopping.set()
                for worker in self._workers:
                    worker.signal(signal.SIGKILL)
                with trio.CancelScope(shield=True):  # the kernel ends them without fail
                    for worker in [*self._workers]:
                        await worker.ended.wait()
                nursery.cancel_scope.cancel()
        self.log.event(logging.INFO, "all workers have ended")

    def is_well(self) -> bool:
        """Whether somebody serves, and no worker has stopped answering."""
        now = trio.current_time()
        return any(w.state is State.READY for w in self._workers) and not any(
            w.is_quiet(now) for w in self._workers
        )

    # Starting.

    def _open_sockets(self, inherited: list[Inherited]) -> None:
        service, monitoring = self.config.service, self.config.monitoring
        passed = Passed(inherited)
        wanted = {API: Address(service.host, service.port)}
        if monitoring.prometheus_port is not None:
            address = Address(monitoring.prometheus_host, monitoring.prometheus_port)
            wanted[MONITORING_LISTENER] = address
        for name, address in wanted.items():
            sock = passed.take(name, address.host, address.port)
            if name == API:
                self._orders = attrs.evolve(self._orders, sockets_stay=sock is not None)
            self._sockets[name] = sock or open_listener(address)
        say_unused(self.log, passed.close_rest())

    async def _start_all(self) -> None:
        """The first one alone: if it cannot start, that is said once."""
        await self._start(1)
        async with trio.open_nursery() as starting:
            for number in self._respawns:
                if number > 1 and not self._stopping.is_set():
                    starting.start_soon(self._start, number)

    async def _start(self, number: int) -> None:
        """Let another process be worker *number*; returns when it serves.

        Raises :class:`WorkerFailed`; then that process is no more.
        """
        orders = self._orders
        worker = self._spawn(number)
        self._nursery.start_soon(self._live, worker)
        with trio.move_on_after(_READY_WITHIN):
            await worker.ready.wait()
        if self._stopping.is_set():
            return
        if worker.code is not None:
            raise WorkerFailed(
                f"worker {number} ended with {worker.how_it_ended} before it was ready",
                worker.code if worker.code > 0 else 1,
            )
        if not worker.ready.is_set():
            worker.signal(signal.SIGKILL)
            raise WorkerFailed(f"worker {number} was not ready in {_READY_WITHIN:g} s", 1)
        self._current[number] = worker
        await self._catch_up(worker, orders)

    async def _catch_up(self, worker: Worker, orders: Orders) -> None:
        """Tell it what has changed since it was given its *orders*."""
        if worker.generation != self._orders.generation:
            await self._hand_over_config(worker)
        for what, order in missed_orders(orders, self._orders):
            worker.channel.tell(Said.ORDER, {"what": what, "order": order})

    def _spawn(self, number: int) -> Worker:
        """Raises :class:`WorkerFailed`."""
        place = min({*range(PLACES)} - {worker.place for worker in self._workers})
        try:
            pid, sock = spawn_worker(self.command, self._sockets, self._crowd.descriptor)
        except CannotSpawn as exc:
            raise WorkerFailed(str(exc), 1) from exc
        worker = Worker(
            number=number,
            place=place,
            pid=pid,
            channel=Channel(
                sock,
                on_news=lambda what, body: self._hear(worker, what, body),
                answer=lambda what, body: self._answer(worker, what, body),
            ),
            generation=self._orders.generation,
            began=trio.current_time(),
        )
        orders = attrs.evolve(self._orders, number=number, place=place)
        worker.channel.tell(Said.ORDERS, attrs.asdict(orders))
        worker.channel.tell(Said.NEWS, self._news())
        self._workers.append(worker)
        return worker

    async def _live(self, worker: Worker) -> None:
        """All of a worker's life, and what follows from its end."""
        await worker.run()
        self._workers.remove(worker)
        self._crowd.leave(worker.place)
        self.metrics.leave(worker.pid)
        self._spread_news()
        is_current = self._current.get(worker.number) is worker
        if is_current:
            del self._current[worker.number]
        if self._stopping.is_set() or not is_current:
            return
        if worker.code == 0:
            self.log.event(logging.INFO, "a worker has left", worker=worker.number)
        else:
            self._deaths[worker.number] = self._deaths.get(worker.number, 0) + 1
            self.metrics.died()
            self.log.event(
                logging.ERROR, "a worker died", worker=worker.number, pid=worker.pid,
                how=worker.how_it_ended,
            )  # fmt: skip
        if worker.number not in self._being_replaced:
            await self._replace(worker.number, trio.current_time() - worker.began)

    async def _replace(self, number: int, lived: float) -> None:
        """Put another one in its place, however often that takes."""
        self._being_replaced.add(number)
        try:
            while not self._stopping.is_set():
                with trio.move_on_after(self._respawns[number].died(lived)):
                    await self._stopping.wait()
                began = trio.current_time()
                try:
                    if not self._stopping.is_set():
                        await self._start(number)
                    return
                except WorkerFailed as exc:
                    lived = trio.current_time() - began
                    self.log.event(logging.ERROR, "a worker cannot start", error=str(exc))
        finally:
            self._being_replaced.discard(number)

    async def _look_after_them(self) -> None:
        """Kill who has stopped answering: it holds connections that nobody will serve."""
        looked_at = trio.current_time()
        while True:
            await sleep_until_tick(_LOOKS)
            now = trio.current_time()
            for worker in self._workers:
                if now - looked_at > _ASLEEP:
                    worker.heard_at = now
                elif worker.is_quiet(now, _KILLED_AFTER):
                    self.log.event(
                        logging.ERROR, "a worker shows no sign of life; it is killed",
                        worker=worker.number, pid=worker.pid,
                    )  # fmt: skip
                    worker.signal(signal.SIGKILL)
                    worker.heard_at = now  # for once
            self.metrics.note_workers(self.config.workers, self._count(State.READY))
            looked_at = now

    # Stopping.

    async def _mind_signals(self) -> None:
        minded = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)
        with trio.open_signal_receiver(*minded) as arriving:
            async for number in arriving:
                match number:
                    case signal.SIGHUP:
                        self._reloader.ask()
                    case signal.SIGUSR2:
                        if not self._is_rolling and not self._stopping.is_set():
                            self._is_rolling = True
                            self._nursery.start_soon(self._roll)
                    case _:
                        if self._stopping.is_set():
                            self._tell_all(Said.CUT)
                        else:
                            self._stop()

    def _stop(self) -> None:
        """Let all drain, those that still start included."""
        self._stopping.set()
        self.log.event(logging.INFO, "all workers drain", within=self.config.service.drain_timeout)
        for sock in self._sockets.values():
            sock.close()  # so that theirs are the last, and those who wait there are taken
        self._tell_all(Said.DRAIN, not self._orders.sockets_stay)
        for worker in self._ready():
            worker.state = State.DRAINING

    async def _drain(self) -> None:
        """All together, within one deadline; whoever is left is killed."""
        service = self.config.service
        within = service.lame_duck + service.drain_timeout
        with trio.move_on_after(within + _MARGIN):
            for worker in [*self._workers]:
                await worker.ended.wait()
        for worker in self._workers:
            self.log.event(logging.ERROR, "a worker did not end in time", worker=worker.number)

    # Replacing all, one after the other.

    async def _roll(self) -> None:
        """Nobody is refused: each worker goes on until its successor serves on the same socket."""
        try:
            await self._reloader.reload("before all workers are replaced")
            if self._reloader.refusal is not None:
                return  # which has been said; and nothing has changed
            self.log.event(logging.INFO, "replacing all workers")
            for number in self._respawns:
                if not await self._roll_one(number):
                    return
            self.log.event(logging.INFO, "all workers have been replaced")
        finally:
            self._is_rolling = False

    async def _roll_one(self, number: int) -> bool:
        """False: the successor cannot start, and the one that is there stays."""
        old = self._current.get(number)
        if number in self._being_replaced:
            return True  # the one that is about to start is a new one
        self._being_replaced.add(number)
        try:
            if self._stopping.is_set():
                return False
            await self._start(number)
        except WorkerFailed as exc:
            self.log.event(
                logging.ERROR, "a worker cannot be replaced; it serves on", error=str(exc)
            )
            self._being_replaced.discard(number)
            if number not in self._current:  # it died meanwhile
                await self._replace(number, 0.0)
            return False
        finally:
            self._being_replaced.discard(number)
        if old is not None and old.code is None:
            old.state = State.DRAINING
            old.channel.tell(Said.DRAIN, False)
            self._spread_news()
        return True

    # Another configuration.

    async def _adopt(self, config: GatewayConfigSchema, digest: str) -> None:
        """Let all have it.  The first one decides whether it can be had; raises ``ConfigError``."""
        orders = attrs.evolve(
            self._orders,
            text=self.file.text,
            digest=digest,
            generation=self._orders.generation + 1,
        )
        ready = self._ready()
        for first in ready[:1]:
            if problems := await self._offer(first, orders):
                raise ConfigError(self.file.path, problems)
            first.generation = orders.generation
        self._orders = orders
        self.config, _ = keep_what_is_fixed(self.config, config)
        async with trio.open_nursery() as offering:
            for worker in ready[1:]:
                offering.start_soon(self._hand_over_config, worker)

    async def _hand_over_config(self, worker: Worker) -> None:
        orders = self._orders
        if problems := await self._offer(worker, orders):
            # A process that starts with it is better off than one that serves by another.
            self.log.event(
                logging.ERROR, "a worker cannot take the configuration; it is replaced",
                worker=worker.number, problems=problems,
            )  # fmt: skip
            worker.signal(signal.SIGTERM)
        worker.generation = orders.generation

    async def _offer(self, worker: Worker, orders: Orders) -> list[str]:
        body = {"text": orders.text, "digest": orders.digest, "generation": orders.generation}
        try:
            problems: list[str] = await worker.channel.ask(Said.ADOPT, body, within=_TAKES_CONFIG)
        except NoAnswer:
            return [f"worker {worker.number} does not answer"]
        return problems

    def _note_reload(self) -> None:
        self.metrics.note_refusal(self._reloader.refusal is not None)
        self._spread_news()
        self._say_ready()

    def _note_crash(self, where: str, exc: Exception) -> None:
        self.log.event(logging.ERROR, "crash", where=where, exception=redact(repr(exc)))

    # What is said.

    def _hear(self, worker: Worker, what: str, body: Any) -> None:
        worker.heard_at = trio.current_time()
        match what:
            case Said.READY:
                worker.state = State.READY
                worker.ready.set()
                self._spread_news()
            case Said.BEAT:
                worker.load = body
            case Said.PAGE:
                self._take_page(worker, body)
            case Said.LEAVING:
                worker.state = State.DRAINING
                self._spread_news()

    async def _answer(self, worker: Worker, what: str, body: Any) -> Any:
        """What a worker wants to know, or to have done, on behalf of the whole gateway."""
        match what:
            case Said.PAGE:
                pages = await self._ask_all(Said.PAGE)
                for each, page in pages.items():
                    self._take_page(each, page)
                return self.metrics.page(trio.current_time())
            case Said.REPORT:
                worker.load = body
                found = await self._ask_all(Said.REPORT, but=worker)
                for other, answer in found.items():
                    other.load = answer["load"]
                shown = sorted(self._workers, key=lambda w: (w.number, w.began))
                return {
                    "reports": [answer["report"] for answer in found.values()],
                    "workers": [w.report(self._deaths.get(w.number, 0)) for w in shown],
                }
            case Said.ENDPOINTS:
                return [*(await self._ask_all(Said.ENDPOINTS)).values()]
            case Said.ORDER:
                return await self._carry_out(body)

    async def _carry_out(self, body: Json) -> list[Json]:
        within = _ANSWERS + body["order"]["within"]
        done = [each for each in (await self._ask_all(Said.ORDER, body, within)).values() if each]
        for each in done:
            self._orders = attrs.evolve(self._orders, cordons=each["cordons"], added=each["added"])
        return [each["report"] for each in done]

    async def _ask_all(
        self, what: str, body: Any = None, within: float = _ANSWERS, but: Worker | None = None
    ) -> dict[Worker, Any]:
        """What those answer who serve, or have requests still, and are well."""
        answers: dict[Worker, Any] = {}

        async def ask(worker: Worker) -> None:
            with suppress(NoAnswer):
                answers[worker] = await worker.channel.ask(what, body, within=within)

        now = trio.current_time()
        async with trio.open_nursery() as nursery:
            for worker in self._workers:
                is_there = worker.state is not State.STARTING and not worker.is_quiet(now, 3.0)
                if is_there and worker is not but:
                    nursery.start_soon(ask, worker)
        return answers

    def _take_page(self, worker: Worker, page: Mapping[str, Any]) -> None:
        if page["made"] > worker.last_page and worker in self._workers:
            worker.last_page = page["made"]
            self.metrics.take(worker.pid, page["text"], is_whole=page["is_whole"])

    def _tell_all(self, what: str, body: Any = None) -> None:
        for worker in self._workers:
            worker.channel.tell(what, body)

    def _spread_news(self) -> None:
        news = self._news()
        self.metrics.note_workers(news["counts"]["of"], news["counts"]["ready"])
        self._tell_all(Said.NEWS, news)

    def _news(self) -> Json:
        refusal = self._reloader.refusal
        return {
            "counts": {"ready": self._count(State.READY), "of": self.config.workers},
            "refused": None if refusal is None else refusal.report(),
        }

    def _say_ready(self) -> None:
        self.notifier.ready()
        self.notifier.status(f"{self._count(State.READY)} of {self.config.workers} workers serve")

    def _ready(self) -> list[Worker]:
        return [worker for worker in self._workers if worker.state is State.READY]

    def _count(self, state: State) -> int:
        return sum(worker.state is state for worker in self._workers)
