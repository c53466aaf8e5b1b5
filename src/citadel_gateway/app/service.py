"""The gateway, assembled: everything that lives as long as the process, in one nursery."""

from __future__ import annotations

import logging
import random
import signal
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import trio

from citadel_gateway.app.admin import MONITORING
from citadel_gateway.app.cors import Cors
from citadel_gateway.app.front import Front
from citadel_gateway.app.gateway_orchestrator import GatewayOrchestrator
from citadel_gateway.app.guard import Doorkeeper
from citadel_gateway.app.load_balancer import LoadBalancer
from citadel_gateway.app.operations import Operations
from citadel_gateway.app.relay import Receive, Relay, Send
from citadel_gateway.app.reports import Reports
from citadel_gateway.app.routes import PROBED, make_quart_app
from citadel_gateway.app.server import Address, Server
from citadel_gateway.app.watch import Watch
from citadel_gateway.config.flat import AnyConfig, as_schema
from citadel_gateway.io.access_log import access_line
from citadel_gateway.io.admission import Admission
from citadel_gateway.io.deadlines import Deadlines
from citadel_gateway.io.dial import Connect, Dialer, make_connect
from citadel_gateway.io.logs import JsonLog, redact
from citadel_gateway.io.metrics import Levels, Metrics
from citadel_gateway.io.pool import ConnectionPool
from citadel_gateway.io.pump import Pump
from citadel_gateway.io.record import CLIENT_CLOSED_REQUEST, RequestRecord
from citadel_gateway.io.resolver import Resolver
from citadel_gateway.io.supervisor import supervise
from citadel_gateway.io.systemd import Notifier, feed_watchdog
from citadel_gateway.io.transport import make_probe_client
from citadel_gateway.io.upstream import UpstreamClient
from citadel_gateway.policy.circuit_breaker import Transition
from citadel_gateway.policy.endpoint import Endpoint
from citadel_gateway.policy.priority import NAMES, NEWCOMER
from citadel_gateway.policy.waitroom import Waitroom
from citadel_gateway.wire.openai_request import AUTO

