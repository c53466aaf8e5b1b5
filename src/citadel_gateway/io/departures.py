"""Noticing that a client has left while nobody reads from its connection.

All connections are watched for the end of what their clients send, and for nothing else: bytes of
a next request wait in the kernel, in order, until their turn.  Only an end behind so many of them
that the kernel takes no more cannot be seen, so a few times a second those connections are told
that have something to read.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn, Protocol

import attrs
import trio

from citadel_gateway.io.tcp_stream import TcpStream
from citadel_gateway.io.ticks import sleep_until_tick

_LEFT = select.EPOLLRDHUP | select.EPOLLET  # errors and resets are always reported
_MOST = 1024
_LOOK_EVERY = 0.25  # seconds
_READ = 64 * 1024
MOST_AHEAD = 256 * 1024  # bytes of next requests that are kept until their turn


class Leaver(Protocol):
    """A connection whose client may leave."""

    def pass_on_leave(self) -> None:
        """Tell whoever works for the client, at once; must not wait."""
        ...

    def leave(self) -> None:
        """Stop working for the client."""
        ...

    def read_ahead(self) -> None:
        """Something waits to be read; called now and then while that is so."""
        ...


@attrs.define(eq=False)
class Departures:
    """Watches connected sockets; :meth:`run` must be running."""

    _epoll: select.epoll = attrs.field(factory=select.epoll, init=False)
    _unread: select.epoll = attrs.field(factory=select.epoll, init=False)
    _watched: dict[int, Leaver] = attrs.field(factory=dict, init=False)

    @contextmanager
    def watching(self, sock: socket.socket, leaver: Leaver) -> Iterator[None]:
        """Tell *leaver* when the peer of *sock* shuts down, closes, or resets."""
        descriptor = sock.fileno()
        self._watched[descriptor] = leaver
        self._epoll.register(descriptor, _LEFT)
        self._unread.register(descriptor, select.EPOLLIN)
        try:
            yield
        finally:
            if self._watched.get(descriptor) is leaver:
                del self._watched[descriptor]
            if sock.fileno() == descriptor:  # a closed one has gone by itself
                self._epoll.unregister(descriptor)
                self._unread.unregister(descriptor)

    def close(self) -> None:
        self._epoll.close()
        self._unread.close()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_for_input)
            while True:
                await trio.lowlevel.wait_readable(self._epoll.fileno())
                self._tell()

    async def _watch_for_input(self) -> NoReturn:
        while True:
            await trio.lowlevel.wait_readable(self._unread.fileno())
            await sleep_until_tick(_LOOK_EVERY)  # most of it is read by whoever waits for it
            for descriptor, _ in self._unread.poll(0, _MOST):
                if (leaver := self._watched.get(descriptor)) is not None:
                    leaver.read_ahead()

    def _tell(self) -> None:
        found = self._epoll.poll(0, _MOST)
        leavers = [self._watched.pop(fd) for fd, _ in found if fd in self._watched]
        # Clients often leave together.  Cleaning up after one takes longer than passing on that
        # ten have left, so all engines are told before the first clean-up begins.
        for leaver in leavers:
            leaver.pass_on_leave()
        for leaver in leavers:
            leaver.leave()


@attrs.define(eq=False)
class ReadAhead(trio.abc.Stream):
    """The same for a stream without a socket: whoever reads ahead comes to its end in time.

    What was read ahead is what the next :meth:`receive_some` returns.
    """

    stream: trio.abc.Stream
    leaver: Leaver
    _ahead: bytearray = attrs.field(factory=bytearray, init=False)
    _ended: bool = attrs.field(default=False, init=False)
    _news: trio.Event = attrs.field(factory=trio.Event, init=False)
    _room: trio.Event = attrs.field(factory=trio.Event, init=False)

    async def read_ahead(self) -> None:
        try:
            while data := await self.stream.receive_some(_READ):
                self._ahead += data
                self._news.set()
                while len(self._ahead) >= MOST_AHEAD:
                    self._room = trio.Event()
                    await self._room.wait()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        self._ended = True
        self._news.set()
        self.leaver.pass_on_leave()
        self.leaver.leave()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        while not self._ahead and not self._ended:
            await self._news.wait()
            self._news = trio.Event()
        data = bytes(self._ahead[:max_bytes])
        del self._ahead[: len(data)]
        self._room.set()
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self.stream.aclose()


def socket_of(stream: trio.abc.Stream) -> socket.socket | None:
    """The socket below *stream*, through TLS if there is any."""
    if isinstance(stream, trio.SSLStream):
        stream = stream.transport_stream
    return stream.socket if isinstance(stream, TcpStream) else None
