"""The gateway, assembled: everything that lives as long as the process, in one nursery."""

from __future__ import annotations

import logging
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any

import trio

from citadel_gateway.app.admin import MONITORING
from citadel_gateway.app.chronicle import Chronicle
from citadel_gateway.app.cors import Cors
from citadel_gateway.app.discovery import Discovery
from citadel_gateway.app.front import Front
from citadel_gateway.app.gateway_orchestrator import GatewayOrchestrator
from citadel_gateway.app.generation import Generation
from citadel_gateway.app.guard import Doorkeeper
from citadel_gateway.app.host import Alone, Host
from citadel_gateway.app.listeners import Listeners, say_unused
from citadel_gateway.app.load_balancer import LoadBalancer
from citadel_gateway.app.measure import measure
from citadel_gateway.app.operations import Operations
from citadel_gateway.app.overload import Overload, Sensors
from citadel_gateway.app.peers import Peers
from citadel_gateway.app.relay import Receive, Relay, Send
from citadel_gateway.app.reload import Reloader
from citadel_gateway.app.reload_news import ReloadNews
from citadel_gateway.app.reports import Reports
from citadel_gateway.app.routes import PROBED, make_quart_app
from citadel_gateway.app.server import Server
from citadel_gateway.app.succession import FIRST_ROUND, Succession
from citadel_gateway.app.tls_files import TlsFiles, api_address, tls_settings
from citadel_gateway.app.upkeep import RestTimers
from citadel_gateway.app.watch import Watch
from citadel_gateway.config.flat import AnyConfig, as_schema
from citadel_gateway.config.schema import GatewayConfigSchema
from citadel_gateway.io.access_log import access_line
from citadel_gateway.io.admission import Admission
from citadel_gateway.io.catalogue import Catalogue
from citadel_gateway.io.config_file import ConfigFile
from citadel_gateway.io.crowd import Turns
from citadel_gateway.io.deadlines import Deadlines
from citadel_gateway.io.dial import Connect, Dialer, make_connect
from citadel_gateway.io.listening import API, MONITORING_LISTENER, Address, Inherited, Passed
from citadel_gateway.io.logs import JsonLog
from citadel_gateway.io.metrics import Levels, Metrics
from citadel_gateway.io.pool import ConnectionPool
from citadel_gateway.io.pump import Pump
from citadel_gateway.io.record import CLIENT_CLOSED_REQUEST, RequestRecord
from citadel_gateway.io.resolver import Resolver
from citadel_gateway.io.store.base import Store
from citadel_gateway.io.store.choose import make_store
from citadel_gateway.io.store.membership import Membership
from citadel_gateway.io.successor import Successor, SuccessorFailed
from citadel_gateway.io.supervisor import supervise
from citadel_gateway.io.systemd import Notifier, feed_watchdog
from citadel_gateway.io.ticks import sleep_until_tick
from citadel_gateway.io.transport import make_probe_client
from citadel_gateway.io.upstream import UpstreamClient
from citadel_gateway.policy.circuit_breaker import Transition
from citadel_gateway.policy.endpoint import Endpoint
from citadel_gateway.policy.waitroom import Waitroom
from citadel_gateway.policy.watermarks import Level

_UPKEEP = 1.0  # seconds between two looks at what has expired
_FORGET = 30.0


