"""A client that speaks HTTP/1.1 by hand, and can tell a whole body from a cut one."""

from __future__ import annotations

import json as jsonlib
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Iterable
from typing import Any, Literal, Protocol, Self

import attrs
import trio

Headers = Iterable[tuple[str, str]]


class NoResponseError(Exception):
    """The connection ended before the head of a response was complete."""


@attrs.frozen
class RawResponse:
    """What came back. `complete` is false when the peer hung up before the body's own end.

    A close-delimited body has no end of its own: there a FIN completes it, and a RST does not.
    """

    status: int
    headers: list[tuple[str, str]]
    body: bytes = b""
    complete: bool = False

    def header(self, name: str) -> str | None:
        """The first value, by lower-case name."""
        return next((value for key, value in self.headers if key == name), None)

    def json(self) -> Any:
        return jsonlib.loads(self.body)


class RawClient(trio.abc.AsyncResource):
    """One connection. Nothing is retried, skipped or decoded: a 1xx is a response like any other.

    `ended` tells how the peer closed, once that was read.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.ended: Literal["fin", "rst"] | None = None
        self._buffer = bytearray()
        self._framing: Framing = Sized(0)

    @classmethod
    async def connect(cls, port: int, host: str = "127.0.0.1") -> Self:
        return cls(await trio.open_tcp_stream(host, port))

    @property
    def complete(self) -> bool:
        """Whether the body being read has reached its end."""
        return self._framing.finished

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def request(
        self, method: str, path: str, json: object = None, headers: Headers = ()
    ) -> RawResponse:
        await self.send(http_request(method, path, json, headers))
        return await self.read_response(method)

    async def read_response(self, method: str = "GET") -> RawResponse:
        """`method` is the request's: a response to HEAD has no body, whatever its head says."""
        head = await self.read_head(method)
        body = bytearray()
        while piece := await self.read_piece():
            body += piece
        return attrs.evolve(head, body=bytes(body), complete=self.complete)

    async def read_head(self, method: str = "GET") -> RawResponse:
        while (block := take_until(self._buffer, b"\r\n\r\n")) is None:
            if not await self._fill():
                raise NoResponseError(f"{self.ended} after {bytes(self._buffer[:200])!r}")
        start, headers = parse_head(block)
        head = RawResponse(int(start.split(" ")[1]), headers)
        self._framing = _response_framing(head, method)
        return head

    async def read_piece(self) -> bytes:
        """The next decoded bytes of the body; nothing at its end, whole or cut."""
        while True:
            piece = self._framing.take(self._buffer)
            if piece or self._framing.finished or not await self._fill():
                return piece

    def read_events(self, head: RawResponse | None = None) -> Events:
        """`head` is the response's, if it has been read already."""
        return Events(self, head)

    async def reset(self) -> None:
        await reset_stream(self.stream)

    async def aclose(self) -> None:
        await self.stream.aclose()

    async def _fill(self) -> bool:
        try:
            data = await self.stream.receive_some(65536)
        except trio.BrokenResourceError:
            self.ended = "rst"
            return False
        if data:
            self._buffer += data
            return True
        self.ended = "fin"
        if isinstance(self._framing, UntilClose):
            self._framing.finished = True
        return False


class Events(AsyncIterator[str]):
    """The data payloads of an event stream, as they come; ends with the body, whole or cut.

    An iterator rather than a generator, so that a test may walk away from it.
    """

    def __init__(self, client: RawClient, head: RawResponse | None = None) -> None:
        self._client = client
        self._head = head
        self._body = bytearray()
        self._unread = bytearray()
        self._data: list[str] = []
        self._ready: deque[str] = deque()

    @property
    def response(self) -> RawResponse:
        """The head, and the body as far as it was read."""
        if self._head is None:
            raise NoResponseError("no event was asked for yet")
        return attrs.evolve(self._head, body=bytes(self._body), complete=self._client.complete)

    async def __anext__(self) -> str:
        if self._head is None:
            self._head = await self._client.read_head()
        while not self._ready:
            if not (piece := await self._client.read_piece()):
                raise StopAsyncIteration
            self._feed(piece)
        return self._ready.popleft()

    def _feed(self, piece: bytes) -> None:
        self._body += piece
        self._unread += piece
        while (line := take_until(self._unread, b"\n")) is not None:
            self._read_line(line.removesuffix(b"\r").decode())

    def _read_line(self, line: str) -> None:
        if line.startswith("data:"):
            self._data.append(line.removeprefix("data:").removeprefix(" "))
        elif not line and self._data:
            self._ready.append("\n".join(self._data))
            self._data.clear()


