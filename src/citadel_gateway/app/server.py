"""Listening, serving and stopping.

Hypercorn opens the sockets, sets up TLS, and speaks HTTP/2.  HTTP/1.1 is spoken by our own
connection class unless ``service.server`` says otherwise.  Every connection runs behind a
boundary: whatever goes wrong in it ends it alone.

Stopping is three nested facts: readiness turns red, listeners close, and a deadline is set for
the requests that are still running.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config as HypercornConfig
from hypercorn.events import Closed, RawData
from hypercorn.events import Event as HypercornEvent
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState

from citadel_gateway.config.schema import ServiceConfig
from citadel_gateway.config.values import HttpServer
from citadel_gateway.io.http1_server import App, ConnectionLimits, HttpConnection

_BACKLOG = 2048
_FRESH = 0.25  # seconds a connection that was never used is given to speak, when stopping
_WRITE_STALL = 30.0  # seconds; what `write_timeout` is for our own connections
_CUT_WITHIN = 3.0  # seconds for the last words of requests that are cut

Stream = trio.SocketStream | trio.SSLStream[trio.SocketStream]


class CannotListen(Exception):
    """An address that the gateway was told to listen on is not to be had."""


@attrs.frozen
class Address:
    """Where to listen, and with which TLS certificate, if any."""

    host: str
    port: int
    certfile: str | None = None
    keyfile: str | None = None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@attrs.define(eq=False)
class Server:
    """Serves one application on one address.

    :param on_crash: told of exceptions that end a connection or escape the application.
    """

    app: App
    address: Address
    config: ServiceConfig
    on_crash: Callable[[str, Exception], None]
    bound: Address | None = attrs.field(default=None, init=False)
    _connections: set[HttpConnection] = attrs.field(factory=set, init=False)
    _open: int = attrs.field(default=0, init=False)
    _emptied: trio.Event = attrs.field(factory=trio.Event, init=False)
    _promises: bool = attrs.field(default=True, init=False)
    _accepting: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)
    _serving: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)
    _hypercorn: HypercornConfig = attrs.field(init=False)
    _context: WorkerContext = attrs.field(factory=lambda: WorkerContext(None), init=False)
    _limits: ConnectionLimits = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._hypercorn = _hypercorn_config(self.address, self.config)
        self._limits = ConnectionLimits(
            header_timeout=self.config.header_timeout,
            body_timeout=self.config.body_timeout,
            keep_alive_timeout=self.config.keep_alive_timeout,
            write_timeout=self.config.write_timeout,
        )

    @property
    def open_connections(self) -> int:
        return self._open

    async def run(
        self, *, task_status: trio.TaskStatus[Address] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve until :meth:`stop`; returns when the last connection has ended.

        Raises :class:`CannotListen`.  Reports started once the sockets listen.
        """
        listeners = self._listen()
        with self._serving:
            async with trio.open_nursery() as connections:
                with self._accepting:
                    task_status.started(self.bound or self.address)
                    await trio.serve_listeners(self._handle, listeners, handler_nursery=connections)

    async def stop(self, within: float) -> None:
        """Close the listeners, let requests finish *within* seconds, then cut them."""
        self._accepting.cancel()
        for connection in list(self._connections):
            if connection.served or not connection.is_idle:
                connection.drain()
        await self._context.terminated.set()
        with trio.move_on_after(_FRESH):
            await self._wait_until_empty()
        for connection in list(self._connections):
            connection.drain()
        with trio.move_on_after(within):
            await self._wait_until_empty()

    def promise_nothing(self) -> None:
        """Go on accepting, but let clients know that their connections will not last."""
        self._promises = False
        for connection in self._connections:
            connection.promise_nothing()

    async def cut(self) -> None:
        """End what has not ended yet; clients are told where that is possible."""
        self._serving.cancel()
        with trio.move_on_after(_CUT_WITHIN):
            await self._wait_until_empty()

    async def _wait_until_empty(self) -> None:
        while self._open:
            self._emptied = trio.Event()
            await self._emptied.wait()

    async def _handle(self, stream: Stream) -> None:
        """The boundary around one connection: it may fail, the server may not."""
        self._open += 1
        try:
            if self._open <= self.config.max_connections:
                await self._serve(stream)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            pass  # the peer's doing: a failed handshake, a reset
        except Exception as exc:
            self.on_crash("connection", exc)
        finally:
            self._open -= 1
            if not self._open:
                self._emptied.set()
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(stream)

    async def _serve(self, stream: Stream) -> None:
        protocol = "http/1.1"
        if isinstance(stream, trio.SSLStream):
            with trio.fail_after(self._hypercorn.ssl_handshake_timeout):
                await stream.do_handshake()
            protocol = stream.selected_alpn_protocol() or protocol
        if protocol == "h2" or self.config.server is HttpServer.HYPERCORN:
            await self._serve_hypercorn(stream)
        else:
            await self._serve_http1(stream)

    async def _serve_http1(self, stream: Stream) -> None:
        tls = isinstance(stream, trio.SSLStream)
        sock = (stream.transport_stream if isinstance(stream, trio.SSLStream) else stream).socket
        connection = HttpConnection(
            app=self.app,
            stream=stream,
            limits=self._limits,
            on_crash=partial(self.on_crash, "application"),
            client=_address(sock.getpeername()),
            server=_address(sock.getsockname()),
            scheme="https" if tls else "http",
        )
        if not self._promises:
            connection.promise_nothing()
        self._connections.add(connection)
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)

    async def _serve_hypercorn(self, stream: Stream) -> None:
        app: Any = ASGIWrapper(self.app)  # type: ignore[arg-type]  # its own, narrower types
        state = ConnectionState({})
        await BoundedTCPServer(app, self._hypercorn, self._context, state, stream)  # type: ignore[arg-type]

    def _listen(self) -> list[trio.abc.Listener[Any]]:
        try:
            sockets = self._hypercorn.create_sockets()
        except OSError as exc:
            reason = "it is in use" if exc.errno == errno.EADDRINUSE else str(exc)
            raise CannotListen(f"cannot listen on {self.address}: {reason}") from exc
        sock = (sockets.secure_sockets or sockets.insecure_sockets)[0]
        # Accepted sockets inherit it: the kernel drops a peer that acknowledges nothing.
        stall = int(self.config.write_timeout * 1000)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, stall)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            sock.listen(_BACKLOG)
        except OSError as exc:
            sock.close()
            raise CannotListen(f"cannot listen on {self.address}: {exc}") from exc
        self.bound = attrs.evolve(self.address, port=sock.getsockname()[1])
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        if self.address.certfile is None:
            return [listener]
        context = self._hypercorn.create_ssl_context()
        if context is None:
            raise CannotListen(f"cannot listen on {self.address}: no TLS context")
        return [trio.SSLListener(listener, context, https_compatible=True)]


