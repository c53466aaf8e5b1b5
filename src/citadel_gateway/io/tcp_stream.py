"""A connected socket as a Trio stream that costs no more than its system calls.

Trio's own ``SocketStream`` puts a lock, a conflict check and two checkpoints around every call.
Here, one task owns a connection, so a read waits once and a write that the kernel takes at once
waits not at all.  Such a write is no checkpoint: whoever writes in a loop must also read in it.
"""

from __future__ import annotations

import socket

import attrs
import trio

from citadel_gateway.io.turnstile import Turnstile

_READ = 64 * 1024


@attrs.define(eq=False)
class TcpStream(trio.abc.HalfCloseableStream):
    """Owns *socket*, which is connected and does not block.

    :param turnstile: where it lets others go first, until it is closed.
    """

    socket: socket.socket
    turnstile: Turnstile | None = None

    def __attrs_post_init__(self) -> None:
        if self.turnstile is not None:
            self.turnstile.enter(self.socket.fileno())

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        sock = self.socket
        while True:
            await trio.lowlevel.wait_readable(sock)
            try:
                return sock.recv(max_bytes or _READ)
            except BlockingIOError:
                continue
            except OSError as exc:
                raise self._explain(exc) from exc

    def receive_now(self) -> bytes:
        """What has arrived; nothing if nothing has, nor at the end, nor after a failure."""
        try:
            return self.socket.recv(_READ)
        except OSError:
            return b""

    def has_unread(self) -> bool:
        """Whether there are bytes to be read; the end alone does not count."""
        try:
            return bool(self.socket.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        rest = memoryview(data)[self.send_now(data) :]
        while rest:
            await self.wait_send_all_might_not_block()
            rest = rest[self.send_now(rest) :]

    def send_now(self, data: bytes | bytearray | memoryview) -> int:
        """How many bytes of *data* the kernel took without waiting."""
        try:
            return self.socket.send(data)
        except BlockingIOError:
            return 0
        except OSError as exc:
            raise self._explain(exc) from exc

    async def wait_send_all_might_not_block(self) -> None:
        try:
            await trio.lowlevel.wait_writable(self.socket)
        except (OSError, ValueError) as exc:
            raise self._explain(exc) from exc

    async def send_eof(self) -> None:
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError as exc:
            raise self._explain(exc) from exc
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """Close at once; whoever waits for the socket is told."""
        if self.socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self.socket)
            if self.turnstile is not None:
                self.turnstile.leave(self.socket.fileno())
            self.socket.close()

    def _explain(self, exc: Exception) -> Exception:
        if self.socket.fileno() < 0:
            return trio.ClosedResourceError("the connection was closed here")
        return trio.BrokenResourceError(str(exc))
