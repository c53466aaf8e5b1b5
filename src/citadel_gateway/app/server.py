"""Listening, serving and stopping.

Hypercorn's configuration sets up TLS, and ALPN says which protocol a client gets: HTTP/2 on
Hypercorn's frames, or HTTP/1.1, which is spoken by our own connection class unless
``service.server`` says otherwise.  Every connection runs behind a boundary: whatever goes wrong in
it ends it alone.

Stopping is three nested facts: readiness turns red, listeners close, and a deadline is set for
the requests that are still running.

Whoever has connected must be answered.  The kernel has accepted connections that we have not seen
yet, and closing the last descriptor of a listener resets them.  So a server that is alone with its
listener takes them all before it closes it.  One that shares it with another process (the service
manager, or a successor) leaves them there: they are the next process's.
"""

from __future__ import annotations

import errno
import math
import socket
import ssl
from collections.abc import Callable
from contextlib import closing
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
from citadel_gateway.errors import too_many_connections
from citadel_gateway.io.crowd import Turns
from citadel_gateway.io.deadlines import Deadlines
from citadel_gateway.io.departures import Departures
from citadel_gateway.io.http1_exchange import App
from citadel_gateway.io.http1_server import ConnectionLimits, HttpConnection, ignore
from citadel_gateway.io.http2_server import Http2Connection
from citadel_gateway.io.listening import Address, CannotListen, open_listener, refuse_newcomers
from citadel_gateway.io.tcp_stream import TcpStream
from citadel_gateway.io.turnstile import MOST, Turnstile, turnstile
from citadel_gateway.policy.watermarks import Level
from citadel_gateway.wire.http1_response import encode_response_head

_HANDSHAKES = 0.02  # seconds for connections that are being made while the listener closes
_FRESH = 0.25  # seconds a connection that was never used is given to speak, when stopping
_CUT_WITHIN = 1.5  # seconds for the last words of requests that are cut
_MOST_TURNED_AWAY = 64  # connections above the limit that are told so, at once
_TURN_AWAY_WITHIN = 1.0

_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_RECOVERS = 0.1  # seconds between two tries to accept while this machine lacks something

Stream = TcpStream | trio.SSLStream[TcpStream]


