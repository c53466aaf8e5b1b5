"""The network of a run: sockets that never leave the process.

Both sides of the gateway talk over Unix sockets, so that its own paths to sockets run as they do in
production: the pump, the watch for departures, writes that block.  What one side writes the other
can read in the same instant, and so nothing depends on how fast the machine is.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import count
from os import getpid
from typing import Any

import anyio
import anyio.abc
import attrs
import trio
from anyio.abc import SocketAttribute

from citadel_gateway.app.server import Server, Stream

_READ = 64 * 1024


@attrs.define(eq=False)
class Wire(trio.abc.Stream):
    """One end of a connection, in the hands of a simulated client or engine.

    :param other: the gateway's end, where a reset has to be forged.
    """

    sock: socket.socket
    other: socket.socket | None = None
    dropped: int = attrs.field(default=0, init=False)  # things said that nobody has listened to

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Nothing at the end.  Raises ``trio.BrokenResourceError`` after a reset."""
        while True:
            await trio.lowlevel.wait_readable(self.sock)
            try:
                return self.sock.recv(max_bytes or _READ)
            except BlockingIOError:
                continue
            except OSError as exc:
                raise trio.BrokenResourceError(str(exc)) from exc

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """No checkpoint where the other end has room: nothing can happen in between."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self.sock.send(rest) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self.sock)
            except OSError as exc:
                raise trio.BrokenResourceError(str(exc)) from exc

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.wait_writable(self.sock)

    async def is_left_within(self, seconds: float) -> bool:
        """Wait that long, or until the other end has hung up; what it says is dropped."""
        with trio.move_on_after(seconds):
            try:
                while await self.receive_some():
                    self.dropped += 1
            except trio.BrokenResourceError:
                pass
            return True
        return False

    def is_over(self) -> bool:
        """Whether the other end has hung up, as far as it shows."""
        try:
            return not self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self, *, reset: bool = False) -> None:
        """Hang up; a reset is what the kernel makes of a close with something unread."""
        if self.sock.fileno() >= 0:
            self.dropped += self._has_unread()
        if reset and self.other is not None and self.other.fileno() >= 0:
            with suppress(OSError):
                self.other.send(b"!")
        if self.sock.fileno() >= 0:
            trio.lowlevel.notify_closing(self.sock)
            self.sock.close()

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()

    def _has_unread(self) -> bool:
        try:
            return bool(self.sock.recv(1, socket.MSG_PEEK))
        except OSError:
            return False


class GatewayEnd(anyio.abc.ByteStream):
    """The gateway's end of a connection to an engine.

    :param direct: show the socket, as plain TCP does; TLS has none to show.
    """

    def __init__(self, sock: socket.socket, *, direct: bool) -> None:
        self._socket = sock
        self._wire = Wire(sock)
        self._direct = direct

    @property
    def is_open(self) -> bool:
        return self._socket.fileno() >= 0

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        return {SocketAttribute.raw_socket: lambda: self._socket} if self._direct else {}

    async def receive(self, max_bytes: int = _READ) -> bytes:
        with _anyio_errors():
            data = await self._wire.receive_some(max_bytes)
        if not data:
            raise anyio.EndOfStream
        return data

    async def send(self, item: bytes) -> None:
        await trio.lowlevel.checkpoint()
        with _anyio_errors():
            await self._wire.send_all(item)

    async def send_eof(self) -> None:
        self._socket.shutdown(socket.SHUT_WR)
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await self._wire.aclose()


class _anyio_errors:  # noqa: N801  # used like a function
    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, exc: BaseException | None, __: object) -> None:
        if isinstance(exc, trio.BrokenResourceError):
            raise anyio.BrokenResourceError from exc
        if isinstance(exc, trio.ClosedResourceError):
            raise anyio.ClosedResourceError from exc


def wire_pair(*, direct: bool) -> tuple[GatewayEnd, Wire]:
    """A connection: the gateway's end and the engine's."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    return GatewayEnd(ours, direct=direct), Wire(theirs, other=ours)


_numbers = count()


@attrs.define(eq=False)
class Door:
    """Where the gateway listens for clients.

    :param send_buffer: bytes that the gateway may write ahead of what a client reads.
    """

    send_buffer: int
    name: str = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.name = f"\0citadel-sim-{getpid()}-{next(_numbers)}"

    def knock(self) -> Wire:
        """A client's new connection.  Raises ``OSError`` when nobody listens any more."""
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        try:
            sock.connect(self.name)
        except OSError:
            sock.close()
            raise
        return Wire(sock)

    def server_class(self) -> type[Server]:
        """The gateway's server, with this door in place of a TCP port."""
        door = self

        class DoorServer(Server):
            def _open_socket(self) -> socket.socket:
                sock = socket.socket(socket.AF_UNIX)
                sock.bind(door.name)
                sock.listen(4096)
                sock.setblocking(False)
                return sock

            def _make_stream(self, sock: socket.socket) -> Stream:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, door.send_buffer)
                return super()._make_stream(sock)

        return DoorServer