class BoundedTCPServer(TCPServer):
    """Hypercorn's connection, but with an end to its writes: stock, they are shielded for ever."""

    async def protocol_send(self, event: HypercornEvent) -> None:
        if not isinstance(event, RawData):
            await super().protocol_send(event)
            return
        broken = False
        async with self.send_lock:
            deadline = trio.current_time() + _WRITE_STALL
            with trio.CancelScope(shield=True, deadline=deadline) as scope:
                try:
                    await self.stream.send_all(event.data)
                except (trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError):
                    broken = True
        if broken or scope.cancelled_caught:
            await trio.aclose_forcefully(self.stream)
            await self.protocol.handle(Closed())


def _hypercorn_config(address: Address, service: ServiceConfig) -> HypercornConfig:
    config = HypercornConfig()
    config.bind = [str(address)]
    config.backlog = _BACKLOG
    config.certfile, config.keyfile = address.certfile, address.keyfile
    config.keep_alive_timeout = service.keep_alive_timeout
    config.graceful_timeout = service.drain_timeout
    config.h11_max_incomplete_size = 16 * 1024
    config.include_server_header = False
    config.accesslog = None
    config.errorlog = None
    return config


def _address(name: Any) -> tuple[str, int] | None:
    return (name[0], name[1]) if isinstance(name, tuple) else None