@attrs.define(eq=False)
class Server:
    """Serves one application on one address.

    :param on_crash: told of exceptions that end a connection or escape the application.
    :param on_unserved: told of answers that the application did not give: status, code, why, to
        whom.
    :param inherited: a socket that listens already, and goes on doing so without us.
    :param on_timeout: told which clock a client has let run out.
    :param turns: when to accept, among the workers that share the socket.
    :param goes_last: under load, everything else in this process goes before its clients.
    """

    app: App
    address: Address
    config: ServiceConfig
    on_crash: Callable[[str, Exception], None]
    on_unserved: Callable[[int, str, str, str], None] = ignore
    inherited: socket.socket | None = None
    on_timeout: Callable[[str], None] = ignore
    turns: Turns | None = None
    goes_last: bool = False
    bound: Address | None = attrs.field(default=None, init=False)
    _connections: set[HttpConnection | Http2Connection] = attrs.field(factory=set, init=False)
    _streams: set[Stream] = attrs.field(factory=set, init=False)
    _emptied: trio.Event = attrs.field(factory=trio.Event, init=False)
    _promises: bool = attrs.field(default=True, init=False)
    _is_brief: bool = attrs.field(default=False, init=False)  # connections do not last for now
    _reopened: trio.Event | None = attrs.field(default=None, init=False)  # while it is shut
    _accepting: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)
    _listener: socket.socket | None = attrs.field(default=None, init=False)
    _is_shared: bool = attrs.field(init=False)
    _turnstile: Turnstile | None = attrs.field(default=None, init=False)
    _nursery: trio.Nursery = attrs.field(init=False)
    _closed: trio.Event = attrs.field(factory=trio.Event, init=False)
    _serving: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)
    _hypercorn: HypercornConfig = attrs.field(init=False)
    _tls: ssl.SSLContext | None = attrs.field(default=None, init=False)
    _context: WorkerContext = attrs.field(factory=lambda: WorkerContext(None), init=False)
    _limits: ConnectionLimits = attrs.field(init=False)
    _deadlines: Deadlines = attrs.field(factory=Deadlines, init=False)
    _departures: Departures = attrs.field(factory=Departures, init=False)

    def __attrs_post_init__(self) -> None:
        self._is_shared = self.inherited is not None
        self._hypercorn = _hypercorn_config(self.address, self.config)
        self._limits = _limits(self.config)

    @property
    def open_connections(self) -> int:
        return len(self._streams)

    @property
    def is_shared(self) -> bool:
        """Whether somebody else listens on the same socket, and goes on when we stop."""
        return self._is_shared

    def share(self) -> None:
        """Somebody else listens on the same socket from now on."""
        self._is_shared = True

    def own(self) -> None:
        """Nobody will listen on the socket when we stop, so nobody may be left in it."""
        self._is_shared = False

    @property
    def listener(self) -> socket.socket:
        if self._listener is None:
            raise RuntimeError("it does not listen")
        return self._listener

    def renew(self, config: ServiceConfig, tls: ssl.SSLContext | None) -> None:
        """New settings and another certificate for new connections; the address stays.

        :param tls: from :func:`make_tls`; ``None`` if and only if there was none before.
        """
        self.config, self._limits = config, _limits(config)
        self._hypercorn = _hypercorn_config(self.address, config)
        self._tls = tls
        if self._listener is not None and self._listener.fileno() >= 0:
            _limit_stalls(self._listener, config.write_timeout)

    async def run(
        self, *, task_status: trio.TaskStatus[Address] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve until :meth:`stop`; returns when the last connection has ended.

        Raises :class:`CannotListen`.  Reports started once the sockets listen.
        """
        self._turnstile = turnstile() if self.goes_last else None
        with self._listen() as self._listener, closing(self._departures), self._serving:
            async with trio.open_nursery() as watchers:
                watchers.start_soon(self._deadlines.run)
                watchers.start_soon(self._departures.run)
                async with trio.open_nursery() as connections:
                    self._nursery = connections
                    with self._accepting:
                        task_status.started(self.bound or self.address)
                        await self._accept(self._listener)
                    await self._closed.wait()  # until then, connections may be taken from outside
                watchers.cancel_scope.cancel()

    def stop_accepting(self) -> None:
        """Leave new connections to those who share the listener; there must be somebody."""
        self._accepting.cancel()
        if self.turns is not None:
            self.turns.leave()

    async def stop(self, within: float) -> None:
        """Close the listener, let requests finish *within* seconds, then return."""
        self.stop_accepting()
        # The listener closes first, so that whoever sees a connection end cannot come back.
        await self._close_listener()
        for connection in list(self._connections):
            if connection.served or not connection.is_idle:
                connection.drain()
        with trio.move_on_after(_FRESH):
            await self._wait_until_empty()
        await self._context.terminated.set()  # Hypercorn's connections close at once if idle
        for connection in list(self._connections):
            connection.drain()
        with trio.move_on_after(within):
            await self._wait_until_empty()

    async def _close_listener(self) -> None:
        """Nobody who is connected is left in the kernel, unless somebody else will come for them.

        From the time at which no new ones are let in, those whose handshake is under way get a
        moment to complete it.
        """
        if self._listener is not None and self._listener.fileno() >= 0:
            if not self._is_shared and refuse_newcomers(self._listener):
                self._take_waiting(self._listener, math.inf)
                await trio.sleep(_HANDSHAKES)
            if not self._is_shared:
                self._take_waiting(self._listener, math.inf)
            self._listener.close()
        self._closed.set()

    def promise_nothing(self) -> None:
        """Go on accepting, but let clients know that their connections will not last."""
        self._promises = False
        for connection in self._connections:
            connection.promise_nothing()

    def take_less(self, level: Level) -> None:
        """Give up what *level* says, beginning with connections that nobody uses.

        Connections that are open when it begins end with their next answer even if all is well
        again by then.
        """
        if level >= Level.CLOSING:
            for connection in self._connections:
                connection.promise_nothing()
        self._is_brief = level >= Level.CLOSING
        if level >= Level.SHUT and self._reopened is None:
            self._reopened = trio.Event()
            for connection in list(self._connections):
                if connection.served and connection.is_idle:
                    connection.drain()
        elif level < Level.SHUT and self._reopened is not None:
            self._reopened.set()
            self._reopened = None

    async def cut(self) -> None:
        """End what has not ended yet; clients are told where that is possible."""
        self._serving.cancel()
        with trio.move_on_after(_CUT_WITHIN):
            await self._wait_until_empty()
        for stream in list(self._streams):  # a shielded write is ended by closing what it writes to
            await trio.aclose_forcefully(stream)

    async def _wait_until_empty(self) -> None:
        while self._streams:
            self._emptied = trio.Event()
            await self._emptied.wait()

    def _note_count(self) -> None:
        if self.turns is not None and not self._accepting.cancel_called:
            self.turns.note(len(self._streams))

    async def _accept(self, listener: socket.socket) -> None:
        told = -math.inf
        self._note_count()
        while not self._accepting.cancel_called:
            await trio.lowlevel.wait_readable(listener)
            if self._reopened is not None:
                await self._reopened.wait()
            if self.turns is not None:
                await self.turns.wait()
            exc = self._take_waiting(listener, MOST if self.turns is None else 1)
            if exc is None:
                continue
            if trio.current_time() - told >= 1.0:
                told = trio.current_time()
                self.on_crash("accept", exc)
            await trio.sleep(_RECOVERS)

    def _take_waiting(self, listener: socket.socket, most: float) -> OSError | None:
        """Accept who has connected; returns what this machine lacks, if that ended it."""
        taken = 0
        while taken < most and listener.fileno() >= 0:
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                break
            except OSError as exc:
                if exc.errno in _EXHAUSTED:
                    return exc
                continue  # that connection had gone before we came to it
            sock.setblocking(False)
            stream = self._make_stream(sock)
            self._streams.add(stream)  # here, so that nobody believes that we are empty
            self._note_count()
            self._nursery.start_soon(self._handle, stream)
            taken += 1
        return None

    def _make_stream(self, sock: socket.socket) -> Stream:
        tcp = TcpStream(sock, self._turnstile)
        if self._tls is None:
            return tcp
        return trio.SSLStream(tcp, self._tls, server_side=True, https_compatible=True)

    async def _handle(self, stream: Stream) -> None:
        """The boundary around one connection: it may fail, the server may not."""
        try:
            if len(self._streams) <= self.config.max_connections:
                await self._serve(stream)
            else:
                await self._turn_away(stream)
        except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            pass  # the peer's doing: a failed handshake, a reset
        except* Exception as group:
            self.on_crash("connection", group)
        finally:
            _tcp(stream).close()
            self._streams.discard(stream)
            self._note_count()
            if not self._streams:
                self._emptied.set()

    async def _turn_away(self, stream: Stream) -> None:
        """Answer 503 above the limit of connections, as long as that costs next to nothing."""
        excess = len(self._streams) - self.config.max_connections
        if isinstance(stream, trio.SSLStream) or excess > _MOST_TURNED_AWAY:
            return
        error = too_many_connections()
        self._note_unserved(_peer(stream), error.status, error.message, error.code)
        headers, body = error.response()
        with trio.move_on_after(_TURN_AWAY_WITHIN):
            await stream.send_all(encode_response_head(error.status, headers) + body)
            await stream.send_eof()
            while await stream.receive_some():
                pass  # until the client has read it: a close with bytes unread would be a reset

    async def _serve(self, stream: Stream) -> None:
        if isinstance(stream, trio.SSLStream):
            with trio.fail_after(self.config.header_timeout):
                await stream.do_handshake()
            if stream.selected_alpn_protocol() == "h2":
                await self._serve_http2(stream)
                return
        if self.config.server is HttpServer.HYPERCORN:
            await self._serve_hypercorn(stream)
        else:
            await self._serve_http1(stream)

    async def _serve_http1(self, stream: Stream) -> None:
        client = _peer(stream)
        connection = HttpConnection(
            app=self.app,
            stream=stream,
            limits=self._limits,
            deadlines=self._deadlines,
            departures=self._departures,
            on_crash=partial(self.on_crash, "application"),
            client=client,
            server=_address(_tcp(stream).socket.getsockname()),
            scheme="http" if self._tls is None else "https",
            on_unserved=partial(self._note_unserved, client),
            on_timeout=self.on_timeout,
        )
        await self._run(connection)

    async def _serve_http2(self, stream: Stream) -> None:
        client = _peer(stream)
        connection = Http2Connection(
            app=self.app,
            stream=stream,
            limits=self._limits,
            config=self._hypercorn,
            deadlines=self._deadlines,
            departures=self._departures,
            on_crash=partial(self.on_crash, "application"),
            client=client,
            server=_address(_tcp(stream).socket.getsockname()),
            on_unserved=partial(self._note_unserved, client),
        )
        await self._run(connection)

    async def _run(self, connection: HttpConnection | Http2Connection) -> None:
        if self._is_brief or not self._promises:
            connection.promise_nothing()
        self._connections.add(connection)
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)

    def _note_unserved(
        self,
        client: tuple[str, int] | None,
        status: int,
        why: str,
        code: str = "bad_http_request",
    ) -> None:
        self.on_unserved(status, code, why, client[0] if client is not None else "unknown")

    async def _serve_hypercorn(self, stream: Stream) -> None:
        app: Any = ASGIWrapper(self.app)  # type: ignore[arg-type]  # its own, narrower types
        state = ConnectionState({})
        server = BoundedTCPServer(app, self._hypercorn, self._context, state, stream)  # type: ignore[arg-type]
        server.write_timeout = self.config.write_timeout
        await server

    def _listen(self) -> socket.socket:
        try:
            self._tls = make_tls(self.address, self.config)
        except OSError as exc:
            raise CannotListen(f"cannot listen on {self.address}: {exc}") from exc
        sock = self._open_socket()
        host, port, *_ = sock.getsockname()
        self.bound = attrs.evolve(
            self.address, host=self.address.host if self.inherited is None else host, port=port
        )
        return sock

    def _open_socket(self) -> socket.socket:
        sock = self.inherited or open_listener(self.address)
        # Accepted sockets inherit both.
        _limit_stalls(sock, self.config.write_timeout)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        return sock


class BoundedTCPServer(TCPServer):
    """Hypercorn's connection, but with an end to its writes: stock, they are shielded for ever."""

    write_timeout: float

    async def protocol_send(self, event: HypercornEvent) -> None:
        if not isinstance(event, RawData):
            await super().protocol_send(event)
            return
        broken = False
        async with self.send_lock:
            deadline = trio.current_time() + self.write_timeout
            with trio.CancelScope(shield=True, deadline=deadline) as scope:
                try:
                    await self.stream.send_all(event.data)
                except (trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError):
                    broken = True
        if broken or scope.cancelled_caught:
            await trio.aclose_forcefully(self.stream)
            await self.protocol.handle(Closed())


def make_tls(address: Address, config: ServiceConfig) -> ssl.SSLContext | None:
    """TLS for *address*, or ``None`` if it has none.  Raises ``OSError`` when a file is bad."""
    context: ssl.SSLContext | None = _hypercorn_config(address, config).create_ssl_context()
    return context


def _limits(config: ServiceConfig) -> ConnectionLimits:
    return ConnectionLimits(
        header_timeout=config.header_timeout,
        body_timeout=config.body_timeout,
        keep_alive_timeout=config.keep_alive_timeout,
        write_timeout=config.write_timeout,
    )


def _limit_stalls(sock: socket.socket, seconds: float) -> None:
    """The kernel drops a peer that acknowledges nothing for so long."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))


def _hypercorn_config(address: Address, service: ServiceConfig) -> HypercornConfig:
    config = HypercornConfig()
    config.certfile, config.keyfile = address.certfile, address.keyfile
    config.keep_alive_timeout = service.keep_alive_timeout
    config.graceful_timeout = service.drain_timeout
    config.alpn_protocols = ["h2", "http/1.1"] if service.http2 else ["http/1.1"]
    config.h11_max_incomplete_size = 16 * 1024
    config.include_server_header = False
    config.accesslog = None
    config.errorlog = None
    return config


def _tcp(stream: Stream) -> TcpStream:
    return stream.transport_stream if isinstance(stream, trio.SSLStream) else stream


def _peer(stream: Stream) -> tuple[str, int] | None:
    return _address(_tcp(stream).socket.getpeername())


def _address(name: Any) -> tuple[str, int] | None:
    return (name[0], name[1]) if isinstance(name, tuple) else None