class Framing(Protocol):
    """How a body ends. `take` moves what can be decoded out of the buffer."""

    finished: bool

    def take(self, buffer: bytearray) -> bytes: ...


class Sized:
    def __init__(self, size: int) -> None:
        self._left = size
        self.finished = size == 0

    def take(self, buffer: bytearray) -> bytes:
        piece = bytes(buffer[: self._left])
        del buffer[: len(piece)]
        self._left -= len(piece)
        self.finished = self._left == 0
        return piece


class Chunked:
    """Strict: a chunk that does not end where it said raises ValueError."""

    def __init__(self) -> None:
        self._expects: Literal["size", "data", "end of chunk", "trailer"] = "size"
        self._left = 0
        self.finished = False

    def take(self, buffer: bytearray) -> bytes:
        taken = bytearray()
        while not self.finished and self._advance(buffer, taken):
            pass
        return bytes(taken)

    def _advance(self, buffer: bytearray, taken: bytearray) -> bool:
        if self._expects == "data":
            return self._take_data(buffer, taken)
        if (line := take_until(buffer, b"\r\n")) is None:
            return False
        match self._expects:
            case "size":
                self._left = int(line.partition(b";")[0], 16)
                self._expects = "data" if self._left else "trailer"
            case "end of chunk":
                if line:
                    raise ValueError(f"a chunk runs on: {line[:100]!r}")
                self._expects = "size"
            case "trailer":
                self.finished = not line
        return True

    def _take_data(self, buffer: bytearray, taken: bytearray) -> bool:
        piece = buffer[: self._left]
        del buffer[: len(piece)]
        taken += piece
        self._left -= len(piece)
        if not self._left:
            self._expects = "end of chunk"
        return bool(piece)


class UntilClose:
    def __init__(self) -> None:
        self.finished = False

    def take(self, buffer: bytearray) -> bytes:
        piece = bytes(buffer)
        buffer.clear()
        return piece


def http_request(
    method: str,
    path: str,
    json: object = None,
    headers: Headers = (),
    *,
    body: bytes | None = None,
) -> bytes:
    """A request as bytes. Host, type and length are added unless `headers` has its own."""
    given = [(name.lower(), value) for name, value in headers]
    if json is not None:
        body = jsonlib.dumps(json).encode()
        _default(given, "content-type", "application/json")
    _default(given, "host", "gateway")
    framed = any(name == "transfer-encoding" for name, _ in given)
    if not framed and (body is not None or method in {"POST", "PUT", "PATCH"}):
        _default(given, "content-length", str(len(body or b"")))
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


def parse_head(block: bytes) -> tuple[str, list[tuple[str, str]]]:
    """The start line, and the headers with lower-case names in their order."""
    start, *lines = block.decode("latin-1").split("\r\n")
    fields = (line.partition(":") for line in lines)
    return start, [(name.lower(), value.strip()) for name, _, value in fields]


def take_until(buffer: bytearray, mark: bytes) -> bytes | None:
    """Cut the part before the mark out of the buffer, and the mark with it."""
    if (end := buffer.find(mark)) < 0:
        return None
    part = bytes(buffer[:end])
    del buffer[: end + len(mark)]
    return part


async def reset_stream(stream: trio.abc.Stream) -> None:
    """Hang up rudely: a RST on a socket. Memory knows no RST, and closes both ways."""
    if isinstance(stream, trio.SocketStream):
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await trio.aclose_forcefully(stream)


def _default(headers: list[tuple[str, str]], name: str, value: str) -> None:
    if all(key != name for key, _ in headers):
        headers.append((name, value))


def _response_framing(head: RawResponse, method: str) -> Framing:
    if method == "HEAD" or head.status < 200 or head.status in {204, 304}:
        return Sized(0)
    if "chunked" in (head.header("transfer-encoding") or ""):
        return Chunked()
    if (length := head.header("content-length")) is not None:
        return Sized(int(length))
    return UntilClose()