_FIRST_ROUND = 1.5  # seconds that the first probes may hold up the start
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
    """

    def __init__(
        self,
        config: AnyConfig,
        *,
        connect: Connect | None = None,
        resolver: Resolver | None = None,
        rng: random.Random | None = None,
        log: JsonLog | None = None,
    ) -> None:
        self.config = as_schema(config)
        rng = rng or random.Random()
        self.log = log or JsonLog()
        self.deadlines = Deadlines()
        self.pump = Pump()
        self.log.level = logging.getLevelName(self.config.monitoring.log_level.value)
        self.draining = trio.Event()
        self._cutting = False
        self._servers: list[Server] = []
        self._breaker_news = trio.Event()
        self.resolver = resolver or Resolver(ttl=self.config.load_balancer.dns_ttl)
        self.resolver.on_trouble = self._note_name_trouble
        self.balancer = LoadBalancer(self.config, rng=rng, resolver=self.resolver)
        self.pool = self._make_pool(connect)
        self.admission = Admission(
            Waitroom(
                seats=self.config.performance.max_concurrent_requests,
                room=self.config.load_balancer.queue_size,
                patience=self.config.load_balancer.queue_timeout,
                lower_share=self.config.load_balancer.lower_priority_share,
            ),
            on_transition=self._note_transition,
        )
        self.balancer.on_panic = self._note_panic
        self.operations = Operations(self.balancer, self.admission.pump, self._note_order)
        self.reports = Reports(self.balancer, self.admission.waitroom, int(time.time()))
        self._now: Callable[[], float] = time.monotonic  # until the event loop's clock runs
        self.metrics = Metrics(self._levels)
        self.doorkeeper = Doorkeeper(self.config, self.metrics.rejected)
        probe_client = make_probe_client(self.pool)
        self.watch = Watch(
            balancer=self.balancer,
            client=probe_client,
            on_flip=self._note_flip,
            on_arrival=self._note_arrival,
            on_crash=self._note_background_crash,
        )
        self.resolver.on_change = self.watch.note_change
        self.orchestrator = GatewayOrchestrator(
            balancer=self.balancer,
            admission=self.admission,
            client=UpstreamClient(self.pool, self.deadlines, self.pump),
            metrics=self.metrics,
            suspect=self.watch.suspect,
        )
        relay = Relay(
            doorkeeper=self.doorkeeper,
            balancer=self.balancer,
            orchestrator=self.orchestrator,
            on_end=self._note_end,
            on_crash=self.note_crash,
            is_cutting=lambda: self._cutting,
        )
        quart: Callable[..., Awaitable[None]] = make_quart_app(self)
        monitoring = self.config.monitoring
        self.app = Front(
            relay,
            quart,
            Cors(self.config.security.cors),
            on_end=self._note_answer,
            unlogged=PROBED | {monitoring.health_check_endpoint, monitoring.metrics_endpoint},
        )
        self._quart = quart

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
            for name, task in self._background_tasks().items():
                background.start_soon(
                    partial(supervise, task, name=name, on_crash=self._note_background_crash)
                )
            await self.watch.look_once(_FIRST_ROUND)
            background.start_soon(
                partial(
                    supervise, self.watch.run, name="watch", on_crash=self._note_background_crash
                )
            )
            try:
                yield
            finally:
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
        task_status: trio.TaskStatus[Address] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until SIGTERM or SIGINT, or until :attr:`draining` is set; then drain and return.

        Reports started with the API's address once both listeners are open.
        Raises ``CannotListen``.
        """
        notifier = notifier or Notifier.from_environ({})
        async with self.open(), trio.open_nursery() as nursery:
            nursery.start_soon(partial(feed_watchdog, notifier, alive=lambda: True))
            if handle_signals:
                nursery.start_soon(self._drain_on_signal, nursery.cancel_scope)
            address = await self._start_servers(nursery)
            self._announce(address)
            notifier.ready()
            task_status.started(address)
            await self.draining.wait()
            notifier.stopping()
            await self._drain()
            nursery.cancel_scope.cancel()

    def is_ready(self) -> bool:
        """Whether new requests are welcome: some model can answer, and nobody has said stop."""
        return not self.draining.is_set() and bool(self.balancer.available_models(self._now()))

    async def _start_servers(self, nursery: trio.Nursery) -> Address:
        service, monitoring = self.config.service, self.config.monitoring
        api = Address(service.host, service.port, service.tls_certfile, service.tls_keyfile)
        self._servers = [Server(self.app, api, service, self.note_crash, self._note_unserved)]
        if monitoring.prometheus_port is not None:
            second = Address(monitoring.prometheus_host, monitoring.prometheus_port)
            self._servers.append(Server(self._serve_monitoring, second, service, self.note_crash))
        bound = [await nursery.start(server.run) for server in self._servers]
        first: Address = bound[0]
        return first

    async def _drain(self) -> None:
        api, *others = self._servers
        self.log.event(logging.INFO, "draining", within=self.config.service.drain_timeout)
        api.promise_nothing()
        if api.open_connections:
            await trio.sleep(self.config.service.lame_duck)
        await api.stop(self.config.service.drain_timeout)
        self._cutting = True
        await api.cut()
        for server in others:
            await server.stop(0.0)
            await server.cut()
        self.log.event(logging.INFO, "stopped")

    async def _drain_on_signal(self, everything: trio.CancelScope) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as arriving:
            async for _ in arriving:
                if self.draining.is_set():
                    self._cutting = True
                    everything.cancel()  # asked twice: no more patience
                self.draining.set()

    # In the background.

    def _background_tasks(self) -> dict[str, Callable[[], Any]]:
        return {
            "upkeep": self._run_upkeep,
            "breaker timers": self._run_breaker_timers,
            "names": self.resolver.run,
            "log": self.log.flush_for_ever,
            "deadlines": self.deadlines.run,
            "pump": self.pump.run,
        }

    async def _run_upkeep(self) -> None:
        """Close what has been idle for too long; forget clients that have not been seen."""
        forget_at = trio.current_time() + _FORGET
        while True:
            await trio.sleep(_UPKEEP)
            await self.pool.prune()
            self.admission.pump()
            if trio.current_time() >= forget_at:
                self.doorkeeper.limiter.forget_full(trio.current_time())
                known = {endpoint.url for endpoint in self._levels().endpoints}
                self.metrics.forget_absent(known, trio.current_time())
                forget_at += _FORGET

    async def _run_breaker_timers(self) -> None:
        """Note when breakers have rested, and call those who wait for their endpoints."""
        while True:
            ends = [e.breaker.opens_again_at() for e in self.watch]
            soonest = min((end for end in ends if end is not None), default=float("inf"))
            with trio.move_on_at(soonest):
                await self._breaker_news.wait()
            self._breaker_news = trio.Event()
            for endpoint in self.watch:
                transition = endpoint.breaker.ripen(trio.current_time())
                if transition is not None:
                    self._note_transition(endpoint, transition)
            self.admission.pump()

    # What happens is told to the metrics and the log.

    def _note_end(self, record: RequestRecord) -> None:
        self.metrics.finished(record)
        if self.config.monitoring.access_log:
            self.log.request(access_line(record))

    async def _serve_monitoring(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """The application of the second listener: Quart's routes, and known to be asked there."""
        extensions = {**scope["extensions"], MONITORING: {}}
        await self._quart({**scope, "extensions": extensions}, receive, send)

    def _note_unserved(self, status: int, why: str, client: str) -> None:
        """What came was no request, or came too early or too late to be one."""
        now = self._now()
        record = RequestRecord(request_id="", route="", client=client, began=now, ended=now)
        if status == CLIENT_CLOSED_REQUEST:
            record.client_left()
        else:
            record.refuse(status=status, code="bad_http_request", message=why)
        self._note_end(record)

    def _note_answer(self, fields: dict[str, Any]) -> None:
        if self.config.monitoring.access_log:
            self.log.request(fields)

    def _note_transition(self, endpoint: Endpoint, transition: Transition) -> None:
        self._breaker_news.set()
        self.metrics.changed(endpoint, transition)
        self.log.event(
            logging.WARNING,
            "breaker",
            model=endpoint.model,
            endpoint=endpoint.url,
            before=transition.before.value,
            after=transition.after.value,
            why=transition.why,
        )

    def _note_flip(self, endpoint: Endpoint) -> None:
        self.log.event(
            logging.INFO if endpoint.health.healthy else logging.WARNING,
            "health",
            model=endpoint.model,
            endpoint=endpoint.url,
            healthy=endpoint.health.healthy,
            error=endpoint.health.last_error,
        )
        self.admission.pump()

    def _note_panic(self, model: str, begins: bool) -> None:
        self.log.event(
            logging.WARNING if begins else logging.INFO,
            "panic",
            model=model,
            state="too few endpoints are healthy; all are used" if begins else "over",
        )

    def _note_order(self, what: str, endpoint: Endpoint) -> None:
        self.log.event(
            logging.INFO,
            what,
            model=endpoint.model,
            endpoint=endpoint.url,
            in_flight=endpoint.in_flight,
        )

    def _note_arrival(self, endpoint: Endpoint, has_come: bool) -> None:
        self.log.event(
            logging.INFO,
            "endpoint",
            model=endpoint.model,
            endpoint=endpoint.url,
            known="from now on" if has_come else "no longer: its name has lost the address",
        )

    def _note_name_trouble(self, host: str, error: OSError | None) -> None:
        if error is None:
            self.log.event(logging.INFO, "the name can be looked up again", host=host)
            return
        self.log.event(
            logging.WARNING,
            "the name cannot be looked up; its last addresses stay in use",
            host=host,
            error=str(error),
        )

    def _make_pool(self, connect: Connect | None) -> ConnectionPool:
        if connect is not None:
            return ConnectionPool(connect, clock=trio.current_time)
        dialer = self._make_dialer()
        return ConnectionPool(dialer, clock=trio.current_time, is_current=dialer.is_current)

    def _make_dialer(self) -> Dialer:
        """TLS settings are read now, so that a bad file does not wait for the first request."""
        dialer = make_connect(resolver=self.resolver)
        for model in self.config.models.values():
            for endpoint in model.all_endpoints():
                if not endpoint.url.startswith("https:"):
                    continue
                dialer.context_for(endpoint.tls)
                if endpoint.tls is not None and endpoint.tls.insecure_skip_verify:
                    self.log.event(
                        logging.WARNING,
                        "certificates are not verified (insecure_skip_verify)",
                        endpoint=endpoint.url,
                    )
        return dialer

    def note_crash(self, where: str, exc: Exception) -> None:
        """An exception was caught at a boundary: a bug, to be counted and written down."""
        self.metrics.crashed(where)
        trace = "".join(traceback.format_exception(exc))
        self.log.event(logging.ERROR, "crash", where=where, exception=redact(trace))

    def _note_background_crash(self, name: str, exc: Exception) -> None:
        self.log.event(logging.ERROR, "background task crashed", task=name)
        self.note_crash("background", exc)

    def _announce(self, address: Address) -> None:
        self.log.event(
            logging.INFO, "listening", address=str(address), python=sys.version.split()[0]
        )
        service = self.config.service
        if service.workers > 1:
            self.log.event(
                logging.WARNING,
                f"service.workers is {service.workers}; this version serves with one process",
            )
        if not self.config.security.api_keys and not _is_loopback(address.host):
            self.log.event(
                logging.WARNING,
                "no API key is configured: everybody who can connect may use the models",
            )

    def _levels(self) -> Levels:
        waitroom, queues = self.admission.waitroom, (*self.balancer.models, AUTO)
        return Levels(
            endpoints=tuple(u.endpoint for u in (*self.balancer.upstreams, *self.balancer.leaving)),
            panics={name: m.quorum.is_panicking for name, m in self.balancer.models.items()},
            queue_depths={
                (queue, name): waitroom.depth(queue, rank)
                for queue in queues
                for rank, name in enumerate(NAMES)
            },
            queue_waits={queue: waitroom.wait(queue, NEWCOMER) for queue in queues},
            in_flight=waitroom.taken,
            connections=sum(s.open_connections for s in self._servers),
            tasks=_count_tasks(),
            upstream_connections=self.pool.open_count,
            draining=self.draining.is_set(),
            log_lines_dropped=self.log.dropped,
            now=self._now(),
        )


def _is_loopback(host: str) -> bool:
    return host.startswith("127.") or host in {"localhost", "::1"}


def _count_tasks() -> int:
    if not trio.lowlevel.in_trio_run():
        return 0
    return trio.lowlevel.current_statistics().tasks_living
