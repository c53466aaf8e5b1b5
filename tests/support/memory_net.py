"""A network in memory: virtual time holds, and every hang-up is noticed at once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import anyio
import anyio.abc
import trio
import trio.testing

Handler = Callable[[trio.abc.Stream], Awaitable[None]]


class MemoryByteStream(anyio.abc.ByteStream):
    """One half of a Trio stream, with anyio's manners: an end is an exception, not `b""`."""

    def __init__(
        self, stream: trio.abc.HalfCloseableStream, on_close: Callable[[], None] = lambda: None
    ) -> None:
        self._stream = stream
        self._on_close = on_close
        self._closed = False

    async def receive(self, max_bytes: int = 65536) -> bytes:
        with _anyio_errors():
            data = await self._stream.receive_some(max_bytes)
        if not data:
            raise anyio.EndOfStream
        return bytes(data)

    async def send(self, item: bytes) -> None:
        with _anyio_errors():
            await self._stream.send_all(item)

    async def send_eof(self) -> None:
        with _anyio_errors():
            await self._stream.send_eof()

    async def aclose(self) -> None:
        """Closed even when cancelled: both halves close before the first checkpoint can raise."""
        if not self._closed:
            self._closed = True
            self._on_close()
        await self._stream.aclose()


class MemoryNet:
    """Hosts that listen, refuse or say nothing.

    `connections` counts client halves not closed yet, also those whose server has gone: a
    connection the client forgets is a leak whoever hung up first.
    Buffers are unbounded, so a peer that stops reading never blocks a writer; use sockets for that.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._handlers: dict[tuple[str, int], Handler] = {}
        self._silent: set[tuple[str, int]] = set()
        self.connections = 0
        self.dialled: list[tuple[str, int]] = []

    def listen(self, host: str, port: int, handler: Handler) -> None:
        self._silent.discard((host, port))
        self._handlers[host, port] = handler

    def refuse(self, host: str, port: int) -> None:
        """New connections are refused; the open ones live on."""
        self._silent.discard((host, port))
        self._handlers.pop((host, port), None)

    def blackhole(self, host: str, port: int) -> None:
        """Connecting never completes."""
        self._silent.add((host, port))

    async def connect(self, host: str, port: int) -> anyio.abc.ByteStream:
        self.dialled.append((host, port))
        await trio.lowlevel.checkpoint()
        if (host, port) in self._silent:
            await trio.sleep_forever()
        if (handler := self._handlers.get((host, port))) is None:
            raise ConnectionRefusedError(f"nothing listens on {host}:{port}")
        client, server = trio.testing.memory_stream_pair()
        self._nursery.start_soon(_run, handler, server)
        self.connections += 1
        return MemoryByteStream(client, self._closed)

    def _closed(self) -> None:
        self.connections -= 1


async def _run(handler: Handler, stream: trio.abc.Stream) -> None:
    try:
        await handler(stream)
    except* (trio.BrokenResourceError, trio.ClosedResourceError):
        pass  # the client left, which a server shrugs off
    finally:
        await trio.aclose_forcefully(stream)


@contextmanager
def _anyio_errors() -> Iterator[None]:
    try:
        yield
    except trio.ClosedResourceError as error:
        raise anyio.ClosedResourceError from error
    except trio.BrokenResourceError as error:
        raise anyio.BrokenResourceError from error
    except trio.BusyResourceError as error:
        raise anyio.BusyResourceError("using") from error