class UnifiedAPIGatewayService:
    """The unified API gateway.

    >>> service = UnifiedAPIGatewayService(load_config("config/gateway.yaml"))
    >>> service.get_health_status()      # outside any event loop: probes the endpoints once
    >>> trio.run(service.run)            # serves until SIGTERM

    :param config: from ``load_config``, or a ``UnifiedAPIGatewayConfig``.
    :param connect: opens streams to endpoints; replace it to run over in-memory streams.
    :param resolver: knows the addresses of names; replace it to run without a name server.
    :param rng: for random choices and jitter; seed it to repeat a run.
    :param log: where log lines go; standard error by default.
    :param file: where *config* came from, to be read again when it has changed.
    :param sensors: tell how much memory and how many descriptors the process uses.
    :param workers: how many processes serve by this configuration on this host, this one included.
    :param store: what they share; the one that the configuration says by default.
    """

    def __init__(
        self,
        config: AnyConfig,
        *,
        connect: Connect | None = None,
        resolver: Resolver | None = None,
        rng: random.Random | None = None,
        log: JsonLog | None = None,
        file: ConfigFile | None = None,
        sensors: Sensors | None = None,
        workers: int = 1,
        store: Store | None = None,
    ) -> None:
        config = as_schema(config)
        self._rng = rng or random.Random()
        self.log = log or JsonLog()
        self.metrics = Metrics(self.levels)
        self._chronicle = Chronicle(self.log, self.metrics)
        self.deadlines = Deadlines()
        self.pump = Pump()
        self.log.level = _level(config)
        self.draining = trio.Event()
        self._has_successor = False
        self._cutting = False
        self._serving = trio.CancelScope()
        self._is_listening = False
        self._listeners: Listeners | None = None
        self._notifier = Notifier()
        self._rests = RestTimers(
            lambda: self.watch, self._note_transition, lambda: self.admission.pump()
        )
        self.resolver = resolver or Resolver(ttl=config.load_balancer.dns_ttl)
        self.resolver.on_trouble = self._chronicle.name_trouble
        self.resolver.on_change = lambda host: self.watch.note_change(host)
        self.discovery = Discovery(self.resolver)
        self.discovery.services.ttl = config.load_balancer.dns_ttl
        self.discovery.services.on_trouble = self._chronicle.name_trouble
        self.discovery.services.on_change = lambda host: self.watch.note_change(host)
        self.discovery.files.on_trouble = self._chronicle.list_trouble
        self.discovery.files.on_change = lambda path: self.watch.note_change(path)
        self._dialer = None if connect is not None else self._make_dialer(config)
        self.pool = self._make_pool(connect)
        self.admission = Admission(
            Waitroom(
                seats=config.performance.max_concurrent_requests,
                room=config.load_balancer.queue_size,
                patience=config.load_balancer.queue_timeout,
                lower_share=config.load_balancer.lower_priority_share,
            ),
            on_transition=self._note_transition,
        )
        self._started = time.time()
        self._now: Callable[[], float] = time.monotonic  # until the event loop's clock runs
        self.overload = Overload(
            sensors or Sensors(),
            on_level=self._chronicle.level,
            on_change=self._take_less,
            on_refusal=self.metrics.overloaded,
            chance=self._rng.random,
        )
        self.overload.limit_to(config.performance)
        self.peers = self._make_peers(config, workers, store)
        self._probe_client = make_probe_client(self.pool)
        self.discovery.catalogue = Catalogue(self._probe_client)
        self.discovery.catalogue.on_trouble = self._chronicle.backend_trouble
        self._succession = Succession(
            base=config,
            digest=file.digest if file else "",
            make=self._make_generation,
            on_change=self._follow,
            on_crash=self._chronicle.background_crash,
            discovery=self.discovery,
            catalogue=self.discovery.catalogue,
            log=self.log,
        )
        if self.peers is not None:
            self.peers.tell_sessions()
        self.operations = Operations(
            lambda: self.balancer,
            self._rests.note,
            lambda: self.watch.follow(),
            self._chronicle.order,
        )
        if self.peers is not None:
            self.peers.share_orders(self.operations)
        self.host: Host = Alone(self.metrics, self.operations)
        self.reloader: Reloader | None = None
        if file is not None:
            self.reloader = Reloader(
                file,
                adopt=self.adopt,
                watches=lambda: self.config.service.reload_on_change,
                observer=ReloadNews(
                    log=self.log,
                    metrics=self.metrics,
                    notifier=lambda: self._notifier,
                    on_crash=self.note_crash,
                    on_end=lambda: self._notifier.ready(),
                ),
            )
        self._quart: Callable[..., Awaitable[None]] = make_quart_app(self)
        self.app = Front(self.generation, self._quart, on_end=self._note_answer)

    def _make_generation(
        self, config: GatewayConfigSchema, digest: str, previous: Generation | None
    ) -> Generation:
        """All that is made from *config*; to take over from *previous*, if there is one."""
        balancer = LoadBalancer(
            config,
            rng=self._rng,
            discovery=self.discovery,
            previous=None if previous is None else previous.balancer,
            share=None if self.peers is None else 0,
            on_room=self._rests.note,
        )
        balancer.on_panic = self._chronicle.panic
        doorkeeper = Doorkeeper(config, self.metrics.rejected, self.membership)
        orchestrator = GatewayOrchestrator(
            balancer=balancer,
            admission=self.admission,
            client=UpstreamClient(self.pool, self.deadlines, self.pump, self.overload.buffers),
            metrics=self.metrics,
            suspect=lambda endpoint: self.watch.suspect(endpoint),
            draw=self._rng.random,
            on_rest=self._note_cool_down,
        )
        monitoring = config.monitoring
        return Generation(
            number=1 if previous is None else previous.number + 1,
            since=time.time(),
            digest=digest,
            config=config,
            balancer=balancer,
            watch=Watch(
                balancer=balancer,
                client=self._probe_client,
                on_flip=self._note_flip,
                on_arrival=self._note_arrival,
                on_crash=self._chronicle.background_crash,
                sharing=None if self.peers is None else self.peers.findings,
            ),
            doorkeeper=doorkeeper,
            orchestrator=orchestrator,
            relay=Relay(
                doorkeeper=doorkeeper,
                balancer=balancer,
                orchestrator=orchestrator,
                overload=self.overload,
                on_end=self._note_end,
                on_crash=self.note_crash,
                is_cutting=lambda: self._cutting,
            ),
            reports=Reports(balancer, self.admission.waitroom, int(self._started), self._about),
            cors=Cors(config.security.cors),
            unlogged=PROBED | {monitoring.health_check_endpoint, monitoring.metrics_endpoint},
        )

    # What is in use right now.

    @property
    def generation(self) -> Generation:
        return self._succession.current

    @property
    def generations(self) -> Sequence[Generation]:
        """Those that have requests."""
        return self._succession.living

    @property
    def membership(self) -> Membership | None:
        return None if self.peers is None else self.peers.membership

    @property
    def config(self) -> GatewayConfigSchema:
        return self.generation.config

    @property
    def balancer(self) -> LoadBalancer:
        return self.generation.balancer

    @property
    def watch(self) -> Watch:
        return self.generation.watch

    @property
    def doorkeeper(self) -> Doorkeeper:
        return self.generation.doorkeeper

    @property
    def orchestrator(self) -> GatewayOrchestrator:
        return self.generation.orchestrator

    @property
    def reports(self) -> Reports:
        return self.generation.reports

    # For people at a prompt.

    def get_health_status(self) -> dict[str, Any]:
        """The report of ``/health``: live in the event loop, from one round of probes outside."""
        if trio.lowlevel.in_trio_run():
            return self.reports.health(trio.current_time())
        return trio.run(self._probe_once)

    async def _probe_once(self) -> dict[str, Any]:
        # Over connections of their own: the service's pool must still be good for `run`.
        pool = ConnectionPool(self.pool.connect, clock=trio.current_time)
        async with make_probe_client(pool) as client:
            await self.balancer.probe_once(client)
        return self.reports.health(trio.current_time())

    # Living and dying.

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Start what runs in the background; the body is reached after the first probes.

        That is when every endpoint is known, or has had 1.5 s to answer.

        What opens last closes first.  A background task that cannot be kept alive takes the body
        down with it.
        """
        self._now = trio.current_time
        async with trio.open_nursery() as background:
            if self.peers is not None:
                await background.start(self.peers.membership.store.run)
            for name, task in self._background_tasks().items():
                background.start_soon(
                    partial(supervise, task, name=name, on_crash=self._chronicle.background_crash)
                )
            with trio.move_on_after(FIRST_ROUND):
                await self._succession.catalogue.look()
            await self.watch.look_once(FIRST_ROUND)
            if self.peers is not None:
                self.peers.orders.tell_restored()
                await self.peers.caps.begun.wait()
            try:
                await self._succession.begin(background)
                yield
            finally:
                self._succession.end()
                if self.peers is not None:
                    await self.peers.leave()
                background.cancel_scope.cancel()  # first: a probe under way is not to fail
                with trio.CancelScope(shield=True):  # closing sockets waits for nobody
                    await self.pool.aclose()
                with trio.move_on_after(1.0, shield=True):
                    await self.log.flush()

    async def run(
        self,
        *,
        notifier: Notifier | None = None,
        handle_signals: bool = True,
        inherited: Sequence[Inherited] = (),
        successor: Successor | None = None,
        turns: Turns | None = None,
        task_status: trio.TaskStatus[Address] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until SIGTERM or SIGINT, or until :attr:`draining` is set; then drain and return.

        SIGHUP reads the configuration again, if it came from a file.  SIGUSR2 starts a successor,
        if there is a way to, and drains once that is ready.

        Reports started with the API's address once both listeners are open.
        Raises ``CannotListen``.

        :param inherited: sockets that listen already, to be used instead of new ones.
        :param turns: when to accept, among several workers.
        """
        self._notifier = notifier = notifier or Notifier.from_environ({})
        async with trio.open_nursery() as minding:
            if handle_signals:  # from before the first probes on: by default a signal is the end
                minding.start_soon(self._mind_signals, minding, successor)
            with self._serving:
                async with self.open(), trio.open_nursery() as nursery:
                    nursery.start_soon(
                        partial(feed_watchdog, notifier, alive=lambda: not self._has_successor)
                    )
                    listeners, address = await self._start_servers(nursery, inherited, turns)
                    is_alone = isinstance(self.host, Alone)
                    self._chronicle.listening(address, self.config, is_alone=is_alone)
                    notifier.ready()
                    task_status.started(address)
                    await self.draining.wait()
                    if not self._has_successor:
                        notifier.stopping()
                    await self._drain(listeners)
                    nursery.cancel_scope.cancel()
            minding.cancel_scope.cancel()

    def is_ready(self) -> bool:
        """Whether new requests are welcome: some model can answer, and nobody has said stop."""
        if self.draining.is_set() or self.overload.is_refusing:
            return False
        return bool(self.balancer.available_models(self._now()))

    async def _start_servers(
        self, nursery: trio.Nursery, inherited: Sequence[Inherited], turns: Turns | None
    ) -> tuple[Listeners, Address]:
        service, monitoring = self.config.service, self.config.monitoring
        passed = Passed(list(inherited))
        api = api_address(self.config)
        first = Server(
            self.app,
            api,
            service,
            self.note_crash,
            self._note_unserved,
            passed.take(API, api.host, api.port),
            self.metrics.timed_out,
            turns,
            goes_last=True,
        )
        second = None
        if monitoring.prometheus_port is not None:
            address = Address(monitoring.prometheus_host, monitoring.prometheus_port)
            sock = passed.take(MONITORING_LISTENER, address.host, address.port)
            second = Server(
                self.serve_monitoring, address, service, self.note_crash, inherited=sock
            )
        say_unused(self.log, passed.close_rest())
        listeners = self._listeners = Listeners(first, second, self.log)
        listeners.take_less(self.overload.level)
        bound = [await nursery.start(server.run) for server in listeners.all]
        self._is_listening = True
        return listeners, bound[0]

    def drain(self, *, last: bool = False) -> None:
        """Finish what is running, and return from :meth:`run`.

        :param last: nobody else comes for those who wait in the listeners that were inherited.
        """
        if last and not self._has_successor and self._listeners is not None:
            self._listeners.own()
        self.draining.set()

    def give_up(self) -> None:
        """Have no more patience with what is running."""
        self._cutting = True
        self._serving.cancel()
        self.draining.set()

    def load(self) -> dict[str, int]:
        """How much this process has to do right now."""
        return {
            "in_flight": self.admission.waitroom.taken,
            "connections": self.open_connections,
        }

    @property
    def open_connections(self) -> int:
        return 0 if self._listeners is None else self._listeners.open_connections

    async def _drain(self, listeners: Listeners) -> None:
        await listeners.drain(self.config.service)
        self._cutting = True
        await listeners.cut()

    async def _mind_signals(self, minding: trio.Nursery, successor: Successor | None) -> None:
        minded = [signal.SIGTERM, signal.SIGINT]
        if self.reloader is not None:
            minded.append(signal.SIGHUP)
        if successor is not None:
            minded.append(signal.SIGUSR2)
        with trio.open_signal_receiver(*minded) as arriving:
            async for number in arriving:
                if number == signal.SIGHUP and self.reloader is not None:
                    self.reloader.ask()
                elif number == signal.SIGUSR2 and successor is not None:
                    if self._listeners is None or not self._is_listening or successor.is_starting:
                        continue
                    if not self.draining.is_set():
                        minding.start_soon(self._hand_over, self._listeners, successor)
                else:
                    if self.draining.is_set():
                        self.give_up()  # asked twice
                    self.draining.set()

    async def _hand_over(self, listeners: Listeners, successor: Successor) -> None:
        """Start the next process with our sockets, and drain when it serves."""
        self.log.event(logging.INFO, "starting a successor")
        try:
            pid = await successor.start(listeners.sockets)
        except SuccessorFailed as exc:
            self.log.event(
                logging.ERROR, "the successor failed; serving on without it", error=str(exc)
            )
            return
        if self.draining.is_set():
            successor.end(pid)  # somebody wants an end of it meanwhile
            return
        self.log.event(logging.INFO, "handed over", pid=pid)
        self._notifier.handed_over(pid)
        self._has_successor = True
        listeners.share()
        self.draining.set()

    # Another configuration.

    async def adopt(self, config: AnyConfig, digest: str = "") -> None:
        """Serve by *config* from now on; what is running ends by the one that it began with.

        Endpoints that are new are probed before it counts.  Raises ``ConfigError``, and then has
        changed nothing.  The gateway must be open.

        :param digest: SHA-256 of the file that it came from.
        """
        await self._succession.adopt(as_schema(config), digest)

    def _follow(self, generation: Generation, previous: Generation, tls: TlsFiles) -> None:
        """Another generation is the current one: so is what else is made from its configuration."""
        config, waitroom = generation.config, self.admission.waitroom
        if self.peers is None:
            waitroom.seats = config.performance.max_concurrent_requests
        else:
            self.peers.caps.hurry()
        waitroom.patience = config.load_balancer.queue_timeout
        waitroom.resize(config.load_balancer.queue_size, config.load_balancer.lower_priority_share)
        self.resolver.ttl = self.discovery.services.ttl = config.load_balancer.dns_ttl
        self.overload.limit_to(config.performance)
        self.log.level = _level(config)
        if self._dialer is not None:
            self._dialer.renew(tls.upstream)
        if self._listeners is not None:
            self._listeners.renew(config.service, tls.listener)
        self.app.generation = generation
        if _seen_by_quart(config) != _seen_by_quart(previous.config):
            self._quart = self.app.quart = make_quart_app(self)
        self._rests.note()  # other breakers; and those who wait are called, as there is room
        self._chronicle.trust(config)

    def _about(self) -> dict[str, Any]:
        """What ``/models/status`` says of the gateway itself."""
        about = {"configuration": self._configuration()}
        return about if self.peers is None else {**about, "hosts": self.peers.presence.report()}

    def _configuration(self) -> dict[str, Any]:
        refusal = self.reloader.refusal if self.reloader is not None else None
        said = self._succession.report()
        said["since"] = _utc(said["since"])
        return {**said, "refused": None if refusal is None else refusal.report()}

    # In the background.

    def _background_tasks(self) -> dict[str, Callable[[], Any]]:
        tasks: dict[str, Callable[[], Any]] = {
            "upkeep": self._run_upkeep,
            "rest timers": self._rests.run,
            "names": self.resolver.run,
            "models of backends": self._succession.watch_models,
            "services": self.discovery.services.run,
            "endpoint files": self.discovery.files.run,
            "log": self.log.flush_for_ever,
            "deadlines": self.deadlines.run,
            "overload": self.overload.run,
            "pump": self.pump.run,
        }
        if self.reloader is not None:
            tasks["reload"] = self.reloader.run
        if self.peers is not None:
            tasks |= self.peers.tasks()
        return tasks

    async def _run_upkeep(self) -> None:
        """Close what has been idle for too long; forget clients that have not been seen."""
        forget_at = trio.current_time() + _FORGET
        while True:
            await sleep_until_tick(_UPKEEP)
            await self.pool.prune()
            self.admission.pump()
            if trio.current_time() >= forget_at:
                self.doorkeeper.limiter.forget_full(trio.current_time())
                known = {endpoint.url for endpoint in self.levels().endpoints}
                models = {*self.balancer.models, "auto"}
                self.metrics.forget_absent(known, models, trio.current_time())
                forget_at += _FORGET

    # What happens is told to the metrics and the log.

    def _note_end(self, record: RequestRecord) -> None:
        self.metrics.finished(record)
        if self.generation.config.monitoring.access_log:
            self.log.request(access_line(record))

    async def serve_monitoring(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """The application of the second listener: Quart's routes, and known to be asked there."""
        extensions = {**scope["extensions"], MONITORING: {}}
        await self._quart({**scope, "extensions": extensions}, receive, send)

    def _note_unserved(self, status: int, code: str, why: str, client: str) -> None:
        """What came was no request, or came too early or too late to be one, or to be heard."""
        now = self._now()
        record = RequestRecord(request_id="", route="", client=client, began=now, ended=now)
        if status == CLIENT_CLOSED_REQUEST:
            record.client_left()
        else:
            record.refuse(status=status, code=code, message=why)
        self._note_end(record)

    def _note_answer(self, fields: dict[str, Any]) -> None:
        if self.config.monitoring.access_log:
            self.log.request(fields)

    def _note_transition(self, endpoint: Endpoint, transition: Transition) -> None:
        """A breaker has changed through what happened here; others who share it are told, too."""
        if self.peers is not None:
            self.peers.findings.changed(endpoint, transition)
        self._tell_of(endpoint, transition)

    def _note_arrival(self, endpoint: Endpoint, has_come: bool) -> None:
        self._chronicle.arrival(endpoint, has_come)
        if self.peers is not None:
            self.peers.caps.hurry()  # until the first report its cap is not shared

    def _note_cool_down(self, endpoint: Endpoint) -> None:
        self._rests.note()
        if self.peers is not None:
            self.peers.findings.cooled(endpoint)

    def _tell_of(self, endpoint: Endpoint, transition: Transition) -> None:
        self._rests.note()
        self._chronicle.transition(endpoint, transition)

    def _note_flip(self, endpoint: Endpoint) -> None:
        self._chronicle.flip(endpoint)
        if self.discovery.services.knows_any():
            self.watch.note_change(endpoint.url)  # others may stand in for it, or need not any more
        self._rests.note()

    def _take_less(self, level: Level) -> None:
        if self._listeners is not None:
            self._listeners.take_less(level)

    def note_crash(self, where: str, exc: Exception) -> None:
        """An exception was caught at a boundary: a bug, to be counted and written down."""
        self._chronicle.crash(where, exc)

    # What it is made of.

    def _make_peers(
        self, config: GatewayConfigSchema, workers: int, store: Store | None
    ) -> Peers | None:
        store = store or make_store(config, workers, os.environ)
        if store is None:
            return None
        membership = Membership(
            store, config.store.lease, config.store.timeout, workers, self._chronicle.store
        )
        return Peers(
            membership=membership,
            admission=self.admission,
            workers=workers,
            balancer=lambda: self.balancer,
            watch=lambda: self.watch,
            seats=lambda: self.config.performance.max_concurrent_requests,
            on_transition=self._tell_of,
            on_rest=self._rests.note,
        )

    def _make_pool(self, connect: Connect | None) -> ConnectionPool:
        if connect is not None:
            return ConnectionPool(connect, clock=trio.current_time)
        dialer = self._dialer or self._make_dialer(self.config)
        return ConnectionPool(dialer, clock=trio.current_time, is_current=dialer.is_current)

    def _make_dialer(self, config: GatewayConfigSchema) -> Dialer:
        """TLS settings are read now, so that a bad file does not wait for the first request."""
        dialer = make_connect(resolver=self.resolver)
        for tls in tls_settings(config):
            dialer.context_for(tls)
        self._chronicle.trust(config)
        return dialer

    def levels(self) -> Levels:
        """What is the case right now."""
        return measure(self, self._now())


def _seen_by_quart(config: GatewayConfigSchema) -> tuple[object, ...]:
    """What the Quart application is made from; all else it asks for each time."""
    monitoring = config.monitoring
    return (
        monitoring.health_check_endpoint,
        monitoring.metrics_endpoint,
        bool(config.security.api_keys),
    )


def _level(config: GatewayConfigSchema) -> int:
    level: int = logging.getLevelName(config.monitoring.log_level.value)
    return level


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
