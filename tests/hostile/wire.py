"""Sockets that a test can be rude with, and requests to send over them."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Literal, Self

import attrs
import trio

CHAT = b"/v1/chat/completions"
Ended = Literal["open", "fin", "rst"]


class Peer:
    """A client's socket. What is read is kept."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self.sock = sock
        self.data = bytearray()
        self.ended: Ended = "open"

    @classmethod
    async def connect(cls, port: int, *, receive_buffer: int | None = None) -> Self:
        sock = trio.socket.socket()
        try:
            if receive_buffer is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await sock.connect(("127.0.0.1", port))
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    async def send(self, data: bytes) -> bool:
        """False once the other side has closed: what is left is not sent."""
        view = memoryview(data)
        try:
            while view:
                view = view[await self.sock.send(view) :]
        except OSError:
            return False
        return True

    async def receive(self, most: int = 65536) -> bytes:
        """Empty when the connection has ended, one way or the other."""
        try:
            data = await self.sock.recv(most)
        except OSError:
            self.ended = "rst"
            return b""
        if not data:
            self.ended = "fin"
        self.data += data
        return data

    async def receive_to_the_end(self) -> bytes:
        while await self.receive():
            pass
        return bytes(self.data)

    def half_close(self) -> None:
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.sock.close()

    def reset(self) -> None:
        with suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


def chat_body(model: str, user: str = "", **fields: Any) -> bytes:
    """Nothing in it needs to be changed on the way, so that it can be compared."""
    asked = {"model": model, "messages": [{"role": "user", "content": "hi"}], **fields}
    if fields.get("stream"):
        asked["stream_options"] = {"include_usage": True}
    if user:
        asked["user"] = user
    return json.dumps(asked).encode()


@attrs.frozen
class Raw:
    """A request in parts that a test may change before they are put together."""

    lines: tuple[bytes, ...]
    body: bytes = b""

    def __bytes__(self) -> bytes:
        return b"\r\n".join([*self.lines, b"", b""]) + self.body

    def without(self, name: bytes) -> Raw:
        start, *fields = self.lines
        kept = [f for f in fields if f.partition(b":")[0].lower() != name.lower()]
        return attrs.evolve(self, lines=(start, *kept))

    def plus(self, *lines: bytes) -> Raw:
        return attrs.evolve(self, lines=(*self.lines, *lines))

    def started(self, line: bytes) -> Raw:
        return attrs.evolve(self, lines=(line, *self.lines[1:]))


def post(body: bytes, path: bytes = CHAT, version: bytes = b"HTTP/1.1") -> Raw:
    return Raw(
        (
            b"POST %s %s" % (path, version),
            b"Host: gateway",
            b"Content-Type: application/json",
            b"Content-Length: %d" % len(body),
        ),
        body,
    )


def chunks(
    body: bytes, size: int = 0, extension: bytes = b"", trailers: Iterable[bytes] = ()
) -> bytes:
    size = size or max(1, (len(body) + 1) // 2)
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    encoded = b"".join(b"%x%s\r\n%s\r\n" % (len(p), extension, p) for p in pieces)
    return encoded + b"\r\n".join([b"0", *trailers, b"", b""])


def chunked(body: bytes, encoded: bytes | None = None) -> Raw:
    raw = post(body).without(b"content-length").plus(b"Transfer-Encoding: chunked")
    return attrs.evolve(raw, body=chunks(body) if encoded is None else encoded)


def get(path: bytes = b"/v1/models") -> Raw:
    return Raw((b"GET %s HTTP/1.1" % path, b"Host: gateway"))
