"""httpx over our own connections: probes, tools and tests use it as any other transport."""

from __future__ import annotations

import re
import ssl
from collections.abc import AsyncIterator, Awaitable
from itertools import chain
from types import TracebackType
from typing import Self, TypeVar

import anyio
import attrs
import httpx

from citadel_gateway.io.connection import Connection
from citadel_gateway.io.dial import Connect, Origin, make_connect
from citadel_gateway.io.pool import ConnectionPool
from citadel_gateway.wire.http1_response import BadResponse, encode_request

T = TypeVar("T")

ORIGIN = "citadel.origin"
"""A request's extension: the :class:`Origin` to go to, for what a URL cannot say."""

_DEFAULT_PORTS = {"http": 80, "https": 443}
_BREAK = re.compile(rb"[\r\n\0]")


class AnyIOTransport(httpx.AsyncBaseTransport):
    """HTTP/1.1 on anyio streams and llhttp, with a LIFO pool.

    >>> client = httpx.AsyncClient(transport=AnyIOTransport())

    Request bodies are sent with a Content-Length: a body without one is read into memory first.
    A cancelled request closes its connection; the pool never holds one in doubt.

    :param connect: opens a stream to an origin; replace it to run over in-memory streams.
    """

    def __init__(
        self,
        *,
        connect: Connect | None = None,
        tls: ssl.SSLContext | None = None,
        pool: ConnectionPool | None = None,
    ) -> None:
        self.pool = pool or ConnectionPool(connect or make_connect(tls))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        timeouts = request.extensions.get("timeout", {})
        body = await request.aread()
        origin = request.extensions.get(ORIGIN) or _origin(request.url)
        connection = await self._acquire(origin, timeouts.get("connect"))
        try:
            await self._send(connection, request, body, timeouts.get("write"))
            response = await _reading(connection.read_head(), timeouts.get("read"))
        except BaseException:
            await self.pool.release(connection)  # in doubt, hence closed
            raise
        return httpx.Response(
            response.status,
            headers=response.headers,
            stream=ResponseStream(self.pool, connection, timeouts.get("read")),
            extensions={"http_version": b"HTTP/" + response.http_version.encode()},
        )

    async def aclose(self) -> None:
        await self.pool.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        await self.aclose()

    async def _acquire(self, origin: Origin, within: float | None) -> Connection:
        try:
            with anyio.fail_after(within):
                return await self.pool.acquire(origin)
        except TimeoutError as exc:
            raise httpx.ConnectTimeout(f"no connection to {origin.host} in {within} s") from exc
        except OSError as exc:
            raise httpx.ConnectError(f"cannot connect to {origin.host}: {exc}") from exc

    async def _send(
        self, connection: Connection, request: httpx.Request, body: bytes, within: float | None
    ) -> None:
        raw = _encode(request, body)
        try:
            with anyio.fail_after(within):
                await connection.send(raw, bodiless=request.method == "HEAD")
        except TimeoutError as exc:
            raise httpx.WriteTimeout(f"the request was not taken in {within} s") from exc
        except OSError as exc:
            raise httpx.WriteError(str(exc)) from exc


def make_probe_client(pool: ConnectionPool | None = None) -> httpx.AsyncClient:
    """A client for the gateway's own questions: it minds no proxy settings and bounds no time."""
    transport = AnyIOTransport(pool=pool)
    return httpx.AsyncClient(transport=transport, trust_env=False, timeout=None)  # noqa: S113


@attrs.define(eq=False)
class ResponseStream(httpx.AsyncByteStream):
    """A body on its way; closing it gives the connection back, or hangs up."""

    pool: ConnectionPool
    connection: Connection
    within: float | None
    _open: bool = attrs.field(default=True, init=False)

    # Not a generator, which would be left half-way when a caller walks off.

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if data := await _reading(self.connection.read_body(), self.within):
            return data
        raise StopAsyncIteration

    async def aclose(self) -> None:
        if self._open:
            self._open = False
            await self.pool.release(self.connection)


async def _reading(read: Awaitable[T], within: float | None) -> T:
    try:
        with anyio.fail_after(within):
            return await read
    except TimeoutError as exc:
        raise httpx.ReadTimeout(f"nothing was received in {within} s") from exc
    except BadResponse as exc:
        raise httpx.RemoteProtocolError(str(exc)) from exc
    except OSError as exc:
        raise httpx.ReadError(str(exc)) from exc


def _origin(url: httpx.URL) -> Origin:
    if url.scheme not in _DEFAULT_PORTS:
        raise httpx.UnsupportedProtocol(f"cannot speak {url.scheme!r}")
    return Origin(url.scheme, url.host, url.port or _DEFAULT_PORTS[url.scheme])


def _encode(request: httpx.Request, body: bytes) -> bytes:
    """The request as bytes; httpx has put Host among the headers, and checks none of them."""
    method = request.method.encode("ascii")
    headers = [
        (name, value)
        for name, value in request.headers.raw
        if name.lower() not in {b"content-length", b"transfer-encoding"}
    ]
    if body or method in {b"POST", b"PUT", b"PATCH"}:
        headers.append((b"content-length", b"%d" % len(body)))
    if _BREAK.search(b"".join([method, *chain.from_iterable(headers)])):
        raise httpx.LocalProtocolError("a header with a line break would be a second request")
    return encode_request(method, request.url.raw_path, headers, body)
